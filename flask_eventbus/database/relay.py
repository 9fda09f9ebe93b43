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

from ..config import TIMING, Timing
from ..logs import BoundedLog, get_logger
from ..publisher.connection import PublishConnection
from ..publisher.message import Destination, NoWritesError, TooFewReplicasError
from ..publisher.writer import BATCH_BYTES
from ..transport.connection import OUTAGE
from ..transport.reconnect import Backoff
from ..typing import Via
from .outbox import Batch, Entry, Outbox

logger = get_logger(__name__)

#: Errors of a database that is not available, or locked for too long.
DATABASE_OUTAGE = (DBAPIError, PoolTimeoutError)

#: Longest pause in seconds between tries while Redis or the database is not available.
MAX_BACKOFF = 2.0

#: Transports that this version can publish to.
VIAS = frozenset({"channel", "stream"})

#: Seconds before the next read of the table while another relay has locked the events.
AFTER_YOU = 0.1

#: Seconds before the next write to a Redis that accepts no writes.
WRITE_AGAIN = 2.0


class BatchResult(Enum):
    """Result of :meth:`Relay.publish_batch`."""

    #: Published a batch, or the part of it that Redis accepted.
    PUBLISHED = auto()
    #: Skipped the events, since another relay has locked them.
    SKIPPED = auto()
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

    :param connection: writes to Redis.
    :param destination: returns the destination of an event by its name and its transport.
    :param batch: number of events to publish at most in one database transaction.
    """

    def __init__(
        self,
        outbox: Outbox,
        connection: PublishConnection,
        destination: Callable[[str, Via], Destination],
        *,
        batch: int,
        timing: Timing = TIMING,
    ) -> None:
        self.outbox = outbox
        self._timing = timing
        self._connection = connection
        self._destination = functools.cache(destination)
        self._batch = batch
        self._log = BoundedLog(logger)
        #: Number of events published so far.
        self.published = 0
        #: Names of the signals that are skipped for now, each with the reason.
        self.refused: dict[str, str] = {}
        #: Monotonic time at which they are tried again.
        self._refused_until = 0.0
        self._redis = Absence("Redis")
        self._database = Absence("The database")
        self._writes = Absence(
            "Redis",
            begins="%s takes no writes: %s. Stream events wait in the outbox; channel events are "
            "still published.",
            ends="%s takes writes again after %.1f s.",
        )

    def run(self, stopping: threading.Event, *, interval: float) -> None:
        """Publish events until ``stopping`` is set.

        :param interval: seconds between two reads of an empty outbox.
        """
        backoff = Backoff(most=MAX_BACKOFF)

        while not stopping.is_set():
            try:
                result = self.publish_batch(stopping)
            except OUTAGE as error:
                self._redis.begin(error)
                stopping.wait(backoff.next())
            except DATABASE_OUTAGE as error:
                self._database.begin(reason_of(error))
                stopping.wait(backoff.next())
            else:
                backoff.tries = 0
                self._database.end()
                stopping.wait(
                    {BatchResult.EMPTY: interval, BatchResult.SKIPPED: AFTER_YOU}.get(result, 0)
                )

    def run_once(self, stopping: threading.Event, *, until: int | None, patience: float) -> None:
        """Publish the events up to the row number ``until``, then return.

        :param until: row number of the newest event; ``None`` if the outbox is empty.
        :param patience: seconds to wait for events that another relay has locked.
        :raises redis.ConnectionError: Redis is not available.
        :raises sqlalchemy.exc.DBAPIError: the database is not available.
        """
        deadline = time.monotonic() + patience

        while not stopping.is_set() and until is not None:
            result = self.publish_batch(stopping, until=until)

            if result is BatchResult.EMPTY or (
                result is BatchResult.SKIPPED and time.monotonic() > deadline
            ):
                return

            stopping.wait(AFTER_YOU if result is BatchResult.SKIPPED else 0)

    def publish_batch(self, stopping: threading.Event, *, until: int | None = None) -> BatchResult:
        """Publish one batch of events, up to the row number ``until``."""
        if self.refused and time.monotonic() > self._refused_until:
            self.refused = {}

        # This read takes no lock, so that polling an empty outbox blocks no sender.
        if self.outbox.first(until=until, without=self.refused) is None:
            return BatchResult.EMPTY

        # Raise an error if Redis is not available, before the database locks any rows.
        self._connection.probe()

        if self._redis:
            # Pub/sub keeps no events: let the listeners reconnect first.
            stopping.wait(self._timing.listeners_return)
            self._redis.end()

        with self.outbox.take(self._batch, until=until, without=self.refused) as batch:
            error = self._publish(batch)

        if error is not None:
            raise error

        return BatchResult.PUBLISHED if batch.entries else BatchResult.SKIPPED

    def _publish(self, batch: Batch) -> Exception | None:
        """Publish a batch, delete the confirmed events, and return the error of an outage."""
        publishable = [entry for entry in batch.entries if entry.via in VIAS]

        for entry in batch.entries:
            if entry.via not in VIAS:
                # A newer version of the program wrote it.
                self._refuse(entry, f"this relay is too old to publish via {entry.via!r}")

        for entries in _portions(publishable):
            writes = [
                (self._destination(entry.name, cast(Via, entry.via)), entry.event)
                for entry in entries
            ]

            try:
                errors = self._connection.publish(writes)
            except OUTAGE as error:
                return error

            self._record(batch, entries, errors)

        return None

    def _record(
        self, batch: Batch, entries: Sequence[Entry], errors: Sequence[Exception | None]
    ) -> None:
        """Delete the published events, and log those that were refused or too little replicated."""
        outcomes = list(zip(entries, errors, strict=True))
        published = [entry for entry, error in outcomes if not _is_refusal(error)]
        batch.delete(published)
        self.published += len(published)

        if any(entry.via == "stream" for entry in published):
            self._writes.end()

        for entry, error in outcomes:
            if isinstance(error, NoWritesError):
                # Skip the events of the stream for a while.
                self._writes.begin(error)
                self._refused_until = time.monotonic() + WRITE_AGAIN
                self.refused[entry.name] = str(error)
            elif error is not None and _is_refusal(error):
                self._refuse(entry, str(error))
            elif error is not None:
                self._log.warning(
                    f"replicas {entry.name}",
                    "The event %s of %r is stored, but %s.",
                    entry.event_id,
                    entry.name,
                    error,
                    extra={"event_id": entry.event_id, "signal": entry.name},
                )

    def _refuse(self, entry: Entry, reason: str) -> None:
        """Skip the events of a signal for a while, to keep their order."""
        self._refused_until = time.monotonic() + self._timing.refused_again_after
        self.refused[entry.name] = reason
        self._log.error(
            f"refused {entry.name}",
            "The event %s of %r is refused: %s. It stays in the outbox, and so do later events of "
            "this signal. Retrying every %g s.",
            entry.event_id,
            entry.name,
            reason,
            self._timing.refused_again_after,
            extra={"event_id": entry.event_id, "signal": entry.name},
        )


def _is_refusal(error: Exception | None) -> bool:
    """Return True if the event is not published. On too few replicas it is published."""
    return error is not None and not isinstance(error, TooFewReplicasError)


def reason_of(error: Exception) -> object:
    """Return the error of the database driver, without the SQL statement."""
    return error.orig if isinstance(error, DBAPIError) else error


def _portions(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield lists of entries, each of which goes to Redis in one round trip."""
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
