"""Events to Redis and its answers: a batch in one round trip, on a connection of one's own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import redis

from .connections import Connection, Connections
from .logs import get_logger
from .pipe import read_answer
from .way import TooFewReplicasError, Way, whole

logger = get_logger(__name__)

#: Seconds after which it is said again which signals have a stream: a server may forget.
ANNOUNCE = 60.0

#: Seconds that replicas are waited for at most: less than a connection waits for an answer.
MOST_WAIT = 1.0

#: The part of a sender's patience that replicas have.
REPLICAS_SHARE = 0.8

_PING = whole("PING")


class Exchange:
    """Writes events in batches; one thread at a time, which may change in the middle of one.

    Nothing is sent a second time: after an error Redis may have got any part of a batch.

    :param timeout: seconds that each wait for Redis may take.
    :param names: the Redis key of the set of signals that have a stream.
    :param patience: seconds that a sender waits, of which replicas get a part.
    """

    def __init__(
        self, connections: Connections, *, timeout: float, names: str, patience: float
    ) -> None:
        self._connections = connections
        self._timeout = timeout
        self._names = names
        self._replicas_ms = math.ceil(min(patience * REPLICAS_SHARE, MOST_WAIT) * 1_000)
        self._connection: Connection | None = None
        #: The signals whose stream was announced on this connection, and since when.
        self._announced: set[str] = set()
        self._announced_since = 0.0
        #: What is on its way: first these names, then the events, then the question for replicas.
        self._announcing: list[str] = []
        self._ways: list[Way] = []
        self._replicas = 0
        self._answers: list[Any] = []

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    def publish(self, batch: Sequence[tuple[Way, bytes]]) -> list[Exception | None]:
        """Publish events, in order, and tell of each whether Redis took it.

        :raises redis.ConnectionError: Redis is away, or it answers "not now" to some; it may
            have got any part of the batch.
        """
        self.send(batch)
        self.read()
        return self.outcomes()

    def ask(self) -> None:
        """Find out whether Redis is there.

        That the connection was closed meanwhile, as servers and firewalls do with idle ones, is no
        answer: then it asks on another.

        :raises redis.ConnectionError: Redis is away.
        """
        if self._connection is not None:
            try:
                return self._ping(self._connection)
            except redis.ConnectionError as error:
                logger.debug("The connection was closed: %s", error)

        self._ping(self._open())

    def send(self, batch: Sequence[tuple[Way, bytes]]) -> None:
        """Send events, whose answers :meth:`read` reads.

        :raises redis.ConnectionError: Redis is away.
        """
        connection = self._connection or self._open()
        self._answers = []
        self._ways = [way for way, _ in batch]
        commands = [way.command(body) for way, body in batch]
        self._add_announcements(commands)
        self._add_question(commands)
        self._send(connection, b"".join(commands))

    def read(self, deadline: float | None = None) -> bool:
        """Read the answers to what was sent; whether all came by ``deadline``.

        What is left can be read later, in any thread.

        :raises redis.ConnectionError: Redis is away, or answers "not now" to some.
        """
        count = len(self._announcing) + len(self._ways) + bool(self._replicas)

        try:
            while len(self._answers) < count:
                if not self._read_one(deadline):
                    return False
        except BaseException:
            self.close()
            raise

        return True

    @property
    def answers(self) -> list[Any]:
        """What Redis answered to each event: its entry's id, or how many listeners got it."""
        first = len(self._announcing)
        return self._answers[first : first + len(self._ways)]

    def outcomes(self) -> list[Exception | None]:
        """What became of each event, once all answers are there."""
        outcomes = [answer if isinstance(answer, Exception) else None for answer in self.answers]
        self._note_announcements(self._answers[: len(self._announcing)])

        if self._replicas:
            self._judge(outcomes, self._answers[-1])

        return outcomes

    def close(self) -> None:
        """Close the connection; the next batch opens another."""
        connection, self._connection = self._connection, None

        if connection is not None:
            connection.disconnect()

    def _open(self) -> Connection:
        connection = self._connections.open(timeout=self._timeout)
        self._announced.clear()
        self._connection = connection
        return connection

    def _send(self, connection: Connection, data: bytes) -> None:
        try:
            connection.send_packed_command([data], check_health=False)
        except BaseException:
            self.close()
            raise

    def _ping(self, connection: Connection) -> None:
        self._send(connection, _PING)

        try:
            answer = read_answer(connection)
        except BaseException:
            self.close()
            raise

        if isinstance(answer, Exception):
            logger.debug("Redis is there, and refuses a PING: %s", answer)

    def _read_one(self, deadline: float | None) -> bool:
        connection = self._connection

        if connection is None:
            raise redis.ConnectionError("The connection was closed.")

        if deadline is not None and not connection.can_read(max(0.0, deadline - time.monotonic())):
            return False

        self._answers.append(read_answer(connection))
        return True

    # -- the names of streams -------------------------------------------------------------

    def _add_announcements(self, commands: list[bytes]) -> None:
        new = {way.name for way in self._ways if way.is_stream}
        self._announcing = sorted(new - self._known()) if new else []
        commands[:0] = [whole("SADD", self._names, name) for name in self._announcing]

    def _known(self) -> set[str]:
        now = time.monotonic()

        if now - self._announced_since > ANNOUNCE:
            self._announced_since = now
            self._announced.clear()

        return self._announced

    def _note_announcements(self, answers: Sequence[Any]) -> None:
        for name, answer in zip(self._announcing, answers, strict=True):
            self._announced.add(name)

            if isinstance(answer, Exception):
                # Who reads a stream names it as well.
                logger.debug("Redis refuses to note the stream of %r: %s", name, answer)

    # -- replicas -------------------------------------------------------------------------

    def _add_question(self, commands: list[bytes]) -> None:
        self._replicas = max((way.replicas for way in self._ways), default=0)

        if self._replicas:
            commands.append(whole("WAIT", str(self._replicas), str(self._replicas_ms)))

    def _judge(self, outcomes: list[Exception | None], count: Any) -> None:
        for index, way in enumerate(self._ways):
            if outcomes[index] is None and way.replicas:
                outcomes[index] = _verdict(way.replicas, count)


def _verdict(wanted: int, count: Any) -> TooFewReplicasError | None:
    if isinstance(count, Exception):
        return TooFewReplicasError(f"Redis does not tell how many replicas have it: {count}")

    if count >= wanted:
        return None

    return TooFewReplicasError(f"only {count} of {wanted} replicas have it")
