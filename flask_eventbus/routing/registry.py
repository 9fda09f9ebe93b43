"""The signals, routes, subscriptions and receivers declared in code, and the bridges for them."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from blinker import ANY, NamedSignal, Namespace, Signal

from ..codec.codec import Codec
from ..config import TIMING, Timing
from ..errors import ConfigError
from ..typing import Extractor, Via
from .bus_signal import Bridge, BusNamespace, BusSignal, adopt
from .options import (
    AllReceiverOptions,
    Receiver,
    ReceiverOptions,
    check_signal_name,
    is_pattern,
    matches,
    read_timeout,
)
from .routes import Route, read_route
from .subscriptions import Subscription, read_subscription, unite

if TYPE_CHECKING:
    from ..node import Node

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Siblings(dict[str, None]):
    """The names of this process's nodes: all current names, and the most recent former names."""

    def __init__(self, max_former: int) -> None:
        super().__init__()
        self._max_former = max_former
        self._living: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()

    def add(self, node: object, name: str) -> None:
        """Add the new name of ``node``; keep its former name, whose events may still arrive."""
        self._living[node] = name
        self[name] = None

        if len(self) > self._max_former + len(self._living):
            current = set(self._living.values())
            former = [each for each in list(self) if each not in current]

            for each in former[: -self._max_former]:
                self.pop(each, None)

    def clear(self) -> None:
        """Forget all names."""
        self._living.clear()
        super().clear()


class Registry:
    """Keeps what a program declares; the common base of :class:`.EventBus` and :class:`.Bus`.

    :param namespace: an existing blinker namespace to use, for example
        ``blinker.default_namespace``; by default the bus has its own.
    """

    def __init__(
        self, *, namespace: Namespace | None = None, _timing: Timing | None = None
    ) -> None:
        self.timing = _timing or TIMING
        self.namespace: Namespace = BusNamespace() if namespace is None else namespace
        #: The codec, with the types that the program registered.
        self.codec = Codec()
        self.routes: dict[str, Route] = {}
        self.subscriptions: dict[str, Subscription] = {}
        #: Receivers of patterns, with the services whose events they receive.
        self._patterns: list[tuple[str, Receiver, tuple[Any, ...]]] = []
        #: The receivers that :meth:`receivers_of_pattern` found, and among how many of all.
        self._matching: dict[str, tuple[int, list[Receiver]]] = {}
        #: The names of the signals that the receivers of patterns and the nodes know.
        self._known: set[str] = set()
        self._receiver_options = AllReceiverOptions()
        #: The declared parameters of signals, by name.
        self.parameters: dict[str, inspect.Signature] = {}
        #: Modules and plug-ins already loaded, so that a second app does not load them again.
        self.loaded: set[str] = set()
        #: The database session of :meth:`register_session`.
        self.session: Any = None
        self._nodes: weakref.WeakSet[Node] = weakref.WeakSet()
        self._lock = threading.RLock()
        #: The names of all nodes of this process that use this namespace, also those of other
        #: buses: an event of one of them has already run the local receivers of all.
        self.siblings: Siblings = vars(self.namespace).setdefault(
            "_eventbus_siblings", Siblings(self.timing.max_former)
        )

        if isinstance(self.namespace, BusNamespace):
            self.namespace.watch(self._signal_created)

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """Lock held during a declaration, so that all nodes see the same order."""
        return self.namespace.lock if isinstance(self.namespace, BusNamespace) else self._lock

    def reset_lock(self) -> None:
        """Replace the lock in a forked child: a thread of the parent may have held it."""
        self._lock = threading.RLock()

        if isinstance(self.namespace, BusNamespace):
            self.namespace.lock = threading.RLock()

    def signal(self, name: str, doc: str | None = None) -> NamedSignal:
        """Return the bus's signal called ``name``, a blinker signal; create it on the first call.

        :raises ConfigError: the name has characters that a signal's name cannot have.
        """
        if isinstance(self.namespace, BusNamespace):
            return self.namespace.signal(name, doc)

        return self.make(name, doc)

    def make(self, name: str, doc: str | None = None) -> NamedSignal:
        """Return the signal called ``name`` for a route or a receiver; create it if needed."""
        if isinstance(self.namespace, BusNamespace):
            return self.namespace.make(name, doc)

        with self.lock:
            if name in self.namespace:
                return self.namespace[name]

            check_signal_name(name, "signal()")
            signal = self.namespace.signal(name, doc)
            self._signal_created(signal)
            return signal

    def on(
        self,
        signal: str | NamedSignal,
        *,
        from_: str | Iterable[str] | None = None,
        echo: bool = False,
        via: Via | None = None,
        start: str | datetime | None = None,
        group: Literal[True] | None = True,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> Callable[[F], F]:
        """Subscribe the service to a signal and connect the decorated receiver, not weakly.

        :param signal: its name, a pattern such as ``"order_*"``, or the signal.
        :param from_: the services whose events to receive; all by default.
        :param echo: True to receive events that this node emits as well; on a stream, those that
            this service emits.
        :param via: ``"channel"`` or ``"stream"`` to use only this transport; both by default.
        :param start: where to start reading a stream when the service subscribes for the first
            time: ``"new"``, ``"earliest"``, an entry id or an aware datetime.
        :param group: ``None`` to receive every event of a stream in every process of the service.
        :param retries: number of retries of this receiver after it failed on a stream event;
            ``EVENTBUS_RETRIES`` by default.
        :param timeout: seconds after which this receiver is cancelled, which counts as a failure.
            The receiver must be a coroutine function, since Python cannot interrupt others.
        :raises ConfigError: an argument is wrong.
        """
        if inspect.isfunction(signal):
            raise ConfigError(
                f"'@bus.on' of {signal.__qualname__}() names no signal. Name it, for example "
                "@bus.on('user_registered')."
            )

        name = signal.name if isinstance(signal, NamedSignal) else signal
        where = f"on({name!r})"
        options = {"from": from_, "echo": echo, "via": via, "start": start, "group": group}
        found = read_subscription(name, {**options, "retries": retries}, where)
        # The number of retries belongs to this receiver, not to the subscription of the service.
        subscription = replace(found, retries=None)
        receiver_options = ReceiverOptions(
            found.retries, read_timeout(f"{where}['timeout']", timeout)
        )
        senders = (ANY,) if subscription.sources is None else tuple(sorted(subscription.sources))

        def decorate(receiver: F) -> F:
            receiver_options.check(receiver, where)

            with self.lock:
                self._receiver_options.add(name, receiver, receiver_options)
                self._connect(name, receiver, senders)
                self._subscribe(subscription)

            return receiver

        return decorate

    def publishes(
        self,
        signal: str | Signal,
        *,
        as_: str | None = None,
        via: Via = "channel",
        payload: Extractor | str | None = None,
        confirm: bool | None = None,
        after_commit: bool = False,
        outbox: bool = False,
        key: str | None = None,
        maxlen: int | str | None = None,
        replicas: int | None = None,
    ) -> Signal:
        """Publish a signal, one of the bus's or any other, and return it.

        :param as_: the name on the wire; the signal's own by default.
        :param payload: called like a receiver; returns the payload to publish.
        :param via: ``"channel"`` or ``"stream"``.
        :param confirm: True if ``send()`` waits until Redis has the event; the default on streams.
        :param after_commit: True to hold an event sent inside a database transaction until its
            commit; see :meth:`register_session`.
        :param outbox: True to write an event to the database in the same transaction;
            ``flask eventbus relay`` then publishes it.
        :param key: a key of the payload; events of a stream with the same value are handled in
            order.
        :param maxlen: approximate number of events that the stream keeps, or their age, for
            example ``"7d"``.
        :param replicas: number of replicas that must have an event before it is confirmed.
        :raises ConfigError: an argument is wrong, or another signal is published under this name.
        """
        options = {
            "via": via,
            "payload": payload,
            "confirm": confirm,
            "after_commit": after_commit,
            "outbox": outbox,
            "key": key,
            "maxlen": maxlen,
            "replicas": replicas,
        }
        where = f"publishes({as_ or getattr(signal, 'name', signal)!r})"

        if isinstance(signal, Signal) and not self._is_own(signal):
            route = read_route(as_ or signal, {**options, "signal": signal}, where)
        else:
            route = read_route(getattr(signal, "name", signal), options, where)

            if as_ is not None and as_ != route.name:
                route = replace(route, name=as_, signal=self.signal(route.name))

        with self.lock:
            self._route(route, where)
            return route.signal or self.signal(route.name)

    def register_type(
        self,
        code: int,
        type_: type[T],
        *,
        pack: Callable[[T], bytes],
        unpack: Callable[[bytes], T],
    ) -> None:
        """Encode values of ``type_`` as msgpack ext type ``code`` (32 to 127).

        Every service that reads these values must register the type under the same code.

        :raises ConfigError: the code or the type is taken.
        """
        self.codec.register_type(code, type_, pack=pack, unpack=unpack)

    def register_session(self, session: Any) -> None:
        """Set the database session for routes with ``after_commit`` or ``outbox``.

        A Flask app uses Flask-SQLAlchemy's session without this call.

        :param session: SQLAlchemy's ``scoped_session``, ``sessionmaker`` or ``Session``, their
            asynchronous variants, or a function that returns the current session or ``None``.
        :raises ConfigError: ``session`` is none of these, or SQLAlchemy is older than 2.0.
        """
        from ..database.transactions import check  # it needs SQLAlchemy, which is optional

        check(session)
        self.session = session

    def receivers_of(self, name: str, source: str) -> list[Receiver]:
        """Return the receivers of an event ``name`` from the service ``source``."""
        signal = self.namespace.get(name)

        if signal is None:
            return self._pattern_receivers(name, source)

        if name not in self._known:
            # An adopted namespace does not announce signals that other code creates in it.
            self._signal_created(signal)

        if signal.is_muted:
            return []

        if isinstance(signal, BusSignal):
            return signal.local_receivers(source)

        return [r for r in signal.receivers_for(source) if not isinstance(r, Bridge)]

    def connected_to(self, name: str) -> list[Receiver]:
        """Return all receivers of ``name``, from any sender, in the order of their connection."""
        signal = self.namespace.get(name)

        if signal is None:
            return self.receivers_of_pattern(name)

        if name not in self._known:
            self._signal_created(signal)

        found: list[Receiver] = []

        for receiver in list(signal.receivers.values()):
            living = receiver() if isinstance(receiver, weakref.ref) else receiver

            if living is not None and not isinstance(living, Bridge):
                found.append(living)

        return found

    def retries_of(self, name: str, receiver: Receiver) -> int | None:
        """Return the retries that ``receiver`` declared for ``name``; ``None`` if it did not."""
        return self._receiver_options.find(name, receiver).retries

    def timeout_of(self, name: str, receiver: Receiver) -> float | None:
        """Return the timeout in seconds that ``receiver`` declared for ``name``, or ``None``."""
        return self._receiver_options.find(name, receiver).timeout

    def receivers_of_pattern(self, pattern: str) -> list[Receiver]:
        """Return the receivers whose pattern matches all names that ``pattern`` matches."""
        count, found = self._matching.get(pattern, (0, []))

        # A node asks for each stream of its patterns every second.
        if count != len(self._patterns):
            if len(self._matching) >= self.timing.max_remembered:
                self._matching.clear()

            patterns = list(self._patterns)
            found = [receiver for known, receiver, _ in patterns if matches(known, pattern)]
            self._matching[pattern] = (len(patterns), found)

        return list(found)

    def watch(self, node: Node) -> None:
        """Notify ``node`` of later declarations; it is held by a weak reference."""
        with self.lock:
            self._nodes.add(node)

    def find_new_signals(self) -> None:
        """Find signals that other code created in an adopted namespace."""
        with self.lock:
            for signal in list(self.namespace.values()):
                if signal.name not in self._known:
                    self._signal_created(signal)

    def _route(self, route: Route, where: str) -> None:
        known = self.routes.get(route.name)

        if known is not None and known.signal is not route.signal:
            raise ConfigError(
                f"{where}: another signal is published as {route.name!r}. Publish this one under "
                "a name of its own, with as_='...'."
            )

        self.routes[route.name] = route

        for node in list(self._nodes):
            node.route_declared(route)

    def _connect(self, name: str, receiver: Receiver, senders: tuple[Any, ...]) -> None:
        if is_pattern(name):
            self._patterns.append((name, receiver, senders))
            known = list(self.namespace.values())
            signals = [signal for signal in known if matches(name, signal.name)]
        else:
            signals = [self.make(name)]

        for signal in signals:
            _connect(signal, receiver, senders)

    def _pattern_receivers(self, name: str, source: str) -> list[Receiver]:
        found: list[Receiver] = []

        for pattern, receiver, senders in self._patterns:
            is_match = matches(pattern, name) and (ANY in senders or source in senders)

            if is_match and receiver not in found:
                found.append(receiver)

        return found

    def _subscribe(self, subscription: Subscription) -> None:
        known = self.subscriptions.get(subscription.name)
        # The senders belong to each receiver, not to the subscription of the service.
        subscription = replace(subscription, sources=None)

        if known is not None:
            subscription = unite(known, subscription, f"on({subscription.name!r})")

        self.subscriptions[subscription.name] = subscription

        for node in list(self._nodes):
            node.subscription_declared(subscription)

    def _is_own(self, signal: Signal) -> bool:
        return isinstance(signal, NamedSignal) and self.namespace.get(signal.name) is signal

    def _signal_created(self, signal: NamedSignal) -> None:
        with self.lock:
            for pattern, receiver, senders in self._patterns:
                if matches(pattern, signal.name):
                    _connect(signal, receiver, senders)

            # Now: until then, threads with an event of this name wait for the lock.
            self._known.add(signal.name)

            for node in list(self._nodes):
                node.signal_created(signal)


def _connect(signal: NamedSignal, receiver: Receiver, senders: tuple[Any, ...]) -> None:
    adopt(signal)

    for sender in senders:
        signal.connect(receiver, sender=sender, weak=False)


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
