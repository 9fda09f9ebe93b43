"""Hears channels for `tail`: as a spectator, for no service."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import redis

from ..channels.reader import ChannelReader, Frame
from ..codec.codec import Codec
from ..errors import DecodeError
from ..logs import get_logger
from ..routing.options import is_pattern, matches
from ..transport.backoff import Backoff
from ..transport.connections import OUTAGE, Connections, is_passing
from ..transport.keys import ChannelKeys
from .tail_sources import Heard, Spectator, no_event, read_event

logger = get_logger(__name__)

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
