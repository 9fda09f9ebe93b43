"""Receives events over Redis pub/sub, which reach only the processes that listen now.

1. ``listener`` subscribes to the channels of the service and reads their messages in a thread.
   ``reader`` is its pub/sub connection.
2. ``decoder`` turns a message into an event, drops repetitions, and counts events that never
   arrived.
3. The listener queues the events for the worker threads of :mod:`flask_eventbus.receivers`.
"""
