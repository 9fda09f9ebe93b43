"""Send events to Redis in batches, one round trip each, and interpret the replies."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import redis

from ..codec.codec import MESSAGE_BYTES, MESSAGE_EVENTS
from ..codec.records import entry_id
from ..config import Config
from ..logs import get_logger
from ..transport.connection import (
    Connection,
    milliseconds_of,
    read_reply,
    refusal_of,
    takes_no_writes,
    why_no_writes,
)
from ..transport.connections import Connections
from ..transport.keys import StreamKeys
from ..transport.pipe import OwnConnection
from ..transport.timed_connection import CLOSED, LEAST
from .message import Destination, NoWritesError, StreamDestination, TooFewReplicasError, pack

logger = get_logger(__name__)

#: Longest wait for replicas in seconds; shorter than the timeout of the connection.
MAX_WAIT = 1.0

#: Fraction of a sender's timeout that is spent waiting for replicas.
REPLICAS_SHARE = 0.8

#: Difference between the clocks in seconds above which a warning is logged.
MAX_SKEW = 10.0

#: Seconds between two comparisons of the clocks.
COMPARE_AGAIN = 60.0

_PING = pack("PING")
_ROLE = pack("ROLE")


class PublishConnection(OwnConnection):
    """Publishes batches of events over its own connection.

    It is used by one thread at a time. One thread may send a batch, and another may read the
    replies. Nothing is sent twice: after an error, Redis may have any part of the batch.

    :param connections: opens the connection, and another one after an error.
    :param timeout: longest round trip in seconds, connecting included.
    """

    def __init__(self, connections: Connections, config: Config, *, timeout: float) -> None:
        super().__init__(connections, timeout=timeout)
        #: Redis key of the set of signals that have a stream.
        self._names = StreamKeys(config.prefix).names
        self._replicas_ms = math.ceil(min(config.timeout * REPLICAS_SHARE, MAX_WAIT) * 1_000)
        #: ``SADD`` commands that register the stream of a signal, keyed by signal. They are sent
        #: with each batch, since Redis may have been flushed. ``None``: this user has no right.
        self._announced: dict[str, bytes | None] = {}
        self._compare_at = 0.0
        self._is_skewed = False
        #: True while the reply to ROLE has not been read; it precedes those to the events.
        self._awaits_role = False
        #: The current round trip: these ``SADD`` commands, then the batch, then ``WAIT`` if
        #: replicas must confirm it.
        self._announcing: dict[str, bytes] = {}
        self._writes: Sequence[tuple[Destination, Sequence[bytes]]] = ()
        self._replicas = 0
        #: Deadline of the round trip for the socket.
        self._deadline = 0.0
        #: The replies to all commands of the round trip.
        self._replies: list[Any] = []
        #: The replies to the events, once :meth:`outcomes` has returned: an entry id for a stream,
        #: a number of listeners else.
        self.answers: list[Any] = []
        #: Key of the stream last written to; :meth:`probe` tries to write there.
        self._stream = ""

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
        deadline = self.connect(deadline)
        self.send(batch, deadline)
        return self.wait_for_outcomes(deadline)

    def probe(self, deadline: float | None = None) -> NoWritesError | None:
        """Check whether Redis is available, and whether it accepts writes.

        If the connection is closed, open another one and try again, because servers and firewalls
        close idle connections.

        :return: why Redis accepts no writes; ``None`` if it does, or if no stream was written to.
        :raises redis.ConnectionError: Redis is unavailable.
        """
        was_open = self.is_open
        deadline = self.connect(deadline)

        try:
            return self._ping(deadline)
        except redis.ConnectionError as error:
            if not was_open:
                raise

            logger.debug("The connection was closed: %s", error)

        return self._ping(self.connect(deadline))

    def connect(self, deadline: float | None = None) -> float:
        """Open a connection unless one is open; return the deadline of the next round trip.

        :param deadline: monotonic time at which to give up, if earlier than the timeout.
        :raises redis.ConnectionError: Redis is unavailable; nothing was sent.
        """
        end = time.monotonic() + self.timeout
        deadline = end if deadline is None else min(end, deadline)

        if self._connection is None:
            self._open(max(deadline - time.monotonic(), LEAST))

        return deadline

    def send(self, batch: Sequence[tuple[Destination, bytes]], deadline: float) -> None:
        """Send events after :meth:`connect`; call :meth:`read` for the replies.

        :param deadline: monotonic time at which to give up.
        :raises redis.ConnectionError: Redis is unavailable.
        """
        connection = self._connection

        if connection is None:
            raise redis.ConnectionError(CLOSED)

        self._writes = _grouped(batch)
        self._replies = []
        self._announcing = {}
        self._replicas = 0
        commands = []

        for destination, bodies in self._writes:
            if isinstance(destination, StreamDestination):
                self._add_stream(connection, destination, deadline)

            commands.append(destination.command(b"".join(bodies)))

        if self._announcing:
            commands[:0] = self._announcing.values()

        if self._replicas:
            commands.append(pack("WAIT", str(self._replicas), str(self._replicas_ms)))

        self._send(connection, b"".join(commands), deadline)

    def read(self, deadline: float) -> bool:
        """Read the replies to a batch; return False if some are missing at the deadline.

        Call it again for the missing replies, from any thread.

        :param deadline: monotonic time.
        :raises redis.ConnectionError: Redis is unavailable.
        """
        connection = self._connection

        if connection is None:
            raise redis.ConnectionError(CLOSED)

        replies = self._replies
        count = len(self._announcing) + len(self._writes) + bool(self._replicas)

        try:
            if deadline != self._deadline:
                self._deadline = deadline
                connection.set_deadline(deadline)

            if self._awaits_role:
                self._check_role(connection)

            while len(replies) < count:
                try:
                    replies.append(connection.read_response(disconnect_on_error=False))
                except redis.ResponseError as error:
                    replies.append(refusal_of(error))
        except redis.TimeoutError:
            return False
        except BaseException:
            self.close()
            raise

        return True

    def wait_for_outcomes(self, deadline: float) -> list[Exception | None]:
        """Read the replies to a batch, and return the result of each event.

        :param deadline: monotonic time.
        :raises redis.ConnectionError: Redis is unavailable.
        :raises redis.TimeoutError: Redis did not reply in time.
        """
        if not self.read(deadline):
            self.close()
            raise redis.TimeoutError("Redis did not answer in time.")

        return self.outcomes()

    def outcomes(self) -> list[Exception | None]:
        """Return the result of each event, after :meth:`read` has returned True."""
        outcomes: list[Exception | None] = []
        self.answers = []
        newest: bytes | None = None

        for (destination, bodies), answer in zip(
            self._writes, self._replies[len(self._announcing) :], strict=False
        ):
            outcome: Exception | None = None

            if isinstance(answer, Exception):
                outcome = _error(answer)
            elif isinstance(destination, StreamDestination):
                newest = answer

                if destination.age_ms is not None:
                    destination.newest = entry_id(answer)[0]

                if destination.replicas:
                    outcome = _verdict(destination.replicas, self._replies[-1])

            self.answers += [answer] * len(bodies)
            outcomes += [outcome] * len(bodies)

        for name, answer in zip(self._announcing, self._replies, strict=False):
            if isinstance(answer, redis.exceptions.NoPermissionError):
                # Not an error: the services that read the stream register it as well.
                self._announced[name] = None
                logger.debug("This user cannot register the stream of %r: %s", name, answer)

        if newest is not None and time.monotonic() > self._compare_at:
            self._compare_clocks(newest)

        return outcomes

    def _open(self, within: float) -> Connection:
        connection = super()._open(within)
        self._announced.clear()
        self._awaits_role = False
        return connection

    def _ping(self, deadline: float) -> NoWritesError | None:
        connection = self._connection

        if connection is None:
            raise redis.ConnectionError(CLOSED)

        names = sorted(name for name, command in self._announced.items() if command)
        commands = [_PING]

        if names:
            commands.append(pack("SADD", self._names, *names))

        if self._stream:
            # Redis always refuses this id, but it checks first whether it accepts writes.
            commands.append(pack("XADD", self._stream, "NOMKSTREAM", "0-0", "event", ""))

        replies = self._ask(connection, b"".join(commands), len(commands), deadline)
        logger.debug("Redis is available; it replied %s.", replies)
        refusal = replies[-1] if self._stream else None

        if isinstance(refusal, Exception) and takes_no_writes(refusal):
            return NoWritesError(why_no_writes(refusal))

        return None

    def _send(self, connection: Connection, data: bytes, deadline: float) -> None:
        """Send commands, preceded by ROLE if the last check of the role is too old.

        The reply to ROLE is read first, so that a batch sent to a replica does not count as
        published.
        """
        if time.monotonic() >= self._ask_role_at and self._connections.asks_role:
            self._ask_role_at = self._connections.next_role_check()
            self._awaits_role = True
            data = _ROLE + data

        self._deadline = deadline
        connection.set_deadline(deadline)

        try:
            connection.send_packed_command([data], check_health=False)
        except BaseException:
            self.close()
            raise

    def _ask(self, connection: Connection, data: bytes, count: int, deadline: float) -> list[Any]:
        """Send ``count`` commands and return the replies."""
        self._send(connection, data, deadline)

        try:
            if self._awaits_role:
                self._check_role(connection)

            return [read_reply(connection, disconnect_on_error=False) for _ in range(count)]
        except BaseException:
            self.close()
            raise

    def _check_role(self, connection: Connection) -> None:
        self._connections.check_role(read_reply(connection, disconnect_on_error=False))
        self._awaits_role = False

    def _add_stream(
        self, connection: Connection, destination: StreamDestination, deadline: float
    ) -> None:
        name = destination.name
        self._stream = destination.key

        if name not in self._announced:
            self._announced[name] = pack("SADD", self._names, name)

        if command := self._announced[name]:
            self._announcing[name] = command

        if destination.age_ms is not None and destination.newest is None:
            destination.newest = self._time(connection, deadline)

        if destination.replicas > self._replicas:
            self._replicas = destination.replicas

    def _time(self, connection: Connection, deadline: float) -> int:
        """Return Redis's time in milliseconds; 0 if this user may not ask for it."""
        [answer] = self._ask(connection, pack("TIME"), 1, deadline)

        if isinstance(answer, Exception):
            # The entry id of the first event has the time as well.
            logger.debug("Redis refused TIME: %s", answer)
            return 0

        return milliseconds_of(answer)

    def _compare_clocks(self, newest: bytes) -> None:
        """Log a warning if the clock of this machine differs from that of Redis.

        :param newest: the id of an entry that Redis has just stored.
        """
        self._compare_at = time.monotonic() + COMPARE_AGAIN
        skew = time.time() - entry_id(newest)[0] / 1_000
        was_skewed, self._is_skewed = self._is_skewed, abs(skew) > MAX_SKEW

        if self._is_skewed and not was_skewed:
            logger.warning(
                "This machine's clock is %.0f s %s Redis's. Events carry this machine's time; "
                "streams are trimmed by Redis's. Synchronize both clocks with NTP.",
                abs(skew),
                "ahead of" if skew > 0 else "behind",
            )
        elif was_skewed and not self._is_skewed:
            logger.warning("This machine's clock agrees with Redis's again.")


def _grouped(
    batch: Sequence[tuple[Destination, bytes]],
) -> Sequence[tuple[Destination, Sequence[bytes]]]:
    """Return a batch with the events of each channel together that follow one another.

    They share a message, so that Redis and each listener handle one message for all of them.
    """
    writes: list[tuple[Destination, list[bytes]]] = []
    last: Destination | None = None
    room = events = 0

    for destination, body in batch:
        room -= len(body)
        events += 1

        if destination is last and room >= 0 and events <= MESSAGE_EVENTS:
            writes[-1][1].append(body)
            continue

        writes.append((destination, [body]))
        last = None if isinstance(destination, StreamDestination) else destination
        room, events = MESSAGE_BYTES - len(body), 1

    return writes


def _error(answer: Exception) -> Exception:
    return NoWritesError(why_no_writes(answer)) if takes_no_writes(answer) else answer


def _verdict(wanted: int, count: Any) -> TooFewReplicasError | None:
    if isinstance(count, Exception):
        return TooFewReplicasError(f"Redis did not report how many replicas have it: {count}")

    if count >= wanted:
        return None

    return TooFewReplicasError(f"only {count} of {wanted} replicas have it")
