"""Events over Redis Streams, which every service handles at least once.

``consumer`` puts the parts together, and starts and stops their threads. An event passes through
the files in this order:

1. ``catalogue`` finds the streams that the service subscribes to.
2. ``reader`` joins their groups and reads new entries. ``fanout`` reads the streams of
   subscriptions without a group, where every process gets each event. ``group`` has the Redis
   commands.
3. ``decoder`` makes a delivery of each entry, finds events published twice, and queues the others.
4. ``consumer`` runs the receivers of a delivery, in a worker thread.
5. ``outcomes`` decides: acknowledge the entry, retry a failed receiver, or add a dead letter. It
   trims the dead letters.
6. ``acknowledger`` writes outcomes to Redis in batches.

The ``maintenance`` thread does the rest. It renews the claims of running deliveries, takes due
retries from the ``retry_queue``, gives up retries of signals that no worker reads any more,
and claims entries of dead workers with ``reclaim``. ``alarms`` finds entries that were trimmed
before they were read, and streams and groups that another program changed.
"""
