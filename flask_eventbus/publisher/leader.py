"""Senders that write what waits, in place of the writing thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import redis

from ..logs import get_logger
from ..transport.connections import OUTAGE
from .buffer import Buffer
from .connection import Exchange
from .message import Outgoing
from .outage import Outage
from .settlement import Settlement
from .turn import Turn
from .way import NoWritesError

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
    def can_be_spared(self) -> bool:
        """Whether it is there, and nothing waits that only it does."""

    @property
    def has_to_act(self) -> bool:
        """Whether there is something that it has to do."""

    def wake(self) -> None:
        """Tell that there is something to write."""

    def call_senders(self) -> None:
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
        exchange: Exchange,
        buffer: Buffer,
        turn: Turn,
        outage: Outage,
        settlement: Settlement,
        writer: WritingThread,
    ) -> None:
        self._exchange = exchange
        self._buffer = buffer
        self._turn = turn
        self._outage = outage
        self._settlement = settlement
        self._writer = writer
        self._lock = buffer.lock

    def enlist(self, outgoing: Outgoing) -> Sequence[Outgoing]:
        """The batch that the sender of an event in the buffer is to :meth:`lead`, now.

        Nothing where somebody writes already, or Redis may not be there: then the thread will.
        The buffer's lock is held.
        """
        if self._is_sent_for(outgoing):
            return self._turn.resume()

        if not self._may_lead:
            self._writer.wake()
            return ()

        return self._begin(outgoing)

    def lead(self, batch: Sequence[Outgoing], deadline: float) -> None:
        """Write a batch, if it is not sent yet, in a sender's thread, and wait for the answers.

        When there are none by ``deadline``, the thread goes on to wait for them.
        """
        try:
            if batch is not self._turn.sent:
                batch = self._send(deadline)

            is_complete = self._exchange.read(deadline)
        except OUTAGE as error:
            self._hand_over(error)
        else:
            if is_complete:
                self._conclude(batch, deadline)
            else:
                self._hand_over(None)

    def step_back(self, outgoing: Outgoing) -> None:
        """When a sender waits no longer: let the thread do what it was to do."""
        with self._lock:
            outgoing.would_write = False

            # While something is being sent for it, whoever sends looks at this afterwards.
            if self._is_sent_for(outgoing):
                self._hand_over(None)

    def abandon(self, outgoing: Outgoing) -> None:
        """When a sender was interrupted: let the thread send anew what it may have been writing."""
        with self._lock:
            outgoing.would_write = False

            if self._turn.owner is None:
                self._turn.give_up()
            elif self._turn.is_here:
                # It may be another's turn, for which this thread was to send.
                self._turn.is_sending = False
                self._send_anew()
            elif self._is_sent_for(outgoing):
                self._hand_over(None)

    @property
    def _may_lead(self) -> bool:
        return (
            self._turn.owner is None
            and self._writer.can_be_spared
            and self._exchange.is_open
            and self._buffer.bytes <= LEAD_BYTES
            and not self._outage.stops_all
        )

    def _is_sent_for(self, outgoing: Outgoing) -> bool:
        return self._turn.owner is outgoing and not self._turn.is_sending

    def _send(self, deadline: float) -> Sequence[Outgoing]:
        """Send what is in hand, and return it."""
        self._exchange.connect(deadline)
        batch = self._buffer.send_off()
        self._exchange.send([(out.lane.way, out.sealed()) for out in batch], deadline)
        return batch

    def _begin(self, outgoing: Outgoing) -> Sequence[Outgoing]:
        """Take what waits in hand, for the sender of an event to write."""
        self._turn.begin(outgoing)
        batch = self._turn.take()

        if not batch:
            self._turn.end()

        return batch

    def _conclude(self, batch: Sequence[Outgoing], deadline: float) -> None:
        """Send what came meanwhile, and tell the senders of a batch what became of it.

        Sending takes until the deadline at most.

        In this order: who is woken needs the interpreter, and Redis does not.
        """
        outcomes = self._exchange.outcomes()

        try:
            self._outage.end(len(self._buffer))

            with self._lock:
                self._turn.grow()
                holds = self._turn.settle(batch, outcomes)
                following = self._pass_on()

            if following is not None:
                self._send_for(following, deadline)

            if holds:
                self._writer.call_senders()
        finally:
            try:
                self._settlement.settle(batch, outcomes)
                self._outage.log_changes()
            except BaseException:
                # This sender was interrupted, which does it for all of them.
                for outgoing, error in zip(batch, outcomes, strict=True):
                    if not isinstance(error, NoWritesError):
                        outgoing.finish(error)

                raise

    def _pass_on(self) -> Outgoing | None:
        """Give the turn to a sender that waits, or else to the thread if it has to write."""
        waits = self._buffer.is_waiting
        following = self._buffer.first_writer() if waits and self._may_lead else None

        if following is not None:
            self._turn.is_sending = True

            if self._begin(following):
                return following

            self._turn.is_sending = False

        if self._writer.has_to_act:
            self._turn.give_up()

        return None

    def _send_for(self, following: Outgoing, deadline: float) -> None:
        """Send what is in hand, and let the sender whose turn it is wait for the answers."""
        batch, failure = self._buffer.in_hand, None

        try:
            batch = self._send(deadline)
        except OUTAGE as error:
            failure = error
        except BaseException as error:
            with self._lock:
                self._turn.is_sending = False
                self._send_anew()

            # A time limit that a signal handler keeps is this sender's, whatever it was doing.
            if not isinstance(error, DEFECTS):
                raise

            # The thread meets it again, and finds out which event it is.
            logger.debug("%d events were not sent: %s", len(batch), error)
            return

        with self._lock:
            self._turn.is_sending = False
            self._turn.sent = batch

            if failure is None and following.would_write:
                following.call()
                self._turn.leave_to_owner()
            else:
                self._hand_over(failure)

    def _send_anew(self) -> None:
        """Let the thread send what is in hand once more, on another connection."""
        self._turn.is_begun = False
        self._exchange.close()
        self._buffer.put_back()
        self._turn.give_up()

    def _hand_over(self, error: Exception | None) -> None:
        with self._lock:
            self._turn.hand_over(self._writer.thread, error)
