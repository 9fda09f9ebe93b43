"""Hears live events as a spectator: no service's listener, and no receiver runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import redis

from .backoff import Backoff
from .channels import ChannelKeys, ChannelReader, Frame
from .codec import Codec
from .connections import OUTAGE, Connections, is_passing
from .errors import ConfigError, DecodeError
from .event import Event
from .rendering import plain, read_value
from .routes import is_pattern, matches

logger = logging.getLogger(__name__)

#: What ``CLIENT LIST`` shows: never one of a service's listeners.
CLIENT_NAME = "eventbus-tail"

#: Seconds of silence after which the server is asked for a sign of life, and seconds it has.
QUIET = 5.0
DEADLINE = 5.0

#: Seconds between tries to connect, at most.
MOST_BACKOFF = 2.0

#: Bytes that are shown of what is no event.
SAMPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which events are shown: those from one of the sources, with all of the values."""

    #: Services; none means all.
    sources: Sequence[str] = ()
    #: Keys of the payload and what they hold, as written on the command line.
    values: Sequence[tuple[str, str]] = ()

    def accepts(self, event: Event) -> bool:
        """Whether the event is to be shown."""
        if self.sources and event.source not in self.sources:
            return False

        return all(_holds(event, key, text) for key, text in self.values)


class Tail:
    """Listens to channels, whatever happens to Redis, in the thread that asks for events.

    :param names: signals and patterns.
    :param tell: takes sentences about what happens: connected, lost, bytes that are no event.
    """

    def __init__(
        self,
        *,
        url: str,
        prefix: str,
        codec: Codec,
        names: Sequence[str],
        tell: Callable[[str], None],
    ) -> None:
        self._connections = Connections(url, name=CLIENT_NAME)
        self._reader = ChannelReader(self._connections)
        self._keys = ChannelKeys(prefix)
        self._codec = codec
        self._names = names
        self._tell = tell
        self._confirmed = 0
        self._lost_since: float | None = None
        #: Whether everything was subscribed at least once.
        self.connected = False

    def events(self, seconds: float | None = None) -> Iterator[list[Event]]:
        """Yield what came, at least every other second, often nothing.

        :param seconds: after how many to end; for ever by default.
        :raises ConfigError: Redis refuses this user, or a channel to it.
        """
        ends = None if seconds is None else time.monotonic() + seconds
        alarm = threading.Timer(seconds or 0, self._wake)
        alarm.daemon = True

        if seconds is not None:
            alarm.start()

        try:
            yield from self._supervised(ends)
        finally:
            alarm.cancel()
            self._reader.close()

    def _supervised(self, ends: float | None) -> Iterator[list[Event]]:
        backoff = Backoff(most=MOST_BACKOFF)

        while (left := _left(ends)) > 0:
            try:
                yield from self._listen(ends, backoff)
            except redis.AuthenticationError as error:
                raise ConfigError(
                    f"Redis at {self._connections.shown} does not let this user in: {error}. "
                    "Correct the user and the password in 'EVENTBUS_URL'."
                ) from error
            except OUTAGE as error:
                self._lost(error)
                yield []
                time.sleep(min(backoff.next(), left))

    def _listen(self, ends: float | None, backoff: Backoff) -> Iterator[list[Event]]:
        self._connect()
        heard = time.monotonic()
        asked: float | None = None

        while _left(ends) > 0:
            frames = self._reader.read()
            now = time.monotonic()

            if frames:
                heard, asked = now, None
                backoff.reset()
            elif asked is None and now - heard >= QUIET:
                asked = now
                self._reader.ping()
            elif asked is not None and now - asked >= DEADLINE:
                raise redis.TimeoutError(f"no answer to a PING within {DEADLINE:g} s")

            yield [event for frame in frames if (event := self._event(frame))]

    def _connect(self) -> None:
        self._confirmed = 0
        self._reader.connect()

        for name in self._names:
            self._reader.subscribe([self._keys.key(name)], patterns=is_pattern(name))

    def _wake(self) -> None:
        try:
            self._reader.ping()
        except OUTAGE as error:
            logger.debug("The reader wakes by itself: %s", error)

    def _event(self, frame: Frame) -> Event | None:
        if frame.kind not in ("message", "pmessage"):
            self._note(frame)
            return None

        name = self._keys.name(frame.channel)

        if self._keys.name(_as_bytes(frame.subscribed)) != self._first_match(name):
            return None

        try:
            return self._decode(name, frame.body)
        except DecodeError as error:
            self._tell(
                f"Not an event on the channel of {name!r} ({error.reason}): {error} "
                f"It begins with {frame.body[:SAMPLE]!r}."
            )
            return None

    def _first_match(self, name: str) -> str | None:
        """The one of the names that counts: Redis delivers once for each that fits."""
        return next((pattern for pattern in self._names if matches(pattern, name)), None)

    def _decode(self, name: str, body: bytes) -> Event:
        event = self._codec.decode(body)

        if event.name != name:
            raise DecodeError(f"It says it is {event.name!r}.", reason="wrong_channel")

        return event

    def _note(self, frame: Frame) -> None:
        if frame.kind == "refused":
            self._refused(self._keys.name(_as_bytes(frame.subscribed)), frame.body.decode())
        elif frame.kind in ("subscribe", "psubscribe"):
            self._confirmed += 1

            if self._confirmed == len(self._names):
                self._connected()

    def _refused(self, name: str, reason: str) -> None:
        if is_passing(redis.ResponseError(reason)):
            raise redis.ConnectionError(reason)

        raise ConfigError(
            f"Redis refuses to let this user listen to {name!r}: {reason}. Grant it the channel "
            f"in the ACL, '&{self._keys.key(name)}', or name only signals that it may hear."
        )

    def _connected(self) -> None:
        if not self.connected:
            names = ", ".join(self._names)
            self._tell(f"Hearing {names} on {self._connections.shown}. Ctrl-C ends.")
        elif self._lost_since is not None:
            seconds = time.monotonic() - self._lost_since
            self._tell(f"Redis is back after {seconds:.1f} s; events of that time were not heard.")

        self.connected = True
        self._lost_since = None

    def _lost(self, error: Exception) -> None:
        if self._lost_since is not None:
            return

        self._lost_since = time.monotonic()
        self._tell(
            f"Redis at {self._connections.shown} is away: {str(error).rstrip('.')}. Trying again "
            "until it is back."
        )


def _holds(event: Event, key: str, text: str) -> bool:
    if key not in event.payload:
        return False

    value = event.payload[key]
    return bool(value == read_value(text)) or plain(value) == text


def _left(ends: float | None) -> float:
    return float("inf") if ends is None else ends - time.monotonic()


def _as_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key
