"""What is given up when the buffer is full and Redis takes nothing."""

from __future__ import annotations

from ..counters import Counters
from ..errors import PublishError
from ..lifecycle import tell
from ..logs import get_logger
from ..signals import events_dropped
from .buffer import Buffer
from .message import Outgoing
from .outage import Outage

logger = get_logger(__name__)


class Overflow:
    """Drops the oldest channel events for new ones; what is for a stream is never dropped."""

    def __init__(self, *, buffer: Buffer, outage: Outage, counters: Counters, service: str) -> None:
        self._buffer = buffer
        self._outage = outage
        self._counters = counters
        self._service = service

    def drop_for(self, outgoing: Outgoing) -> int:
        """Make room for an event, and return how many were dropped for it.

        A channel event that finds only stream events waiting is dropped itself.

        :raises PublishError: the event is for a stream, and only such events wait.
        """
        if self._buffer.can_make_room(outgoing):
            return self._drop_until_there_is_room(outgoing)

        if outgoing.lane.is_stream:
            raise self._refusal(outgoing)

        outgoing.take_its_turn()
        outgoing.finish(PublishError("The buffer was full.", event_id=outgoing.id))
        return 1

    def tell(self, count: int) -> None:
        """Count, log and signal that events were dropped."""
        self._counters.add("dropped", count)

        if not self._outage.overflowed:
            self._outage.overflowed = True
            logger.error(
                "The buffer is full with %d events of %d bytes: from now on the oldest are dropped "
                "until Redis takes events again. health() counts them.",
                len(self._buffer),
                self._buffer.bytes,
            )

        tell(events_dropped, self._service, where="buffer", count=count)

    def _drop_until_there_is_room(self, outgoing: Outgoing) -> int:
        dropped = 0

        while not self._buffer.has_room(outgoing) and (oldest := self._buffer.drop_oldest()):
            oldest.finish(PublishError("The buffer was full.", event_id=oldest.id))
            dropped += 1

        return dropped

    def _refusal(self, outgoing: Outgoing) -> PublishError:
        reason = self._outage.error or "Redis does not answer"
        return PublishError(
            f"The event {outgoing.id} of {outgoing.lane.name!r} was not taken: {reason}, and the "
            f"buffer is full with {len(self._buffer)} events for streams, of which none is dropped "
            "for another. Send it again when Redis is back, or raise 'EVENTBUS_BUFFER_SIZE'.",
            event_id=outgoing.id,
        )
