"""The clock of the Redis server, which decides when retries are due and leases expire."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import redis

from ..config import Config
from ..logs import BoundedLog, get_logger
from ..timing import Timing
from .connections import OUTAGE
from .pipe import Pipe

logger = get_logger(__name__)

#: Difference in seconds between the clocks of this machine and of Redis above which a warning is
#: logged.
MOST_APART = 5.0


class RedisClock:
    """The time of the Redis server, extrapolated with the monotonic clock between two queries.

    Redis measures the idle time of an entry with its own clock. If that clock is set forward, all
    entries look abandoned at once. Check :attr:`is_steady` before you trust an idle time.

    :param lock: the lock that guards ``pipe``; held while the clock sends ``TIME``.
    """

    def __init__(
        self, pipe: Pipe, *, config: Config, timing: Timing, lock: AbstractContextManager[object]
    ) -> None:
        self._pipe = pipe
        self._config = config
        self._timing = timing
        self._lock = lock
        self._log = BoundedLog(logger)
        #: Lower and upper bound, in seconds, of Redis's time minus the monotonic clock; ``None``
        #: until Redis has answered.
        self._offset: tuple[float, float] | None = None
        #: Monotonic time from which the idle times of Redis are trusted.
        self._steady_from = float("inf")
        #: Monotonic time before which ``TIME`` is not sent again.
        self._ask_at = 0.0
        self._is_apart = False

    def now(self) -> float:
        """Return Redis's time in seconds since 1970.

        Return the time of this machine if Redis does not answer ``TIME``.
        """
        if self._offset is None:
            self._try_to_ask()

        if self._offset is None:
            return time.time()

        least, most = self._offset
        return time.monotonic() + (least + most) / 2

    @property
    def is_steady(self) -> bool:
        """Return True if live workers have had time to renew their leases since the last step.

        Also return True if Redis does not answer ``TIME``, because no step can be detected then.
        """
        return self._offset is None or time.monotonic() >= self._steady_from

    def ask(self) -> None:
        """Send ``TIME`` to Redis and store the answer.

        :raises redis.ConnectionError: Redis is unavailable.
        """
        if time.monotonic() < self._ask_at:
            return

        with self._lock:
            begin = time.monotonic()

            try:
                seconds, microseconds = self._pipe.ask("TIME")
            except redis.ResponseError as error:
                self._refused(error)
                return

            end = time.monotonic()
            answer = int(seconds) + int(microseconds) / 1e6
            self._store(answer - end, answer - begin, end)
            self._log.over("refused", "Redis answers TIME again; retries use its clock.")

        self._compare(answer)

    def _try_to_ask(self) -> None:
        try:
            self.ask()
        except OUTAGE as error:
            logger.debug("Redis is unavailable (%s); using the clock of this machine.", error)
            self._ask_at = time.monotonic() + 1.0

    def _store(self, least: float, most: float, now: float) -> None:
        before, self._offset = self._offset, (least, most)
        claim_after = self._config.claim_after

        if before is None:
            # The clock may have been set just before this process started. Live workers renew
            # their leases within a third of ``claim_after``.
            self._steady_from = now + claim_after / 2
            return

        step = max(least - before[1], 0.0) or min(most - before[0], 0.0)

        # Leases are renewed long before they expire, so a small step does no harm.
        if abs(step) > claim_after / 6:
            self._steady_from = now + claim_after
            self._log.warning(
                "step",
                "The clock of Redis was set by %+.1f s. Entries of silent workers are not "
                "reclaimed for the next %g s, so that live workers can renew their leases.",
                step,
                claim_after,
            )

    def _compare(self, answer: float) -> None:
        apart = time.time() - answer
        was_apart, self._is_apart = self._is_apart, abs(apart) > MOST_APART

        if self._is_apart and not was_apart:
            self._log.warning(
                "apart",
                "The clock of this machine is %.1f s %s that of Redis. Retries use the clock of "
                "Redis. Synchronize both clocks with NTP.",
                abs(apart),
                "ahead of" if apart > 0 else "behind",
            )
        elif was_apart and not self._is_apart:
            self._log.over("apart", "The clocks of this machine and of Redis agree again.")

    def _refused(self, error: redis.ResponseError) -> None:
        self._ask_at = time.monotonic() + self._timing.ask_command_again_after
        self._offset = None
        self._log.once(
            "refused",
            "Redis refused TIME (%s). Retries use the clock of this machine, and if the clock of "
            "Redis is set forward, an event in flight may run twice. Grant '+time' to the user "
            "of %r in the ACL.",
            error,
            self._config.service,
        )
