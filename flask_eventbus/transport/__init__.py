"""Make and hold connections to Redis, and name the keys in it.

A command passes through the files in this order:

1. ``urls`` parses ``EVENTBUS_URL`` and explains why a connection failed.
2. ``connections`` opens a connection to a single server, to the master that Sentinels name, or
   to a node of a cluster, and rejects a replica. For ``embedded://``, ``embedded`` first starts a
   development server, which ends after its last user.
3. ``connection`` makes a redis-py connection, and names its errors. ``timed_connection`` gives it a
   deadline; it has all that goes below redis-py's public API, and a class without it.
4. ``keys`` builds the key names that the command uses, and names the rights that it needs and the
   remedy if Redis refuses it.
5. ``pipe`` sends a batch of commands and reads their replies. It keeps the time of the Redis
   server as well.

``reconnect`` runs the threads that read, and connects again after an outage.
"""
