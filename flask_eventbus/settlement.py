"""What became of events that left the buffer, and who is told."""

from __future__ import annotations

from collections.abc import Sequence

from .counters import BoundedLog, Counters
from .errors import PublishError
from .lifecycle import tell
from .logs import get_logger
from .outgoing import Outgoing
from .signals import events_dropped
from .way import TooFewReplicasError

logger = get_logger(__name__)


class Settlement:
    """Counts and logs what Redis took and refused and what is lost, and wakes the senders."""

    def __init__(self, *, counters: Counters, service: str) -> None:
        self._counters = counters
        self._service = service
        self._log = BoundedLog(logger)

    def settle(self, batch: Sequence[Outgoing], outcomes: Sequence[Exception | None]) -> None:
        """Note what Redis answered to each event of a batch."""
        refused = 0

        for outgoing, error in zip(batch, outcomes, strict=True):
            if error is not None:
                refused += self._note(outgoing, error)

            outgoing.finish(error)

        self._counters.add("published", len(batch) - refused)

        if refused:
            self._counters.add("refused", refused)

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
            _shown(lost),
        )

        for outgoing in lost:
            outgoing.finish(PublishError(str(reason), event_id=outgoing.id))

        tell(events_dropped, self._service, where="buffer", count=len(lost))

    def _note(self, outgoing: Outgoing, error: Exception) -> bool:
        """Log an error; whether it means that the event is not published."""
        if isinstance(error, TooFewReplicasError):
            self._log.warning(
                f"replicas {outgoing.lane.name}",
                "The event %s of %r is stored, but %s.",
                outgoing.id,
                outgoing.lane.name,
                error,
            )
            return False

        self._log.error(
            f"refused {outgoing.lane.name}",
            "Redis refused the event %s of %r: %s. It is not published.",
            outgoing.id,
            outgoing.lane.name,
            error,
        )
        return True


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
