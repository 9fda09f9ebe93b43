"""What a node does with streams: reads them, runs receivers, settles, looks after the rest."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from .catalogue import Catalogue
from .codec import Codec
from .config import Config
from .connections import OUTAGE, Connections
from .counters import BoundedLog, Counters
from .deliveries import Delivery, Hand
from .dispatcher import Dispatcher, Failure
from .duplicates import Duplicates
from .event import Event
from .follower import Follower
from .group import Group, GroupGoneError
from .keeper import Keeper
from .lifecycle import tell
from .logs import get_logger
from .namespace import Receiver
from .outcomes import Outcomes
from .pipe import Pipe
from .pool import Pool
from .retries import allowed
from .retry_line import RetryLine
from .settler import Settler
from .signals import listener_connected, listener_lost
from .stream_intake import StreamIntake
from .stream_reader import StreamReader
from .streams import StreamKeys
from .subscriptions import Subscription
from .trims import Trims

logger = get_logger(__name__)

#: Seconds that an answer of Redis may take, the longest wait for an entry included.
ANSWER = 5.0

#: Seconds that Redis has to take what became of events.
SETTLE = 2.0

#: Seconds between two settlements of a batch: short receivers share a round trip, and what a
#: long one did is known to Redis before the next begins.
SHARE = 0.005

#: Seconds that the end of a process waits for Redis to take what became of events.
LAST_WORDS = 5.0


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
        pool: Pool,
        subscriptions: Callable[[], Mapping[str, Subscription]],
        counters: Counters,
        node: str,
        siblings: set[str],
        wanted: Callable[[], bool],
        retries_of: Callable[[str, Receiver], int | None],
        is_alone: Callable[[], bool],
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._counters = counters
        self._subscriptions = subscriptions
        self._retries_asked = retries_of
        self._is_alone = is_alone
        self._log = BoundedLog(logger)
        self._hand = Hand()
        self._lost_since: float | None = None
        self._was_connected = False
        self._stopping = threading.Event()
        self._disowned = False
        self.name = f"{socket.gethostname()}-{os.getpid()}-{node}"
        self._pool = pool
        self._make(connections, codec, node, siblings, wanted)

    def _make(
        self,
        connections: Connections,
        codec: Codec,
        node: str,
        siblings: set[str],
        wanted: Callable[[], bool],
    ) -> None:
        config, counters = self._config, self._counters
        keys = StreamKeys(config.prefix)
        reading = Pipe(connections, timeout=ANSWER)
        settling = Pipe(connections, timeout=SETTLE)
        self._group = self._group_on(reading, keys)
        self._settling = self._group_on(settling, keys)
        intake = StreamIntake(config=config, codec=codec, counters=counters, siblings=siblings)
        self._outcomes = Outcomes(config=config, keys=keys, retries_of=self._retries_at)
        self._settler = Settler(
            config=config,
            keys=keys,
            group=self._settling,
            hand=self._hand,
            counters=counters,
            expect=lambda name, due: self._keeper.expect(name, due),
        )
        self._retries = RetryLine(
            settling,
            config=config,
            keys=keys,
            codec=codec,
            outcomes=self._outcomes,
            turn=self._settler.turn,
            knows=lambda event, name: bool(self._dispatcher.receivers(event, only=name)),
            retries_of=self._retries_of_named,
        )
        pool = self._pool
        trims = Trims(self._group, service=config.service, counters=counters)
        self._reader = StreamReader(
            config=config,
            catalogue=Catalogue(
                reading,
                config=config,
                keys=keys,
                subscriptions=self._subscriptions,
                grouped=True,
            ),
            group=self._group,
            duplicates=Duplicates(reading, config=config, keys=keys),
            intake=intake,
            hand=self._hand,
            lineup=pool.lineup,
            outcomes=self._outcomes,
            settler=self._settler,
            trims=trims,
            counters=counters,
            node=node,
            wanted=wanted,
            attend=lambda: self._keeper.attend(),
            take_back=lambda names: self._keeper.take_back(names),
            given_away=lambda: self._keeper.given_away(),
            lost=self._lost,
            found=self._found,
            ended=self._abandoned,
        )
        self._keeper = Keeper(
            config=config,
            names=lambda: self._reader.joined,
            group=self._settling,
            intake=intake,
            hand=self._hand,
            lineup=pool.lineup,
            outcomes=self._outcomes,
            settler=self._settler,
            retries=self._retries,
            trims=Trims(self._settling, service=config.service, counters=counters),
            counters=counters,
            node=node,
            retries_of=self._retries_of_subscription,
        )
        following = Pipe(connections, timeout=ANSWER)
        self._follower = Follower(
            following,
            config=config,
            catalogue=Catalogue(
                following,
                config=config,
                keys=keys,
                subscriptions=self._subscriptions,
                grouped=False,
            ),
            keys=keys,
            intake=intake,
            lineup=pool.lineup,
            counters=counters,
            node=node,
            wanted=wanted,
        )

    def _group_on(self, pipe: Pipe, keys: StreamKeys) -> Group:
        return Group(pipe, keys=keys, service=self._config.service, consumer=self.name)

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is one of those that read and look after."""
        threads = (self._reader, self._keeper, self._follower)
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
        refused = {**self._reader.refused, **self._follower.refused}

        if self.fatal is not None:
            refused = dict.fromkeys(subscriptions, str(self.fatal))

        return {
            name: reason
            for name, reason in refused.items()
            if name in subscriptions and subscriptions[name].via == "stream"
        }

    @property
    def last_heard(self) -> float | None:
        """When Redis last answered a read, by the monotonic clock."""
        return self._reader.last_heard

    @property
    def fatal(self) -> Exception | None:
        """What this Redis will never do, however long it is waited for."""
        return self._reader.fatal

    @property
    def _reads_all(self) -> bool:
        return not self._is_grouped(True) or (self._reader.ready and not self.refused)

    @property
    def _follows_all(self) -> bool:
        return not self._is_grouped(False) or (self._follower.ready and not self.refused)

    @property
    def _ends(self) -> bool:
        return self._stopping.is_set() or self.fatal is not None

    def _is_grouped(self, grouped: bool) -> bool:
        subscriptions = self._subscriptions().values()
        return any(found.via != "channel" and found.group is grouped for found in subscriptions)

    def start(self) -> None:
        """Start the threads that are needed by now."""
        if self._is_grouped(True):
            self._reader.start()
            self._keeper.start()

        if self._is_grouped(False):
            self._follower.start()

    def ready(self, timeout: float | None) -> bool:
        """Wait until every stream subscribed is being read; whether it was in time."""
        deadline = None if timeout is None else time.monotonic() + timeout

        _wait_for(self._reader.changed, lambda: self._reads_all or self._ends, deadline)
        _wait_for(self._follower.changed, lambda: self._follows_all or self._ends, deadline)
        return self.connected

    def stop_reading(self) -> None:
        """Read nothing more, and take over nothing more."""
        self._stopping.set()
        self._keeper.stop()
        self._reader.stop()
        self._follower.stop()

    def hand_back(self) -> None:
        """Settle what is done, and let other workers have the rest; called when the pool ended."""
        self._reader.end()
        self._follower.end()
        self._close()

    def _abandoned(self) -> None:
        """What the events are for is gone: end by and by, as if somebody had said so."""
        self._stopping.set()
        self._keeper.stop()
        self._follower.stop()
        self._pool.lineup.close()
        self._pool.lineup.clear()
        self._pool.close()
        self._close()

    def _close(self) -> None:
        self._keeper.end()

        try:
            self._hand_back()
        except OUTAGE as error:
            left = len(self._hand)

            if left:
                logger.error(
                    "Redis is away (%s): %d events that were read stay pending. Another worker "
                    "takes them over after %g s; those that were handled come again.",
                    error,
                    left,
                    self._config.claim_after,
                )
        finally:
            self._settler.close()

    def disown(self) -> None:
        """In a forked child: end what came along of it; to settle is the parent's."""
        self._disowned = True
        # Another thread of the parent may hold the lock of the one that was inherited.
        self._stopping = threading.Event()
        self._stopping.set()
        self._reader.disown()
        self._keeper.disown()
        self._follower.disown()

    def _hand_back(self) -> None:
        if not self._reader.was_joined:
            return

        deadline = time.monotonic() + LAST_WORDS

        while len(self._settler) and time.monotonic() < deadline:
            self._settler.flush()

        with self._settler.turn:
            for delivery in self._hand.retries():
                if not delivery.started:
                    self._settling.pipe.run(self._retries.put_back(delivery))

            for name in self._reader.was_joined:
                self._release(name)

    def _release(self, name: str) -> None:
        started = {found.entry for found in self._hand.first_attempts(name) if found.started}
        begun = {found.entry: found.begun or 0 for found in self._hand.first_attempts(name)}

        try:
            own = [found for found in self._settling.own(name) if found.id not in started]
            # What was read once and is not in hand did not arrive.
            lost = {found.id: found.times if found.times > 1 else 0 for found in own}
            self._settling.release(name, {id: begun.get(id, times) for id, times in lost.items()})
            self._settling.leave(name)
        except GroupGoneError as error:
            logger.debug("Nothing of %r is handed back: %s", name, error)

    # -- in the threads of the pool -------------------------------------------------------

    def handle(self, deliveries: Sequence[Delivery]) -> None:
        """Run receivers for deliveries, in order, and settle them."""
        due = time.monotonic() + SHARE

        for delivery in deliveries:
            if self._stopping.is_set():
                break

            self._handle(delivery)

            if self._disowned:
                return

            if time.monotonic() > due:
                self._settler.settle()
                due = time.monotonic() + SHARE

        self._settler.settle()

    def _handle(self, delivery: Delivery) -> None:
        if not delivery.in_group:
            self._dispatcher.dispatch(delivery.event)
            return

        if not self._may_begin(delivery):
            self._hand.let_go([delivery])
            self._counters.add("given_away")
            return

        record = delivery.record
        only = None if record is None else record.receiver
        failures = self._dispatcher.dispatch(delivery.event, only=only)

        # What it came to is not kept here: the next receiver may take long, or end the process.
        if self._disowned:
            return
        elif failures or record is not None:
            self._judge(delivery, failures)
        else:
            self._settler.handled(delivery)

    def _judge(self, delivery: Delivery, failures: Sequence[Failure]) -> None:
        try:
            self._settler.add(self._outcomes.of(delivery, failures))
        except Exception:
            # It stays pending, and is taken over as from a worker that ended.
            self._counters.add("handling_failed")
            logger.exception("What became of the event %s cannot be told.", delivery.event.id)
            self._hand.let_go([delivery])

    def _may_begin(self, delivery: Delivery) -> bool:
        """Whether it still is this process's, as far as can be known; if so, it is begun."""
        if delivery.begun is not None and delivery.record is None and not self._noted(delivery):
            return False

        return self._hand.begin(delivery)

    def _noted(self, delivery: Delivery) -> bool:
        """Note in Redis that it is begun, where a worker that ended had begun it.

        If it ends this one as well, that is to be known.
        """
        if delivery.begun is None or time.monotonic() > delivery.lease:
            return False

        try:
            with self._settler.turn:
                return self._settling.begin(delivery.name, delivery.entry, times=delivery.begun + 1)
        except (GroupGoneError, *OUTAGE) as error:
            logger.debug("The entry %s is not begun: %s", delivery.entry, error)
            return False

    # -- how often ------------------------------------------------------------------------

    def _retries_at(self, delivery: Delivery, failure: Failure) -> int:
        return self._retries_for(delivery.subscription, delivery.name, failure.receiver)

    def _retries_of_named(self, subscription: Subscription, event: Event, name: str) -> int:
        receivers = self._dispatcher.receivers(event, only=name)
        return self._retries_for(subscription, event.name, receivers[0])

    def _retries_of_subscription(self, subscription: Subscription) -> int:
        return self._config.retries if subscription.retries is None else subscription.retries

    def _retries_for(self, subscription: Subscription, name: str, receiver: Receiver) -> int:
        asked = self._retries_asked(name, receiver)
        return allowed(subscription.retries, asked, self._config.retries)

    # -- whether Redis is there -----------------------------------------------------------

    def _lost(self, error: Exception) -> None:
        if self._lost_since is not None:
            return

        self._lost_since = time.monotonic()

        if self._is_alone():
            self._log.warning(
                "lost", "The stream reader lost Redis (%s); it connects again by itself.", error
            )
            tell(listener_lost, self._config.service, error=error)

    def _found(self) -> None:
        lost_since, self._lost_since = self._lost_since, None
        reconnected, self._was_connected = self._was_connected, True
        seconds = 0.0 if lost_since is None else time.monotonic() - lost_since
        self._keeper.wake()

        if not reconnected:
            logger.info("Reading the streams of %s.", ", ".join(sorted(self._reader.joined)))

        if not self._is_alone():
            return

        if lost_since is not None:
            self._log.warning(
                "connected", "The stream reader is back after %.1f s; nothing is missed.", seconds
            )

        if lost_since is not None or not reconnected:
            tell(listener_connected, self._config.service, reconnected=reconnected, seconds=seconds)


def _wait_for(
    changed: threading.Condition, condition: Callable[[], bool], deadline: float | None
) -> None:
    with changed:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        changed.wait_for(condition, left)
