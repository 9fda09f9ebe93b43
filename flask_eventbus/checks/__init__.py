"""The checks behind ``flask eventbus check``, without a terminal.

``check`` in ``server`` runs all checks in this order; each yields findings, which ``findings``
defines:

1. ``program`` checks settings, routes, subscriptions and receivers, and the database session and
   the outbox table of routes that wait for a commit. It does not connect to Redis.
2. ``server`` connects to Redis and checks its version, its settings, and the lag, retries
   and dead letters of streams.
3. ``acl`` checks who may connect, and tries the commands that this service needs.
"""
