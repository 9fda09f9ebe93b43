"""What becomes of a receiver that failed at a stream event: tried again, or given up."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime

from ..errors import ReceiverError, Reject, Retry
from ..event import Event
from ..logs import BoundedLog, get_logger, text_of
from ..routing.bus_signal import Receiver

logger = get_logger(__name__)


#: Seconds before the first retry, doubled for each that follows, and the most of them.
FIRST = 1.0
MOST = 300.0

#: By how much a delay is lengthened at most, so that what failed together returns one by one.
JITTER = 0.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """Either a reason to give up, one of :data:`.records.REASONS`, or seconds until a retry."""

    reason: str | None = None
    after: float = 0.0


def allowed(subscription: int | None, receiver: int | None, default: int) -> int:
    """How many retries a receiver has: what its subscription says goes before what it asked for."""
    asked = receiver if subscription is None else subscription
    return default if asked is None else asked


def judge(error: BaseException, *, attempts: int, retries: int, jitter: float = JITTER) -> Verdict:
    """What follows from the failure of attempt number ``attempts``.

    :param error: what the receiver raised.
    :param retries: how many retries it is allowed.
    """
    if isinstance(error, Reject):
        return Verdict(reason="rejected")

    if attempts > retries or (isinstance(error, ReceiverError) and error.is_final):
        return Verdict(reason="retries")

    if isinstance(error, Retry) and error.after is not None:
        return Verdict(after=max(0.0, error.after))

    return Verdict(after=delay(attempts, jitter=jitter))


def delay(attempts: int, *, jitter: float = JITTER) -> float:
    """Seconds to wait after attempt number ``attempts``: 1, 2, 4, ... up to five minutes."""
    wait = min(MOST, FIRST * 2.0 ** min(attempts - 1, 30))
    longer: float = wait * random.uniform(1.0, 1.0 + jitter)  # noqa: S311 - spreads load
    return min(MOST, longer)


@dataclass(frozen=True, slots=True)
class Failure:
    """A receiver and what it raised."""

    receiver: Receiver
    error: BaseException
    #: The receiver's name; empty if a teardown failed, and not the receiver.
    name: str = ""


class FailureLog:
    """Writes one record for each attempt that failed, within a bound per minute and receiver.

    :param service: this service.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._log = BoundedLog(logger)

    def final(self, event: Event, failure: Failure) -> None:
        """Log a failure after which nothing is tried again."""
        if failure.name:
            text = "The receiver %s failed at the event %s of %r from %r: %s"
        else:
            text = "After a receiver%s, at the event %s of %r from %r, a teardown failed: %s"

        self._log.error(
            *self._line(event, failure, text),
            exc_info=failure.error,
            extra=self._fields(event, failure),
        )

    def judged(
        self,
        event: Event,
        failure: Failure,
        verdict: Verdict,
        *,
        due: float,
        is_known: bool = False,
    ) -> None:
        """Log a failure of a receiver of a stream, and what follows.

        :param due: when it is tried again, in seconds since 1970.
        :param is_known: whether the traceback of the attempt before is the same.
        """
        fields = self._fields(event, failure)
        text = "The receiver %s {} %s of %r from %r, attempt {}, {}: %s"
        again = f"and is tried again in {verdict.after:.1f} s, at {_moment(due)}"
        dead = f"now a dead letter of {self._service!r}"

        if verdict.reason == "rejected":
            line = text.format("rejects the event", event.attempt, dead)
            self._log.warning(*self._line(event, failure, line), extra=fields)
        elif isinstance(failure.error, Retry) and verdict.reason is None:
            line = text.format("asks for another attempt at the event", event.attempt, again)
            self._log.info(*self._line(event, failure, line), extra=fields)
        else:
            follows = again if verdict.reason is None else f"the last, {dead}"
            line = text.format("failed at the event", event.attempt, follows)
            self._log.error(
                *self._line(event, failure, line),
                exc_info=None if is_known else failure.error,
                extra=fields,
            )

    def _line(self, event: Event, failure: Failure, text: str) -> tuple[str, str, *tuple[str, ...]]:
        """What :class:`.BoundedLog` takes: the kind, the text, and its arguments."""
        kind = f"{text[:20]} {failure.name} {event.name}"
        said = f"{type(failure.error).__name__}: {text_of(failure.error)}"
        return kind, text, failure.name, event.id, event.name, event.source, said

    def _fields(self, event: Event, failure: Failure) -> dict[str, object]:
        return {**event.fields, "service": self._service, "receiver": failure.name}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
