"""Publish events when a database transaction commits, with SQLAlchemy.

1. ``transactions`` finds the session of a program and hooks its commits and rollbacks.
2. ``after_commit`` holds events of a transaction; it publishes them after the commit and drops
   them after a rollback.
3. ``outbox`` stores events of routes with ``outbox`` in a table, in the same transaction.
4. ``relay`` publishes the events of that table, and deletes each one after Redis confirmed it.
"""
