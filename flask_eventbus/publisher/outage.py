"""What is known of whether Redis takes events, and who is told when that changes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import redis

from ..errors import PublishError
from ..logs import BoundedLog, Counters, Whole, get_logger
from ..signals import emit, events_dropped, publisher_lost, publisher_restored
from ..transport.reconnect import Backoff
from .message import Message, NoWritesError, TooFewReplicasError

logger = get_logger(__name__)

#: Seconds between tries at most: what waits in memory should not wait long after Redis is back.
MOST_BACKOFF = 2.0


class Outage:
    """Knows two states: Redis is away; or it is there, and takes no writes.

    Each is logged once when it begins and once when it ends. The first takes nothing, the second
    takes channel events alone. ``publisher_lost`` is sent when Redis stops to take everything, and
    ``publisher_restored`` when it takes everything again.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        #: A connection that comes and goes is not to fill the log.
        self._log = BoundedLog(logger)
        #: Lines that are to be logged once no lock is held.
        self._pending_lines: deque[tuple[Any, ...]] = deque()
        #: When Redis was lost, by the monotonic clock; ``None`` while it is there.
        self._since: float | None = None
        self._away_error: Exception | None = None
        #: When Redis began to refuse writes; ``None`` while it takes them.
        self._refusing_since: float | None = None
        #: Why Redis takes no writes now; ``None`` while it does.
        self.refusal: Exception | None = None
        self._backoff = Backoff(most=MOST_BACKOFF)
        #: When to find out again whether Redis takes writes, by the monotonic clock.
        self.write_again_at = float("inf")
        #: Whether a caller waited in vain since Redis last took something.
        self.stalled = False
        #: Whether events were dropped since Redis last took something.
        self.overflowed = False

    @property
    def away(self) -> bool:
        """Whether Redis was lost and did not answer since."""
        return self._since is not None

    @property
    def known(self) -> bool:
        """Whether anything says that Redis does not take events of some kind now."""
        return self.stops_all or self.refusal is not None

    @property
    def stops_all(self) -> bool:
        """Whether anything says that Redis takes no event at all now."""
        return self.stalled or self._since is not None

    def stops(self, *, stream: bool) -> bool:
        """Whether anything says that Redis does not take such events now."""
        return self.stalled or self._since is not None or (stream and self.refusal is not None)

    @property
    def error(self) -> Exception | None:
        """What told that Redis is away, or takes no writes."""
        return self._away_error or self.refusal

    @property
    def write_is_due(self) -> bool:
        """Whether to find out now if Redis takes writes again."""
        return self.refusal is not None and time.monotonic() >= self.write_again_at

    def begin(self, error: Exception, buffered: int) -> None:
        """Note that Redis is away; ``buffered`` events wait."""
        self._away_error = error

        if self._since is not None:
            return

        was_known = self.refusal is not None
        self._since = time.monotonic()
        self._log.warning("lost", "Redis is away (%s); %d events wait for it.", error, buffered)

        if not was_known:
            emit(publisher_lost, self._service, error=error, buffered=buffered)

    def end(self, buffered: int) -> None:
        """Note that Redis took or answered something; ``buffered`` events are on their way."""
        self.stalled = False
        # While streams are held, a channel event that gets through ends no overflow.
        self.overflowed = self.overflowed and self.refusal is not None

        if self._since is None:
            return

        since, self._since, self._away_error = self._since, None, None
        seconds = time.monotonic() - since
        self._log.warning(
            "restored",
            "Redis is back after %.1f s; %d events that waited are being sent.",
            seconds,
            buffered,
        )
        self._tell_restored(since, buffered)

    def refuse_writes(self, error: Exception, buffered: int) -> None:
        """Note that Redis takes no writes now; ``buffered`` events wait."""
        was_known = self.away or self.refusal is not None
        self.refusal = error
        self.write_again_at = time.monotonic() + self._backoff.next()

        if self._refusing_since is not None:
            return

        self._refusing_since = time.monotonic()
        self._pending_lines.append(
            (
                "refusing",
                "Redis takes no writes (%s); %d events wait for it. Events of channels go on.",
                error,
                buffered,
            )
        )

        if not was_known:
            emit(publisher_lost, self._service, error=error, buffered=buffered)

    def take_writes(self, buffered: int) -> None:
        """Note that Redis took a write; ``buffered`` events are on their way."""
        if self._refusing_since is None:
            return

        since, self._refusing_since, self.refusal = self._refusing_since, None, None
        self.write_again_at = float("inf")
        self._backoff.reset()
        self._pending_lines.append(
            (
                "accepting",
                "Redis takes writes again after %.1f s; %d events that waited are being sent.",
                time.monotonic() - since,
                buffered,
            )
        )
        self._tell_restored(since, buffered)

    def log_changes(self) -> None:
        """Log what :meth:`refuse_writes` and :meth:`take_writes` noted; call it without a lock.

        A handler of the program's log may take long, and may send.
        """
        while self._pending_lines:
            try:
                line = self._pending_lines.popleft()
            except IndexError:
                # Another thread has just taken it.
                return

            self._log.warning(*line)

    def write_now(self) -> None:
        """Find out at once whether Redis takes writes again."""
        self.write_again_at = min(self.write_again_at, time.monotonic())

    def _tell_restored(self, since: float, buffered: int) -> None:
        if self._since is None and self._refusing_since is None:
            seconds = time.monotonic() - since
            emit(publisher_restored, self._service, seconds=seconds, buffered=buffered)

    def disown(self) -> None:
        """In a forked child: tell nobody of the connection that was the parent's."""
        self._since = time.monotonic()


class PublishReport:
    """Counts and logs what Redis took and refused and what is lost, and wakes the senders.

    :param tells: whether to log each event that Redis took: ``EVENTBUS_LOG_EVENTS``.
    """

    def __init__(self, *, counters: Counters, service: str, log_events: bool = False) -> None:
        self._counters = counters
        self._service = service
        self._log_events = log_events
        self._log = BoundedLog(logger)

    def record(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """Note what Redis answered to each event of a batch; what it may take later waits on."""
        refused = held = 0

        for message, error in zip(batch, outcomes, strict=True):
            if isinstance(error, NoWritesError):
                held += 1
                continue

            if error is not None:
                # An answer leaves no doubt, except about earlier tries.
                message.unanswered -= 1
                refused += self._note(message, error)

            message.finish(error)

        self._counters.add("published", len(batch) - refused - held)

        if self._log_events:
            self._log_published(batch, outcomes)

        if refused:
            self._counters.add("refused", refused)

    def _log_published(
        self, batch: Sequence[Message], outcomes: Sequence[Exception | None]
    ) -> None:
        for message, error in zip(batch, outcomes, strict=True):
            if error is None or isinstance(error, TooFewReplicasError):
                logger.info(
                    "Published the event %s of %r.",
                    message.id,
                    message.route_state.name,
                    extra=self._fields(message),
                )

    def report_defect(self, error: Exception) -> None:
        """Log what is no outage and no refusal."""
        self._log.error("failed", "The writer failed.", exc_info=error)

    def report_lost(self, left: Sequence[Message], reason: object) -> None:
        """Log by id what was left in the buffer."""
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
        """The fields of log records that tell of an event."""
        return {
            "event_id": message.id,
            "signal": message.route_state.name,
            "service": self._service,
        }

    def _note(self, message: Message, error: Exception) -> bool:
        """Log an error; whether it means that the event is not published."""
        if isinstance(error, TooFewReplicasError):
            self._log.warning(
                f"replicas {message.route_state.name}",
                "The event %s of %r is stored, but %s.",
                message.id,
                message.route_state.name,
                error,
                extra=self._fields(message),
            )
            return False

        self._log.error(
            f"refused {message.route_state.name}",
            "Redis refused the event %s of %r: %s. It is not published.%s",
            message.id,
            message.route_state.name,
            error,
            _remedy(message, error),
            extra=self._fields(message),
        )
        return True


def _remedy(message: Message, error: Exception) -> str:
    """What to do about a refusal, as a sentence after another; empty if it is not known."""
    if not isinstance(error, redis.exceptions.NoPermissionError):
        return ""

    destination = message.route_state.destination
    right = f"+xadd ~{destination.key}" if destination.is_stream else f"+publish &{destination.key}"
    return f" Grant its user ({right}) in the ACL."


def _shown(lost: Sequence[Message]) -> str:
    """Their ids; runs of the same signal as their first and last."""
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
