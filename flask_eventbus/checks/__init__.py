"""The checks behind ``flask eventbus check``, without a terminal.

``doctor`` runs all checks in this order; each yields findings, which ``findings`` defines:

1. ``program`` checks settings, routes, subscriptions and receivers, and connects to nothing.
2. ``database`` checks the session and the outbox table of routes that wait for a commit.
3. ``server`` connects to Redis and checks its version, its settings, and what waits in streams.
4. ``acl`` checks who may connect, and tries the commands that this service's streams need.
"""
