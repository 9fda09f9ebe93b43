"""Events and database transactions, with SQLAlchemy.

``after_commit`` holds events until the commit, ``outbox`` stores them in the same transaction, and
``relay`` publishes what the outbox has. ``transactions`` finds the session of a program.
"""
