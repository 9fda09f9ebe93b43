"""Events to Redis and its answers: a batch in one round trip, on a connection of one's own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import redis

from ..logs import get_logger
from ..transport.connections import (
    LEAST,
    Connection,
    Connections,
    is_passing,
    set_deadline,
    shut_down,
    takes_no_writes,
    why_no_writes,
)
from .message import AgingStreamDestination, Destination, NoWritesError, TooFewReplicasError, whole

logger = get_logger(__name__)

#: Seconds that replicas are waited for at most: less than a connection waits for an answer.
MOST_WAIT = 1.0

#: The part of a sender's patience that replicas have.
REPLICAS_SHARE = 0.8

#: Seconds that the clocks may differ, and seconds between two comparisons.
MOST_SKEW = 10.0
COMPARE_AGAIN = 60.0

_PING = whole("PING")
_ROLE = whole("ROLE")


class PublishConnection:
    """Writes events in batches; one thread at a time, which may change in the middle of one.

    Nothing is sent a second time: after an error Redis may have got any part of a batch.

    :param timeout: seconds that a round trip may take, connecting included.
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
        #: The signals whose stream was announced on this connection, with the command for it.
        #: It goes with each batch, since Redis may have been flushed.
        self._announced: dict[str, bytes] = {}
        #: The signals of which Redis does not let this user note the stream.
        self._not_allowed: set[str] = set()
        #: The ways of the batch that trim by age.
        self._aging: set[AgingStreamDestination] = set()
        self._compare_at = 0.0
        self._is_skewed = False
        #: When the server was last asked for its role, by the monotonic clock.
        self._asked_role = 0.0
        #: True while the answer to ROLE is still to be read, before those to the events.
        self._awaits_role = False
        #: What is being sent: these names, then the events, then the question for replicas.
        self._announcing: dict[str, bytes] = {}
        self._batch: Sequence[tuple[Destination, bytes]] = ()
        self._replicas = 0
        self._answers: list[Any] = []
        #: The stream that was last written to: where :meth:`probe` tries to write.
        self._stream = ""

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def answers(self) -> list[Any]:
        """What Redis answered to each event: its entry's id, or how many listeners got it."""
        first = len(self._announcing)
        return self._answers[first : first + len(self._batch)]

    def publish(
        self, batch: Sequence[tuple[Destination, bytes]], deadline: float | None = None
    ) -> list[Exception | None]:
        """Publish events, in order, and tell of each whether Redis took it.

        :param deadline: when to give up, if that is earlier than the timeout.
        :return: for each event ``None``, or why Redis did not take it: a :class:`NoWritesError`
            if it may take it later.
        :raises redis.ConnectionError: Redis is away; it may have got any part of the batch.
        """
        deadline = self._earlier(deadline)
        self.send(batch, deadline)

        if not self.read(deadline):
            self.close()
            raise redis.TimeoutError("Redis did not answer in time.")

        return self.outcomes()

    def probe(self, deadline: float | None = None) -> NoWritesError | None:
        """Find out whether Redis is there, and whether it takes writes.

        That the connection was closed meanwhile, as servers and firewalls do with idle ones, is no
        answer: then it asks on another.

        :return: why Redis takes no writes; ``None`` if it does, or no stream was written to yet.
        :raises redis.ConnectionError: Redis is away.
        """
        deadline = self._earlier(deadline)

        if self._connection is not None:
            try:
                return self._ping(self._connection, deadline)
            except redis.ConnectionError as error:
                logger.debug("The connection was closed: %s", error)

        return self._ping(self._open(deadline), deadline)

    def connect(self, deadline: float | None = None) -> float:
        """Open a connection, if there is none; return the deadline for what is sent on it.

        :raises redis.ConnectionError: Redis is away; nothing was sent.
        """
        deadline = self._earlier(deadline)

        if self._connection is None:
            self._open(deadline)

        return deadline

    def send(
        self, batch: Sequence[tuple[Destination, bytes]], deadline: float | None = None
    ) -> None:
        """Send events, by the deadline or within the timeout; :meth:`read` reads the answers.

        :raises redis.ConnectionError: Redis is away.
        """
        deadline = self._earlier(deadline)
        connection = self._connection or self._open(deadline)
        self._batch = batch
        self._answers = []
        self._announcing = {}
        self._replicas = 0
        self._aging.clear()

        for destination, _ in batch:
            if destination.is_stream:
                self._look_at(destination)

        for aging in self._aging:
            if aging.newest is None:
                aging.newest = self._time(connection, deadline)

        commands = [destination.command(body) for destination, body in batch]
        set_deadline(connection, deadline)
        self._send(connection, self._role_first(self._framed(commands)))

    def read(self, deadline: float | None = None) -> bool:
        """Read the answers to what was sent; return False if not all came by ``deadline``.

        Without a deadline it ends after the timeout, with an error. What is left can be read later,
        in any thread.

        :raises redis.ConnectionError: Redis is away.
        """
        connection = self._connection

        if connection is None:
            raise redis.ConnectionError("The connection was closed.")

        until = self._earlier(None) if deadline is None else deadline

        try:
            self._read(connection, until)
        except redis.TimeoutError:
            if deadline is not None:
                return False

            self.close()
            raise
        except BaseException:
            self.close()
            raise

        return True

    def outcomes(self) -> list[Exception | None]:
        """What became of each event, once all answers are there."""
        outcomes = [
            _error(answer) if isinstance(answer, Exception) else None for answer in self.answers
        ]

        if self._announcing:
            self._note_announcements()

        if self._replicas:
            self._judge(outcomes, self._answers[-1])

        if self._aging:
            self._note_ages()

        if time.monotonic() > self._compare_at:
            self._compare_clocks()

        return outcomes

    def interrupt(self) -> None:
        """Let a wait for Redis end at once, in whatever thread: as if Redis were lost."""
        connection = self._connection

        if connection is not None:
            shut_down(connection)

    def close(self) -> None:
        """Close the connection; the next batch opens another."""
        connection, self._connection = self._connection, None

        if connection is not None:
            connection.disconnect()

    def _earlier(self, deadline: float | None) -> float:
        """Return the end of a round trip that begins now."""
        end = time.monotonic() + self._timeout
        return end if deadline is None else min(end, deadline)

    def _open(self, deadline: float) -> Connection:
        left = max(deadline - time.monotonic(), LEAST)
        connection = self._connections.open(timeout=self._timeout, within=left)
        self._announced.clear()
        self._not_allowed.clear()
        self._asked_role = time.monotonic()
        self._awaits_role = False
        self._connection = connection
        return connection

    def _ping(self, connection: Connection, deadline: float) -> NoWritesError | None:
        names = sorted(self._announced)
        commands = [_PING]

        if names:
            commands.append(whole("SADD", self._names, *names))

        if self._stream:
            # No entry can have this id: it is refused for that where writes are taken.
            commands.append(whole("XADD", self._stream, "NOMKSTREAM", "0-0", "event", ""))

        set_deadline(connection, deadline)
        self._send(connection, self._role_first(b"".join(commands)))
        answers: list[Any] = []

        try:
            self._check_role(connection)

            answers += [_answer(connection) for _ in commands]
        except BaseException:
            self.close()
            raise

        logger.debug("Redis is there, and answers %s.", answers)
        refusal = answers[-1] if self._stream else None

        if isinstance(refusal, Exception) and takes_no_writes(refusal):
            return NoWritesError(why_no_writes(refusal))

        return None

    def _role_first(self, data: bytes) -> bytes:
        """Commands, with the question for the server's role ahead of them from time to time.

        Ahead, so that a batch that a replica took is not settled.
        """
        if not self._connections.asks_role(self._asked_role):
            return data

        self._asked_role = time.monotonic()
        self._awaits_role = True
        return _ROLE + data

    def _check_role(self, connection: Connection) -> None:
        if self._awaits_role:
            self._connections.role.check(_answer(connection))
            self._awaits_role = False

    def _send(self, connection: Connection, data: bytes) -> None:
        try:
            connection.send_packed_command([data], check_health=False)
        except BaseException:
            self.close()
            raise

    def _read(self, connection: Connection, deadline: float) -> None:
        set_deadline(connection, deadline)
        self._check_role(connection)
        answers = self._answers
        count = len(self._announcing) + len(self._batch) + bool(self._replicas)

        while len(answers) < count:
            answers.append(_answer(connection))

    # -- the names of streams, and replicas -----------------------------------------------

    def _look_at(self, destination: Destination) -> None:
        name = destination.name
        self._stream = destination.key

        if name not in self._announcing and name not in self._not_allowed:
            if name not in self._announced:
                self._announced[name] = whole("SADD", self._names, name)

            self._announcing[name] = self._announced[name]

        if destination.by_age and isinstance(destination, AgingStreamDestination):
            self._aging.add(destination)

        if destination.replicas > self._replicas:
            self._replicas = destination.replicas

    def _framed(self, commands: list[bytes]) -> bytes:
        """Commands with what goes before and after them, as bytes."""
        if self._announcing:
            commands[:0] = self._announcing.values()

        if self._replicas:
            commands.append(whole("WAIT", str(self._replicas), str(self._replicas_ms)))

        return b"".join(commands)

    def _note_announcements(self) -> None:
        for name, answer in zip(self._announcing, self._answers, strict=False):
            if isinstance(answer, redis.exceptions.NoPermissionError):
                # Who reads a stream names it as well.
                self._announced.pop(name, None)
                self._not_allowed.add(name)
                logger.debug("Redis does not let this user note the stream of %r: %s", name, answer)

    # -- clocks ---------------------------------------------------------------------------

    def _time(self, connection: Connection, deadline: float) -> int | None:
        """Return Redis's time in milliseconds; ``None`` if this user may not ask for it."""
        set_deadline(connection, deadline)
        self._send(connection, whole("TIME"))

        try:
            answer = _answer(connection)
        except BaseException:
            self.close()
            raise

        if isinstance(answer, Exception):
            # The answer to the first event has it as well.
            logger.debug("Redis does not tell its time: %s", answer)
            return None

        return int(answer[0]) * 1_000 + int(answer[1]) // 1_000

    def _note_ages(self) -> None:
        for (destination, _), answer in zip(self._batch, self.answers, strict=False):
            if isinstance(destination, AgingStreamDestination) and isinstance(answer, bytes):
                destination.newest = _milliseconds(answer)

    def _compare_clocks(self) -> None:
        """Report a clock of this machine that differs from the one that makes entries' ids."""
        found = [answer for answer in self.answers if isinstance(answer, bytes)]

        if not found:
            return

        self._compare_at = time.monotonic() + COMPARE_AGAIN
        skew = time.time() - _milliseconds(found[-1]) / 1_000
        was_skewed, self._is_skewed = self._is_skewed, abs(skew) > MOST_SKEW

        if self._is_skewed and not was_skewed:
            logger.warning(
                "This machine's clock is %.0f s %s Redis's. Events carry this machine's time; "
                "what streams keep goes by Redis's. Set both clocks by NTP.",
                abs(skew),
                "ahead of" if skew > 0 else "behind",
            )
        elif was_skewed and not self._is_skewed:
            logger.warning("This machine's clock agrees with Redis's again.")

    def _judge(self, outcomes: list[Exception | None], count: Any) -> None:
        for index, (destination, _) in enumerate(self._batch):
            if outcomes[index] is None and destination.replicas:
                outcomes[index] = _verdict(destination.replicas, count)


def _answer(connection: Connection) -> Any:
    """The next answer; a refusal as it is, one of "not now" raised.

    What arrived of an answer when the time was over stays, for the next to go on with.
    """
    try:
        return connection.read_response(disconnect_on_error=False)
    except redis.ResponseError as error:
        if is_passing(error):
            raise redis.ConnectionError(str(error)) from error

        return error


def _error(answer: Exception) -> Exception:
    return NoWritesError(why_no_writes(answer)) if takes_no_writes(answer) else answer


def _milliseconds(id: bytes) -> int:
    return int(id.partition(b"-")[0])


def _verdict(wanted: int, count: Any) -> TooFewReplicasError | None:
    if isinstance(count, Exception):
        return TooFewReplicasError(f"Redis does not tell how many replicas have it: {count}")

    if count >= wanted:
        return None

    return TooFewReplicasError(f"only {count} of {wanted} replicas have it")
