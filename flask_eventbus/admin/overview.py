"""Show what a program publishes and subscribes to, for the commands `routes` and `check`."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from blinker import NamedSignal, Namespace, Signal

from ..config import Age
from ..node import Node
from ..routing.bus_signal import Bridge, BusNamespace, SendingSignal
from ..routing.options import Receiver, is_pattern, matches, name_of
from ..routing.routes import Route
from ..routing.subscriptions import NEW, Subscription, allowed, subscription_for

#: Names of the start of a stream in settings, by the value in a subscription.
_START = {NEW: "new", "0": "earliest"}


@dataclass(frozen=True, slots=True)
class Connected:
    """A connected receiver of a signal."""

    receiver: Receiver
    #: True if blinker holds only a weak reference to the receiver.
    weak: bool = False

    @property
    def name(self) -> str:
        """Name of the receiver in logs: ``module.qualname``."""
        return name_of(self.receiver)


class Overview:
    """The routes, subscriptions and receivers of a node, read without starting it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._registry = node.registry

    @property
    def routes(self) -> list[Route]:
        """Routes, ordered by name."""
        return [route for _, route in sorted(self._node.routes.items())]

    @property
    def subscriptions(self) -> list[Subscription]:
        """Subscriptions, ordered by name."""
        return [found for _, found in sorted(self._node.subscriptions.items())]

    def reads_stream(self, subscription: Subscription) -> bool:
        """Return True if the node reads a stream for a subscription."""
        return self._node.config.has_streams and subscription.via != "channel"

    @property
    def signals(self) -> list[NamedSignal]:
        """Signals in the namespace of the bus, ordered by name."""
        namespace = self._registry.namespace
        return [namespace[name] for name in sorted(namespace)]

    @property
    def local(self) -> list[NamedSignal]:
        """Signals of the bus with receivers here that are neither published nor subscribed to."""
        return [
            signal for signal in self.signals if connected_to(signal) and not self._crosses(signal)
        ]

    def covered_by(self, route: Route) -> list[str]:
        """Return the names of the bus's signals that a route publishes."""
        return [signal.name for signal in self.signals if route.covers(signal.name)]

    def strangers(self) -> Iterator[tuple[str, str]]:
        """Yield the problem and the remedy of each route that publishes the wrong signal.

        Its signal was never requested with ``bus.signal()``, and another signal of the same name
        exists. Sending the other signal publishes nothing.
        """
        namespace = self._registry.namespace

        if not isinstance(namespace, BusNamespace):
            return

        routes = [each for each in self.routes if each.signal is None and not is_pattern(each.name)]
        names = {route.name for route in routes} - namespace.requested

        for name, (where, remedy) in sorted(_strangers(names).items()):
            problem = (
                f"The route {name!r} publishes the bus's own signal, which no code has asked for "
                f"with bus.signal({name!r}). {where} is another signal of that name: what it sends "
                "is not published."
            )
            yield problem, remedy

    def published_names(self, *, via: str) -> list[str]:
        """Return the names that this program publishes over ``via``, with patterns resolved."""
        names: set[str] = set()

        for route in (route for route in self.routes if route.via == via):
            names.update(self.covered_by(route) if is_pattern(route.name) else [route.name])

        return sorted(names)

    def receivers_of(self, subscription: Subscription) -> list[Connected]:
        """Return the receivers of the events of a subscription."""
        name = subscription.name
        signals = [signal for signal in self.signals if matches(name, signal.name)]
        found = [connected for signal in signals for connected in connected_to(signal)]

        if is_pattern(name) or not signals:
            found += map(Connected, self._registry.receivers_of_pattern(name))

        return list({id(connected.receiver): connected for connected in found}.values())

    def audiences_of(self, subscription: Subscription) -> Iterator[tuple[str, list[Connected]]]:
        """Yield each signal that a subscription's events are sent to, with its receivers."""
        name, own = subscription.name, self._node.subscriptions

        for signal in self.signals:
            if signal.name == name or (matches(name, signal.name) and signal.name not in own):
                yield signal.name, connected_to(signal)

        if is_pattern(name):
            yield name, list(map(Connected, self._registry.receivers_of_pattern(name)))

    def as_json(self) -> dict[str, Any]:
        """Return the overview as values that JSON can represent."""
        return {
            "service": self._node.config.service,
            "publishes": [self._route_as_json(route) for route in self.routes],
            "subscribes": [self._subscription_as_json(found) for found in self.subscriptions],
            "local": [
                {
                    "name": signal.name,
                    "receivers": sorted(each.name for each in connected_to(signal)),
                }
                for signal in self.local
            ],
        }

    def _crosses(self, signal: NamedSignal) -> bool:
        return any(
            route.signal is signal or route.covers(signal.name) for route in self.routes
        ) or any(matches(subscription.name, signal.name) for subscription in self.subscriptions)

    def retries_of(self, subscription: Subscription, receiver: Receiver) -> int | None:
        """Return how many retries a receiver has; ``None`` without a consumer group."""
        if not self.reads_stream(subscription) or not subscription.group:
            return None

        asked = self._registry.retries_of(subscription.name, receiver)
        return allowed(subscription.retries, asked, self._node.config.retries)

    def _route_as_json(self, route: Route) -> dict[str, Any]:
        return {
            "name": route.name,
            "via": route.via,
            "confirm": route.confirm,
            "after_commit": route.after_commit,
            "outbox": route.outbox,
            "signal": None if route.signal is None else name_of_signal(route.signal),
            "payload": None if route.payload is None else name_of(route.payload),
            "covers": self.covered_by(route) if is_pattern(route.name) else [route.name],
            "stream": self._stream_as_json(route) if route.via == "stream" else None,
        }

    def _stream_as_json(self, route: Route) -> dict[str, Any]:
        config = self._node.config
        kept = config.maxlen if route.maxlen is None else route.maxlen
        return {
            "maxlen": None if isinstance(kept, Age) else kept,
            "max_age_seconds": kept.seconds if isinstance(kept, Age) else None,
            "key": route.key,
            "replicas": config.replicas if route.replicas is None else route.replicas,
        }

    def _subscription_as_json(self, subscription: Subscription) -> dict[str, Any]:
        sources, reads = subscription.sources, self.reads_stream(subscription)
        uses = {"channel": subscription.via != "stream", "stream": reads}
        return {
            "name": subscription.name,
            "via": [via for via, is_used in uses.items() if is_used],
            "from": None if sources is None else sorted(sources),
            "echo": subscription.echo,
            "start": _START.get(subscription.start, subscription.start) if reads else None,
            "group": self._node.config.service if reads and subscription.group else None,
            "receivers": [
                {
                    "name": each.name,
                    "retries": self.retries_of(subscription, each.receiver),
                    "timeout": self._registry.timeout_of(subscription.name, each.receiver),
                }
                for each in sorted(self.receivers_of(subscription), key=lambda each: each.name)
            ],
        }


def _strangers(names: Set[str]) -> dict[str, tuple[str, str]]:
    """Return where a signal of blinker's own has one of these names, and the remedy, by name."""
    found: dict[str, tuple[str, str]] = {}
    # Used only for signals without a variable of their own, whose path is clearer.
    by_namespace: dict[str, tuple[str, str]] = {}

    if not names:
        return found

    # Packages before their modules: a package imports what other code is meant to use.
    for module_name in sorted(sys.modules, key=lambda name: name.count(".")):
        module = sys.modules.get(module_name)

        for path, value in _held(module_name, "", getattr(module, "__dict__", {})):
            where = f"{module_name}:{path}"

            if isinstance(value, Namespace):
                advice = f"Give the bus that namespace: EventBus(namespace={path}), from "
                by_namespace = {
                    name: (f"{where}[{name!r}]", f"{advice}{module_name}.")
                    for name, signal in list(value.items())
                    if _is_stranger(signal, names)
                } | by_namespace
            elif _is_stranger(value, names):
                advice = f"Give the route {{'signal': {where!r}}}, or the bus the namespace of "
                found.setdefault(value.name, (where, f"{advice}your signals: {_ADOPT}."))

    found = by_namespace | found
    return dict.fromkeys(_living(names - found.keys()), _UNNAMED) | found


_ADOPT = "EventBus(namespace=...)"

#: Place and remedy of a signal that is no attribute of a module or a class.
_UNNAMED = (
    "A signal in an object or a function",
    "Name the signal itself in the route, {'signal': SIGNAL}, or give the bus the namespace of "
    f"your signals: {_ADOPT}.",
)


def _held(
    module: str, prefix: str, space: Mapping[str, Any]
) -> Iterator[tuple[str, NamedSignal | Namespace]]:
    """Yield the signals and namespaces that a module and its classes hold, each with its path."""
    for attribute, value in list(space.items()):
        # type(), since isinstance() on a proxy may run any code.
        kind = type(value)
        path = f"{prefix}{attribute}"

        if issubclass(kind, NamedSignal | Namespace):
            yield path, value
        elif issubclass(kind, type) and type.__getattribute__(value, "__qualname__") == path:
            inner = type.__getattribute__(value, "__dict__")

            if inner.get("__module__") == module:
                yield from _held(module, f"{path}.", inner)


def _is_stranger(signal: NamedSignal, names: Set[str]) -> bool:
    # Another thread may be creating the signal, so that it has no name yet.
    return not isinstance(signal, SendingSignal) and getattr(signal, "name", None) in names


def _living(names: Set[str]) -> set[str]:
    """Return the ``names`` for which a signal exists anywhere in this process."""

    def look() -> set[str]:
        # type() as above. Objects of gc.freeze() are not found.
        signals = [found for found in gc.get_objects() if issubclass(type(found), NamedSignal)]
        return {signal.name for signal in signals if _is_stranger(signal, names)}

    if not names or not look():
        return set()

    # The signal may be garbage that is not collected yet.
    gc.collect()
    return look()


def connected_to(signal: Signal) -> list[Connected]:
    """Return the receivers of a signal, without the bridge that publishes it."""
    found = []

    # blinker has no public API that tells weak receivers from strong ones.
    for held in list(signal.receivers.values()):
        is_weak = isinstance(held, weakref.ref)
        receiver = held() if is_weak else held

        if receiver is not None and not isinstance(receiver, Bridge):
            found.append(Connected(receiver, is_weak))

    return found


def name_of_signal(signal: Signal) -> str:
    """Return the name of a signal; its ``repr()`` if it has no name."""
    return signal.name if isinstance(signal, NamedSignal) else repr(signal)


def subscribed(node: Node, names: Iterable[str]) -> set[str]:
    """Return the names of the streams that a service reads; its patterns select from ``names``."""
    by_stream = {
        name: found for name, found in node.subscriptions.items() if found.via != "channel"
    }
    plain = {name for name in by_stream if not is_pattern(name)}
    return plain | {name for name in names if subscription_for(name, by_stream)}


def published(node: Node, names: Iterable[str]) -> set[str]:
    """Return the ``names`` that a service publishes over streams."""
    patterns = [route.name for route in node.routes.values() if route.via == "stream"]
    return {name for name in names if any(matches(pattern, name) for pattern in patterns)}
