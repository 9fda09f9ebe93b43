"""What a program declares: its signals, its receivers, and which of them cross processes."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, Protocol, TypeVar

from blinker import ANY, NamedSignal, Namespace, Signal

from ..codec.codec import Codec
from ..errors import ConfigError
from ..typing import Extractor, Via
from .bus_signal import BusNamespace, BusSignal, Outbound, Receiver, adopt, check_signal_name
from .options import is_pattern, matches
from .routes import Route, read_route
from .subscriptions import Subscription, read_retries, read_subscription, unite


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one receiver asked for; ``None`` where it did not."""

    retries: int | None = None
    #: Seconds.
    timeout: float | None = None

    def check(self, receiver: Receiver, where: str) -> None:
        """Refuse a timeout that could not be kept.

        :raises ConfigError: the receiver is no coroutine function.
        """
        if self.timeout is not None and not is_coroutine_function(receiver):
            raise ConfigError(
                f"{where}: {receiver!r} has a timeout, and Python cannot interrupt a function that "
                "is no 'async def'. Write it as one, or take the timeout off and set one where it "
                "waits, for example requests.get(..., timeout=5)."
            )


NOTHING = Allowance()


class Allowances:
    """What the receivers of a bus asked for, by the name or pattern they were connected with."""

    def __init__(self) -> None:
        self._asked: dict[object, list[tuple[str, Receiver, Allowance]]] = {}

    def note(self, name: str, receiver: Receiver, allowance: Allowance) -> None:
        """Keep what a receiver asked for when it was connected."""
        if allowance != NOTHING:
            self._asked.setdefault(_identity(receiver), []).append((name, receiver, allowance))

    def of(self, name: str, receiver: Receiver) -> Allowance:
        """What a receiver asked for at events of ``name``; of two, what it asked for last."""
        asked = self._asked.get(_identity(receiver), ())
        return next((found for known, _, found in reversed(asked) if matches(known, name)), NOTHING)


def read_allowance(retries: object, timeout: object, where: str) -> Allowance:
    """Check what a receiver asks for.

    :raises ConfigError: one of it is wrong.
    """
    asked = None if retries is None else read_retries(f"{where}['retries']", retries)

    if timeout is None:
        return Allowance(asked)

    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)

    if not is_number or not 0 < timeout <= 86_400:  # type: ignore[operator]  # a number by then
        raise ConfigError(
            f"{where}['timeout'] is {timeout!r}. Set it to a number of seconds, more than 0."
        )

    return Allowance(asked, float(timeout))  # type: ignore[arg-type]  # a number by then


def is_coroutine_function(receiver: Receiver) -> bool:
    """Whether calling it makes a coroutine."""
    call = getattr(receiver, "__call__", None)  # noqa: B004 - the method itself is looked at
    return inspect.iscoroutinefunction(receiver) or inspect.iscoroutinefunction(call)


def _identity(receiver: Receiver) -> object:
    """The same for a method however often it is looked up."""
    owner = getattr(receiver, "__self__", None)
    function = getattr(receiver, "__func__", None)
    return id(receiver) if owner is None or function is None else (id(owner), id(function))


F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

#: Nodes that are gone whose names a process remembers: their events may still be on the way.
MOST_GONE = 1000


class Watcher(Protocol):
    """What wants to know of declarations that come later: a node."""

    def born(self, signal: NamedSignal) -> None:
        """A signal of the bus's own is new."""

    def routed(self, route: Route) -> None:
        """A route was declared, or declared anew."""

    def subscribed(self, subscription: Subscription) -> None:
        """A subscription was declared, or declared anew."""


class Siblings(dict[str, None]):
    """The names of nodes of this process: of all that live, and of the last that are gone."""

    def __init__(self) -> None:
        super().__init__()
        self._living: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()

    def add(self, node: object, name: str) -> None:
        """Add the name that ``node`` has from now on; its events may still come under the old."""
        self._living[node] = name
        self[name] = None

        if len(self) > MOST_GONE + len(self._living):
            living = set(self._living.values())
            gone = [each for each in list(self) if each not in living]

            for each in gone[:-MOST_GONE]:
                self.pop(each, None)

    def clear(self) -> None:
        """Forget all names."""
        self._living.clear()
        super().clear()


class Registry:
    """The face that a bus with Flask and one without have in common.

    :param namespace: an existing blinker namespace to adopt, ``blinker.default_namespace``
        for example; otherwise the bus has signals of its own.
    """

    def __init__(self, *, namespace: Namespace | None = None) -> None:
        self.namespace: Namespace = BusNamespace() if namespace is None else namespace
        #: Types that travel beyond those of the wire format.
        self.codec = Codec()
        self.routes: dict[str, Route] = {}
        self.subscriptions: dict[str, Subscription] = {}
        #: Receivers of patterns, with the services they hear.
        self._patterns: list[tuple[str, Receiver, tuple[Any, ...]]] = []
        #: The names of the signals that are connected to the receivers of patterns.
        self._met: set[str] = set()
        self._allowances = Allowances()
        #: The declared parameters of signals, by name.
        self.parameters: dict[str, inspect.Signature] = {}
        #: What was loaded by configuration, so that two apps do not load it twice.
        self.loaded: set[str] = set()
        #: What :meth:`register_session` was given.
        self.session: Any = None
        self._watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self._lock = threading.RLock()
        #: The names of the nodes of this process whose signals these are, of other buses that
        #: adopted the namespace as well: what one of them emits has run the receivers of all.
        self.siblings: Siblings = vars(self.namespace).setdefault("_eventbus_siblings", Siblings())

        if isinstance(self.namespace, BusNamespace):
            self.namespace.watch(self._born)

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """Held while something is declared, so that watchers miss nothing and see one order."""
        return self.namespace.lock if isinstance(self.namespace, BusNamespace) else self._lock

    def renew_lock(self) -> None:
        """In a forked child: another thread of the parent may have held it."""
        self._lock = threading.RLock()

        if isinstance(self.namespace, BusNamespace):
            self.namespace.lock = threading.RLock()

    def signal(self, name: str, doc: str | None = None) -> NamedSignal:
        """The bus's signal called ``name``: a blinker signal, made at the first call.

        :raises ConfigError: the name cannot be part of a Redis key.
        """
        if isinstance(self.namespace, BusNamespace):
            return self.namespace.signal(name, doc)

        return self.make(name, doc)

    def make(self, name: str, doc: str | None = None) -> NamedSignal:
        """Return the signal called ``name``, on behalf of a route or a receiver."""
        if isinstance(self.namespace, BusNamespace):
            return self.namespace.make(name, doc)

        with self.lock:
            if name in self.namespace:
                return self.namespace[name]

            check_signal_name(name, "signal()")
            signal = self.namespace.signal(name, doc)
            self._born(signal)
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
        """Subscribe the service to a signal and connect the decorated receiver, strongly.

        :param signal: its name, a pattern such as ``"order_*"``, or the signal.
        :param from_: the services to hear; all by default.
        :param echo: whether events that this node emits come back to it; on a stream, those that
            this service emits.
        :param via: ``"channel"`` or ``"stream"`` to hear the signal only so; both by default.
        :param start: where the service begins to read a stream when it subscribes for the first
            time: ``"new"``, ``"earliest"``, an entry's id or an aware datetime.
        :param group: ``None`` to hear every event of a stream in every process of the service.
        :param retries: how often this receiver is tried again at a stream event that it failed
            at; ``EVENTBUS_RETRIES`` by default.
        :param timeout: seconds after which this receiver, a coroutine function, is cancelled and
            has failed. Python cannot interrupt any other function.
        :raises ConfigError: something of it is not well formed.
        """
        name = signal.name if isinstance(signal, NamedSignal) else signal
        options = {"from": from_, "echo": echo, "via": via, "start": start, "group": group}
        read_subscription(name, {**options, "retries": retries}, f"on({name!r})")
        # How often is a matter of this receiver, not of the whole service.
        subscription = read_subscription(name, options, f"on({name!r})")
        allowance = read_allowance(retries, timeout, f"on({name!r})")
        senders = (ANY,) if subscription.sources is None else tuple(sorted(subscription.sources))

        def decorate(receiver: F) -> F:
            allowance.check(receiver, f"on({name!r})")

            with self.lock:
                self._allowances.note(name, receiver, allowance)
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
        :param payload: called as a receiver is; returns the payload to publish.
        :param via: ``"channel"`` or ``"stream"``.
        :param confirm: whether ``send()`` waits until Redis has the event; by default on streams.
        :param after_commit: whether an event sent inside a database transaction waits for its
            commit; see :meth:`register_session`.
        :param outbox: whether an event is written to the database with that transaction, and
            published by ``flask eventbus relay``.
        :param key: the key of the payload whose value keeps events of a stream in order.
        :param maxlen: about how many events the stream keeps, or their age, as ``"7d"``.
        :param replicas: how many replicas must have an event before it is confirmed.
        :raises ConfigError: something of it is not well formed.
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
        """Let values of ``type_`` travel, as msgpack ext type ``code`` (32 to 127).

        Every service that reads them registers the type under the same code.

        :raises ConfigError: the code or the type is taken.
        """
        self.codec.register_type(code, type_, pack=pack, unpack=unpack)

    def register_session(self, session: Any) -> None:
        """Name the database session whose commits events wait for, where a route asks for it.

        In a Flask app, Flask-SQLAlchemy's is known without this.

        :param session: SQLAlchemy's ``scoped_session``, ``sessionmaker`` or ``Session``, of the
            asynchronous kind too, or a function that returns the session in use or ``None``.
        :raises ConfigError: it is none of these, or SQLAlchemy is older than 2.0.
        """
        from ..database.transactions import check  # it needs SQLAlchemy, which is optional

        check(session)
        self.session = session

    def receivers_of(self, name: str, source: str) -> list[Receiver]:
        """The receivers that an event ``name`` from ``source`` is for."""
        signal = self.namespace.get(name)

        if signal is None:
            return self._pattern_receivers(name, source)

        if name not in self._met:
            # An adopted namespace does not tell of the signals that others make in it.
            self._born(signal)

        if signal.is_muted:
            return []

        if isinstance(signal, BusSignal):
            return signal.local_receivers(source)

        return [r for r in signal.receivers_for(source) if not isinstance(r, Outbound)]

    def connected_to(self, name: str) -> list[Receiver]:
        """All receivers of ``name``, whoever they hear, in the order of their connection."""
        signal = self.namespace.get(name)

        if signal is None:
            return self.receivers_of_pattern(name)

        if name not in self._met:
            self._born(signal)

        found = [
            receiver() if isinstance(receiver, weakref.ref) else receiver
            for receiver in list(signal.receivers.values())
        ]
        return [r for r in found if r is not None and not isinstance(r, Outbound)]

    def retries_of(self, name: str, receiver: Receiver) -> int | None:
        """How often ``receiver`` is tried again at an event ``name``, if it says so itself."""
        return self._allowances.of(name, receiver).retries

    def timeout_of(self, name: str, receiver: Receiver) -> float | None:
        """The seconds that ``receiver`` has for an event ``name``, if it says so itself."""
        return self._allowances.of(name, receiver).timeout

    def receivers_of_pattern(self, pattern: str) -> list[Receiver]:
        """The receivers that hear whatever ``pattern`` stands for, from any service or some."""
        return [receiver for known, receiver, _ in self._patterns if matches(known, pattern)]

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of declarations from now on, as long as it lives."""
        with self.lock:
            self._watchers.add(watcher)

    def look_around(self) -> None:
        """Take up signals that others made: an adopted namespace does not tell of them."""
        with self.lock:
            for signal in list(self.namespace.values()):
                if signal.name not in self._met:
                    self._born(signal)

    def _route(self, route: Route, where: str) -> None:
        known = self.routes.get(route.name)

        if known is not None and known.signal is not route.signal:
            raise ConfigError(
                f"{where}: another signal is published as {route.name!r}. Publish this one under "
                "a name of its own, with as_='...'."
            )

        self.routes[route.name] = route

        for watcher in list(self._watchers):
            watcher.routed(route)

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
            heard = matches(pattern, name) and (ANY in senders or source in senders)

            if heard and receiver not in found:
                found.append(receiver)

        return found

    def _subscribe(self, subscription: Subscription) -> None:
        known = self.subscriptions.get(subscription.name)
        # Who is heard is a matter of each receiver here, not of the whole service.
        subscription = replace(subscription, sources=None)

        if known is not None:
            subscription = unite(known, subscription, f"on({subscription.name!r})")

        self.subscriptions[subscription.name] = subscription

        for watcher in list(self._watchers):
            watcher.subscribed(subscription)

    def _is_own(self, signal: Signal) -> bool:
        return isinstance(signal, NamedSignal) and self.namespace.get(signal.name) is signal

    def _born(self, signal: NamedSignal) -> None:
        with self.lock:
            self._met.add(signal.name)

            for pattern, receiver, senders in self._patterns:
                if matches(pattern, signal.name):
                    _connect(signal, receiver, senders)

            for watcher in list(self._watchers):
                watcher.born(signal)


def _connect(signal: NamedSignal, receiver: Receiver, senders: tuple[Any, ...]) -> None:
    adopt(signal)

    for sender in senders:
        signal.connect(receiver, sender=sender, weak=False)
