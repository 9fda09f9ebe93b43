"""Send events to Redis in batches, one round trip each, and interpret the replies."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import redis

from ..logs import get_logger
from ..transport.connection import (
    LEAST,
    Connection,
    is_passing,
    set_deadline,
    shut_down,
    takes_no_writes,
    why_no_writes,
)
from ..transport.connections import Connections
from .message import AgingStreamDestination, Destination, NoWritesError, TooFewReplicasError, pack

logger = get_logger(__name__)

#: Longest wait for replicas in seconds; shorter than the timeout of the connection.
MOST_WAIT = 1.0

#: Fraction of a sender's timeout that is spent waiting for replicas.
REPLICAS_SHARE = 0.8

#: Difference between the clocks in seconds above which a warning is logged.
MOST_SKEW = 10.0

#: Seconds between two comparisons of the clocks.
COMPARE_AGAIN = 60.0

_PING = pack("PING")
_ROLE = pack("ROLE")


class PublishConnection:
    """Publishes batches of events over its own connection.

    It is used by one thread at a time. One thread may send a batch, and another may read the
    replies. Nothing is sent twice: after an error, Redis may have any part of the batch.

    :param timeout: longest round trip in seconds, connecting included.
    :param names: Redis key of the set of signals that have a stream.
    :param sender_timeout: seconds that a sender waits; limits the wait for replicas.
    """

    def __init__(
        self, connections: Connections, *, timeout: float, names: str, sender_timeout: float
    ) -> None:
        self._connections = connections
        self._timeout = timeout
        self._names = names
        self._replicas_ms = math.ceil(min(sender_timeout * REPLICAS_SHARE, MOST_WAIT) * 1_000)
        self._connection: Connection | None = None
        #: ``SADD`` commands that register the stream of a signal, keyed by signal. They are sent
        #: with each batch, since Redis may have been flushed.
        self._announced: dict[str, bytes] = {}
        #: Signals whose stream this user has no right to register.
        self._not_allowed: set[str] = set()
        #: Destinations of the batch that are trimmed by age.
        self._aging: set[AgingStreamDestination] = set()
        self._compare_at = 0.0
        self._is_skewed = False
        #: Monotonic time at which ROLE was last sent.
        self._asked_role = 0.0
        #: True while the reply to ROLE has not been read; it precedes those to the events.
        self._awaits_role = False
        #: The current round trip: these ``SADD`` commands, then the batch, then ``WAIT`` if
        #: replicas must confirm it.
        self._announcing: dict[str, bytes] = {}
        self._batch: Sequence[tuple[Destination, bytes]] = ()
        self._replicas = 0
        self._answers: list[Any] = []
        #: Key of the stream last written to; :meth:`probe` tries to write there.
        self._stream = ""

    @property
    def is_open(self) -> bool:
        """Return True if a connection is open; the server may have closed it unnoticed."""
        return self._connection is not None

    @property
    def answers(self) -> list[Any]:
        """The replies to the events: an entry id for a stream, a number of listeners else."""
        first = len(self._announcing)
        return self._answers[first : first + len(self._batch)]

    def publish(
        self, batch: Sequence[tuple[Destination, bytes]], deadline: float | None = None
    ) -> list[Exception | None]:
        """Publish events in order, and return the result of each.

        :param deadline: monotonic time at which to give up, if earlier than the timeout.
        :return: for each event ``None``, or why it was not published: a :class:`NoWritesError` if
            Redis may accept it later.
        :raises redis.ConnectionError: Redis is unavailable; it may have any part of the batch.
        :raises redis.TimeoutError: Redis did not reply in time; the same applies.
        """
        deadline = self._earlier(deadline)
        self.send(batch, deadline)

        if not self.read(deadline):
            self.close()
            raise redis.TimeoutError("Redis did not answer in time.")

        return self.outcomes()

    def probe(self, deadline: float | None = None) -> NoWritesError | None:
        """Check whether Redis is available, and whether it accepts writes.

        If the connection is closed, open another one and try again, because servers and firewalls
        close idle connections.

        :return: why Redis accepts no writes; ``None`` if it does, or if no stream was written to.
        :raises redis.ConnectionError: Redis is unavailable.
        """
        deadline = self._earlier(deadline)

        if self._connection is not None:
            try:
                return self._ping(self._connection, deadline)
            except redis.ConnectionError as error:
                logger.debug("The connection was closed: %s", error)

        return self._ping(self._open(deadline), deadline)

    def connect(self, deadline: float | None = None) -> float:
        """Open a connection unless one is open; return the deadline of the next round trip.

        :raises redis.ConnectionError: Redis is unavailable; nothing was sent.
        """
        deadline = self._earlier(deadline)

        if self._connection is None:
            self._open(deadline)

        return deadline

    def send(
        self, batch: Sequence[tuple[Destination, bytes]], deadline: float | None = None
    ) -> None:
        """Send events; call :meth:`read` for the replies.

        :param deadline: monotonic time at which to give up, if earlier than the timeout.
        :raises redis.ConnectionError: Redis is unavailable.
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
                self._add_stream(destination)

        for aging in self._aging:
            if aging.newest is None:
                aging.newest = self._time(connection, deadline)

        commands = [destination.command(body) for destination, body in batch]
        set_deadline(connection, deadline)
        self._send(connection, self._role_first(self._framed(commands)))

    def read(self, deadline: float | None = None) -> bool:
        """Read the replies to a batch; return False if some are missing at the deadline.

        Call it again for the missing replies, from any thread.

        :param deadline: monotonic time; if not given, the timeout applies, and raises an error.
        :raises redis.ConnectionError: Redis is unavailable.
        :raises redis.TimeoutError: no deadline was given, and the timeout has passed.
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
        """Return the result of each event, after :meth:`read` has returned True."""
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
        """Abort the current wait for Redis with a connection error; call it from any thread."""
        connection = self._connection

        if connection is not None:
            shut_down(connection)

    def close(self) -> None:
        """Close the connection; the next batch opens another."""
        connection, self._connection = self._connection, None

        if connection is not None:
            connection.disconnect()

    def _earlier(self, deadline: float | None) -> float:
        """Return the deadline of a round trip that starts now."""
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
            commands.append(pack("SADD", self._names, *names))

        if self._stream:
            # Redis always refuses this id, but it checks first whether it accepts writes.
            commands.append(pack("XADD", self._stream, "NOMKSTREAM", "0-0", "event", ""))

        set_deadline(connection, deadline)
        self._send(connection, self._role_first(b"".join(commands)))
        answers: list[Any] = []

        try:
            self._check_role(connection)

            answers += [_answer(connection) for _ in commands]
        except BaseException:
            self.close()
            raise

        logger.debug("Redis is available; it replied %s.", answers)
        refusal = answers[-1] if self._stream else None

        if isinstance(refusal, Exception) and takes_no_writes(refusal):
            return NoWritesError(why_no_writes(refusal))

        return None

    def _role_first(self, data: bytes) -> bytes:
        """Return commands, preceded by ROLE if the last check of the role is too old.

        The reply to ROLE is read first, so that a batch sent to a replica does not count as
        published.
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

    def _add_stream(self, destination: Destination) -> None:
        name = destination.name
        self._stream = destination.key

        if name not in self._announcing and name not in self._not_allowed:
            if name not in self._announced:
                self._announced[name] = pack("SADD", self._names, name)

            self._announcing[name] = self._announced[name]

        if destination.by_age and isinstance(destination, AgingStreamDestination):
            self._aging.add(destination)

        if destination.replicas > self._replicas:
            self._replicas = destination.replicas

    def _framed(self, commands: list[bytes]) -> bytes:
        """Return all commands of a round trip as bytes: ``SADD``, the events and ``WAIT``."""
        if self._announcing:
            commands[:0] = self._announcing.values()

        if self._replicas:
            commands.append(pack("WAIT", str(self._replicas), str(self._replicas_ms)))

        return b"".join(commands)

    def _note_announcements(self) -> None:
        for name, answer in zip(self._announcing, self._answers, strict=False):
            if isinstance(answer, redis.exceptions.NoPermissionError):
                # Not an error: the services that read the stream register it as well.
                self._announced.pop(name, None)
                self._not_allowed.add(name)
                logger.debug("This user cannot register the stream of %r: %s", name, answer)

    def _time(self, connection: Connection, deadline: float) -> int | None:
        """Return Redis's time in milliseconds; ``None`` if this user may not ask for it."""
        set_deadline(connection, deadline)
        self._send(connection, pack("TIME"))

        try:
            answer = _answer(connection)
        except BaseException:
            self.close()
            raise

        if isinstance(answer, Exception):
            # The entry id of the first event has the time as well.
            logger.debug("Redis refused TIME: %s", answer)
            return None

        return int(answer[0]) * 1_000 + int(answer[1]) // 1_000

    def _note_ages(self) -> None:
        for (destination, _), answer in zip(self._batch, self.answers, strict=False):
            if isinstance(destination, AgingStreamDestination) and isinstance(answer, bytes):
                destination.newest = _milliseconds(answer)

    def _compare_clocks(self) -> None:
        """Log a warning if the clock of this machine differs from that of Redis."""
        found = [answer for answer in self.answers if isinstance(answer, bytes)]

        if not found:
            return

        self._compare_at = time.monotonic() + COMPARE_AGAIN
        skew = time.time() - _milliseconds(found[-1]) / 1_000
        was_skewed, self._is_skewed = self._is_skewed, abs(skew) > MOST_SKEW

        if self._is_skewed and not was_skewed:
            logger.warning(
                "This machine's clock is %.0f s %s Redis's. Events carry this machine's time; "
                "streams are trimmed by Redis's. Synchronize both clocks with NTP.",
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
    """Return the next reply; an error reply is returned as a value.

    After a timeout, the part of a reply that has arrived is kept for the next call.

    :raises redis.ConnectionError: the error reply is temporary.
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
        return TooFewReplicasError(f"Redis did not report how many replicas have it: {count}")

    if count >= wanted:
        return None

    return TooFewReplicasError(f"only {count} of {wanted} replicas have it")
