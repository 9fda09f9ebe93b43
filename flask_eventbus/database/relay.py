"""Publish the committed events of an outbox, and delete those that Redis has confirmed."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum, auto
from typing import cast

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ..logs import BoundedLog, get_logger
from ..publisher.connection import PublishConnection
from ..publisher.message import Destination, NoWritesError, TooFewReplicasError
from ..publisher.writer import BATCH_BYTES, LISTENERS_RETURN
from ..transport.connections import OUTAGE
from ..transport.reconnect import Backoff
from ..typing import Via
from .outbox import Batch, Entry, Outbox

logger = get_logger(__name__)

#: Errors of a database that is not available, or locked for too long.
DATABASE_OUTAGE = (DBAPIError, PoolTimeoutError)

#: Longest pause in seconds between tries while Redis or the database is not available.
MOST_BACKOFF = 2.0

#: Transports that this version can publish to.
VIAS = frozenset({"channel", "stream"})

#: Seconds before the next read of the table while another relay has locked the events.
AFTER_YOU = 0.1

#: Seconds before an event that Redis refused is published again.
REFUSED_AGAIN = 5.0

#: Seconds before the next write to a Redis that accepts no writes.
WRITE_AGAIN = 2.0


class RelayTurn(Enum):
    """Result of one round of a relay."""

    #: Published a batch, or the part of it that Redis accepted.
    PUBLISHED = auto()
    #: Skipped the events, since another relay has locked them.
    LEFT = auto()
    #: Found nothing to publish.
    EMPTY = auto()


_AWAY = "%s cannot be used: %s. Events wait in the outbox."
_BACK = "%s can be used again after %.1f s."


class Absence:
    """Logs the start and the end of an outage, once each."""

    def __init__(self, what: str, *, begins: str = _AWAY, ends: str = _BACK) -> None:
        self._what = what
        self._begins = begins
        self._ends = ends
        #: Monotonic time at which the outage started; ``None`` if there is none.
        self._since: float | None = None

    def __bool__(self) -> bool:
        return self._since is not None

    def begin(self, reason: object) -> None:
        """Log the start of an outage, unless there is one already."""
        if self._since is None:
            self._since = time.monotonic()
            logger.warning(self._begins, self._what, reason)

    def end(self) -> None:
        """Log the end of the outage, if there is one."""
        if self._since is not None:
            seconds = time.monotonic() - self._since
            self._since = None
            logger.warning(self._ends, self._what, seconds)


class Relay:
    """Publishes the events of one outbox in order, a batch in one round trip.

    An event is deleted after Redis has confirmed it. If the process dies or a connection is lost
    in between, the event is published again, with the same bytes.

    :param exchange: writes to Redis.
    :param way: returns the destination of an event by its name and its transport.
    :param batch: number of events to publish at most in one database transaction.
    """

    def __init__(
        self,
        outbox: Outbox,
        exchange: PublishConnection,
        way: Callable[[str, Via], Destination],
        *,
        batch: int,
    ) -> None:
        self.outbox = outbox
        self._exchange = exchange
        self._way = functools.cache(way)
        self._batch = batch
        self._log = BoundedLog(logger)
        #: How many events it has published.
        self.published = 0
        #: The names that Redis refuses, with its reasons, and until when they are left out.
        self.refused: dict[str, str] = {}
        self._refused_until = 0.0
        self._redis = Absence("Redis")
        self._database = Absence("The database")
        self._writes = Absence(
            "Redis",
            begins="%s takes no writes: %s. Events for streams wait in the outbox; those of "
            "channels go on.",
            ends="%s takes writes again after %.1f s.",
        )

    def run(self, told: threading.Event, *, interval: float) -> None:
        """Publish what is there and what comes, until ``told``.

        :param interval: seconds between looks at an empty outbox.
        """
        backoff = Backoff(most=MOST_BACKOFF)

        while not told.is_set():
            try:
                turn = self.turn(told)
            except OUTAGE as error:
                self._redis.begin(error)
                told.wait(backoff.next())
            except DATABASE_OUTAGE as error:
                self._database.begin(reason_of(error))
                told.wait(backoff.next())
            else:
                backoff.reset()
                self._database.end()
                told.wait({RelayTurn.EMPTY: interval, RelayTurn.LEFT: AFTER_YOU}.get(turn, 0))

    def run_once(self, told: threading.Event, *, until: int | None, patience: float) -> None:
        """Publish what is there, up to the number ``until``; without one there is nothing.

        :param patience: seconds for another relay that has it in hand.
        :raises redis.ConnectionError: Redis is away.
        :raises sqlalchemy.exc.DBAPIError: the database is away.
        """
        deadline = time.monotonic() + patience

        while not told.is_set() and until is not None:
            turn = self.turn(told, until=until)

            if turn is RelayTurn.EMPTY or (turn is RelayTurn.LEFT and time.monotonic() > deadline):
                return

            told.wait(AFTER_YOU if turn is RelayTurn.LEFT else 0)

    def turn(self, told: threading.Event, *, until: int | None = None) -> RelayTurn:
        """Publish one batch, if there is something to publish."""
        self._forgive()

        # Without a lock: to look at an empty outbox disturbs nobody.
        if self.outbox.first(until=until, without=self.refused) is None:
            return RelayTurn.EMPTY

        self._ask(told)

        with self.outbox.take(self._batch, until=until, without=self.refused) as batch:
            error = self._publish(batch)

        if error is not None:
            raise error

        return RelayTurn.PUBLISHED if batch.entries else RelayTurn.LEFT

    def _forgive(self) -> None:
        if self.refused and time.monotonic() > self._refused_until:
            self.refused = {}

    def _ask(self, told: threading.Event) -> None:
        """Find out whether Redis is there before the database locks anything for it."""
        self._exchange.probe()

        if self._redis:
            # Listeners hear no past: they come back first.
            told.wait(LISTENERS_RETURN)
            self._redis.end()

    def _publish(self, batch: Batch) -> Exception | None:
        """Publish what is in hand; an outage in the middle leaves what was confirmed so."""
        for entries in _portions(self._publishable(batch.entries)):
            try:
                errors = self._exchange.publish(
                    [
                        (self._way(entry.name, cast(Via, entry.via)), entry.event)
                        for entry in entries
                    ]
                )
            except OUTAGE as error:
                return error

            self._settle(batch, entries, errors)

        return None

    def _publishable(self, entries: Sequence[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if entry.via in VIAS:
                yield entry
            else:
                # Written by a newer version of the program than this is.
                self._refuse(entry, f"this relay is too old to publish via {entry.via!r}")

    def _settle(
        self, batch: Batch, entries: Sequence[Entry], errors: Sequence[Exception | None]
    ) -> None:
        outcomes = list(zip(entries, errors, strict=True))
        published = [entry for entry, error in outcomes if not _is_refusal(error)]
        batch.delete(published)
        self.published += len(published)

        if any(entry.via == "stream" for entry in published):
            self._writes.end()

        for entry, error in outcomes:
            if isinstance(error, NoWritesError):
                self._hold(entry, error)
            elif error is not None and _is_refusal(error):
                self._refuse(entry, str(error))
            elif error is not None:
                self._tell_of_replicas(entry, error)

    def _tell_of_replicas(self, entry: Entry, error: Exception) -> None:
        self._log.warning(
            f"replicas {entry.name}",
            "The event %s of %r is stored, but %s.",
            entry.event_id,
            entry.name,
            error,
            extra={"event_id": entry.event_id, "signal": entry.name},
        )

    def _hold(self, entry: Entry, error: NoWritesError) -> None:
        """Leave out the events of a name for a while; those of channels go on."""
        self._writes.begin(error)
        self._refused_until = time.monotonic() + WRITE_AGAIN
        self.refused[entry.name] = str(error)

    def _refuse(self, entry: Entry, reason: str) -> None:
        self._refused_until = time.monotonic() + REFUSED_AGAIN
        self.refused[entry.name] = reason
        self._log.error(
            f"refused {entry.name}",
            "The event %s of %r is refused: %s. It waits in the outbox, and so do those of its "
            "name that come after it.",
            entry.event_id,
            entry.name,
            reason,
            extra={"event_id": entry.event_id, "signal": entry.name},
        )


def _is_refusal(error: Exception | None) -> bool:
    """Whether an event is not published; on too few replicas it is."""
    return error is not None and not isinstance(error, TooFewReplicasError)


def reason_of(error: Exception) -> object:
    """What a driver has to say, without the statement that it says it of."""
    return error.orig if isinstance(error, DBAPIError) else error


def _portions(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """As many at a time as go into one round trip."""
    portion: list[Entry] = []
    size = 0

    for entry in entries:
        portion.append(entry)
        size += len(entry.event)

        if size >= BATCH_BYTES:
            yield portion
            portion, size = [], 0

    if portion:
        yield portion
