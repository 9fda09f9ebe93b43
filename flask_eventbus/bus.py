"""The bus of a program without Flask: a consumer, a publisher, or both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from blinker import Namespace

from .config import Config
from .errors import ConfigError
from .health import Health
from .node import FLUSH_AT_EXIT, Node
from .routing.loading import load_receivers
from .routing.registry import Declarations
from .running import run_until_signal
from .typing import Settings


class Bus(Declarations):
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
