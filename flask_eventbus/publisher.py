"""The outbound half: a receiver that takes an emission, and a thread that writes batches."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .backoff import Backoff
from .channels import ChannelWriter
from .codec import Codec, Seal
from .config import Config
from .connections import OUTAGE
from .counters import BoundedLog, Counters
from .errors import HopLimitError, PayloadError, PublishError
from .event import Event, handling
from .lifecycle import tell
from .namespace import Outbound
from .routes import Route
from .signals import events_dropped, publisher_lost, publisher_restored

logger = logging.getLogger(__name__)

#: Events in one round trip.
BATCH_EVENTS = 512

#: Bytes in one round trip, so that a batch of large events fits into the writer's timeout.
BATCH_BYTES = 1024 * 1024

#: Bytes that wait in memory at most, whatever ``EVENTBUS_BUFFER_SIZE`` counts.
BUFFER_BYTES = 64 * 1024 * 1024

#: Seconds a round trip of the writer may take before Redis counts as away.
WRITE_TIMEOUT = 2.0

#: Seconds between tries at most: what waits in memory should not wait long after Redis is back.
MOST_BACKOFF = 2.0

#: Seconds from Redis's return to the first event that waited: a little more than the
#: longest wait of a listener before it connects again.
LISTENERS_RETURN = 1.5


class Bridge(Outbound):
    """The receiver that publishes a signal: one per signal, name on the wire, and node."""

    def __init__(
        self,
        name: str,
        route: Route,
        publish: Callable[[str, Mapping[str, Any], bool], str],
        owns: Callable[[Any], bool],
    ) -> None:
        self.name = name
        self.route = route
        self._publish = publish
        self._owns = owns

    def __call__(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission, if it is one of this node's.

        :raises PayloadError: a value cannot travel.
        :raises PublishError: Redis did not take it, and the route or the policy is to tell.
        :raises HopLimitError: the chain of causes is too long.
        """
        if not self._owns(sender):
            return

        found = self._extract(sender, payload)

        if found is not None:
            self._publish(self.name, found, self.route.confirm)

    def _extract(self, sender: Any, payload: dict[str, Any]) -> Mapping[str, Any] | None:
        if self.route.payload is None:
            return payload

        found = self.route.payload(sender, **payload)

        if found is None or isinstance(found, Mapping):
            return found

        raise PayloadError(
            f"The payload function of {self.name!r} returned {type(found).__name__}. "
            "Return a mapping, or None to leave this emission unpublished."
        )


class ClosedError(Exception):
    """A publisher was closed before it took an emission; it may go to the next one."""


class Lane:
    """The events of one name from one node: what is the same for each, and their count."""

    __slots__ = ("key", "name", "seal", "seq")

    def __init__(self, *, name: str, key: str, seal: Seal) -> None:
        self.name = name
        self.key = key
        self.seal = seal
        self.seq = 0


class Outgoing:
    """An event that waits to be written; its envelope is made by the thread that writes it."""

    __slots__ = ("attributes", "body", "data", "done", "error", "id", "lane", "withdrawn")

    def __init__(self, lane: Lane, data: bytes, attributes: dict[str, Any]) -> None:
        self.lane = lane
        self.data = data
        self.attributes = attributes
        self.id: str = attributes["id"]
        self.body: bytes | None = None
        self.done: threading.Event | None = None
        self.error: Exception | None = None
        self.withdrawn = False

    @property
    def number(self) -> int:
        """Its running number in the node."""
        return int(self.id.rpartition("-")[2])

    @property
    def size(self) -> int:
        """Bytes, a little more than the event will have."""
        return len(self.data) + self.lane.seal.overhead

    def sealed(self) -> bytes:
        """The event's bytes, made once: a second try sends the same."""
        if self.body is None:
            self.body = self.lane.seal(self.data, **self.attributes)

        return self.body


class Publisher:
    """Buffers a node's events and writes them in the order they were sent.

    The writing thread starts with the first event. Nothing here is inherited over a fork:
    the child makes a publisher of its own.
    """

    def __init__(
        self,
        *,
        config: Config,
        codec: Codec,
        writer: ChannelWriter,
        node: str,
        counters: Counters,
        trace: Callable[[], str | None],
    ) -> None:
        self._config = config
        #: The W3C trace context of whatever is going on, outside of receivers.
        self._trace = trace
        self._codec = codec
        self._writer = writer
        self._node = node
        self._counters = counters
        self._log = BoundedLog(logger)
        #: What is published by it, by the names of the signals.
        self.lanes: dict[str, Lane] = {}
        self._numbers = itertools.count(1)
        self._issued = 0
        #: Guards what follows, and is notified whenever any of it changes.
        self._changed = threading.Condition()
        self._buffer: deque[Outgoing] = deque()
        self._bytes = 0
        self._in_hand: Sequence[Outgoing] = ()
        self._idle = False
        #: Whether the writing thread is to try Redis now, whatever it waits for.
        self._asking = False
        self._waiting = 0
        self._closing = False
        self._thread: threading.Thread | None = None
        #: When Redis was lost, by the monotonic clock; ``None`` while it is there.
        self._away_since: float | None = None
        self._error: Exception | None = None
        #: Whether a caller waited in vain since Redis last took something.
        self._stalled = False
        #: Whether events were dropped since Redis last took something.
        self._overflowed = False

    @property
    def connected(self) -> bool:
        """Whether nothing says that Redis is away."""
        return self._away_since is None and not self._stalled

    @property
    def buffered(self) -> int:
        """How many events wait, those on their way included."""
        return len(self._buffer) + len(self._in_hand)

    @property
    def issued(self) -> int:
        """How many events this node has made."""
        return self._issued

    def publish(self, lane: Lane, payload: Mapping[str, Any], *, confirm: bool = False) -> str:
        """Take one emission and return its id; the writing thread does the rest.

        :raises PayloadError: a value cannot travel, or the event is too large.
        :raises HopLimitError: the chain of causes is too long.
        :raises PublishError: Redis is known to be away and the policy is ``"raise"``, or a
            confirmation did not come in time.
        :raises ClosedError: it was closed; the emission is not taken.
        """
        attributes = self._causes(lane)
        data = self._codec.pack_payload(payload)
        self._check_size(lane, data)

        if self._config.on_outage == "raise" and not self.connected:
            raise self._refusal(lane)

        outgoing = self._enqueue(lane, data, attributes, confirm)

        if outgoing.done is not None:
            self._await(outgoing, outgoing.done)

        return outgoing.id

    def ask(self) -> None:
        """Let the writing thread find out at once whether Redis is there; does not wait for it."""
        with self._changed:
            self._asking = True
            self._wake_writer()
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything sent so far is written, at most ``timeout`` seconds.

        :return: whether it was.
        """
        with self._changed:
            last = self._issued
            self._waiting += 1

            try:
                return self._changed.wait_for(lambda: self._has_written(last), timeout)
            finally:
                self._waiting -= 1

    def close(self, timeout: float) -> None:
        """Flush and stop writing; what could not be written is logged by id."""
        self.flush(timeout)
        self.abandon()

        if self._thread is not None:
            self._thread.join(timeout=WRITE_TIMEOUT + 1)

        self._report_lost([*self._in_hand, *self._buffer])

    def abandon(self) -> None:
        """Tell the writing thread to end, whatever waits."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def disown(self) -> None:
        """In a forked child: end what came along of it, which for greenlets is everything."""
        self._closing = True
        self._buffer = deque()
        self._in_hand = ()
        # Nobody is to be told of the connection that is lost with this.
        self._away_since = time.monotonic()

    def _has_written(self, number: int) -> bool:
        first = next(iter(self._in_hand or self._buffer), None)
        return first is None or first.number > number

    # -- the thread of whoever sends ------------------------------------------------------

    def _causes(self, lane: Lane) -> dict[str, Any]:
        cause = handling.get()

        if cause is None:
            return {"traceparent": self._trace()}

        hops = cause.hops + 1

        if hops > self._config.max_hops:
            raise HopLimitError(_chain(lane.name, cause, self._config.max_hops))

        return {
            "hops": hops,
            "causation_id": cause.id,
            "correlation_id": cause.correlation_id or cause.id,
            "traceparent": cause.traceparent or self._trace(),
        }

    def _check_size(self, lane: Lane, data: bytes) -> None:
        size = len(data) + lane.seal.overhead

        if size > self._config.max_event_bytes:
            raise PayloadError(
                f"An event of {lane.name!r} would have up to {size:,} bytes, more than the "
                f"{self._config.max_event_bytes:,} of 'EVENTBUS_MAX_EVENT_BYTES'. Send less, for "
                "example a reference to where the data is, or raise the limit in every service."
            )

    def _enqueue(
        self, lane: Lane, data: bytes, attributes: dict[str, Any], confirm: bool
    ) -> Outgoing:
        with self._changed:
            self._make_room(len(data) + lane.seal.overhead)

            if self._closing:
                raise ClosedError

            number = self._issued = next(self._numbers)
            lane.seq += 1
            attributes["id"] = f"{self._node}-{number}"
            attributes["time_ns"] = time.time_ns()
            attributes["seq"] = lane.seq
            outgoing = Outgoing(lane, data, attributes)

            if confirm:
                outgoing.done = threading.Event()

            self._buffer.append(outgoing)
            self._bytes += outgoing.size
            self._wake_writer()

        return outgoing

    def _wake_writer(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=f"eventbus-writer-{self._node}", daemon=True
            )
            self._thread.start()
        elif self._idle:
            self._idle = False
            self._changed.notify_all()

    def _make_room(self, size: int) -> None:
        """Wait for room while Redis takes events; drop the oldest while it does not."""
        if self._has_room(size):
            return

        if self.connected:
            self._waiting += 1
            in_time = self._changed.wait_for(lambda: self._has_room(size), self._config.timeout)
            self._waiting -= 1
            self._stalled = not in_time

        dropped = 0

        while self._buffer and not self._has_room(size):
            oldest = self._buffer.popleft()
            self._bytes -= oldest.size
            _finish(oldest, PublishError("The buffer was full.", event_id=oldest.id))
            dropped += 1

        if dropped:
            self._count_dropped(dropped)

    def _has_room(self, size: int) -> bool:
        return (
            self.buffered < self._config.buffer_size
            and self._bytes + size <= max(BUFFER_BYTES, size)
        ) or not self._buffer

    def _count_dropped(self, count: int) -> None:
        self._counters.add("dropped", count)

        if not self._overflowed:
            self._overflowed = True
            logger.error(
                "The buffer is full with %d events of %d bytes: from now on the oldest are dropped "
                "until Redis takes events again. health() counts them.",
                len(self._buffer),
                self._bytes,
            )

        tell(events_dropped, self._config.service, where="buffer", count=count)

    def _await(self, outgoing: Outgoing, done: threading.Event) -> None:
        if not done.wait(self._config.timeout if self.connected else 0):
            self._stall()

            if self._config.on_outage == "raise":
                outgoing.withdrawn = True
                raise self._refusal(outgoing.lane, outgoing.id)

            return

        if outgoing.error is not None:
            raise PublishError(
                f"The event {outgoing.id} of {outgoing.lane.name!r} was not published: "
                f"{outgoing.error}",
                event_id=outgoing.id,
            ) from outgoing.error

    def _stall(self) -> None:
        """Hold no further caller, and let an idle writer ask whether Redis is there."""
        with self._changed:
            self._stalled = True
            self._changed.notify_all()

    def _refusal(self, lane: Lane, event_id: str | None = None) -> PublishError:
        reason = self._error or f"no answer within {self._config.timeout} s"
        which = f"The event {event_id}" if event_id else "An event"
        return PublishError(
            f"{which} of {lane.name!r} was not confirmed by Redis: {reason}. Send it again when "
            "Redis is back, or set 'EVENTBUS_ON_OUTAGE' to 'buffer' to keep events in memory.",
            event_id=event_id,
        )

    # -- the writing thread ---------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(most=MOST_BACKOFF)

        try:
            while self._take():
                self._write(backoff)
        finally:
            self._writer.close()

    def _take(self) -> bool:
        """Take a batch in hand, an empty one to ask after a lost Redis; ``False`` at the end."""
        with self._changed:
            while not self._buffer and not self._closing and not self._asking and self.connected:
                self._idle = True
                self._changed.wait()

            self._idle = self._asking = False

            if self._closing:
                return False

            # While Redis is away it is asked first: no event is sent ahead of its listeners.
            self._in_hand = () if self._away_since is not None else self._next_batch()
            return True

    def _next_batch(self) -> list[Outgoing]:
        batch: list[Outgoing] = []
        size = 0

        while self._buffer and len(batch) < BATCH_EVENTS and size < BATCH_BYTES:
            outgoing = self._buffer.popleft()
            self._bytes -= outgoing.size

            if not outgoing.withdrawn:
                size += outgoing.size
                batch.append(outgoing)

        return batch

    def _write(self, backoff: Backoff) -> None:
        batch = self._in_hand

        try:
            errors = self._writer.publish([(out.lane.key, out.sealed()) for out in batch])
        except OUTAGE as error:
            self._lost(error)
            self._put_back()
            self._pause(backoff.next())
        except Exception as error:
            # A defect, not an outage; the batch is not tried again, the thread goes on.
            logger.exception("The writer failed at a batch of %d events.", len(batch))
            self._settle(batch, [error] * len(batch))
        else:
            backoff.reset()
            self._give_way()
            self._restored()
            self._settle(batch, errors)

    def _give_way(self) -> None:
        """Let listeners return before what waited for Redis is sent: they hear no past."""
        if self._away_since is not None and self._buffer:
            self._pause(LISTENERS_RETURN)

    def _put_back(self) -> None:
        with self._changed:
            self._buffer.extendleft(reversed(self._in_hand))
            self._bytes += sum(outgoing.size for outgoing in self._in_hand)
            self._in_hand = ()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds

        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._asking or time.monotonic() >= deadline,
                timeout=seconds,
            )

    def _settle(self, batch: Sequence[Outgoing], errors: Sequence[Exception | None]) -> None:
        refused = 0

        for outgoing, error in zip(batch, errors, strict=True):
            _finish(outgoing, error)

            if error is not None:
                refused += 1
                self._log.error(
                    f"refused {outgoing.lane.name}",
                    "Redis refused the event %s of %r: %s. It is not published.",
                    outgoing.id,
                    outgoing.lane.name,
                    error,
                )

        self._counters.add("published", len(batch) - refused)

        if refused:
            self._counters.add("refused", refused)

        with self._changed:
            self._in_hand = ()

            if self._waiting or not self._buffer:
                self._changed.notify_all()

    def _lost(self, error: Exception) -> None:
        self._error = error

        if self._away_since is not None:
            return

        self._away_since = time.monotonic()
        logger.warning(
            "Redis is away (%s); events are kept in memory, up to %d.",
            error,
            self._config.buffer_size,
        )
        tell(publisher_lost, self._config.service, error=error, buffered=self.buffered)

    def _restored(self) -> None:
        self._stalled = self._overflowed = False

        if self._away_since is None:
            return

        seconds = time.monotonic() - self._away_since
        self._away_since = self._error = None
        logger.warning(
            "Redis is back after %.1f s; %d events that waited are being sent.",
            seconds,
            self.buffered,
        )
        tell(publisher_restored, self._config.service, seconds=seconds, buffered=self.buffered)

    def _report_lost(self, lost: Sequence[Outgoing]) -> None:
        waiting = [outgoing for outgoing in lost if not outgoing.withdrawn]

        if not waiting:
            return

        self._counters.add("dropped", len(waiting))
        reason = self._error or "the time to flush was over"
        logger.error(
            "%d events were not published before the end (%s): %s",
            len(waiting),
            reason,
            _shown(waiting),
        )
        tell(events_dropped, self._config.service, where="buffer", count=len(waiting))


def _shown(lost: Sequence[Outgoing]) -> str:
    """Their ids; runs of the same signal as their first and last."""
    runs: list[list[Outgoing]] = []

    for outgoing in lost:
        if runs and runs[-1][-1].lane is outgoing.lane:
            runs[-1].append(outgoing)
        else:
            runs.append([outgoing])

    return ", ".join(
        f"{run[0].lane.name} {run[0].id}" + (f" to {run[-1].id} ({len(run)})" if run[1:] else "")
        for run in runs
    )


def _finish(outgoing: Outgoing, error: Exception | None) -> None:
    outgoing.error = error

    if outgoing.done is not None:
        outgoing.done.set()


def _chain(name: str, cause: Event, limit: int) -> str:
    return (
        f"An event of {name!r} would be number {cause.hops + 2} of a chain: "
        f"{cause.correlation_id or cause.id} began it, ... -> {cause.name!r} from "
        f"{cause.source!r} ({cause.id}) -> {name!r}. 'EVENTBUS_MAX_HOPS' allows {limit} hops. "
        "Find the receivers that answer each other's signals and break the circle."
    )
