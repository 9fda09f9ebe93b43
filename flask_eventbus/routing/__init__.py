"""The declarations of a program: signals, routes, subscriptions and receivers.

At the start, ``routes`` and ``subscriptions`` read ``EVENTBUS_PUBLISH`` and
``EVENTBUS_SUBSCRIBE``, with the ``options`` of each name. ``loading`` imports the modules of
``EVENTBUS_RECEIVERS`` and of plug-ins. ``registry`` keeps all that is declared in code.

An event that is sent starts at a ``bus_signal``, the signal that ``bus.signal(name)`` returns. It
calls the local receivers, then its ``Bridge``, which makes the payload and passes it to the
publisher. ``registry`` adds one to each signal that a route selects.

For an event that arrives, ``registry`` returns the receivers.
"""
