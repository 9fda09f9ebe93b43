"""What becomes of one body from a channel: an event for the receivers, or a number that grows."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from ..codec.codec import Codec
from ..config import Config
from ..errors import DecodeError
from ..event import Event
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.conflicts import Conflicts, Finding, compare, digest_of
from ..routing.subscriptions import Subscription
from ..signals import emit, event_rejected, events_missed

logger = get_logger(__name__)

#: Lanes and nodes that are remembered; the oldest is forgotten first.
REMEMBERED = 10_000

#: Events of one lane whose bytes are remembered. A publisher sends at most one batch of 512
#: events again, when it does not know whether Redis took them.
REPEATABLE = 1_024

#: Events whose bytes are remembered over all lanes: 40 bytes of memory each.
MOST_REMEMBERED = 262_144

#: Events that one event shows to be missing, at most: a node that sends 1,000 a second needs more
#: than a day for them. A larger gap is forged, and would make the count of missed events worthless.
MOST_MISSED = 100_000_000


@dataclass(slots=True)
class _RouteState:
    """The events of one signal from one node, as one source."""

    last: int
    #: A number that was not above :attr:`last`, or too far; the count goes on from there if the
    #: next follows.
    stray: int = -1
    #: Hashes of the latest bodies.
    bodies: deque[int] = field(default_factory=lambda: deque(maxlen=REPEATABLE))


class Sequences:
    """The last number heard from each node for each signal.

    An event only says what its node, its source and its number are. So only the same bytes make
    a repetition; an event that contradicts another one is reported, never dropped.
    """

    def __init__(self) -> None:
        self._lanes: OrderedDict[tuple[str, str, str], _RouteState] = OrderedDict()
        #: How many hashes all lanes hold.
        self._held = 0
        #: The source that each node named first.
        self._sources: OrderedDict[str, str] = OrderedDict()
        #: The ids of events without a number, and the hashes of their bytes.
        self._ids: OrderedDict[str, int] = OrderedDict()

    def observe(self, event: Event, body: bytes) -> int | Finding:
        """Return how many events are missing right before this one, or what is wrong with it.

        Before the first event of a node nothing is missing: this process did not listen then.
        """
        digest = digest_of(body)

        if event.seq is None:
            return compare(self._ids, event.id, digest) or 0

        key = (event.node, event.name, event.source)
        lane = self._lanes.get(key)

        if lane is None:
            lane = self._lanes[key] = _RouteState(event.seq)
            self._remember(lane, digest)
            return self._check_source(event)

        missing = event.seq - lane.last - 1

        if 0 <= missing <= MOST_MISSED:
            lane.last = event.seq
            self._lanes.move_to_end(key)
            self._remember(lane, digest)
            return missing

        if digest in lane.bodies:
            return Finding.REPEATED

        self._remember(lane, digest)
        return _stray(lane, event.seq)

    def _remember(self, lane: _RouteState, digest: int) -> None:
        self._held += len(lane.bodies) < REPEATABLE
        lane.bodies.append(digest)

        if self._held > MOST_REMEMBERED or len(self._lanes) > REMEMBERED:
            _, forgotten = self._lanes.popitem(last=False)
            self._held -= len(forgotten.bodies)

    def _check_source(self, event: Event) -> int | Finding:
        """A node belongs to one service; a second source for it is a conflict."""
        known = self._sources.setdefault(event.node, event.source)

        if len(self._sources) > REMEMBERED:
            self._sources.popitem(last=False)

        return 0 if known == event.source else Finding.CONFLICT


def _stray(lane: _RouteState, seq: int) -> int | Finding:
    """An event with a number that was heard or passed already, or too far, and with new bytes.

    One such number changes nothing, so that an old or forged one causes no false gap. Two in
    a row show that the last number was forged, or the count begun anew: it goes on from them.
    """
    if seq == lane.stray + 1:
        lane.last, lane.stray = seq, -1
        return 0

    lane.stray = seq
    return Finding.CONFLICT


#: Bytes of a rejected body that are logged.
SAMPLE = 64


class MessageDecoder:
    """Decodes and checks what came, and lets through what this node is to handle.

    :param node: this node's name; its own events are echoes.
    :param issued: how many events this node has made.
    :param siblings: nodes of this process whose local receivers ran at ``send()``.
    """

    def __init__(
        self,
        *,
        config: Config,
        codec: Codec,
        counters: Counters,
        node: str,
        issued: Callable[[], int],
        siblings: Container[str],
    ) -> None:
        self._config = config
        self._codec = codec
        self._counters = counters
        self._node = node
        self._issued = issued
        self._siblings = siblings
        self._log = BoundedLog(logger)
        self._sequences = Sequences()
        self._conflicts = Conflicts(config=config, counters=counters)

    def event(self, name: str, body: bytes, subscription: Subscription) -> tuple[Event, int] | None:
        """The event that came on the channel of ``name``, if it is one to handle.

        :return: the event, and the bytes of memory that it takes while it waits.
        """
        try:
            event, size = self._codec.decode_to_wait(body)
            self._check(event, name)
        except DecodeError as error:
            self._reject(name, body, error)
            return None

        found = self._sequences.observe(event, body)

        if found is Finding.REPEATED:
            self._counters.add("duplicates")
            return None
        if found is Finding.CONFLICT:
            self._conflicts.report(event)
        elif found:
            self._count_missed(event, found)

        return (event, size) if self._wanted(event, subscription) else None

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
            extra={"signal": name, "service": self._config.service},
        )
        emit(event_rejected, self._config.service, name=name, reason=error.reason, error=error)

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
