"""The thread that writes what waits in the buffer, a batch in one round trip."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

import redis

from ..ending import process_ends
from ..logs import get_logger
from ..transport.connections import OUTAGE, is_refused
from ..transport.reconnect import Backoff
from .buffer import Buffer
from .connection import PublishConnection
from .message import Message, NoWritesError, TooFewReplicasError
from .outage import MOST_BACKOFF, Outage, PublishReport

logger = get_logger(__name__)

#: Bytes that a sender writes itself: so few that a connection at rest takes them at once, and
#: only the answer is waited for.
LEAD_BYTES = 16 * 1024


class WritingThread(Protocol):
    """What a leader asks of the thread; the buffer's lock is held."""

    @property
    def thread(self) -> threading.Thread | None:
        """The thread, once there is one."""

    @property
    def is_idle_thread(self) -> bool:
        """Whether it is there, and nothing waits that only it does."""

    @property
    def has_work(self) -> bool:
        """Whether there is something that it has to do."""

    def wake(self) -> None:
        """Tell that there is something to write."""

    def wake_senders(self) -> None:
        """Wake the senders that wait for a confirmation."""


#: What writing raises where an event, and not Redis or a signal handler, is to blame.
DEFECTS = (TypeError, ValueError, OverflowError, redis.RedisError)


class Leader:
    """Lets a sender who waits for a confirmation write, its own event among what waits.

    When it has the answers, it sends what came meanwhile as well, before it wakes anybody; one
    of those senders waits for the answers to that, and so on. Only when that takes too long, or
    fails, the thread goes on with it: reads the answers that are missing, or sends the batch again.

    An exception may strike a sender anywhere. Then the thread sends what was in hand anew.
    """

    def __init__(
        self,
        *,
        connection: PublishConnection,
        buffer: Buffer,
        right: WriteRight,
        outage: Outage,
        report: PublishReport,
        writer: WritingThread,
    ) -> None:
        self._connection = connection
        self._buffer = buffer
        self._right = right
        self._outage = outage
        self._report = report
        self._writer = writer
        self._lock = buffer.lock

    def enlist(self, message: Message) -> Sequence[Message]:
        """The batch that the sender of an event in the buffer is to :meth:`lead`, now.

        Nothing where somebody writes already, or Redis may not be there: then the thread will.
        The buffer's lock is held.
        """
        if self._is_sent_for(message):
            return self._right.resume()

        if not self._may_lead:
            self._writer.wake()
            return ()

        return self._begin(message)

    def lead(self, batch: Sequence[Message], deadline: float) -> None:
        """Write a batch, if it is not sent yet, in a sender's thread, and wait for the answers.

        When there are none by ``deadline``, the thread goes on to wait for them.
        """
        try:
            if batch is not self._right.sent:
                batch = self._send(deadline)

            is_complete = self._connection.read(deadline)
        except OUTAGE as error:
            self._hand_over(error)
        else:
            if is_complete:
                self._conclude(batch, deadline)
            else:
                self._hand_over(None)

    def step_back(self, message: Message) -> None:
        """When a sender waits no longer: let the thread do what it was to do."""
        with self._lock:
            message.may_write = False

            # While something is being sent for it, whoever sends looks at this afterwards.
            if self._is_sent_for(message):
                self._hand_over(None)

    def abandon(self, message: Message) -> None:
        """When a sender was interrupted: let the thread send anew what it may have been writing."""
        with self._lock:
            message.may_write = False

            if self._right.owner is None:
                self._right.release_to_thread()
            elif self._right.is_here:
                # It may be another's turn, for which this thread was to send.
                self._right.is_sending = False
                self._send_anew()
            elif self._is_sent_for(message):
                self._hand_over(None)

    @property
    def _may_lead(self) -> bool:
        return (
            self._right.owner is None
            and self._writer.is_idle_thread
            and self._connection.is_open
            and self._buffer.bytes <= LEAD_BYTES
            and not self._outage.stops_all
        )

    def _is_sent_for(self, message: Message) -> bool:
        return self._right.owner is message and not self._right.is_sending

    def _send(self, deadline: float) -> Sequence[Message]:
        """Send what is in hand, and return it."""
        self._connection.connect(deadline)
        batch = self._buffer.mark_sent()
        self._connection.send(
            [(message.route_state.destination, message.encoded()) for message in batch], deadline
        )
        return batch

    def _begin(self, message: Message) -> Sequence[Message]:
        """Take what waits in hand, for the sender of an event to write."""
        self._right.acquire(message)
        batch = self._right.take()

        if not batch:
            self._right.release()

        return batch

    def _conclude(self, batch: Sequence[Message], deadline: float) -> None:
        """Send what came meanwhile, and tell the senders of a batch what became of it.

        Sending takes until the deadline at most.

        In this order: who is woken needs the interpreter, and Redis does not.
        """
        outcomes = self._connection.outcomes()

        try:
            self._outage.end(len(self._buffer))

            with self._lock:
                self._right.grow()
                holds = self._right.finish(batch, outcomes)
                following = self._pass_on()

            if following is not None:
                self._send_for(following, deadline)

            if holds:
                self._writer.wake_senders()
        finally:
            try:
                self._report.record(batch, outcomes)
                self._outage.log_changes()
            except BaseException:
                # This sender was interrupted, which does it for all of them.
                for message, error in zip(batch, outcomes, strict=True):
                    if not isinstance(error, NoWritesError):
                        message.finish(error)

                raise

    def _pass_on(self) -> Message | None:
        """Give the turn to a sender that waits, or else to the thread if it has to write."""
        waits = self._buffer.is_waiting
        following = self._buffer.next_sender() if waits and self._may_lead else None

        if following is not None:
            self._right.is_sending = True

            if self._begin(following):
                return following

            self._right.is_sending = False

        if self._writer.has_work:
            self._right.release_to_thread()

        return None

    def _send_for(self, following: Message, deadline: float) -> None:
        """Send what is in hand, and let the sender whose turn it is wait for the answers."""
        batch, failure = self._buffer.in_flight, None

        try:
            batch = self._send(deadline)
        except OUTAGE as error:
            failure = error
        except BaseException as error:
            with self._lock:
                self._right.is_sending = False
                self._send_anew()

            # A time limit that a signal handler keeps is this sender's, whatever it was doing.
            if not isinstance(error, DEFECTS):
                raise

            # The thread meets it again, and finds out which event it is.
            logger.debug("%d events were not sent: %s", len(batch), error)
            return

        with self._lock:
            self._right.is_sending = False
            self._right.sent = batch

            if failure is None and following.may_write:
                following.wake()
                self._right.leave_to_sender()
            else:
                self._hand_over(failure)

    def _send_anew(self) -> None:
        """Let the thread send what is in hand once more, on another connection."""
        self._right.is_handed_over = False
        self._connection.close()
        self._buffer.put_back()
        self._right.release_to_thread()

    def _hand_over(self, error: Exception | None) -> None:
        with self._lock:
            self._right.hand_over(self._writer.thread, error)


#: Events in one round trip.
BATCH_EVENTS = 512

#: Bytes in one round trip, so that a batch of large events fits into the timeout.
BATCH_BYTES = 1024 * 1024

#: By what a batch shrinks that did not get through, and grows again after one that did: a
#: connection that breaks in the middle of a large one lets a small one pass.
BATCH_STEP = 8


class WriteRight:
    """Nobody's, the writing thread's, or that of a sender who waits: one at a time has it.

    The buffer's lock is held by whoever begins a turn, ends it or passes it on.

    :param buffer: what is written.
    """

    def __init__(self, buffer: Buffer, outage: Outage) -> None:
        self._buffer = buffer
        self._outage = outage
        #: Whose it is: the thread's, or that of the sender of an event.
        self.owner: Message | threading.Thread | None = None
        #: The thread that writes for it.
        self._thread_id = 0
        #: Whether something is being sent for its owner, by another sender; and what was.
        self.is_sending = False
        self.sent: Sequence[Message] = ()
        #: Whether the thread is to go on with a batch that a sender began, and what went wrong.
        self.is_handed_over = False
        self.failure: Exception | None = None
        #: Whether the thread waits for something to do.
        self.thread_waits = False
        self._batch_events = BATCH_EVENTS

    @property
    def is_here(self) -> bool:
        """Whether the calling thread writes."""
        return self._thread_id == threading.get_ident()

    def acquire(self, owner: Message | threading.Thread) -> None:
        """It is the owner's, and the calling thread writes."""
        # First: who is interrupted with something in hand is known by this.
        self._thread_id = threading.get_ident()
        self.owner = owner

    def take(self) -> Sequence[Message]:
        """Take in hand what waits, as much as one round trip is to carry."""
        return self._buffer.take(most_events=self._batch_events, most_bytes=BATCH_BYTES)

    def take_stream_event(self) -> Sequence[Message]:
        """Take in hand one event, to find out whether Redis takes stream events again."""
        return self._buffer.take_stream_event()

    def resume(self) -> Sequence[Message]:
        """In the thread of its owner, after another sent what is in hand: that."""
        self._thread_id = threading.get_ident()
        return self._buffer.in_flight

    def leave_to_sender(self) -> None:
        """What is in hand was sent; its owner waits for the answers."""
        self._thread_id = 0

    def release(self) -> None:
        """It is nobody's."""
        self.owner = None
        self._thread_id = 0
        self.sent = ()

    def finish(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> bool:
        """Let go of what is in hand, and of the turn.

        What Redis does not take now goes back to the heads of the lines.

        :return: whether there is something of that.
        """
        held = []

        if any(outcomes):
            held = [
                (message, error)
                for message, error in zip(batch, outcomes, strict=True)
                if isinstance(error, NoWritesError)
            ]

        for message, _ in held:
            # An answer leaves no doubt, except about earlier tries.
            message.unanswered -= 1

        if held:
            self._outage.refuse_writes(held[0][1], len(self._buffer))
        elif self._outage.refusal is not None and _has_write(batch, outcomes):
            self._outage.take_writes(len(self._buffer))

        self._buffer.finish([message for message, _ in held])
        self.update_pause()
        self.release()
        return bool(held)

    def note_writes(self, refusal: Exception | None) -> None:
        """Note whether Redis takes writes; where events wait for that, one is tried at once."""
        if refusal is not None:
            self._outage.refuse_writes(refusal, len(self._buffer))
        elif self._outage.refusal is None:
            return
        elif self._buffer.has_stream_events:
            self._outage.write_now()
        else:
            self._outage.take_writes(len(self._buffer))

        self.update_pause()

    def update_pause(self) -> None:
        """Hold stream events while Redis takes no writes; channel events go on."""
        holds = self._outage.refusal is not None

        if holds != self._buffer.streams_paused:
            self._buffer.streams_paused = holds
            # The thread waits as long as the state says, and senders may have room.
            self._buffer.changed.notify_all()

    def release_if_here(self) -> None:
        """It is nobody's, if the calling thread had it."""
        if self.is_here:
            self.release()

    def wake_thread(self) -> None:
        """Let the thread do what there is to do, if it waits and nobody else does it."""
        if self.thread_waits and self.owner is None:
            self._wake_thread()

    def release_to_thread(self) -> None:
        """It is nobody's, and the thread looks what there is to do."""
        self.release()
        self._wake_thread()

    def hand_over(self, thread: threading.Thread | None, error: Exception | None) -> None:
        """Let the thread go on with what is in hand.

        :param error: what went wrong with it; ``None`` if answers are missing.
        """
        self.is_handed_over = True
        self.failure = error
        self._thread_id = 0
        self.owner = thread
        self._wake_thread()

    def take_over(self) -> Exception | None:
        """In the thread: what went wrong with what was handed over."""
        error, self.failure, self.is_handed_over = self.failure, None, False
        return error

    def grow(self) -> None:
        """A batch got through: the next may be larger."""
        self._batch_events = min(BATCH_EVENTS, self._batch_events * BATCH_STEP)

    def shrink(self) -> None:
        """A batch did not get through: the next is to be smaller."""
        self._batch_events = max(1, self._batch_events // BATCH_STEP)

    def go_one_by_one(self) -> None:
        """One event of a batch is to blame: find out which."""
        self._batch_events = 1

    def _wake_thread(self) -> None:
        self.thread_waits = False
        self._buffer.changed.notify_all()


def _has_write(batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> bool:
    """Return True if Redis took an event into a stream."""
    return any(
        message.route_state.is_stream and (error is None or isinstance(error, TooFewReplicasError))
        for message, error in zip(batch, outcomes, strict=True)
    )


#: Seconds a round trip may take before Redis counts as away.
WRITE_TIMEOUT = 2.0

#: Seconds from Redis's return to the first event that waited: a little more than the
#: longest wait of a listener before it connects again.
LISTENERS_RETURN = 1.5

#: Seconds without events after which Redis is asked whether it is there: so that the next
#: event does not have to find out, and no connection is cut for its silence.
QUIET = 5.0

#: Seconds that a writer has for what waits when the one it writes for is gone.
LEAVE = 5.0


class Writer:
    """Writes what a buffer holds, in order; starts its thread with the first event.

    Who sends and waits for a confirmation need not wait for the thread as well: such senders
    are its :attr:`leader`. Where no thread can be had, as at the end of a process, whoever sends
    writes.

    :param connection: writes one batch.
    :param buffer: what it writes; the buffer's lock guards the writer's state as well.
    """

    def __init__(
        self,
        *,
        connection: PublishConnection,
        buffer: Buffer,
        outage: Outage,
        report: PublishReport,
        node: str,
    ) -> None:
        self._connection = connection
        self._buffer = buffer
        self._right = WriteRight(buffer, outage)
        self._outage = outage
        self._report = report
        self._node = node
        self._changed = buffer.changed
        self._lock = buffer.lock
        #: The thread, once there is one.
        self.thread: threading.Thread | None = None
        #: The events whose senders wait for a confirmation.
        self.senders: set[Message] = set()
        #: Whether to try Redis now, whatever it waits for.
        self._probing = False
        #: Whether it is to end, whatever waits.
        self._ended = False
        #: When it ends, or before if nothing waits any more; ``None`` for never.
        self._leave_by: float | None = None
        #: Held by a thread that writes in place of the writing thread.
        self._here = threading.Lock()
        #: Lets senders write in place of the thread.
        self.leader = Leader(
            connection=connection,
            buffer=buffer,
            right=self._right,
            outage=outage,
            report=report,
            writer=self,
        )

    @property
    def is_this_thread(self) -> bool:
        """Whether the calling thread is the one that writes."""
        thread = self.thread
        return self._right.is_here or (thread is not None and thread.ident == threading.get_ident())

    @property
    def is_idle_thread(self) -> bool:
        """Whether the thread is there, and nothing waits that only it does."""
        return (
            self.thread is not None
            and not self._probing
            and not self._ended
            and self._leave_by is None
        )

    @property
    def has_work(self) -> bool:
        """Whether there is something that the thread has to do."""
        return (
            self._is_to_end
            or self._buffer.is_waiting
            or self._probing
            or self._outage.stops_all
            or self._outage.write_is_due
        )

    def wake(self) -> None:
        """Tell that there is something to write."""
        if self.thread is None:
            self._start()
        else:
            self._right.wake_thread()

    def probe(self) -> None:
        """Find out at once whether Redis is there."""
        self._probing = True
        self.wake()
        self._changed.notify_all()

    def write_here(self, timeout: float) -> None:
        """Where there is no thread: write in this one. One at a time does it for all."""
        if self.thread is not None:
            return

        while not self._buffer.is_empty and self._here.acquire(blocking=False):
            leave_by, self._leave_by = self._leave_by, time.monotonic() + timeout

            try:
                self._run()
            finally:
                # A thread may be had for the next event, and is to stay.
                self._leave_by = leave_by
                self._here.release()

    def leave(self) -> None:
        """End once what waits is written, or after :data:`LEAVE` seconds."""
        with self._changed:
            self._leave_by = time.monotonic() + LEAVE
            self._changed.notify_all()

    def end(self, deadline: float) -> None:
        """End now; what could not be written is logged by id.

        :param deadline: when the thread is no longer waited for.
        """
        with self._changed:
            self._ended = True
            self._changed.notify_all()

        if self.thread is not None:
            # It may be waiting for a server that hangs.
            self._join((time.monotonic() + deadline) / 2)
            self._connection.interrupt()
            self._join(deadline)

        self._report_lost()

    def _join(self, deadline: float) -> None:
        if self.thread is not None:
            self.thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """In a forked child: end what came along of it, which for greenlets is everything."""
        self._ended = True
        self._buffer = Buffer(most_events=0)
        self._outage.disown()

    def _start(self) -> None:
        if process_ends.is_set():
            return

        name = f"eventbus-writer-{self._node}"
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

        try:
            self.thread.start()
        except RuntimeError as error:
            # At the end of a process, or when it has all the threads that it may have.
            logger.debug("There is no thread to write in: %s", error)
            self.thread = None

    def _run(self) -> None:
        backoff = Backoff(most=MOST_BACKOFF)

        try:
            while (batch := self._take()) is not None:
                self._write(batch, backoff)
        finally:
            self._connection.close()

            with self._lock:
                self._right.release_if_here()

        if self._leave_by is not None:
            self._report_lost()

    def _take(self) -> Sequence[Message] | None:
        """The next batch, an empty one to ask whether Redis is there; ``None`` at the end."""
        with self._changed:
            self._wait_for_work()
            self._right.acquire(threading.current_thread())
            self._right.thread_waits = self._probing = False

            if self._right.is_handed_over:
                return self._buffer.in_flight

            if self._is_to_end:
                return None

            # While Redis is away it is asked first: no event is sent ahead of its listeners.
            if self._outage.away:
                return ()

            if self._outage.write_is_due:
                return self._right.take_stream_event()

            return self._right.take()

    def _wait_for_work(self) -> None:
        """Wait until there is something to do, for :data:`QUIET` seconds at most.

        Less while Redis takes no writes: until it is to be asked again.
        """
        self._right.release_if_here()

        while not self._may_work:
            # Before each wait: a sender may have taken over what the thread was woken for.
            self._right.thread_waits = True
            was_woken = self._changed.wait(self._longest_wait)

            if not was_woken and self._right.owner is None:
                return

    @property
    def _longest_wait(self) -> float:
        left = self._outage.write_again_at - time.monotonic()
        return left if 0 < left < QUIET else QUIET

    @property
    def _may_work(self) -> bool:
        return self._right.is_handed_over or (self._right.owner is None and self.has_work)

    @property
    def _is_to_end(self) -> bool:
        if self._leave_by is None or self._ended:
            return self._ended

        return self._buffer.is_empty or time.monotonic() >= self._leave_by

    def _write(self, batch: Sequence[Message], backoff: Backoff) -> None:
        try:
            outcomes = self._publish_batch(batch)
        except OUTAGE as error:
            self._right.shrink()
            self._buffer.put_back()
            self._outage.begin(error, len(self._buffer))

            # A connection that breaks is no proof of an outage: the next one may work.
            if is_refused(error):
                self.wake_senders()

            self._pause(backoff.next())
        except Exception as error:
            self._give_up(self._buffer.in_flight, error)
        else:
            backoff.reset()
            self._give_way()
            self._outage.end(len(self._buffer))

            # That an empty one got through says nothing.
            if batch:
                self._right.grow()

            self._settle(self._buffer.in_flight, outcomes)

    def wake_senders(self) -> None:
        """Wake the senders that wait for a confirmation: Redis is known not to give one."""
        for message in list(self.senders):
            message.wake()

    def _publish_batch(self, batch: Sequence[Message]) -> Sequence[Exception | None]:
        if self._right.is_handed_over:
            return self._go_on()

        if batch:
            deadline = self._connection.connect(self._leave_by)
            events = [
                (message.route_state.destination, message.encoded())
                for message in self._buffer.mark_sent()
            ]
            return self._connection.publish(events, deadline)

        refusal = self._connection.probe(self._leave_by)

        with self._lock:
            self._right.note_writes(refusal)

        self._outage.log_changes()

        if refusal is not None:
            self.wake_senders()

        return ()

    def _go_on(self) -> Sequence[Exception | None]:
        """Read what is missing of the answers to what a sender wrote."""
        error = self._right.take_over()

        if error is not None:
            self._connection.close()
            raise error

        self._connection.read()
        return self._connection.outcomes()

    def _give_way(self) -> None:
        """Let listeners return before what waited for Redis is sent: they hear no past."""
        if self._outage.away and self._buffer.has_channel_events:
            self._pause(LISTENERS_RETURN)

    def _give_up(self, batch: Sequence[Message], error: Exception) -> None:
        """After a defect, not an outage: of several events, find the one that is to blame."""
        if len(batch) > 1:
            self._right.go_one_by_one()
            self._buffer.put_back()
            return

        self._report.report_defect(error)
        self._settle(batch, [error] * len(batch))

    def _pause(self, seconds: float) -> None:
        now = time.monotonic()
        end = now + seconds
        deadline = end if self._leave_by is None else min(end, self._leave_by)

        with self._changed:
            self._changed.wait_for(
                lambda: self._is_to_end or self._probing or time.monotonic() >= deadline,
                timeout=max(0.0, deadline - now),
            )

    def _settle(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """Let go of a batch, and of the turn, before its senders are woken: they may write next."""
        with self._lock:
            holds = self._right.finish(batch, outcomes)

        if holds:
            self.wake_senders()

        self._report.record(batch, outcomes)
        self._outage.log_changes()

    def _report_lost(self) -> None:
        reason = self._outage.error or "the time to flush was over"
        self._report.report_lost(self._buffer.clear(), reason)
