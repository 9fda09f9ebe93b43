"""Accept events from ``send()``, buffer them, and wait for confirmations."""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import length_hint
from typing import Any

from .. import ending
from ..coroutines import in_thread
from ..ending import notice_fork
from ..errors import PublishError
from ..logs import get_logger
from ..routing.routes import Route
from ..transport.connections import Context
from .buffer import Buffer
from .message import Message, MessageBuilder, TooFewReplicasError
from .outage import Outage, PublishReport, unconfirmed, unpublished
from .writer import Writer

logger = get_logger(__name__)


class ClosedError(Exception):
    """The publisher is closed; send the event with the node's new publisher."""


class Sending:
    """The sending half of a node: publishes its events with the current publisher.

    It lives as long as its node. :meth:`open` gives it a publisher at each start of the node, and
    in each forked child.

    :param trace: see :class:`Publisher`.
    :param under_test: returns True while the program is under test; ``None`` if it never is.
    """

    def __init__(
        self, *, trace: Callable[[], str | None] | None, under_test: Callable[[], bool] | None
    ) -> None:
        self._trace = trace
        self._under_test = under_test
        #: True once the warning was logged that a test publishes nothing.
        self._test_is_logged = False
        self._finalizer: weakref.finalize[..., Sending] | None = None

    def open(
        self, context: Context, *, hold: Callable[[str, Mapping[str, Any], Route], bool]
    ) -> None:
        """Create the publisher of one process and one start; events sent from now on go to it.

        :param hold: keeps an event for a database transaction, or returns False.
        """
        self._config, self._connections = context.config, context.connections
        self._hold = hold
        # It may outlive the node, so it must not keep the context, which refers to the registry.
        self.publisher = Publisher(context, trace=self._trace, resend=_resending(self))

        # The publisher writes its buffer and ends once the node is garbage collected.
        if self._finalizer is not None:
            self._finalizer.detach()

        self._finalizer = weakref.finalize(self, _orphan, self.publisher)
        self._finalizer.atexit = False

    def emit(self, name: str, payload: Mapping[str, Any], route: Route) -> None:
        """Publish one emission of a signal, as its route says."""
        # The check of notice_fork(), without its call.
        if ending.page is None or not ending.page[0]:
            notice_fork()

        if not ((route.outbox or route.after_commit) and self._hold(name, payload, route)):
            self.publish(name, payload, route, confirm=route.confirm)

    async def emit_async(self, name: str, payload: Mapping[str, Any], route: Route) -> None:
        """Publish one emission as :meth:`emit` does, without blocking the event loop."""
        notice_fork()

        # A database session belongs to the thread of the event loop.
        if (route.outbox or route.after_commit) and self._hold(name, payload, route):
            return None

        if self.must_not_publish() or not self.publisher.may_wait(route):
            self.publish(name, payload, route, confirm=route.confirm)
            return None

        # Encode the payload now: other tasks may change it while this one waits.
        message = self.publisher.build(name, payload, route, confirm=route.confirm)
        return await in_thread(
            lambda: self.resend(message),
            failed=lambda error: logger.error(
                "A task that sent an event of %r was cancelled, and publishing it failed later: %s",
                name,
                error,
            ),
        )

    def publish(self, name: str, payload: Mapping[str, Any], route: Route, *, confirm: bool) -> str:
        """Publish an event and return its id.

        :param confirm: True to wait until Redis has the event.
        """
        # The second check of must_not_publish(), without its call.
        if self._under_test is not None and self._under_test() and self.must_not_publish():
            # Encode it, so that a payload that cannot be encoded still raises.
            return self.publisher.encode(name, payload, route).id

        while True:
            publisher = self.publisher
            message = publisher.build(name, payload, route, confirm=confirm)

            try:
                publisher.publish(message)
                return message.id
            except ClosedError:
                logger.debug("%r was sent during a stop; the next publisher takes it.", name)

    def resend(self, message: Message) -> None:
        """Publish an unconfirmed event again, with the same id and bytes.

        :raises PublishError: Redis did not confirm it this time either.
        """
        notice_fork()

        while True:
            try:
                return self.publisher.resend(message)
            except ClosedError:
                logger.debug("%r is sent again during a stop.", message.route_state.name)

    def publish_pending(self, message: Message, deadline: float) -> None:
        """Publish an event that waited for a commit; see :meth:`Publisher.publish_pending`."""
        while True:
            try:
                return self.publisher.publish_pending(message, deadline)
            except ClosedError:
                logger.debug(
                    "%r left during a stop; the next publisher takes it.", message.route_state.name
                )
            except PublishError as error:
                # The buffer has no room for this event, but may have room for the next.
                return message.finish(error)

    def must_not_publish(self) -> bool:
        """Return True in a test that must not publish; log a warning the first time."""
        config, connections = self._config, self._connections

        if self._under_test is None or not self._under_test():
            return False

        if config.publish_in_tests or connections.in_memory:
            return False

        if not self._test_is_logged:
            self._test_is_logged = True
            logger.warning(
                "The app of %r is under test (TESTING): its events are not published to %s. Use "
                "the fixture 'eventbus', or set 'EVENTBUS_PUBLISH_IN_TESTS' to True.",
                config.service,
                connections.shown,
            )

        return True


def _resending(sending: Sending) -> Callable[[Message], None]:
    """Return a function that publishes an event again, and holds ``sending`` weakly."""
    reference = weakref.ref(sending)

    def resend(message: Message) -> None:
        found = reference()

        if found is None:
            raise RuntimeError(f"The bus that sent the event {message.id} no longer exists.")

        found.resend(message)

    return resend


#: Publishers of garbage collected nodes that still have buffered events.
orphaned: set[Publisher] = set()


def _orphan(publisher: Publisher) -> None:
    """Let the publisher of a garbage collected node write its buffered events."""
    publisher.leave()
    orphaned.difference_update([other for other in list(orphaned) if not other.buffered])

    if publisher.buffered:
        orphaned.add(publisher)


class Publisher:
    """Buffers and publishes the events of a node, in the order in which they were sent.

    A forked child does not use it, but creates a publisher of its own.

    :param trace: returns the W3C trace context of the current request; ``None`` without requests.
    :param resend: sends an event again with the node's current publisher.
    """

    def __init__(
        self,
        context: Context,
        *,
        trace: Callable[[], str | None] | None,
        resend: Callable[[Message], None],
    ) -> None:
        self._config = config = context.config
        self._resend = resend
        self._node = context.node
        self._builder = MessageBuilder(config, context.codec, trace=trace)
        self.build = self._builder.build
        #: The numbers of the next events; several threads may take one at the same moment.
        self._numbers = iter(range(1, sys.maxsize))
        self._buffer = Buffer(most_events=config.buffer_size)
        self._outage = Outage(config.service, context.timing.max_writer_backoff)
        self._report = PublishReport(context, self._outage)
        self._writer = Writer(
            context, buffer=self._buffer, outage=self._outage, report=self._report
        )
        self._closed = False
        #: True if ``send()`` raises during an outage.
        self._raises = config.on_outage == "raise"
        #: Ids of the threads that currently wait for a confirmation.
        self._senders: set[int] = set()

    @property
    def connected(self) -> bool:
        """Return True if no outage is known."""
        return not self._outage.known

    @property
    def issued(self) -> int:
        """Highest event number that has been assigned."""
        return sys.maxsize - 1 - length_hint(self._numbers)

    @property
    def buffered(self) -> int:
        """Number of events in the buffer, those in flight included."""
        return len(self._buffer)

    def publish(self, message: Message) -> None:
        """Publish an event of :attr:`build`; wait until Redis has it, if it is to be confirmed.

        :raises PublishError: Redis is away and the policy is ``"raise"``; or the event must be
            confirmed, and Redis refused it or too few replicas have it; or it is a stream event,
            and the buffer is full.
        :raises ClosedError: the publisher is closed.
        """
        buffer, writer = self._buffer, self._writer

        if message.wakeup is not None or writer.thread is None or not buffer.has_much_room(message):
            self._publish_with_lock(message)
            return

        if self._raises:
            self._refuse_in_outage(message)

        message.assign_id(self._node, next(self._numbers), time.time_ns())
        buffer.put(message)

        # Only now: if the publisher is closed later, close() finds the event.
        if self._closed and buffer.take_back(message):
            raise ClosedError

        if writer.thread_waits:
            # A sender that uses the connection looks at the queues when it is done.
            if writer.owner is None:
                writer.wake_thread()
        elif writer.thread is None:
            # The thread could not be started after all.
            self._write_here(message)

    def resend(self, message: Message) -> None:
        """Publish an unconfirmed event again, with the same id and the same encoded bytes.

        :raises PublishError: the event was not confirmed again.
        :raises ClosedError: the publisher is closed.
        """
        self.publish(self._adopt(message.copy()))

    def may_wait(self, route: Route) -> bool:
        """Return True if sending an event of a route may block, for Redis or for buffer space."""
        waits = route.confirm or self._buffer.is_full(self._config.max_event_bytes)
        return waits and not self._stops(route.via == "stream")

    def prepare_pending(self, name: str, payload: Mapping[str, Any], route: Route) -> Message:
        """Prepare an event that waits for a commit; publish it with :meth:`publish_pending`.

        :raises PayloadError: a value cannot be encoded, or the event is too large.
        :raises HopLimitError: the chain of causes is too long.
        :raises PublishError: Redis is away and the policy is ``"raise"``.
        """
        message = self.build(name, payload, route, confirm=route.confirm)
        self._refuse_in_outage(message)
        message.promise(time.time_ns())
        return message

    def encode(self, name: str, payload: Mapping[str, Any], route: Route) -> Message:
        """Return an encoded event with an id, for another process to publish.

        It has no ``seq``, because the order in which other processes publish is unknown.

        :raises PayloadError: a value cannot be encoded, or the event is too large.
        :raises HopLimitError: the chain of causes is too long.
        """
        message = self.build(name, payload, route, confirm=False)
        message.assign_id(self._node, next(self._numbers), time.time_ns())
        message.encoded()
        return message

    def publish_pending(self, message: Message, deadline: float) -> None:
        """Publish an event of :meth:`prepare_pending`, also one of the node's former publisher.

        :param deadline: monotonic time until which to wait for buffer space.
        :raises PublishError: it is a stream event, and the buffer is full.
        :raises ClosedError: the publisher is closed.
        """
        self._accept(self._adopt(message), deadline)

    def _adopt(self, message: Message) -> Message:
        """Let an event of the node's former publisher count among those of this one."""
        state = message.route_state
        message.route_state = self._builder.route_state(state.name, state.route)
        return message

    def wait_for_confirmations(self, sent: Sequence[Message], deadline: float) -> list[Message]:
        """Wait for the confirmations of events; return the unconfirmed ones.

        The wait is shorter if Redis is known to be away.

        :param deadline: monotonic time.
        """
        if self._is_busy_here:
            return []

        departures = self._buffer.departures

        try:
            self._writer.senders.update(sent)
            late = [message for message in sent if not self._is_done(message, deadline)]
        finally:
            self._writer.senders.difference_update(sent)

        if any(not self._stops(message.route_state.is_stream) for message in late):
            self._stall_since(departures)

        return [message for message in sent if message in late or message.error is not None]

    def _is_done(self, message: Message, deadline: float) -> bool:
        """Return True if an event has a result by ``deadline``, or its sender does not wait."""
        if self._stops(message.route_state.is_stream):
            deadline = 0.0

        while message.wakeup is not None and not message.is_finished:
            if not message.wait_for_wakeup(deadline) or self._outage.refuses(message):
                return message.is_finished

        return True

    def probe(self) -> None:
        """Make the writer thread check at once whether Redis is available; do not wait for it."""
        with self._buffer.lock:
            self._writer.probe()

    def flush(self, timeout: float) -> bool:
        """Wait until all events sent so far have left the buffer, at most ``timeout`` seconds.

        :return: True if they have left.
        """
        return self._buffer.wait_until_left(self.issued, timeout)

    def close(self, flush_by: float, end_by: float) -> None:
        """Accept no more events, flush the buffer, and end the writer.

        Events that could not be written are logged with their ids.

        :param flush_by: monotonic time until which buffered events are written.
        :param end_by: monotonic time until which to wait for the writer thread.
        """
        with self._buffer.lock:
            self._closed = True

        flushed = False

        try:
            flushed = self.flush(max(0.0, flush_by - time.monotonic()))
        finally:
            self._writer.end(end_by, flushed=flushed)

    def leave(self) -> None:
        """Let the writer thread write the buffered events and then end; do not wait for it."""
        self._writer.leave()

    def disown(self) -> None:
        """Close the copy of the parent's publisher; call it in a forked child."""
        self._closed = True
        self._writer.disown()

    @property
    def is_writing_thread(self) -> bool:
        """Return True if the calling thread currently writes."""
        return self._writer.is_this_thread

    def _publish_with_lock(self, message: Message) -> None:
        # A signal handler that interrupts another send in this thread must not wait itself.
        if message.wakeup is None or self._is_busy_here:
            self._accept(message)
        else:
            self._publish_confirmed(message)

    def _accept(self, message: Message, deadline: float | None = None) -> None:
        """Add an event to the buffer, and wake the writer thread.

        :param deadline: monotonic time until which to wait for buffer space; ``None`` for the
            timeout of the settings.
        """
        writer = self._writer

        with self._buffer.lock:
            dropped = self._put(message, deadline)

            if writer.thread_waits or writer.thread is None:
                writer.wake()

        if dropped:
            self._report.report_dropped(dropped, self._buffer)

        if writer.thread is None:
            self._write_here(message)

    def _write_here(self, message: Message) -> None:
        """Write the buffered events in the calling thread, because there is no writer thread."""
        is_away = self._stops(message.route_state.is_stream)
        self._writer.write_here(0.0 if is_away else time.monotonic() + self._config.timeout)

    def _put(self, message: Message, deadline: float | None) -> int:
        """Add an event to the buffer; return the number of events dropped for it.

        :param deadline: see :meth:`_accept`.
        """
        if self._raises:
            self._refuse_in_outage(message)

        if self._closed:
            raise ClosedError

        buffer = self._buffer
        has_room = buffer.has_much_room(message) or buffer.has_room(message)
        dropped = 0 if has_room else self._make_room(message, deadline)

        if not message.number:
            message.assign_id(self._node, next(self._numbers), time.time_ns())

        if not message.is_finished:
            buffer.put(message)

        return dropped

    def _stops(self, is_stream: bool) -> bool:
        """Return True if stream events, or channel events, cannot be published now."""
        outage = self._outage
        return outage.stalled or outage.away or (is_stream and outage.refusal is not None)

    def _refuse_in_outage(self, message: Message) -> None:
        if self._raises and not message.promised and self._stops(message.route_state.is_stream):
            raise self._refusal(message)

    def _make_room(self, message: Message, deadline: float | None) -> int:
        """Wait for buffer space while Redis is available; else drop the oldest channel events.

        If only stream events are queued, a channel event is itself dropped, and a stream event is
        refused.

        :return: the number of dropped events.
        """
        has_room = self._room_comes(message, deadline)

        if self._closed:
            raise ClosedError

        if has_room:
            return 0

        self._refuse_in_outage(message)
        message.assign_id(self._node, next(self._numbers), time.time_ns())

        if not self._buffer.has_room(message, drops_channels=True):
            if message.route_state.is_stream:
                raise self._no_room(message)

            message.assign_seq()
            message.finish(PublishError("The buffer was full.", event_id=message.id))
            return 1

        dropped = 0

        while not self._buffer.has_room(message) and (oldest := self._buffer.drop_oldest()):
            oldest.finish(PublishError("The buffer was full.", event_id=oldest.id))
            dropped += 1

        return dropped

    def _room_comes(self, message: Message, deadline: float | None) -> bool:
        is_away = self._stops(message.route_state.is_stream)

        if is_away or self._writer.is_this_thread:
            return False

        departures = self._buffer.departures
        left = self._config.timeout

        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())

        in_time = self._buffer.wait_for_room(message, left)

        if not in_time:
            self._stall_since(departures)

        return in_time

    @property
    def _is_busy_here(self) -> bool:
        """Return True if the calling thread must not wait for a confirmation.

        It waits for one already, writes, or holds the lock that other threads need to write.
        """
        this = threading.get_ident()
        return this in self._senders or self._writer.is_this_thread or self._buffer.is_locked_here

    def _publish_confirmed(self, message: Message) -> None:
        is_away = self._stops(message.route_state.is_stream)
        deadline = time.monotonic() + (0.0 if is_away else self._config.timeout)
        departures = self._buffer.departures
        this = threading.get_ident()

        try:
            # Inside the try block, so that an interrupt cannot leave this thread marked as busy.
            self._senders.add(this)
            self._writer.senders.add(message)

            with self._buffer.lock:
                dropped = self._put(message, deadline)
                message.may_write = True
                leads = self._writer.enlist(message)

            if dropped:
                self._report.report_dropped(dropped, self._buffer)

            has_result = self._writer.finish(message, deadline, leads=leads)
        except BaseException:
            self._writer.abandon(message)
            raise
        finally:
            self._senders.discard(this)
            self._writer.senders.discard(message)

        if not has_result:
            self._give_up(message, departures)
        elif message.error is not None:
            raise self._error(message, unpublished(message, message.error)) from message.error

    def _give_up(self, message: Message, departures: int) -> None:
        """End the wait of a sender.

        :raises PublishError: the policy is ``"raise"``.
        """
        if self._outage.refuses(message):
            with self._buffer.lock:
                self._writer.wake()
        else:
            self._stall_since(departures)

        if self._raises:
            self._buffer.withdraw(message)
            raise self._refusal(message)

    def _stall_since(self, departures: int) -> None:
        """Mark Redis as stalled, so that no other sender waits and the writer checks Redis.

        If events have left since, Redis is slow but available: only wake the writer.

        :param departures: :attr:`.Buffer.departures` at the start of the wait.
        """
        with self._buffer.lock:
            if self._buffer.departures == departures:
                self._outage.stalled = True

            # The next batch may have been assigned to this sender.
            self._writer.wake()

    def _refusal(self, message: Message) -> PublishError:
        reason = str(self._outage.error or f"no answer within {self._config.timeout} s").rstrip(".")
        return self._error(message, unconfirmed(message, reason))

    def _no_room(self, message: Message) -> PublishError:
        reason = self._outage.error or "Redis does not answer"
        return self._error(
            message,
            f"The event {message.id} of {message.route_state.name!r} was not accepted: {reason}, "
            f"and the buffer is full with {len(self._buffer)} stream events, which are never "
            "dropped. Send it again when Redis is back, or raise 'EVENTBUS_BUFFER_SIZE'.",
        )

    def _error(self, message: Message, text: str) -> PublishError:
        # An event that waits for a commit belongs to its transaction, so it has no resend().
        is_pending = message.route_state.route.after_commit and not message.id
        is_stored = isinstance(message.error, TooFewReplicasError)
        return PublishError(
            text,
            event_id=message.id or None,
            in_doubt=is_stored or message.unanswered > 0,
            resend=None if is_pending else functools.partial(self._resend, message),
        )
