"""What a program declares: signals, routes, subscriptions, receivers, and what hooks a signal.

``registry`` keeps all declarations of one program. ``bus_signal`` is the signal that
``app.signal(name)`` returns. ``routes`` and ``subscriptions`` read ``EVENTBUS_PUBLISH`` and
``EVENTBUS_SUBSCRIBE`` with the ``options`` of each name; ``loading`` imports the modules of
``EVENTBUS_RECEIVERS`` and of plug-ins. ``bridge`` connects to a signal that a route selects and
hands each emission to the publisher.
"""
