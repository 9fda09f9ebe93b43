"""Runs receivers.

``delivery`` is one event for one process, ``workers`` are the threads that run receivers, and
``dispatcher`` calls the receivers of an event. ``failures`` and ``retries`` decide what follows
when one of them fails.
"""
