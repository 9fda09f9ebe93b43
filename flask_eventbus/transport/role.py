"""ROLE: whether a server is a master, where its user may ask."""

from __future__ import annotations

import threading
import time
from typing import Any

import redis

from ..logs import get_logger

logger = get_logger(__name__)

#: Seconds between two looks at the role of a server that is written to.
LOOK = 1.0


class NotMasterError(redis.ConnectionError):
    """The server answers, but it is no master: what is written or heard there is not the bus's."""


class Role:
    """Asks servers for their role; stops asking where that is refused.

    A replica takes PUBLISH without an error, and only its own subscribers hear it.
    """

    def __init__(self) -> None:
        #: Why a server refused the question; ``None`` while none has.
        self.refusal: redis.ResponseError | None = None
        self._refusing = threading.Lock()

    @property
    def can_ask(self) -> bool:
        """True until a server refuses the question."""
        return self.refusal is None

    def is_due(self, asked: float) -> bool:
        """Return True if the role was last asked for :data:`LOOK` seconds ago or earlier.

        :param asked: monotonic time.
        """
        return self.can_ask and time.monotonic() - asked >= LOOK

    def check(self, answer: Any) -> None:
        """Accept an answer to ROLE, or the error reply in its place.

        :raises NotMasterError: the server is a replica or a Sentinel.
        """
        if isinstance(answer, redis.ResponseError):
            self._give_up(answer)
            return

        kind = answer[0].decode(errors="replace")

        if kind == "sentinel":
            raise NotMasterError(
                "The server is a Sentinel, not a master. Begin 'EVENTBUS_URL' with "
                "'redis+sentinel://', and name the master: 'redis+sentinel://host:26379/mymaster/0'"
            )

        if kind != "master":
            host, port = answer[1].decode(errors="replace"), answer[2]
            raise NotMasterError(f"The server is a replica of {host}:{port}, not a master")

    def _give_up(self, refusal: redis.ResponseError) -> None:
        with self._refusing:
            first, self.refusal = self.can_ask, refusal

        if first:
            logger.warning(
                "Redis does not answer ROLE (%s), so a master that becomes a replica is noticed "
                "only when it refuses a write. Grant this user '+role' in the ACL.",
                str(refusal).rstrip("."),
            )
