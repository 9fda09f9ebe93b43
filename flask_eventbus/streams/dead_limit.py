"""Keeps the dead letters of a service within ``EVENTBUS_DEAD_MAXLEN``, and counts what it drops."""

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
from ..transport.connections import OUTAGE
from ..transport.keys import StreamKeys
from ..transport.pipe import Command, Pipe
from .group import remedy

logger = get_logger(__name__)


class DeadLimit:
    """Trims streams of dead letters that got longer than the setting allows.

    A command of its own, beside the transaction that adds a dead letter: only ``XTRIM`` answers
    how many entries it removed.

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
        #: Signals that got a dead letter since their stream of dead letters was last trimmed.
        self._grown: set[str] = set()
        #: Dead letters that were dropped and not counted in Redis yet, by signal.
        self._uncounted: Counter[str] = Counter()

    def note(self, name: str) -> None:
        """Note that a signal got a dead letter."""
        self._grown.add(name)

    def enforce(self) -> None:
        """Trim what has grown. While Redis is away, the next call does it."""
        if not self._grown:
            return

        with self._lock:
            dropped = self._trim()
            self._count(dropped)

        for name, count in dropped.items():
            self._report(name, count)

    def _trim(self) -> dict[str, int]:
        """Trim what has grown; return how many dead letters were dropped, by signal."""
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
        """Add to the numbers in Redis, which ``status`` shows."""
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

        # What Redis refuses to count is counted with the next dead letter.
        for name, answer in zip(names, answers, strict=True):
            if answer is not None:
                del self._uncounted[name]

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands; ``None`` for those that Redis refuses, which is logged."""
        answers = self._pipe.run(commands) if commands else []

        for command, answer in zip(commands, answers, strict=True):
            if isinstance(answer, redis.ResponseError):
                self._refused(command, answer)
            else:
                right, key = str(command[0]), str(command[1])
                text = "Redis lets %s of %r be done again."
                self._log.over(f"refused {right} {key}", text, right, key)

        return [None if isinstance(answer, redis.ResponseError) else answer for answer in answers]

    def _refused(self, command: Command, error: redis.ResponseError) -> None:
        right, key = str(command[0]), str(command[1])
        self._log.once(
            f"refused {right} {key}",
            "Redis refuses %s of %r: %s. %s %s",
            right,
            key,
            error,
            "Dead letters have no limit."
            if right == "XTRIM"
            else "Dead letters that are dropped are not counted.",
            remedy(error, {key: f"+{right.lower()}"}),
            level=logging.ERROR,
        )

    def _report(self, name: str, count: int) -> None:
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
