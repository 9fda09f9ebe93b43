"""The thread that reads what the workers of a service share: their groups' streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import redis

from ..logs import Counters, get_logger
from ..receivers.delivery import InFlight
from ..receivers.workers import MOST_BYTES, DeliveryQueue, Portions
from ..routing.subscriptions import Subscription
from ..transport.reconnect import Backoff, Reading
from .acknowledger import Acknowledger
from .decoder import EntryDecoder
from .duplicates import Duplicates
from .group import Entry, Group, GroupGoneError
from .membership import Membership
from .outcomes import Outcomes
from .reclaim import Reclaimer, Trims

logger = get_logger(__name__)

#: Seconds that Redis holds a read back where there is nothing to read; less than the five after
#: which a server that hangs is given up.
BLOCK = 1.0

#: Events whose outcome Redis does not take, from which on no more are read; their memory has the
#: bound of what is read ahead.
MOST_UNSETTLED = 1_000


class StreamReader:
    """Reads streams in a thread of its own, and connects again whenever that ends.

    :param max_bytes: the size of the largest event.
    :param app_exists: returns False once the app is gone; the thread then stops.
    :param on_entries: told that there is something in hand.
    :param released_streams: the streams of which this process handed something back by itself.
    :param on_lost: told when Redis is lost, with the error.
    :param on_ready: told when every stream can be read.
    :param on_end: told when nothing is read any more, though nobody said to stop.
    """

    def __init__(
        self,
        *,
        membership: Membership,
        group: Group,
        duplicates: Duplicates,
        decoder: EntryDecoder,
        in_flight: InFlight,
        queue: DeliveryQueue,
        outcomes: Outcomes,
        acknowledger: Acknowledger,
        reclaimer: Reclaimer,
        trims: Trims,
        counters: Counters,
        max_bytes: int,
        node: str,
        app_exists: Callable[[], bool],
        on_entries: Callable[[], None],
        released_streams: Callable[[], set[str]],
        on_lost: Callable[[Exception], None],
        on_ready: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._membership = membership
        self._group = group
        self._duplicates = duplicates
        self._decoder = decoder
        self._in_flight = in_flight
        self._queue = queue
        self._outcomes = outcomes
        self._acknowledger = acknowledger
        self._reclaimer = reclaimer
        self._trims = trims
        self._counters = counters
        self._on_entries = on_entries
        self._released_streams = released_streams
        self._on_lost = on_lost
        self._on_ready = on_ready
        self._on_end = on_end
        self._reading = Reading(
            failed="The stream reader failed; it connects anew.",
            thread=f"eventbus-streams-{node}",
            read=self._consume,
            lost=self._lose,
            close=group.pipe.close,
            app_exists=lambda: app_exists() and membership.fatal is None,
            counters=counters,
            ended=self._conclude,
        )
        self._block = group.pipe.wait_at_most(BLOCK)
        #: Notified when it is known of more streams whether they can be read.
        self.changed = threading.Condition()
        #: Whether Redis is there, and was asked for what there is to be read.
        self._is_there = False
        #: Whether all of it could be read when that was last looked at.
        self._was_ready = False
        self.last_heard: float | None = None
        #: Of how many streams the last read got something; after a pause, all may have.
        self._busy: int | None = None
        self._portions = Portions(max_bytes=max_bytes)

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is the one that reads."""
        return self._reading.is_own_thread

    @property
    def ready(self) -> bool:
        """Whether Redis is there, and each stream subscribed is read or refused."""
        return self._reading.lives and self._is_there and self._membership.is_complete

    def start(self) -> None:
        """Start the thread, once."""
        self._reading.start()

    def stop(self) -> None:
        """Stop reading, now."""
        self._reading.stop()
        self._queue.close()
        self._group.pipe.interrupt()

        with self.changed:
            self.changed.notify_all()

    def end(self, deadline: float) -> None:
        """Wait for the thread's end until the deadline."""
        self._reading.end(deadline)

    def disown(self) -> None:
        """In a forked child: end what came along of it."""
        self._reading.disown()

    # -- the reading thread ---------------------------------------------------------------

    def _conclude(self) -> None:
        if self._membership.fatal is None:
            self._on_end()
            return

        # Channels are heard all the same.
        with self.changed:
            self.changed.notify_all()

    def _lose(self, error: Exception) -> None:
        with self.changed:
            self._is_there = False
            # The answer may have been too large.
            self._portions.note(())
            self._membership.lose()

        if not self._reading.is_stopping:
            self._on_lost(error)

    def _consume(self, backoff: Backoff) -> None:
        while self._reading.goes_on:
            names = self._join()

            if not names or self._has_unsettled:
                self._reading.pause(self._block)
            elif self._queue.wait_for_room(self._block):
                self._read(names)
            else:
                # What comes meanwhile may be trimmed before it is read.
                self._trims.has_backlog = True

            backoff.reset()

    @property
    def _has_unsettled(self) -> bool:
        """Return True if enough is in hand whose outcome Redis does not take."""
        unsettled = self._in_flight.memory - self._queue.memory + self._acknowledger.memory
        return len(self._acknowledger) > MOST_UNSETTLED or unsettled > MOST_BYTES

    def _read(self, names: dict[str, Subscription]) -> None:
        try:
            self._trims.check(names)
            self._take_back_released(names)
            # What is newer waits until there is room for what is older.
            names = {name: names[name] for name in names if name not in self._reclaimer.unfinished}

            if not names:
                return

            # Redis counts for each stream.
            count = self._portions.count(
                room=self._queue.room,
                memory=max(self._in_flight.memory, self._queue.memory) + self._acknowledger.memory,
                streams=self._busy or len(names),
            )
            entries = self._group.read(list(names), count=count, block=self._block)
        except GroupGoneError as error:
            self._membership.give_up(error)
            return
        except redis.ResponseError as error:
            self._sort_out(names, error)
            return

        self.last_heard = time.monotonic()
        self._busy = len({entry.name for entry in entries}) or None
        self._portions.note(map(Entry.size, entries))

        if entries:
            self._trims.has_backlog = len(entries) >= count
            self._take(entries, names)
        else:
            self._trims.has_backlog = False

    def _take_back_released(self, names: Mapping[str, Subscription]) -> None:
        released = self._released_streams() | self._reclaimer.unfinished

        if released:
            self._reclaimer.reclaim_all_released(
                {name: names[name] for name in released if name in names}
            )

    def _take(self, entries: Sequence[Entry], names: dict[str, Subscription]) -> None:
        found = self._decoder.decode(list(entries), names)
        fresh = found.deliveries
        known = set(self._duplicates.find(fresh))

        if known:
            self._counters.add("duplicates", len(known))
            fresh = [delivery for delivery in fresh if delivery not in known]

        self._counters.add("received", len(fresh))
        self._in_flight.add(fresh)
        self._on_entries()
        self._queue.put(fresh)

        outcomes = [self._outcomes.skipped(entry) for entry in found.skipped]
        outcomes += [
            self._outcomes.skipped(Entry(delivery.name, delivery.entry, None)) for delivery in known
        ]
        outcomes += [self._outcomes.rejected(entry, letter) for entry, letter in found.dead]

        if outcomes:
            self._acknowledger.write(outcomes)

    # -- its groups -----------------------------------------------------------------------

    def _join(self) -> dict[str, Subscription]:
        names, is_new = self._membership.join()

        # A pattern may be known now that was refused before.
        if is_new or not self._is_there or (not self._was_ready and self.ready):
            self._arrive()

        return names

    def _arrive(self) -> None:
        with self.changed:
            self._is_there = True
            self.changed.notify_all()

        self._was_ready = self.ready

        if self._was_ready:
            self._on_ready()

    def _sort_out(self, names: dict[str, Subscription], error: redis.ResponseError) -> None:
        """Find out which of the streams it is that Redis refuses to have read."""
        self._membership.end_without_streams(error)

        for name, subscription in names.items():
            try:
                entries = self._group.read([name], count=1, block=0)
            except GroupGoneError as gone:
                self._membership.give_up(gone)
                return
            except redis.ResponseError as refusal:
                self._membership.refuse(name, subscription, refusal)
            else:
                self._take(entries, names)
