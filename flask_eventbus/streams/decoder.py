"""Decodes stream entries, finds duplicates, queues the events, and ends the other entries."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from hashlib import blake2b, sha256
from itertools import chain, groupby, islice
from operator import attrgetter

from ..codec.records import MAX_ERROR_CHARS, DeadLetter
from ..errors import DecodeError
from ..event import Event
from ..logs import BoundedLog, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..receivers.dispatcher import Conflicts
from ..receivers.workers import DeliveryQueue
from ..routing.subscriptions import Subscription
from ..signals import emit, event_rejected
from ..transport.connections import Context
from ..transport.keys import SEEN, TRANSACTION, remedy
from ..transport.pipe import SAMPLE, Command, Large, Pipe
from .acknowledger import Acknowledger
from .group import Entry
from .outcomes import Outcome, Outcomes

logger = get_logger(__name__)

#: Maximum number of fields of an oversized entry that a dead letter keeps samples of.
MAX_FIELDS = 8

#: Size in bytes of the digest of an event that was received.
DIGEST_BYTES = 8

#: Number of keys of hashes with received events that are kept, so that each is built once.
KEPT_KEYS = 1_024

_NAME, _ID, _TIME = attrgetter("name"), attrgetter("event.id"), attrgetter("event.time")


@dataclass(slots=True)
class DecodedEntries:
    """The entries of one read, sorted by what happens to them next."""

    #: Events for the receivers.
    deliveries: list[Delivery] = field(default_factory=list)
    #: Entries to acknowledge without running a receiver: echoes, events from other sources, and
    #: trimmed entries.
    skipped: list[Entry] = field(default_factory=list)
    #: Entries that are not valid events, with their dead letters.
    dead: list[tuple[Entry, DeadLetter]] = field(default_factory=list)


class EntryDecoder:
    """Decodes and checks entries, and selects those that this service handles."""

    def __init__(self, context: Context) -> None:
        self._config = context.config
        self._service = context.config.service
        self._codec = context.codec
        self._counters = context.counters
        #: The nodes of this process, whose local receivers ran at ``send()``.
        self._siblings = context.registry.siblings
        self._log = BoundedLog(logger)

    def decode(
        self, entries: Sequence[Entry], subscription_of: Mapping[str, Subscription]
    ) -> DecodedEntries:
        """Decode entries, each for the subscription of its stream.

        :param subscription_of: the subscription of each stream, by signal.
        """
        found = DecodedEntries()
        claimed_until = time.monotonic() + self._config.claim_after
        decode = self._codec.decode_next
        last: Event | None = None
        prefix = ""
        was_accepted = False

        for entry in entries:
            name, id, fields = entry

            if fields is None:
                found.skipped.append(entry)
                continue

            subscription = subscription_of[name]

            try:
                body = fields[1] if len(fields) == 2 and fields[0] == b"event" else None
                body = body if type(body) is bytes else self._body(entry)
                event, memory, is_like_last = decode(body, last, prefix)

                if event.name != name:
                    raise _misplaced(event, name)
            except DecodeError as error:
                found.dead.append((entry, self._reject(entry, error)))
                continue

            # An event with the node, source and name of the last one is accepted like that.
            if not is_like_last:
                last, prefix = event, event.id[: event.id.rfind("-") + 1]
                was_accepted = False

            if was_accepted or self._accepts(event, subscription):
                was_accepted = True
                # Arguments by position: by name, they take twice the time.
                found.deliveries.append(
                    Delivery(
                        name, id, event, body, subscription, claimed_until, (name, id, b""), memory
                    )
                )
            else:
                found.skipped.append(entry)

        return found

    def _body(self, entry: Entry) -> bytes:
        """Return the encoded event of an entry.

        :raises DecodeError: there is none, or it is too large.
        """
        body = entry.by_name().get(b"event")

        if type(body) is bytes:
            return body

        if body is None:
            raise DecodeError(
                f"The entry {entry.id} has no field 'event'.", reason="missing_attribute"
            )

        self._codec.check_size(len(body))
        return bytes(body)

    def _accepts(self, event: Event, subscription: Subscription) -> bool:
        # In a group, any process of the service may have emitted the event and run its receivers.
        is_ours = subscription.group and event.source == self._service

        if is_ours or event.id.rpartition("-")[0] in self._siblings:
            if not subscription.echo:
                self._counters.add("echoes")

            return subscription.echo

        if subscription.sources is not None and event.source not in subscription.sources:
            self._counters.add("filtered")
            return False

        return True

    def _reject(self, entry: Entry, error: DecodeError) -> DeadLetter:
        fields = entry.by_name()
        self._counters.add("rejected")
        self._counters.add(f"rejected_{error.reason}")
        sample = bytes(fields.get(b"event", b""))[:SAMPLE]
        text = "The entry %s in the stream of %r is rejected (%s): %s It starts with %r."
        about = (entry.id, entry.name, error.reason, error, sample)
        extra = {"signal": entry.name, "service": self._config.service}
        self._log.warning(f"rejected {error.reason}", text, *about, extra=extra)
        emit(
            event_rejected, self._config.service, name=entry.name, reason=error.reason, error=error
        )
        stored = self._stored_fields(entry.size(), fields)
        shown = f"{error.reason}: {error}"[:MAX_ERROR_CHARS]
        now = round(time.time() * 1000)
        return DeadLetter(
            reason="undecodable", entry=entry.id, fields=stored, error=shown, first=now, last=now
        )

    def _stored_fields(
        self, size: int, fields: Mapping[bytes | Large, bytes | Large]
    ) -> dict[bytes, bytes]:
        """Return the fields that a dead letter stores.

        Of an entry above the size limit, store a sample, the length and the SHA-256 of each field:
        the whole fields would fill the memory of the worker and of Redis.
        """
        if size <= self._config.max_event_bytes:
            return {bytes(name): bytes(value) for name, value in fields.items()}

        samples: dict[bytes, bytes] = {}

        for name, value in islice(fields.items(), MAX_FIELDS):
            prefix = bytes(name)[:SAMPLE]
            digest = value.sha256 if isinstance(value, Large) else sha256(value).hexdigest()
            samples[prefix + b".sample"] = bytes(value)[:SAMPLE]
            samples[prefix + b".length"] = b"%d" % len(value)
            samples[prefix + b".sha256"] = digest.encode()

        return samples


def _misplaced(event: Event, name: str) -> DecodeError:
    return DecodeError(
        f"The event {event.id} in the stream of {name!r} is named {event.name!r}.",
        reason="wrong_channel",
    )


class Duplicates:
    """Stores the events that a service received in Redis hashes, one hash for each time window.

    A hash maps the id of an event to a digest of its bytes. A duplicate has the same id and the
    same bytes. An event with the same id and other bytes is a conflict: it is delivered. The time
    in the event selects the hash, and it is the same in both copies. A hash expires two windows
    after its last change. It takes about 110 bytes for each event.
    """

    def __init__(self, pipe: Pipe, context: Context) -> None:
        self._pipe = pipe
        self._service = context.config.service
        self._window = context.config.duplicate_window
        self._ask_again_after = context.timing.ask_command_again_after
        self._key = lru_cache(KEPT_KEYS)(context.keys.seen)
        self._log = BoundedLog(logger)
        self._conflicts = Conflicts(context)
        #: Monotonic time until which Redis is not asked, because it refused.
        self._refused_until = 0.0

    def find(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Store the events of deliveries in Redis, and return those that are duplicates.

        :raises redis.ConnectionError: Redis is unreachable.
        """
        if not self._window or not deliveries or time.monotonic() < self._refused_until:
            return []

        hashes = self._by_hash(deliveries)
        digests_of: list[list[bytes]] = []
        commands: list[Command] = []

        for key, found in hashes.items():
            ids = list(map(_ID, found))
            digests = [blake2b(each.body, digest_size=DIGEST_BYTES).digest() for each in found]
            digests_of.append(digests)
            pairs: Iterable[str | bytes] = chain.from_iterable(zip(ids, digests, strict=True))
            # A transaction, so that of two workers with one copy each, exactly one finds it new.
            commands += [
                ("MULTI",),
                ("HMGET", key, *ids),
                ("HSET", key, *pairs),
                ("EXPIRE", key, max(1, int(self._window * 2))),
                ("EXEC",),
            ]

        answers = self._pipe.run(commands)
        was_refused, self._refused_until = self._refused_until, 0.0
        duplicates: list[Delivery] = []

        for place, found in enumerate(hashes.values()):
            own = answers[place * 5 : place * 5 + 5]
            duplicates += self._duplicates(found, digests_of[place], own)

        if was_refused and not self._refused_until:
            self._log.over("refused", "Redis stores the ids of received events again.")

        return duplicates

    def forget(self, name: str) -> None:
        """Delete the stored events of a signal, because its group was deleted.

        Its new group delivers these events again; they are no duplicates.

        :raises redis.ConnectionError: Redis is unreachable.
        """
        if not self._window:
            return

        now = int(time.time() // self._window)
        # A hash lives for two windows; the clocks of publishers may differ by one more.
        keys = [self._key(name, self._service, now + n) for n in range(-3, 2)]
        answers = self._pipe.run([("EXPIRE", key, 0) for key in keys])

        for refusal in (answer for answer in answers if isinstance(answer, Exception)):
            text = (
                "Redis refuses to delete the ids of received events of %r (%s). The events of the "
                "last %g s are not delivered again. %s"
            )
            advice = remedy(refusal, {self._pattern(name): "+expire"})
            self._log.warning("kept", text, name, refusal, self._window, advice)

    def _by_hash(self, deliveries: Sequence[Delivery]) -> Mapping[str, Sequence[Delivery]]:
        """Return the deliveries of each hash, by its key."""
        hashes: defaultdict[str, list[Delivery]] = defaultdict(list)

        for name, group in groupby(deliveries, _NAME):
            found = list(group)
            times = list(map(_TIME, found))
            first = self._number(min(times))

            # Most batches lie in one window.
            if max(times).timestamp() // self._window == first:
                hashes[self._key(name, self._service, first)] += found
                continue

            for delivery, moment in zip(found, times, strict=True):
                hashes[self._key(name, self._service, self._number(moment))].append(delivery)

        return hashes

    def _number(self, moment: datetime) -> int:
        """Return the number of the window in which a time lies."""
        return int(moment.timestamp() // self._window)

    def _duplicates(
        self, found: Sequence[Delivery], digests: Sequence[bytes], answers: Sequence[object]
    ) -> list[Delivery]:
        """Return the duplicates among the deliveries of a hash, and report conflicts."""
        result = answers[-1]

        if not isinstance(result, list) or isinstance(result[0], Exception):
            reason = next((a for a in answers if isinstance(a, Exception)), result)
            self._pause(found[0].name, reason)
            return []

        ids = list(map(_ID, found))
        stored = result[0]

        # One batch may contain both copies.
        if stored.count(None) == len(ids) == len(set(ids)):
            return []

        known = {id: before for id, before in zip(ids, stored, strict=True) if before is not None}
        duplicates: list[Delivery] = []

        for delivery, id, digest in zip(found, ids, digests, strict=True):
            before = known.get(id)
            known[id] = digest

            if before == digest:
                duplicates.append(delivery)
            elif before is not None:
                self._conflicts.report(delivery.event)

        return duplicates

    def _pattern(self, name: str) -> str:
        """Return the key pattern of a signal's hashes, as an ACL has it."""
        return self._key(name, self._service, 0)[:-1] + "*"

    def _pause(self, name: str, reason: object) -> None:
        self._refused_until = time.monotonic() + self._ask_again_after
        text = (
            "Redis refuses to store the ids of received events (%s). An event that a publisher "
            "sends twice is handled twice. %s Or set 'EVENTBUS_DUPLICATE_WINDOW' to 0."
        )
        advice = remedy(reason, {self._pattern(name): f"{SEEN} {TRANSACTION}"})
        self._log.once("refused", text, reason, advice)


class Intake:
    """Queues decoded events for the worker threads, and ends the entries that have none.

    New entries come through it, those of a lost answer, and those that other workers left.
    """

    def __init__(
        self,
        *,
        decoder: EntryDecoder,
        in_flight: InFlight,
        queue: DeliveryQueue,
        outcomes: Outcomes,
        acknowledger: Acknowledger,
    ) -> None:
        self.decoder = decoder
        self.in_flight = in_flight
        self.queue = queue
        self.outcomes = outcomes
        self.acknowledger = acknowledger

    def take(self, found: DecodedEntries, others: Sequence[Outcome] = ()) -> None:
        """Queue the deliveries; write the outcomes of the other entries, and other outcomes."""
        self.in_flight.add(found.deliveries)
        self.queue.put(found.deliveries)

        if found.skipped or found.dead or others:
            outcomes = [Outcome(entry.name, entry.id) for entry in found.skipped]
            outcomes += [self.outcomes.dead(entry.name, letter) for entry, letter in found.dead]
            self.acknowledger.write([*outcomes, *others])
