"""The thread that reads streams without a group, so that each process gets every event."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from ..codec.records import entry_id
from ..logs import BoundedLog, get_logger
from ..receivers.dispatcher import SECRET, Conflicts, Finding, compare
from ..receivers.workers import BatchSize, DeliveryQueue
from ..routing.subscriptions import NEW, Subscription
from ..transport.connections import Context
from ..transport.keys import FOLLOW, StreamKeys, remedy
from ..transport.pipe import SAMPLE, Command, Pipe
from ..transport.reconnect import ReadingThread
from .alarms import behind, far_ahead, last_id, passed, report_trimmed, report_trimmed_over
from .catalogue import Catalogue
from .decoder import EntryDecoder
from .group import Entry, entries_of, read_each

logger = get_logger(__name__)

#: Seconds that a read blocks if there is no entry.
BLOCK = 1.0

#: Number of entry ids remembered for each stream, to find those that a replaced master lost.
REMEMBERED = 10_000

#: Number of entries that one command returns in the search for the last common entry.
LOOK_BACK = 16


@dataclass(slots=True)
class _Place:
    """How far a stream was read."""

    #: Id of the last entry read, and those of the last entries.
    last: str
    ids: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    #: Number of entries ever added up to the last one read; ``None`` if the server does not count.
    passed: int | None = None
    #: False after the connection was lost: the present server may lack some of the entries.
    is_checked: bool = True


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
        #: How far each stream was read, and the streams to read.
        self._places: dict[str, _Place] = {}
        self._names: dict[str, Subscription] = {}
        self._connected = False
        self._looked = 0.0
        self._max_bytes = config.max_event_bytes
        self._batch_size = BatchSize(max_bytes=config.max_event_bytes)
        #: True if the next read must not keep values above the maximum event size.
        self._limits_size = True
        #: Alarms about damaged streams, by name.
        self._alarms: dict[str, str] = {}

    @property
    def ready(self) -> bool:
        """Return True if Redis answers, and each subscribed stream has a position or is refused."""
        return self.lives and self._connected and self.catalogue.is_complete(self._places.keys())

    @property
    def alarms(self) -> dict[str, str]:
        """Alarms about streams whose events do not arrive, by stream or pattern."""
        return {**self.catalogue.alarms, **self._alarms}

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
        self.catalogue.due_at = 0.0
        self._limits_size = True

        for place in self._places.values():
            place.is_checked = False

    def _step(self) -> None:
        if time.monotonic() >= self.catalogue.due_at:
            self._names = self._readable(self.catalogue.names())

            with self.changed:
                self._connected = True
                self.changed.notify_all()

        if not self._names:
            self.pause(self._block)
        elif self._queue.wait_for_room(self._block):
            if time.monotonic() - self._looked >= self._timing.check_flushed_every:
                self._looked = time.monotonic()

                for name in self._names:
                    self._check_stream(name, self._places[name])

            self._read()

        self._backoff.tries = 0

    def _readable(self, names: Mapping[str, Subscription]) -> dict[str, Subscription]:
        """Return the streams to read, after finding the position in each that is new."""
        skips_refused = time.monotonic() <= self.catalogue.ask_again_at
        readable: dict[str, Subscription] = {}

        for name, subscription in names.items():
            if skips_refused and name in self.catalogue.refused:
                continue

            try:
                if name not in self._places:
                    self._places[name] = self._start_of(name, subscription)
                elif not self._places[name].is_checked:
                    self._go_back(name, self._places[name])
            except redis.ResponseError as error:
                self._refuse(name, error)
                continue

            if name not in self.catalogue.without_receiver:
                readable[name] = subscription

        return readable

    def _start_of(self, name: str, subscription: Subscription) -> _Place:
        start = self.catalogue.start_of(name, subscription)

        if start != NEW:
            return _Place(start)

        # An id instead of "$", which would skip the entries added between two reads.
        info = self._info(name)
        last = last_id(info)

        if last is None:
            head: Command = ("XREVRANGE", self._keys.stream(name), "+", "-")
            found = self._pipe.ask(*head, "COUNT", 1, most=SAMPLE)
            return _Place(found[0][0].decode() if found else "0-0")

        # From this count on, entries that are trimmed before they are read are reported.
        return _Place(last, passed=0 if isinstance(info, Exception) else passed(info, last))

    def _info(self, name: str) -> Any:
        """Return the answer to ``XINFO STREAM``, or the error of Redis."""
        command: Command = ("XINFO", "STREAM", self._keys.stream(name))
        return self._pipe.run([command], most=SAMPLE)[0]

    def _go_back(self, name: str, place: _Place) -> None:
        """Move the position back to the last entry that was read and that this server has.

        A promoted replica may lack the last entries of the old master, and so may a server that
        restarted without the end of its log. Its next entries may then have smaller ids.
        """
        position, common = place.last, self._last_common(name, place)
        place.is_checked = True

        if common == position:
            return

        lost = 0

        while place.ids and behind(common, place.ids[-1]):
            place.ids.pop()
            lost += 1

        place.last, place.passed = common, None
        text = (
            "Redis has lost the last %d entries of the stream of %r that this process has read, up "
            "to %s: its master was replaced, or it restarted. %r continues after %s."
        )
        about = (lost, name, position, self._service, common)
        extra = {"signal": name, "service": self._service}
        self._log.warning(f"lost {name}", text, *about, extra=extra)

    def _last_common(self, name: str, place: _Place) -> str:
        if not place.ids:
            return place.last

        known, first = {*place.ids}, place.ids[0]
        end, count, has_unread = place.last, 1, False

        while found := self._pipe.ask(
            *("XREVRANGE", self._keys.stream(name), end, first, "COUNT", count), most=SAMPLE
        ):
            for id, _ in found:
                if id.decode() in known:
                    return str(id.decode())

            has_unread = True
            end, count = f"({found[-1][0].decode()}", LOOK_BACK

        return first if has_unread else place.last

    def _read(self) -> None:
        names = self._names
        count = self._batch_size.count(
            room=self._queue.room, memory=self._queue.memory, streams=len(names)
        )
        entries, refusals = read_after(
            self._pipe,
            self._keys,
            {name: self._places[name].last for name in names},
            count=count,
            block=self._block,
            # The last answer may have been lost because it was too large; this one is the same.
            most=self._max_bytes if self._limits_size else None,
        )
        self._limits_size = False

        for name, refusal in refusals.items():
            self._refuse(name, refusal)

        self._names = {name: names[name] for name in names if name not in refusals}

        for name in self.catalogue.refused.keys() & self._names.keys():
            self.catalogue.grant(name)

        self._take(entries, names)

    def _take(self, entries: list[Entry], names: Mapping[str, Subscription]) -> None:
        self._batch_size.update(map(Entry.size, entries))
        found = self._decoder.decode(entries, names)

        for delivery in found.deliveries:
            event, digest = delivery.event, hash(SECRET + delivery.body)
            most = self._timing.max_remembered

            if compare(self._known, event.id, digest, most) is Finding.CONFLICT:
                self._conflicts.report(event)

        self._counters.add("received", len(found.deliveries))
        self._queue.put(found.deliveries)

        for entry in entries:
            place = self._places[entry.name]
            place.last = entry.id
            place.ids.append(entry.id)

            if place.passed is not None:
                place.passed += 1

    def _check_stream(self, name: str, place: _Place) -> None:
        """Report damage, and start at the first entry if a stream was created again."""
        info = self._info(name)
        last = last_id(info)
        extra = {"signal": name, "service": self._service}

        if last is None:
            text = (
                "Redis refuses to tell %r the last id of the stream of %r: %s. If Redis loses its "
                "data, this process does not notice, and it gets no new events. %s"
            )
            advice = remedy(info, {self._keys.stream(name): "+xinfo|stream"})
            about = (self._service, name, info, advice)
            self._log.once(f"last id {name}", text, *about, extra=extra)
            return

        text = "Redis tells %r the last id of the stream of %r again."
        self._log.over(f"last id {name}", text, self._service, name, extra=extra)
        self._check_last(name, last)

        # The ids of a stream that was created again are smaller.
        if behind(last, place.last):
            self._places[name] = _Place("0-0")
        elif not isinstance(info, Exception):
            self._look_for_trims(name, place, passed(info, place.last))

    def _look_for_trims(self, name: str, place: _Place, count: int | None) -> None:
        """Report entries that were trimmed between the last one read and the next one."""
        if count is None:
            return

        lost = 0 if place.passed is None else count - place.passed
        place.passed = count

        if lost > 0:
            report_trimmed(name, lost, self._service, self._counters, self._log)
        else:
            report_trimmed_over(name, self._service, self._log)

    def _check_last(self, name: str, last: str) -> None:
        """Report a last id far in the future, after which no entry can be added."""
        alarm = far_ahead(name, entry_id(last), time.time())
        alarms = {other: self._alarms[other] for other in self._alarms if other != name}
        extra = {"signal": name, "service": self._service}

        if alarm is None:
            text = "The stream of %r is in order again."
            self._log.over(f"alarm {name}", text, name, extra=extra)
        else:
            self._log.once(f"alarm {name}", "%s", alarm, level=logging.ERROR, extra=extra)
            alarms[name] = str(alarm)

        self._alarms = alarms

    def _refuse(self, name: str, reason: Exception) -> None:
        advice = remedy(reason, {self._keys.stream(name): FOLLOW})
        self.catalogue.refuse(name, reason, advice)


def read_after(
    pipe: Pipe,
    keys: StreamKeys,
    positions: Mapping[str, str],
    *,
    count: int,
    block: float,
    most: int | None = None,
) -> tuple[list[Entry], dict[str, Exception]]:
    """Read streams without a group; also return the error of each that Redis refuses.

    :param positions: the id after which to read each stream, by its name.
    :param count: maximum number of entries of each stream.
    :param block: maximum time to wait for an entry, in seconds.
    :param most: see :meth:`.Pipe.run`.
    """

    def read(names: Sequence[str], *, block: float) -> list[Entry]:
        wait = ("BLOCK", int(block * 1000)) if block else ()
        ids = [positions[name] for name in names]
        command: Command = ("XREAD", "COUNT", count, *wait, "STREAMS", *map(keys.stream, names))
        return entries_of(pipe.ask(*command, *ids, most=most), keys.name)

    return read_each(list(positions), read, block=block)
