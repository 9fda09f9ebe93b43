"""Decodes stream entries, queues their events, and ends the entries that have none."""

from __future__ import annotations

import itertools
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from ..codec.codec import Codec
from ..codec.records import MAX_ERROR_CHARS, DeadLetter
from ..config import Config
from ..errors import DecodeError
from ..event import Event
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..receivers.workers import DeliveryQueue
from ..routing.subscriptions import Subscription
from ..signals import emit, event_rejected
from ..transport.pipe import SAMPLE, Large
from .acknowledger import Acknowledger
from .group import Entry, Fields
from .outcomes import Outcome, Outcomes

logger = get_logger(__name__)

#: Maximum number of fields of an oversized entry that a dead letter keeps samples of.
MAX_FIELDS = 8


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
    #: Number of entries that were trimmed before they were read.
    trimmed: int = 0


class EntryDecoder:
    """Decodes and checks entries, and selects those that this service handles.

    :param siblings: nodes of this process whose local receivers ran at ``send()``.
    """

    def __init__(
        self, *, config: Config, codec: Codec, counters: Counters, siblings: Container[str]
    ) -> None:
        self._config = config
        self._codec = codec
        self._counters = counters
        self._siblings = siblings
        self._log = BoundedLog(logger)

    def decode(
        self, entries: Sequence[Entry], subscription_of: Mapping[str, Subscription]
    ) -> DecodedEntries:
        """Decode entries, each for the subscription of its stream.

        :param subscription_of: the subscription of each stream, by signal.
        """
        found = DecodedEntries()
        claimed_until = time.monotonic() + self._config.claim_after

        for entry in entries:
            if entry.fields is None:
                found.trimmed += 1
                found.skipped.append(entry)
                continue

            subscription = subscription_of[entry.name]

            try:
                event, body, memory = self._event(entry, entry.fields)
            except DecodeError as error:
                found.dead.append((entry, self._reject(entry, entry.fields, error)))
                continue

            if not self._accepts(event, subscription):
                found.skipped.append(entry)
                continue

            found.deliveries.append(
                Delivery(
                    name=entry.name,
                    entry=entry.id,
                    event=event,
                    body=body,
                    memory=memory,
                    subscription=subscription,
                    claimed_until=claimed_until,
                )
            )

        return found

    def _event(self, entry: Entry, fields: Fields) -> tuple[Event, bytes, int]:
        """Return the event of an entry, its bytes, and its memory use in bytes.

        :raises DecodeError: the entry is no valid event.
        """
        body = fields.get(b"event")

        if body is None:
            raise DecodeError(
                f"The entry {entry.id} has no field 'event'.", reason="missing_attribute"
            )

        if isinstance(body, Large):
            self._codec.check_size(len(body))

        body = bytes(body)
        event, memory = self._codec.decode_for_queue(body, via="stream")

        if event.name != entry.name:
            raise DecodeError(
                f"The event {event.id} in the stream of {entry.name!r} is named {event.name!r}.",
                reason="wrong_channel",
            )

        return event, body, memory

    def _accepts(self, event: Event, subscription: Subscription) -> bool:
        # In a group, any process of the service may have emitted the event and run its receivers.
        is_ours = subscription.group and event.source == self._config.service

        if is_ours or event.node in self._siblings:
            if not subscription.echo:
                self._counters.add("echoes")

            return subscription.echo

        if subscription.sources is not None and event.source not in subscription.sources:
            self._counters.add("filtered")
            return False

        return True

    def _reject(self, entry: Entry, fields: Fields, error: DecodeError) -> DeadLetter:
        self._counters.add("rejected")
        self._counters.add(f"rejected_{error.reason}")
        sample = bytes(fields.get(b"event", b""))[:SAMPLE]
        self._log.warning(
            f"rejected {error.reason}",
            "The entry %s in the stream of %r is rejected (%s): %s It starts with %r.",
            entry.id,
            entry.name,
            error.reason,
            error,
            sample,
            extra={"signal": entry.name, "service": self._config.service},
        )
        emit(
            event_rejected, self._config.service, name=entry.name, reason=error.reason, error=error
        )
        now = round(time.time() * 1000)
        return DeadLetter(
            reason="undecodable",
            entry=entry.id,
            fields=self._stored_fields(entry.size(), fields),
            error=f"{error.reason}: {error}"[:MAX_ERROR_CHARS],
            first=now,
            last=now,
        )

    def _stored_fields(self, size: int, fields: Fields) -> dict[bytes, bytes]:
        """Return the fields that a dead letter stores.

        Of an entry above the size limit, store a sample, the length and the SHA-256 of each field:
        the whole fields would fill the memory of the worker and of Redis.
        """
        if size <= self._config.max_event_bytes:
            return {bytes(name): bytes(value) for name, value in fields.items()}

        samples: dict[bytes, bytes] = {}

        for name, value in itertools.islice(fields.items(), MAX_FIELDS):
            prefix = bytes(name)[:SAMPLE]
            digest = value.sha256 if isinstance(value, Large) else sha256(value).hexdigest()
            samples[prefix + b".sample"] = bytes(value)[:SAMPLE]
            samples[prefix + b".length"] = b"%d" % len(value)
            samples[prefix + b".sha256"] = digest.encode()

        return samples


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

    def add(self, deliveries: Sequence[Delivery]) -> None:
        """Queue deliveries for the worker threads."""
        self.in_flight.add(deliveries)
        self.queue.put(deliveries)

    def end(self, found: DecodedEntries, others: Sequence[Outcome] = ()) -> None:
        """Write the outcomes of entries that became no delivery, and other outcomes."""
        if not (found.skipped or found.dead or others):
            return

        outcomes = [self.outcomes.skipped(entry) for entry in found.skipped]
        outcomes += [self.outcomes.rejected(entry, letter) for entry, letter in found.dead]
        self.acknowledger.write([*outcomes, *others])
