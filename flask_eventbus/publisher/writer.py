"""Write the buffered events to Redis, a batch in each round trip."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import redis

from ..ending import process_ends
from ..logs import get_logger
from ..transport.connection import OUTAGE, is_refused
from ..transport.connections import Context
from ..transport.reconnect import Backoff
from .buffer import Buffer
from .connection import PublishConnection
from .message import Message, NoWritesError, TooFewReplicasError
from .outage import Outage, PublishReport

logger = get_logger(__name__)

#: Largest size of a round trip in bytes, so that a batch of large events meets the timeout.
BATCH_BYTES = 1024 * 1024

#: Factor by which batches shrink after a failure, and grow after a success. Small batches may
#: succeed on a connection that breaks during large ones.
BATCH_STEP = 8

#: Largest batch in bytes that a sender writes itself. It fits into the socket buffer of an idle
#: connection, so that sending does not block.
LEAD_BYTES = 16 * 1024

#: Seconds that the writer has to write the buffered events after its node is gone.
LEAVE = 5.0

#: Errors caused by an event, as opposed to Redis or a signal handler.
DEFECTS = (TypeError, ValueError, OverflowError, redis.RedisError)


class Writer:
    """Writes the events of a buffer in order, one batch at a time; one thread at a time writes.

    The writer thread starts with the first event. A sender that waits for a confirmation writes a
    batch itself, its own event included, if the connection is free. This saves the switch to the
    writer thread and back. Once the sender has the replies, it sends the next batch on behalf of
    another waiting sender, and only then wakes the senders of its own batch. The other sender reads
    the replies to the next batch, and so on.

    If a sender reaches its deadline or meets an outage, the writer thread takes over: it reads
    the missing replies, or sends the batch again. If an exception interrupts a sender, for example
    in a signal handler, the writer thread sends the batch in flight again. If no thread can be
    started, for example at the end of a process, every sender writes.

    :param buffer: the events; its lock guards the state of the writer as well.
    """

    def __init__(
        self, context: Context, *, buffer: Buffer, outage: Outage, report: PublishReport
    ) -> None:
        self._timing = timing = context.timing
        self._connection = PublishConnection(
            context.connections, context.config, timeout=timing.write_timeout
        )
        self._buffer = buffer
        self._outage = outage
        self._counters = context.counters
        self._log_events = context.config.log_events
        self._report = report
        self._node = context.node
        self._changed = buffer.changed
        self._lock = buffer.lock
        #: The writer thread; ``None`` until it has started.
        self.thread: threading.Thread | None = None
        #: The events whose senders wait for a confirmation.
        self.senders: set[Message] = set()
        #: Who may use the connection: the writer thread, or the sender of this event; ``None`` if
        #: it is free. The thread that frees it looks at the queues, or wakes the writer thread: a
        #: sender that adds an event without the lock wakes no thread while the connection is used.
        self.owner: Message | threading.Thread | None = None
        #: Id of the thread that uses the connection; 0 if none does.
        self._user = 0
        #: True once another sender has sent the batch in flight on behalf of the owner.
        self._is_sent = False
        #: The batch whose replies are read. It leaves the buffer if a stop gives it up meanwhile.
        self._sent: Sequence[Message] = ()
        #: True if the writer thread must continue with a batch that a sender started.
        self._is_handed_over = False
        #: The error of the batch that was handed over; ``None`` if only replies are missing.
        self._failure: Exception | None = None
        #: True while the writer thread waits for work, or is about to wait.
        self.thread_waits = False
        #: Wakes the writer thread. A lock is faster than a condition. A sender releases it without
        #: holding another lock, so the woken thread does not wait for that sender.
        self._wakeup = threading.Lock()
        self._wakeup.acquire()
        self._batch_events = timing.batch_events
        #: True to check Redis now, without waiting for the next attempt.
        self._probing = False
        #: True to end immediately, even if events are buffered.
        self._ended = False
        #: Monotonic time at which the writer ends; it ends earlier if the buffer is empty.
        #: ``None`` to run without an end.
        self._leave_by: float | None = None
        #: Held by the sender that writes because there is no writer thread.
        self._here = threading.Lock()
        #: Id of that sender's thread; 0 without one.
        self._here_user = 0

    @property
    def is_this_thread(self) -> bool:
        """Return True if the calling thread is the writer thread, or currently writes."""
        this, thread = threading.get_ident(), self.thread
        return self._user == this or (thread is not None and thread.ident == this)

    def wake(self) -> None:
        """Start the writer thread, or wake it if it waits and the connection is free.

        The caller holds the lock.
        """
        if self.thread is None:
            self._start()
        elif self.thread_waits and self.owner is None:
            self.wake_thread()

    def wake_thread(self) -> None:
        """Wake the writer thread; it needs no lock."""
        self.thread_waits = False

        try:
            self._wakeup.release()
        except RuntimeError:
            return  # it was woken before, and has not run yet

    def probe(self) -> None:
        """Make the writer thread check at once whether Redis is available."""
        self._probing = True

        if self.thread is None:
            self._start()
        else:
            self.wake_thread()

    def enlist(self, message: Message) -> bool:
        """Return True if the sender of a buffered event must write now: see :meth:`finish`.

        Return False and wake the writer thread if another thread writes already, or if Redis may
        be away. The caller holds the lock.
        """
        if self._is_sent and self.owner is message:
            self._user = threading.get_ident()
            return True

        if self._may_lead:
            return self._begin(message)

        self.wake()
        return False

    def finish(self, message: Message, deadline: float, *, leads: bool) -> bool:
        """Return True if a sender's event has a result by ``deadline``; write batches until then.

        Return False early if Redis is known not to accept the event. The writer thread then takes
        over what the sender had to write.

        :param deadline: monotonic time at which the writer thread takes over.
        :param leads: the result of :meth:`enlist`.
        """
        if not leads and self.thread is None:
            self.write_here(deadline)

        while leads or not message.is_finished:
            if leads:
                self._lead(deadline)
                leads = False
            elif not message.wait_for_wakeup(deadline):
                break
            elif not message.is_finished:
                if self._outage.refuses(message):
                    break

                with self._lock:
                    leads = self.enlist(message)

        # A sender that owns the connection here was to write for others: its own event is dropped.
        if self.owner is message or not message.is_finished:
            with self._lock:
                message.may_write = False

                # A thread that is sending on its behalf checks ``may_write`` afterwards.
                if self._is_sent and self.owner is message:
                    self._hand_over(None)

        return message.is_finished

    def abandon(self, message: Message) -> None:
        """Let the writer thread send the batch of an interrupted sender again."""
        with self._lock:
            message.may_write = False

            if self.owner is None:
                self._release_to_thread()
            elif self._user == threading.get_ident():
                # This thread may have been sending on behalf of another sender.
                self._send_again()
            elif self._is_sent and self.owner is message:
                self._hand_over(None)

    def write_here(self, deadline: float) -> None:
        """Write all buffered events in the calling thread, because there is no writer thread.

        Return at once if another sender does so already. At the end of the process, wait for that
        sender: its thread may be stopped for good before it comes to the events of others.

        :param deadline: monotonic time at which to give up.
        """
        this = threading.get_ident()

        while not self._buffer.is_empty:
            waits = process_ends.is_set() and self._here_user != this
            left = max(0.0, deadline - time.monotonic()) if waits else 0.0

            if not self._here.acquire(timeout=left):
                return

            leave_by, self._leave_by = self._leave_by, deadline
            self._here_user = this

            try:
                self._run()
            finally:
                # The next event may start a writer thread, which must not end by this deadline.
                self._leave_by = leave_by
                self._here_user = 0
                self._here.release()

    def leave(self) -> None:
        """End once the buffered events are written, or after :data:`LEAVE` seconds."""
        self._leave_by = time.monotonic() + LEAVE
        self.wake_thread()

    def end(self, deadline: float, *, flushed: bool) -> None:
        """End now; log the ids of events that could not be written.

        :param deadline: monotonic time until which to wait for the thread.
        :param flushed: see :meth:`.Buffer.clear`.
        """
        self._ended = True
        self.wake_thread()
        thread = self.thread

        # A signal handler may find a thread that is not started yet: it ends by itself.
        if thread is not None and thread.is_alive():
            # The thread may be waiting for a server that hangs.
            thread.join(timeout=max(0.0, (deadline - time.monotonic()) / 2))
            self._connection.interrupt()
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

        self._report_lost(flushed=flushed)

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
        except BaseException:
            # A signal handler has interrupted the start: the next event starts a thread again.
            if not self.thread.is_alive():
                self.thread = None

            raise

    @property
    def _may_lead(self) -> bool:
        """Return True if a sender may write: the writer thread is there and has nothing to do."""
        buffer = self._buffer
        return (
            self.owner is None
            and self.thread is not None
            and not self._probing
            and not self._ended
            and self._leave_by is None
            and self._connection.is_open
            and buffer.bytes <= LEAD_BYTES
            and not self._outage.stalled
            and not self._outage.away
        )

    def _begin(self, message: Message) -> bool:
        """Take a batch for the sender of an event; return False if no event can be written."""
        # Set this first: an interrupted sender with a batch in flight is recognized by it.
        self._user = threading.get_ident()
        self.owner = message

        if self._buffer.take(self._batch_events, BATCH_BYTES):
            return True

        # An event may have been added meanwhile, by a sender that saw the connection in use.
        self._release_to_thread()
        return False

    def _lead(self, deadline: float) -> None:
        """Send the batch in flight in the sender's thread, unless it is sent; read the replies.

        :param deadline: monotonic time at which the writer thread takes over.
        """
        try:
            if not self._is_sent:
                self._send(self._connection.connect(deadline))

            batch = self._sent
            is_complete = self._connection.read(deadline)
        except OUTAGE as error:
            self._hand_over(error)
        else:
            if is_complete:
                self._conclude(batch, deadline)
            else:
                self._hand_over(None)

    def _send(self, deadline: float) -> None:
        """Send the batch in flight."""
        self._sent = batch = self._buffer.mark_sent()
        events = []

        for message in batch:
            events.append((message.route_state.destination, message.encoded()))

        self._connection.send(events, deadline)

    def _conclude(self, batch: Sequence[Message], deadline: float) -> None:
        """Send the next batch for another sender, then report the results of a batch.

        The next batch is sent first, because Redis can work on it while the woken senders wait for
        the interpreter lock.

        :param deadline: monotonic time at which sending ends.
        """
        outcomes = self._connection.outcomes()

        try:
            self._note_success(batch)

            with self._lock:
                has_held = self._end_batch(batch, outcomes)
                following = self._pass_on()

            if following is not None:
                self._send_for(following, deadline)

            if has_held:
                self.wake_senders()
        finally:
            try:
                self._count(batch, outcomes)
                self._wake(batch, outcomes)
            except BaseException:
                # A signal handler has interrupted this sender; the others still need the result.
                self._wake(batch, outcomes)
                raise

    def _pass_on(self) -> Message | None:
        """Pass the connection to a waiting sender, or to the writer thread if it has work.

        :return: the event of the waiting sender; ``None`` if there is none.
        """
        if not self._has_work:
            return None

        following = self._buffer.next_sender() if self._may_lead else None

        if following is not None and self._begin(following):
            return following

        self._release_to_thread()
        return None

    def _send_for(self, following: Message, deadline: float) -> None:
        """Send the batch in flight; the sender of ``following`` then reads the replies."""
        failure = None

        try:
            self._send(self._connection.connect(deadline))
        except OUTAGE as error:
            failure = error
        except BaseException as error:
            count = len(self._buffer.in_flight)

            with self._lock:
                self._send_again()

            # An exception of a signal handler, such as a time limit, belongs to this sender.
            if not isinstance(error, DEFECTS):
                raise

            # The writer thread sends the batch again, and finds the event that causes the error.
            logger.debug("%d events were not sent: %s", count, error)
            return

        with self._lock:
            if failure is None and following.may_write:
                self._is_sent = True
                # Wake it while this thread still uses the connection: if a signal handler raises
                # here, the batch is sent again.
                following.wake()
                self._user = 0
            else:
                self._hand_over(failure)

    def _send_again(self) -> None:
        """Let the writer thread send the batch in flight again, on a new connection."""
        self._is_handed_over = False
        self._connection.close()
        self._buffer.put_back()
        self._release_to_thread()

    def _hand_over(self, error: Exception | None) -> None:
        """Pass the connection and the batch in flight to the writer thread.

        :param error: the error of the batch; ``None`` if only replies are missing.
        """
        with self._lock:
            self._is_handed_over = True
            self._failure = error
            self._user = 0
            self.owner = self.thread
            self.wake_thread()

    def _release(self) -> None:
        self.owner = None
        self._user = 0
        self._is_sent = False
        self._sent = ()

    def _release_to_thread(self) -> None:
        self._release()
        self.wake_thread()

    def _note_success(self, batch: Sequence[Message]) -> None:
        """End an outage, and let the batches grow."""
        outage = self._outage

        if outage.stalled or outage.away or outage.overflowed:
            outage.end(len(self._buffer))

        # A successful PING says nothing about the batch size.
        if batch:
            self._batch_events = min(self._timing.batch_events, self._batch_events * BATCH_STEP)

    def _end_batch(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> bool:
        """End the batch in flight and release the connection.

        Events that Redis may accept later return to the front of the queues.

        :return: True if there are such events.
        """
        held = []

        if any(outcomes):
            for message, error in zip(batch, outcomes, strict=True):
                if isinstance(error, NoWritesError):
                    # Redis answered this attempt; earlier ones may still be unanswered.
                    message.unanswered -= 1
                    held.append((message, error))

        if held:
            self._outage.refuse_writes(held[0][1], len(self._buffer))
            self._update_pause()
        elif self._outage.refusal is not None and _has_write(batch, outcomes):
            self._outage.take_writes(len(self._buffer))
            self._update_pause()

        self._buffer.finish([message for message, _ in held] if held else ())
        self._release()
        return bool(held)

    def _update_pause(self) -> None:
        """Pause stream events while Redis accepts no writes; channel events continue."""
        is_paused = self._outage.refusal is not None

        if is_paused != self._buffer.streams_paused:
            self._buffer.streams_paused = is_paused
            # The wait of the writer thread and the buffer space of senders depend on it.
            self.wake_thread()
            self._changed.notify_all()

    def _count(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """Count and log the results of a batch; then its senders may return.

        Events that Redis may accept later are skipped, because they are still queued.
        """
        published = len(batch)

        if any(outcomes):
            for message, error in zip(batch, outcomes, strict=True):
                if isinstance(error, NoWritesError):
                    published -= 1
                elif error is not None:
                    # Redis answered this attempt; earlier ones may still be unanswered.
                    message.unanswered -= 1
                    published -= not self._report.note(message, error)

        self._counters.add("published", published)

        if self._log_events:
            self._report.log_published(batch, outcomes)

    def _wake(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """Give each sender of a batch its result, unless Redis may accept the event later."""
        for message, error in zip(batch, outcomes, strict=True):
            # Without a waiting sender nobody asks for the result of a published event.
            if error is None and message.wakeup is None:
                continue

            if not isinstance(error, NoWritesError):
                message.finish(error)

        if self._outage.pending_lines:
            self._outage.log_changes()

    def wake_senders(self) -> None:
        """Wake all senders that wait for a confirmation, so that they notice the outage."""
        for message in list(self.senders):
            message.wake()

    def _run(self) -> None:
        backoff = Backoff(most=self._timing.max_writer_backoff)

        try:
            while (batch := self._take()) is not None:
                self._write(batch, backoff)
        finally:
            self._connection.close()

            with self._lock:
                if self._user == threading.get_ident():
                    self._release()

                if self.thread is threading.current_thread():
                    # It may have ended by the deadline of a sender that wrote because there was no
                    # thread. The next event starts another one, or one that was added meanwhile.
                    self.thread = None

                    if not (self._ended or self._leave_by is not None or self._buffer.is_empty):
                        self._start()

            # If a sender writes because there was no writer thread, the thread may wait as well.
            self.wake_thread()

        # Before that time the buffer was empty. An event that was added since is not lost.
        if self._leave_by is not None and (self._ended or time.monotonic() >= self._leave_by):
            self._report_lost()

    def _take(self) -> Sequence[Message] | None:
        """Wait for work, and return the next batch; an empty one to check Redis, ``None`` to end.

        Redis is checked after ``Timing.ping_after`` seconds without work. While it accepts no
        writes, the wait is no longer than until the next attempt.
        """
        most = self._timing.ping_after
        is_due = False

        while True:
            with self._lock:
                if self._user == threading.get_ident():
                    self._release()

                # Set before the look at the queues: a sender that adds an event without the lock
                # looks at it afterwards.
                self.thread_waits = True

                if self._is_handed_over or (self.owner is None and (is_due or self._has_work)):
                    return self._next_batch()

                left = self._outage.write_again_at - time.monotonic()

            is_due = not self._wakeup.acquire(timeout=left if 0 < left < most else most)

    def _next_batch(self) -> Sequence[Message] | None:
        """Take the connection, and return what :meth:`_take` does. The caller holds the lock."""
        self._user = threading.get_ident()
        self.owner = threading.current_thread()
        self.thread_waits = self._probing = False

        if self._is_handed_over:
            return self._buffer.in_flight

        if self._should_end:
            return None

        # After an outage, check Redis first, so that listeners can reconnect before events.
        if self._outage.away:
            return ()

        if time.monotonic() >= self._outage.write_again_at:
            return self._buffer.take(1, BATCH_BYTES, tries_stream=True)

        return self._buffer.take(self._batch_events, BATCH_BYTES)

    @property
    def _has_work(self) -> bool:
        """Return True if the writer thread has something to do."""
        buffer, outage = self._buffer, self._outage
        return bool(
            buffer.channels.events
            or (buffer.streams.events and not buffer.streams_paused)
            or self._probing
            or outage.stalled
            or outage.away
            or time.monotonic() >= outage.write_again_at
            or ((self._ended or self._leave_by is not None) and self._should_end)
        )

    @property
    def _should_end(self) -> bool:
        if self._leave_by is None or self._ended:
            return self._ended

        return self._buffer.is_empty or time.monotonic() >= self._leave_by

    def _write(self, batch: Sequence[Message], backoff: Backoff) -> None:
        try:
            outcomes = self._publish(batch)
        except OUTAGE as error:
            self._batch_events = max(1, self._batch_events // BATCH_STEP)
            self._buffer.put_back()
            self._outage.begin(error, len(self._buffer))

            # After a broken connection the next one may work: then the senders keep waiting.
            if is_refused(error):
                self.wake_senders()

            self._pause(backoff.next())
        except Exception as error:
            self._give_up(self._buffer.in_flight, error)
        else:
            if self._outage.away:
                backoff.tries = 0

                # Let listeners reconnect before buffered channel events are sent.
                if self._buffer.channels.events:
                    self._pause(self._timing.listeners_return)

            self._note_success(batch)
            self._finish(self._sent, outcomes)

    def _publish(self, batch: Sequence[Message]) -> Sequence[Exception | None]:
        """Return the result of each event that was sent; of an empty batch, check Redis.

        :raises redis.ConnectionError: this thread, or the sender that started the batch, met an
            outage.
        """
        if self._is_handed_over:
            error, self._failure, self._is_handed_over = self._failure, None, False

            if error is not None:
                self._connection.close()
                raise error

            deadline = time.monotonic() + self._connection.timeout
        elif batch:
            deadline = self._connection.connect(self._leave_by)
            self._send(deadline)
        else:
            self._check()
            return ()

        return self._connection.wait_for_outcomes(deadline)

    def _check(self) -> None:
        """Check whether Redis accepts writes.

        If it seems to, and stream events are queued, make the next attempt to write due now.
        """
        refusal = self._connection.probe(self._leave_by)
        outage = self._outage

        with self._lock:
            if refusal is not None:
                outage.refuse_writes(refusal, len(self._buffer))
            elif outage.refusal is not None and self._buffer.streams.events:
                outage.write_now()
            elif outage.refusal is not None:
                outage.take_writes(len(self._buffer))

            self._update_pause()

        outage.log_changes()

        if refusal is not None:
            self.wake_senders()

    def _give_up(self, batch: Sequence[Message], error: Exception) -> None:
        """Handle an unexpected error: retry the events one by one, then drop the faulty one."""
        if len(batch) > 1:
            self._batch_events = 1
            self._buffer.put_back()
            return

        self._report.report_defect(error)
        self._finish(batch, [error] * len(batch))

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds

        while not (self._should_end or self._probing):
            end = deadline if self._leave_by is None else min(deadline, self._leave_by)
            left = end - time.monotonic()

            # The wakeup may be an old one: then wait again.
            if left <= 0 or not self._wakeup.acquire(timeout=left):
                return

    def _finish(self, batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> None:
        """End a batch, release the connection, and then wake the senders, which may write."""
        # flush() returns once the batch has ended.
        self._count(batch, outcomes)

        with self._lock:
            has_held = self._end_batch(batch, outcomes)

        if has_held:
            self.wake_senders()

        self._wake(batch, outcomes)

    def _report_lost(self, *, flushed: bool = False) -> None:
        reason = self._outage.error or "the time to flush was over"
        self._report.report_lost(self._buffer.clear(flushed=flushed), reason)


def _has_write(batch: Sequence[Message], outcomes: Sequence[Exception | None]) -> bool:
    """Return True if Redis stored an event of the batch in a stream."""
    return any(
        message.route_state.is_stream and (error is None or isinstance(error, TooFewReplicasError))
        for message, error in zip(batch, outcomes, strict=True)
    )
