"""``Bus``: the bus of a program without Flask, and the loop that runs until SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, Unpack

from blinker import Namespace

from .config import Config, Timing
from .ending import FLUSH_AT_EXIT, call_in_thread, end_by_signal
from .errors import ConfigError
from .logs import get_logger
from .node import Health, Node
from .routing.loading import load_receivers
from .routing.registry import Registry
from .typing import Settings

logger = get_logger(__name__)


#: Seconds between checks for a signal. A wait without a timeout can miss a signal that arrives
#: right before it.
SIGNAL_CHECK = 0.5

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: Handlers that are not the program's own.
_DEFAULTS = (signal.default_int_handler, end_by_signal)


def run_until_signal(node: Node) -> None:
    """Listen until SIGTERM or Ctrl-C, then let receivers finish and flush the buffer.

    A second signal ends the process at once, with exit code 128 plus the signal's number. Call
    it in the main thread; Python delivers signals only there. A signal handler that the program
    set before is called as well. The node stops even if that handler raises.

    :raises ConfigError: this Redis has no streams, which the subscriptions need.
    """
    with stop_on_signals() as stopping:
        try:
            node.start()

            while not stopping.wait(SIGNAL_CHECK) and node.fatal is None:
                pass
        finally:
            fatal = node.fatal
            logger.info("Waiting for running receivers, up to %g s.", node.config.grace)
            node.stop()

    if fatal is not None:
        raise ConfigError(
            f"{node.config.service!r} cannot listen: this Redis has no streams ({fatal}). Use "
            "Redis 6.2 or later, or Valkey, or subscribe with 'via': 'channel'."
        ) from fatal


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or Ctrl-C sets; a second signal ends the process at once.

    The program's own signal handlers are called too, and are restored after the block.
    """
    stopping = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}

    numbers: list[int] = []

    def end(number: int, frame: FrameType | None) -> Any:
        if numbers:
            os._exit(128 + number)

        numbers.append(number)
        call_in_thread(stopping.set)
        handler = before.get(number)

        if callable(handler) and handler not in _DEFAULTS:
            handler(number, frame)

    for number in _SIGNALS:
        signal.signal(number, end)

    try:
        yield stopping
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)


class Bus(Registry):
    """Carries signals between this program and other services, over Redis.

    A consumer connects receivers and calls :meth:`run`::

        bus = Bus("redis://localhost:6379/0", service="audit")

        @bus.on("user_registered")
        def audit(sender, **payload): ...

        bus.run()

    A publisher uses the bus as a context manager, which flushes the buffer at the end.

    :param url: the URL of Redis.
    :param service: this program's stable name.
    :param namespace: an existing blinker namespace to use; by default the bus has its own.
    :param settings: the settings of ``docs/configuration.md``, in lower case and without
        ``EVENTBUS_``, for example ``publish=["report_ready"]``.
    :raises ConfigError: a setting is unknown or wrong.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        service: str | None = None,
        namespace: Namespace | None = None,
        _timing: Timing | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        values: dict[str, Any] = {"url": url, "service": service, **settings}
        config = Config.from_mapping({f"EVENTBUS_{k.upper()}": v for k, v in values.items()})
        self._set_up(config, namespace, _timing)

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        namespace: Namespace | None = None,
        _timing: Timing | None = None,
    ) -> Self:
        """Create a bus with the settings of the environment, such as ``EVENTBUS_SERVICE``.

        :raises ConfigError: a setting is unknown or wrong.
        """
        bus = cls.__new__(cls)
        config = Config.from_environ(os.environ if environ is None else environ)
        bus._set_up(config, namespace, _timing)
        return bus

    def _set_up(self, config: Config, namespace: Namespace | None, timing: Timing | None) -> None:
        super().__init__(namespace=namespace, _timing=timing)
        self.node = Node(config, self)
        load_receivers(self, config.receivers, root=Path.cwd())

    def run(self) -> None:
        """Listen until SIGTERM or Ctrl-C, then let receivers finish, flush and return.

        A second signal ends the process at once. Call it in the main thread.

        :raises ConfigError: nothing is subscribed, or this Redis lacks the streams it needs.
        """
        if not self.node.subscriptions:
            raise ConfigError(
                "There is nothing to listen to. Connect a receiver with @bus.on('user_registered') "
                "before bus.run()."
            )

        run_until_signal(self.node)

    def start(self) -> None:
        """Start listening in background threads, and return at once."""
        self.node.start()

    def ready(self, timeout: float | None = None) -> bool:
        """Wait until Redis has confirmed every subscription.

        :param timeout: seconds to wait; without it, wait forever.
        :return: False if the time was over first.
        """
        return self.node.ready(timeout)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until Redis has all events sent so far.

        :param timeout: seconds to wait; ``EVENTBUS_GRACE`` by default.
        :return: False if the time was over first.
        """
        return self.node.flush(timeout)

    def stop(self, *, flush: float = FLUSH_AT_EXIT) -> None:
        """Stop listening, let receivers finish, and publish the buffered events.

        :param flush: seconds to wait for Redis to take the buffered events.
        """
        self.node.stop(flush=flush)

    def health(self) -> Health:
        """Return the state of the bus in this process."""
        return self.node.health()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
