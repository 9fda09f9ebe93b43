"""What is known of whether Redis takes events, and who is told when that changes."""

from __future__ import annotations

import time

from .counters import BoundedLog
from .lifecycle import tell
from .logs import get_logger
from .signals import publisher_lost, publisher_restored

logger = get_logger(__name__)


class Outage:
    """Begins when Redis is lost, ends when it takes something again; logs both, once each."""

    def __init__(self, service: str) -> None:
        self._service = service
        #: A connection that comes and goes is not to fill the log.
        self._log = BoundedLog(logger)
        #: When Redis was lost, by the monotonic clock; ``None`` while it is there.
        self._since: float | None = None
        #: What told that Redis is away.
        self.error: Exception | None = None
        #: Whether a caller waited in vain since Redis last took something.
        self.stalled = False
        #: Whether events were dropped since Redis last took something.
        self.overflowed = False

    @property
    def away(self) -> bool:
        """Whether Redis was lost and did not answer since."""
        return self._since is not None

    @property
    def known(self) -> bool:
        """Whether anything says that Redis does not take events now."""
        return self.stalled or self._since is not None

    def begin(self, error: Exception, buffered: int) -> None:
        """Note that Redis is away; ``buffered`` events wait."""
        self.error = error

        if self._since is not None:
            return

        self._since = time.monotonic()
        self._log.warning("lost", "Redis is away (%s); %d events wait for it.", error, buffered)
        tell(publisher_lost, self._service, error=error, buffered=buffered)

    def end(self, buffered: int) -> None:
        """Note that Redis took something; ``buffered`` events are on their way."""
        self.stalled = self.overflowed = False

        if self._since is None:
            return

        seconds = time.monotonic() - self._since
        self._since = self.error = None
        self._log.warning(
            "restored",
            "Redis is back after %.1f s; %d events that waited are being sent.",
            seconds,
            buffered,
        )
        tell(publisher_restored, self._service, seconds=seconds, buffered=buffered)

    def disown(self) -> None:
        """In a forked child: tell nobody of the connection that was the parent's."""
        self._since = time.monotonic()
