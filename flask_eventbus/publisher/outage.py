"""Track whether Redis accepts events, and report the results of publishing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..errors import PublishError
from ..logs import BoundedLog, Whole, get_logger
from ..signals import emit, events_dropped, publisher_lost, publisher_restored
from ..transport.connections import Context
from ..transport.keys import ADD, PUBLISH, grant_its_user, is_missing_right
from ..transport.reconnect import Backoff
from .buffer import Buffer
from .message import Message, TooFewReplicasError

logger = get_logger(__name__)


class Outage:
    """Tracks two states: Redis is away, or Redis answers but accepts no writes.

    While Redis is away, no event can be published. While it accepts no writes, only channel
    events can. The start and the end of each state are logged once. The signal ``publisher_lost``
    is sent when the first of them starts, ``publisher_restored`` when both have ended.
    """

    def __init__(self, service: str, max_backoff: float) -> None:
        self._service = service
        #: Limits the number of lines, in case the connection breaks repeatedly.
        self._log = BoundedLog(logger)
        #: Log lines to be written when no lock is held.
        self.pending_lines: deque[tuple[Any, ...]] = deque()
        #: True if Redis was lost and has not answered since.
        self.away = False
        #: Monotonic time at which Redis was lost.
        self._since = 0.0
        self._away_error: Exception | None = None
        #: Why Redis accepts no writes; ``None`` while it does.
        self.refusal: Exception | None = None
        #: Monotonic time at which Redis first refused a write.
        self._refusing_since = 0.0
        self._backoff = Backoff(most=max_backoff)
        #: Monotonic time of the next attempt to write while Redis accepts no writes.
        self.write_again_at = float("inf")
        #: True if a sender has timed out since Redis last accepted an event.
        self.stalled = False
        #: True if events were dropped since Redis last accepted an event.
        self.overflowed = False

    @property
    def known(self) -> bool:
        """Return True if any events, of channels or of streams, cannot be published now."""
        return self.stalled or self.away or self.refusal is not None

    def refuses(self, message: Message) -> bool:
        """Return True if Redis is known not to accept an event; a stall does not count."""
        return self.away or (message.route_state.is_stream and self.refusal is not None)

    @property
    def error(self) -> Exception | None:
        """The error of the current outage; ``None`` if there is none."""
        return self._away_error or self.refusal

    def begin(self, error: Exception, buffered: int) -> None:
        """Record that Redis is away.

        :param buffered: number of events that wait.
        """
        self._away_error = error

        if self.away:
            return

        self._since, self.away = time.monotonic(), True
        self._log.warning("lost", "Redis is away (%s); %d events wait for it.", error, buffered)

        if self.refusal is None:
            emit(publisher_lost, self._service, error=error, buffered=buffered)

    def end(self, buffered: int) -> None:
        """Record that Redis answered.

        :param buffered: number of events that wait.
        """
        self.stalled = False
        # A channel event that is published does not end an overflow while streams are paused.
        self.overflowed = self.overflowed and self.refusal is not None

        if not self.away:
            return

        self.away, self._away_error = False, None
        text = "Redis is back after %.1f s; %d events that waited are being sent."
        self._log.warning("restored", text, time.monotonic() - self._since, buffered)
        self._tell_restored(self._since, buffered)

    def refuse_writes(self, error: Exception, buffered: int) -> None:
        """Record that Redis accepts no writes.

        :param error: the error reply.
        :param buffered: number of events that wait.
        """
        was_refusing, self.refusal = self.refusal is not None, error
        self.write_again_at = time.monotonic() + self._backoff.next()

        if was_refusing:
            return

        self._refusing_since = time.monotonic()
        text = "Redis takes no writes (%s); %d events wait. Channel events are still published."
        self.pending_lines.append(("refusing", text, error, buffered))

        if not self.away:
            emit(publisher_lost, self._service, error=error, buffered=buffered)

    def take_writes(self, buffered: int) -> None:
        """Record that Redis accepted a write.

        :param buffered: number of events that wait.
        """
        if self.refusal is None:
            return

        self.refusal = None
        self.write_again_at = float("inf")
        self._backoff.tries = 0
        text = "Redis takes writes again after %.1f s; %d events that waited are being sent."
        seconds = time.monotonic() - self._refusing_since
        self.pending_lines.append(("accepting", text, seconds, buffered))
        self._tell_restored(self._refusing_since, buffered)

    def log_changes(self) -> None:
        """Log the changes that :meth:`refuse_writes` and :meth:`take_writes` recorded.

        Call it without a lock: a log handler of the program may be slow, or may send an event.
        """
        while self.pending_lines:
            try:
                line = self.pending_lines.popleft()
            except IndexError:
                # Another thread has logged it in the meantime.
                return

            self._log.warning(*line)

    def write_now(self) -> None:
        """Make the next attempt to write due now."""
        self.write_again_at = min(self.write_again_at, time.monotonic())

    def _tell_restored(self, since: float, buffered: int) -> None:
        if not self.away and self.refusal is None:
            seconds = time.monotonic() - since
            emit(publisher_restored, self._service, seconds=seconds, buffered=buffered)

    def disown(self) -> None:
        """Suppress later reports about the parent's connection; call it in a forked child."""
        self._since, self.away = time.monotonic(), True


class PublishReport:
    """Logs the results of publishing, and counts the events that were refused or lost."""

    def __init__(self, context: Context, outage: Outage) -> None:
        self._counters = context.counters
        self._service = context.config.service
        self._outage = outage
        self._log = BoundedLog(logger)

    def log_published(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """Log each published event of a batch, for ``EVENTBUS_LOG_EVENTS``."""
        for message, error in zip(batch, outcomes, strict=True):
            if error is None or isinstance(error, TooFewReplicasError):
                logger.info(
                    "Published the event %s of %r.",
                    message.id,
                    message.route_state.name,
                    extra=self._fields(message),
                )

    def report_defect(self, error: Exception) -> None:
        """Log an unexpected error of the writer."""
        self._log.error("failed", "The writer failed.", exc_info=error)

    def report_dropped(self, count: int, buffer: Buffer) -> None:
        """Count, log and signal that ``count`` channel events were dropped."""
        self._counters.add("dropped", count)

        if not self._outage.overflowed:
            self._outage.overflowed = True
            logger.error(
                "The buffer is full with %d events of %d bytes. The oldest channel events are "
                "dropped until Redis accepts events again; health() counts them.",
                len(buffer),
                buffer.bytes,
            )

        emit(events_dropped, self._service, where="buffer", count=count)

    def report_lost(self, left: Sequence[Message], reason: object) -> None:
        """Count the events left in the buffer as dropped, log their ids and wake their senders."""
        lost = [message for message in left if not message.withdrawn]

        if not lost:
            return

        self._counters.add("dropped", len(lost))
        logger.error(
            "%d events were not published before the end (%s): %s",
            len(lost),
            reason,
            Whole(_shown(lost)),
        )

        for message in lost:
            message.finish(PublishError(str(reason), event_id=message.id))

        emit(events_dropped, self._service, where="buffer", count=len(lost))

    def _fields(self, message: Message) -> dict[str, object]:
        """Return the extra fields of a log record about an event."""
        return {
            "event_id": message.id,
            "signal": message.route_state.name,
            "service": self._service,
        }

    def note(self, message: Message, error: Exception) -> bool:
        """Log the error of an event; count it as refused, and return False, unless it is stored."""
        if isinstance(error, TooFewReplicasError):
            self._log.warning(
                f"replicas {message.route_state.name}",
                "The event %s of %r is stored, but %s.",
                message.id,
                message.route_state.name,
                error,
                extra=self._fields(message),
            )
            return True

        self._counters.add("refused")
        self._log.error(
            f"refused {message.route_state.name}",
            "Redis refused the event %s of %r: %s. It is not published.%s",
            message.id,
            message.route_state.name,
            error,
            _remedy(message, error),
            extra=self._fields(message),
        )
        return False


_RESEND = (
    "Call resend() of this error: it sends the event with the same id, so that each service "
    "handles it once."
)


def unconfirmed(message: Message, reason: str) -> str:
    """Return the text of an error: the event was not confirmed while its sender waited."""
    which = f"The event {message.id}" if message.id else "An event"
    text = f"{which} of {message.route_state.name!r} was not confirmed by Redis: {reason}."

    if message.unanswered:
        return f"{text} Redis may have it. {_RESEND}"

    return (
        f"{text} Redis does not have it. Send it again when Redis is back, or set "
        "'EVENTBUS_ON_OUTAGE' to 'buffer' to keep events in memory."
    )


def unpublished(message: Message, error: Exception) -> str:
    """Return the text of an error: Redis refused the event, or too few replicas have it."""
    which = f"The event {message.id} of {message.route_state.name!r}"

    if isinstance(error, TooFewReplicasError):
        return f"{which} is stored, but {error}. {_RESEND}"

    if message.unanswered:
        return f"{which} was not confirmed: {error}. Redis may have it. {_RESEND}"

    return f"{which} was not published: {error}"


def _remedy(message: Message, error: Exception) -> str:
    """Return the remedy for a refusal as a sentence with a leading space; empty if unknown."""
    destination = message.route_state.destination
    right = ADD if destination.is_stream else PUBLISH
    return f" {grant_its_user({destination.key: right})}" if is_missing_right(error) else ""


def _shown(lost: Sequence[Message]) -> str:
    """Return signals and ids of events; consecutive events of a signal as first and last id."""
    runs: list[list[Message]] = []

    for message in lost:
        if runs and runs[-1][-1].route_state is message.route_state:
            runs[-1].append(message)
        else:
            runs.append([message])

    return ", ".join(
        f"{run[0].route_state.name} {run[0].id}"
        + (f" to {run[-1].id} ({len(run)})" if run[1:] else "")
        for run in runs
    )
