"""Finds duplicate stream events by id and bytes, for the length of a time window."""

from __future__ import annotations

import time
from collections.abc import Sequence
from hashlib import blake2b

from ..logs import BoundedLog, get_logger
from ..receivers.conflicts import Conflicts
from ..receivers.delivery import Delivery
from ..transport.connections import Context
from ..transport.pipe import Command, Pipe
from ..transport.rights import SEEN, TRANSACTION, remedy

logger = get_logger(__name__)

#: Size of a digest in bytes.
DIGEST_BYTES = 8


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

        # By key of a hash, its deliveries, and the id and digest of each, one after the other.
        hashes: dict[str, tuple[list[Delivery], list[str | bytes]]] = {}

        for delivery in deliveries:
            event = delivery.event
            number = int(event.time.timestamp() // window)
            key = self._keys.seen(delivery.name, self._config.service, number)
            found, pairs = hashes.setdefault(key, ([], []))
            found.append(delivery)
            pairs += (event.id, blake2b(delivery.body, digest_size=DIGEST_BYTES).digest())

        commands: list[Command] = []

        for key, (_, pairs) in hashes.items():
            # A transaction, so that of two workers with one copy each, exactly one finds it new.
            commands += [
                ("MULTI",),
                ("HMGET", key, *pairs[::2]),
                ("HSET", key, *pairs),
                ("EXPIRE", key, max(1, int(window * 2))),
                ("EXEC",),
            ]

        answers = self._pipe.run(commands)
        was_refused, self._refused_until = self._refused_until, 0.0
        duplicates: list[Delivery] = []

        for place, (found, pairs) in enumerate(hashes.values()):
            duplicates += self._duplicates(found, pairs, answers[place * 5 : place * 5 + 5])

        if was_refused and not self._refused_until:
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

    def _duplicates(
        self,
        deliveries: Sequence[Delivery],
        pairs: Sequence[str | bytes],
        answers: Sequence[object],
    ) -> list[Delivery]:
        """Return the duplicates among the deliveries of a hash, and report conflicts."""
        result = answers[-1]

        if not isinstance(result, list) or isinstance(result[0], Exception):
            reason = next((a for a in answers if isinstance(a, Exception)), result)
            self._pause(deliveries[0].name, reason)
            return []

        ids, stored = pairs[::2], result[0]
        duplicates: list[Delivery] = []

        if not any(stored) and len(set(ids)) == len(ids):
            return duplicates

        # One batch may contain both copies.
        known = {id: digest for id, digest in zip(ids, stored, strict=True) if digest is not None}

        for delivery, id, digest in zip(deliveries, ids, pairs[1::2], strict=True):
            before = known.get(id)
            known[id] = digest

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
            remedy(reason, {self._pattern(name): f"{SEEN} {TRANSACTION}"}),
        )
