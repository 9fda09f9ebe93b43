"""What becomes of one entry of a stream: a delivery, an acknowledgement, or a dead letter."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Container
from dataclasses import dataclass, field
from hashlib import sha256

from ..codec.codec import Codec
from ..codec.records import MOST_ERROR, DeadLetter
from ..config import Config
from ..errors import DecodeError
from ..event import Event, opened
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.delivery import Delivery
from ..routing.subscriptions import Subscription
from ..signals import emit, event_rejected
from ..text import plain
from ..transport.pipe import SAMPLE, Large
from .group import Entry

logger = get_logger(__name__)

#: Fields of an entry that is too large of which a dead letter keeps samples.
MOST_FIELDS = 8

#: Characters of a payload that are kept in a dead letter for a person to read.
MOST_PAYLOAD = 4_000


@dataclass(slots=True)
class DecodedEntries:
    """Entries that were read, by what is to be done with them."""

    deliveries: list[Delivery] = field(default_factory=list)
    #: What is acknowledged without a receiver: echoes, other sources, what is trimmed.
    skipped: list[Entry] = field(default_factory=list)
    #: What is no event.
    dead: list[tuple[Entry, DeadLetter]] = field(default_factory=list)
    #: What was trimmed before it could be read.
    trimmed: int = 0


class EntryDecoder:
    """Decodes and checks entries, and lets through what this service is to handle.

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
        self, entries: list[Entry], subscription_of: dict[str, Subscription]
    ) -> DecodedEntries:
        """Sort entries of streams, each by the subscription of its name."""
        found = DecodedEntries()
        claimed_until = time.monotonic() + self._config.claim_after

        for entry in entries:
            self._decode(entry, subscription_of[entry.name], claimed_until, found)

        return found

    def _decode(
        self, entry: Entry, subscription: Subscription, claimed_until: float, found: DecodedEntries
    ) -> None:
        if entry.fields is None:
            found.trimmed += 1
            found.skipped.append(entry)
            return

        try:
            body = self._body(entry)
            event, memory = self._event(entry, body)
        except DecodeError as error:
            found.dead.append((entry, self._reject(entry, error)))
            return

        if not self._wanted(event, subscription):
            found.skipped.append(entry)
            return

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

    def _body(self, entry: Entry) -> bytes:
        body = (entry.fields or {}).get(b"event")

        if body is None:
            raise DecodeError(
                f"The entry {entry.id} has no field 'event'.", reason="missing_attribute"
            )

        self._codec.check_size(len(body))
        return bytes(body)

    def _event(self, entry: Entry, body: bytes) -> tuple[Event, int]:
        event, memory = self._codec.decode_to_wait(body, via="stream")

        if event.name != entry.name:
            raise DecodeError(
                f"The event {event.id} in the stream of {entry.name!r} says it is {event.name!r}.",
                reason="wrong_channel",
            )

        return event, memory

    def _wanted(self, event: Event, subscription: Subscription) -> bool:
        # Without a group only the process that emitted it has run its receivers.
        is_ours = subscription.group and event.source == self._config.service

        if is_ours or event.node in self._siblings:
            if not subscription.echo:
                self._counters.add("echoes")

            return subscription.echo

        if not subscription.hears(event.source):
            self._counters.add("filtered")
            return False

        return True

    def _reject(self, entry: Entry, error: DecodeError) -> DeadLetter:
        self._counters.add("rejected")
        self._counters.add(f"rejected_{error.reason}")
        sample = bytes((entry.fields or {}).get(b"event", b""))[:SAMPLE]
        self._log.warning(
            f"rejected {error.reason}",
            "The entry %s in the stream of %r is rejected (%s): %s It begins with %r.",
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
            fields=self._kept(entry),
            error=f"{error.reason}: {error}"[:MOST_ERROR],
            first=now,
            last=now,
        )

    def _kept(self, entry: Entry) -> dict[bytes, bytes]:
        """Return what a dead letter keeps of an entry: of one above the limit, no field whole.

        Its worker and Redis would hold a body of any size once more, for as long as it lies there.
        """
        fields = entry.fields or {}

        if entry.size() <= self._config.max_event_bytes:
            return {bytes(name): bytes(value) for name, value in fields.items()}

        kept: dict[bytes, bytes] = {}

        for name, value in itertools.islice(fields.items(), MOST_FIELDS):
            mark = bytes(name)[:SAMPLE]
            known = value.sha256 if isinstance(value, Large) else sha256(value).hexdigest()
            kept[mark + b".sample"] = bytes(value)[:SAMPLE]
            kept[mark + b".length"] = b"%d" % len(value)
            kept[mark + b".sha256"] = known.encode()

        return kept


def readable(event: Event) -> str:
    """Return a payload as JSON, as ``tail --json`` shows it, cut to :data:`MOST_PAYLOAD`."""
    payload = plain(dict(opened(event).payload))
    return json.dumps(payload, ensure_ascii=False, allow_nan=False)[:MOST_PAYLOAD]
