"""The supervised loop of a node that listens: it reads, and hands on what it reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import redis

from ..config import Config
from ..event import Event
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.workers import WorkerThreads
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import Subscription
from ..signals import emit, listener_connected, listener_lost
from ..transport.connections import OUTAGE
from ..transport.keys import ChannelKeys
from ..transport.reconnect import Backoff
from .decoder import MessageDecoder
from .reader import ChannelReader, Frame

logger = get_logger(__name__)


class ChannelSubscriptions:
    """Asks for a service's subscriptions, and notes what Redis answers.

    Any thread may ask; the one that reads notes.

    :param subscriptions: what to hear, by name; asked for whenever it may have changed.
    """

    def __init__(
        self,
        *,
        service: str,
        keys: ChannelKeys,
        reader: ChannelReader,
        subscriptions: Callable[[], Mapping[str, Subscription]],
    ) -> None:
        self._service = service
        self._keys = keys
        self._reader = reader
        self._subscriptions = subscriptions
        #: Guards what follows, and is notified whenever any of it changes.
        self.changed = threading.Condition()
        self._open = False
        self._asked: set[str] = set()
        self._answered: set[str] = set()
        self._confirmed: set[str] = set()
        #: Confirmed patterns, in the order of the subscriptions.
        self._patterns: tuple[Subscription, ...] = ()
        self._refused: dict[str, str] = {}

    @property
    def complete(self) -> bool:
        """Whether everything subscribed is confirmed."""
        return self._open and _holds(self._confirmed, self._subscriptions())

    @property
    def settled(self) -> bool:
        """Whether everything subscribed is confirmed or refused."""
        return self._open and _holds(self._answered, self._subscriptions())

    @property
    def names(self) -> list[str]:
        """What is subscribed, confirmed or not."""
        return sorted(self._subscriptions())

    @property
    def refused(self) -> dict[str, str]:
        """Subscriptions that Redis refuses, with its reasons."""
        return dict(self._refused)

    def open(self) -> None:
        """Begin with a new connection: ask for everything."""
        with self.changed:
            self._open = True

        self.ask()

    def close(self) -> None:
        """The connection is gone, and everything with it."""
        with self.changed:
            self._open = False
            self._asked.clear()
            self._answered.clear()
            self._confirmed.clear()
            self._patterns = ()
            self.changed.notify_all()

    def ask(self) -> None:
        """Ask for what was subscribed since; nothing without a connection.

        :raises redis.ConnectionError: the connection is lost.
        """
        with self.changed:
            if not self._open:
                return

            new = self._subscriptions().keys() - self._asked
            self._asked |= new
            self._request(sorted(new))

    def ask_again(self) -> None:
        """Ask once more for what was refused: an ACL may have changed.

        :raises redis.ConnectionError: the connection is lost.
        """
        with self.changed:
            self._asked -= self._refused.keys()

        self.ask()

    def refresh(self) -> None:
        """Ask for what was subscribed since, in any thread."""
        try:
            self.ask()
        except OUTAGE as error:
            # The reading thread meets the same loss and asks for everything anew.
            logger.debug("Subscribing waits for the next connection: %s", error)

    def note(self, frame: Frame) -> None:
        """Take up an answer of Redis."""
        if frame.kind not in ("subscribe", "psubscribe", "refused"):
            return

        name = self._keys.name(_as_bytes(frame.subscribed))

        with self.changed:
            if name not in self._asked:
                return

            if frame.kind == "refused":
                self._refuse(name, frame.body.decode(errors="replace"))
            else:
                self._confirm(name)

            self._answered.add(name)
            self.changed.notify_all()

    def subscription_of(self, frame: Frame, name: str) -> Subscription | None:
        """The subscription that handles the event ``name`` in a frame, if it is to be handled.

        Redis delivers once per subscription that fits. One of those it has confirmed is to
        count: that of the name itself, else the first pattern.
        """
        if frame.kind == "message":
            return self._subscriptions().get(name)

        if name in self._confirmed:
            return None

        pattern = next((found for found in self._patterns if matches(found.name, name)), None)
        is_its = pattern and pattern.name == self._keys.name(_as_bytes(frame.subscribed))
        return pattern if is_its else None

    def _request(self, names: Sequence[str]) -> None:
        plain = [self._keys.key(name) for name in names if not is_pattern(name)]
        patterns = [self._keys.key(name) for name in names if is_pattern(name)]
        self._reader.subscribe(plain, patterns=False)
        self._reader.subscribe(patterns, patterns=True)

    def _confirm(self, name: str) -> None:
        self._confirmed.add(name)
        was_refused = self._refused.pop(name, None)

        if was_refused is not None:
            logger.warning(
                "Redis lets %r listen to %r again.",
                self._service,
                name,
                extra={"signal": name, "service": self._service},
            )

        if is_pattern(name):
            self._patterns = tuple(
                found
                for found in self._subscriptions().values()
                if is_pattern(found.name) and found.name in self._confirmed
            )

    def _refuse(self, name: str, reason: str) -> None:
        if name in self._refused:
            return

        self._refused[name] = reason
        logger.error(
            "Redis refuses to let %r listen to %r: %s. This service does not hear it. Grant its "
            "user (+%s &%s) in the ACL.",
            self._service,
            name,
            reason,
            "psubscribe" if is_pattern(name) else "subscribe",
            self._keys.key(name),
            extra={"signal": name, "service": self._service},
        )


def _holds(names: set[str], subscriptions: Mapping[str, Subscription]) -> bool:
    return len(names) >= len(subscriptions) and subscriptions.keys() <= names


def _as_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


#: Seconds of silence after which the server is asked for a sign of life, and seconds it
#: has to answer: a peer that hangs is noticed after both.
QUIET = 5.0
DEADLINE = 5.0

#: Seconds between tries to connect, at most: whoever comes back late has missed events.
MOST_BACKOFF = 1.0


class Listener:
    """Reads what a service subscribed to, and connects again whenever that ends.

    :param hearing: the subscriptions of the reader's connection.
    :param intake: makes events of what is read.
    :param pool: where their receivers run.
    :param app_exists: returns False once the app is gone; the thread then stops.
    """

    def __init__(
        self,
        *,
        config: Config,
        reader: ChannelReader,
        keys: ChannelKeys,
        hearing: ChannelSubscriptions,
        decoder: MessageDecoder,
        pool: WorkerThreads,
        counters: Counters,
        node: str,
        app_exists: Callable[[], bool],
    ) -> None:
        self._config = config
        self._app_exists = app_exists
        self._reader = reader
        self._keys = keys
        self._hearing = hearing
        self._decoder = decoder
        self._pool = pool
        self._counters = counters
        self._node = node
        #: A connection that comes and goes is not to fill the log.
        self._log = BoundedLog(logger)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lost_since: float | None = None
        self._was_connected = False
        #: When bytes last came, by the monotonic clock.
        self.last_heard: float | None = None

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is the one that reads."""
        return threading.current_thread() is self._thread

    @property
    def connected(self) -> bool:
        """Whether everything subscribed is confirmed on a connection that answers."""
        lives = self._thread is not None and self._thread.is_alive()
        return lives and self._hearing.complete

    @property
    def refused(self) -> dict[str, str]:
        """Subscriptions that Redis refuses, with its reasons."""
        return self._hearing.refused

    def start(self) -> None:
        """Start the threads, once."""
        if self._thread is not None:
            return

        name = f"eventbus-listener-{self._node}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Subscribe to what was added meanwhile."""
        self._hearing.refresh()

    def ready(self, timeout: float | None) -> bool:
        """Wait until everything subscribed is confirmed; whether it was in time."""
        with self._hearing.changed:
            self._hearing.changed.wait_for(
                lambda: self.connected or self._stopping.is_set(), timeout
            )

        return self.connected

    def stop(self) -> None:
        """Let the thread stop reading. What was read waits in the pool."""
        if self._thread is None:
            return

        self._stopping.set()
        self._wake()

    def end(self, deadline: float) -> None:
        """Wait for the thread's end until the deadline; it may wait for a server that hangs."""
        if self._thread is not None:
            self._thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """In a forked child: end what came along of it, which for greenlets is everything."""
        self._stopping = threading.Event()
        self._stopping.set()
        # Nobody is to be told of the connection that is lost with this.
        self._lost_since = time.monotonic()

    def _wake(self) -> None:
        with self._hearing.changed:
            self._hearing.changed.notify_all()

        try:
            self._reader.ping()
        except OUTAGE as error:
            logger.debug("The reader wakes by itself: %s", error)

    # -- the reading thread ---------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(most=MOST_BACKOFF)

        while self._goes_on:
            try:
                self._listen(backoff)
            except OUTAGE as error:
                self._lost(error)
            except Exception as error:
                self._log.error("failed", "The listener failed; it connects anew.", exc_info=error)
                self._lost(error)
            finally:
                self._close()

            self._stopping.wait(backoff.next())

        self._pool.close()

    @property
    def _goes_on(self) -> bool:
        return not self._stopping.is_set() and self._app_exists()

    def _listen(self, backoff: Backoff) -> None:
        self._reader.connect()
        self._hearing.open()
        heard = asked_again = time.monotonic()
        asked: float | None = None

        while self._goes_on:
            frames = self._reader.read()
            now = time.monotonic()

            if frames:
                heard, asked = now, None
                self._accept(frames)
                backoff.reset()
            elif asked is None and now - heard >= QUIET:
                asked = now
                self._reader.ping()
                self._reader.check_role()
            elif asked is not None and now - asked >= DEADLINE:
                raise redis.TimeoutError(f"Redis did not answer a PING within {DEADLINE:g} s.")

            if self._hearing.refused and now - asked_again >= QUIET:
                asked_again = now
                self._hearing.ask_again()

    def _close(self) -> None:
        self._hearing.close()
        self._reader.close()

    def _lost(self, error: Exception) -> None:
        if self._lost_since is not None:
            return

        # A server that hung, or that was replaced unseen, said nothing since it was last heard.
        self._lost_since = time.monotonic() if self.last_heard is None else self.last_heard
        self._log.warning(
            "lost", "The listener lost Redis (%s); it connects again by itself.", error
        )
        emit(listener_lost, self._config.service, error=error)

    def _accept(self, frames: Sequence[Frame]) -> None:
        batch: list[tuple[Event, int]] = []
        self.last_heard = time.monotonic()

        try:
            for frame in frames:
                found = self._event(frame)

                if found is not None:
                    batch.append(found)
        finally:
            if batch:
                self._pool.put(batch)
                self._counters.add("received", len(batch))

    def _event(self, frame: Frame) -> tuple[Event, int] | None:
        """The event of a frame and its memory, if it is one that this service is to handle."""
        if frame.kind not in ("message", "pmessage"):
            self._note(frame)
            return None

        name = self._keys.name(frame.channel)
        subscription = self._hearing.subscription_of(frame, name)

        if subscription is None:
            return None

        return self._decoder.event(name, frame.body, subscription)

    def _note(self, frame: Frame) -> None:
        self._hearing.note(frame)

        if self._hearing.settled and (self._lost_since is not None or not self._was_connected):
            self._connected()

    def _connected(self) -> None:
        lost_since, self._lost_since = self._lost_since, None
        reconnected, self._was_connected = self._was_connected, True
        seconds = 0.0 if lost_since is None else time.monotonic() - lost_since

        if not reconnected:
            logger.info("Listening to %s.", ", ".join(self._hearing.names))

        if lost_since is not None:
            self._log.warning(
                "connected",
                "The listener is back after %.1f s; channel events of that time may be missed.",
                seconds,
            )

        emit(listener_connected, self._config.service, reconnected=reconnected, seconds=seconds)
