"""Run the receivers of deliveries, in the worker threads."""

from __future__ import annotations

import time
from collections.abc import Sequence

import redis

from ..logs import get_logger
from ..receivers.delivery import Delivery
from ..receivers.dispatcher import Dispatcher, Failure
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from .acknowledger import WRITE_SOON
from .decoder import Intake
from .group import Group, GroupGoneError
from .outcomes import Outcome
from .retry_queue import RetryQueue

logger = get_logger(__name__)

#: Seconds after which finished deliveries are written to Redis. Short receivers share a round
#: trip; the outcome of a long one is stored before the next starts.
WRITE_EVERY = 0.005


class Attempts:
    """Runs receivers for deliveries, one after the other, and queues the outcomes.

    :param group: the consumer group on the write connection.
    """

    def __init__(
        self,
        context: Context,
        *,
        dispatcher: Dispatcher,
        group: Group,
        intake: Intake,
        retries: RetryQueue,
    ) -> None:
        self._counters = context.counters
        self._dispatcher = dispatcher
        self._group = group
        self._in_flight = intake.in_flight
        self._outcomes = intake.outcomes
        self._acknowledger = intake.acknowledger
        self._retries = retries
        self._is_stopping = False
        self._is_disowned = False

    def run(self, deliveries: Sequence[Delivery]) -> float:
        """Run the receivers of deliveries, in order, and write the outcomes.

        :return: the seconds that the receivers took, without the writes to Redis.
        """
        seconds = 0.0
        due = time.monotonic() + WRITE_EVERY

        for number, delivery in enumerate(deliveries):
            if self._is_stopping:
                break

            try:
                seconds += self._attempt(delivery)
            except BaseException:
                # They stay pending, and are claimed again as from a worker that died.
                self._in_flight.remove(deliveries[number:])
                raise

            if self._is_disowned:
                return seconds

            if time.monotonic() > due:
                self._acknowledger.write()
                due = time.monotonic() + WRITE_EVERY
            elif number + 1 < len(deliveries):
                # The next receiver may take long.
                self._acknowledger.schedule.within(WRITE_SOON)

        self._acknowledger.write()
        return seconds

    def stop(self) -> None:
        """Start no further delivery."""
        self._is_stopping = True

    def disown(self) -> None:
        """Stop in a forked child. Write no outcome: the deliveries are the parent's."""
        self._is_stopping = self._is_disowned = True

    def _attempt(self, delivery: Delivery) -> float:
        """Run the receivers of a delivery, and return the seconds that they took."""
        if not delivery.subscription.group:
            start = time.monotonic()
            self._dispatcher.dispatch_once(delivery.event)
            return time.monotonic() - start

        receivers = None

        if delivery.retry is None:
            receivers = self._dispatcher.receivers(delivery.event)

            # The connected receivers may accept other services only.
            if not receivers and not self._dispatcher.has_receivers(delivery.name):
                self._release(delivery)
                return 0.0

        is_first = delivery.retry is None and delivery.crashes is None

        # False if the claim expired, or if another worker took the entry or the retry.
        if not (self._in_flight.start(delivery) and (is_first or self._record_start(delivery))):
            self._in_flight.remove([delivery])
            self._counters.add("released")
            return 0.0

        record = delivery.retry
        only = None if record is None else record.receiver
        start = time.monotonic()
        failures = self._dispatcher.dispatch(delivery.event, only=only, receivers=receivers)
        seconds = time.monotonic() - start

        # Queued at once: the next receiver may take long, or end the process.
        if self._is_disowned:
            pass
        elif record is not None and failures is None:
            self._acknowledger.add(self._retries.postponed(delivery, record))
        elif failures or record is not None:
            self._add_outcome(delivery, failures or ())
        else:
            self._acknowledger.add(Outcome(delivery.name, delivery.entry, delivery))

        return seconds

    def _add_outcome(self, delivery: Delivery, failures: Sequence[Failure]) -> None:
        try:
            self._acknowledger.add(self._outcomes.of(delivery, failures))
        except Exception:
            # It stays pending, and is claimed again as from a worker that died.
            self._counters.add("handling_failed")
            logger.exception(
                "Could not record the outcome of the event %s; it will be delivered again.",
                delivery.event.id,
                extra=delivery.event.fields,
            )
            self._in_flight.remove([delivery])

    def _release(self, delivery: Delivery) -> None:
        """Release an entry whose receivers were disconnected after it was read."""
        self._in_flight.remove([delivery])
        self._counters.add("released")

        try:
            with self._acknowledger.lock:
                self._group.release_own(delivery.name, {delivery.entry: delivery.crashes or 0})
        except (GroupGoneError, redis.ResponseError, *OUTAGE) as error:
            # It stays pending, and another worker claims it after EVENTBUS_CLAIM_AFTER.
            logger.debug("Could not release the entry %s: %s", delivery.entry, error)

    def _record_start(self, delivery: Delivery) -> bool:
        """Count the start of a retry, or of an entry that ended a worker, in Redis.

        The count shows other workers if this process dies as well. Return False if another
        worker has the delivery, or if Redis did not store the count.
        """
        try:
            if delivery.retry is not None:
                return self._retries.record_start(delivery, delivery.retry)

            times = (delivery.crashes or 0) + 1

            with self._acknowledger.lock:
                return self._group.record_start(delivery.name, delivery.entry, times=times)
        except (GroupGoneError, redis.ResponseError, *OUTAGE) as error:
            logger.debug("The entry %s is not started: %s", delivery.entry, error)
            return False
