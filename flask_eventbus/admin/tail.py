"""Read live events for `tail`, without being a listener and without running receivers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import redis

from ..channels.reader import ChannelReader, Frame
from ..codec.codec import Codec, split_message
from ..codec.records import before_moment, id_text
from ..config import SIGNAL_NAME, TIMING, Timing
from ..errors import ConfigError, DecodeError
from ..event import Event
from ..routing.options import is_pattern, matches
from ..streams.alarms import behind
from ..streams.fanout import read_after
from ..streams.group import Entry
from ..text import plain, printable, read_value, reason_of
from ..transport.connection import OUTAGE, milliseconds_of
from ..transport.connections import Connections
from ..transport.keys import (
    LISTEN,
    LISTEN_PATTERN,
    READ,
    SEARCH,
    ChannelKeys,
    StreamKeys,
    grant_the_user,
    remedy,
)
from ..transport.pipe import SAMPLE, Command, Pipe
from ..transport.reconnect import Backoff

#: Name of the connections in ``CLIENT LIST``; they do not count as listeners.
CLIENT_NAME = "eventbus-tail"

#: Longest pause in seconds between tries to connect.
MAX_BACKOFF = 2.0

#: Seconds after which an empty batch is yielded if no event came.
TICK = 1.0

#: Batches of events that may wait to be shown; reading pauses when there are more.
MAX_WAITING = 16

#: Seconds to wait for the threads to end.
END = 1.0

#: Bytes to show of data that is not an event.
SHOWN_BYTES = 64

#: Seconds that a read of streams blocks if there are no entries.
BLOCK = 1.0

#: Seconds that Redis has to answer a command.
TIMEOUT = 5.0

#: Most entries of one stream to read at once.
COUNT = 100

#: Seconds between two searches for streams that match a pattern.
SEARCH_INTERVAL = 1.0

#: What is missed while Redis is away, without streams and with them.
MISSED = (
    "Events sent in that time are missed.",
    "Channel events sent in that time are missed; streams continue where they stopped.",
)


@dataclass(frozen=True, slots=True)
class TailEvent:
    """An event, and the id of its entry if it came over a stream."""

    event: Event
    entry: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Selects events from one of the sources and with all of the values."""

    #: Services; empty for all.
    sources: Sequence[str] = ()
    #: Keys of the payload and their values, as given on the command line.
    values: Sequence[tuple[str, str]] = ()

    def accepts(self, event: Event) -> bool:
        """Return True if the event is selected."""
        if self.sources and event.source not in self.sources:
            return False

        return all(_holds(event, key, text) for key, text in self.values)


class Tail:
    """Reads channels and streams, each in a thread of its own, and reconnects if Redis is lost.

    Notices are passed on in the thread that iterates over :meth:`events`.

    :param names: signals and patterns.
    :param notify: called with each notice: connected, lost, bytes that are not an event.
    """

    def __init__(
        self,
        *,
        url: str,
        prefix: str,
        codec: Codec,
        names: Sequence[str],
        notify: Callable[[str], None],
        timing: Timing = TIMING,
    ) -> None:
        self.connections = Connections(url, name=CLIENT_NAME, timing=timing)
        self.prefix = prefix
        self.names = names
        self._codec = codec
        self._notify = notify
        self._waiting: queue.Queue[Sequence[TailEvent] | str | Exception] = queue.Queue(MAX_WAITING)
        self.stopping = threading.Event()
        self._sources: list[ChannelSource | StreamSource] = [ChannelSource(self)]

        if not url.startswith("redis+cluster://"):
            self._sources.append(StreamSource(self))

        self._lock = threading.RLock()
        self._ready: set[str] = set()
        self._lost_since: float | None = None
        #: Refusals by name and transport, and those that were already shown.
        self._refusals: dict[tuple[str, str], str] = {}
        self._shown: set[str] = set()
        #: True once all transports have been connected.
        self.connected = False

    def events(self, seconds: float | None = None) -> Iterator[list[TailEvent]]:
        """Yield batches of events, an empty one after a second without events. Call it once.

        :param seconds: seconds after which to end; never by default.
        :raises ConfigError: Redis refuses this user, or a signal over every transport.
        """
        ends = float("inf") if seconds is None else time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._run, args=[source], daemon=True)
            for source in self._sources
        ]

        for thread in threads:
            thread.start()

        try:
            while (left := ends - time.monotonic()) > 0:
                yield self._next(min(TICK, left))
        finally:
            self._stop(threads)

    def _next(self, seconds: float) -> list[TailEvent]:
        try:
            found = self._waiting.get(timeout=seconds)
        except queue.Empty:
            return []

        if isinstance(found, Exception):
            raise found

        if isinstance(found, str):
            self._notify(found)
            return []

        return list(found)

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        self.stopping.set()

        for source in self._sources:
            source.wake()

        for thread in threads:
            thread.join(timeout=END)

    def _run(self, source: ChannelSource | StreamSource) -> None:
        backoff = Backoff(most=MAX_BACKOFF)

        while not self.stopping.is_set():
            try:
                source.listen(backoff)
            except redis.AuthenticationError as error:
                refusal = ConfigError(
                    f"Redis at {self.connections.shown} does not let this user in: {error}. "
                    "Correct the user and the password in 'EVENTBUS_URL'."
                )
                refusal.__cause__ = error
                self.put(refusal)
                return
            except OUTAGE as error:
                self._lose(source, error)
            except Exception as error:
                # Raised again in the thread that iterates over events.
                self.put(error)
                return
            finally:
                source.close()

            self.stopping.wait(backoff.next())

    def put(self, item: Sequence[TailEvent] | str | Exception) -> None:
        """Queue events or a notice to show, or an error to raise; block while it is full."""
        while not self.stopping.is_set():
            with suppress(queue.Full):
                return self._waiting.put(item, timeout=TICK)

    def decode(
        self, name: str, body: bytes, where: str, *, via: str, entry: str | None = None
    ) -> Iterator[TailEvent]:
        """Yield the event of a signal; show a notice if the bytes are none.

        :param where: where the bytes were found, for the notice.
        """
        try:
            event = self._codec.decode(body, via=via)

            if event.name != name:
                raise DecodeError(f"The event is of signal {event.name!r}.", reason="wrong_channel")
        except DecodeError as error:
            self.put(
                f"Not an event {where} ({error.reason}): {error} It begins with "
                f"{body[:SHOWN_BYTES]!r}."
            )
        else:
            yield TailEvent(event, entry)

    def ready(self, via: str) -> None:
        """Record that a transport is connected; show it once all are."""
        with self._lock:
            self._ready.add(via)

            if len(self._ready) == len(self._sources):
                self._report_refusals()
                self._report_ready()

    def refused(self, via: str, name: str, notice: str) -> None:
        """Record a refusal; raise it if every transport of the signal is refused."""
        with self._lock:
            self._refusals[name, via] = notice

            if len(self._ready) == len(self._sources):
                self._report_refusals()

    def _report_refusals(self) -> None:
        for name in self.names:
            refused = [self._refusals.get((name, source.via)) for source in self._sources]

            if all(refused):
                raise ConfigError(" ".join(filter(None, refused)))

        for notice in self._refusals.values():
            if notice not in self._shown:
                self._shown.add(notice)
                self.put(notice)

    def _report_ready(self) -> None:
        if not self.connected:
            names = ", ".join(self.names)
            self.put(f"Listening to {names} on {self.connections.shown}. Press Ctrl-C to stop.")
        elif self._lost_since is not None:
            seconds = time.monotonic() - self._lost_since
            self.put(f"Redis is back after {seconds:.1f} s. {MISSED[len(self._sources) > 1]}")

        self.connected = True
        self._lost_since = None

    def _lose(self, source: ChannelSource | StreamSource, error: Exception) -> None:
        with self._lock:
            self._ready.discard(source.via)
            self._refusals = {
                key: notice for key, notice in self._refusals.items() if key[1] != source.via
            }

            if self._lost_since is None and not self.stopping.is_set():
                self._lost_since = time.monotonic()
                self.put(
                    f"Redis at {self.connections.shown} is away: {str(error).rstrip('.')}. "
                    "Reconnecting until it is back."
                )


class ChannelSource:
    """Listens to the channels of names and patterns."""

    via = "channel"

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._reader = ChannelReader(tail.connections)
        self._keys = ChannelKeys(tail.prefix)
        self._answered = 0
        #: End a wait for Redis soon; any thread may call it.
        self.wake = self._reader.wake
        #: Close the connection; only the thread of :meth:`listen` may call it.
        self.close = self._reader.close

    def listen(self, backoff: Backoff) -> None:
        """Connect and listen until the tail stops.

        :raises redis.ConnectionError: the connection is lost, or cannot be made.
        """
        self._answered = 0
        self._reader.connect()

        for name in self._tail.names:
            self._reader.subscribe([self._keys.key(name)], patterns=is_pattern(name))

        while not self._tail.stopping.is_set():
            if frames := self._reader.read():
                backoff.tries = 0

                if events := [event for frame in frames for event in self._events(frame)]:
                    self._tail.put(events)

    def _events(self, frame: Frame) -> Iterable[TailEvent]:
        if frame.kind not in ("message", "pmessage"):
            self._note(frame)
            return ()

        name = self._keys.name(frame.channel)
        # Redis delivers an event once for each subscription that matches. The first one shows it.
        first = next((pattern for pattern in self._tail.names if matches(pattern, name)), None)

        if self._keys.name(frame.subscribed) != first:
            return ()

        where = f"on the channel of {name!r}"
        return [
            event
            for body in split_message(frame.body)
            for event in self._tail.decode(name, body, where, via=self.via)
        ]

    def _note(self, frame: Frame) -> None:
        if frame.kind == "refused" and frame.subscribed != b"PING":
            self._refused(self._keys.name(frame.subscribed), frame.body.decode())
        elif frame.kind not in ("subscribe", "psubscribe"):
            return

        self._answered += 1

        if self._answered == len(self._tail.names):
            self._tail.ready(self.via)

    def _refused(self, name: str, reason: str) -> None:
        right = LISTEN_PATTERN if is_pattern(name) else LISTEN
        self._tail.refused(
            self.via,
            name,
            f"The Redis user cannot listen to {name!r}: {reason.rstrip('.')}. "
            f"{grant_the_user({self._keys.key(name): right})} Or name only signals that it may "
            "listen to.",
        )


class StreamSource:
    """Reads the streams of names and patterns, from their ends on.

    After a lost connection it continues after the last entry that it read.
    """

    via = "stream"

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._pipe = Pipe(tail.connections, timeout=TIMEOUT)
        self._retry_after = tail.connections.timing.ask_stream_again_after
        self._keys = StreamKeys(tail.prefix)
        self._names = {name for name in tail.names if not is_pattern(name)}
        self._patterns = [name for name in tail.names if is_pattern(name)]
        self._block = self._pipe.wait_at_most(BLOCK)
        #: Id of the last entry read from each stream, by name.
        self._positions: dict[str, str] = {}
        #: Streams that Redis refuses now.
        self._refused: set[str] = set()
        #: Streams that Redis has refused at any time, and invalid names.
        self._was_refused: set[str] = set()
        #: Monotonic times of the last search, and of the next read of refused streams.
        self._searched = self._retry_at = float("-inf")
        #: Entry id before all entries added since the last search; ``None`` before the first.
        self._since: str | None = None
        #: End a wait for Redis now; any thread may call it.
        self.wake = self._pipe.interrupt
        #: Close the connection; only the thread of :meth:`listen` may call it.
        self.close = self._pipe.close

    def listen(self, backoff: Backoff) -> None:
        """Connect and read until the tail stops.

        :raises redis.ConnectionError: the connection is lost, or cannot be made.
        """
        # Streams that were reset continue at their ends, the others after the last entries read.
        for name, end in self._ends(list(self._positions)):
            if not isinstance(end, Exception) and behind(end, self._positions[name]):
                self._positions[name] = end

        self._search()
        self._tail.ready(self.via)

        while not self._tail.stopping.is_set():
            if self._positions:
                self._read()
            else:
                self._tail.stopping.wait(self._block)

            backoff.tries = 0

            if time.monotonic() - self._searched >= SEARCH_INTERVAL:
                self._search()

    def _search(self) -> None:
        """Search for new streams, and set the position at which each is read from."""
        self._searched = time.monotonic()

        if self._searched >= self._retry_at:
            self._refused.clear()

        since = self._since
        selected = self._names | self._discovered()

        for name, end in self._ends(sorted(selected - self._positions.keys() - self._refused)):
            if isinstance(end, Exception):
                self._refuse(name, end)
            elif since is None or name in self._was_refused:
                self._positions[name] = end
            else:
                # The stream was created after the last search: read all newer entries.
                self._positions[name] = since

    def _discovered(self) -> set[str]:
        """Return the names of existing streams that match a pattern."""
        if not self._patterns:
            return set()

        clock, found = self._pipe.run([("TIME",), ("SMEMBERS", self._keys.names)])
        is_refused = isinstance(clock, Exception)
        self._since = "0-0" if is_refused else id_text(before_moment(milliseconds_of(clock)))

        if isinstance(found, Exception):
            self._refuse_patterns(found)
            return set()

        names = {name.decode(errors="replace") for name in found}
        return {name for name in names if self._is_selected(name)}

    def _is_selected(self, name: str) -> bool:
        if not any(matches(pattern, name) for pattern in self._patterns):
            return False

        if SIGNAL_NAME.fullmatch(name):
            return True

        if name not in self._was_refused:
            self._was_refused.add(name)
            self._tail.put(
                f"{self._keys.names!r} has a name that is not valid for a signal. Skipping it: "
                f"'{printable(name[:128])}'."
            )

        return False

    def _ends(self, names: Sequence[str]) -> Iterable[tuple[str, str | Exception]]:
        """Return the id of the last entry of each stream, or the error of Redis."""
        commands: list[Command] = [
            ("XREVRANGE", self._keys.stream(name), "+", "-", "COUNT", 1) for name in names
        ]
        answers = self._pipe.run(commands, most=SAMPLE) if commands else []
        return zip(names, map(_end, answers), strict=True)

    def _read(self) -> None:
        entries, refusals = read_after(
            self._pipe, self._keys, self._positions, count=COUNT, block=self._block
        )
        events: list[TailEvent] = []

        for entry in entries:
            events += self._events(entry)
            self._positions[entry.name] = entry.id

        if events:
            self._tail.put(events)

        for name, refusal in refusals.items():
            self._refuse(name, refusal)

    def _events(self, entry: Entry) -> Iterable[TailEvent]:
        where = f"in the stream of {entry.name!r}, entry {entry.id}"
        fields = entry.by_name()

        if b"event" in fields:
            body = bytes(fields[b"event"])
            return self._tail.decode(entry.name, body, where, via=self.via, entry=entry.id)

        self._tail.put(
            f"Not an event {where} (missing_attribute): It has no field 'event'; "
            f"its fields are {short(list(fields))}."
        )
        return ()

    def _refuse(self, name: str, reason: Exception) -> None:
        key = self._keys.stream(name)
        self._positions.pop(name, None)
        self._refused.add(name)
        self._was_refused.add(name)
        self._retry_at = self._searched + self._retry_after
        self._tail.refused(
            self.via,
            name,
            f"The Redis user cannot read the stream of {name!r}: {reason_of(reason)}. "
            f"{remedy(reason, {key: READ}, grant_the_user)}",
        )

    def _refuse_patterns(self, reason: Exception) -> None:
        for pattern in self._patterns:
            self._tail.refused(
                self.via,
                pattern,
                f"The Redis user cannot list the streams for {pattern!r}: "
                f"{reason_of(reason)}. {grant_the_user({self._keys.names: SEARCH})} Or name "
                "the signals.",
            )


def _end(answer: Any) -> str | Exception:
    if isinstance(answer, Exception):
        return answer

    return str(answer[0][0].decode()) if answer else "0-0"


def _holds(event: Event, key: str, text: str) -> bool:
    if key not in event.payload:
        return False

    value = event.payload[key]
    return bool(value == read_value(text)) or plain(value) == text
