"""What is heard for `tail`, and what those who hear tell the one who shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Protocol

import redis

from ..channels.reader import ChannelReader, Frame
from ..codec.codec import Codec
from ..codec.entry_ids import EARLIEST, EntryId, before_moment, entry_id, id_text
from ..config import SIGNAL_NAME
from ..errors import DecodeError
from ..event import Event
from ..logs import get_logger
from ..routing.options import is_pattern, matches
from ..text import printable
from ..transport.connections import OUTAGE, Connections, is_passing
from ..transport.keys import ChannelKeys, StreamKeys
from ..transport.pipe import SAMPLE, Command, Pipe
from ..transport.reconnect import Backoff

logger = get_logger(__name__)


#: Bytes that are shown of what is no event.
SHOWN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Heard:
    """An event, and the id of its entry where it came over a stream."""

    event: Event
    entry: str | None = None


class Spectator(Protocol):
    """Takes what is heard over channels and over streams; any thread may call it."""

    def show(self, heard: Sequence[Heard]) -> None:
        """Events came."""

    def tell(self, sentence: str) -> None:
        """Something is to be said to the person who watches."""

    def found(self, way: str) -> None:
        """All that is wanted is heard over ``way`` from now on, or is refused."""

    def refuse(self, way: str, name: str, sentence: str) -> None:
        """Redis does not let this user hear ``name`` over ``way``."""


def read_event(codec: Codec, name: str, body: bytes, *, via: str) -> Event:
    """The event of which ``body`` is the bytes.

    :raises DecodeError: it is none, or it is one of another name.
    """
    event = codec.decode(body, via=via)

    if event.name != name:
        raise DecodeError(f"It says it is {event.name!r}.", reason="wrong_channel")

    return event


def no_event(where: str, body: bytes, error: DecodeError) -> str:
    """A sentence about bytes that are no event."""
    return f"Not an event {where} ({error.reason}): {error} It begins with {body[:SHOWN_BYTES]!r}."


#: Seconds of silence after which the server is asked for a sign of life, and seconds it has.
QUIET = 5.0
DEADLINE = 5.0


class ChannelTail:
    """Listens to the channels of names and patterns."""

    way = "channel"

    def __init__(
        self,
        connections: Connections,
        *,
        prefix: str,
        codec: Codec,
        names: Sequence[str],
        spectator: Spectator,
    ) -> None:
        self._reader = ChannelReader(connections)
        self._keys = ChannelKeys(prefix)
        self._codec = codec
        self._names = names
        self._spectator = spectator
        self._answered = 0

    def listen(self, stopping: threading.Event, backoff: Backoff) -> None:
        """Connect and hear until it is told to stop.

        :raises redis.ConnectionError: the connection is lost, or there is none.
        """
        self._connect()
        heard = time.monotonic()
        asked: float | None = None

        while not stopping.is_set():
            frames = self._reader.read()
            now = time.monotonic()

            if frames:
                heard, asked = now, None
                backoff.reset()
                self._take(frames)
            elif asked is None and now - heard >= QUIET:
                asked = now
                self._reader.ping()
            elif asked is not None and now - asked >= DEADLINE:
                raise redis.TimeoutError(f"no answer to a PING within {DEADLINE:g} s")

    def wake(self) -> None:
        """Let a wait for Redis end soon, in whatever thread."""
        try:
            self._reader.ping()
        except OUTAGE as error:
            logger.debug("The reader wakes by itself: %s", error)

    def close(self) -> None:
        """Close the connection. Only the thread that listens may."""
        self._reader.close()

    def _connect(self) -> None:
        self._answered = 0
        self._reader.connect()

        for name in self._names:
            self._reader.subscribe([self._keys.key(name)], patterns=is_pattern(name))

    def _take(self, frames: Sequence[Frame]) -> None:
        heard = [found for frame in frames for found in self._heard(frame)]

        if heard:
            self._spectator.show(heard)

    def _heard(self, frame: Frame) -> Iterator[Heard]:
        if frame.kind not in ("message", "pmessage"):
            self._note(frame)
            return

        name = self._keys.name(frame.channel)

        if self._keys.name(_as_bytes(frame.subscribed)) != self._first_match(name):
            return

        try:
            yield Heard(read_event(self._codec, name, frame.body, via=self.way))
        except DecodeError as error:
            self._spectator.tell(no_event(f"on the channel of {name!r}", frame.body, error))

    def _first_match(self, name: str) -> str | None:
        """The one of the names that counts: Redis delivers once for each that fits."""
        return next((pattern for pattern in self._names if matches(pattern, name)), None)

    def _note(self, frame: Frame) -> None:
        if frame.kind == "refused" and frame.subscribed != "PING":
            self._refused(self._keys.name(_as_bytes(frame.subscribed)), frame.body.decode())
        elif frame.kind not in ("subscribe", "psubscribe"):
            return

        self._answered += 1

        if self._answered == len(self._names):
            self._spectator.found(self.way)

    def _refused(self, name: str, reason: str) -> None:
        if is_passing(redis.ResponseError(reason)):
            raise redis.ConnectionError(reason)

        self._spectator.refuse(
            self.way,
            name,
            f"Redis refuses to let this user listen to {name!r}: {reason.rstrip('.')}. Grant it "
            f"the channel in the ACL, '&{self._keys.key(name)}', or name only signals that it may "
            "hear.",
        )


def _as_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


#: Seconds that Redis holds a read back where there is nothing to read.
BLOCK = 1.0

#: Seconds that Redis has to answer anything.
TIMEOUT = 5.0

#: Entries of one stream that are read at once.
COUNT = 100

#: Seconds between looks for streams that patterns stand for.
LOOK = 1.0

#: Seconds after which a stream that Redis refuses is asked for again.
ASK_AGAIN = 5.0


class StreamTail:
    """Reads the streams of names and patterns, from their ends on.

    After a lost connection it goes on where it was, as far as Redis still has it.
    """

    way = "stream"

    def __init__(
        self,
        connections: Connections,
        *,
        prefix: str,
        codec: Codec,
        names: Sequence[str],
        spectator: Spectator,
    ) -> None:
        self._pipe = Pipe(connections, timeout=TIMEOUT)
        self._keys = StreamKeys(prefix)
        self._codec = codec
        self._names = {name for name in names if not is_pattern(name)}
        self._patterns = [name for name in names if is_pattern(name)]
        self._spectator = spectator
        self._block = self._pipe.wait_at_most(BLOCK)
        #: The last entry that was read of each stream.
        self._positions: dict[str, EntryId] = {}
        #: The streams that Redis refuses now, and those that it refused at any time.
        self._refused: set[str] = set()
        self._was_refused: set[str] = set()
        self._looked = self._ask_again = float("-inf")
        #: Before all that was added since streams were last looked for, if that was ever.
        self._since: EntryId | None = None

    def listen(self, stopping: threading.Event, backoff: Backoff) -> None:
        """Connect and read until it is told to stop.

        :raises redis.ConnectionError: the connection is lost, or there is none.
        """
        self._resume()
        self._look()
        self._spectator.found(self.way)

        while not stopping.is_set():
            if self._positions:
                self._read()
            else:
                stopping.wait(self._block)

            backoff.reset()

            if time.monotonic() - self._looked >= LOOK:
                self._look()

    def wake(self) -> None:
        """Let a wait for Redis end now, in whatever thread."""
        self._pipe.interrupt()

    def close(self) -> None:
        """Close the connection. Only the thread that reads may."""
        self._pipe.close()

    # -- which streams, and from where ----------------------------------------------------

    def _resume(self) -> None:
        """Go on where it was; where Redis has forgotten that much, with what it adds now."""
        names = list(self._positions)

        for name, last in zip(names, self._ends(names), strict=True):
            if not isinstance(last, Exception):
                self._positions[name] = min(last, self._positions[name])

    def _look(self) -> None:
        self._looked = time.monotonic()

        if self._looked >= self._ask_again:
            self._refused.clear()

        since = self._since
        wanted = self._names | self._discovered()
        new = sorted(wanted - self._positions.keys() - self._refused)

        for name, end in zip(new, self._ends(new), strict=True):
            if isinstance(end, Exception):
                self._refuse(name, end)
            elif since is None or name in self._was_refused:
                self._positions[name] = end
            else:
                # It was not there at the last look: all that is younger is new.
                self._positions[name] = since

    def _discovered(self) -> set[str]:
        """The signals that have a stream and that a pattern stands for."""
        if not self._patterns:
            return set()

        clock, found = self._pipe.run([("TIME",), ("SMEMBERS", self._keys.names)])
        self._since = EARLIEST if isinstance(clock, Exception) else _before(clock)

        if isinstance(found, Exception):
            self._refuse_patterns(found)
            return set()

        names = {name.decode(errors="replace") for name in found}
        return {name for name in names if self._is_wanted(name)}

    def _is_wanted(self, name: str) -> bool:
        if not any(matches(pattern, name) for pattern in self._patterns):
            return False

        if SIGNAL_NAME.fullmatch(name):
            return True

        if name not in self._was_refused:
            self._was_refused.add(name)
            self._spectator.tell(
                f"{self._keys.names!r} has a name that no signal can have; it is left out: "
                f"'{printable(name[:128])}'."
            )

        return False

    def _ends(self, names: Sequence[str]) -> list[EntryId | Exception]:
        """The id of the last entry of each stream; or why Redis does not tell it."""
        commands: list[Command] = [
            ("XREVRANGE", self._keys.stream(name), "+", "-", "COUNT", 1) for name in names
        ]
        answers = self._pipe.run(commands, most=SAMPLE) if commands else []
        return [_end(answer) for answer in answers]

    # -- reading --------------------------------------------------------------------------

    def _read(self) -> None:
        names = list(self._positions)
        (answer,) = self._pipe.run([self._command(names, "BLOCK", int(self._block * 1000))])

        if isinstance(answer, Exception):
            self._sort_out(names)
        else:
            self._take(answer)

    def _sort_out(self, names: Sequence[str]) -> None:
        """Find out which of the streams it is that Redis refuses to have read."""
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
            heard = [
                found
                for id, fields in entries
                for found in self._heard(name, id.decode(), dict(_pairs(fields)))
            ]
            self._positions[name] = entry_id(entries[-1][0])

            if heard:
                self._spectator.show(heard)

    def _heard(self, name: str, id: str, fields: dict[bytes, bytes]) -> Iterator[Heard]:
        where = f"in the stream of {name!r}, entry {id}"
        body = fields.get(b"event")

        if body is None:
            self._spectator.tell(
                f"Not an event {where} (missing_attribute): It has no field 'event', but "
                f"{short(list(fields))}."
            )
            return

        try:
            yield Heard(read_event(self._codec, name, body, via=self.way), id)
        except DecodeError as error:
            self._spectator.tell(no_event(where, body, error))

    # -- what Redis refuses ---------------------------------------------------------------

    def _refuse(self, name: str, reason: Exception) -> None:
        key = self._keys.stream(name)
        self._positions.pop(name, None)
        self._refused.add(name)
        self._was_refused.add(name)
        self._ask_again = self._looked + ASK_AGAIN
        self._spectator.refuse(
            self.way,
            name,
            f"Redis refuses to let this user read the stream of {name!r}: {_said(reason)}. "
            f"{_remedy(reason, key)}",
        )

    def _refuse_patterns(self, reason: Exception) -> None:
        for pattern in self._patterns:
            self._spectator.refuse(
                self.way,
                pattern,
                f"Redis refuses to tell this user which streams {pattern!r} stands for: "
                f"{_said(reason)}. Grant it '+smembers ~{self._keys.names}' in the ACL, or name "
                "the signals.",
            )


def _end(answer: Any) -> EntryId | Exception:
    if isinstance(answer, Exception):
        return answer

    return entry_id(answer[0][0]) if answer else EARLIEST


def _before(clock: Sequence[bytes]) -> EntryId:
    """A place before all that is added from this time of the server on."""
    return before_moment(int(clock[0]) * 1000 + int(clock[1]) // 1000)


def _pairs(flat: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _said(reason: Exception) -> str:
    return printable(" ".join(str(reason).split()).rstrip("."))


def _remedy(reason: Exception, key: str) -> str:
    if isinstance(reason, redis.exceptions.NoPermissionError):
        return f"Grant it '+xread +xrevrange ~{key}' in the ACL."

    return f"See what {key!r} is: no stream of the bus, it seems."
