"""Recognizes stream events that come twice, by their ids and their bytes, for a while."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import blake2b

from ..config import Config
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.conflicts import Conflicts
from ..receivers.delivery import Delivery
from ..transport.keys import StreamKeys
from ..transport.pipe import Command, Pipe
from .group import remedy

logger = get_logger(__name__)

#: Seconds after which Redis is asked again to note ids: it may have been full.
ASK_AGAIN = 60.0

#: Bytes of a digest: enough that nobody finds other bytes with the same one.
DIGEST_BYTES = 8


def _end_of(number: int, window: float, moment: datetime) -> datetime:
    """A moment up to which the window lasts; ``moment`` itself at the end of the calendar."""
    try:
        return datetime.fromtimestamp((number + 1) * window, UTC)
    except (OverflowError, ValueError, OSError):
        return moment


class Duplicates:
    """Notes the events that a service got in hashes of Redis, one per window of the events' time.

    A hash maps the id of an event to a digest of its bytes. A duplicate has the same id and the
    same bytes; the same id with other bytes is a conflict, and is delivered. Both copies of an
    event bear the same time, so both are looked up in the same hash. A hash is kept for two
    windows after the last id that it got: about 110 bytes for each event.
    """

    def __init__(self, pipe: Pipe, *, config: Config, keys: StreamKeys, counters: Counters) -> None:
        self._pipe = pipe
        self._config = config
        self._keys = keys
        self._log = BoundedLog(logger)
        self._conflicts = Conflicts(config=config, counters=counters)
        #: Until when Redis is not asked, by the monotonic clock: it refused.
        self._refused_until = 0.0

    def find(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Note the events of entries that are read for the first time; return the duplicates.

        :raises redis.ConnectionError: Redis is away.
        """
        window = self._config.duplicate_window

        if not window or not deliveries or time.monotonic() < self._refused_until:
            return []

        sets = self._by_set(deliveries)
        commands: list[Command] = []

        for (name, number), found in sets.items():
            commands += self._note(name, number, found)

        answers = self._pipe.run(commands)
        self._refused_until = 0.0
        known = [
            delivery
            for place, found in enumerate(sets.values())
            for delivery in self._known(found, answers[place * 5 : place * 5 + 5])
        ]

        if not self._refused_until:
            self._log.over("refused", "Redis notes again which events came.")

        return known

    def forget(self, name: str) -> None:
        """Let every event of a signal come again: the group that they were noted for is gone.

        :raises redis.ConnectionError: Redis is away.
        """
        window = self._config.duplicate_window

        if not window:
            return

        now = int(time.time() // window)
        # A set is kept for two windows; the clocks of publishers may differ by one.
        keys = [self._keys.seen(name, self._config.service, now + n) for n in range(-3, 2)]
        answers = self._pipe.run([("EXPIRE", key, 0) for key in keys])

        for refusal in (answer for answer in answers if isinstance(answer, Exception)):
            self._log.warning(
                "kept",
                "Redis does not let go of which events of %r came (%s): those of the last %g s do "
                "not come again. %s",
                name,
                refusal,
                window,
                remedy(refusal, {self._pattern(name): "+expire"}),
            )

    def _by_set(self, deliveries: Sequence[Delivery]) -> dict[tuple[str, int], list[Delivery]]:
        """Deliveries by the set that their events' ids are in: most have that of the one before."""
        sets: dict[tuple[str, int], list[Delivery]] = {}
        window = self._config.duplicate_window
        name = ""
        first = last = datetime.max.replace(tzinfo=UTC)
        found: list[Delivery] = []

        for delivery in deliveries:
            moment = delivery.event.time

            if delivery.name != name or not first <= moment < last:
                name, number = delivery.name, int(moment.timestamp() // window)
                first = last = moment
                found = sets.setdefault((name, number), [])
                last = _end_of(number, window, moment)

            found.append(delivery)

        return sets

    def _note(self, name: str, number: int, deliveries: Sequence[Delivery]) -> list[Command]:
        key = self._keys.seen(name, self._config.service, number)
        ids = [delivery.event.id for delivery in deliveries]
        pairs = [part for each in deliveries for part in (each.event.id, _digest(each.body))]
        # In one step: of two workers that got the two copies, one is the first.
        return [
            ("MULTI",),
            ("HMGET", key, *ids),
            ("HSET", key, *pairs),
            ("EXPIRE", key, max(1, int(self._config.duplicate_window * 2))),
            ("EXEC",),
        ]

    def _known(self, deliveries: Sequence[Delivery], answers: Sequence[object]) -> list[Delivery]:
        done = answers[-1]

        if not isinstance(done, list) or isinstance(done[0], Exception):
            reason = next((a for a in answers if isinstance(a, Exception)), done)
            self._give_up(deliveries[0].name, reason)
            return []

        known: list[Delivery] = []

        if not any(done[0]) and len({each.event.id for each in deliveries}) == len(deliveries):
            return known

        # Both copies may come in one batch, too.
        digests: dict[str, bytes] = {}

        for delivery, noted in zip(deliveries, done[0], strict=True):
            id, digest = delivery.event.id, _digest(delivery.body)
            before = digests.get(id, noted)
            digests[id] = digest

            if before == digest:
                known.append(delivery)
            elif before is not None:
                self._conflicts.report(delivery.event)

        return known

    def _pattern(self, name: str) -> str:
        """The hashes of a signal, as an ACL names them."""
        return self._keys.seen(name, self._config.service, 0)[:-1] + "*"

    def _give_up(self, name: str, reason: object) -> None:
        self._refused_until = time.monotonic() + ASK_AGAIN
        self._log.once(
            "refused",
            "Redis does not note which events came (%s): one that a publisher sends twice is "
            "handled twice. %s Or set 'EVENTBUS_DUPLICATE_WINDOW' to 0.",
            reason,
            remedy(reason, {self._pattern(name): "+hmget +hset +expire +multi +exec"}),
        )


def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=DIGEST_BYTES).digest()
