"""What becomes of a receiver that failed at a stream event: tried again, or given up."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..errors import ReceiverError, Reject, Retry

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
