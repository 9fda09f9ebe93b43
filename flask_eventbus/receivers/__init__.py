"""Runs the receivers of events that were read from channels or streams.

1. ``workers`` queues the events and runs the worker threads that take them. ``delivery`` is a
   stream event with its state in this process.
2. ``dispatcher`` calls each receiver of an event in its own scope. It decides if a failed one runs
   again, and logs the failure. It also reports events that contradict each other.
"""
