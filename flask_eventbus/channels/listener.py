"""Subscribes to channels, and reads their messages in a thread that reconnects."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from threading import Condition

from ..event import Event
from ..logs import BoundedLog, get_logger
from ..receivers.workers import WorkerThreads
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import Subscription
from ..signals import emit, listener_connected, listener_lost
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from ..transport.keys import ChannelKeys
from ..transport.reconnect import ReadingThread
from ..transport.rights import LISTEN, LISTEN_PATTERN, grant_its_user
from .decoder import MessageDecoder
from .reader import ChannelReader, Frame

logger = get_logger(__name__)


class ChannelSubscriptions:
    """Subscribes one connection to the channels of a service, and records the answers of Redis.

    Any thread may subscribe. The reading thread calls :meth:`note` with the answers.

    :param changed: guards the attributes; notified when one of them changes.
    """

    def __init__(
        self, reader: ChannelReader, *, service: str, keys: ChannelKeys, changed: Condition
    ) -> None:
        self._reader = reader
        self._service = service
        self._keys = keys
        self._changed = changed
        #: The subscriptions of the service, by name or pattern.
        self.wanted: Mapping[str, Subscription] = {}
        #: The signals among them that were asked for, by channel.
        self.names: dict[bytes, str] = {}
        #: Subscriptions that Redis refuses, with the errors.
        self.refused: dict[str, str] = {}
        self._open = False
        self._asked: set[str] = set()
        self._answered: set[str] = set()
        self._confirmed: set[str] = set()
        #: Confirmed patterns, in the order of the subscriptions.
        self._patterns: tuple[Subscription, ...] = ()

    @property
    def all_confirmed(self) -> bool:
        """True if Redis has confirmed every subscription."""
        return self._open and _holds(self._confirmed, self.wanted)

    @property
    def all_answered(self) -> bool:
        """True if Redis has confirmed or refused every subscription."""
        return self._open and _holds(self._answered, self.wanted)

    def open(self) -> None:
        """Subscribe to everything on a new connection.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self._changed:
            self._open = True

        self.ask()

    def close(self) -> None:
        """Forget all answers, after the connection was closed."""
        with self._changed:
            self._open = False
            self._asked.clear()
            self._answered.clear()
            self._confirmed.clear()
            self._patterns = ()
            self._changed.notify_all()

    def ask(self) -> None:
        """Subscribe to what was added; do nothing without a connection.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self._changed:
            if not self._open:
                return

            new = self.wanted.keys() - self._asked
            self._asked |= new
            self._request(sorted(new))

    def ask_again(self) -> None:
        """Subscribe again to what was refused, because the ACL may have changed.

        :raises redis.ConnectionError: if the connection is lost.
        """
        with self._changed:
            self._asked -= self.refused.keys()

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

        name = self._keys.name(frame.subscribed)

        with self._changed:
            if name not in self._asked:
                return

            if frame.kind == "refused":
                self._refuse(name, frame.body.decode(errors="replace"))
            else:
                self._confirm(name)

            self._answered.add(name)
            self._changed.notify_all()

    def match_pattern(self, frame: Frame, name: str) -> Subscription | None:
        """Return the pattern that handles the event ``name`` in a frame, or ``None``.

        Redis delivers a message once for each matching subscription. Only one of these copies is
        handled: that of the name itself, or else that of the first confirmed pattern.
        """
        if name in self._confirmed:
            return None

        pattern = next((found for found in self._patterns if matches(found.name, name)), None)
        is_match = pattern and pattern.name == self._keys.name(frame.subscribed)
        return pattern if is_match else None

    def _request(self, names: Sequence[str]) -> None:
        channels = {self._keys.key(name): name for name in names if not is_pattern(name)}
        self.names.update({key.encode(): name for key, name in channels.items()})
        patterns = [self._keys.key(name) for name in names if is_pattern(name)]
        self._reader.subscribe(channels, patterns=False)
        self._reader.subscribe(patterns, patterns=True)

    def _confirm(self, name: str) -> None:
        self._confirmed.add(name)
        was_refused = self.refused.pop(name, None)

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
                for found in self.wanted.values()
                if is_pattern(found.name) and found.name in self._confirmed
            )

    def _refuse(self, name: str, reason: str) -> None:
        if name in self.refused:
            return

        self.refused[name] = reason
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


class Listener(ReadingThread):
    """Reads messages in its own thread, queues their events, and reconnects after an outage.

    :param decoder: decodes the messages.
    :param pool: the worker threads that run the receivers.
    """

    _failed = "The listener failed; it reconnects."

    def __init__(self, context: Context, *, decoder: MessageDecoder, pool: WorkerThreads) -> None:
        super().__init__(context, "listener")
        self._log = BoundedLog(logger)
        self._service = context.config.service
        self._timing = context.timing
        self._keys = ChannelKeys(context.config.prefix)
        self._reader = ChannelReader(context.connections)
        self._subscriptions = ChannelSubscriptions(
            self._reader, service=self._service, keys=self._keys, changed=self.changed
        )
        self._decoder = decoder
        self._pool = pool
        self._lost_since: float | None = None
        self._was_connected = False
        #: Monotonic time at which to subscribe again to what Redis refused.
        self._ask_again_at = 0.0
        #: Monotonic time at which the last bytes arrived.
        self.last_heard: float | None = None

    @property
    def connected(self) -> bool:
        """True if the thread runs, and Redis has confirmed every subscription."""
        return self.lives and self._subscriptions.all_confirmed

    @property
    def refused(self) -> dict[str, str]:
        """Subscriptions that Redis refuses, with the errors."""
        return dict(self._subscriptions.refused)

    def update(self, subscriptions: Mapping[str, Subscription]) -> None:
        """Use other subscriptions from now on; :meth:`start` subscribes to what was added.

        :param subscriptions: the subscriptions of the service, by name or pattern.
        """
        self._subscriptions.wanted = subscriptions

    def start(self) -> None:
        """Start the thread unless it was started before, and subscribe to what was added."""
        super().start()
        self._subscriptions.refresh()

    def ready(self, timeout: float | None) -> bool:
        """Wait until Redis has confirmed every subscription; return False if it has not.

        :param timeout: maximum time to wait in seconds; ``None`` to wait without limit.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.connected or self.is_stopping, timeout)

        return self.connected

    def stop(self) -> None:
        """Tell the thread to stop reading. Events that were read stay queued in the pool."""
        super().stop()
        self._reader.wake()

    def disown(self) -> None:
        """Mark the thread as stopped; call it in a forked child.

        With greenlets, the thread itself is copied into the child.
        """
        super().disown()
        # So that the child does not report the connection as lost.
        self._lost_since = time.monotonic()

    # -- the reading thread ---------------------------------------------------------------

    def _connect(self) -> None:
        self._reader.connect()
        self._subscriptions.open()
        self._ask_again_at = time.monotonic() + self._timing.ping_after

    def _step(self) -> None:
        if frames := self._reader.read():
            self._accept(frames)
            self._backoff.tries = 0

        if self._subscriptions.refused and time.monotonic() >= self._ask_again_at:
            self._ask_again_at = time.monotonic() + self._timing.ping_after
            self._subscriptions.ask_again()

    def _disconnect(self) -> None:
        self._subscriptions.close()
        self._reader.close()

    def _finish(self) -> None:
        self._pool.close()

    def _lose(self, error: Exception) -> None:
        if self._lost_since is not None:
            return

        # If the server hung or was replaced, events are missing since its last bytes.
        self._lost_since = time.monotonic() if self.last_heard is None else self.last_heard
        self._log.warning("lost", "The listener lost Redis (%s); it reconnects by itself.", error)
        emit(listener_lost, self._service, error=error)

    def _accept(self, frames: Sequence[Frame]) -> None:
        """Queue the events of frames, and note the answers of Redis."""
        subscriptions = self._subscriptions
        batch: list[tuple[Event, int]] = []
        self.last_heard = time.monotonic()

        try:
            for frame in frames:
                if frame.kind == "message":
                    name = subscriptions.names.get(frame.channel, "")
                    subscription = subscriptions.wanted.get(name)
                elif frame.kind == "pmessage":
                    name = self._keys.name(frame.channel)
                    subscription = subscriptions.match_pattern(frame, name)
                else:
                    self._note(frame)
                    continue

                if subscription is not None:
                    found = self._decoder.event(name, subscription, frame.body)

                    if found is not None:
                        batch.append(found)
        finally:
            if batch:
                self._pool.put(batch)
                self._counters.add("received", len(batch))

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
            logger.info("Listening to %s.", ", ".join(sorted(self._subscriptions.wanted)))

        if lost_since is not None:
            self._log.warning(
                "connected",
                "The listener is back after %.1f s. Channel events sent meanwhile may be missed.",
                seconds,
            )

        emit(listener_connected, self._service, reconnected=reconnected, seconds=seconds)
