"""What became of events that left the buffer, and who is told."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from ..counters import BoundedLog, Counters
from ..errors import PublishError
from ..lifecycle import tell
from ..logs import Whole, get_logger
from ..signals import events_dropped
from .message import Outgoing
from .way import NoWritesError, TooFewReplicasError

logger = get_logger(__name__)


class Settlement:
    """Counts and logs what Redis took and refused and what is lost, and wakes the senders.

    :param tells: whether to log each event that Redis took: ``EVENTBUS_LOG_EVENTS``.
    """

    def __init__(self, *, counters: Counters, service: str, tells: bool = False) -> None:
        self._counters = counters
        self._service = service
        self._tells = tells
        self._log = BoundedLog(logger)

    def settle(self, batch: Sequence[Outgoing], outcomes: Sequence[Exception | None]) -> None:
        """Note what Redis answered to each event of a batch; what it may take later waits on."""
        refused = held = 0

        for outgoing, error in zip(batch, outcomes, strict=True):
            if isinstance(error, NoWritesError):
                held += 1
                continue

            if error is not None:
                # An answer leaves no doubt, except about earlier tries.
                outgoing.doubts -= 1
                refused += self._note(outgoing, error)

            outgoing.finish(error)

        self._counters.add("published", len(batch) - refused - held)

        if self._tells:
            self._tell_published(batch, outcomes)

        if refused:
            self._counters.add("refused", refused)

    def _tell_published(
        self, batch: Sequence[Outgoing], outcomes: Sequence[Exception | None]
    ) -> None:
        for outgoing, error in zip(batch, outcomes, strict=True):
            if error is None or isinstance(error, TooFewReplicasError):
                logger.info(
                    "Published the event %s of %r.",
                    outgoing.id,
                    outgoing.lane.name,
                    extra=self._fields(outgoing),
                )

    def report_defect(self, error: Exception) -> None:
        """Log what is no outage and no refusal."""
        self._log.error("failed", "The writer failed.", exc_info=error)

    def report_lost(self, left: Sequence[Outgoing], reason: object) -> None:
        """Log by id what was left in the buffer."""
        lost = [outgoing for outgoing in left if not outgoing.withdrawn]

        if not lost:
            return

        self._counters.add("dropped", len(lost))
        logger.error(
            "%d events were not published before the end (%s): %s",
            len(lost),
            reason,
            Whole(_shown(lost)),
        )

        for outgoing in lost:
            outgoing.finish(PublishError(str(reason), event_id=outgoing.id))

        tell(events_dropped, self._service, where="buffer", count=len(lost))

    def _fields(self, outgoing: Outgoing) -> dict[str, object]:
        """The fields of log records that tell of an event."""
        return {
            "event_id": outgoing.id,
            "signal": outgoing.lane.name,
            "service": self._service,
        }

    def _note(self, outgoing: Outgoing, error: Exception) -> bool:
        """Log an error; whether it means that the event is not published."""
        if isinstance(error, TooFewReplicasError):
            self._log.warning(
                f"replicas {outgoing.lane.name}",
                "The event %s of %r is stored, but %s.",
                outgoing.id,
                outgoing.lane.name,
                error,
                extra=self._fields(outgoing),
            )
            return False

        self._log.error(
            f"refused {outgoing.lane.name}",
            "Redis refused the event %s of %r: %s. It is not published.%s",
            outgoing.id,
            outgoing.lane.name,
            error,
            _remedy(outgoing, error),
            extra=self._fields(outgoing),
        )
        return True


def _remedy(outgoing: Outgoing, error: Exception) -> str:
    """What to do about a refusal, as a sentence after another; empty if it is not known."""
    if not isinstance(error, redis.exceptions.NoPermissionError):
        return ""

    way = outgoing.lane.way
    right = f"+xadd ~{way.key}" if way.is_stream else f"+publish &{way.key}"
    return f" Grant its user ({right}) in the ACL."


def _shown(lost: Sequence[Outgoing]) -> str:
    """Their ids; runs of the same signal as their first and last."""
    runs: list[list[Outgoing]] = []

    for outgoing in lost:
        if runs and runs[-1][-1].lane is outgoing.lane:
            runs[-1].append(outgoing)
        else:
            runs.append([outgoing])

    return ", ".join(
        f"{run[0].lane.name} {run[0].id}" + (f" to {run[-1].id} ({len(run)})" if run[1:] else "")
        for run in runs
    )
