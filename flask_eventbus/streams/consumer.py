"""What a node does with streams: who reads them, runs receivers, settles, looks after the rest."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Container, Mapping

import redis

from ..codec.codec import Codec
from ..config import Config
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.delivery import InFlight
from ..receivers.dispatcher import Dispatcher
from ..receivers.workers import WorkerThreads
from ..routing.bus_signal import Receiver
from ..routing.subscriptions import Subscription, subscription_for
from ..signals import emit, listener_connected, listener_lost
from ..transport.connections import OUTAGE, Connections
from ..transport.keys import StreamKeys
from ..transport.pipe import Pipe
from .acknowledger import Acknowledger
from .attempts import Attempts
from .decoder import EntryDecoder
from .duplicates import Duplicates
from .fanout import Fanout
from .group import Group, GroupGoneError
from .maintenance import Maintenance
from .membership import Catalogue, Membership
from .orphans import Orphans
from .outcomes import Outcomes, RetryCounts
from .reader import StreamReader
from .reclaim import Reclaimer, Trims
from .retry_queue import RetryQueue

logger = get_logger(__name__)

#: Seconds that an answer of Redis may take, the longest wait for an entry included.
ANSWER_TIMEOUT = 5.0

#: Seconds that Redis has to take what became of events.
WRITE_TIMEOUT = 2.0

#: Seconds after a deadline for the thread that meets it to log what it left.
REPORT_TIME = 0.2


class Consumer:
    """The stream half of a node that listens.

    :param subscriptions: what the service hears; asked for whenever it may have changed.
    :param pool: where receivers run.
    :param retries_of: how often a receiver asks to be tried again at an event ``name``.
    :param is_alone: whether nobody else tells of a Redis that is lost.
    """

    def __init__(
        self,
        *,
        config: Config,
        connections: Connections,
        codec: Codec,
        dispatcher: Dispatcher,
        pool: WorkerThreads,
        subscriptions: Callable[[], Mapping[str, Subscription]],
        counters: Counters,
        node: str,
        siblings: Container[str],
        app_exists: Callable[[], bool],
        retries_of: Callable[[str, Receiver], int | None],
        is_alone: Callable[[], bool],
    ) -> None:
        self._config = config
        self._subscriptions = subscriptions
        self._is_alone = is_alone
        self._log = BoundedLog(logger)
        self._in_flight = InFlight()
        self._lost_since: float | None = None
        self._was_connected = False
        self._is_stopping = False
        self.name = f"{socket.gethostname()}-{os.getpid()}-{node}"
        self._pool = pool
        self._dispatcher = dispatcher
        counts = RetryCounts(config=config, dispatcher=dispatcher, receiver_retries=retries_of)
        keys = StreamKeys(config.prefix)
        reading = Pipe(connections, timeout=ANSWER_TIMEOUT)
        settling = Pipe(connections, timeout=WRITE_TIMEOUT)
        self._group = self._group_on(settling, keys)
        group = self._group_on(reading, keys, unlisted=self._group.unlisted)
        decoder = EntryDecoder(config=config, codec=codec, counters=counters, siblings=siblings)
        self._acknowledger = Acknowledger(
            config=config,
            keys=keys,
            group=self._group,
            in_flight=self._in_flight,
            counters=counters,
            expect=lambda name, due: self._maintenance.expect(name, due),
        )
        outcomes = Outcomes(
            config=config,
            keys=keys,
            retries_of=counts.after,
            failures=dispatcher.failures,
            clock=self._acknowledger.clock,
        )
        self._retries = RetryQueue(
            settling,
            config=config,
            keys=keys,
            codec=codec,
            outcomes=outcomes,
            lock=self._acknowledger.lock,
            clock=self._acknowledger.clock,
            knows=lambda event, name: bool(dispatcher.receivers(event, only=name)),
            retries_of=counts.of_receiver,
        )
        self.attempts = Attempts(
            dispatcher=dispatcher,
            group=self._group,
            in_flight=self._in_flight,
            outcomes=outcomes,
            acknowledger=self._acknowledger,
            retries=self._retries,
            counters=counters,
        )
        reclaimer = Reclaimer(
            config=config,
            group=self._group,
            decoder=decoder,
            in_flight=self._in_flight,
            queue=pool.queue,
            outcomes=outcomes,
            acknowledger=self._acknowledger,
            trims=Trims(self._group, service=config.service, counters=counters),
            counters=counters,
            retries_of=counts.of_event,
        )
        duplicates = Duplicates(reading, config=config, keys=keys, counters=counters)
        trims = Trims(group, service=config.service, counters=counters)
        self._membership = Membership(
            config=config,
            catalogue=Catalogue(
                reading,
                config=config,
                keys=keys,
                subscriptions=subscriptions,
                grouped=True,
                has_receivers=dispatcher.has_receivers,
            ),
            group=group,
            duplicates=duplicates,
            decoder=decoder,
            in_flight=self._in_flight,
            queue=pool.queue,
            outcomes=outcomes,
            acknowledger=self._acknowledger,
            reclaimer=reclaimer,
            trims=trims,
            counters=counters,
        )
        self._reader = StreamReader(
            membership=self._membership,
            group=group,
            duplicates=duplicates,
            decoder=decoder,
            in_flight=self._in_flight,
            queue=pool.queue,
            outcomes=outcomes,
            acknowledger=self._acknowledger,
            reclaimer=reclaimer,
            trims=trims,
            counters=counters,
            max_bytes=config.max_event_bytes,
            node=node,
            app_exists=app_exists,
            on_entries=lambda: self._maintenance.watch_in_flight(),
            released_streams=lambda: self._maintenance.released_streams(),
            on_lost=self._lost,
            on_ready=self._found,
            on_end=self._abandoned,
        )
        self._maintenance = Maintenance(
            config=config,
            names=lambda: self._membership.joined,
            group=self._group,
            in_flight=self._in_flight,
            queue=pool.queue,
            acknowledger=self._acknowledger,
            retries=self._retries,
            reclaimer=reclaimer,
            orphans=Orphans(
                service=config.service,
                keys=keys,
                retries=self._retries,
                acknowledger=self._acknowledger,
                receives=self._receives,
            ),
            counters=counters,
            node=node,
            release=self._conclude,
        )
        following = Pipe(connections, timeout=ANSWER_TIMEOUT)
        self._fanout = Fanout(
            following,
            config=config,
            catalogue=Catalogue(
                following,
                config=config,
                keys=keys,
                subscriptions=subscriptions,
                grouped=False,
                has_receivers=dispatcher.has_receivers,
            ),
            keys=keys,
            decoder=decoder,
            queue=pool.queue,
            counters=counters,
            node=node,
            app_exists=app_exists,
        )

    def _receives(self, name: str) -> bool:
        """Return True if this process shares the stream of ``name`` with its siblings."""
        found = subscription_for(name, self._subscriptions())
        is_read = found is not None and found.via != "channel" and found.group
        return is_read and self._dispatcher.has_receivers(name)

    def _group_on(self, pipe: Pipe, keys: StreamKeys, unlisted: set[str] | None = None) -> Group:
        return Group(
            pipe,
            keys=keys,
            service=self._config.service,
            consumer=self.name,
            unlisted=unlisted,
            max_bytes=self._config.max_event_bytes,
        )

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is one of those that read and look after."""
        threads = (self._reader, self._maintenance, self._fanout)
        return any(found.is_own_thread for found in threads)

    @property
    def hears(self) -> bool:
        """Whether anything subscribed is heard over streams."""
        return any(found.via != "channel" for found in self._subscriptions().values())

    @property
    def connected(self) -> bool:
        """Whether every stream subscribed is being read."""
        return self._reads_all and self._follows_all

    @property
    def refused(self) -> dict[str, str]:
        """Streams that Redis refuses, and that no channel stands in for, with its reasons."""
        subscriptions = self._subscriptions()
        refused = {**self._membership.refused, **self._fanout.refused}

        if self.fatal is not None:
            refused = dict.fromkeys(subscriptions, str(self.fatal))

        return {
            name: reason
            for name, reason in refused.items()
            if name in subscriptions and subscriptions[name].via == "stream"
        }

    @property
    def without_receiver(self) -> frozenset[str]:
        """The streams that are not read, because this process has no receiver for them."""
        return self._membership.without_receiver | self._fanout.without_receiver

    @property
    def alarms(self) -> dict[str, str]:
        """What somebody did to streams so that their events are not heard, by stream."""
        return {**self._membership.alarms, **self._fanout.alarms}

    @property
    def last_heard(self) -> float | None:
        """When Redis last answered a read, by the monotonic clock."""
        return self._reader.last_heard

    @property
    def fatal(self) -> Exception | None:
        """What this Redis will never do, however long it is waited for."""
        return self._membership.fatal

    @property
    def _reads_all(self) -> bool:
        return not self._is_grouped(True) or (self._reader.ready and not self.refused)

    @property
    def _follows_all(self) -> bool:
        return not self._is_grouped(False) or (self._fanout.ready and not self.refused)

    @property
    def _ends(self) -> bool:
        return self._is_stopping or self.fatal is not None

    def _is_grouped(self, grouped: bool) -> bool:
        subscriptions = self._subscriptions().values()
        return any(found.via != "channel" and found.group is grouped for found in subscriptions)

    def start(self) -> None:
        """Start the threads that are needed by now."""
        if self._is_grouped(True):
            self._reader.start()
            self._maintenance.start()

        if self._is_grouped(False):
            self._fanout.start()

    def ready(self, timeout: float | None) -> bool:
        """Wait until every stream subscribed is being read; whether it was in time."""
        deadline = None if timeout is None else time.monotonic() + timeout

        _wait_for(self._reader.changed, lambda: self._reads_all or self._ends, deadline)
        _wait_for(self._fanout.changed, lambda: self._follows_all or self._ends, deadline)
        return self.connected

    def stop_reading(self) -> None:
        """Read nothing more, take over nothing more, begin nothing more."""
        self._end()
        self._maintenance.stop()
        self._reader.stop()
        self._fanout.stop()

    def release(self, deadline: float) -> None:
        """Settle what is done, and let other workers have the rest; called when the pool ended.

        It goes on in a thread until the deadline, or until :meth:`end` returns.
        """
        # A reader that waits for a server that hangs is not waited for to the end.
        readers_end = (time.monotonic() + deadline) / 2
        self._reader.end(readers_end)
        self._fanout.end(readers_end)
        self._maintenance.finish(deadline)

    def end(self, deadline: float) -> None:
        """Wait until everything is handed back, or the deadline is over."""
        # The thread itself reports a Redis that is away; it has a moment for it.
        if not self._maintenance.end(deadline + REPORT_TIME) and self._in_flight:
            self._report_left("it does not answer")

    def _abandoned(self) -> None:
        """What the events are for is gone: end by and by, as if somebody had said so."""
        self._end()
        self._maintenance.stop()
        self._fanout.stop()
        self._pool.queue.close()
        self._pool.queue.clear()
        self._pool.close()
        self._maintenance.finish(time.monotonic() + WRITE_TIMEOUT)

    def _end(self) -> None:
        self._is_stopping = True
        self.attempts.stop()

    def _conclude(self) -> None:
        """In the keeper's thread, at its end."""
        try:
            self._release_all()
        except OUTAGE as error:
            if self._in_flight:
                self._report_left(error)
        finally:
            self._acknowledger.close()

    def _report_left(self, reason: object) -> None:
        logger.error(
            "Redis is away (%s): %d events that were read stay pending. Another worker takes them "
            "over after %g s; those that were handled come again.",
            reason,
            len(self._in_flight),
            self._config.claim_after,
        )

    def disown(self) -> None:
        """In a forked child: end what came along of it; to settle is the parent's."""
        self._is_stopping = True
        self.attempts.disown()
        self._reader.disown()
        self._maintenance.disown()
        self._fanout.disown()

    def _release_all(self) -> None:
        if not self._membership.known:
            return

        self._acknowledger.write_all()

        with self._acknowledger.lock:
            for delivery in self._in_flight.retries():
                if not delivery.started:
                    self._retries.release(delivery)

            # What Redis does not let be read was told already.
            for name in self._membership.known - self._membership.refused.keys():
                self._release(name)

    def _release(self, name: str) -> None:
        started = {found.entry for found in self._in_flight.first_attempts(name) if found.started}
        begun = {found.entry: found.crashes or 0 for found in self._in_flight.first_attempts(name)}

        try:
            own = [found for found in self._group.own_pending(name) if found.id not in started]
            # What was read once and is not in hand did not arrive.
            lost = {found.id: found.times if found.times > 1 else 0 for found in own}
            self._group.release(name, {id: begun.get(id, times) for id, times in lost.items()})
            self._group.leave(name)
        except GroupGoneError as error:
            logger.debug("Nothing of %r is handed back: %s", name, error)
        except redis.ResponseError as error:
            logger.error(
                "Redis refuses to take back what was read of %r: %s. Another worker takes it over "
                "after %g s. %s",
                name,
                error,
                self._config.claim_after,
                self._group.worker_remedy(name, error),
                extra={"signal": name, "service": self._config.service},
            )

    # -- whether Redis is there -----------------------------------------------------------

    def _lost(self, error: Exception) -> None:
        if self._lost_since is not None:
            return

        self._lost_since = time.monotonic()

        if self._is_alone():
            self._log.warning(
                "lost", "The stream reader lost Redis (%s); it connects again by itself.", error
            )
            emit(listener_lost, self._config.service, error=error)

    def _found(self) -> None:
        lost_since, self._lost_since = self._lost_since, None
        reconnected, self._was_connected = self._was_connected, True
        seconds = 0.0 if lost_since is None else time.monotonic() - lost_since
        self._maintenance.wake()

        if not reconnected:
            logger.info("Reading the streams of %s.", ", ".join(sorted(self._membership.joined)))

        if not self._is_alone():
            return

        if lost_since is not None:
            self._log.warning(
                "connected", "The stream reader is back after %.1f s; nothing is missed.", seconds
            )

        if lost_since is not None or not reconnected:
            emit(listener_connected, self._config.service, reconnected=reconnected, seconds=seconds)


def _wait_for(
    changed: threading.Condition, condition: Callable[[], bool], deadline: float | None
) -> None:
    with changed:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        changed.wait_for(condition, left)
