"""Reads the messages of channels in a thread, decodes their events, and queues them."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..config import Timing
from ..errors import DecodeError
from ..event import Event
from ..logs import BoundedLog, get_logger
from ..receivers.dispatcher import SECRET, Conflicts, Finding, compare
from ..receivers.workers import WorkerThreads
from ..routing.subscriptions import Subscription
from ..signals import emit, event_rejected, events_missed, listener_connected, listener_lost
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from ..transport.keys import ChannelKeys
from ..transport.reconnect import ReadingThread
from .reader import ChannelReader, ChannelSubscriptions, Frame

logger = get_logger(__name__)

#: Number of events of one route whose hashes are remembered. If a publisher does not know whether
#: Redis accepted a batch, it sends that batch again: 512 events at most.
REPEATABLE = 1_024

#: Maximum number of events missing before one event. A node that sends 1,000 events a second takes
#: more than a day for them. A larger gap is forged, and would make the count useless.
MAX_MISSED = 100_000_000

#: Number of bytes of a rejected body that are logged.
SAMPLE = 64

#: Number of decoded events that are queued at once. The worker threads run them while the rest of
#: the read, which may have more events than the queue holds, is decoded.
QUEUED_AT_ONCE = 256


class Listener(ReadingThread):
    """Reads messages in its own thread, queues their events, and reconnects after an outage.

    :param pool: the worker threads that run the receivers.
    :param issued: returns the number of events that this node has created.
    """

    _failed = "The listener failed; it reconnects."

    def __init__(self, context: Context, *, pool: WorkerThreads, issued: Callable[[], int]) -> None:
        super().__init__(context, "listener")
        self._log = BoundedLog(logger)
        self._service = context.config.service
        self._timing = context.timing
        self._keys = ChannelKeys(context.config.prefix)
        self._reader = ChannelReader(context.connections)
        self._subscriptions = ChannelSubscriptions(
            self._reader, service=self._service, keys=self._keys, changed=self.changed
        )
        self._decoder = MessageDecoder(context, issued=issued)
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

        try:
            self._subscriptions.ask()
        except OUTAGE as error:
            # The reading thread notices the loss too, and subscribes to everything again.
            logger.debug("Subscribing waits for the next connection: %s", error)

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
        events: list[Event] = []
        sizes: list[int] = []
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
                    self._decoder.decode(name, subscription, frame.body, events, sizes)

                if len(events) >= QUEUED_AT_ONCE:
                    self._queue(events, sizes)
                    events, sizes = [], []
        finally:
            self._queue(events, sizes)

    def _queue(self, events: Sequence[Event], sizes: Sequence[int]) -> None:
        if events:
            # Before a receiver runs, which may look at the count.
            self._counters.add("received", len(events))
            self._pool.put(events, sizes)

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


@dataclass(slots=True)
class _RouteState:
    """The sequence of one signal's events from one node and source."""

    #: Sequence number of the last event.
    last: int
    #: Last number out of sequence: below :attr:`last`, or too far above it. If the next event has
    #: the number after it, the sequence continues from there.
    stray: int = -1
    #: Hashes of the last bodies.
    bodies: deque[int] = field(default_factory=lambda: deque(maxlen=REPEATABLE))


class Sequences:
    """Tracks the sequence number of each node for each signal, to find missing events.

    A publisher can write any node, source and number into an event. So only an event with the same
    bytes is a repetition. An event that contradicts another one is reported and not dropped.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._routes: OrderedDict[tuple[str, str, str], _RouteState] = OrderedDict()
        #: Number of hashes of all routes.
        self._hashes = 0
        #: The first source of each node.
        self._sources: OrderedDict[str, str] = OrderedDict()
        #: Hashes of events without a number, by event id.
        self._ids: OrderedDict[str, int] = OrderedDict()
        #: The route of the last observed event; ``None`` if unknown.
        self._latest: _RouteState | None = None

    def follow(self, event: Event, body: bytes) -> bool:
        """Return True and note an event if it is the next one after the last observed event.

        :param event: an event of the same node, name and source.
        """
        route = self._latest

        if route is None or event.seq != route.last + 1:
            return False

        route.last += 1
        self._remember(route, hash(SECRET + body))
        return True

    def observe(self, event: Event, node: str, body: bytes) -> int | Finding:
        """Return the number of events missing directly before this one, or a :class:`.Finding`.

        No event is missing before the first one of a node: this process did not listen before.
        """
        digest = hash(SECRET + body)
        seq = event.seq
        self._latest = None

        if seq is None:
            return compare(self._ids, event.id, digest, self._timing.max_remembered) or 0

        key = (node, event.name, event.source)
        route = self._routes.get(key)
        found: int | Finding

        if route is None:
            route = self._routes[key] = _RouteState(seq)
            found = self._check_source(event)
        elif 0 <= seq - route.last - 1 <= MAX_MISSED:
            found = seq - route.last - 1
            route.last = seq
            self._routes.move_to_end(key)
        elif digest in route.bodies:
            return Finding.REPEATED
        else:
            found = _stray(route, seq)

        self._latest = route
        self._remember(route, digest)
        return found

    def _remember(self, route: _RouteState, digest: int) -> None:
        """Remember the hash of an event; forget a route if there are too many hashes or routes."""
        is_full = len(route.bodies) == REPEATABLE
        route.bodies.append(digest)

        if is_full:
            return

        self._hashes += 1

        if (
            self._hashes > self._timing.max_hashes
            or len(self._routes) > self._timing.max_remembered
        ):
            _, forgotten = self._routes.popitem(last=False)
            self._hashes -= len(forgotten.bodies)

            if forgotten is self._latest:
                self._latest = None

    def _check_source(self, event: Event) -> int | Finding:
        """Return a conflict if the node has sent events of another source before."""
        known = self._sources.setdefault(event.node, event.source)

        if len(self._sources) > self._timing.max_remembered:
            self._sources.popitem(last=False)

        return 0 if known == event.source else Finding.CONFLICT


def _stray(route: _RouteState, seq: int) -> int | Finding:
    """Handle a number out of sequence, of an event that is no repetition.

    A single one is a conflict and leaves the sequence as it is, so that an old or forged event
    causes no false gap. Two consecutive ones show that the last number was forged, or that the node
    restarted its count. The sequence then continues from them.
    """
    if seq == route.stray + 1:
        route.last, route.stray = seq, -1
        return 0

    route.stray = seq
    return Finding.CONFLICT


class MessageDecoder:
    """Decodes and checks messages, and selects the events that this node handles.

    :param issued: returns the number of events that this node has created.
    """

    def __init__(self, context: Context, *, issued: Callable[[], int]) -> None:
        self._config = context.config
        self._codec = context.codec
        self._counters = context.counters
        self._node = context.node
        self._issued = issued
        #: The nodes of this process, whose local receivers ran at ``send()``.
        self._siblings = context.registry.siblings
        self._log = BoundedLog(logger)
        self._sequences = Sequences(context.timing)
        self._conflicts = Conflicts(context)

    def decode(
        self,
        name: str,
        subscription: Subscription,
        message: bytes,
        events: list[Event],
        sizes: list[int],
    ) -> None:
        """Decode the events in a message from the channel of ``name``.

        Append those that this node handles to ``events``, and the memory use of each in bytes to
        ``sizes``.
        """
        own, siblings, follow = self._node, self._siblings, self._sequences.follow
        # True if the event before was appended, and is not from this process.
        was_appended = False

        for body, event, size, is_like_last in self._codec.decode_message(message):
            if isinstance(event, DecodeError):
                self._reject(name, body, event)
                continue

            # The checks of the event before hold for an event like it, too.
            if not (is_like_last and was_appended and follow(event, body)):
                node = event.id.rpartition("-")[0]
                is_local = node == own or node in siblings
                is_accepted = self._accepts(event, body, name, subscription, node, is_local)
                was_appended = is_accepted and not is_local

                if not is_accepted:
                    continue

            events.append(event)
            sizes.append(size)

    def _accepts(
        self,
        event: Event,
        body: bytes,
        name: str,
        subscription: Subscription,
        node: str,
        is_local: bool,
    ) -> bool:
        """Return True if this node handles an event; count and report why it does not.

        :param name: name of the signal whose channel has the event.
        :param is_local: True if a node of this process has sent it.
        """
        if node == self._node or event.name != name:
            try:
                self._check(event, name, int(event.id[len(node) + 1 :]))
            except DecodeError as error:
                self._reject(name, body, error)
                return False

        found = self._sequences.observe(event, node, body)

        if found is Finding.REPEATED:
            self._counters.add("duplicates")
            return False

        if found is Finding.CONFLICT:
            self._conflicts.report(event)
        elif found:
            self._count_missed(event, found)

        if is_local and not subscription.echo:
            self._counters.add("echoes")
            return False

        sources = subscription.sources

        if not (is_local or sources is None or event.source in sources):
            self._counters.add("filtered")
            return False

        return True

    def _check(self, event: Event, name: str, number: int) -> None:
        """Check the name of an event, and whether this node sent one that bears its name."""
        if event.name != name:
            raise DecodeError(
                f"The event {event.id} on the channel of {name!r} is named {event.name!r}.",
                reason="wrong_channel",
            )

        if event.source != self._config.service or number > self._issued():
            raise DecodeError(
                f"The event {event.id} from {event.source!r} has this node's name, but this node "
                "did not send it.",
                reason="forged_source",
            )

    def _reject(self, name: str, body: bytes, error: DecodeError) -> None:
        self._counters.add("rejected")
        self._counters.add(f"rejected_{error.reason}")
        self._log.warning(
            f"rejected {error.reason}",
            "Bytes on the channel of %r are rejected (%s): %s They start with %r.",
            name,
            error.reason,
            error,
            body[:SAMPLE],
            extra={"signal": name, "service": self._config.service},
        )
        emit(event_rejected, self._config.service, name=name, reason=error.reason, error=error)

    def _count_missed(self, event: Event, count: int) -> None:
        self._counters.add("missed", count)
        self._log.warning(
            f"missed {event.name}",
            "%d events of %r from %r (node %s) never arrived. The next event is %s.",
            count,
            event.name,
            event.source,
            event.node,
            event.id,
            extra={**event.fields, "service": self._config.service},
        )
        emit(
            events_missed,
            self._config.service,
            name=event.name,
            source=event.source,
            node=event.node,
            count=count,
        )
