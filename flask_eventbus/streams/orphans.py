"""Give up retries of signals that no process of the service receives any more."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import islice

import redis

from ..config import SIGNAL_NAME
from ..logs import BoundedLog, get_logger
from ..transport.connections import Context
from .acknowledger import Acknowledger
from .retry_queue import RetryQueue

logger = get_logger(__name__)

#: Most signals in one search.
MOST_NAMES = 10_000

#: Most retries given up in one round trip.
MOST_PER_STEP = 100


class Orphans:
    """Finds retries of signals that this process does not read, and gives up old ones.

    Until they are overdue and old, another process of the service may run them. Only the
    maintenance thread calls its methods.

    :param receives: returns True if this process reads the stream of a signal, or may soon.
    """

    def __init__(
        self,
        context: Context,
        *,
        retries: RetryQueue,
        acknowledger: Acknowledger,
        receives: Callable[[str], bool],
    ) -> None:
        self._service = context.config.service
        self._keys = context.keys
        self._search_every = context.timing.search_orphans_every
        self._retries = retries
        self._acknowledger = acknowledger
        self._receives = receives
        self._log = BoundedLog(logger)
        #: Signals whose retries the Redis user may not read, so none are this service's.
        self._forbidden: set[str] = set()
        #: Monotonic time of the next search.
        self.search_at = time.monotonic() + self._search_every * random.uniform(0.1, 1.0)  # noqa: S311 - spreads load

    def search(self) -> None:
        """Give up orphaned retries, once every ``Timing.search_orphans_every`` seconds.

        :raises redis.ConnectionError: Redis is away.
        """
        if time.monotonic() < self.search_at:
            return

        self.search_at = time.monotonic() + self._search_every

        for name in self._names():
            try:
                self._give_up(name)
            except redis.exceptions.NoPermissionError as error:
                self._forbidden.add(name)
                logger.debug("The Redis user may not read the retries of %r: %s", name, error)
            except redis.ResponseError as error:
                logger.debug("Could not read the retries of %r: %s", name, error)

    def _names(self) -> list[str]:
        try:
            with self._acknowledger.lock:
                found = self._retries.signals()
        except redis.ResponseError as error:
            self._log.once(
                "refused",
                "Redis does not let %r list the streams (%s). Retries of signals that it no longer "
                "subscribes to are not given up. Grant its user (+smembers ~%s) in the ACL.",
                self._service,
                error,
                self._keys.names,
            )
            return []

        self._log.over("refused", "Redis lets %r list the streams again.", self._service)
        return [
            name
            for name in islice(found, MOST_NAMES)
            if SIGNAL_NAME.fullmatch(name)
            and name not in self._forbidden
            and not self._receives(name)
        ]

    def _give_up(self, name: str) -> None:
        more = True

        while more:
            with self._acknowledger.lock:
                given_up, more = self._retries.take_orphans(name, most=MOST_PER_STEP)

            self._acknowledger.write(given_up)
