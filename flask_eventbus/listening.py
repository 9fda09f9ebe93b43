"""The inbound half of a node: what reads channels and streams, and the threads of receivers."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping

from .channels.decoder import MessageDecoder
from .channels.listener import ChannelSubscriptions, Listener
from .channels.reader import ChannelReader
from .codec.codec import Codec
from .config import Config
from .errors import ConfigError
from .logs import Counters
from .receivers.dispatcher import Dispatcher
from .receivers.workers import WorkerThreads
from .routing.bus_signal import Receiver
from .routing.subscriptions import Subscription
from .streams.consumer import Consumer
from .transport.connections import Connections
from .transport.keys import ChannelKeys

#: Seconds that the listener is waited for, whose last events the receivers have to finish.
LISTENER_END = 2.0


def check_subscription(config: Config, subscription: Subscription) -> None:
    """Refuse what the server of the settings cannot do.

    :raises ConfigError: the subscription insists on a stream in a cluster.
    """
    insists = subscription.via == "stream" or not subscription.group

    if insists and config.url.startswith("redis+cluster://"):
        raise ConfigError(
            f"The subscription to {subscription.name!r} asks for its stream, and 'EVENTBUS_URL' is "
            "a cluster, for which there are no streams yet. Hear it via 'channel' there, or use "
            "one Redis: 'redis://' or 'redis+sentinel://'."
        )


class Listening:
    """Hears what a service subscribed to, over channels and streams, as one.

    :param subscriptions: what the service hears; asked for whenever it may have changed.
    :param issued: how many events this node has made.
    :param siblings: nodes of this process whose local receivers ran at ``send()``.
    :param app_exists: returns False once the app is gone; the thread then stops.
    :param retries_of: how often a receiver asks to be tried again at events of a name.
    """

    def __init__(
        self,
        *,
        config: Config,
        connections: Connections,
        codec: Codec,
        dispatcher: Dispatcher,
        subscriptions: Callable[[], Mapping[str, Subscription]],
        counters: Counters,
        node: str,
        issued: Callable[[], int],
        siblings: Container[str],
        app_exists: Callable[[], bool],
        retries_of: Callable[[str, Receiver], int | None],
    ) -> None:
        self._subscriptions = subscriptions
        self._channels = Part("stream")
        self._streams = Part("channel")
        self._has_streams = not config.url.startswith("redis+cluster://")
        self.pool = WorkerThreads(
            config=config,
            dispatcher=dispatcher,
            counters=counters,
            node=node,
            handle=lambda deliveries: self.consumer.attempts.run(deliveries),
        )
        reader = ChannelReader(connections)
        keys = ChannelKeys(config.prefix)
        self.listener = Listener(
            config=config,
            reader=reader,
            keys=keys,
            hearing=ChannelSubscriptions(
                service=config.service,
                keys=keys,
                reader=reader,
                subscriptions=self._on_channels,
            ),
            decoder=MessageDecoder(
                config=config,
                codec=codec,
                counters=counters,
                node=node,
                issued=issued,
                siblings=siblings,
            ),
            pool=self.pool,
            counters=counters,
            node=node,
            app_exists=app_exists,
        )
        self.consumer = Consumer(
            config=config,
            connections=connections,
            codec=codec,
            dispatcher=dispatcher,
            pool=self.pool,
            subscriptions=self._on_streams,
            counters=counters,
            node=node,
            siblings=siblings,
            app_exists=app_exists,
            retries_of=retries_of,
            is_alone=lambda: not self._on_channels(),
        )

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is one of these."""
        threads = (self.listener, self.consumer, self.pool)
        return any(found.is_own_thread for found in threads)

    @property
    def connected(self) -> bool:
        """Whether everything subscribed is being heard."""
        hears = not self._on_channels() or self.listener.connected
        return hears and (not self._on_streams() or self.consumer.connected)

    @property
    def refused(self) -> dict[str, str]:
        """Subscriptions that Redis refuses, with its reasons."""
        return {**self.consumer.refused, **self.listener.refused}

    @property
    def without_receiver(self) -> frozenset[str]:
        """The streams that are not read, because this process has no receiver for them."""
        return self.consumer.without_receiver

    @property
    def alarms(self) -> dict[str, str]:
        """What somebody did to streams so that their events are not heard, by stream."""
        return self.consumer.alarms

    @property
    def fatal(self) -> Exception | None:
        """What this Redis will never do."""
        return self.consumer.fatal

    @property
    def lag(self) -> int:
        """Events that were read and are not handled yet."""
        return len(self.pool)

    @property
    def last_heard(self) -> float | None:
        """When bytes last came, by the monotonic clock."""
        heard = (self.listener.last_heard, self.consumer.last_heard)
        return max((moment for moment in heard if moment is not None), default=None)

    def start(self) -> None:
        """Start the threads that are needed by now."""
        self.pool.start()

        if self._on_channels():
            self.listener.start()
            self.listener.refresh()

        if self._on_streams():
            self.consumer.start()

    def ready(self, timeout: float | None) -> bool:
        """Wait until everything subscribed is being heard; whether it was in time."""
        deadline = None if timeout is None else time.monotonic() + timeout

        if self._on_channels() and not self.listener.ready(timeout):
            return False

        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return not self._on_streams() or self.consumer.ready(left)

    def stop_reading(self) -> None:
        """Read nothing more; returns at once."""
        self.consumer.stop_reading()
        self.listener.stop()

    def finish(self, deadline: float) -> None:
        """Let receivers finish what they began, until the deadline."""
        self.listener.end(min(deadline, time.monotonic() + LISTENER_END))
        self.pool.finish(deadline)

    def release(self, deadline: float) -> None:
        """Begin to hand back what is left; :meth:`end` waits for it."""
        self.pool.end(deadline)
        self.consumer.release(deadline)

    def end(self, deadline: float) -> None:
        """Wait until what is left is handed back, or the deadline is over."""
        self.consumer.end(deadline)

    def disown(self) -> None:
        """In a forked child: end what came along of it."""
        self.listener.disown()
        self.consumer.disown()
        self.pool.disown()

    def _on_channels(self) -> Mapping[str, Subscription]:
        return self._channels(self._subscriptions())

    def _on_streams(self) -> Mapping[str, Subscription]:
        return self._streams(self._subscriptions()) if self._has_streams else {}


class Part:
    """Those of the subscriptions that are heard in one way; asked for with every event.

    :param other: the way of those that are left out.
    """

    def __init__(self, other: str) -> None:
        self._other = other
        self._all: Mapping[str, Subscription] = {}
        self._found: Mapping[str, Subscription] = {}

    def __call__(self, subscriptions: Mapping[str, Subscription]) -> Mapping[str, Subscription]:
        """What is left of all ``subscriptions``, which are another mapping when they change."""
        if subscriptions is not self._all:
            found = {name: each for name, each in subscriptions.items() if each.via != self._other}
            self._found = found
            self._all = subscriptions

        return self._found
