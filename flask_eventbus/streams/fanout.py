"""The thread that reads streams without a group, so that each process gets every event."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import redis

from ..codec.records import entry_id
from ..logs import BoundedLog, get_logger
from ..receivers.dispatcher import SECRET, Conflicts, Finding, compare
from ..receivers.workers import BatchSize, DeliveryQueue
from ..routing.subscriptions import NEW, Subscription
from ..transport.connections import Context
from ..transport.keys import FOLLOW, remedy
from ..transport.pipe import SAMPLE, Command, Pipe
from ..transport.reconnect import ReadingThread
from .alarms import behind, far_ahead, last_id, passed, report_trimmed, report_trimmed_over
from .decoder import EntryDecoder
from .group import Entry, entries_of
from .membership import Catalogue

logger = get_logger(__name__)

#: Seconds that a read blocks if there is no entry.
BLOCK = 1.0

#: Number of entry ids remembered for each stream, to find those that a replaced master lost.
REMEMBERED = 10_000

#: Number of entries that one command returns in the search for the last common entry.
LOOK_BACK = 16


class Fanout(ReadingThread):
    """Reads streams with ``XREAD``, and keeps its position when the connection is lost.

    It acknowledges nothing: without a group, Redis keeps no pending entries.
    """

    _failed = "The fanout reader failed; it reconnects."

    def __init__(self, context: Context, *, decoder: EntryDecoder, queue: DeliveryQueue) -> None:
        super().__init__(context, "fanout")
        config = context.config
        self._timing = context.timing
        self._service = config.service
        self._pipe = pipe = Pipe(context.connections, timeout=self._timing.answer_timeout)
        self.catalogue = Catalogue(pipe, context, grouped=False)
        self._keys = context.keys
        self._decoder = decoder
        self._queue = queue
        self._log = BoundedLog(logger)
        self._conflicts = Conflicts(context)
        #: Hashes of the last events, by event id, to find conflicts.
        self._known: OrderedDict[str, int] = OrderedDict()
        self._block = pipe.wait_at_most(BLOCK)
        #: Id of the last entry read, by stream.
        self._positions: dict[str, str] = {}
        #: Ids of the last entries read, by stream.
        self._read_ids: dict[str, deque[str]] = defaultdict(partial(deque, maxlen=REMEMBERED))
        #: Number of entries ever added up to the position, for the streams whose server counts.
        self._passed: dict[str, int] = {}
        #: Streams that were read over an earlier connection. This server may lack some entries.
        self._unchecked: set[str] = set()
        self._connected = False
        self._looked = 0.0
        self._max_bytes = config.max_event_bytes
        self._batch_size = BatchSize(max_bytes=config.max_event_bytes)
        #: True if the next read must not keep values above the maximum event size.
        self._limits_size = True
        #: Streams that Redis refuses, with the errors.
        self.refused: dict[str, str] = {}
        #: Alarms about damaged streams, by name.
        self._alarms: dict[str, str] = {}
        self._ask_again = 0.0

    @property
    def ready(self) -> bool:
        """Return True if Redis answers, and each subscribed stream has a position or is refused."""
        subscribed = self.catalogue.subscribed
        return self.lives and self._connected and subscribed.keys() <= self._answered

    @property
    def alarms(self) -> dict[str, str]:
        """Alarms about streams whose events do not arrive, by stream or pattern."""
        return {**self.catalogue.alarms, **self._alarms}

    @property
    def _answered(self) -> set[str]:
        return self._positions.keys() | self.refused.keys() | self.catalogue.patterns

    def stop(self) -> None:
        """Tell the thread to stop, and interrupt a blocked read."""
        super().stop()
        self._pipe.interrupt()

    # -- the reading thread ---------------------------------------------------------------

    def _lose(self, error: Exception) -> None:
        logger.debug("The fanout reader waits for Redis: %s", error)

    def _disconnect(self) -> None:
        self._connected = False
        self._pipe.close()

    def _connect(self) -> None:
        self._unchecked = set(self._positions)
        self._limits_size = True

    def _step(self) -> None:
        names = self._allowed()
        self._find_positions(names)
        readable = self._positions.keys() - self.catalogue.without_receiver
        names = {name: names[name] for name in names if name in readable}

        if not names:
            self.pause(self._block)
        elif self._queue.wait_for_room(self._block):
            self._read(names)

        self._backoff.tries = 0

    def _allowed(self) -> dict[str, Subscription]:
        names = self.catalogue.names()

        if self.refused and time.monotonic() > self._ask_again:
            self._ask_again = time.monotonic() + self._timing.ask_stream_again_after
            return names

        return {name: names[name] for name in names if name not in self.refused}

    def _find_positions(self, names: dict[str, Subscription]) -> None:
        for name, subscription in names.items():
            try:
                if name not in self._positions:
                    self._positions[name] = self._start_of(name, subscription)
                elif name in self._unchecked:
                    self._go_back(name)
            except redis.ResponseError as error:
                self._refuse(name, error)

        with self.changed:
            self._connected = True
            self.changed.notify_all()

    def _start_of(self, name: str, subscription: Subscription) -> str:
        start = self.catalogue.start_of(name, subscription)
        # An id instead of "$", which would skip the entries added between two reads.
        return self._last(name) if start == NEW else start

    def _last(self, name: str) -> str:
        command: Command = ("XINFO", "STREAM", self._keys.stream(name))
        info = self._pipe.run([command], most=SAMPLE)[0]
        last = last_id(info)

        if last is None:
            head: Command = ("XREVRANGE", self._keys.stream(name), "+", "-")
            found = self._pipe.ask(*head, "COUNT", 1, most=SAMPLE)
            return str(found[0][0].decode()) if found else "0-0"

        # From this count on, entries that are trimmed before they are read are reported.
        count = 0 if isinstance(info, Exception) else passed(info, last)

        if count is not None:
            self._passed[name] = count

        return last

    def _go_back(self, name: str) -> None:
        """Move the position back to the last entry that was read and that this server has.

        A promoted replica may lack the last entries of the old master, and so may a server that
        restarted without the end of its log. Its next entries may then have smaller ids.
        """
        position, common = self._positions[name], self._last_common(name)
        self._unchecked.discard(name)

        if common == position:
            return

        read = self._read_ids[name]
        lost = 0

        while read and entry_id(read[-1]) > entry_id(common):
            read.pop()
            lost += 1

        self._positions[name] = common
        self._passed.pop(name, None)
        self._log.warning(
            f"lost {name}",
            "Redis has lost the last %d entries of the stream of %r that this process has read, up "
            "to %s: its master was replaced, or it restarted. %r continues after %s.",
            lost,
            name,
            position,
            self._service,
            common,
            extra={"signal": name, "service": self._service},
        )

    def _last_common(self, name: str) -> str:
        position, read = self._positions[name], self._read_ids[name]

        if not read:
            return position

        known = {*read}
        end, count, has_unread = position, 1, False

        while found := self._pipe.ask(
            *("XREVRANGE", self._keys.stream(name), end, read[0], "COUNT", count), most=SAMPLE
        ):
            for id, _ in found:
                if id.decode() in known:
                    return str(id.decode())

            has_unread = True
            end, count = f"({found[-1][0].decode()}", LOOK_BACK

        return read[0] if has_unread else position

    def _read(self, names: dict[str, Subscription]) -> None:
        self._look_for_flush(names)

        try:
            self._take(self._entries(names, self._block), names)
        except redis.ResponseError as error:
            logger.debug("Redis refuses to read one of the streams: %s", error)
            self._find_refused(names)

    def _find_refused(self, names: dict[str, Subscription]) -> None:
        """Read the streams one at a time, to find those that Redis refuses."""
        for name, subscription in names.items():
            try:
                self._take(self._entries([name], 0), {name: subscription})
            except redis.ResponseError as error:
                self._refuse(name, error)

    def _entries(self, names: Collection[str], block: float) -> list[Entry]:
        count = self._batch_size.count(
            room=self._queue.room, memory=self._queue.memory, streams=len(names)
        )
        keys = [self._keys.stream(name) for name in names]
        ids = [self._positions[name] for name in names]
        wait = ("BLOCK", int(block * 1000)) if block else ()
        # The last answer may have been lost because it was too large; this one is the same.
        most = self._max_bytes if self._limits_size else None
        answer = self._pipe.ask("XREAD", "COUNT", count, *wait, "STREAMS", *keys, *ids, most=most)
        self._limits_size = False
        return entries_of(answer, self._keys)

    def _take(self, entries: list[Entry], names: dict[str, Subscription]) -> None:
        if self.refused:
            granted = self.refused.keys() & names
            self.refused = {name: self.refused[name] for name in self.refused.keys() - names}

            for name in granted:
                self._log.over(
                    f"refused {name}",
                    "Redis lets %r read the stream of %r again.",
                    self._service,
                    name,
                    extra={"signal": name, "service": self._service},
                )

        self._batch_size.update(map(Entry.size, entries))
        found = self._decoder.decode(entries, names)

        for delivery in found.deliveries:
            event, digest = delivery.event, hash(SECRET + delivery.body)

            if (
                compare(self._known, event.id, digest, self._timing.max_remembered)
                is Finding.CONFLICT
            ):
                self._conflicts.report(event)

        self._counters.add("received", len(found.deliveries))
        self._queue.put(found.deliveries)

        for entry in entries:
            self._positions[entry.name] = entry.id
            self._read_ids[entry.name].append(entry.id)

            if entry.name in self._passed:
                self._passed[entry.name] += 1

    def _look_for_flush(self, names: Iterable[str]) -> None:
        """Start at the first entry if a stream was created again, with smaller ids."""
        if time.monotonic() - self._looked < self._timing.check_flushed_every:
            return

        self._looked = time.monotonic()

        for name in names:
            command: Command = ("XINFO", "STREAM", self._keys.stream(name))
            info = self._pipe.run([command], most=SAMPLE)[0]
            last = self._last_of(name, info)

            if last is None:
                continue

            self._check_last(name, last)

            if behind(last, self._positions[name]):
                self._positions[name] = "0-0"
                self._read_ids[name].clear()
                self._passed.pop(name, None)
            elif not isinstance(info, Exception):
                self._look_for_trims(name, passed(info, self._positions[name]))

    def _look_for_trims(self, name: str, count: int | None) -> None:
        """Report entries that were trimmed between the last one read and the next one."""
        if count is None:
            return

        lost = count - self._passed.get(name, count)
        self._passed[name] = count

        if lost > 0:
            report_trimmed(name, lost, self._service, self._counters, self._log)
        else:
            report_trimmed_over(name, self._service, self._log)

    def _last_of(self, name: str, answer: Any) -> str | None:
        """Return the last generated id of a stream; ``None`` if Redis refuses to report it."""
        key = self._keys.stream(name)
        last = last_id(answer)
        extra = {"signal": name, "service": self._service}

        if last is None:
            self._log.once(
                f"last id {name}",
                "Redis refuses to tell %r the last id of the stream of %r: %s. If Redis loses its "
                "data, this process does not notice, and it gets no new events. %s",
                self._service,
                name,
                answer,
                remedy(answer, {key: "+xinfo|stream"}),
                extra=extra,
            )
        else:
            text = "Redis tells %r the last id of the stream of %r again."
            self._log.over(f"last id {name}", text, self._service, name, extra=extra)

        return last

    def _check_last(self, name: str, last: str) -> None:
        """Report a last id far in the future, after which no entry can be added."""
        alarm = far_ahead(name, entry_id(last), time.time())
        extra = {"signal": name, "service": self._service}
        others = {other: self._alarms[other] for other in self._alarms if other != name}

        if alarm is None:
            self._alarms = others
            self._log.over(
                f"alarm {name}", "The stream of %r is in order again.", name, extra=extra
            )
            return

        if name not in self._alarms:
            self._log.error(f"alarm {name}", "%s", alarm, extra=extra)

        self._alarms = {**others, name: str(alarm)}

    def _refuse(self, name: str, reason: Exception) -> None:
        self._ask_again = time.monotonic() + self._timing.ask_stream_again_after

        if self.refused.get(name) == str(reason):
            return

        self.refused = {**self.refused, name: str(reason)}
        self._log.error(
            f"refused {name}",
            "Redis refuses to let %r read the stream of %r: %s. %s",
            self._service,
            name,
            reason,
            remedy(reason, {self._keys.stream(name): FOLLOW}),
            extra={"signal": name, "service": self._service},
        )
