"""Redis's time, by which retries are due and leases end, whatever this machine's clock says."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import redis

from ..config import Config
from ..logs import BoundedLog, get_logger
from .connections import OUTAGE
from .pipe import Pipe

logger = get_logger(__name__)

#: Seconds by which the clock of this machine may differ from Redis's before it is logged.
MOST_APART = 5.0

#: Seconds after which Redis is asked again for its time: a user may have been granted it.
ASK_AGAIN = 60.0


class RedisClock:
    """Redis's time, asked now and then and carried on by the monotonic clock in between.

    Redis itself counts by its clock for how long an entry is idle. A step of that clock makes all
    entries look abandoned at once, so :attr:`is_steady` says whether to believe it.

    :param turn: held by the thread that uses the connection.
    """

    def __init__(self, pipe: Pipe, *, config: Config, turn: AbstractContextManager[object]) -> None:
        self._pipe = pipe
        self._config = config
        self._turn = turn
        self._log = BoundedLog(logger)
        #: The least and the most that Redis's time may be ahead of the monotonic clock.
        self._ahead: tuple[float, float] | None = None
        #: Monotonic time from which on Redis's clock is believed.
        self._steady_from = float("inf")
        self._ask_at = 0.0
        self._is_apart = False

    def now(self) -> float:
        """Redis's time in seconds since 1970; this machine's where Redis does not tell."""
        if self._ahead is None:
            self._try_to_ask()

        if self._ahead is None:
            return time.time()

        least, most = self._ahead
        return time.monotonic() + (least + most) / 2

    @property
    def is_steady(self) -> bool:
        """Return True if workers that live had the time to renew their leases since a step.

        Where Redis does not tell its time, nobody knows of a step: then it is True.
        """
        return self._ahead is None or time.monotonic() >= self._steady_from

    def ask(self) -> None:
        """Ask Redis for its time.

        :raises redis.ConnectionError: Redis is away.
        """
        if time.monotonic() < self._ask_at:
            return

        with self._turn:
            begin = time.monotonic()

            try:
                seconds, microseconds = self._pipe.ask("TIME")
            except redis.ResponseError as error:
                self._refused(error)
                return

            end = time.monotonic()
            answer = int(seconds) + int(microseconds) / 1e6
            self._note(answer - end, answer - begin, end)
            self._log.over("refused", "Redis tells its time again; retries go by it.")

        self._compare(answer)

    def _try_to_ask(self) -> None:
        try:
            self.ask()
        except OUTAGE as error:
            logger.debug("Redis is away; the time is that of this machine: %s", error)
            self._ask_at = time.monotonic() + 1.0

    def _note(self, least: float, most: float, now: float) -> None:
        before, self._ahead = self._ahead, (least, most)
        claim_after = self._config.claim_after

        if before is None:
            # A step just before this process began is unknown to it: workers that live renew their
            # leases within a third of this time.
            self._steady_from = now + claim_after / 2
            return

        step = max(least - before[1], 0.0) or min(most - before[0], 0.0)

        # Leases are renewed long before they end, so a small step does no harm.
        if abs(step) > claim_after / 6:
            self._steady_from = now + claim_after
            self._log.warning(
                "step",
                "The clock of Redis was set by %+.1f s. What silent workers have in hand is taken "
                "over in %g s at the earliest, so that those that live can renew their leases.",
                step,
                claim_after,
            )

    def _compare(self, answer: float) -> None:
        apart = time.time() - answer
        was_apart, self._is_apart = self._is_apart, abs(apart) > MOST_APART

        if self._is_apart and not was_apart:
            self._log.warning(
                "apart",
                "The clock of this machine is %.1f s %s that of Redis. Retries go by Redis's. Let "
                "NTP set both clocks.",
                abs(apart),
                "ahead of" if apart > 0 else "behind",
            )
        elif was_apart and not self._is_apart:
            self._log.over("apart", "The clocks of this machine and of Redis agree again.")

    def _refused(self, error: redis.ResponseError) -> None:
        self._ask_at = time.monotonic() + ASK_AGAIN
        self._ahead = None
        self._log.once(
            "refused",
            "Redis does not tell its time (%s): retries go by the clock of this machine, and a "
            "step of Redis's clock may let an event that is being handled run twice. Grant the "
            "user of %r (+time) in the ACL.",
            error,
            self._config.service,
        )
