"""Write the buffered events to Redis, a batch in each round trip.

One thread at a time writes: the writer thread (:class:`Writer`), or a sender that waits for a
confirmation (:class:`Leader`). :class:`WriteRight` records which of them it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import redis

from ..ending import process_ends
from ..logs import get_logger
from ..timing import Timing
from ..transport.connection import OUTAGE, is_refused
from ..transport.reconnect import Backoff
from .buffer import Buffer
from .connection import PublishConnection
from .message import Message, NoWritesError, TooFewReplicasError
from .outage import Outage, PublishReport

logger = get_logger(__name__)

#: Largest batch in bytes that a sender writes itself. It fits into the socket buffer of an idle
#: connection, so that sending does not block.
LEAD_BYTES = 16 * 1024


#: Errors caused by an event, as opposed to Redis or a signal handler.
DEFECTS = (TypeError, ValueError, OverflowError, redis.RedisError)


class Leader:
    """Lets a sender that waits for a confirmation write a batch, its own event included.

    This saves the switch to the writer thread and back. Once the sender has the replies, it sends
    the next batch on behalf of another waiting sender, and only then wakes the senders of its own
    batch. The other sender reads the replies to the next batch, and so on.

    If a sender reaches its deadline or meets an outage, the writer thread takes over: it reads
    the missing replies, or sends the batch again. If an exception interrupts a sender, for example
    in a signal handler, the writer thread sends the batch in flight again.
    """

    def __init__(
        self,
        *,
        connection: PublishConnection,
        buffer: Buffer,
        right: WriteRight,
        outage: Outage,
        report: PublishReport,
        writer: Writer,
    ) -> None:
        self._connection = connection
        self._buffer = buffer
        self._right = right
        self._outage = outage
        self._report = report
        self._writer = writer
        self._lock = buffer.lock

    def enlist(self, message: Message) -> Sequence[Message]:
        """Return the batch that the sender of a buffered event must :meth:`lead` now.

        Return an empty batch and wake the writer thread if another thread writes already, or if
        Redis may be away. The caller holds the buffer's lock.
        """
        if self._is_sent_for(message):
            return self._right.resume()

        if not self._may_lead:
            self._writer.wake()
            return ()

        return self._begin(message)

    def lead(self, batch: Sequence[Message], deadline: float) -> None:
        """Write a batch in the sender's thread, unless it is sent already, and read the replies.

        :param deadline: monotonic time at which the writer thread takes over.
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
        """Let the writer thread take over from a sender that stops waiting."""
        with self._lock:
            message.may_write = False

            # A thread that is sending on its behalf checks ``may_write`` afterwards.
            if self._is_sent_for(message):
                self._hand_over(None)

    def abandon(self, message: Message) -> None:
        """Let the writer thread send the batch of an interrupted sender again."""
        with self._lock:
            message.may_write = False

            if self._right.owner is None:
                self._right.release_to_thread()
            elif self._right.is_here:
                # This thread may have been sending on behalf of another sender.
                self._right.is_sending = False
                self._send_again()
            elif self._is_sent_for(message):
                self._hand_over(None)

    @property
    def _may_lead(self) -> bool:
        return (
            self._right.owner is None
            and self._writer.allows_leading
            and self._connection.is_open
            and self._buffer.bytes <= LEAD_BYTES
            and not self._outage.stops_all
        )

    def _is_sent_for(self, message: Message) -> bool:
        return self._right.owner is message and not self._right.is_sending

    def _send(self, deadline: float) -> Sequence[Message]:
        """Send the batch in flight, and return it."""
        until = self._connection.connect(deadline)
        batch = self._buffer.mark_sent()
        self._connection.send(
            [(message.route_state.destination, message.encoded()) for message in batch], until
        )
        return batch

    def _begin(self, message: Message) -> Sequence[Message]:
        """Acquire the right to write for the sender of an event, and take a batch."""
        self._right.acquire(message)
        batch = self._right.take()

        if not batch:
            self._right.release()

        return batch

    def _conclude(self, batch: Sequence[Message], deadline: float) -> None:
        """Send the next batch for another sender, then report the results of a batch.

        The next batch is sent first, because Redis can work on it while the woken senders wait for
        the interpreter lock.

        :param deadline: monotonic time at which sending ends.
        """
        outcomes = self._connection.outcomes()

        try:
            self._outage.end(len(self._buffer))

            with self._lock:
                self._right.grow()
                has_held = self._right.finish(batch, outcomes)
                following = self._pass_on()

            if following is not None:
                self._send_for(following, deadline)

            if has_held:
                self._writer.wake_senders()
        finally:
            try:
                self._report.record(batch, outcomes)
                self._outage.log_changes()
            except BaseException:
                # A signal handler has interrupted this sender; the others still need the result.
                for message, error in zip(batch, outcomes, strict=True):
                    if not isinstance(error, NoWritesError):
                        message.finish(error)

                raise

    def _pass_on(self) -> Message | None:
        """Pass the right to write to a waiting sender, or to the writer thread if it has work.

        :return: the event of the waiting sender; ``None`` if there is none.
        """
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
        """Send the batch in flight; the sender of ``following`` then reads the replies."""
        batch, failure = self._buffer.in_flight, None

        try:
            batch = self._send(deadline)
        except OUTAGE as error:
            failure = error
        except BaseException as error:
            with self._lock:
                self._right.is_sending = False
                self._send_again()

            # An exception of a signal handler, such as a time limit, belongs to this sender.
            if not isinstance(error, DEFECTS):
                raise

            # The writer thread sends the batch again, and finds the event that causes the error.
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

    def _send_again(self) -> None:
        """Let the writer thread send the batch in flight again, on a new connection."""
        self._right.is_handed_over = False
        self._connection.close()
        self._buffer.put_back()
        self._right.release_to_thread()

    def _hand_over(self, error: Exception | None) -> None:
        with self._lock:
            self._right.hand_over(self._writer.thread, error)


#: Largest size of a round trip in bytes, so that a batch of large events meets the timeout.
BATCH_BYTES = 1024 * 1024

#: Factor by which batches shrink after a failure, and grow after a success. Small batches may
#: succeed on a connection that breaks during large ones.
BATCH_STEP = 8


class WriteRight:
    """The exclusive right to use the write connection; held by the writer thread or one sender.

    The caller holds the buffer's lock to acquire the right, release it or pass it on.
    """

    def __init__(self, buffer: Buffer, outage: Outage, batch_events: int) -> None:
        self._buffer = buffer
        self._outage = outage
        #: The holder: the writer thread, or the event whose sender writes; ``None`` if it is free.
        self.owner: Message | threading.Thread | None = None
        #: Id of the thread that uses the connection; 0 if none does.
        self._thread_id = 0
        #: True while another sender is sending a batch on behalf of the owner.
        self.is_sending = False
        #: The batch that another sender has sent on behalf of the owner.
        self.sent: Sequence[Message] = ()
        #: True if the writer thread must continue with a batch that a sender started.
        self.is_handed_over = False
        #: The error of the batch that was handed over; ``None`` if only replies are missing.
        self.failure: Exception | None = None
        #: True while the writer thread waits for work.
        self.thread_waits = False
        self._batch_events = self._max_batch_events = batch_events

    @property
    def is_here(self) -> bool:
        """Return True if the calling thread uses the connection."""
        return self._thread_id == threading.get_ident()

    def acquire(self, owner: Message | threading.Thread) -> None:
        """Give the right to ``owner``; the calling thread uses the connection."""
        # Set this first: an interrupted sender with a batch in flight is recognized by it.
        self._thread_id = threading.get_ident()
        self.owner = owner

    def take(self) -> Sequence[Message]:
        """Take the next batch from the buffer."""
        return self._buffer.take(self._batch_events, BATCH_BYTES)

    def take_stream_event(self) -> Sequence[Message]:
        """Take one stream event, to check whether Redis accepts writes again."""
        return self._buffer.take_stream_event()

    def resume(self) -> Sequence[Message]:
        """Return the batch that another sender has sent; call it in the owner's thread."""
        self._thread_id = threading.get_ident()
        return self._buffer.in_flight

    def leave_to_sender(self) -> None:
        """Leave the batch that was sent to its owner, which reads the replies."""
        self._thread_id = 0

    def release(self) -> None:
        """Release the right."""
        self.owner = None
        self._thread_id = 0
        self.sent = ()

    def finish(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> bool:
        """End the batch in flight and release the right.

        Events that Redis may accept later return to the front of the queues.

        :return: True if there are such events.
        """
        held = []

        if any(outcomes):
            held = [
                (message, error)
                for message, error in zip(batch, outcomes, strict=True)
                if isinstance(error, NoWritesError)
            ]

        for message, _ in held:
            # Redis answered this attempt; earlier ones may still be unanswered.
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
        """Record whether Redis accepts writes.

        If it seems to, and stream events are queued, make the next attempt to write due now.

        :param refusal: why Redis accepts no writes; ``None`` if it seems to.
        """
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
        """Pause stream events while Redis accepts no writes; channel events continue."""
        is_paused = self._outage.refusal is not None

        if is_paused != self._buffer.streams_paused:
            self._buffer.streams_paused = is_paused
            # The wait of the writer thread and the buffer space of senders depend on it.
            self._buffer.changed.notify_all()

    def release_if_here(self) -> None:
        """Release the right if the calling thread uses the connection."""
        if self.is_here:
            self.release()

    def wake_thread(self) -> None:
        """Wake the writer thread if it waits and the right is free."""
        if self.thread_waits and self.owner is None:
            self._wake_thread()

    def release_to_thread(self) -> None:
        """Release the right, and wake the writer thread."""
        self.release()
        self._wake_thread()

    def hand_over(self, thread: threading.Thread | None, error: Exception | None) -> None:
        """Pass the right and the batch in flight to the writer thread.

        :param error: the error of the batch; ``None`` if only replies are missing.
        """
        self.is_handed_over = True
        self.failure = error
        self._thread_id = 0
        self.owner = thread
        self._wake_thread()

    def take_over(self) -> Exception | None:
        """Accept a batch in the writer thread; return its error, or ``None``."""
        error, self.failure, self.is_handed_over = self.failure, None, False
        return error

    def grow(self) -> None:
        """Increase the batch size after a success."""
        self._batch_events = min(self._max_batch_events, self._batch_events * BATCH_STEP)

    def shrink(self) -> None:
        """Reduce the batch size after a failure."""
        self._batch_events = max(1, self._batch_events // BATCH_STEP)

    def go_one_by_one(self) -> None:
        """Reduce the batch size to one event, to find the event that causes an error."""
        self._batch_events = 1

    def _wake_thread(self) -> None:
        self.thread_waits = False
        self._buffer.changed.notify_all()


def _has_write(batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> bool:
    """Return True if Redis stored an event of the batch in a stream."""
    return any(
        message.route_state.is_stream and (error is None or isinstance(error, TooFewReplicasError))
        for message, error in zip(batch, outcomes, strict=True)
    )


#: Seconds that the writer has to write the buffered events after its node is gone.
LEAVE = 5.0


class Writer:
    """Writes the events of a buffer in order; its thread starts with the first event.

    Senders that wait for a confirmation can write as well: see :attr:`leader`. If no thread can
    be started, for example at the end of a process, every sender writes.

    :param connection: writes one batch at a time.
    :param buffer: the events; its lock guards the state of the writer as well.
    :param node: id of the node, for the name of the thread.
    """

    def __init__(
        self,
        *,
        connection: PublishConnection,
        buffer: Buffer,
        outage: Outage,
        report: PublishReport,
        node: str,
        timing: Timing,
    ) -> None:
        self._timing = timing
        self._connection = connection
        self._buffer = buffer
        self._right = WriteRight(buffer, outage, timing.batch_events)
        self._outage = outage
        self._report = report
        self._node = node
        self._changed = buffer.changed
        self._lock = buffer.lock
        #: The writer thread; ``None`` until it has started.
        self.thread: threading.Thread | None = None
        #: The events whose senders wait for a confirmation.
        self.senders: set[Message] = set()
        #: True to check Redis now, without waiting for the next attempt.
        self._probing = False
        #: True to end immediately, even if events are buffered.
        self._ended = False
        #: Monotonic time at which the writer ends; it ends earlier if the buffer is empty.
        #: ``None`` to run without an end.
        self._leave_by: float | None = None
        #: Held by the sender that writes because there is no writer thread.
        self._here = threading.Lock()
        #: Lets waiting senders write.
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
        """Return True if the calling thread is the writer thread, or currently writes."""
        thread = self.thread
        return self._right.is_here or (thread is not None and thread.ident == threading.get_ident())

    @property
    def allows_leading(self) -> bool:
        """Return True if a sender may write: the thread runs, and has nothing else to do."""
        return (
            self.thread is not None
            and not self._probing
            and not self._ended
            and self._leave_by is None
        )

    @property
    def has_work(self) -> bool:
        """Return True if the writer thread has something to do."""
        return (
            self._should_end
            or self._buffer.is_waiting
            or self._probing
            or self._outage.stops_all
            or self._outage.write_is_due
        )

    def wake(self) -> None:
        """Start or wake the writer thread."""
        if self.thread is None:
            self._start()
        else:
            self._right.wake_thread()

    def probe(self) -> None:
        """Make the writer thread check at once whether Redis is available."""
        self._probing = True
        self.wake()
        self._changed.notify_all()

    def write_here(self, timeout: float) -> None:
        """Write all buffered events in the calling thread if there is no writer thread.

        Return at once if another sender does so already.

        :param timeout: seconds after which to give up.
        """
        if self.thread is not None:
            return

        while not self._buffer.is_empty and self._here.acquire(blocking=False):
            leave_by, self._leave_by = self._leave_by, time.monotonic() + timeout

            try:
                self._run()
            finally:
                # The next event may start a writer thread, which must not end by this deadline.
                self._leave_by = leave_by
                self._here.release()

    def leave(self) -> None:
        """End once the buffered events are written, or after :data:`LEAVE` seconds."""
        with self._changed:
            self._leave_by = time.monotonic() + LEAVE
            self._changed.notify_all()

    def end(self, deadline: float) -> None:
        """End now; log the ids of events that could not be written.

        :param deadline: monotonic time until which to wait for the thread.
        """
        with self._changed:
            self._ended = True
            self._changed.notify_all()

        if self.thread is not None:
            # The thread may be waiting for a server that hangs.
            self._join((time.monotonic() + deadline) / 2)
            self._connection.interrupt()
            self._join(deadline)

        self._report_lost()

    def _join(self, deadline: float) -> None:
        if self.thread is not None:
            self.thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def disown(self) -> None:
        """End the copy of the parent's writer; call it in a forked child.

        With greenlets, the writer's thread is copied as well.
        """
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
            # The process is ending, or has reached its limit of threads.
            logger.debug("The writer thread cannot be started: %s", error)
            self.thread = None

    def _run(self) -> None:
        backoff = Backoff(most=self._timing.max_writer_backoff)

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
        """Return the next batch; an empty one to check Redis, ``None`` to end."""
        with self._changed:
            self._wait_for_work()
            self._right.acquire(threading.current_thread())
            self._right.thread_waits = self._probing = False

            if self._right.is_handed_over:
                return self._buffer.in_flight

            if self._should_end:
                return None

            # After an outage, check Redis first, so that listeners can reconnect before events.
            if self._outage.away:
                return ()

            if self._outage.write_is_due:
                return self._right.take_stream_event()

            return self._right.take()

    def _wait_for_work(self) -> None:
        """Wait until there is work, for ``Timing.ping_after`` seconds at most.

        While Redis accepts no writes, wait no longer than until the next attempt.
        """
        self._right.release_if_here()

        while not self._may_work:
            # Set before each wait, since a sender may have done the work of the last wakeup.
            self._right.thread_waits = True
            was_woken = self._changed.wait(self._longest_wait)

            if not was_woken and self._right.owner is None:
                return

    @property
    def _longest_wait(self) -> float:
        left = self._outage.write_again_at - time.monotonic()
        most = self._timing.ping_after
        return left if 0 < left < most else most

    @property
    def _may_work(self) -> bool:
        return self._right.is_handed_over or (self._right.owner is None and self.has_work)

    @property
    def _should_end(self) -> bool:
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

            # After a broken connection the next one may work: then the senders keep waiting.
            if is_refused(error):
                self.wake_senders()

            self._pause(backoff.next())
        except Exception as error:
            self._give_up(self._buffer.in_flight, error)
        else:
            backoff.tries = 0
            self._wait_for_listeners()
            self._outage.end(len(self._buffer))

            # A successful PING says nothing about the batch size.
            if batch:
                self._right.grow()

            self._finish(self._buffer.in_flight, outcomes)

    def wake_senders(self) -> None:
        """Wake all senders that wait for a confirmation, so that they notice the outage."""
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
        """Read the missing replies to a batch that a sender wrote.

        :raises redis.ConnectionError: the sender met an outage.
        """
        error = self._right.take_over()

        if error is not None:
            self._connection.close()
            raise error

        return self._connection.wait_for_outcomes(time.monotonic() + self._connection.timeout)

    def _wait_for_listeners(self) -> None:
        """Let listeners reconnect after an outage, before buffered channel events are sent."""
        if self._outage.away and self._buffer.has_channel_events:
            self._pause(self._timing.listeners_return)

    def _give_up(self, batch: Sequence[Message], error: Exception) -> None:
        """Handle an unexpected error: retry the events one by one, then drop the faulty one."""
        if len(batch) > 1:
            self._right.go_one_by_one()
            self._buffer.put_back()
            return

        self._report.report_defect(error)
        self._finish(batch, [error] * len(batch))

    def _pause(self, seconds: float) -> None:
        now = time.monotonic()
        end = now + seconds
        deadline = end if self._leave_by is None else min(end, self._leave_by)

        with self._changed:
            self._changed.wait_for(
                lambda: self._should_end or self._probing or time.monotonic() >= deadline,
                timeout=max(0.0, deadline - now),
            )

    def _finish(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """End a batch, release the right to write, and then wake the senders, which may write."""
        with self._lock:
            has_held = self._right.finish(batch, outcomes)

        if has_held:
            self.wake_senders()

        self._report.record(batch, outcomes)
        self._outage.log_changes()

    def _report_lost(self) -> None:
        reason = self._outage.error or "the time to flush was over"
        self._report.report_lost(self._buffer.clear(), reason)
