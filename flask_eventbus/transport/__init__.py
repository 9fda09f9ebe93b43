"""Connections to Redis, and the names of keys in it.

``urls`` reads ``EVENTBUS_URL``. ``connections`` makes a connection to a server, to a master that
Sentinels name, or to a node of a cluster; ``role`` refuses one to a replica. ``pipe`` sends a
batch of commands over one connection, and ``reconnect`` keeps reading over changing ones, with
the delays of ``backoff``. ``keys`` has the names of keys, ``clock`` Redis's time. ``embedded`` and
``supervisor`` run the server of ``embedded://``.
"""
