"""Finds duplicate stream events by id and bytes, for the length of a time window."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import blake2b

from ..logs import BoundedLog, get_logger
from ..receivers.conflicts import Conflicts
from ..receivers.delivery import Delivery
from ..transport.connections import Context
from ..transport.pipe import Command, Pipe
from .group import remedy

logger = get_logger(__name__)

#: Size of a digest in bytes.
DIGEST_BYTES = 8


def _end_of(number: int, window: float, moment: datetime) -> datetime:
    """Return the end of a window; ``moment`` itself if the calendar ends before."""
    try:
        return datetime.fromtimestamp((number + 1) * window, UTC)
    except (OverflowError, ValueError, OSError):
        return moment


class Duplicates:
    """Stores the events that a service received in Redis hashes, one hash for each time window.

    A hash maps the id of an event to a digest of its bytes. A duplicate has the same id and the
    same bytes. An event with the same id and other bytes is a conflict: it is delivered. The time
    in the event selects the hash, and it is the same in both copies. A hash expires two windows
    after its last change. It takes about 110 bytes for each event.
    """

    def __init__(self, pipe: Pipe, context: Context) -> None:
        self._pipe = pipe
        self._config = context.config
        self._timing = context.timing
        self._keys = context.keys
        self._log = BoundedLog(logger)
        self._conflicts = Conflicts(config=context.config, counters=context.counters)
        #: Monotonic time until which Redis is not asked, because it refused.
        self._refused_until = 0.0

    def find(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Store the events of deliveries in Redis, and return those that are duplicates.

        :raises redis.ConnectionError: Redis is unreachable.
        """
        window = self._config.duplicate_window

        if not window or not deliveries or time.monotonic() < self._refused_until:
            return []

        windows = self._by_window(deliveries)
        commands: list[Command] = []

        for (name, number), found in windows.items():
            commands += self._store(name, number, found)

        answers = self._pipe.run(commands)
        self._refused_until = 0.0
        duplicates = [
            delivery
            for place, found in enumerate(windows.values())
            for delivery in self._duplicates(found, answers[place * 5 : place * 5 + 5])
        ]

        if not self._refused_until:
            self._log.over("refused", "Redis stores the ids of received events again.")

        return duplicates

    def forget(self, name: str) -> None:
        """Delete the stored events of a signal, because its group was deleted.

        Its new group delivers these events again; they are no duplicates.

        :raises redis.ConnectionError: Redis is unreachable.
        """
        window = self._config.duplicate_window

        if not window:
            return

        now = int(time.time() // window)
        # A hash lives for two windows; the clocks of publishers may differ by one more.
        keys = [self._keys.seen(name, self._config.service, now + n) for n in range(-3, 2)]
        answers = self._pipe.run([("EXPIRE", key, 0) for key in keys])

        for refusal in (answer for answer in answers if isinstance(answer, Exception)):
            self._log.warning(
                "kept",
                "Redis refuses to delete the ids of received events of %r (%s). The events of the "
                "last %g s are not delivered again. %s",
                name,
                refusal,
                window,
                remedy(refusal, {self._pattern(name): "+expire"}),
            )

    def _by_window(self, deliveries: Sequence[Delivery]) -> dict[tuple[str, int], list[Delivery]]:
        """Return the deliveries by signal and number of the time window."""
        windows: dict[tuple[str, int], list[Delivery]] = {}
        window = self._config.duplicate_window
        name = ""
        first = last = datetime.max.replace(tzinfo=UTC)
        found: list[Delivery] = []

        for delivery in deliveries:
            moment = delivery.event.time

            # Most events are in the window of the event before.
            if delivery.name != name or not first <= moment < last:
                name, number = delivery.name, int(moment.timestamp() // window)
                first = last = moment
                found = windows.setdefault((name, number), [])
                last = _end_of(number, window, moment)

            found.append(delivery)

        return windows

    def _store(self, name: str, number: int, deliveries: Sequence[Delivery]) -> list[Command]:
        key = self._keys.seen(name, self._config.service, number)
        ids = [delivery.event.id for delivery in deliveries]
        pairs = [part for each in deliveries for part in (each.event.id, _digest(each.body))]
        # A transaction, so that of two workers with one copy each, exactly one finds it new.
        return [
            ("MULTI",),
            ("HMGET", key, *ids),
            ("HSET", key, *pairs),
            ("EXPIRE", key, max(1, int(self._config.duplicate_window * 2))),
            ("EXEC",),
        ]

    def _duplicates(
        self, deliveries: Sequence[Delivery], answers: Sequence[object]
    ) -> list[Delivery]:
        result = answers[-1]

        if not isinstance(result, list) or isinstance(result[0], Exception):
            reason = next((a for a in answers if isinstance(a, Exception)), result)
            self._pause(deliveries[0].name, reason)
            return []

        duplicates: list[Delivery] = []
        stored_digests = result[0]

        if not any(stored_digests) and len({each.event.id for each in deliveries}) == len(
            deliveries
        ):
            return duplicates

        # One batch may contain both copies.
        digests: dict[str, bytes] = {}

        for delivery, stored in zip(deliveries, stored_digests, strict=True):
            id, digest = delivery.event.id, _digest(delivery.body)
            before = digests.get(id, stored)
            digests[id] = digest

            if before == digest:
                duplicates.append(delivery)
            elif before is not None:
                self._conflicts.report(delivery.event)

        return duplicates

    def _pattern(self, name: str) -> str:
        """Return the key pattern of a signal's hashes, as an ACL has it."""
        return self._keys.seen(name, self._config.service, 0)[:-1] + "*"

    def _pause(self, name: str, reason: object) -> None:
        self._refused_until = time.monotonic() + self._timing.ask_command_again_after
        self._log.once(
            "refused",
            "Redis refuses to store the ids of received events (%s). An event that a publisher "
            "sends twice is handled twice. %s Or set 'EVENTBUS_DUPLICATE_WINDOW' to 0.",
            reason,
            remedy(reason, {self._pattern(name): "+hmget +hset +expire +multi +exec"}),
        )


def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=DIGEST_BYTES).digest()
