"""The bus of a program without Flask: a consumer, a publisher, or both."""

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

from .config import Config
from .ending import call_in_thread, end_by_signal
from .errors import ConfigError
from .health import Health
from .logs import get_logger
from .node import FLUSH_AT_EXIT, Node
from .routing.loading import load_receivers
from .routing.registry import Registry
from .typing import Settings

logger = get_logger(__name__)


#: Seconds between looks: one that waits without end misses a signal that comes right before.
LOOK = 0.5

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: Handlers that no program has set.
_DEFAULTS = (signal.default_int_handler, end_by_signal)


def run_until_signal(node: Node) -> None:
    """Listen until SIGTERM or Ctrl-C, then let receivers finish and flush.

    A second signal ends the process at once, with the exit code 128 plus its number. Only
    the main thread may call this, since only it gets signals. A handler that the program
    set before is called at the first signal; the node stops even if it raises.

    :raises ConfigError: this Redis will never do what is needed to listen.
    """
    with told_by_signal() as told:
        try:
            node.start()

            while not told.wait(LOOK) and node.fatal is None:
                pass
        finally:
            fatal = node.fatal
            logger.info("Finishing what runs, for %g s at most.", node.config.grace)
            node.stop()

    if fatal is not None:
        raise ConfigError(
            f"{node.config.service!r} cannot listen: this Redis has no streams ({fatal}). Use "
            "Redis 6.2 or later, or Valkey, or subscribe with 'via': 'channel'."
        ) from fatal


@contextmanager
def told_by_signal() -> Iterator[threading.Event]:
    """Yield what SIGTERM or Ctrl-C sets until the end of the block; a second one ends at once.

    The program's own handler is called too.
    """
    told = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}

    numbers: list[int] = []

    def end(number: int, frame: FrameType | None) -> Any:
        if numbers:
            os._exit(128 + number)

        numbers.append(number)
        call_in_thread(told.set)
        handler = before.get(number)

        if callable(handler) and handler not in _DEFAULTS:
            handler(number, frame)

    for number in _SIGNALS:
        signal.signal(number, end)

    try:
        yield told
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)


class Bus(Registry):
    """Carries signals between this program and services, over Redis.

    As a consumer it connects receivers and runs; as a publisher it is used with ``with``,
    which flushes at the end::

        bus = Bus("redis://localhost:6379/0", service="audit")

        @bus.on("user_registered")
        def audit(sender, **payload): ...

        bus.run()

    :param url: where Redis is.
    :param service: this program's stable name.
    :param settings: the settings of ``docs/configuration.md`` in lower case and without
        ``EVENTBUS_``, for example ``publish=["report_ready"]``.
    :raises ConfigError: a setting is unknown or wrong.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        service: str | None = None,
        namespace: Namespace | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        values: dict[str, Any] = {"url": url, "service": service, **settings}
        config = Config.from_mapping({f"EVENTBUS_{k.upper()}": v for k, v in values.items()})
        self._set_up(config, namespace)

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, *, namespace: Namespace | None = None
    ) -> Self:
        """A bus with the settings of the environment: ``EVENTBUS_SERVICE``, ``EVENTBUS_URL``, ...

        :raises ConfigError: a setting is unknown or wrong.
        """
        bus = cls.__new__(cls)
        bus._set_up(Config.from_environ(os.environ if environ is None else environ), namespace)
        return bus

    def _set_up(self, config: Config, namespace: Namespace | None) -> None:
        super().__init__(namespace=namespace)
        self.node = Node(config, self)
        load_receivers(self, config.receivers, root=Path.cwd())

    def run(self) -> None:
        """Listen until SIGTERM or Ctrl-C, then finish what runs and return.

        A second signal ends the process at once. Called in the main thread.

        :raises ConfigError: nothing is subscribed.
        """
        if not self.node.subscriptions:
            raise ConfigError(
                "There is nothing to listen to. Connect a receiver with @bus.on('user_registered') "
                "before bus.run()."
            )

        run_until_signal(self.node)

    def start(self) -> None:
        """Listen from now on, in threads; returns at once."""
        self.node.start()

    def ready(self, timeout: float | None = None) -> bool:
        """Wait until Redis has confirmed every subscription; whether it was in time."""
        return self.node.ready(timeout)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything sent so far is with Redis; whether it was in time."""
        return self.node.flush(timeout)

    def stop(self, *, flush: float = FLUSH_AT_EXIT) -> None:
        """Stop listening, let receivers finish, publish what waits."""
        self.node.stop(flush=flush)

    def health(self) -> Health:
        """How the bus does."""
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
