"""Bridges: they connect signals to the publisher."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from blinker import NamedSignal, Signal

from ..errors import PayloadError
from ..logs import BoundedLog, get_logger, text_of
from .bus_signal import BridgeBase, BusSignal, adopt
from .options import is_pattern
from .registry import Registry
from .routes import Route

logger = get_logger(__name__)


class Bridge(BridgeBase):
    """Publishes the emissions of a signal; one per signal, name on the wire and node."""

    def __init__(
        self,
        name: str,
        route: Route,
        publish: Callable[[str, Mapping[str, Any], Route], None],
        publish_async: Callable[[str, Mapping[str, Any], Route], Awaitable[None]],
        owns: Callable[[Any], bool] | None,
    ) -> None:
        self.name = name
        self.route = route
        self._publish = publish
        self._publish_async = publish_async
        self._owns = owns
        self._log = BoundedLog(logger)

    def __call__(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission, if its sender belongs to this node.

        A foreign signal may be sent while an exception is handled, as Flask's
        ``got_request_exception`` is. An error of the bus would replace that exception, so it is
        logged instead.

        :raises PayloadError: a value cannot be encoded.
        :raises PublishError: Redis did not confirm the event, and the route or
            ``EVENTBUS_ON_OUTAGE`` asks for an error.
        :raises HopLimitError: the chain of causes is longer than ``EVENTBUS_MAX_HOPS``.
        """
        program_error = sys.exception()

        try:
            found = self._extract(sender, payload)

            if found is not None:
                self._publish(self.name, found, self.route)
        except Exception as error:
            if program_error is None or not self._is_foreign:
                raise

            self._log_unpublished(program_error, error)

    async def publish(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission as :meth:`__call__` does, without blocking the event loop."""
        program_error = sys.exception()

        try:
            found = self._extract(sender, payload)

            if found is not None:
                await self._publish_async(self.name, found, self.route)
        except Exception as error:
            if program_error is None or not self._is_foreign:
                raise

            self._log_unpublished(program_error, error)

    @property
    def _is_foreign(self) -> bool:
        return self.route.signal is not None and not isinstance(self.route.signal, BusSignal)

    def _log_unpublished(self, program_error: BaseException, error: Exception) -> None:
        self._log.error(
            "not published",
            "%r was sent while %s was being handled, and was not published: %s: %s",
            self.name,
            type(program_error).__name__,
            type(error).__name__,
            text_of(error),
            exc_info=error,
        )

    def _extract(self, sender: Any, payload: dict[str, Any]) -> Mapping[str, Any] | None:
        """Return the payload; ``None`` if this node does not publish the emission."""
        if self._owns is not None and not self._owns(sender):
            return None

        if self.route.payload is None:
            return payload

        found = self.route.payload(sender, **payload)

        if found is None or isinstance(found, Mapping):
            return found

        raise PayloadError(
            f"The payload function of {self.name!r} returned {type(found).__name__}. "
            "Return a mapping, or None to leave this emission unpublished."
        )


class Bridges:
    """Connects a bridge to each signal that a route selects, present and future.

    :param configured: the routes of the settings; they override those declared in code.
    :param publish: publishes one emission, given its name, payload and route.
    :param owns: returns True if emissions of this sender belong to this node; ``None`` if all do.
    :param check: raises :exc:`.ConfigError` for a route that the server cannot serve.
    """

    def __init__(
        self,
        registry: Registry,
        configured: Mapping[str, Route],
        publish: Callable[[str, Mapping[str, Any], Route], None],
        publish_async: Callable[[str, Mapping[str, Any], Route], Awaitable[None]],
        owns: Callable[[Any], bool] | None,
        check: Callable[[Route], None],
    ) -> None:
        self._registry = registry
        self._configured = configured
        self._publish = publish
        self._publish_async = publish_async
        self._owns = owns
        self._check = check
        #: Bridges by id of the signal and name. The signals are kept too, so that ids stay unique.
        self._bridges: dict[tuple[int, str], tuple[Signal, Bridge]] = {}
        #: The routes that are patterns, those of the settings first.
        self._patterns: list[Route] = []

    @property
    def routes(self) -> dict[str, Route]:
        """All routes by name; those of the settings override those declared in code."""
        return {**self._registry.routes, **self._configured}

    def connect_all(self) -> None:
        """Connect the signals of all routes."""
        for name in self.routes:
            self.connect(name)

    def connect(self, name: str) -> None:
        """Connect the signals that the route ``name`` selects."""
        route = self._route_named(name)

        if route is None:
            return

        self._check(route)

        if route.signal is not None:
            self._bridge(route.signal, name, route)
        elif is_pattern(name):
            self._connect_pattern()
        else:
            self._bridge(self._registry.make(name), name, route)

    def route_for(self, name: str) -> Route | None:
        """Return the route of this name, else the first pattern that matches it."""
        return self._route_named(name) or self._pattern_for(name)

    def connect_signal(self, signal: NamedSignal) -> None:
        """Connect a signal of the bus, if a route selects it."""
        route = self.route_for(signal.name)

        if route is not None and route.signal is None:
            self._bridge(signal, signal.name, route)

    def _connect_pattern(self) -> None:
        both = (self._configured, self._registry.routes)
        self._patterns = [r for routes in both for r in routes.values() if is_pattern(r.name)]

        for signal in list(self._registry.namespace.values()):
            self.connect_signal(signal)

    def _route_named(self, name: str) -> Route | None:
        return self._configured.get(name) or self._registry.routes.get(name)

    def _pattern_for(self, name: str) -> Route | None:
        return next((route for route in self._patterns if route.covers(name)), None)

    def _bridge(self, signal: Signal, name: str, route: Route) -> None:
        key = (id(signal), name)

        if key in self._bridges:
            self._bridges[key][1].route = route
            return

        bridge = Bridge(name, route, self._publish, self._publish_async, self._owns)
        self._bridges[key] = (signal, bridge)

        # Signals hold bridges weakly: they are freed together with the app.
        adopt(signal).add_bridge(bridge)
