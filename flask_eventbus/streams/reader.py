"""The thread that reads new stream entries for the consumer groups of a service."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from typing import TYPE_CHECKING

import redis

from ..logs import get_logger
from ..receivers.workers import MAX_BYTES, BatchSize
from ..routing.subscriptions import Subscription
from ..transport.connections import Context
from ..transport.reconnect import ReadingThread
from .alarms import Trims
from .catalogue import Catalogue
from .decoder import Duplicates, Intake
from .group import Entry, Group, GroupGoneError, Pending, read_each
from .reclaim import Reclaimer
from .split import FEW, SplitRead

if TYPE_CHECKING:
    from .consumer import Consumer

logger = get_logger(__name__)

#: Seconds that a read blocks if there is no entry. Less than the five seconds after which an
#: answer counts as lost.
BLOCK = 1.0

#: Longest time in seconds that a read of silent streams blocks. Redis may be busy for the rest of
#: the five seconds.
BLOCK_SILENT = 3.0

#: Share of ``EVENTBUS_CLAIM_AFTER`` after which an entry counts as claimable: clocks differ.
CLAIMABLE = 0.9

#: Number of unacknowledged outcomes above which reading pauses, while Redis rejects them. Their
#: memory is limited as well, to that of the events read ahead.
MAX_UNWRITTEN = 1_000

#: Entries of several answers that are looked up among duplicates, and queued, together; and the
#: bytes after which no further answer is read.
TOGETHER = 256
TOGETHER_BYTES = 1024 * 1024

#: Seconds between two checks for trimmed entries while the last read left entries unread.
CHECK_BACKLOG_EVERY = 1.0


#: Number of entries that one step looks up.
COUNT = 64

#: Number of groups that one step joins. Their events are read before the next groups are joined.
JOINED_AT_ONCE = 64

#: Errors of a server without streams.
_UNKNOWN = tuple(
    f"unknown command {quote}{command}" for quote in "'`" for command in ("XREADGROUP", "XGROUP")
)


class StreamReader(ReadingThread):
    """Joins the group on each subscribed stream, and reads the streams.

    It creates missing groups. When it joins a group, it also takes the entries that Redis sent to
    this consumer in a lost answer, and the entries that other workers released.

    :param consumer: learns when the connection is lost, when every subscribed stream can be read,
        and when the thread ends without :meth:`stop`.
    """

    _failed = "The stream reader failed; it reconnects."

    def __init__(
        self,
        context: Context,
        *,
        consumer: Consumer,
        group: Group,
        many: tuple[Group, Group],
        intake: Intake,
        reclaimer: Reclaimer,
    ) -> None:
        super().__init__(context, "streams")
        self._service = context.config.service
        self._timing = context.timing
        self._consumer = consumer
        self._group = group
        self.catalogue = Catalogue(group.pipe, context, grouped=True)
        self._duplicates = Duplicates(group.pipe, context)
        self._trims = Trims(group, service=self._service, counters=self._counters)
        self._intake = intake
        self._in_flight = intake.in_flight
        self._queue = intake.queue
        self._acknowledger = intake.acknowledger
        self._reclaimer = reclaimer
        self._block = group.pipe.wait_at_most(BLOCK)
        claim_after = context.config.claim_after
        longest = group.pipe.wait_at_most(max(BLOCK, min(BLOCK_SILENT, claim_after / 4)))
        #: Seconds after the end of a read's wait after which another worker may have claimed its
        #: entries, because this process was suspended. Redis may have delivered them when the wait
        #: began, so this is negative if a wait is longer than the time until they are claimed.
        self._late = min(claim_after / 2, CLAIMABLE * claim_after - longest)
        self._split = SplitRead(*many, block=self._block, longest=longest)
        #: The streams read since the start of this round of the split read; empty between rounds.
        self._round: dict[str, Subscription] = {}
        #: The split read waits for several sockets, which a fakeredis server does not have.
        self._most_together = FEW if context.connections.has_descriptors else sys.maxsize
        #: The streams that are read, each with its subscription.
        self.joined: dict[str, Subscription] = {}
        #: The streams whose groups the next steps join.
        self._unjoined: dict[str, Subscription] = {}
        #: True if the last search found streams to join.
        self._has_news = False
        #: Streams with a group that this process does not read, because it has no receiver.
        self._unread: frozenset[str] = frozenset()
        #: Streams whose group this process has joined or created before. If the group is gone, a
        #: new one starts at the first entry.
        self.known: set[str] = set()
        #: The error of a server that has no streams; reading ends for good.
        self.fatal: Exception | None = None
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
        self._batch_size = BatchSize(max_bytes=context.config.max_event_bytes)

    @property
    def ready(self) -> bool:
        """Return True if Redis answers, and each subscribed stream is read or refused."""
        read = self.joined.keys() | self._unread
        return self.lives and self._is_connected and self.catalogue.is_complete(read)

    @property
    def alarms(self) -> dict[str, str]:
        """Alarms about streams whose events do not arrive, by stream or pattern."""
        return {**self.catalogue.alarms, **self._reclaimer.alarms, **self._trims.alarms}

    def stop(self) -> None:
        """Tell the thread to stop, and interrupt a blocked read."""
        super().stop()
        self._queue.close()
        self._group.pipe.interrupt()
        self._split.interrupt()

    def _finish(self) -> None:
        self._consumer.end_with_app()

    def _disconnect(self) -> None:
        self._group.pipe.close()
        self._split.close()
        self._round = {}

    def _lose(self, error: Exception) -> None:
        with self.changed:
            self._is_connected = False
            # The answer may have been too large: the next read asks for fewer entries.
            self._batch_size.update(())
            self.joined = {}
            self._unjoined = {}
            self._unread = frozenset()
            self.catalogue.due_at = self.catalogue.ask_again_at = 0.0

        if not self.is_stopping:
            self._consumer.on_lost(error)

        # This Redis has no streams. The node still listens to its channels.
        if self.fatal is not None:
            super().stop()

    def _step(self) -> None:
        if self._unjoined or time.monotonic() >= self.catalogue.due_at:
            self._join()

        # Join the other groups at once: do not wait for slow receivers or for an entry.
        if self._unjoined:
            return

        if not self.joined or self._is_overloaded():
            self.pause(self._block)
            self._finish_read()
        elif room := self._queue.wait_for_room(self._block):
            self._read(room)
        else:
            # Entries added now may be trimmed before they are read.
            self._has_backlog = True
            self._finish_read()

        self._backoff.tries = 0

    def _is_overloaded(self) -> bool:
        """Return True if too many outcomes wait to be written to Redis."""
        unwritten = self._in_flight.memory - self._queue.memory + self._acknowledger.memory
        return len(self._acknowledger) > MAX_UNWRITTEN or unwritten > MAX_BYTES

    def _read(self, room: int) -> None:
        streams = self.joined

        try:
            self._check_trims(streams)

            if self._reclaimer.unfinished:
                streams = self._take_back_released(streams)

            if self._round or len(streams) > self._most_together:
                self._round = self._round or self.joined
                self._take_split(self._split.read(streams, partial(self._count, room)))
                self._has_backlog = False
            elif streams:
                latest = time.monotonic() + self._block
                entries, refusals = self._read_together(list(streams), room)
                self._take_answer(entries, refusals, streams, latest=latest)
        except GroupGoneError as error:
            self._leave_all(error)

    def _read_together(
        self, names: Sequence[str], room: int
    ) -> tuple[list[Entry], dict[str, Exception]]:
        """Read streams. Read on while answers are full, so that small entries share what follows.

        The entries that arrived before a lost answer are pending, and so is that answer.

        :raises redis.ConnectionError: Redis is unreachable.
        :raises GroupGoneError: a stream or its group does not exist.
        """
        entries: list[Entry] = []
        refusals: dict[str, Exception] = {}
        block, size = self._block, 0
        self._has_backlog = True

        while self._has_backlog and not refusals:
            # COUNT applies to each stream.
            count = self._count(room - len(entries), self._active_streams or len(names))
            read = partial(self._group.read, count=count)
            answer, refusals = read_each(names, read, block=block)
            self._active_streams = len({entry.name for entry in answer}) or None
            self._has_backlog = len(answer) >= count
            sizes = list(map(Entry.size, answer))
            self._batch_size.update(sizes)
            entries += answer
            block, size = 0, size + sum(sizes)

            if len(entries) + len(answer) > min(room, TOGETHER) or size > TOGETHER_BYTES:
                break

        return entries, refusals

    def _check_trims(self, streams: Mapping[str, Subscription]) -> None:
        """Look for trimmed entries, more often in streams with unread ones."""
        now = time.monotonic()
        every = CHECK_BACKLOG_EVERY if self._has_backlog else self._timing.check_trimmed_every

        if now - self._trims.checked_at >= every:
            self._trims.check(streams)
        elif now - self._trims.checked_part_at >= CHECK_BACKLOG_EVERY:
            self._trims.check_part(name for name in self._split.unfinished if name in streams)

    def _count(self, room: int, streams: int) -> int:
        """Return the number of entries to read from each of so many streams."""
        memory = max(self._in_flight.memory, self._queue.memory) + self._acknowledger.memory
        return self._batch_size.count(room=room, memory=memory, streams=streams)

    def _finish_read(self) -> None:
        """Take the entries of the reads that Redis has answered, and send no other."""
        if not self._round:
            return

        try:
            self._take_split(self._split.finish())
        except GroupGoneError as error:
            self._leave_all(error)

    def _take_split(self, answer: tuple[list[Entry], dict[str, Exception]] | None) -> None:
        """Take an answer of the split read, if there is one."""
        if answer is None:
            return

        entries, refusals = answer
        self._batch_size.update(map(Entry.size, entries))
        # A read may name streams that are no longer read when it is answered.
        streams = self._round
        self._round = self._round if self._split.is_waiting else {}
        self._take_answer(entries, refusals, streams, latest=self._split.ends_at)

    def _take_answer(
        self,
        entries: Sequence[Entry],
        refusals: Mapping[str, Exception],
        streams: Mapping[str, Subscription],
        *,
        latest: float,
    ) -> None:
        """Take the entries of a read, and leave the streams that Redis refuses.

        :param latest: monotonic time at which the wait of the read ended at the latest.
        """
        # Another worker may have claimed them while this process was suspended.
        if time.monotonic() - latest > self._late:
            entries = self._claim_late(entries)

        self.last_heard = time.monotonic()

        if entries:
            self._take(entries, streams)

        for name, refusal in refusals.items():
            self._refuse(name, streams[name], refusal)

    def _claim_late(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries that are still this consumer's, after the process was suspended."""
        found: list[Entry] = []

        for name, group in groupby(entries, attrgetter("name")):
            read = list(group)

            # Under the lock, so that the maintenance thread does not claim them in between.
            with self._acknowledger.lock:
                own = {pending.id: pending for pending in self._group.own_pending(name)}
                missing = set(self._in_flight.missing(name, [entry.id for entry in read]))
                read = [entry for entry in read if entry.id in missing]
                # Without the list, nobody can claim them.
                is_listed = name not in self._group.unlisted
                found += self._claim_again(name, read, own) if is_listed else read

        return found

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
        found = self._intake.decoder.decode(entries, streams)
        duplicates = set(self._duplicates.find(found.deliveries))

        if duplicates:
            self._counters.add("duplicates", len(duplicates))
            found.deliveries = [each for each in found.deliveries if each not in duplicates]
            found.skipped += [Entry(each.name, each.entry, None) for each in duplicates]

        self._counters.add("received", len(found.deliveries))
        self._intake.take(found)
        # The maintenance thread then looks whether a receiver has started.
        self._acknowledger.schedule.within(self._timing.pause_reading_after)

    # -- the groups -----------------------------------------------------------------------

    def _join(self) -> None:
        """Join the groups of new streams, and tell the consumer once all are read or refused."""
        if not self._unjoined:
            self._find_unjoined()

        if self._unjoined:
            self._join_some()

        if self._unjoined:
            return

        # A pattern that was refused before may be granted now, without a new stream.
        is_news = self._has_news or not self._is_connected or (not self._was_ready and self.ready)

        # Always: a pattern without streams is ready once it was looked at; ready() waits for that.
        with self.changed:
            self._is_connected = True
            self.changed.notify_all()

        if is_news:
            self._was_ready = self.ready

            if self._was_ready:
                self._consumer.on_ready()

    def _find_unjoined(self) -> None:
        """Find the new streams to join, and stop reading those that are no longer subscribed."""
        subscribed = self.catalogue.names()
        without = self.catalogue.without_receiver
        self._unread &= without
        self._has_news = False

        # As in almost every search.
        if subscribed == self.joined and not without:
            return

        self.joined = {
            name: found
            for name, found in subscribed.items()
            if name in self.joined and name not in without
        }
        known = self.joined.keys() | self._unread

        if time.monotonic() <= self.catalogue.ask_again_at:
            known |= self.catalogue.refused.keys()

        # Joining takes the entries of lost answers, and those of a read that waits are not lost.
        known |= self._round.keys()
        self._unjoined = {name: found for name, found in subscribed.items() if name not in known}
        self._has_news = bool(self._unjoined)

    def _join_some(self) -> None:
        """Join the groups of some streams, and read these if more are left to join.

        The first events are handled before all groups are joined and all streams are read.
        """
        names = list(islice(self._unjoined, JOINED_AT_ONCE))
        joined = self._join_new({name: self._unjoined.pop(name) for name in names})
        # After the next read Redis no longer shows what was trimmed before it.
        self._trims.check_part(joined)
        self.joined = {**self.joined, **joined}

        if self._round:
            self._round = {**self._round, **joined}
            self._split.add(joined)

        room = self._queue.room
        streams = {name: joined[name] for name in joined if name not in self._reclaimer.unfinished}

        if not self._unjoined or not streams or room <= 0 or self._is_overloaded():
            return

        try:
            read = partial(self._group.read, count=self._count(room, len(streams)))
            latest = time.monotonic()
            entries, refusals = read_each(list(streams), read, block=0)
            self._batch_size.update(map(Entry.size, entries))
            self._take_answer(entries, refusals, streams, latest=latest)
        except GroupGoneError as error:
            self._leave_all(error)

    def _join_new(self, new: Mapping[str, Subscription]) -> dict[str, Subscription]:
        """Join the groups of streams, and return the streams that may be read."""
        # The position of a deleted group is lost, so the new one starts at the first entry.
        starts = {
            name: "0" if name in self.known else self.catalogue.start_of(name, found)
            for name, found in new.items()
        }
        refusals = self._group.join(starts)
        joined: dict[str, Subscription] = {}
        without = self.catalogue.without_receiver
        # Their groups exist, so that events wait until some process connects a receiver.
        self._unread |= without & refusals.keys()
        to_recover = self._group.to_recover([name for name in new if name not in without])

        for name, refusal in refusals.items():
            if name in without:
                # If the group is deleted before it is read, all entries of the stream are unread.
                if refusal is None:
                    self.known.add(name)
                    self.catalogue.grant(name)

                continue

            obstacle = self._recover(name, new[name]) if name in to_recover else None
            # If reading works, the group exists, and a refused XGROUP CREATE does not matter.
            refusal = obstacle and (refusal or obstacle)

            if refusal is None:
                joined[name] = new[name]
                self.known.add(name)
                self.catalogue.grant(name)
            elif isinstance(refusal, GroupGoneError):
                self.catalogue.due_at = 0.0
            else:
                self._refuse(name, new[name], refusal)

        return joined

    def _recover(self, name: str, subscription: Subscription) -> Exception | None:
        """Take this consumer's pending entries and the released ones; return a refusal."""
        try:
            self._group.try_to_read(name)
            self.known.add(name)

            # Under the lock, so that no entry is acknowledged or claimed in between.
            with self._acknowledger.lock:
                self._recover_pending(name, subscription)

            self._reclaimer.reclaim_all_released({name: subscription})
        except (GroupGoneError, redis.ResponseError) as refusal:
            return refusal

        return None

    def _recover_pending(self, name: str, subscription: Subscription) -> None:
        """Take the entries that Redis sent to this consumer in a lost answer."""
        own = {found.id: found for found in self._group.own_pending(name)}
        lost = self._in_flight.missing(name, own)

        for start in range(0, len(lost), COUNT):
            entries = self._group.look_up(name, lost[start : start + COUNT])
            entries = self._claim_again(name, entries, own)
            found = self._intake.decoder.decode(entries, {name: subscription})
            self._trims.report(name, sum(entry.fields is None for entry in entries))
            # These entries are handled in any case. Store them, so that a copy is a duplicate.
            self._duplicates.find(found.deliveries)
            self._counters.add("received", len(found.deliveries))
            self._intake.take(found)

    def _claim_again(
        self, name: str, entries: Sequence[Entry], own: Mapping[str, Pending]
    ) -> list[Entry]:
        """Return the entries that no other worker claims, after a time in which it could.

        :param own: the pending entries of this consumer, by their ids.
        """
        present = [own[each.id] for each in entries if each.fields is not None and each.id in own]
        kept = {found.id for found in present}

        with self._reclaimer.reporting(name):
            kept = self._group.claim_each(name, present)

        return [each for each in entries if each.fields is None or each.id in kept]

    def _leave_all(self, error: GroupGoneError) -> None:
        """Leave all groups after one was deleted; :meth:`_join` creates missing groups again."""
        text = (
            "A stream or the group of %r is gone (%s). A new group is created at the first entry "
            "of the stream. Redis was flushed, or restarted without its data, or the group was "
            "deleted."
        )
        logger.warning(text, self._service, error, extra={"service": self._service})
        self._counters.add("groups_lost")
        self._trims.reset()
        self._split.discard()
        self._round = {}

        for name in self.joined:
            if self._is_gone(name):
                self._duplicates.forget(name)

        self.joined = {}
        self._unjoined = {}
        self.catalogue.due_at = 0.0

    def _is_gone(self, name: str) -> bool:
        try:
            return self._group.position(name) is None
        except redis.ResponseError as error:
            logger.debug("Redis refuses to report the group of %r: %s", name, error)
            return True

    def _refuse(self, name: str, subscription: Subscription, reason: Exception) -> None:
        """Leave the group of a stream that Redis refuses, and log the refusal once.

        :raises redis.ConnectionError: this server has no streams; see :attr:`fatal`.
        """
        # redis-py removes "ERR" from the text. 'rename-command' may have removed other commands.
        if str(reason).startswith(_UNKNOWN):
            self.fatal = reason
            text = (
                "This Redis has no streams (%s), so %r cannot read any. Use Redis 6.2 or later, or "
                "Valkey."
            )
            logger.critical(text, reason, self._service)
            raise redis.ConnectionError(str(reason)) from reason

        self.joined = {known: self.joined[known] for known in self.joined if known != name}
        self.catalogue.due_at = 0.0
        advice = self._group.remedy(name, reason)

        if subscription.via == "stream":
            advice = f"This service gets no events from it. {advice}"
            self.catalogue.refuse(name, reason, advice)
        else:
            effect = "The service listens to the channel only."
            advice = f"{effect} {advice} Or subscribe with 'via': 'channel'."
            self.catalogue.refuse(name, reason, advice, level=logging.WARNING)
