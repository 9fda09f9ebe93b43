"""Check with ROLE that a server is a master."""

from __future__ import annotations

import threading
import time
from typing import Any

import redis

from ..logs import get_logger

logger = get_logger(__name__)

#: Seconds between two ROLE commands on a connection that writes.
LOOK = 1.0


class NotMasterError(redis.ConnectionError):
    """The server is a replica or a Sentinel, so events must not be written or read there."""


class Role:
    """Checks the replies to ROLE, and stops sending ROLE once a server refuses it.

    The check is needed because a replica accepts PUBLISH without an error, but delivers the event
    to its own subscribers only.
    """

    def __init__(self) -> None:
        #: The error reply to ROLE; ``None`` if no server refused it.
        self.refusal: redis.ResponseError | None = None
        self._lock = threading.Lock()

    @property
    def can_ask(self) -> bool:
        """Return True until a server refuses ROLE."""
        return self.refusal is None

    def is_due(self, asked: float) -> bool:
        """Return True if ROLE was last sent at least :data:`LOOK` seconds ago.

        :param asked: monotonic time at which ROLE was last sent.
        """
        return self.can_ask and time.monotonic() - asked >= LOOK

    def check(self, answer: Any) -> None:
        """Check a reply to ROLE; an error reply turns later checks off.

        :raises NotMasterError: the server is a replica or a Sentinel.
        """
        if isinstance(answer, redis.ResponseError):
            self._give_up(answer)
            return

        kind = answer[0].decode(errors="replace")

        if kind == "sentinel":
            raise NotMasterError(
                "The server is a Sentinel, not a master. Start 'EVENTBUS_URL' with "
                "'redis+sentinel://', and end it with the name of the master: "
                "'redis+sentinel://host:26379/mymaster/0'"
            )

        if kind != "master":
            host, port = answer[1].decode(errors="replace"), answer[2]
            raise NotMasterError(f"The server is a replica of {host}:{port}, not a master")

    def _give_up(self, refusal: redis.ResponseError) -> None:
        with self._lock:
            first, self.refusal = self.can_ask, refusal

        if first:
            logger.warning(
                "Redis does not answer ROLE (%s). A master that becomes a replica is detected only "
                "when it refuses a write. Grant '+role' to this user in the ACL.",
                str(refusal).rstrip("."),
            )
