"""Subscribes to channels, and reads their messages in a thread that reconnects."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import redis

from ..event import Event
from ..logs import BoundedLog, get_logger
from ..receivers.workers import WorkerThreads
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import Subscription
from ..signals import emit, listener_connected, listener_lost
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from ..transport.keys import ChannelKeys
from ..transport.reconnect import Backoff
from ..transport.rights import LISTEN, LISTEN_PATTERN, grant_its_user
from .decoder import MessageDecoder
from .reader import ChannelReader, Frame

logger = get_logger(__name__)


class ChannelSubscriptions:
    """Subscribes one connection to the channels of a service, and records the answers of Redis.

    Any thread may subscribe. The reading thread calls :meth:`note` with the answers.

    :param subscriptions: returns the subscriptions of the service, by name or pattern.
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
        #: Guards the attributes below; notified when one of them changes.
        self.changed = threading.Condition()
        self._open = False
        self._asked: set[str] = set()
        self._answered: set[str] = set()
        self._confirmed: set[str] = set()
        #: Confirmed patterns, in the order of the subscriptions.
        self._patterns: tuple[Subscription, ...] = ()
        self._refused: dict[str, str] = {}

    @property
    def all_confirmed(self) -> bool:
        """True if Redis has confirmed every subscription."""
        return self._open and _holds(self._confirmed, self._subscriptions())

    @property
    def all_answered(self) -> bool:
        """True if Redis has confirmed or refused every subscription."""
        return self._open and _holds(self._answered, self._subscriptions())

    @property
    def names(self) -> list[str]:
        """The names and patterns to subscribe to, sorted."""
        return sorted(self._subscriptions())

    @property
    def refused(self) -> dict[str, str]:
        """Subscriptions that Redis refuses, with the errors."""
        return dict(self._refused)

    def open(self) -> None:
        """Subscribe to everything on a new connection.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self.changed:
            self._open = True

        self.ask()

    def close(self) -> None:
        """Forget all answers, after the connection was closed."""
        with self.changed:
            self._open = False
            self._asked.clear()
            self._answered.clear()
            self._confirmed.clear()
            self._patterns = ()
            self.changed.notify_all()

    def ask(self) -> None:
        """Subscribe to what was added; do nothing without a connection.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self.changed:
            if not self._open:
                return

            new = self._subscriptions().keys() - self._asked
            self._asked |= new
            self._request(sorted(new))

    def ask_again(self) -> None:
        """Subscribe again to what was refused, because the ACL may have changed.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self.changed:
            self._asked -= self._refused.keys()

        self.ask()

    def refresh(self) -> None:
        """Subscribe to what was added; ignore a lost connection."""
        try:
            self.ask()
        except OUTAGE as error:
            # The reading thread notices the loss too, and subscribes to everything again.
            logger.debug("Subscribing waits for the next connection: %s", error)

    def note(self, frame: Frame) -> None:
        """Record an answer of Redis."""
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
        """Return the subscription that handles the event ``name`` in a frame, or ``None``.

        Redis delivers a message once for each matching subscription. Only one of these copies is
        handled: that of the name itself, or else that of the first confirmed pattern.
        """
        if frame.kind == "message":
            return self._subscriptions().get(name)

        if name in self._confirmed:
            return None

        pattern = next((found for found in self._patterns if matches(found.name, name)), None)
        is_match = pattern and pattern.name == self._keys.name(_as_bytes(frame.subscribed))
        return pattern if is_match else None

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
            "Redis refuses to let %r listen to %r: %s. This service does not receive its events. "
            "%s",
            self._service,
            name,
            reason,
            grant_its_user({self._keys.key(name): LISTEN_PATTERN if is_pattern(name) else LISTEN}),
            extra={"signal": name, "service": self._service},
        )


def _holds(names: set[str], subscriptions: Mapping[str, Subscription]) -> bool:
    return len(names) >= len(subscriptions) and subscriptions.keys() <= names


def _as_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


class Listener:
    """Reads messages in its own thread, queues their events, and reconnects after an outage.

    :param subscriptions: the subscriptions of the reader's connection.
    :param decoder: decodes the messages.
    :param pool: the worker threads that run the receivers.
    """

    def __init__(
        self,
        context: Context,
        *,
        reader: ChannelReader,
        subscriptions: ChannelSubscriptions,
        decoder: MessageDecoder,
        pool: WorkerThreads,
    ) -> None:
        self._config = context.config
        self._counters = context.counters
        self._timing = context.timing
        self._node = context.node
        self._app_exists = context.app_exists
        self._keys = ChannelKeys(context.config.prefix)
        self._reader = reader
        self._subscriptions = subscriptions
        self._decoder = decoder
        self._pool = pool
        # Bounded, so that an unstable connection does not fill the log.
        self._log = BoundedLog(logger)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lost_since: float | None = None
        self._was_connected = False
        #: Monotonic time at which the last bytes arrived.
        self.last_heard: float | None = None

    @property
    def is_own_thread(self) -> bool:
        """Return True if the calling thread is the reading thread."""
        return threading.current_thread() is self._thread

    @property
    def connected(self) -> bool:
        """True if the thread runs, and Redis has confirmed every subscription."""
        lives = self._thread is not None and self._thread.is_alive()
        return lives and self._subscriptions.all_confirmed

    @property
    def refused(self) -> dict[str, str]:
        """Subscriptions that Redis refuses, with the errors."""
        return self._subscriptions.refused

    def start(self) -> None:
        """Start the thread unless it was started before."""
        if self._thread is not None:
            return

        name = f"eventbus-listener-{self._node}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Subscribe to what was added."""
        self._subscriptions.refresh()

    def ready(self, timeout: float | None) -> bool:
        """Wait until Redis has confirmed every subscription; return False if it has not.

        :param timeout: maximum time to wait in seconds; ``None`` to wait without limit.
        """
        with self._subscriptions.changed:
            self._subscriptions.changed.wait_for(
                lambda: self.connected or self._stopping.is_set(), timeout
            )

        return self.connected

    def stop(self) -> None:
        """Tell the thread to stop reading. Events that were read stay queued in the pool."""
        if self._thread is None:
            return

        self._stopping.set()
        self._wake()

    def end(self, deadline: float) -> None:
        """Wait until the thread has ended, or until the deadline.

        The thread may still run afterwards, for example while a server hangs.

        :param deadline: monotonic time.
        """
        if self._thread is not None:
            self._thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """Mark the thread as stopped; call it in a forked child.

        With greenlets, the thread itself is copied into the child.
        """
        self._stopping = threading.Event()
        self._stopping.set()
        # So that the child does not report the connection as lost.
        self._lost_since = time.monotonic()

    def _wake(self) -> None:
        with self._subscriptions.changed:
            self._subscriptions.changed.notify_all()

        try:
            self._reader.ping()
        except OUTAGE as error:
            logger.debug("Could not wake the reader with a PING: %s", error)

    # -- the reading thread ---------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(most=self._timing.max_listener_backoff)

        while self._goes_on:
            try:
                self._listen(backoff)
            except OUTAGE as error:
                self._lost(error)
            except Exception as error:
                self._log.error("failed", "The listener failed; it reconnects.", exc_info=error)
                self._lost(error)
            finally:
                self._close()

            self._stopping.wait(backoff.next())

        self._pool.close()

    @property
    def _goes_on(self) -> bool:
        return not self._stopping.is_set() and self._app_exists()

    def _listen(self, backoff: Backoff) -> None:
        ping_after, ping_timeout = self._timing.ping_after, self._timing.ping_timeout
        self._reader.connect()
        self._subscriptions.open()
        received = asked_again = time.monotonic()
        pinged: float | None = None

        while self._goes_on:
            frames = self._reader.read()
            now = time.monotonic()

            if frames:
                received, pinged = now, None
                self._accept(frames)
                backoff.tries = 0
            elif pinged is None and now - received >= ping_after:
                pinged = now
                self._reader.ping()
                self._reader.check_role()
            elif pinged is not None and now - pinged >= ping_timeout:
                raise redis.TimeoutError(f"Redis did not answer a PING within {ping_timeout:g} s.")

            if self._subscriptions.refused and now - asked_again >= ping_after:
                asked_again = now
                self._subscriptions.ask_again()

    def _close(self) -> None:
        self._subscriptions.close()
        self._reader.close()

    def _lost(self, error: Exception) -> None:
        if self._lost_since is not None:
            return

        # If the server hung or was replaced, events are missing since its last bytes.
        self._lost_since = time.monotonic() if self.last_heard is None else self.last_heard
        self._log.warning("lost", "The listener lost Redis (%s); it reconnects by itself.", error)
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
        """Return the event of a frame and its memory use in bytes.

        Return ``None`` if the frame has no event, or this service does not handle it.
        """
        if frame.kind not in ("message", "pmessage"):
            self._note(frame)
            return None

        name = self._keys.name(frame.channel)
        subscription = self._subscriptions.subscription_of(frame, name)

        if subscription is None:
            return None

        return self._decoder.event(name, frame.body, subscription)

    def _note(self, frame: Frame) -> None:
        self._subscriptions.note(frame)

        if self._subscriptions.all_answered and (
            self._lost_since is not None or not self._was_connected
        ):
            self._connected()

    def _connected(self) -> None:
        lost_since, self._lost_since = self._lost_since, None
        reconnected, self._was_connected = self._was_connected, True
        seconds = 0.0 if lost_since is None else time.monotonic() - lost_since

        if not reconnected:
            logger.info("Listening to %s.", ", ".join(self._subscriptions.names))

        if lost_since is not None:
            self._log.warning(
                "connected",
                "The listener is back after %.1f s. Channel events sent meanwhile may be missed.",
                seconds,
            )

        emit(listener_connected, self._config.service, reconnected=reconnected, seconds=seconds)
