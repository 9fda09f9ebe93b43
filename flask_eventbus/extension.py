"""``EventBus``, the Flask extension. Each app has a node, which starts when the app serves."""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from blinker import ANY, NamedSignal, Namespace
from flask import Flask, current_app, has_request_context, request

from .config import Config, Timing
from .ending import FLUSH_AT_EXIT, importing
from .errors import ConfigError
from .logs import get_logger
from .routing.options import name_of
from .routing.registry import Registry

if TYPE_CHECKING:
    from .node import Health, Host, Node

logger = get_logger(__name__)

F = TypeVar("F", bound=Callable[..., Any])
#: The receivers that were called, and what each returned.
Results = list[tuple[Callable[..., Any], Any]]

_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)


class AppSignal:
    """A signal of an app, as ``app.signal(name)`` returns it.

    Call it with a plain function to declare the signal: the function's parameters become the
    parameters of the signal, and the function becomes a receiver. Call it with anything else
    to send the signal from that sender.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self._registry = registry
        #: The underlying blinker signal.
        self.signal: NamedSignal = registry.signal(name)

    @property
    def name(self) -> str:
        """The signal's name."""
        return self.signal.name

    @overload
    def __call__(self, sender: Flask, /, *args: Any, **payload: Any) -> Results: ...

    @overload
    def __call__(self, receiver: F, /) -> F: ...  # type: ignore[overload-overlap]  # any callable

    @overload
    def __call__(self, sender: object, /, *args: Any, **payload: Any) -> Results: ...

    def __call__(self, subject: Any, /, *args: Any, **payload: Any) -> Any:
        """Declare the signal with a plain function, or send it from ``subject``.

        :raises TypeError: the values do not fit the declared parameters.
        """
        if inspect.isfunction(subject) and not args and not payload:
            return self._declare(subject)

        return self.send(subject, *args, **payload)

    def send(self, sender: Any = None, /, *args: Any, **payload: Any) -> Results:
        """Send the signal; positional values get the names of the declared parameters, in order.

        :return: the receivers and their results, as blinker returns them.
        :raises TypeError: the values do not fit the declared parameters.
        """
        return self.signal.send(sender, **self._named(args, payload))

    def connect(self, receiver: F, sender: Any = ANY) -> F:
        """Connect a receiver by a strong reference, so that a closure stays connected."""
        return self.signal.connect(receiver, sender=sender, weak=False)

    def disconnect(self, receiver: Callable[..., Any], sender: Any = ANY) -> None:
        """Disconnect a receiver."""
        self.signal.disconnect(receiver, sender)

    def _declare(self, receiver: F) -> F:
        signature = inspect.signature(receiver)
        parameters = list(signature.parameters.values())

        if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
            raise ConfigError(
                f"{name_of(receiver)} has no parameter for the sender. Write "
                f"'def {receiver.__name__}(sender, ...)'."
            )

        for parameter in parameters[1:]:
            if parameter.kind in _STARRED:
                shown = str(parameter.replace(annotation=parameter.empty))
                raise ConfigError(
                    f"{name_of(receiver)} declares {shown!r}, whose values have no name in "
                    "the payload. Give each value a parameter of its own."
                )

        own = inspect.Signature(parameters[1:])
        declared = self._registry.parameters.setdefault(self.name, own)
        names = [
            parameter.name
            for parameter in declared.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]

        try:
            signature.bind(None, **dict.fromkeys(names))
        except TypeError as error:
            raise ConfigError(
                f"{name_of(receiver)} does not accept the parameters of {self.name!r}, which was "
                f"declared with {declared}: {error}. Give it the same parameters, or add **extra."
            ) from error

        return self.connect(receiver)

    def _named(self, args: tuple[Any, ...], payload: dict[str, Any]) -> dict[str, Any]:
        declared = self._registry.parameters.get(self.name)

        if declared is None and args:
            raise TypeError(
                f"{self.name} was sent {len(args)} positional values, but its parameters were "
                f"never declared. Name the values, or declare them with @app.signal({self.name!r})."
            )

        if declared is None:
            return payload

        try:
            bound = declared.bind(*args, **payload)
        except TypeError as error:
            raise TypeError(f"{self.name}{declared}: {error}") from None

        bound.apply_defaults()
        named = {**bound.arguments}

        for name, parameter in declared.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(name))

        return named


class AppSignals:
    """The type of ``app.signal``: call it with a name, or use it as a decorator."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @overload
    def __call__(self, signal: str | NamedSignal, /) -> AppSignal: ...

    @overload
    def __call__(self, receiver: F, /) -> F: ...

    def __call__(self, subject: Any, /) -> Any:
        """Return the signal of a name, or declare one named after the decorated function.

        A prefix ``signal_`` of the function's name is removed.

        :raises TypeError: ``subject`` is neither a name, a signal nor a function.
        """
        if isinstance(subject, str):
            return AppSignal(self._registry, subject)

        if isinstance(subject, NamedSignal):
            return AppSignal(self._registry, subject.name)

        if not inspect.isfunction(subject):
            raise TypeError(
                f"app.signal() got {subject!r}. Give it a signal's name, or decorate a function."
            )

        name = subject.__name__.removeprefix("signal_")
        return AppSignal(self._registry, name)(subject)


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class EventBus(Registry):
    """The Flask extension: carries an app's signals to other services and back.

    It reads the app's configuration. One bus can serve several apps; each has its own node in
    ``app.extensions["eventbus"]``.

    :param app: passed to :meth:`init_app` if given.
    :param namespace: an existing blinker namespace to use; by default the bus has its own.
    :raises ConfigError: a setting of ``app`` is missing or wrong.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        namespace: Namespace | None = None,
        _timing: Timing | None = None,
    ) -> None:
        super().__init__(namespace=namespace, _timing=_timing)
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()

        if app is not None:
            self.init_app(app)

    @property
    def app_signal(self) -> AppSignals:
        """The same object as ``app.signal``, for type checkers: Flask declares no such attribute.

        ``bus.app_signal("user_registered")`` returns a signal; ``@bus.app_signal`` declares one.
        """
        return AppSignals(self)

    def init_app(self, app: Flask) -> None:
        """Read the app's configuration and set ``app.signal``; open no connection yet.

        :raises ConfigError: a setting is missing or wrong, receivers cannot be loaded, or the app
            has an event bus already.
        """
        if "eventbus" in app.extensions:
            raise ConfigError(
                f"The app {app.name!r} has an event bus already. Call init_app() once per app."
            )

        # Imported here, because a module that defines the bus may be imported without an app.
        with importing:
            from .node import Node
            from .routing.loading import load_receivers
            from .serving import call_when_serving

        node = Node(Config.from_mapping(app.config), self, host=self._host(app))
        app.extensions["eventbus"] = node
        app.signal = self.app_signal  # type: ignore[attr-defined]  # Flask declares no such attribute
        self._apps.add(app)

        try:
            load_receivers(self, node.config.receivers, root=Path(app.root_path))
        except BaseException:
            # init_app() can be called again once the fault is corrected.
            del app.extensions["eventbus"]
            self._apps.discard(app)
            raise

        if node.routes:
            app.before_request(_UnpublishedWarning(node).report_once)

        if node.config.listen:
            call_when_serving(app, node.start)

    def start(self, app: Flask | None = None) -> None:
        """Start listening in this process, under servers that do not start it themselves."""
        self.node(app).start()

    def ready(self, timeout: float | None = None, *, app: Flask | None = None) -> bool:
        """Wait until Redis has confirmed every subscription.

        :param timeout: seconds to wait; without it, wait forever.
        :return: False if the time was over first.
        """
        return self.node(app).ready(timeout)

    def flush(self, timeout: float | None = None, *, app: Flask | None = None) -> bool:
        """Wait until Redis has all events sent so far.

        :param timeout: seconds to wait; ``EVENTBUS_GRACE`` by default.
        :return: False if the time was over first.
        """
        return self.node(app).flush(timeout)

    def stop(self, app: Flask | None = None, *, flush: float = FLUSH_AT_EXIT) -> None:
        """Stop listening, let receivers finish, and publish the buffered events.

        :param flush: seconds to wait for Redis to take the buffered events.
        """
        self.node(app).stop(flush=flush)

    def health(self, app: Flask | None = None) -> Health:
        """Return the state of the app's node in this process."""
        return self.node(app).health()

    def node(self, app: Flask | None = None) -> Node:
        """Return the node of ``app``, of the current app, or of the only app.

        :raises RuntimeError: several apps use this bus and none is current, or the app does not
            use this bus.
        """
        app = app or (current_app if current_app else None)

        if app is None:
            apps = self._live_apps()

            if len(apps) != 1:
                raise RuntimeError(
                    f"This event bus serves {len(apps)} apps and none of them is the current one. "
                    "Pass the app, or work inside 'with app.app_context():'."
                )

            app = apps[0]

        if _real(app) not in self._apps:
            raise RuntimeError(
                f"The app {app.name!r} does not use this event bus. Call bus.init_app(app) first."
            )

        node: Node = app.extensions["eventbus"]
        return node

    def _host(self, app: Flask) -> Host:
        from .node import Host  # as in init_app()

        reference = weakref.ref(app)

        def scope() -> AbstractContextManager[object]:
            app = reference()

            if app is None:
                raise RuntimeError("The app of this event bus is gone.")

            return app.app_context()

        def owns(sender: Any) -> bool:
            # Most senders are the app itself; for them, this one comparison is enough.
            if sender is not None and sender is reference():
                return True

            # The app that sends: the sender itself, or the current app.
            sending_app = sender if isinstance(sender, Flask) else current_app

            if sending_app:
                return _real(sending_app) is reference()

            self._require_only_app()
            return reference() is not None

        def under_test() -> bool:
            app = reference()
            # As app.testing, without its descriptor.
            return app is not None and bool(app.config["TESTING"])

        def session() -> Any:
            app = reference()
            return None if app is None else _session_of(app)

        return Host(
            scope=scope,
            owns=owns,
            trace=_traceparent,
            app_exists=lambda: reference() is not None,
            under_test=under_test,
            session=session,
        )

    def _live_apps(self) -> list[Flask]:
        """Return the apps in use, without those that are only waiting for garbage collection."""
        if len(self._apps) > 1:
            gc.collect()

        return list(self._apps)

    def _require_only_app(self) -> None:
        count = len(self._live_apps())

        if count > 1:
            raise RuntimeError(
                f"This event bus serves {count} apps, and a signal was sent where none "
                "of them is the current one. Send it from the app, as in "
                "'signal.send(app, ...)', or inside 'with app.app_context():'."
            )


class _UnpublishedWarning:
    """Warns at an app's first request of signals that look published and are not."""

    def __init__(self, node: Node) -> None:
        self._node = weakref.ref(node)
        self._has_run = False

    def report_once(self) -> None:
        """Log a warning for each such signal, once.

        At the first request all modules of the app are imported.
        """
        node = self._node()

        if self._has_run or node is None:
            return

        self._has_run = True

        # Imported here, because a process that serves no request does not look for such signals.
        with importing:
            from .admin.overview import Overview

        for found in Overview(node).strangers():
            logger.warning("%s %s", *found)


def _real(app: Any) -> Flask:
    return app._get_current_object() if hasattr(app, "_get_current_object") else app  # type: ignore[no-any-return]  # a proxy


def _session_of(app: Flask) -> Any:
    """Return Flask-SQLAlchemy's session, or ``None`` if the app has none."""
    database = app.extensions.get("sqlalchemy")

    if database is None or current_app:
        return getattr(database, "session", None)

    # The session belongs to an app context. Without one no transaction is open.
    return lambda: None


def _traceparent() -> str | None:
    if not has_request_context():
        return None

    # The header, without the layers of the proxy and of request.headers.
    environ = request._get_current_object().environ  # type: ignore[attr-defined]  # a proxy
    value: str = environ.get("HTTP_TRACEPARENT", "")
    return value if value and _TRACEPARENT.fullmatch(value) else None
