"""Read channels and streams for `tail`, and report events and refusals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from ..channels.reader import ChannelReader, Frame
from ..codec.codec import Codec
from ..codec.records import EARLIEST, EntryId, before_moment, entry_id, id_text
from ..config import SIGNAL_NAME
from ..errors import DecodeError
from ..event import Event
from ..logs import get_logger
from ..routing.options import is_pattern, matches
from ..text import printable, reason_of
from ..transport.connection import milliseconds_of
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

if TYPE_CHECKING:
    from .tail import Tail

logger = get_logger(__name__)


#: Bytes to show of data that is not an event.
SHOWN_BYTES = 64


@dataclass(frozen=True, slots=True)
class TailEvent:
    """An event, and the id of its entry if it came over a stream."""

    event: Event
    entry: str | None = None


def read_event(codec: Codec, name: str, body: bytes, *, via: str) -> Event:
    """Decode an event.

    :raises DecodeError: ``body`` is not an event, or an event of another signal.
    """
    event = codec.decode(body, via=via)

    if event.name != name:
        raise DecodeError(f"The event is of signal {event.name!r}.", reason="wrong_channel")

    return event


def describe_invalid(where: str, body: bytes, error: DecodeError) -> str:
    """Return a notice about bytes that are not an event."""
    return f"Not an event {where} ({error.reason}): {error} It begins with {body[:SHOWN_BYTES]!r}."


class ChannelTail:
    """Listens to the channels of names and patterns."""

    via = "channel"

    def __init__(
        self,
        connections: Connections,
        *,
        prefix: str,
        codec: Codec,
        names: Sequence[str],
        output: Tail,
    ) -> None:
        self._reader = ChannelReader(connections)
        self._keys = ChannelKeys(prefix)
        self._codec = codec
        self._names = names
        self._output = output
        self._answered = 0

    def listen(self, stopping: threading.Event, backoff: Backoff) -> None:
        """Connect and listen until ``stopping`` is set.

        :raises redis.ConnectionError: the connection is lost, or cannot be made.
        """
        self._connect()

        while not stopping.is_set():
            if frames := self._reader.read():
                backoff.tries = 0
                self._take(frames)

    def wake(self) -> None:
        """End a wait for Redis soon; any thread may call it."""
        self._reader.wake()

    def close(self) -> None:
        """Close the connection; only the thread of :meth:`listen` may call it."""
        self._reader.close()

    def _connect(self) -> None:
        self._answered = 0
        self._reader.connect()

        for name in self._names:
            self._reader.subscribe([self._keys.key(name)], patterns=is_pattern(name))

    def _take(self, frames: Sequence[Frame]) -> None:
        events = [event for frame in frames for event in self._events(frame)]

        if events:
            self._output.put(events)

    def _events(self, frame: Frame) -> Iterator[TailEvent]:
        if frame.kind not in ("message", "pmessage"):
            self._note(frame)
            return

        name = self._keys.name(frame.channel)

        if self._keys.name(frame.subscribed) != self._first_match(name):
            return

        try:
            yield TailEvent(read_event(self._codec, name, frame.body, via=self.via))
        except DecodeError as error:
            self._output.put(describe_invalid(f"on the channel of {name!r}", frame.body, error))

    def _first_match(self, name: str) -> str | None:
        """Return the subscription that shows the event; Redis delivers it once for each match."""
        return next((pattern for pattern in self._names if matches(pattern, name)), None)

    def _note(self, frame: Frame) -> None:
        if frame.kind == "refused" and frame.subscribed != b"PING":
            self._refused(self._keys.name(frame.subscribed), frame.body.decode())
        elif frame.kind not in ("subscribe", "psubscribe"):
            return

        self._answered += 1

        if self._answered == len(self._names):
            self._output.ready(self.via)

    def _refused(self, name: str, reason: str) -> None:
        right = LISTEN_PATTERN if is_pattern(name) else LISTEN
        self._output.refused(
            self.via,
            name,
            f"The Redis user cannot listen to {name!r}: {reason.rstrip('.')}. "
            f"{grant_the_user({self._keys.key(name): right})} Or name only signals that it may "
            "listen to.",
        )


#: Seconds that a read blocks if there are no entries.
BLOCK = 1.0

#: Seconds that Redis has to answer a command.
TIMEOUT = 5.0

#: Most entries of one stream to read at once.
COUNT = 100

#: Seconds between two searches for streams that match a pattern.
SEARCH_INTERVAL = 1.0


class StreamTail:
    """Reads the streams of names and patterns, from their ends on.

    After a lost connection it continues after the last entry that it read.
    """

    via = "stream"

    def __init__(
        self,
        connections: Connections,
        *,
        prefix: str,
        codec: Codec,
        names: Sequence[str],
        output: Tail,
    ) -> None:
        self._pipe = Pipe(connections, timeout=TIMEOUT)
        self._retry_after = connections.timing.ask_stream_again_after
        self._keys = StreamKeys(prefix)
        self._codec = codec
        self._names = {name for name in names if not is_pattern(name)}
        self._patterns = [name for name in names if is_pattern(name)]
        self._output = output
        self._block = self._pipe.wait_at_most(BLOCK)
        #: Id of the last entry read from each stream, by name.
        self._positions: dict[str, EntryId] = {}
        #: Streams that Redis refuses now.
        self._refused: set[str] = set()
        #: Streams that Redis has refused at any time, and invalid names.
        self._was_refused: set[str] = set()
        #: Monotonic times of the last search, and of the next read of refused streams.
        self._searched = self._retry_at = float("-inf")
        #: Entry id before all entries added since the last search; ``None`` before the first.
        self._since: EntryId | None = None

    def listen(self, stopping: threading.Event, backoff: Backoff) -> None:
        """Connect and read until ``stopping`` is set.

        :raises redis.ConnectionError: the connection is lost, or cannot be made.
        """
        self._resume()
        self._search()
        self._output.ready(self.via)

        while not stopping.is_set():
            if self._positions:
                self._read()
            else:
                stopping.wait(self._block)

            backoff.tries = 0

            if time.monotonic() - self._searched >= SEARCH_INTERVAL:
                self._search()

    def wake(self) -> None:
        """End a wait for Redis now; any thread may call it."""
        self._pipe.interrupt()

    def close(self) -> None:
        """Close the connection; only the thread of :meth:`listen` may call it."""
        self._pipe.close()

    def _resume(self) -> None:
        """Continue after the last entries read, or at the ends of streams that were reset."""
        names = list(self._positions)

        for name, last in zip(names, self._ends(names), strict=True):
            if not isinstance(last, Exception):
                self._positions[name] = min(last, self._positions[name])

    def _search(self) -> None:
        """Search for new streams, and set the position at which each is read from."""
        self._searched = time.monotonic()

        if self._searched >= self._retry_at:
            self._refused.clear()

        since = self._since
        selected = self._names | self._discovered()
        new = sorted(selected - self._positions.keys() - self._refused)

        for name, end in zip(new, self._ends(new), strict=True):
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
        self._since = EARLIEST if is_refused else before_moment(milliseconds_of(clock))

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
            self._output.put(
                f"{self._keys.names!r} has a name that is not valid for a signal. Skipping it: "
                f"'{printable(name[:128])}'."
            )

        return False

    def _ends(self, names: Sequence[str]) -> list[EntryId | Exception]:
        """Return the id of the last entry of each stream, or the error of Redis."""
        commands: list[Command] = [
            ("XREVRANGE", self._keys.stream(name), "+", "-", "COUNT", 1) for name in names
        ]
        answers = self._pipe.run(commands, most=SAMPLE) if commands else []
        return [_end(answer) for answer in answers]

    def _read(self) -> None:
        names = list(self._positions)
        (answer,) = self._pipe.run([self._command(names, "BLOCK", int(self._block * 1000))])

        if isinstance(answer, Exception):
            self._read_singly(names)
        else:
            self._take(answer)

    def _read_singly(self, names: Sequence[str]) -> None:
        """Read each stream on its own, to find those that Redis refuses."""
        answers = self._pipe.run([self._command([name]) for name in names])

        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, Exception):
                self._refuse(name, answer)
            else:
                self._take(answer)

    def _command(self, names: Sequence[str], *wait: str | int) -> Command:
        keys = [self._keys.stream(name) for name in names]
        ids = [id_text(self._positions[name]) for name in names]
        return ("XREAD", "COUNT", COUNT, *wait, "STREAMS", *keys, *ids)

    def _take(self, answer: Any) -> None:
        for key, entries in answer or ():
            name = self._keys.name(key.decode())
            events = [
                event
                for id, fields in entries
                for event in self._events(name, id.decode(), dict(_pairs(fields)))
            ]
            self._positions[name] = entry_id(entries[-1][0])

            if events:
                self._output.put(events)

    def _events(self, name: str, id: str, fields: dict[bytes, bytes]) -> Iterator[TailEvent]:
        where = f"in the stream of {name!r}, entry {id}"
        body = fields.get(b"event")

        if body is None:
            self._output.put(
                f"Not an event {where} (missing_attribute): It has no field 'event'; "
                f"its fields are {short(list(fields))}."
            )
            return

        try:
            yield TailEvent(read_event(self._codec, name, body, via=self.via), id)
        except DecodeError as error:
            self._output.put(describe_invalid(where, body, error))

    def _refuse(self, name: str, reason: Exception) -> None:
        key = self._keys.stream(name)
        self._positions.pop(name, None)
        self._refused.add(name)
        self._was_refused.add(name)
        self._retry_at = self._searched + self._retry_after
        self._output.refused(
            self.via,
            name,
            f"The Redis user cannot read the stream of {name!r}: {reason_of(reason)}. "
            f"{remedy(reason, {key: READ}, grant_the_user)}",
        )

    def _refuse_patterns(self, reason: Exception) -> None:
        for pattern in self._patterns:
            self._output.refused(
                self.via,
                pattern,
                f"The Redis user cannot list the streams for {pattern!r}: "
                f"{reason_of(reason)}. {grant_the_user({self._keys.names: SEARCH})} Or name "
                "the signals.",
            )


def _end(answer: Any) -> EntryId | Exception:
    if isinstance(answer, Exception):
        return answer

    return entry_id(answer[0][0]) if answer else EARLIEST


def _pairs(flat: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)
