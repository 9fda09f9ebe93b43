"""What a program publishes, hears and keeps to itself: the facts behind `routes` and `check`."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from blinker import NamedSignal, Namespace, Signal

from ..config import Age
from ..node import Node
from ..receivers.dispatcher import name_of
from ..receivers.retries import allowed
from ..routing.bus_signal import BridgeBase, BusNamespace, Receiver, SendingSignal
from ..routing.options import is_pattern, matches
from ..routing.routes import Route
from ..routing.subscriptions import NEW, Subscription, subscription_for

#: Where a stream is read from, as settings name it.
_START = {NEW: "new", "0": "earliest"}


@dataclass(frozen=True, slots=True)
class Connected:
    """A receiver, and whether only a weak reference keeps it connected."""

    receiver: Receiver
    weak: bool = False

    @property
    def name(self) -> str:
        """``module.qualname``, as logs have it."""
        return name_of(self.receiver)


class Overview:
    """A node's routes, subscriptions and receivers, without starting anything."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._registry = node.registry

    @property
    def routes(self) -> list[Route]:
        """What is published, by name."""
        return [route for _, route in sorted(self._node.routes.items())]

    @property
    def subscriptions(self) -> list[Subscription]:
        """What is heard, by name."""
        return [found for _, found in sorted(self._node.subscriptions.items())]

    @property
    def has_streams(self) -> bool:
        """Whether there are streams where the node's events go."""
        return not self._node.config.url.startswith("redis+cluster://")

    def reads_stream(self, subscription: Subscription) -> bool:
        """Whether a subscription is heard over streams, too or only."""
        return self.has_streams and subscription.via != "channel"

    @property
    def signals(self) -> list[NamedSignal]:
        """The bus's own signals, by name."""
        namespace = self._registry.namespace
        return [namespace[name] for name in sorted(namespace)]

    @property
    def local(self) -> list[NamedSignal]:
        """The bus's own signals that have receivers here and cross no process."""
        return [
            signal for signal in self.signals if connected_to(signal) and not self._crosses(signal)
        ]

    def covered_by(self, route: Route) -> list[str]:
        """The bus's own signals that a route carries."""
        return [signal.name for signal in self.signals if route.covers(signal.name)]

    def strangers(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with a route whose signal no code asked for, and what to do.

        There is another signal of its name, and whoever sends that one publishes nothing.
        """
        namespace = self._registry.namespace

        if not isinstance(namespace, BusNamespace):
            return

        routes = [each for each in self.routes if each.signal is None and not is_pattern(each.name)]
        names = {route.name for route in routes} - namespace.requested

        for name, (where, remedy) in sorted(_strangers(names).items()):
            yield _stranger_text(name, where), remedy

    def published_names(self, *, via: str) -> list[str]:
        """The names on the wire that this program publishes one way, patterns resolved."""
        names: set[str] = set()

        for route in (route for route in self.routes if route.via == via):
            names.update(self.covered_by(route) if is_pattern(route.name) else [route.name])

        return sorted(names)

    def receivers_of(self, subscription: Subscription) -> list[Connected]:
        """The receivers that a subscription feeds."""
        name = subscription.name
        signals = [signal for signal in self.signals if matches(name, signal.name)]
        found = [connected for signal in signals for connected in connected_to(signal)]

        if is_pattern(name) or not signals:
            found += map(Connected, self._registry.receivers_of_pattern(name))

        return list({id(connected.receiver): connected for connected in found}.values())

    def audiences_of(self, subscription: Subscription) -> Iterator[tuple[str, list[Connected]]]:
        """The signals that a subscription feeds, each with its receivers."""
        name, own = subscription.name, self._node.subscriptions

        for signal in self.signals:
            if signal.name == name or (matches(name, signal.name) and signal.name not in own):
                yield signal.name, connected_to(signal)

        if is_pattern(name):
            yield name, list(map(Connected, self._registry.receivers_of_pattern(name)))

    def as_json(self) -> dict[str, Any]:
        """All of it, of plain values."""
        return {
            "service": self._node.config.service,
            "publishes": [self._route_as_json(route) for route in self.routes],
            "subscribes": [self._subscription_as_json(found) for found in self.subscriptions],
            "local": [
                {"name": signal.name, "receivers": _names(connected_to(signal))}
                for signal in self.local
            ],
        }

    def _crosses(self, signal: NamedSignal) -> bool:
        return any(
            route.signal is signal or route.covers(signal.name) for route in self.routes
        ) or any(matches(subscription.name, signal.name) for subscription in self.subscriptions)

    def retries_of(self, subscription: Subscription, receiver: Receiver) -> int | None:
        """How often a receiver is tried again; ``None`` where nothing is kept for that."""
        if not self.reads_stream(subscription) or not subscription.group:
            return None

        asked = self._registry.retries_of(subscription.name, receiver)
        return allowed(subscription.retries, asked, self._node.config.retries)

    def timeout_of(self, subscription: Subscription, receiver: Receiver) -> float | None:
        """The seconds that a receiver has; ``None`` for as many as it takes."""
        return self._registry.timeout_of(subscription.name, receiver)

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
        return {
            "name": subscription.name,
            "via": self._ways_of(subscription),
            "from": None if sources is None else sorted(sources),
            "echo": subscription.echo,
            "start": _START.get(subscription.start, subscription.start) if reads else None,
            "group": self._node.config.service if reads and subscription.group else None,
            "receivers": [
                self._receiver_as_json(subscription, each)
                for each in sorted(self.receivers_of(subscription), key=lambda each: each.name)
            ],
        }

    def _ways_of(self, subscription: Subscription) -> list[str]:
        channel = ["channel"] if subscription.via != "stream" else []
        return [*channel, *(["stream"] if self.reads_stream(subscription) else [])]

    def _receiver_as_json(self, subscription: Subscription, found: Connected) -> dict[str, Any]:
        return {
            "name": found.name,
            "retries": self.retries_of(subscription, found.receiver),
            "timeout": self.timeout_of(subscription, found.receiver),
        }


def _strangers(names: Set[str]) -> dict[str, tuple[str, str]]:
    """Find blinker's signals of these names: where one of each is, and how it is published."""
    found: dict[str, tuple[str, str]] = {}
    # A path of its own says more than the namespace that a signal is in as well.
    by_namespace: dict[str, tuple[str, str]] = {}

    if not names:
        return found

    # A package before its modules: it shows what is meant for others.
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

#: A signal that no module and no class holds by a name.
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
        # Its type, since a proxy may do anything when it is asked for its class.
        kind = type(value)
        path = f"{prefix}{attribute}"

        if issubclass(kind, NamedSignal | Namespace):
            yield path, value
        elif issubclass(kind, type) and type.__getattribute__(value, "__qualname__") == path:
            inner = type.__getattribute__(value, "__dict__")

            if inner.get("__module__") == module:
                yield from _held(module, f"{path}.", inner)


def _is_stranger(signal: NamedSignal, names: Set[str]) -> bool:
    # Another thread may be about to make it.
    return not isinstance(signal, SendingSignal) and getattr(signal, "name", None) in names


def _living(names: Set[str]) -> set[str]:
    """Return those of ``names`` that a signal anywhere in this process has."""

    def look() -> set[str]:
        # Their types, as above; objects that the program has frozen are not among them.
        signals = [found for found in gc.get_objects() if issubclass(type(found), NamedSignal)]
        return {signal.name for signal in signals if _is_stranger(signal, names)}

    if not names or not look():
        return set()

    # It may be one that is gone, and not collected yet.
    gc.collect()
    return look()


def _stranger_text(name: str, where: str) -> str:
    """What is wrong with a route whose signal no code asked for."""
    return (
        f"The route {name!r} publishes the bus's own signal, which no code has asked for with "
        f"bus.signal({name!r}). {where} is another signal of that name: what "
        "it sends is not published."
    )


def connected_to(signal: Signal) -> list[Connected]:
    """The receivers of a signal that do not publish it."""
    return [
        connected
        for connected in _all_connected(signal)
        if not isinstance(connected.receiver, BridgeBase)
    ]


def name_of_signal(signal: Signal) -> str:
    """A signal's name, or what stands for it where it has none."""
    return signal.name if isinstance(signal, NamedSignal) else repr(signal)


def _all_connected(signal: Signal) -> Iterator[Connected]:
    # blinker offers no other way to tell a weak receiver from a strong one.
    for reference in list(signal.receivers.values()):
        if not isinstance(reference, weakref.ref):
            yield Connected(reference)
        elif (receiver := _alive(reference)) is not None:
            yield Connected(receiver, weak=True)


def _alive(reference: weakref.ref[Callable[..., Any]]) -> Callable[..., Any] | None:
    return reference()


def _names(connected: list[Connected]) -> list[str]:
    return sorted(each.name for each in connected)


def heard(node: Node, names: Iterable[str]) -> set[str]:
    """The signals that a service may hear over streams, those of ``names`` its patterns fit too."""
    by_stream = {
        name: found for name, found in node.subscriptions.items() if found.via != "channel"
    }
    plain = {name for name in by_stream if not is_pattern(name)}
    return plain | {name for name in names if subscription_for(name, by_stream)}


def published(node: Node, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that a service publishes over streams."""
    patterns = [route.name for route in node.routes.values() if route.via == "stream"]
    return {name for name in names if any(matches(pattern, name) for pattern in patterns)}
