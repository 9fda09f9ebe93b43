"""Takes entries into this process: their events wait for the worker threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..receivers.delivery import Delivery, InFlight
from ..receivers.workers import DeliveryQueue
from ..routing.subscriptions import Subscription
from .acknowledger import Acknowledger
from .decoder import DecodedEntries, EntryDecoder
from .group import Entry
from .outcomes import Outcome, Outcomes


class Intake:
    """Decodes entries, queues the events, and ends the entries that have none.

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
        self._decoder = decoder
        self.in_flight = in_flight
        self.queue = queue
        self.outcomes = outcomes
        self.acknowledger = acknowledger

    def decode(
        self, entries: Sequence[Entry], subscriptions: Mapping[str, Subscription]
    ) -> DecodedEntries:
        """Decode entries, each for the subscription of its stream."""
        return self._decoder.decode(entries, subscriptions)

    def add(self, deliveries: Sequence[Delivery]) -> None:
        """Queue deliveries for the worker threads."""
        self.in_flight.add(deliveries)
        self.queue.put(deliveries)

    def end(self, found: DecodedEntries, others: Iterable[Outcome] = ()) -> None:
        """Write the outcomes of entries that became no delivery, and other outcomes."""
        outcomes = [self.outcomes.skipped(entry) for entry in found.skipped]
        outcomes += [self.outcomes.rejected(entry, letter) for entry, letter in found.dead]
        outcomes += others

        if outcomes:
            self.acknowledger.write(outcomes)
