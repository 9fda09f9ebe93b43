"""The errors that flask-eventbus raises. Each class asks for a different reaction.

::

    EventBusError
    ├── ConfigError      a setting is wrong: correct it; the program does not start
    ├── PayloadError     a payload cannot be encoded: correct the line that sent it
    ├── PublishError     Redis did not confirm the event: fail the request, or resend()
    ├── HopLimitError    events cause each other in a loop: break the loop
    ├── DecodeError      bytes from Redis are not an event: they are skipped and counted
    ├── ReceiverError    a receiver does not accept a payload: correct the receiver
    ├── OperationError   Redis refused a command: grant the right or correct the name
    ├── Reject           raised by a receiver: do not retry this event
    └── Retry            raised by a receiver: retry this event, after a delay that it chooses
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Longest delay that :class:`Retry` accepts, in seconds: one year.
MAX_RETRY_DELAY = 31_536_000


class EventBusError(Exception):
    """Base class of all errors of flask-eventbus."""


class ConfigError(EventBusError):
    """A setting is missing or wrong; the message names the key, the value and the remedy."""


class PayloadError(EventBusError):
    """A payload holds a value that cannot be encoded; the message names its path and its type."""


class PublishError(EventBusError):
    """Redis did not confirm the event in time; :meth:`resend` sends the same event again.

    Calling ``send()`` again instead creates a second event, and receivers handle both.
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
        #: The id of the event that was not confirmed; ``None`` if it has no id yet.
        self.event_id = event_id
        #: True if Redis may have stored the event: no answer came after it was written, or too few
        #: replicas confirmed it.
        self.in_doubt = in_doubt
        self._resend = resend

    def resend(self) -> None:
        """Send the same event again, with the same id and bytes, and wait as ``send()`` does.

        Other services handle the event once, even if it arrives twice. Local receivers do not run
        again.

        :raises PublishError: Redis did not confirm the event this time either.
        :raises RuntimeError: the error was raised in another process, or by a command.
        """
        if self._resend is None:
            raise RuntimeError(
                "This error has no event to send again. Call resend() in the process whose send() "
                "raised it, outside of a database transaction."
            )

        self._resend()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error without its event: another process cannot resend it."""
        return (type(self), self.args, {**self.__dict__, "_resend": None})


class HopLimitError(EventBusError):
    """A chain of events, each caused by the one before, is longer than ``EVENTBUS_MAX_HOPS``."""


class DecodeError(EventBusError):
    """Bytes are not an event; :attr:`reason` names the fault in counters and logs."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        #: A reason listed in ``docs/wire-format.md``: ``not_msgpack``, ``not_a_map``, ...
        self.reason = reason


class ReceiverError(EventBusError):
    """The parameters of a receiver do not accept the keys of a payload."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        #: True if a retry cannot help: the receiver can never accept this event.
        self.is_final = is_final


class OperationError(EventBusError):
    """A command failed: Redis is unreachable, refused it, or has nothing of the given name."""


class Reject(EventBusError):  # noqa: N818 - reads as an instruction: raise Reject("no such user")
    """Raised by a receiver to store a stream event as a dead letter at once, without a retry."""


class Retry(EventBusError):  # noqa: N818 - reads as an instruction: raise Retry(after=60)
    """Raised by a receiver of a stream event to be called again after ``after`` seconds.

    It counts as a failure: after ``retries`` failures the event becomes a dead letter.

    :param after: seconds until the next attempt, up to one year; by default the backoff's delay.
    :raises ValueError: ``after`` is not a number in this range.
    :raises TypeError: ``message`` is not a string.
    """

    def __init__(self, message: str = "", *, after: float | None = None) -> None:
        if not isinstance(message, str):
            raise TypeError(f"Retry({message!r}) has no text. Write Retry(after={message!r}).")

        is_number = isinstance(after, int | float) and not isinstance(after, bool)

        if after is not None and not (is_number and 0 <= after <= MAX_RETRY_DELAY):
            raise ValueError(
                f"Retry has 'after' {after!r}. Set it to a number of seconds from 0 to "
                f"{MAX_RETRY_DELAY:,}, or leave it out."
            )

        super().__init__(message)
        #: Seconds until the next attempt; ``None`` for the backoff's delay.
        self.after = after
