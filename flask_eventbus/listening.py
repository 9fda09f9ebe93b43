"""The receiving half of a node: the listener, the stream consumer and the worker threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from .channels.listener import Listener
from .receivers.dispatcher import Dispatcher
from .receivers.workers import WorkerThreads
from .routing.subscriptions import Subscription
from .streams.consumer import Consumer
from .transport.connections import Context


class Listening:
    """Receives the events that a service subscribed to, over channels and streams.

    :param subscriptions: the subscriptions of the service; :meth:`update` replaces them.
    :param issued: returns the number of events that this node has created.
    """

    def __init__(
        self,
        context: Context,
        *,
        dispatcher: Dispatcher,
        subscriptions: Mapping[str, Subscription],
        issued: Callable[[], int],
    ) -> None:
        self._timing = context.timing
        self._has_streams = context.config.has_streams
        self.pool = WorkerThreads(context, dispatcher)
        self.listener = Listener(context, pool=self.pool, issued=issued)
        self.consumer = Consumer(context, dispatcher=dispatcher, pool=self.pool)
        self.update(subscriptions)

    def update(self, subscriptions: Mapping[str, Subscription]) -> None:
        """Use other subscriptions from now on; :meth:`start` subscribes to what was added."""
        self._on_channels = {
            name: found for name, found in subscriptions.items() if found.via != "stream"
        }
        self.listener.update(self._on_channels)
        self._on_streams = {
            name: found
            for name, found in subscriptions.items()
            if self._has_streams and found.via != "channel"
        }
        self.consumer.update(self._on_streams, alone=not self._on_channels)

    @property
    def is_own_thread(self) -> bool:
        """True if the calling thread is the listener's, the consumer's or a worker."""
        threads = (self.listener, self.consumer, self.pool)
        return any(found.is_own_thread for found in threads)

    @property
    def connected(self) -> bool:
        """True if Redis has confirmed every subscription on a live connection."""
        channels_connected = not self._on_channels or self.listener.connected
        return channels_connected and self.consumer.connected

    @property
    def refused(self) -> dict[str, str]:
        """The subscriptions that Redis refuses, each with the reason."""
        return {**self.consumer.refused, **self.listener.refused}

    @property
    def last_heard(self) -> float | None:
        """Monotonic time at which Redis last sent bytes; ``None`` if it never did."""
        heard = (self.listener.last_heard, self.consumer.last_heard)
        return max((moment for moment in heard if moment is not None), default=None)

    def start(self) -> None:
        """Start the threads that the current subscriptions need."""
        self.pool.start(self.consumer.run)

        if self._on_channels:
            self.listener.start()

        if self._on_streams:
            self.consumer.start()

    def ready(self, timeout: float | None) -> bool:
        """Wait until Redis has confirmed every subscription.

        :param timeout: seconds to wait; ``None`` to wait forever.
        :return: False if the time was over first.
        """
        deadline = None if timeout is None else time.monotonic() + timeout

        if self._on_channels and not self.listener.ready(timeout):
            return False

        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return self.consumer.ready(left)

    def stop_reading(self) -> None:
        """Stop reading, and return at once."""
        self.consumer.stop_reading()
        self.listener.stop()

    def finish(self, deadline: float) -> None:
        """Let running receivers finish.

        :param deadline: monotonic time.
        """
        self.listener.end(min(deadline, time.monotonic() + self._timing.listener_end))
        self.pool.finish(deadline)

    def release(self, deadline: float) -> None:
        """Start to release unhandled events for other workers; ``consumer.end`` waits for it.

        :param deadline: monotonic time.
        """
        self.pool.end(deadline)
        self.consumer.release(deadline)

    def disown(self) -> None:
        """Discard the threads and connections of the parent in a forked child."""
        self.listener.disown()
        self.consumer.disown()
        self.pool.disown()
