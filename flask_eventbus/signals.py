"""The bus's own lifecycle, as blinker signals: what a shop hangs its metrics and alarms on.

The sender is always the service's name. Receivers run one after the other in a thread that has
nothing else to do, soon after what they tell of; those of ``receiver_failed`` and
``receiver_succeeded`` run in the thread of the receiver, right after it. A receiver that raises is
logged and stops nothing.
"""

from __future__ import annotations

from blinker import Namespace

_lifecycle = Namespace()

listener_connected = _lifecycle.signal("listener_connected")
"""The listener is connected and everything subscribed is confirmed.

``reconnected``: whether a connection was lost before, so that events may have been missed;
``seconds``: how long.
"""

listener_lost = _lifecycle.signal("listener_lost")
"""The listener lost Redis.

``error``: the exception that told it.
"""

publisher_lost = _lifecycle.signal("publisher_lost")
"""The publisher lost Redis, or Redis takes no writes, so that streams wait.

``error``: the exception; ``buffered``: how many events wait.
"""

publisher_restored = _lifecycle.signal("publisher_restored")
"""The publisher has Redis again, and it takes everything.

``seconds``: how long it did not; ``buffered``: how many events are on their way now.
"""

events_missed = _lifecycle.signal("events_missed")
"""Channel events of a publisher never arrived, told by their sequence.

``name``: the signal; ``source`` and ``node``: who published them; ``count``: exactly how many.
"""

events_dropped = _lifecycle.signal("events_dropped")
"""Events were given up because a buffer was full or a process ended.

``where``: "buffer" (on the way out), "inbox" (on the way in) or "dead" (the oldest dead letters,
beyond ``EVENTBUS_DEAD_MAXLEN``); ``count``: how many.
"""

event_rejected = _lifecycle.signal("event_rejected")
"""Bytes on a channel were not an event of the bus.

``name``: the signal of the channel; ``reason``: the word of the error; ``error``: the error.
"""

event_conflict = _lifecycle.signal("event_conflict")
"""An event contradicts another one: one of the two is forged, and both are delivered.

The same id or number came with other bytes, or its node under another service's name. ``name``: the
signal; ``event``: the event that came later.
"""

receiver_succeeded = _lifecycle.signal("receiver_succeeded")
"""A receiver handled an event.

``receiver``: the callable; ``event``: the event; ``seconds``: how long it took.
"""

receiver_failed = _lifecycle.signal("receiver_failed")
"""A receiver raised.

``receiver``: the callable; ``event``: the event; ``error``: what it raised.
"""

event_dead_lettered = _lifecycle.signal("event_dead_lettered")
"""A stream event is given up for a receiver.

``name``: the signal; ``receiver``: its name, empty if the event was not even read; ``reason``:
``"retries"``, ``"rejected"``, ``"killed"``, ``"gone"`` or ``"undecodable"``; ``event_id``: its id,
if it has one; ``error``: the words of the last error.
"""

events_trimmed = _lifecycle.signal("events_trimmed")
"""A stream was trimmed past events that this service had not handled.

``name``: the signal; ``count``: how many; ``None`` where the server cannot tell.
"""
