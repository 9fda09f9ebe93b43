"""The work of an operator, as functions without a terminal.

A command opens a connection with ``streams`` (streams and their groups), and passes it to one of
these:

- ``overview`` lists the routes, subscriptions and receivers of a program, without Redis.
- ``status`` reads lag, pending events, retries and dead letters of each service.
- ``dead_letters`` finds, deletes and retries dead letters.
- ``replay`` runs receivers again from a place in a stream, which ``streams`` parses.
- ``services`` moves a service to a place in a stream, and removes or renames it.
- ``tail`` shows live events of channels and streams.
- ``server`` asks the server about itself, and publishes one event to it.
"""
