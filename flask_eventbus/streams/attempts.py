"""Runs the receivers of what was read of streams, in the threads of the pool."""

from __future__ import annotations

import time
from collections.abc import Sequence

import redis

from ..logs import Counters, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..receivers.dispatcher import Dispatcher, Status
from ..receivers.retries import Failure
from ..transport.connections import OUTAGE
from .acknowledger import Acknowledger
from .group import Group, GroupGoneError
from .outcomes import Outcomes
from .retry_queue import RetryQueue

logger = get_logger(__name__)

#: Seconds between two settlements of a batch: short receivers share a round trip, and what a
#: long one did is known to Redis before the next begins.
WRITE_EVERY = 0.005


class Attempts:
    """Begins deliveries, one after the other, and passes on how their receivers ended.

    :param group: on the settler's connection.
    """

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        group: Group,
        in_flight: InFlight,
        outcomes: Outcomes,
        acknowledger: Acknowledger,
        retries: RetryQueue,
        counters: Counters,
    ) -> None:
        self._dispatcher = dispatcher
        self._group = group
        self._in_flight = in_flight
        self._outcomes = outcomes
        self._acknowledger = acknowledger
        self._retries = retries
        self._counters = counters
        self._is_stopping = False
        self._is_disowned = False

    def run(self, deliveries: Sequence[Delivery]) -> None:
        """Run receivers for deliveries, in order, and settle them."""
        due = time.monotonic() + WRITE_EVERY

        for number, delivery in enumerate(deliveries):
            if self._is_stopping:
                break

            try:
                self._attempt(delivery)
            except BaseException:
                # They come again, as from a worker that ended.
                self._in_flight.remove(deliveries[number:])
                raise

            if self._is_disowned:
                return

            if time.monotonic() > due:
                self._acknowledger.write()
                due = time.monotonic() + WRITE_EVERY

        self._acknowledger.write()

    def stop(self) -> None:
        """Begin nothing more."""
        self._is_stopping = True

    def disown(self) -> None:
        """In a forked child: begin nothing more, and settle nothing, which is the parent's."""
        self._is_stopping = self._is_disowned = True

    def _attempt(self, delivery: Delivery) -> None:
        if not delivery.in_group:
            self._dispatcher.dispatch_once(delivery.event)
            return

        receivers = None

        if delivery.retry is None:
            receivers = self._dispatcher.receivers(delivery.event)

            # Those that are connected may hear other services only.
            if not receivers and not self._dispatcher.has_receivers(delivery.name):
                self._leave_to_others(delivery)
                return

        is_first = delivery.retry is None and delivery.crashes is None

        # Whether it still is this process's, as far as can be known.
        if not (self._in_flight.start(delivery) and (is_first or self._is_noted(delivery))):
            self._in_flight.remove([delivery])
            self._counters.add("given_away")
            return

        record = delivery.retry
        only = None if record is None else record.receiver
        result = self._dispatcher.dispatch(delivery.event, only=only, receivers=receivers)

        # What it came to is not kept here: the next receiver may take long, or end the process.
        if self._is_disowned:
            return
        elif record is not None and result.status is Status.GONE:
            self._acknowledger.add(self._retries.postponed(delivery, record))
        elif result.failures or record is not None:
            self._judge(delivery, result.failures)
        else:
            self._acknowledger.acknowledge(delivery)

    def _judge(self, delivery: Delivery, failures: Sequence[Failure]) -> None:
        try:
            self._acknowledger.add(self._outcomes.of(delivery, failures))
        except Exception:
            # It stays pending, and is taken over as from a worker that ended.
            self._counters.add("handling_failed")
            logger.exception(
                "Could not record the outcome of the event %s; it will be delivered again.",
                delivery.event.id,
                extra=delivery.event.fields,
            )
            self._in_flight.remove([delivery])

    def _leave_to_others(self, delivery: Delivery) -> None:
        """Hand back an entry whose receivers were disconnected after it was read."""
        self._in_flight.remove([delivery])
        self._counters.add("given_away")

        try:
            with self._acknowledger.lock:
                if any(
                    found.id == delivery.entry for found in self._group.own_pending(delivery.name)
                ):
                    self._group.release(delivery.name, {delivery.entry: delivery.crashes or 0})
        except (GroupGoneError, redis.ResponseError, *OUTAGE) as error:
            # It stays pending, and another worker claims it after EVENTBUS_CLAIM_AFTER.
            logger.debug("The entry %s is not handed back: %s", delivery.entry, error)

    def _is_noted(self, delivery: Delivery) -> bool:
        """Note in Redis that it is begun, where it is a retry, or a worker that ended began it.

        If it ends this process as well, that is to be known.
        """
        try:
            return self._note(delivery)
        except (GroupGoneError, redis.ResponseError, *OUTAGE) as error:
            logger.debug("The entry %s is not begun: %s", delivery.entry, error)
            return False

    def _note(self, delivery: Delivery) -> bool:
        if delivery.retry is not None:
            return self._retries.begin(delivery, delivery.retry)

        times = (delivery.crashes or 0) + 1

        with self._acknowledger.lock:
            return self._group.record_start(delivery.name, delivery.entry, times=times)
