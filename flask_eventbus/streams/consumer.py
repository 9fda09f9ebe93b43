"""Consume the streams of a node: put the parts of this package together, start and stop them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence

import redis

from ..logs import BoundedLog, get_logger
from ..receivers.delivery import Delivery, InFlight
from ..receivers.dispatcher import Dispatcher, Failure
from ..receivers.workers import WorkerThreads
from ..routing.subscriptions import Subscription, subscription_for
from ..signals import emit, listener_connected, listener_lost
from ..transport.connection import OUTAGE
from ..transport.connections import Context
from ..transport.pipe import Pipe
from .acknowledger import WRITE_SOON, Acknowledger
from .decoder import EntryDecoder, Intake
from .fanout import Fanout
from .group import Group, GroupGoneError
from .maintenance import Maintenance
from .outcomes import Outcome, Outcomes
from .reader import StreamReader
from .reclaim import Reclaimer
from .retry_queue import RetryQueue

logger = get_logger(__name__)

#: Seconds that Redis may take to answer a write of outcomes.
WRITE_TIMEOUT = 2.0

#: Seconds after which finished deliveries are written to Redis. Short receivers share a round
#: trip; the outcome of a long one is stored before the next starts.
WRITE_EVERY = 0.005


class Consumer:
    """The stream consumer of a node: it reads entries, runs receivers and writes outcomes.

    :param pool: the threads in which receivers run.
    """

    def __init__(self, context: Context, *, dispatcher: Dispatcher, pool: WorkerThreads) -> None:
        self._config = context.config
        self._counters = context.counters
        self._dispatcher = dispatcher
        self._pool = pool
        self._subscriptions: Mapping[str, Subscription] = {}
        self._is_alone = True
        self._log = BoundedLog(logger)
        self._lost_since: float | None = None
        self._was_connected = False
        self._is_stopping = False
        self._is_disowned = False
        #: Monotonic time after which the next thread that has run a receiver writes outcomes.
        self._write_at = 0.0
        self.name = f"{socket.gethostname()}-{os.getpid()}-{context.node}"
        self._create_write_side(context)
        self._create_read_side(context)

    def _create_write_side(self, context: Context) -> None:
        """Create what handles entries: outcomes, retries and claims, over one connection."""
        self._in_flight = InFlight()
        self._group = self._group_on(context, WRITE_TIMEOUT)
        self._acknowledger = Acknowledger(context, group=self._group, in_flight=self._in_flight)
        self._outcomes = Outcomes(context, self._dispatcher, now=self._acknowledger.clock.now)
        self._intake = Intake(
            decoder=EntryDecoder(context),
            in_flight=self._in_flight,
            queue=self._pool.queue,
            outcomes=self._outcomes,
            acknowledger=self._acknowledger,
        )
        self._retries = RetryQueue(
            self._group.pipe,
            context,
            dispatcher=self._dispatcher,
            outcomes=self._outcomes,
            acknowledger=self._acknowledger,
            receives=self._receives,
        )
        self._reclaimer = Reclaimer(context, group=self._group, intake=self._intake)

    def _create_read_side(self, context: Context) -> None:
        """Create what reads streams, with the group and without one, each over connections."""
        answer_timeout = context.timing.answer_timeout
        group, busy, silent = (
            self._group_on(context, answer_timeout, unlisted=self._group.unlisted) for _ in range(3)
        )
        intake, reclaimer = self._intake, self._reclaimer
        self._reader = StreamReader(
            context,
            consumer=self,
            group=group,
            many=(busy, silent),
            intake=intake,
            reclaimer=reclaimer,
        )
        self._maintenance = Maintenance(
            context,
            reader=self._reader,
            group=self._group,
            intake=intake,
            retries=self._retries,
            reclaimer=reclaimer,
        )
        self._fanout = Fanout(context, decoder=intake.decoder, queue=intake.queue)

    def _group_on(
        self, context: Context, timeout: float, unlisted: set[str] | None = None
    ) -> Group:
        return Group(
            Pipe(context.connections, timeout=timeout),
            keys=context.keys,
            service=context.config.service,
            consumer=self.name,
            unlisted=unlisted,
            max_bytes=context.config.max_event_bytes,
            timing=context.timing,
        )

    def _receives(self, name: str) -> bool:
        """Return True if this process shares the stream of ``name`` with its siblings."""
        found = subscription_for(name, self._subscriptions)
        is_read = found is not None and found.group
        return is_read and self._dispatcher.has_receivers(name)

    @property
    def is_own_thread(self) -> bool:
        """Return True if called from the reader, the fan-out reader or the maintenance thread."""
        threads = (self._reader, self._maintenance, self._fanout)
        return any(found.is_own_thread for found in threads)

    @property
    def connected(self) -> bool:
        """Return True if every subscribed stream is read."""
        return self._is_read(self._reader) and self._is_read(self._fanout)

    @property
    def refused(self) -> dict[str, str]:
        """Reasons why Redis refuses a stream, by signal, unless a channel carries it too."""
        subscriptions = self._subscriptions
        refused = {**self._reader.catalogue.refused, **self._fanout.catalogue.refused}

        if self.fatal is not None:
            refused = dict.fromkeys(subscriptions, str(self.fatal))

        return {
            name: reason
            for name, reason in refused.items()
            if name in subscriptions and subscriptions[name].via == "stream"
        }

    @property
    def without_receiver(self) -> frozenset[str]:
        """Streams that are not read because this process has no receiver for them."""
        return self._reader.catalogue.without_receiver | self._fanout.catalogue.without_receiver

    @property
    def alarms(self) -> dict[str, str]:
        """Alarms about streams that another program changed, by signal."""
        return {**self._reader.alarms, **self._fanout.alarms}

    @property
    def last_heard(self) -> float | None:
        """Monotonic time of the last answer to a read; ``None`` before the first."""
        return self._reader.last_heard

    @property
    def fatal(self) -> Exception | None:
        """The reason why this Redis can never serve streams; ``None`` if it can."""
        return self._reader.fatal

    def _is_read(self, thread: StreamReader | Fanout) -> bool:
        return not thread.catalogue.subscribed or (thread.ready and not self.refused)

    def update(self, subscriptions: Mapping[str, Subscription], *, alone: bool) -> None:
        """Use these subscriptions to streams from now on; :meth:`start` starts their threads.

        :param alone: True if no channel listener reports a lost connection.
        """
        self._subscriptions = subscriptions
        self._is_alone = alone
        self._reader.catalogue.update(subscriptions)
        self._fanout.catalogue.update(subscriptions)

    def start(self) -> None:
        """Start the threads that the present subscriptions need."""
        if self._reader.catalogue.subscribed:
            self._reader.start()
            self._maintenance.start()

        if self._fanout.catalogue.subscribed:
            self._fanout.start()

    def ready(self, timeout: float | None) -> bool:
        """Wait until every subscribed stream is read. Return False after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout

        self._wait_for(self._reader, deadline)
        self._wait_for(self._fanout, deadline)
        return self.connected

    def _wait_for(self, thread: StreamReader | Fanout, deadline: float | None) -> None:
        with thread.changed:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            thread.changed.wait_for(
                lambda: self._is_read(thread) or self._is_stopping or self.fatal is not None, left
            )

    def stop_reading(self) -> None:
        """Stop reading and reclaiming entries, and start no further delivery."""
        self._is_stopping = True
        self._maintenance.stop()
        self._reader.stop()
        self._fanout.stop()

    def release(self, deadline: float) -> None:
        """Write outcomes and release the other entries, after the worker threads have ended.

        The maintenance thread does it until the deadline; :meth:`end` waits for it.
        """
        # Half of the time at most: a reader may wait for a server that does not answer.
        readers_end = (time.monotonic() + deadline) / 2
        self._reader.end(readers_end)
        self._fanout.end(readers_end)
        self._maintenance.finish(deadline)

    def end(self, deadline: float) -> None:
        """Wait until all entries are released, or until the deadline."""
        self._maintenance.end(deadline)

    def end_with_app(self) -> None:
        """Stop everything after the app is gone, without :meth:`stop_reading`."""
        self._is_stopping = True
        self._maintenance.stop()
        self._fanout.stop()
        self._pool.queue.close()
        self._pool.queue.clear()
        self._pool.close()
        self._maintenance.finish(time.monotonic() + WRITE_TIMEOUT)

    def disown(self) -> None:
        """Stop in a forked child. Its entries and connections are the parent's."""
        self._is_stopping = self._is_disowned = True
        self._reader.disown()
        self._maintenance.disown()
        self._fanout.disown()

    def on_lost(self, error: Exception) -> None:
        if self._lost_since is not None:
            return

        self._lost_since = time.monotonic()

        if self._is_alone:
            self._log.warning(
                "lost", "The stream reader lost Redis (%s); it reconnects by itself.", error
            )
            emit(listener_lost, self._config.service, error=error)

    def on_ready(self) -> None:
        lost_since, self._lost_since = self._lost_since, None
        reconnected, self._was_connected = self._was_connected, True
        seconds = 0.0 if lost_since is None else time.monotonic() - lost_since
        self._maintenance.wake()

        if not reconnected:
            logger.info("Reading the streams of %s.", ", ".join(sorted(self._reader.joined)))

        if not self._is_alone:
            return

        if lost_since is not None:
            self._log.warning(
                "connected",
                "The stream reader is connected again after %.1f s; no event is lost.",
                seconds,
            )

        if lost_since is not None or not reconnected:
            emit(listener_connected, self._config.service, reconnected=reconnected, seconds=seconds)

    def run(self, deliveries: Sequence[Delivery]) -> float:
        """Run the receivers of deliveries, in order, and write the outcomes.

        :return: the seconds that the receivers took, without the writes to Redis.
        """
        seconds = 0.0
        last = deliveries[-1]
        queue, schedule = self._pool.queue, self._acknowledger.schedule
        now = time.monotonic()
        # Short receivers of all threads share a write.
        self._write_at = now + WRITE_EVERY if now > self._write_at else self._write_at

        for number, delivery in enumerate(deliveries):
            if self._is_stopping:
                break

            try:
                started = self._attempt(delivery, now)
            except BaseException:
                # They stay pending, and are claimed again as from a worker that died.
                self._in_flight.remove(deliveries[number:])
                raise

            now = time.monotonic()
            seconds += now - started

            if self._is_disowned:
                return seconds

            if (
                now > self._write_at
                or now - started > WRITE_EVERY
                or (delivery is last and not queue.waiting)
            ):
                self._acknowledger.write()
                now = time.monotonic()
                self._write_at = now + WRITE_EVERY
            elif now + WRITE_SOON < schedule.next:
                # The next receiver may take long.
                schedule.within(WRITE_SOON)

        if self._is_stopping:
            self._acknowledger.write()

        return seconds

    def _attempt(self, delivery: Delivery, now: float) -> float:
        """Run the receivers of a delivery, and return the monotonic time at which they started.

        :param now: the present monotonic time.
        """
        if not delivery.subscription.group:
            self._dispatcher.dispatch_once(delivery.event)
            return now

        receivers = None

        if delivery.retry is None:
            receivers = self._dispatcher.receivers(delivery.event)

            # The connected receivers may accept other services only.
            if not receivers and not self._dispatcher.has_receivers(delivery.name):
                self._release(delivery)
                return time.monotonic()

        is_first = delivery.retry is None and delivery.crashes is None

        # False if the claim expired, or if another worker took the entry or the retry.
        if not (
            self._in_flight.start(delivery, now) and (is_first or self._record_start(delivery))
        ):
            self._in_flight.remove([delivery])
            self._counters.add("released")
            return time.monotonic()

        started = now if is_first else time.monotonic()
        # Its start may have replaced the record.
        record = delivery.retry
        only = None if record is None else record.receiver
        failures = self._dispatcher.dispatch(delivery.event, only=only, receivers=receivers)

        # Queued at once: the next receiver may take long, or end the process.
        if self._is_disowned:
            pass
        elif record is not None and failures is None:
            self._acknowledger.add(self._retries.postponed(delivery, record))
        elif failures:
            self._add_outcome(delivery, failures)
        elif record is None:
            self._acknowledger.handled.append(delivery)
        else:
            self._acknowledger.add(Outcome(delivery.name, delivery.entry, delivery))

        return started

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
        # The reader looks for receivers once a second, and would read on until then.
        self._reader.catalogue.due_at = 0.0
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
