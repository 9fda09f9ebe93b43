"""Every error that flask-eventbus raises on purpose, each tied to a different reaction.

::

    EventBusError
    ├── ConfigError      a setting is wrong: correct it, the program does not start
    ├── PayloadError     a payload cannot travel: correct the line that sent it
    ├── PublishError     Redis did not confirm the event: fail the request, or resend()
    ├── HopLimitError    a chain of events runs in a circle: break the circle
    ├── DecodeError      bytes from the wire are no event: skipped and counted
    ├── ReceiverError    a receiver does not accept a payload: correct the receiver
    ├── OperationError   Redis refuses what an operator asked for: grant it, or ask for another
    ├── Reject           raised by a receiver: this event can never be handled, do not try again
    └── Retry            raised by a receiver: try again, after a time of its choice
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Seconds that a receiver may ask to wait at most: a year.
MOST_AFTER = 31_536_000


class EventBusError(Exception):
    """The root: ``except EventBusError`` catches whatever flask-eventbus raises itself."""


class ConfigError(EventBusError):
    """A setting is missing or wrong; the message names the key, the value and the remedy."""


class PayloadError(EventBusError):
    """A payload holds what cannot travel; the message names its path and its type."""


class PublishError(EventBusError):
    """Redis did not confirm the event in time; :meth:`resend` sends the same event again.

    A ``send()`` in place of that makes another event, which is handled as well.
    """

    def __init__(
        self,
        message: str,
        *,
        event_id: str | None = None,
        in_doubt: bool = False,
        resend: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(message)
        #: The id of the event that was not confirmed, if it had got one.
        self.event_id = event_id
        #: True if Redis may have the event: it was sent, and no answer came; or Redis has it, and
        #: too few replicas do.
        self.in_doubt = in_doubt
        self._resend = resend

    def resend(self) -> None:
        """Send the same event again, with the same id and the same bytes; wait as ``send()`` does.

        Services handle it once, although it may arrive twice. Local receivers do not run again.

        :raises PublishError: it was not confirmed this time either.
        :raises RuntimeError: the error comes from another process, or from a command.
        """
        if self._resend is None:
            raise RuntimeError(
                "This error has no event to send again. Call resend() in the process whose send() "
                "raised it, outside of a database transaction."
            )

        self._resend()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the event behind where the error goes to another process."""
        return (type(self), self.args, {**self.__dict__, "_resend": None})


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


class OperationError(EventBusError):
    """Redis is away, refuses a command, or has nothing of the name that an operator gave."""


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
