"""The supervised loops of a node that listens: one reads and decodes, others dispatch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence

import redis

from .backoff import Backoff
from .channels import ChannelKeys, ChannelReader, Frame
from .codec import Codec
from .config import Config
from .connections import OUTAGE
from .coroutines import kept_loop
from .counters import BoundedLog, Counters
from .dispatcher import Dispatcher
from .errors import DecodeError
from .event import Event
from .inbox import BATCH, Inbox
from .lifecycle import tell
from .logs import get_logger
from .routes import Subscription, is_pattern, subscription_for
from .sequences import Sequences
from .signals import (
    event_rejected,
    events_dropped,
    events_missed,
    listener_connected,
    listener_lost,
)

logger = get_logger(__name__)

#: Seconds of silence after which the server is asked for a sign of life, and seconds it
#: has to answer: a peer that hangs is noticed after both.
QUIET = 5.0
DEADLINE = 5.0

#: Seconds between tries to connect, at most: whoever comes back late has missed events.
MOST_BACKOFF = 1.0

#: Bytes of a rejected body that are logged.
SAMPLE = 64


class Listener:
    """Hears what a service subscribed to, and hands it to the dispatcher.

    :param subscriptions: what to hear, asked for whenever it may have changed.
    :param node: this node's name; its own events are echoes.
    :param issued: how many events this node has made.
    :param siblings: nodes of this process whose local receivers ran at ``send()``.
    """

    def __init__(
        self,
        *,
        config: Config,
        codec: Codec,
        reader: ChannelReader,
        keys: ChannelKeys,
        dispatcher: Dispatcher,
        counters: Counters,
        subscriptions: Callable[[], Mapping[str, Subscription]],
        node: str,
        issued: Callable[[], int],
        siblings: Container[str],
    ) -> None:
        self._config = config
        self._codec = codec
        self._reader = reader
        self._keys = keys
        self._dispatcher = dispatcher
        self._counters = counters
        self._subscriptions = subscriptions
        self._node = node
        self._issued = issued
        self._siblings = siblings
        self._log = BoundedLog(logger)
        self._sequences = Sequences()
        self._inbox = Inbox()
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._forced = False
        #: Guards the subscriptions of the connection, and tells when they are confirmed.
        self._changed = threading.Condition()
        self._open = False
        self._asked: set[str] = set()
        self._confirmed: set[str] = set()
        self._refused: dict[str, str] = {}
        self._lost_since: float | None = None
        self._was_connected = False
        #: When bytes last came, by the monotonic clock.
        self.last_heard: float | None = None

    @property
    def running(self) -> bool:
        """Whether the reading thread lives."""
        return bool(self._threads) and self._threads[0].is_alive()

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is one of the listener's."""
        return threading.current_thread() in self._threads

    @property
    def connected(self) -> bool:
        """Whether everything subscribed is confirmed on a connection that answers."""
        return self._open and set(self._subscriptions()) <= self._confirmed

    @property
    def refused(self) -> dict[str, str]:
        """Subscriptions that Redis refuses, with its reasons."""
        return dict(self._refused)

    @property
    def lag(self) -> int:
        """Events that were read and wait for receivers."""
        return len(self._inbox)

    def start(self) -> None:
        """Start the threads, once."""
        if self._threads:
            return

        self._threads = [self._thread("listener", self._run)]
        self._threads += [
            self._thread(f"receiver-{number}", self._dispatch)
            for number in range(self._config.concurrency)
        ]

        for thread in self._threads:
            thread.start()

    def refresh(self) -> None:
        """Subscribe to what was added meanwhile."""
        try:
            self._subscribe()
        except OUTAGE as error:
            # The reading thread meets the same loss and subscribes to everything anew.
            logger.debug("Subscribing waits for the next connection: %s", error)

    def ready(self, timeout: float | None) -> bool:
        """Wait until everything subscribed is confirmed; whether it was in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.connected, timeout)

    def stop(self, grace: float) -> None:
        """Stop reading, let what was read be handled for ``grace`` seconds, end the threads."""
        if not self._threads:
            return

        self._stopping.set()
        self._wake_reader()
        self._threads[0].join()
        self._drain(grace)
        self._inbox.close()

        for thread in self._threads[1:]:
            thread.join(timeout=0.1 if self._forced else None)

    def disown(self) -> None:
        """In a forked child: end what came along of it, which for greenlets is everything."""
        self._stopping = threading.Event()
        self._stopping.set()
        self._forced = True
        # Nobody is to be told of the connection that is lost with this.
        self._lost_since = time.monotonic()

    def _thread(self, role: str, target: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=target, name=f"eventbus-{role}-{self._node}", daemon=True)

    def _wake_reader(self) -> None:
        try:
            self._reader.ping()
        except OUTAGE as error:
            logger.debug("The reader wakes by itself: %s", error)

    def _drain(self, grace: float) -> None:
        if self._inbox.wait_until_empty(grace):
            return

        self._forced = True
        left = self._inbox.clear()
        self._counters.add("dropped", left)
        logger.error(
            "Receivers were still running after the grace of %g s: %d events that had arrived are "
            "not handled. Raise 'EVENTBUS_GRACE', or make the receivers shorter.",
            grace,
            left,
        )

    # -- the reading thread ---------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(most=MOST_BACKOFF)

        while not self._stopping.is_set():
            try:
                self._listen(backoff)
            except OUTAGE as error:
                self._lost(error)
            except Exception as error:
                logger.exception("The listener failed; it connects anew.")
                self._lost(error)
            finally:
                self._close()

            if not self._stopping.is_set():
                self._stopping.wait(backoff.next())

    def _listen(self, backoff: Backoff) -> None:
        self._reader.connect()

        with self._changed:
            self._open = True

        self._subscribe()
        heard = time.monotonic()
        asked: float | None = None

        while not self._stopping.is_set():
            frames = self._reader.read()
            now = time.monotonic()

            if frames:
                heard, asked = now, None
                self._accept(frames)
                backoff.reset()
            elif asked is None and now - heard >= QUIET:
                asked = now
                self._ask_again()
            elif asked is not None and now - asked >= DEADLINE:
                raise redis.TimeoutError(f"Redis did not answer a PING within {DEADLINE:g} s.")

    def _ask_again(self) -> None:
        """Ask for a sign of life, and once more for what was refused."""
        with self._changed:
            self._asked -= set(self._refused)

        self._subscribe()
        self._reader.ping()

    def _subscribe(self) -> None:
        with self._changed:
            if not self._open:
                return

            new = set(self._subscriptions()) - self._asked
            self._asked |= new
            self._request(sorted(new))

    def _request(self, names: Sequence[str]) -> None:
        plain = [self._keys.key(name) for name in names if not is_pattern(name)]
        patterns = [self._keys.key(name) for name in names if is_pattern(name)]
        self._reader.subscribe(plain, patterns=False)
        self._reader.subscribe(patterns, patterns=True)

    def _close(self) -> None:
        with self._changed:
            self._open = False
            self._asked.clear()
            self._confirmed.clear()

        self._reader.close()

    def _lost(self, error: Exception) -> None:
        if self._lost_since is not None:
            return

        self._lost_since = time.monotonic()
        logger.warning("The listener lost Redis (%s); it connects again by itself.", error)
        tell(listener_lost, self._config.service, error=error)

    def _accept(self, frames: Sequence[Frame]) -> None:
        batch = []
        self.last_heard = time.monotonic()

        for frame in frames:
            if frame.kind in ("message", "pmessage"):
                event = self._event(frame)

                if event is not None:
                    batch.append((event, len(frame.body)))
            else:
                self._note(frame)

        if batch:
            self._counters.add("received", len(batch))
            self._count_dropped(self._inbox.put(batch))

    def _count_dropped(self, dropped: int) -> None:
        if not dropped:
            return

        self._counters.add("dropped", dropped)
        self._log.warning(
            "dropped",
            "Receivers are slower than events come: the oldest that wait are dropped. Raise "
            "'EVENTBUS_CONCURRENCY', or make the receivers shorter. health() counts them.",
        )
        tell(events_dropped, self._config.service, where="inbox", count=dropped)

    def _note(self, frame: Frame) -> None:
        if frame.kind not in ("subscribe", "psubscribe", "refused"):
            return

        name = self._keys.name(_as_bytes(frame.subscribed))

        with self._changed:
            if frame.kind == "refused":
                self._note_refused(name, frame.body.decode(errors="replace"))
            else:
                self._confirmed.add(name)
                self._refused.pop(name, None)

            done = self.connected
            self._changed.notify_all()

        if done:
            self._note_connected()

    def _note_refused(self, name: str, reason: str) -> None:
        if name in self._refused or name not in self._asked:
            return

        self._refused[name] = reason
        logger.error(
            "Redis refuses to let %r listen to %r: %s. This service does not hear it. Grant its "
            "user the channel %r in the ACL.",
            self._config.service,
            name,
            reason,
            self._keys.key(name),
        )

    def _note_connected(self) -> None:
        if self._was_connected and self._lost_since is None:
            return

        seconds = 0.0 if self._lost_since is None else time.monotonic() - self._lost_since
        reconnected = self._was_connected
        self._was_connected = True
        self._lost_since = None

        if reconnected:
            logger.warning(
                "The listener is back after %.1f s; channel events of that time may be missed.",
                seconds,
            )
        else:
            logger.info("Listening to %s.", ", ".join(sorted(self._subscriptions())))

        tell(listener_connected, self._config.service, reconnected=reconnected, seconds=seconds)

    # -- one event ------------------------------------------------------------------------

    def _event(self, frame: Frame) -> Event | None:
        """The event of a frame, if it is one that this service is to handle."""
        name = self._keys.name(frame.channel)
        subscription = self._subscription_for(name)
        subscribed = self._keys.name(_as_bytes(frame.subscribed))

        if subscription is None or subscribed != subscription.name:
            return None

        try:
            event = self._codec.decode(frame.body)
            self._check(event, name)
            missing = self._sequences.observe(event)
        except DecodeError as error:
            self._reject(name, frame.body, error)
            return None

        if missing is None:
            self._counters.add("duplicates")
            return None

        if missing:
            self._count_missed(event, missing)

        return event if self._wanted(event, subscription) else None

    def _subscription_for(self, name: str) -> Subscription | None:
        """The one that handles ``name`` by now: what Redis has not confirmed brings nothing."""
        subscriptions = self._subscriptions()
        found = subscription_for(name, subscriptions)

        if found is None or found.name in self._confirmed:
            return found

        confirmed = {key: subscriptions[key] for key in subscriptions if key in self._confirmed}
        return subscription_for(name, confirmed)

    def _check(self, event: Event, name: str) -> None:
        if event.name != name:
            raise DecodeError(
                f"The event {event.id} on the channel of {name!r} says it is {event.name!r}.",
                reason="wrong_channel",
            )

        if event.node != self._node:
            return

        number = int(event.id.rpartition("-")[2])

        if event.source != self._config.service or number > self._issued():
            raise DecodeError(
                f"The event {event.id} from {event.source!r} bears this node's name, but this "
                "node did not make it.",
                reason="forged_source",
            )

    def _wanted(self, event: Event, subscription: Subscription) -> bool:
        if event.node == self._node or event.node in self._siblings:
            if not subscription.echo:
                self._counters.add("echoes")

            return subscription.echo

        if not subscription.hears(event.source):
            self._counters.add("filtered")
            return False

        return True

    def _reject(self, name: str, body: bytes, error: DecodeError) -> None:
        self._counters.add("rejected")
        self._counters.add(f"rejected_{error.reason}")
        self._log.warning(
            f"rejected {error.reason}",
            "Bytes on the channel of %r are rejected (%s): %s They begin with %r.",
            name,
            error.reason,
            error,
            body[:SAMPLE],
        )
        tell(event_rejected, self._config.service, name=name, reason=error.reason, error=error)

    def _count_missed(self, event: Event, count: int) -> None:
        self._counters.add("missed", count)
        self._log.warning(
            f"missed {event.name}",
            "%d events of %r from %r (node %s) never arrived; the next one is %s.",
            count,
            event.name,
            event.source,
            event.node,
            event.id,
        )
        tell(
            events_missed,
            self._config.service,
            name=event.name,
            source=event.source,
            node=event.node,
            count=count,
        )

    # -- the dispatching threads ----------------------------------------------------------

    def _dispatch(self) -> None:
        most = BATCH if self._config.concurrency == 1 else 1

        with kept_loop():
            while events := self._inbox.take(most):
                self._dispatch_all(events)
                self._inbox.done(len(events))

    def _dispatch_all(self, events: Sequence[Event]) -> None:
        for event in events:
            if self._forced:
                return

            try:
                self._dispatcher.dispatch(event)
            except Exception:
                logger.exception("The event %s of %r was not dispatched.", event.id, event.name)


def _as_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key
