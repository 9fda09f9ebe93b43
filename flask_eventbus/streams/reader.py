"""The thread that reads new stream entries for the consumer groups of a service."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import redis

from ..logs import get_logger
from ..receivers.workers import MAX_BYTES, BatchSize
from ..routing.subscriptions import Subscription
from ..transport.connections import Context
from ..transport.reconnect import ReadingThread
from .decoder import Intake
from .group import Entry, GroupGoneError
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
MAX_UNWRITTEN = 1_000

#: Seconds between two checks for trimmed entries while the last read left entries unread.
CHECK_BACKLOG_EVERY = 1.0


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
    ) -> None:
        super().__init__(context, "streams")
        self._consumer = consumer
        self._membership = membership
        self._group = membership.group
        self._duplicates = membership.duplicates
        self._trims = membership.trims
        self._intake = intake
        self._decoder = intake.decoder
        self._in_flight = intake.in_flight
        self._queue = intake.queue
        self._acknowledger = intake.acknowledger
        self._reclaimer = reclaimer
        self._pause_after = context.timing.pause_reading_after
        self._block = self._group.pipe.wait_at_most(BLOCK)
        #: The streams to read.
        self._streams: dict[str, Subscription] = {}
        #: True while Redis answers, once the groups were joined.
        self._is_connected = False
        #: True if every subscribed stream could be read after the last join.
        self._was_ready = False
        #: Monotonic time of the last answer to a read.
        self.last_heard: float | None = None
        #: Number of streams with entries in the last answer; ``None`` after an empty one, because
        #: then the next answer may have entries of all streams.
        self._active_streams: int | None = None
        #: True if the last read left entries unread.
        self._has_backlog = False
        self._timing = context.timing
        self._batch_size = BatchSize(max_bytes=context.config.max_event_bytes)

    @property
    def ready(self) -> bool:
        """Return True if Redis answers, and each subscribed stream is read or refused."""
        return self.lives and self._is_connected and self._membership.is_complete

    def stop(self) -> None:
        """Tell the thread to stop, and interrupt a blocked read."""
        super().stop()
        self._queue.close()
        self._group.pipe.interrupt()

    # -- the reading thread ---------------------------------------------------------------

    def _finish(self) -> None:
        self._consumer.end_with_app()

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

        # This Redis has no streams. The node still listens to its channels.
        if self._membership.fatal is not None:
            super().stop()

    def _step(self) -> None:
        if time.monotonic() >= self._membership.catalogue.due_at:
            self._join()

        if not self._streams or self._is_overloaded():
            self.pause(self._block)
        elif room := self._queue.wait_for_room(self._block):
            self._read(self._streams, room)
        else:
            # Entries added now may be trimmed before they are read.
            self._has_backlog = True

        self._backoff.tries = 0

    def _join(self) -> None:
        """Join new groups, and tell the consumer once each subscribed stream is read or refused."""
        self._streams, is_new = self._membership.join()

        # A pattern that was refused before may be granted now, without a new stream.
        if is_new or not self._is_connected or (not self._was_ready and self.ready):
            with self.changed:
                self._is_connected = True
                self.changed.notify_all()

            self._was_ready = self.ready

            if self._was_ready:
                self._consumer.on_ready()

    def _is_overloaded(self) -> bool:
        """Return True if too many outcomes wait to be written to Redis."""
        unwritten = self._in_flight.memory - self._queue.memory + self._acknowledger.memory
        return len(self._acknowledger) > MAX_UNWRITTEN or unwritten > MAX_BYTES

    def _read(self, streams: dict[str, Subscription], room: int) -> None:
        try:
            checks_every = (
                CHECK_BACKLOG_EVERY if self._has_backlog else self._timing.check_trimmed_every
            )

            if time.monotonic() - self._trims.checked_at >= checks_every:
                self._trims.check(streams)

            if self._reclaimer.unfinished:
                streams = self._take_back_released(streams)

                if not streams:
                    return

            # COUNT applies to each stream.
            count = self._batch_size.count(
                room=room,
                memory=max(self._in_flight.memory, self._queue.memory) + self._acknowledger.memory,
                streams=self._active_streams or len(streams),
            )
            entries = self._group.read(list(streams), count=count, block=self._block)
        except GroupGoneError as error:
            self._membership.leave_all(error)
            return
        except redis.ResponseError as error:
            self._find_refused(streams, error)
            return

        self.last_heard = time.monotonic()
        self._active_streams = len({entry.name for entry in entries}) or None
        self._batch_size.update(map(Entry.size, entries))
        self._has_backlog = len(entries) >= count

        if entries:
            self._take(entries, streams)

    def _take_back_released(self, streams: dict[str, Subscription]) -> dict[str, Subscription]:
        """Claim released entries, and return the streams whose new entries may be read."""
        released = self._reclaimer.unfinished
        self._reclaimer.reclaim_all_released(
            {name: streams[name] for name in streams if name in released}
        )
        # New entries of a stream wait until its released entries are claimed.
        unfinished = self._reclaimer.unfinished
        return {name: streams[name] for name in streams if name not in unfinished}

    def _take(self, entries: Sequence[Entry], streams: Mapping[str, Subscription]) -> None:
        found = self._decoder.decode(entries, streams)
        duplicates = set(self._duplicates.find(found.deliveries))

        if duplicates:
            self._counters.add("duplicates", len(duplicates))
            found.deliveries = [each for each in found.deliveries if each not in duplicates]
            found.skipped += [Entry(each.name, each.entry, None) for each in duplicates]

        self._counters.add("received", len(found.deliveries))
        self._intake.add(found.deliveries)
        # The maintenance thread then looks whether a receiver has started.
        self._acknowledger.schedule.within(self._pause_after)
        self._intake.end(found)

    def _find_refused(self, streams: dict[str, Subscription], error: redis.ResponseError) -> None:
        """Read the streams one at a time, to find those that Redis refuses."""
        self._membership.end_without_streams(error)

        for name, subscription in streams.items():
            try:
                entries = self._group.read([name], count=1, block=0)
            except GroupGoneError as gone:
                self._membership.leave_all(gone)
                return
            except redis.ResponseError as refusal:
                self._membership.refuse(name, subscription, refusal)
            else:
                self._take(entries, streams)
