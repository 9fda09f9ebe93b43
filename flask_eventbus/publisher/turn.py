"""Whose turn it is to write what waits in the buffer."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from .buffer import Buffer
from .message import Outgoing
from .outage import Outage
from .way import NoWritesError, TooFewReplicasError

#: Events in one round trip.
BATCH_EVENTS = 512

#: Bytes in one round trip, so that a batch of large events fits into the timeout.
BATCH_BYTES = 1024 * 1024

#: By what a batch shrinks that did not get through, and grows again after one that did: a
#: connection that breaks in the middle of a large one lets a small one pass.
BATCH_STEP = 8


class Turn:
    """Nobody's, the writing thread's, or that of a sender who waits: one at a time has it.

    The buffer's lock is held by whoever begins a turn, ends it or passes it on.

    :param buffer: what is written.
    """

    def __init__(self, buffer: Buffer, outage: Outage) -> None:
        self._buffer = buffer
        self._outage = outage
        #: Whose it is: the thread's, or that of the sender of an event.
        self.owner: Outgoing | threading.Thread | None = None
        #: The thread that writes for it.
        self._thread_id = 0
        #: Whether something is being sent for its owner, by another sender; and what was.
        self.is_sending = False
        self.sent: Sequence[Outgoing] = ()
        #: Whether the thread is to go on with a batch that a sender began, and what went wrong.
        self.is_begun = False
        self.failure: Exception | None = None
        #: Whether the thread waits for something to do.
        self.thread_rests = False
        self._batch_events = BATCH_EVENTS

    @property
    def is_here(self) -> bool:
        """Whether the calling thread writes."""
        return self._thread_id == threading.get_ident()

    def begin(self, owner: Outgoing | threading.Thread) -> None:
        """It is the owner's, and the calling thread writes."""
        # First: who is interrupted with something in hand is known by this.
        self._thread_id = threading.get_ident()
        self.owner = owner

    def take(self) -> Sequence[Outgoing]:
        """Take in hand what waits, as much as one round trip is to carry."""
        return self._buffer.take(most_events=self._batch_events, most_bytes=BATCH_BYTES)

    def take_stream_event(self) -> Sequence[Outgoing]:
        """Take in hand one event, to find out whether Redis takes stream events again."""
        return self._buffer.take_stream_event()

    def resume(self) -> Sequence[Outgoing]:
        """In the thread of its owner, after another sent what is in hand: that."""
        self._thread_id = threading.get_ident()
        return self._buffer.in_hand

    def leave_to_owner(self) -> None:
        """What is in hand was sent; its owner waits for the answers."""
        self._thread_id = 0

    def end(self) -> None:
        """It is nobody's."""
        self.owner = None
        self._thread_id = 0
        self.sent = ()

    def settle(self, batch: Sequence[Outgoing], outcomes: Sequence[Exception | None]) -> bool:
        """Let go of what is in hand, and of the turn.

        What Redis does not take now goes back to the heads of the lines.

        :return: whether there is something of that.
        """
        held = []

        if any(outcomes):
            held = [
                (outgoing, error)
                for outgoing, error in zip(batch, outcomes, strict=True)
                if isinstance(error, NoWritesError)
            ]

        for outgoing, _ in held:
            # An answer leaves no doubt, except about earlier tries.
            outgoing.doubts -= 1

        if held:
            self._outage.refuse_writes(held[0][1], len(self._buffer))
        elif self._outage.refusal is not None and _has_write(batch, outcomes):
            self._outage.take_writes(len(self._buffer))

        self._buffer.settle([outgoing for outgoing, _ in held])
        self.hold_streams()
        self.end()
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

        self.hold_streams()

    def hold_streams(self) -> None:
        """Hold stream events while Redis takes no writes; channel events go on."""
        holds = self._outage.refusal is not None

        if holds != self._buffer.holds_streams:
            self._buffer.holds_streams = holds
            # The thread waits as long as the state says, and senders may have room.
            self._buffer.changed.notify_all()

    def end_if_here(self) -> None:
        """It is nobody's, if the calling thread had it."""
        if self.is_here:
            self.end()

    def wake_thread(self) -> None:
        """Let the thread do what there is to do, if it waits and nobody else does it."""
        if self.thread_rests and self.owner is None:
            self._call_thread()

    def give_up(self) -> None:
        """It is nobody's, and the thread looks what there is to do."""
        self.end()
        self._call_thread()

    def hand_over(self, thread: threading.Thread | None, error: Exception | None) -> None:
        """Let the thread go on with what is in hand.

        :param error: what went wrong with it; ``None`` if answers are missing.
        """
        self.is_begun = True
        self.failure = error
        self._thread_id = 0
        self.owner = thread
        self._call_thread()

    def take_over(self) -> Exception | None:
        """In the thread: what went wrong with what was handed over."""
        error, self.failure, self.is_begun = self.failure, None, False
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

    def _call_thread(self) -> None:
        self.thread_rests = False
        self._buffer.changed.notify_all()


def _has_write(batch: Sequence[Outgoing], outcomes: Sequence[Exception | None]) -> bool:
    """Return True if Redis took an event into a stream."""
    return any(
        outgoing.lane.is_stream and (error is None or isinstance(error, TooFewReplicasError))
        for outgoing, error in zip(batch, outcomes, strict=True)
    )
