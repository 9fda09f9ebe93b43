"""The thread that writes what waits in the buffer, a batch in one round trip."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ..ending import process_ends
from ..logs import get_logger
from ..transport.backoff import Backoff
from ..transport.connections import OUTAGE, is_refused
from .buffer import Buffer
from .connection import Exchange
from .leader import Leader
from .message import Outgoing
from .outage import MOST_BACKOFF, Outage
from .settlement import Settlement
from .turn import Turn

logger = get_logger(__name__)

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
        self._turn = Turn(buffer, outage)
        self._outage = outage
        self._settlement = settlement
        self._node = node
        self._changed = buffer.changed
        self._lock = buffer.lock
        #: The thread, once there is one.
        self.thread: threading.Thread | None = None
        #: The events whose senders wait for a confirmation.
        self.senders: set[Outgoing] = set()
        #: Whether to try Redis now, whatever it waits for.
        self._asking = False
        #: Whether it is to end, whatever waits.
        self._ended = False
        #: When it ends, or before if nothing waits any more; ``None`` for never.
        self._leave_by: float | None = None
        #: Held by a thread that writes in place of the writing thread.
        self._here = threading.Lock()
        #: Lets senders write in place of the thread.
        self.leader = Leader(
            exchange=exchange,
            buffer=buffer,
            turn=self._turn,
            outage=outage,
            settlement=settlement,
            writer=self,
        )

    @property
    def is_this_thread(self) -> bool:
        """Whether the calling thread is the one that writes."""
        thread = self.thread
        return self._turn.is_here or (thread is not None and thread.ident == threading.get_ident())

    @property
    def can_be_spared(self) -> bool:
        """Whether the thread is there, and nothing waits that only it does."""
        return (
            self.thread is not None
            and not self._asking
            and not self._ended
            and self._leave_by is None
        )

    @property
    def has_to_act(self) -> bool:
        """Whether there is something that the thread has to do."""
        return (
            self._is_to_end
            or self._buffer.is_waiting
            or self._asking
            or self._outage.stops_all
            or self._outage.write_is_due
        )

    def wake(self) -> None:
        """Tell that there is something to write."""
        if self.thread is None:
            self._start()
        else:
            self._turn.wake_thread()

    def ask(self) -> None:
        """Find out at once whether Redis is there."""
        self._asking = True
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
            self._exchange.interrupt()
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
            self._exchange.close()

            with self._lock:
                self._turn.end_if_here()

        if self._leave_by is not None:
            self._report_lost()

    def _take(self) -> Sequence[Outgoing] | None:
        """The next batch, an empty one to ask whether Redis is there; ``None`` at the end."""
        with self._changed:
            self._rest()
            self._turn.begin(threading.current_thread())
            self._turn.thread_rests = self._asking = False

            if self._turn.is_begun:
                return self._buffer.in_hand

            if self._is_to_end:
                return None

            # While Redis is away it is asked first: no event is sent ahead of its listeners.
            if self._outage.away:
                return ()

            if self._outage.write_is_due:
                return self._turn.take_stream_event()

            return self._turn.take()

    def _rest(self) -> None:
        """Wait until there is something to do, for :data:`QUIET` seconds at most.

        Less while Redis takes no writes: until it is to be asked again.
        """
        self._turn.end_if_here()

        while not self._may_act:
            # Before each wait: a sender may have taken over what the thread was woken for.
            self._turn.thread_rests = True
            was_woken = self._changed.wait(self._most_rest)

            if not was_woken and self._turn.owner is None:
                return

    @property
    def _most_rest(self) -> float:
        left = self._outage.write_again_at - time.monotonic()
        return left if 0 < left < QUIET else QUIET

    @property
    def _may_act(self) -> bool:
        return self._turn.is_begun or (self._turn.owner is None and self.has_to_act)

    @property
    def _is_to_end(self) -> bool:
        if self._leave_by is None or self._ended:
            return self._ended

        return self._buffer.is_empty or time.monotonic() >= self._leave_by

    def _write(self, batch: Sequence[Outgoing], backoff: Backoff) -> None:
        try:
            outcomes = self._exchange_batch(batch)
        except OUTAGE as error:
            self._turn.shrink()
            self._buffer.put_back()
            self._outage.begin(error, len(self._buffer))

            # A connection that breaks is no proof of an outage: the next one may work.
            if is_refused(error):
                self.call_senders()

            self._pause(backoff.next())
        except Exception as error:
            self._give_up(self._buffer.in_hand, error)
        else:
            backoff.reset()
            self._give_way()
            self._outage.end(len(self._buffer))

            # That an empty one got through says nothing.
            if batch:
                self._turn.grow()

            self._settle(self._buffer.in_hand, outcomes)

    def call_senders(self) -> None:
        """Wake the senders that wait for a confirmation: Redis is known not to give one."""
        for outgoing in list(self.senders):
            outgoing.call()

    def _exchange_batch(self, batch: Sequence[Outgoing]) -> Sequence[Exception | None]:
        if self._turn.is_begun:
            return self._go_on()

        if batch:
            deadline = self._exchange.connect(self._leave_by)
            events = [(out.lane.way, out.sealed()) for out in self._buffer.send_off()]
            return self._exchange.publish(events, deadline)

        refusal = self._exchange.ask(self._leave_by)

        with self._lock:
            self._turn.note_writes(refusal)

        self._outage.log_changes()

        if refusal is not None:
            self.call_senders()

        return ()

    def _go_on(self) -> Sequence[Exception | None]:
        """Read what is missing of the answers to what a sender wrote."""
        error = self._turn.take_over()

        if error is not None:
            self._exchange.close()
            raise error

        self._exchange.read()
        return self._exchange.outcomes()

    def _give_way(self) -> None:
        """Let listeners return before what waited for Redis is sent: they hear no past."""
        if self._outage.away and self._buffer.has_channel_events:
            self._pause(LISTENERS_RETURN)

    def _give_up(self, batch: Sequence[Outgoing], error: Exception) -> None:
        """After a defect, not an outage: of several events, find the one that is to blame."""
        if len(batch) > 1:
            self._turn.go_one_by_one()
            self._buffer.put_back()
            return

        self._settlement.report_defect(error)
        self._settle(batch, [error] * len(batch))

    def _pause(self, seconds: float) -> None:
        now = time.monotonic()
        end = now + seconds
        deadline = end if self._leave_by is None else min(end, self._leave_by)

        with self._changed:
            self._changed.wait_for(
                lambda: self._is_to_end or self._asking or time.monotonic() >= deadline,
                timeout=max(0.0, deadline - now),
            )

    def _settle(self, batch: Sequence[Outgoing], outcomes: Sequence[Exception | None]) -> None:
        """Let go of a batch, and of the turn, before its senders are woken: they may write next."""
        with self._lock:
            holds = self._turn.settle(batch, outcomes)

        if holds:
            self.call_senders()

        self._settlement.settle(batch, outcomes)
        self._outage.log_changes()

    def _report_lost(self) -> None:
        reason = self._outage.error or "the time to flush was over"
        self._settlement.report_lost(self._buffer.clear(), reason)
