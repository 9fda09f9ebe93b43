"""Events over Redis Streams, which reach each service once.

``consumer`` puts the parts together. ``membership`` joins the groups of the streams in its
``catalogue``; ``reader`` reads entries, ``fanout`` those that every process gets. ``decoder``
makes events of entries and drops ``duplicates``. When receivers have run,
``outcomes`` decides whether an event is done, retried or a dead letter, and ``acknowledger``
writes that to Redis. ``retry_queue`` brings what is due again, ``reclaim`` what workers left that
died, and ``maintenance`` keeps claims and groups alive.
"""
