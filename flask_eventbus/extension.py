"""The Flask extension: one node per app, nothing started before the app serves."""

from __future__ import annotations

import gc
import re
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from blinker import Namespace
from flask import Flask, current_app, has_request_context, request

from .admin.overview import Overview
from .application import AppSignals
from .config import Config
from .errors import ConfigError
from .health import Health
from .logs import get_logger
from .node import FLUSH_AT_EXIT, Node
from .routing.loading import load_receivers
from .routing.registry import Declarations
from .serving import call_when_serving

logger = get_logger(__name__)

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class EventBus(Declarations):
    """Bridges an app's signals to other services, by the app's configuration.

    One bus may serve several apps; each has its own node under
    ``app.extensions["eventbus"]``.

    :param app: an app to begin with, as for :meth:`init_app`.
    :param namespace: an existing blinker namespace to adopt.
    """

    def __init__(self, app: Flask | None = None, *, namespace: Namespace | None = None) -> None:
        super().__init__(namespace=namespace)
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()

        if app is not None:
            self.init_app(app)

    @property
    def app_signal(self) -> AppSignals:
        """What ``app.signal`` is, for code that a type checker reads: Flask has no such attribute.

        ``bus.app_signal("user_registered")`` is the signal; ``@bus.app_signal`` declares one.
        """
        return AppSignals(self)

    def init_app(self, app: Flask) -> None:
        """Read the app's configuration and give it ``app.signal``; nothing connects yet.

        :raises ConfigError: a setting is missing or wrong, or receivers cannot be loaded.
        """
        if "eventbus" in app.extensions:
            raise ConfigError(
                f"The app {app.name!r} has an event bus already. Call init_app() once per app."
            )

        node = self._node(app)
        app.extensions["eventbus"] = node
        app.signal = self.app_signal  # type: ignore[attr-defined]  # an app has no such face
        self._apps.add(app)

        try:
            load_receivers(self, node.config.receivers, root=Path(app.root_path))
        except BaseException:
            # Whoever corrects it may try again with this app.
            del app.extensions["eventbus"]
            self._apps.discard(app)
            raise

        if node.routes:
            app.before_request(_Strangers(node).report_once)

        if node.config.listen:
            call_when_serving(app, node.start)

    def start(self, app: Flask | None = None) -> None:
        """Listen from now on, in this process; for servers that do not tell when they serve."""
        self.node(app).start()

    def ready(self, timeout: float | None = None, *, app: Flask | None = None) -> bool:
        """Wait until Redis has confirmed every subscription; whether it was in time."""
        return self.node(app).ready(timeout)

    def flush(self, timeout: float | None = None, *, app: Flask | None = None) -> bool:
        """Wait until everything sent so far is with Redis; whether it was in time."""
        return self.node(app).flush(timeout)

    def stop(self, app: Flask | None = None, *, flush: float = FLUSH_AT_EXIT) -> None:
        """Stop listening, let receivers finish, publish what waits."""
        self.node(app).stop(flush=flush)

    def health(self, app: Flask | None = None) -> Health:
        """How the app's node does in this process."""
        return self.node(app).health()

    def node(self, app: Flask | None = None) -> Node:
        """The node of ``app``, of the current app, or of the only one.

        :raises RuntimeError: it cannot be told which, or the app has none.
        """
        app = app or (current_app if current_app else None)

        if app is not None:
            return self._node_of(app)

        apps = self._living()

        if len(apps) == 1:
            return self._node_of(apps[0])

        raise RuntimeError(
            f"This event bus serves {len(apps)} apps and none of them is the current one. Pass "
            "the app, or work inside 'with app.app_context():'."
        )

    def _node_of(self, app: Flask) -> Node:
        app = _real(app)

        if app in self._apps:
            node: Node = app.extensions["eventbus"]
            return node

        raise RuntimeError(
            f"The app {app.name!r} does not use this event bus. Call bus.init_app(app) first."
        )

    def _node(self, app: Flask) -> Node:
        reference = weakref.ref(app)

        def scope() -> AbstractContextManager[object]:
            app = reference()

            if app is None:
                raise RuntimeError("The app of this event bus is gone.")

            return app.app_context()

        def owns(sender: Any) -> bool:
            emitter = self._emitter(sender)

            if emitter is None:
                return self._is_alone() and reference() is not None

            return emitter is reference()

        def under_test() -> bool:
            app = reference()
            return app is not None and app.testing

        def session() -> Any:
            app = reference()
            return None if app is None else _session_of(app)

        return Node(
            Config.from_mapping(app.config),
            self,
            scope=scope,
            owns=owns,
            trace=_traceparent,
            wanted=lambda: reference() is not None,
            under_test=under_test,
            session=session,
        )

    def _living(self) -> list[Flask]:
        """The apps in use; one that was thrown away may only wait to be collected."""
        if len(self._apps) > 1:
            gc.collect()

        return list(self._apps)

    def _is_alone(self) -> bool:
        count = len(self._living())

        if count > 1:
            raise RuntimeError(
                f"This event bus serves {count} apps, and a signal was sent where none "
                "of them is the current one. Send it from the app, as in "
                "'signal.send(app, ...)', or inside 'with app.app_context():'."
            )

        return True

    def _emitter(self, sender: Any) -> Flask | None:
        """The app that an emission is one of: the sender, or the current one."""
        if isinstance(sender, Flask):
            return _real(sender)

        if current_app:
            return _real(current_app)

        return None


class _Strangers:
    """Warns at an app's first request of signals that look published and are not."""

    def __init__(self, node: Node) -> None:
        self._node = weakref.ref(node)
        self._is_done = False

    def report_once(self) -> None:
        """Log a warning for each, once. By the first request all modules are imported."""
        node = self._node()

        if self._is_done or node is None:
            return

        self._is_done = True

        for found in Overview(node).strangers():
            logger.warning("%s %s", *found)


def _real(app: Any) -> Flask:
    return app._get_current_object() if hasattr(app, "_get_current_object") else app  # type: ignore[no-any-return]  # a proxy


def _session_of(app: Flask) -> Any:
    """Flask-SQLAlchemy's session, as far as the app has one by now."""
    database = app.extensions.get("sqlalchemy")

    if database is None or current_app:
        return getattr(database, "session", None)

    # It belongs to the app context: where that is missing, nothing goes on in it.
    return lambda: None


def _traceparent() -> str | None:
    if not has_request_context():
        return None

    value = request.headers.get("traceparent", "")
    return value if _TRACEPARENT.fullmatch(value) else None
