"""Bridges: they connect signals to the publisher, as the routes say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from blinker import NamedSignal, Signal

from .bus_signal import Bridge, adopt
from .options import is_pattern
from .registry import Registry
from .routes import Route


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
        patterns = (route for route in self._patterns if route.covers(name))
        return self._route_named(name) or next(patterns, None)

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

    def _bridge(self, signal: Signal, name: str, route: Route) -> None:
        key = (id(signal), name)

        if key in self._bridges:
            self._bridges[key][1].route = route
            return

        bridge = Bridge(name, route, self._publish, self._publish_async, self._owns)
        self._bridges[key] = (signal, bridge)

        # Signals hold bridges weakly: they are freed together with the app.
        adopt(signal).add_bridge(bridge)
