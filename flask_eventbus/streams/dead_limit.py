"""Trim the dead letters of a service to ``EVENTBUS_DEAD_MAXLEN``, and count the dropped ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import redis

from ..config import Config
from ..logs import BoundedLog, Counters, get_logger
from ..signals import emit, events_dropped
from ..transport.connection import OUTAGE
from ..transport.keys import StreamKeys
from ..transport.pipe import Command, Pipe
from ..transport.rights import remedy, right_of

logger = get_logger(__name__)


class DeadLimit:
    """Trims streams of dead letters that are longer than ``EVENTBUS_DEAD_MAXLEN``.

    It uses ``XTRIM``, which returns the number of removed entries. ``XADD MAXLEN`` does not.

    :param lock: held by the thread that uses the connection.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        config: Config,
        keys: StreamKeys,
        counters: Counters,
        lock: AbstractContextManager[object],
    ) -> None:
        self._pipe = pipe
        self._config = config
        self._keys = keys
        self._counters = counters
        self._lock = lock
        self._log = BoundedLog(logger)
        #: Signals with new dead letters since their stream of dead letters was last trimmed.
        self._grown: set[str] = set()
        #: Dropped dead letters not yet counted in Redis, by signal.
        self._uncounted: Counter[str] = Counter()

    def note(self, name: str) -> None:
        """Record that a signal has a new dead letter."""
        self._grown.add(name)

    def enforce(self) -> None:
        """Trim the streams that grew. If Redis is away, the next call does it."""
        if not self._grown:
            return

        with self._lock:
            dropped = self._trim()
            self._count(dropped)

        for name, count in dropped.items():
            self._report_dropped(name, count)

    def _trim(self) -> dict[str, int]:
        """Trim the streams that grew; return the number of dropped dead letters by signal."""
        names, self._grown = sorted(self._grown), set()
        keys = [self._keys.dead(name, self._config.service) for name in names]

        try:
            answers = self._run(
                [("XTRIM", key, "MAXLEN", "~", self._config.dead_maxlen) for key in keys]
            )
        except OUTAGE as error:
            logger.debug("Redis is away; dead letters are trimmed later: %s", error)
            self._grown.update(names)
            return {}

        return {name: count for name, count in zip(names, answers, strict=True) if count}

    def _count(self, dropped: Mapping[str, int]) -> None:
        """Add to the counts in Redis, which ``flask eventbus status`` shows."""
        self._uncounted.update(dropped)

        names = sorted(self._uncounted)
        keys = [self._keys.dead_dropped(name, self._config.service) for name in names]

        try:
            answers = self._run(
                [
                    ("INCRBY", key, self._uncounted[name])
                    for name, key in zip(names, keys, strict=True)
                ]
            )
        except OUTAGE as error:
            logger.debug("Redis is away; dropped dead letters are counted later: %s", error)
            self._grown.update(names)
            return

        # A count that Redis refused is added with the next dead letter.
        for name, answer in zip(names, answers, strict=True):
            if answer is not None:
                del self._uncounted[name]

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands. A refusal is logged, and its answer is ``None``."""
        answers = self._pipe.run(commands) if commands else []

        for command, answer in zip(commands, answers, strict=True):
            if isinstance(answer, redis.ResponseError):
                self._log_refusal(command, answer)
            else:
                right, key = str(command[0]), str(command[1])
                text = "Redis lets the bus run %s of %r again."
                self._log.over(f"refused {right} {key}", text, right, key)

        return [None if isinstance(answer, redis.ResponseError) else answer for answer in answers]

    def _log_refusal(self, command: Command, error: redis.ResponseError) -> None:
        right, key = str(command[0]), str(command[1])
        self._log.once(
            f"refused {right} {key}",
            "Redis refuses %s of %r: %s. %s %s",
            right,
            key,
            error,
            "'EVENTBUS_DEAD_MAXLEN' has no effect."
            if right == "XTRIM"
            else "Dropped dead letters are not counted.",
            remedy(error, {key: right_of(command)}),
            level=logging.ERROR,
        )

    def _report_dropped(self, name: str, count: int) -> None:
        self._counters.add("dead_dropped", count)
        self._log.error(
            f"dropped {name}",
            "%r has more than %d dead letters of %r: the %d oldest were dropped. Retry or drop "
            "dead letters (flask eventbus dead list), or raise 'EVENTBUS_DEAD_MAXLEN'.",
            self._config.service,
            self._config.dead_maxlen,
            name,
            count,
        )
        emit(events_dropped, self._config.service, where="dead", count=count)
