"""The outbound half: takes what is sent, and keeps it for the thread that writes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .buffer import Buffer, Lane, Outgoing
from .channels import ChannelKeys, ChannelWriter
from .codec import Codec
from .config import Config
from .counters import Counters
from .errors import HopLimitError, PayloadError, PublishError
from .event import Event, handling
from .lifecycle import tell
from .logs import get_logger
from .outage import Outage
from .signals import events_dropped
from .writer import Writer

logger = get_logger(__name__)


class ClosedError(Exception):
    """The publisher was closed, and its node has another by now."""


class Publisher:
    """Buffers a node's events, which leave in the order they were sent.

    Nothing here is inherited over a fork: the child makes a publisher of its own.

    :param channel: writes batches, in a thread of the publisher.
    :param trace: the W3C trace context of whatever is going on, outside of receivers.
    """

    def __init__(
        self,
        *,
        config: Config,
        codec: Codec,
        keys: ChannelKeys,
        channel: ChannelWriter,
        node: str,
        counters: Counters,
        trace: Callable[[], str | None],
    ) -> None:
        self._config = config
        self._trace = trace
        self._codec = codec
        self._keys = keys
        self._node = node
        self._counters = counters
        self._lanes: dict[str, Lane] = {}
        self._numbers = itertools.count(1)
        #: How many events this node has made.
        self.issued = 0
        self._buffer = Buffer(most_events=config.buffer_size)
        self._outage = Outage(config.service)
        self._writer = Writer(
            channel=channel,
            buffer=self._buffer,
            outage=self._outage,
            counters=counters,
            service=config.service,
            node=node,
        )
        self._closed = False
        self._telling = threading.local()

    @property
    def connected(self) -> bool:
        """Whether nothing says that Redis is away."""
        return not self._outage.known

    @property
    def buffered(self) -> int:
        """How many events wait, those on their way included."""
        return len(self._buffer)

    def publish(self, name: str, payload: Mapping[str, Any], *, confirm: bool = False) -> str:
        """Take one emission and return its id; the writing thread does the rest.

        :raises PayloadError: a value cannot travel, or the event is too large.
        :raises HopLimitError: the chain of causes is too long.
        :raises PublishError: the policy is ``"raise"`` and Redis does not take events, or it
            refused this one and a confirmation was asked for.
        :raises ClosedError: the publisher was closed meanwhile.
        """
        outgoing = self._take_down(name, payload, confirm=confirm)
        self._accept(outgoing)

        if outgoing.done is not None:
            self._await(outgoing, outgoing.done)

        return outgoing.id

    def draft(self, name: str, payload: Mapping[str, Any], confirm: bool) -> Outgoing:
        """Take one emission down as it is now, for :meth:`take` to publish it later or never.

        :raises PayloadError: a value cannot travel, or the event is too large.
        :raises HopLimitError: the chain of causes is too long.
        :raises PublishError: the policy is ``"raise"`` and Redis does not take events.
        """
        outgoing = self._take_down(name, payload, confirm=confirm)
        self._refuse_in_outage(outgoing)
        outgoing.promise(time.time_ns())
        return outgoing

    def seal(self, name: str, payload: Mapping[str, Any]) -> Outgoing:
        """An event with its id and its bytes, for another process to publish.

        It is not counted among the events of its name: who publishes it, and when, is not known.

        :raises PayloadError: a value cannot travel, or the event is too large.
        :raises HopLimitError: the chain of causes is too long.
        """
        outgoing = self._take_down(name, payload, confirm=False)

        with self._buffer.changed:
            self._identify(outgoing)

        outgoing.sealed()
        return outgoing

    def take(self, draft: Outgoing) -> None:
        """Publish what was drafted, here or by the publisher that the node had before.

        :raises ClosedError: the publisher was closed meanwhile.
        """
        draft.lane = self._lane(draft.lane.name)
        self._accept(draft)

    def await_all(self, sent: Sequence[Outgoing]) -> list[Outgoing]:
        """Wait for confirmations, once the timeout for all of them; return what lacks one."""
        if self._writer.is_this_thread:
            return []

        departures = self._buffer.departures
        deadline = time.monotonic() + self._patience
        late = [outgoing for outgoing in sent if not outgoing.is_done_by(deadline)]

        if late:
            self._stall_since(departures)

        return [outgoing for outgoing in sent if outgoing in late or outgoing.error is not None]

    def ask(self) -> None:
        """Let the writing thread find out at once whether Redis is there; does not wait for it."""
        with self._buffer.changed:
            self._writer.ask()

    def flush(self, timeout: float) -> bool:
        """Wait until everything sent so far has left the buffer, at most ``timeout`` seconds.

        :return: whether it has.
        """
        return self._buffer.wait_until_left(self.issued, timeout)

    def close(self, timeout: float) -> None:
        """Take nothing more, flush, stop writing; what could not be written is logged by id."""
        with self._buffer.changed:
            self._closed = True

        try:
            self.flush(timeout)
        finally:
            self._writer.end()

    def leave(self) -> None:
        """Let what waits be written, and the writing thread end by itself."""
        self._writer.leave()

    def disown(self) -> None:
        """In a forked child: end what came along of it, which for greenlets is everything."""
        self._closed = True
        self._writer.disown()

    @property
    def is_writing_thread(self) -> bool:
        """Whether the calling thread is the one that writes."""
        return self._writer.is_this_thread

    def _lane(self, name: str) -> Lane:
        lane = self._lanes.get(name)

        if lane is None:
            seal = self._codec.seal(self._config.service, name)
            lane = Lane(name=name, key=self._keys.key(name), seal=seal)
            lane = self._lanes.setdefault(name, lane)

        return lane

    def _take_down(self, name: str, payload: Mapping[str, Any], *, confirm: bool) -> Outgoing:
        lane = self._lane(name)
        attributes = self._causes(lane)
        data = self._codec.pack_payload(payload)
        outgoing = Outgoing(lane, data, attributes, confirm=confirm)
        self._check_size(outgoing)
        return outgoing

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

    def _check_size(self, outgoing: Outgoing) -> None:
        if outgoing.size > self._config.max_event_bytes:
            raise PayloadError(
                f"An event of {outgoing.lane.name!r} would have up to {outgoing.size:,} bytes, "
                f"more than the {self._config.max_event_bytes:,} of 'EVENTBUS_MAX_EVENT_BYTES'. "
                "Send less, for example a reference to where the data is, or raise the limit in "
                "every service."
            )

    # -- into the buffer ------------------------------------------------------------------

    def _accept(self, outgoing: Outgoing) -> None:
        with self._buffer.changed:
            self._refuse_in_outage(outgoing)
            dropped = self._make_room(outgoing)
            self._identify(outgoing)
            self._buffer.put(outgoing)
            self._writer.wake()

        if dropped:
            self._tell_dropped(dropped)

        self._writer.write_here(self._patience)

    @property
    def _patience(self) -> float:
        """Seconds that a caller is held: once the timeout, and not at all in a known outage."""
        return 0.0 if self._outage.known else self._config.timeout

    def _refuse_in_outage(self, outgoing: Outgoing) -> None:
        if self._config.on_outage == "raise" and self._outage.known and not outgoing.promised:
            raise self._refusal(outgoing)

    def _identify(self, outgoing: Outgoing) -> None:
        number = next(self._numbers)
        outgoing.identify(self._node, number, time.time_ns())

        # Another one may have been sent in the middle of this, by a signal handler.
        if number > self.issued:
            self.issued = number

    def _make_room(self, outgoing: Outgoing) -> int:
        """Wait for room while Redis takes events; drop the oldest while it does not."""
        has_room = self._buffer.has_room(outgoing.size) or self._room_comes(outgoing.size)

        if self._closed:
            raise ClosedError

        if has_room:
            return 0

        self._refuse_in_outage(outgoing)
        return self._drop_for(outgoing.size)

    def _room_comes(self, size: int) -> bool:
        if self._outage.known or self._writer.is_this_thread:
            return False

        departures = self._buffer.departures
        in_time = self._buffer.wait_for_room(size, self._config.timeout)

        if not in_time:
            self._stall_since(departures)

        return in_time

    def _drop_for(self, size: int) -> int:
        dropped = 0

        while not self._buffer.has_room(size) and (oldest := self._buffer.drop_oldest()):
            oldest.finish(PublishError("The buffer was full.", event_id=oldest.id))
            dropped += 1

        return dropped

    def _tell_dropped(self, count: int) -> None:
        self._counters.add("dropped", count)

        if not self._outage.overflowed:
            self._outage.overflowed = True
            logger.error(
                "The buffer is full with %d events of %d bytes: from now on the oldest are dropped "
                "until Redis takes events again. health() counts them.",
                self.buffered,
                self._buffer.bytes,
            )

        # Whoever is told may send, and so be the reason that another one is dropped.
        if getattr(self._telling, "now", False):
            return

        self._telling.now = True

        try:
            tell(events_dropped, self._config.service, where="buffer", count=count)
        finally:
            self._telling.now = False

    # -- confirmation ---------------------------------------------------------------------

    def _await(self, outgoing: Outgoing, done: threading.Event) -> None:
        if self._writer.is_this_thread:
            return

        departures = self._buffer.departures

        if not done.wait(self._patience):
            self._stall_since(departures)

            if self._config.on_outage == "raise":
                outgoing.withdrawn = True
                raise self._refusal(outgoing)
        elif outgoing.error is not None:
            raise PublishError(
                f"The event {outgoing.id} of {outgoing.lane.name!r} was not published: "
                f"{outgoing.error}",
                event_id=outgoing.id,
            ) from outgoing.error

    def _stall_since(self, departures: int) -> None:
        """Hold no further caller, and let an idle writer ask whether Redis is there.

        Unless something has left meanwhile: then Redis takes events, if slowly.
        """
        with self._buffer.changed:
            if self._buffer.departures == departures:
                self._outage.stalled = True
                self._buffer.changed.notify_all()

    def _refusal(self, outgoing: Outgoing) -> PublishError:
        reason = self._outage.error or f"no answer within {self._config.timeout} s"
        which = f"The event {outgoing.id}" if outgoing.id else "An event"
        return PublishError(
            f"{which} of {outgoing.lane.name!r} was not confirmed by Redis: {reason}. Send it "
            "again when Redis is back, or set 'EVENTBUS_ON_OUTAGE' to 'buffer' to keep events in "
            "memory.",
            event_id=outgoing.id or None,
        )


def _chain(name: str, cause: Event, limit: int) -> str:
    return (
        f"An event of {name!r} would be number {cause.hops + 2} of a chain: "
        f"{cause.correlation_id or cause.id} began it, ... -> {cause.name!r} from "
        f"{cause.source!r} ({cause.id}) -> {name!r}. 'EVENTBUS_MAX_HOPS' allows {limit} hops. "
        "Find the receivers that answer each other's signals and break the circle."
    )
