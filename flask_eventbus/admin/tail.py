"""Read live events for `tail`, without being a listener and without running receivers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import redis

from ..codec.codec import Codec
from ..config import TIMING, Timing
from ..errors import ConfigError
from ..event import Event
from ..text import plain, read_value
from ..transport.connection import OUTAGE
from ..transport.connections import Connections
from ..transport.reconnect import Backoff
from .tail_sources import ChannelTail, StreamTail, TailEvent

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


TailSource = ChannelTail | StreamTail


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
        self._connections = Connections(url, name=CLIENT_NAME, timing=timing)
        self._names = names
        self._notify = notify
        kinds = (ChannelTail,) if url.startswith("redis+cluster://") else (ChannelTail, StreamTail)
        self._sources: list[TailSource] = [
            kind(self._connections, prefix=prefix, codec=codec, names=names, output=self)
            for kind in kinds
        ]
        self._waiting: queue.Queue[Sequence[TailEvent] | str | Exception] = queue.Queue(MAX_WAITING)
        self._stopping = threading.Event()
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
        ends = None if seconds is None else time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._run, args=[source], daemon=True)
            for source in self._sources
        ]

        for thread in threads:
            thread.start()

        try:
            while (left := _left(ends)) > 0:
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
        self._stopping.set()

        for source in self._sources:
            source.wake()

        for thread in threads:
            thread.join(timeout=END)

    def _run(self, source: TailSource) -> None:
        backoff = Backoff(most=MAX_BACKOFF)

        while not self._stopping.is_set():
            try:
                source.listen(self._stopping, backoff)
            except redis.AuthenticationError as error:
                self.put(self._login_error(error))
                return
            except OUTAGE as error:
                self._lose(source, error)
            except Exception as error:
                # Raised again in the thread that iterates over events.
                self.put(error)
                return
            finally:
                source.close()

            self._stopping.wait(backoff.next())

    def put(self, item: Sequence[TailEvent] | str | Exception) -> None:
        """Queue events or a notice to show, or an error to raise; block while it is full."""
        while not self._stopping.is_set():
            with suppress(queue.Full):
                return self._waiting.put(item, timeout=TICK)

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
        for name in self._names:
            refused = [self._refusals.get((name, source.via)) for source in self._sources]

            if all(refused):
                raise ConfigError(" ".join(filter(None, refused)))

        for notice in self._refusals.values():
            if notice not in self._shown:
                self._shown.add(notice)
                self.put(notice)

    def _report_ready(self) -> None:
        if not self.connected:
            names = ", ".join(self._names)
            self.put(f"Listening to {names} on {self._connections.shown}. Press Ctrl-C to stop.")
        elif self._lost_since is not None:
            seconds = time.monotonic() - self._lost_since
            self.put(f"Redis is back after {seconds:.1f} s. {self._missed}")

        self.connected = True
        self._lost_since = None

    @property
    def _missed(self) -> str:
        if len(self._sources) == 1:
            return "Events sent in that time are missed."

        return "Channel events sent in that time are missed; streams continue where they stopped."

    def _lose(self, source: TailSource, error: Exception) -> None:
        with self._lock:
            self._ready.discard(source.via)
            self._refusals = {
                key: notice for key, notice in self._refusals.items() if key[1] != source.via
            }

            if self._lost_since is None and not self._stopping.is_set():
                self._lost_since = time.monotonic()
                self.put(
                    f"Redis at {self._connections.shown} is away: {str(error).rstrip('.')}. "
                    "Reconnecting until it is back."
                )

    def _login_error(self, error: Exception) -> ConfigError:
        refusal = ConfigError(
            f"Redis at {self._connections.shown} does not let this user in: {error}. "
            "Correct the user and the password in 'EVENTBUS_URL'."
        )
        refusal.__cause__ = error
        return refusal


def _holds(event: Event, key: str, text: str) -> bool:
    if key not in event.payload:
        return False

    value = event.payload[key]
    return bool(value == read_value(text)) or plain(value) == text


def _left(ends: float | None) -> float:
    return float("inf") if ends is None else ends - time.monotonic()
