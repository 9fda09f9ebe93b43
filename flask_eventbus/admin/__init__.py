"""What an operator does, as functions without a terminal.

``streams`` asks and changes streams, ``server`` asks the server. ``status`` and ``overview`` show
where each service stands, ``dead_letters`` and ``dead_retry`` what it gave up, ``replay`` and
``seek`` go back to a place in a stream, ``tail`` shows events as they come, ``publish`` sends
one, and ``services`` forgets or renames a service.
"""
