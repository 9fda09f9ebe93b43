"""Decides what follows when a receiver fails: a retry or a dead letter; and logs the failure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime

from ..errors import ReceiverError, Reject, Retry
from ..event import Event
from ..logs import BoundedLog, get_logger, text_of
from ..routing.bus_signal import Receiver
from ..timing import TIMING

logger = get_logger(__name__)


#: Longest delay of a retry in seconds.
MOST = 300.0

#: Maximum random increase of a delay, as a fraction of it, so that retries spread out.
JITTER = 0.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision after a failure: a dead letter with a reason, or a retry after a delay."""

    #: Reason of the dead letter, one of :data:`.records.REASONS`; ``None`` for a retry.
    reason: str | None = None
    #: Delay of the retry in seconds.
    after: float = 0.0


def allowed(subscription: int | None, receiver: int | None, default: int) -> int:
    """Return the number of retries of a receiver.

    The subscription's number takes precedence over the receiver's, and that over the default.
    """
    asked = receiver if subscription is None else subscription
    return default if asked is None else asked


def judge(
    error: BaseException,
    *,
    attempts: int,
    retries: int,
    jitter: float = JITTER,
    first: float = TIMING.first_retry,
) -> Verdict:
    """Decide what follows after a receiver failed.

    :param error: the exception that the receiver raised.
    :param attempts: number of the failed attempt, from 1.
    :param retries: maximum number of retries.
    :param first: delay of the first retry in seconds.
    """
    if isinstance(error, Reject):
        return Verdict(reason="rejected")

    if attempts > retries or (isinstance(error, ReceiverError) and error.is_final):
        return Verdict(reason="retries")

    if isinstance(error, Retry) and error.after is not None:
        return Verdict(after=max(0.0, error.after))

    return Verdict(after=delay(attempts, jitter=jitter, first=first))


def delay(attempts: int, *, jitter: float = JITTER, first: float = TIMING.first_retry) -> float:
    """Return the seconds to wait after attempt ``attempts``: 1, 2, 4, ... up to 300."""
    wait = min(MOST, first * 2.0 ** min(attempts - 1, 30))
    longer: float = wait * random.uniform(1.0, 1.0 + jitter)  # noqa: S311 - spreads load
    return min(MOST, longer)


@dataclass(frozen=True, slots=True)
class Failure:
    """A receiver and the exception that it raised."""

    receiver: Receiver
    error: BaseException
    #: Name of the receiver; empty if the teardown after the receiver failed.
    name: str = ""


class FailureLog:
    """Logs each failed attempt, up to a limit per minute and receiver.

    :param service: name of this service.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._log = BoundedLog(logger)

    def final(self, event: Event, failure: Failure) -> None:
        """Log a failure that is not retried."""
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
        """Log a failure at a stream event, and the decision about it.

        :param due: time of the retry, in seconds since 1970.
        :param is_known: True if the attempt before had the same traceback; it is not logged again.
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
        """Return the arguments for :class:`.BoundedLog`: the kind, the text, and its arguments."""
        kind = f"{text[:20]} {failure.name} {event.name}"
        said = f"{type(failure.error).__name__}: {text_of(failure.error)}"
        return kind, text, failure.name, event.id, event.name, event.source, said

    def _fields(self, event: Event, failure: Failure) -> dict[str, object]:
        return {**event.fields, "service": self._service, "receiver": failure.name}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
