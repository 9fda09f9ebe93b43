"""Every error that flask-eventbus raises on purpose, each tied to a different reaction.

::

    EventBusError
    ├── ConfigError      a setting is wrong: correct it, the program does not start
    ├── PayloadError     a payload cannot travel: correct the line that sent it
    ├── PublishError     Redis did not take the event: fail the request, or send again
    ├── HopLimitError    a chain of events runs in a circle: break the circle
    ├── DecodeError      bytes from the wire are no event: skipped and counted
    ├── ReceiverError    a receiver does not accept a payload: correct the receiver
    ├── Reject           raised by a receiver: this event can never be handled, do not try again
    └── Retry            raised by a receiver: try again, after a time of its choice
"""

from __future__ import annotations

#: Seconds that a receiver may ask to wait at most: a year.
MOST_AFTER = 31_536_000


class EventBusError(Exception):
    """The root: ``except EventBusError`` catches whatever flask-eventbus raises itself."""


class ConfigError(EventBusError):
    """A setting is missing or wrong; the message names the key, the value and the remedy."""


class PayloadError(EventBusError):
    """A payload holds what cannot travel; the message names its path and its type."""


class PublishError(EventBusError):
    """Redis did not take the event in time; the event's id is in :attr:`event_id`."""

    def __init__(self, message: str, *, event_id: str | None = None) -> None:
        super().__init__(message)
        #: The id of the event that was not confirmed, if it had got one.
        self.event_id = event_id


class HopLimitError(EventBusError):
    """An event caused by an event, caused by an event, past ``EVENTBUS_MAX_HOPS``."""


class DecodeError(EventBusError):
    """Bytes that are not an event; :attr:`reason` is one word for counters and logs."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        #: One of the words of ``docs/wire-format.md``: ``not_msgpack``, ``not_a_map``, ...
        self.reason = reason


class ReceiverError(EventBusError):
    """A receiver does not accept the keys of a payload."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        #: True if it can never accept the event, so that no retry helps.
        self.is_final = is_final


class Reject(EventBusError):  # noqa: N818 - a receiver says it: raise Reject("no such user")
    """Raised by a receiver of a stream event: it goes to the dead letters at once."""


class Retry(EventBusError):  # noqa: N818 - a receiver says it: raise Retry(after=60)
    """Raised by a receiver of a stream event: it is tried again after ``after`` seconds.

    It counts as a failure like any other: after ``retries`` of them the event is a dead letter.

    :param after: seconds, up to a year; those of the backoff by default.
    :raises ValueError: it is no such number.
    :raises TypeError: the message is no text.
    """

    def __init__(self, message: str = "", *, after: float | None = None) -> None:
        if not isinstance(message, str):
            raise TypeError(f"Retry({message!r}) has no text. Write Retry(after={message!r}).")

        is_number = isinstance(after, int | float) and not isinstance(after, bool)

        if after is not None and not (is_number and 0 <= after <= MOST_AFTER):
            raise ValueError(
                f"Retry has 'after' {after!r}. Set it to a number of seconds from 0 to "
                f"{MOST_AFTER:,}, or leave it out."
            )

        super().__init__(message)
        #: Seconds until the next attempt.
        self.after = after
