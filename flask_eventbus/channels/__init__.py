"""Receives events over Redis pub/sub, which reach only the processes that listen now.

1. ``reader`` is a pub/sub connection. It subscribes to the channels of the service and reads their
   messages.
2. ``listener`` reads in a thread. It turns a message into an event, drops repetitions, counts
   events that never arrived, and queues the others for the worker threads of
   :mod:`flask_eventbus.receivers`.
"""
