"""The thread that reads new stream entries for the consumer groups of a service."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import redis

from ..logs import get_logger
from ..receivers.workers import MOST_BYTES, BatchSize
from ..routing.subscriptions import Subscription
from ..transport.connections import Context
from ..transport.reconnect import Backoff, ReadingThread
from .decoder import Intake
from .group import Entry, GroupGoneError
from .maintenance import Maintenance
from .membership import Membership
from .reclaim import Reclaimer

if TYPE_CHECKING:
    from .consumer import Consumer

logger = get_logger(__name__)

#: Seconds that a read blocks if there is no entry. Less than the five seconds after which an
#: answer counts as lost.
BLOCK = 1.0

#: Number of unacknowledged outcomes above which reading pauses, while Redis rejects them. Their
#: memory is limited as well, to that of the events read ahead.
MOST_UNWRITTEN = 1_000


class StreamReader(ReadingThread):
    """Reads streams in its own thread, and reconnects after an outage.

    :param consumer: learns when the connection is lost, when every subscribed stream can be read,
        and when the thread ends without :meth:`stop`.
    """

    _failed = "The stream reader failed; it reconnects."

    def __init__(
        self,
        context: Context,
        *,
        consumer: Consumer,
        membership: Membership,
        intake: Intake,
        reclaimer: Reclaimer,
        maintenance: Maintenance,
    ) -> None:
        super().__init__(context, "streams")
        self._consumer = consumer
        self._membership = membership
        self._group = membership.group
        self._duplicates = membership.duplicates
        self._trims = membership.trims
        self._intake = intake
        self._in_flight = intake.in_flight
        self._queue = intake.queue
        self._acknowledger = intake.acknowledger
        self._reclaimer = reclaimer
        self._maintenance = maintenance
        self._block = self._group.pipe.wait_at_most(BLOCK)
        #: Notified when more streams are read or refused, and when the connection is lost.
        self.changed = threading.Condition()
        #: True while Redis answers, once the groups were joined.
        self._is_connected = False
        #: True if every subscribed stream could be read after the last join.
        self._was_ready = False
        #: Monotonic time of the last answer to a read.
        self.last_heard: float | None = None
        #: Number of streams with entries in the last answer; ``None`` after an empty one, because
        #: then the next answer may have entries of all streams.
        self._active_streams: int | None = None
        self._batch_size = BatchSize(max_bytes=context.config.max_event_bytes)

    @property
    def goes_on(self) -> bool:
        """Return True if the thread should continue to read."""
        return super().goes_on and self._membership.fatal is None

    @property
    def ready(self) -> bool:
        """Return True if Redis answers, and each subscribed stream is read or refused."""
        return self.lives and self._is_connected and self._membership.is_complete

    def stop(self) -> None:
        """Tell the thread to stop, and interrupt a blocked read."""
        super().stop()
        self._queue.close()
        self._group.pipe.interrupt()

        with self.changed:
            self.changed.notify_all()

    # -- the reading thread ---------------------------------------------------------------

    def _finish(self) -> None:
        if self._membership.fatal is None:
            self._consumer.end_with_app()
            return

        # This Redis has no streams. The node still listens to its channels.
        with self.changed:
            self.changed.notify_all()

    def _disconnect(self) -> None:
        self._group.pipe.close()

    def _lose(self, error: Exception) -> None:
        with self.changed:
            self._is_connected = False
            # The answer may have been too large: the next read asks for fewer entries.
            self._batch_size.update(())
            self._membership.reset()

        if not self.is_stopping:
            self._consumer.on_lost(error)

    def _consume(self, backoff: Backoff) -> None:
        while self.goes_on:
            names = self._join()

            if not names or self._is_overloaded:
                self.pause(self._block)
            elif self._queue.wait_for_room(self._block):
                self._read(names)
            else:
                # Entries added now may be trimmed before they are read.
                self._trims.has_backlog = True

            backoff.tries = 0

    @property
    def _is_overloaded(self) -> bool:
        """Return True if too many outcomes wait to be written to Redis."""
        unwritten = self._in_flight.memory - self._queue.memory + self._acknowledger.memory
        return len(self._acknowledger) > MOST_UNWRITTEN or unwritten > MOST_BYTES

    def _read(self, names: dict[str, Subscription]) -> None:
        try:
            self._trims.check(names)
            self._take_back_released(names)
            # New entries of a stream wait until its released entries are claimed.
            names = {name: names[name] for name in names if name not in self._reclaimer.unfinished}

            if not names:
                return

            # COUNT applies to each stream.
            count = self._batch_size.count(
                room=self._queue.room,
                memory=max(self._in_flight.memory, self._queue.memory) + self._acknowledger.memory,
                streams=self._active_streams or len(names),
            )
            entries = self._group.read(list(names), count=count, block=self._block)
        except GroupGoneError as error:
            self._membership.leave_all(error)
            return
        except redis.ResponseError as error:
            self._find_refused(names, error)
            return

        self.last_heard = time.monotonic()
        self._active_streams = len({entry.name for entry in entries}) or None
        self._batch_size.update(map(Entry.size, entries))

        if entries:
            self._trims.has_backlog = len(entries) >= count
            self._take(entries, names)
        else:
            self._trims.has_backlog = False

    def _take_back_released(self, names: Mapping[str, Subscription]) -> None:
        released = self._maintenance.released_streams() | self._reclaimer.unfinished

        if released:
            self._reclaimer.reclaim_all_released(
                {name: names[name] for name in released if name in names}
            )

    def _take(self, entries: Sequence[Entry], names: dict[str, Subscription]) -> None:
        found = self._intake.decoder.decode(entries, names)
        deliveries = found.deliveries
        duplicates = set(self._duplicates.find(deliveries))

        if duplicates:
            self._counters.add("duplicates", len(duplicates))
            deliveries = [delivery for delivery in deliveries if delivery not in duplicates]

        self._counters.add("received", len(deliveries))
        self._intake.add(deliveries)
        self._maintenance.watch_in_flight()
        self._intake.end(
            found,
            [
                self._intake.outcomes.skipped(Entry(delivery.name, delivery.entry, None))
                for delivery in duplicates
            ],
        )

    # -- the groups -----------------------------------------------------------------------

    def _join(self) -> dict[str, Subscription]:
        names, is_new = self._membership.join()

        # A pattern that was refused before may be granted now, without a new stream.
        if is_new or not self._is_connected or (not self._was_ready and self.ready):
            self._note_joined()

        return names

    def _note_joined(self) -> None:
        with self.changed:
            self._is_connected = True
            self.changed.notify_all()

        self._was_ready = self.ready

        if self._was_ready:
            self._consumer.on_ready()

    def _find_refused(self, names: dict[str, Subscription], error: redis.ResponseError) -> None:
        """Read the streams one at a time, to find those that Redis refuses."""
        self._membership.end_without_streams(error)

        for name, subscription in names.items():
            try:
                entries = self._group.read([name], count=1, block=0)
            except GroupGoneError as gone:
                self._membership.leave_all(gone)
                return
            except redis.ResponseError as refusal:
                self._membership.refuse(name, subscription, refusal)
            else:
                self._take(entries, names)
