"""What a program declares: signals, routes, subscriptions and receivers.

At the start, ``routes`` and ``subscriptions`` read ``EVENTBUS_PUBLISH`` and
``EVENTBUS_SUBSCRIBE``, with the ``options`` of each name. ``loading`` imports the modules of
``EVENTBUS_RECEIVERS`` and of plug-ins. ``registry`` keeps all that is declared in code.

An event that is sent starts at a ``bus_signal``, the signal that ``bus.signal(name)`` returns. It
calls the local receivers, then its ``bridge``. The bridge exists if a route selects the signal; it
makes the payload, and passes it to the publisher.

For an event that arrives, ``registry`` returns the receivers.
"""
