"""The thread that writes what waits in the buffer, a batch in one round trip."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from .backoff import Backoff
from .buffer import Buffer
from .connections import OUTAGE
from .ending import process_ends
from .exchange import Exchange
from .logs import get_logger
from .outage import Outage
from .outgoing import Outgoing
from .settlement import Settlement

logger = get_logger(__name__)

#: Events in one round trip.
BATCH_EVENTS = 512

#: Bytes in one round trip, so that a batch of large events fits into the timeout.
BATCH_BYTES = 1024 * 1024

#: By what a batch shrinks that did not get through, and grows again after one that did: a
#: connection that breaks in the middle of a large one lets a small one pass.
BATCH_STEP = 8

#: Seconds a round trip may take before Redis counts as away.
WRITE_TIMEOUT = 2.0

#: Seconds between tries at most: what waits in memory should not wait long after Redis is back.
MOST_BACKOFF = 2.0

#: Seconds from Redis's return to the first event that waited: a little more than the
#: longest wait of a listener before it connects again.
LISTENERS_RETURN = 1.5

#: Seconds without events after which Redis is asked whether it is there: so that the next
#: event does not have to find out, and no connection is cut for its silence.
QUIET = 5.0

#: Seconds that a writer has for what waits when the one it writes for is gone.
LEAVE = 5.0


#: Bytes that a sender writes itself: so few that a connection at rest takes them at once, and
#: only the answer is waited for.
LEAD_BYTES = 16 * 1024


class Writer:
    """Writes what a buffer holds, in order; starts its thread with the first event.

    Who sends and waits for a confirmation need not wait for the thread as well: where nobody
    writes, such a sender writes what waits, its own event among it. When it has the answers, it
    sends what came meanwhile as well, before it wakes anybody; one of those senders waits for the
    answers to that, and so on. Only when that takes too long, or fails, the thread goes on with
    it: reads the answers that are missing, or sends the batch again.

    Where no thread can be had, as at the end of a process, whoever sends writes.

    :param exchange: writes one batch.
    :param buffer: what it writes; the buffer's lock guards the writer's state as well.
    """

    def __init__(
        self,
        *,
        exchange: Exchange,
        buffer: Buffer,
        outage: Outage,
        settlement: Settlement,
        node: str,
    ) -> None:
        self._exchange = exchange
        self._buffer = buffer
        self._outage = outage
        self._settlement = settlement
        self._node = node
        self._changed = buffer.changed
        self._lock = buffer.lock
        self._thread: threading.Thread | None = None
        self._idle = False
        #: Who writes now: the thread, or the event whose sender does; and in which thread.
        self._turn: Outgoing | threading.Thread | None = None
        self._turn_of = 0
        #: Whether something is being sent for the event whose turn it is, by another's sender;
        #: and what was.
        self._sending = False
        self._sent: Sequence[Outgoing] = ()
        #: Whether the thread is to go on with a batch that a sender began, and what went wrong.
        self._begun = False
        self._failure: Exception | None = None
        #: Whether to try Redis now, whatever it waits for.
        self._asking = False
        #: Whether it is to end, whatever waits.
        self._ended = False
        #: When it ends, or before if nothing waits any more; ``None`` for never.
        self._leave_by: float | None = None
        #: Held by a thread that writes in place of the writing thread.
        self._here = threading.Lock()
        self._batch_events = BATCH_EVENTS

    @property
    def is_this_thread(self) -> bool:
        """Whether the calling thread is the one that writes."""
        this, thread = threading.get_ident(), self._thread
        return this == self._turn_of or (thread is not None and this == thread.ident)

    def wake(self) -> None:
        """Tell that there is something to write."""
        if self._thread is None:
            self._start()
        elif self._idle and self._turn is None:
            self._idle = False
            self._changed.notify_all()

    def ask(self) -> None:
        """Find out at once whether Redis is there."""
        self._asking = True
        self.wake()
        self._changed.notify_all()

    def enlist(self, outgoing: Outgoing) -> Sequence[Outgoing]:
        """The batch that the sender of an event in the buffer is to :meth:`lead`, now.

        Nothing where somebody writes already, or Redis may not be there: then the thread will.
        The buffer's lock is held.
        """
        if self._turn is outgoing and not self._sending:
            self._turn_of = threading.get_ident()
            return self._buffer.in_hand

        if not self._may_be_led:
            self.wake()
            return ()

        return self._begin_turn(outgoing)

    def lead(self, batch: Sequence[Outgoing], deadline: float) -> None:
        """Write a batch, if it is not sent yet, in a sender's thread, and wait for the answers.

        When there are none by ``deadline``, the thread goes on to wait for them.
        """
        try:
            if batch is not self._sent:
                self._send(batch)

            is_complete = self._exchange.read(deadline)
        except OUTAGE as error:
            self._hand_over(error)
        else:
            if is_complete:
                self._conclude(batch)
            else:
                self._hand_over(None)

    def step_back(self, outgoing: Outgoing) -> None:
        """When a sender waits no longer: let the thread do what it was to do."""
        with self._lock:
            outgoing.would_write = False

            # While something is being sent for it, whoever sends looks at this afterwards.
            if self._turn is outgoing and not self._sending:
                self._hand_over(None)

    def abandon(self, outgoing: Outgoing) -> None:
        """When a sender was interrupted: let the thread send anew what it may have been writing."""
        with self._lock:
            outgoing.would_write = False

            if self._turn is None:
                self._call_thread()
            elif self._turn_of == threading.get_ident():
                # It may be another's turn, for which this thread was to send.
                self._sending = False
                self._send_anew()
            elif self._turn is outgoing and not self._sending:
                self._hand_over(None)

    def write_here(self, timeout: float) -> None:
        """Where there is no thread: write in this one. One at a time does it for all."""
        if self._thread is not None:
            return

        while self._buffer.is_waiting and self._here.acquire(blocking=False):
            try:
                self._leave_by = time.monotonic() + timeout
                self._run()
            finally:
                self._here.release()

    def leave(self) -> None:
        """End once what waits is written, or after :data:`LEAVE` seconds."""
        with self._changed:
            self._leave_by = time.monotonic() + LEAVE
            self._changed.notify_all()

    def end(self) -> None:
        """End now; what could not be written is logged by id."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

        if self._thread is not None:
            self._thread.join(timeout=WRITE_TIMEOUT + 1)

        self._report_lost()

    def disown(self) -> None:
        """In a forked child: end what came along of it, which for greenlets is everything."""
        self._ended = True
        self._buffer = Buffer(most_events=0)
        self._outage.disown()

    def _start(self) -> None:
        if process_ends.is_set():
            return

        name = f"eventbus-writer-{self._node}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

        try:
            self._thread.start()
        except RuntimeError as error:
            # At the end of a process, or when it has all the threads that it may have.
            logger.debug("There is no thread to write in: %s", error)
            self._thread = None

    # -- a sender that writes -------------------------------------------------------------

    @property
    def _may_be_led(self) -> bool:
        return (
            self._turn is None
            and not self._asking
            and not self._ended
            and self._leave_by is None
            and self._thread is not None
            and self._exchange.is_open
            and self._buffer.bytes <= LEAD_BYTES
            and not self._outage.known
        )

    def _send(self, batch: Sequence[Outgoing]) -> None:
        self._exchange.send([(out.lane.way, out.sealed()) for out in batch])

    def _begin_turn(self, outgoing: Outgoing) -> Sequence[Outgoing]:
        """Take what waits in hand, for the sender of an event to write."""
        # First: who is interrupted with something in hand is known by this.
        self._turn_of = threading.get_ident()
        self._turn = outgoing
        batch = self._buffer.take(most_events=self._batch_events, most_bytes=BATCH_BYTES)

        if not batch:
            self._end_turn()

        return batch

    def _conclude(self, batch: Sequence[Outgoing]) -> None:
        """Send what came meanwhile, and tell the senders of a batch what became of it.

        In this order: who is woken needs the interpreter, and Redis does not.
        """
        outcomes = self._exchange.outcomes()

        try:
            self._outage.end(len(self._buffer))
            self._grow(batch)

            with self._lock:
                self._buffer.settle()
                self._end_turn()
                following = self._pass_on()

            if following is not None:
                self._send_for(following)
        finally:
            try:
                self._settlement.settle(batch, outcomes)
            except BaseException:
                # This sender was interrupted, which does it for all of them.
                for outgoing, error in zip(batch, outcomes, strict=True):
                    outgoing.finish(error)

                raise

    def _pass_on(self) -> Outgoing | None:
        """Give the turn to a sender that waits, or else to the thread if it has to write."""
        waits = self._buffer.is_waiting
        following = self._buffer.first_writer() if waits and self._may_be_led else None

        if following is not None:
            self._sending = True

            if self._begin_turn(following):
                return following

            self._sending = False

        if self._is_to_end or self._is_to_write:
            self._call_thread()

        return None

    def _send_for(self, following: Outgoing) -> None:
        """Send what is in hand, and let the sender whose turn it is wait for the answers."""
        batch, failure = self._buffer.in_hand, None

        try:
            self._send(batch)
        except OUTAGE as error:
            failure = error
        except BaseException as error:
            with self._lock:
                self._sending = False
                self._send_anew()

            if not isinstance(error, Exception):
                raise

            # The thread meets it again, and finds out which event it is.
            logger.debug("%d events were not sent: %s", len(batch), error)
            return

        with self._lock:
            self._sending = False
            self._sent = batch

            if failure is None and following.would_write:
                following.call()
                self._turn_of = 0
            else:
                self._hand_over(failure)

    def _send_anew(self) -> None:
        """Let the thread send what is in hand once more, on another connection."""
        self._begun = False
        self._exchange.close()
        self._buffer.put_back()
        self._call_thread()

    def _call_thread(self) -> None:
        self._end_turn()
        self._idle = False
        self._changed.notify_all()

    def _hand_over(self, error: Exception | None) -> None:
        with self._changed:
            self._begun = True
            self._failure = error
            self._turn_of = 0
            self._turn = self._thread
            self._idle = False
            self._changed.notify_all()

    # -- the writing thread ---------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(most=MOST_BACKOFF)

        try:
            while (batch := self._take()) is not None:
                self._write(batch, backoff)
        finally:
            self._exchange.close()

            with self._lock:
                self._end_turn_if_own()

        if self._leave_by is not None:
            self._report_lost()

    def _take(self) -> Sequence[Outgoing] | None:
        """The next batch, an empty one to ask whether Redis is there; ``None`` at the end."""
        with self._changed:
            self._rest()
            self._turn = threading.current_thread()
            self._turn_of = threading.get_ident()
            self._idle = self._asking = False

            if self._begun:
                return self._buffer.in_hand

            if self._is_to_end:
                return None

            # While Redis is away it is asked first: no event is sent ahead of its listeners.
            if self._outage.away:
                return ()

            return self._buffer.take(most_events=self._batch_events, most_bytes=BATCH_BYTES)

    def _rest(self) -> None:
        """Wait until there is something to do, for :data:`QUIET` seconds at most."""
        self._end_turn_if_own()

        while not self._is_to_act:
            self._idle = True
            in_time = self._changed.wait_for(lambda: self._is_to_act, QUIET)

            if not in_time and self._turn is None:
                return

    def _end_turn_if_own(self) -> None:
        if self._turn_of == threading.get_ident():
            self._end_turn()

    def _end_turn(self) -> None:
        self._turn = None
        self._turn_of = 0
        self._sent = ()

    @property
    def _is_to_act(self) -> bool:
        if self._begun:
            return True

        return self._turn is None and (self._is_to_end or self._is_to_write)

    @property
    def _is_to_end(self) -> bool:
        if self._leave_by is None or self._ended:
            return self._ended

        return not self._buffer.is_waiting or time.monotonic() >= self._leave_by

    @property
    def _is_to_write(self) -> bool:
        return self._buffer.is_waiting or self._asking or self._outage.known

    def _write(self, batch: Sequence[Outgoing], backoff: Backoff) -> None:
        try:
            outcomes = self._exchange_batch(batch)
        except OUTAGE as error:
            self._put_back(max(1, self._batch_events // BATCH_STEP))
            self._outage.begin(error, len(self._buffer))
            self._pause(backoff.next())
        except Exception as error:
            self._give_up(batch, error)
        else:
            backoff.reset()
            self._give_way()
            self._outage.end(len(self._buffer))
            self._grow(batch)
            self._settle(batch, outcomes)

    def _exchange_batch(self, batch: Sequence[Outgoing]) -> Sequence[Exception | None]:
        if self._begun:
            return self._go_on()

        if batch:
            return self._exchange.publish([(out.lane.way, out.sealed()) for out in batch])

        self._exchange.ask()
        return ()

    def _go_on(self) -> Sequence[Exception | None]:
        """Read what is missing of the answers to what a sender wrote."""
        error, self._failure, self._begun = self._failure, None, False

        if error is not None:
            self._exchange.close()
            raise error

        self._exchange.read()
        return self._exchange.outcomes()

    def _give_way(self) -> None:
        """Let listeners return before what waited for Redis is sent: they hear no past."""
        if self._outage.away and self._buffer.has_channel_events:
            self._pause(LISTENERS_RETURN)

    def _grow(self, batch: Sequence[Outgoing]) -> None:
        # That an empty one got through says nothing.
        if batch:
            self._batch_events = min(BATCH_EVENTS, self._batch_events * BATCH_STEP)

    def _put_back(self, batch_events: int) -> None:
        self._batch_events = batch_events
        self._buffer.put_back()

    def _give_up(self, batch: Sequence[Outgoing], error: Exception) -> None:
        """After a defect, not an outage: of several events, find the one that is to blame."""
        if len(batch) > 1:
            self._put_back(1)
            return

        self._settlement.report_defect(error)
        self._settle(batch, [error] * len(batch))

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds

        with self._changed:
            self._changed.wait_for(
                lambda: self._is_to_end or self._asking or time.monotonic() >= deadline,
                timeout=seconds,
            )

    def _settle(self, batch: Sequence[Outgoing], outcomes: Sequence[Exception | None]) -> None:
        """Let go of a batch, and of the turn, before its senders are woken: they may write next."""
        with self._lock:
            self._buffer.settle()
            self._end_turn()

        self._settlement.settle(batch, outcomes)

    def _report_lost(self) -> None:
        reason = self._outage.error or "the time to flush was over"
        self._settlement.report_lost(self._buffer.clear(), reason)
