"""Signals of the bus, and foreign blinker signals that the bus publishes.

``send()`` calls the local receivers first, then the bridge, which publishes the event. So local
receivers run even if Redis is unreachable. The return value is the same as without a bridge.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakMethod

from blinker import ANY, NamedSignal, Namespace, Signal

from ..coroutines import run_coroutine
from ..errors import PayloadError
from ..logs import BoundedLog, get_logger, text_of
from ..typing import Extractor
from .options import Receiver, check_signal_name
from .routes import Route

logger = get_logger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

#: Number of senders whose receivers a signal caches. Their names come from Redis, so it is bounded.
MAX_CACHED_SENDERS = 100


def _report_at_end(
    name: object, is_ending: Callable[[], bool] = sys.is_finalizing, write: Any = os.write
) -> None:
    """Write a line to stderr if the interpreter is exiting and has already freed the bridges.

    ``__del__`` methods may run that late. Logging and the names of this module may be gone by
    then, so the functions used here are default arguments.
    """
    if is_ending():
        text = (
            f"flask-eventbus: An event of {name!r} was sent while the interpreter was exiting, and "
            "is not published. Send it in a function registered with atexit, not in __del__.\n"
        )

        try:
            write(2, text.encode())
        except OSError:
            return


class Bridge:
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
        """Publish one emission; blinker calls this if it sends an adopted signal itself."""
        self.emit(sender, payload)

    def emit(self, sender: Any, payload: dict[str, Any]) -> None:
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
        route = self.route

        try:
            if self._owns is not None and not self._owns(sender):
                return

            if route.payload is None:
                self._publish(self.name, payload, route)
            elif (found := self._extract(route.payload, sender, payload)) is not None:
                self._publish(self.name, found, route)
        except Exception as error:
            if not self._is_logged(error, program_error):
                raise

    async def emit_async(self, sender: Any, payload: dict[str, Any]) -> None:
        """Publish one emission as :meth:`emit` does, without blocking the event loop."""
        program_error = sys.exception()
        route = self.route

        try:
            if self._owns is not None and not self._owns(sender):
                return

            if route.payload is None:
                await self._publish_async(self.name, payload, route)
            elif (found := self._extract(route.payload, sender, payload)) is not None:
                await self._publish_async(self.name, found, route)
        except Exception as error:
            if not self._is_logged(error, program_error):
                raise

    def _is_logged(self, error: Exception, program_error: BaseException | None) -> bool:
        """Log an error, unless it must be raised: see :meth:`emit`."""
        is_own = self.route.signal is None or isinstance(self.route.signal, BusSignal)

        if program_error is None or is_own:
            return False

        self._log.error(
            "not published",
            "%r was sent while %s was being handled, and was not published: %s: %s",
            self.name,
            type(program_error).__name__,
            type(error).__name__,
            text_of(error),
            exc_info=error,
        )
        return True

    def _extract(
        self, extract: Extractor, sender: Any, payload: dict[str, Any]
    ) -> Mapping[str, Any] | None:
        """Return the payload of the route's function; ``None`` to publish nothing."""
        found = extract(sender, **payload)

        if found is None or isinstance(found, Mapping):
            return found

        raise PayloadError(
            f"The payload function of {self.name!r} returned {type(found).__name__}. "
            "Return a mapping, or None to leave this emission unpublished."
        )


class SendingSignal(Signal):
    """A signal that calls its local receivers first, including coroutines, then its bridges."""

    #: True for a signal of the bus: it refuses payload keys that receivers would not get.
    is_own = False

    @property
    def bridges(self) -> Sequence[Bridge]:
        """The bridges that publish this signal."""
        raise NotImplementedError

    def add_bridge(self, bridge: Bridge) -> None:
        """Add ``bridge``, which publishes the signal; it is held by a weak reference."""
        raise NotImplementedError

    def send(
        self,
        sender: Any | None = None,
        /,
        *,
        _async_wrapper: Callable[[Receiver], Receiver] | None = None,
        **kwargs: Any,
    ) -> list[tuple[Receiver, Any]]:
        """Call the receivers for ``sender``, ``async def`` ones included, then publish.

        :return: what blinker returns: the local receivers and their results.
        :raises PayloadError: a value cannot be encoded, or a key is reserved.
        :raises PublishError: Redis did not confirm the event, and the route asks for an error.
        """
        if self.is_own and ("sender" in kwargs or "_sync_wrapper" in kwargs):
            raise _reserved_key(self, kwargs)

        if _async_wrapper is None:
            _async_wrapper = _to_sync
        elif self.is_own and not callable(_async_wrapper):
            raise _reserved_key(self, kwargs)

        # blinker's send() takes a microsecond, also without receivers.
        if self.is_own and not self.receivers:
            results = []
        else:
            results = super().send(sender, _async_wrapper=_async_wrapper, **kwargs)

        if not self.is_muted:
            for bridge in self.bridges:
                bridge.emit(sender, kwargs)

        return results

    async def send_async(
        self,
        sender: Any | None = None,
        /,
        *,
        _sync_wrapper: Callable[[Receiver], Callable[..., Coroutine[Any, Any, Any]]] | None = None,
        **kwargs: Any,
    ) -> list[tuple[Receiver, Any]]:
        """Await the receivers for ``sender``, then publish as :meth:`send` does."""
        if self.is_own and ("sender" in kwargs or "_async_wrapper" in kwargs):
            raise _reserved_key(self, kwargs)

        if _sync_wrapper is None:
            _sync_wrapper = _refuse_sync
        elif self.is_own and not callable(_sync_wrapper):
            raise _reserved_key(self, kwargs)

        results = await super().send_async(sender, _sync_wrapper=_sync_wrapper, **kwargs)

        if not self.is_muted:
            for bridge in self.bridges:
                await bridge.emit_async(sender, kwargs)

        return results


class AdoptedSignal(SendingSignal):
    """A foreign signal that the bus publishes, or connects receivers to.

    Its bridges are connected as receivers, because code may check ``has_receivers_for()`` before
    it sends.
    """

    #: True once a route has selected it.
    _is_published = False

    @property
    def bridges(self) -> Sequence[Bridge]:
        """The bridges among the connected receivers."""
        found = [each for each in super().receivers_for(ANY) if isinstance(each, Bridge)]

        if self._is_published and not found:
            _report_at_end(getattr(self, "name", self))

        return found

    def add_bridge(self, bridge: Bridge) -> None:
        """Add ``bridge``, which publishes the signal; it is held by a weak reference."""
        self._is_published = True
        self.connect(bridge)

    def receivers_for(self, sender: Any) -> Generator[Receiver, None, None]:
        """Yield the local receivers for ``sender``."""
        return (found for found in super().receivers_for(sender) if not isinstance(found, Bridge))


class BusSignal(SendingSignal, NamedSignal):
    """A signal of the bus. Its bridges do not appear among its receivers."""

    is_own = True

    def __init__(self, name: str, doc: str | None = None) -> None:
        super().__init__(name, doc)
        #: Cache of the local receivers by sender; cleared when a receiver connects or disconnects.
        self.cached_receivers: dict[str, list[Receiver]] = {}
        #: True if a local receiver is weakly referenced and may vanish without notice.
        self._has_weak = False
        self._bridges: tuple[weakref.ref[Bridge], ...] = ()

    @property
    def bridges(self) -> Sequence[Bridge]:
        """The bridges of nodes that still exist."""
        living: list[Bridge] = []

        for reference in self._bridges:
            bridge = reference()

            if bridge is not None:
                living.append(bridge)

        if self._bridges and not living:
            _report_at_end(self.name)

        return living

    def add_bridge(self, bridge: Bridge) -> None:
        """Add ``bridge``, which publishes the signal; it is held by a weak reference."""
        self._bridges = (*map(weakref.ref, self.bridges), weakref.ref(bridge))

    def connect(self, receiver: F, sender: Any = ANY, weak: bool = True) -> F:
        """Connect ``receiver``, as blinker does."""
        self._has_weak = self._has_weak or weak

        try:
            return super().connect(receiver, sender, weak)
        finally:
            self.cached_receivers = {}

    def disconnect(self, receiver: Receiver, sender: Any = ANY) -> None:
        """Disconnect ``receiver``, as blinker does."""
        try:
            super().disconnect(receiver, sender)
        finally:
            self.cached_receivers = {}

    def _clear_state(self) -> None:
        super()._clear_state()
        self.cached_receivers = {}

    def local_receivers(self, sender: str) -> list[Receiver]:
        """Return the receivers for events of a service, and cache them."""
        # connect() in another thread replaces the cache; then this entry goes to the old one.
        known = self.cached_receivers
        found = known.get(sender)

        if found is None:
            found = list(self.receivers_for(sender))

            if not self._has_weak and len(known) < MAX_CACHED_SENDERS:
                known[sender] = found

        return found


class BusNamespace(Namespace):
    """Creates :class:`BusSignal` objects, and notifies watchers of new ones."""

    def __init__(self) -> None:
        super().__init__()
        #: Held while a signal is created and announced, so that each name has one signal.
        self.lock = threading.RLock()
        self._watchers: list[WeakMethod[Callable[[NamedSignal], None]]] = []
        #: The names of signals that the program got by :meth:`signal`, in order to send them.
        self.requested: set[str] = set()

    def watch(self, watcher: Callable[[NamedSignal], None]) -> None:
        """Call the method ``watcher`` with each new signal; it is held by a weak reference."""
        living = [each for each in self._watchers if each() is not None]
        self._watchers = [*living, WeakMethod(watcher)]

    def signal(self, name: str, doc: str | None = None) -> NamedSignal:
        """Return the signal called ``name``; create it on the first call.

        :raises ConfigError: the name has characters that a signal's name cannot have.
        """
        with self.lock:
            signal = self[name] if name in self else self.make(name, doc)

        self.requested.add(name)
        return signal

    def make(self, name: str, doc: str | None = None) -> NamedSignal:
        """Return the signal called ``name`` for a route or a receiver; create it if needed."""
        with self.lock:
            if name in self:
                return self[name]

            check_signal_name(name, "signal()")
            signal = self[name] = BusSignal(name, doc)

            for reference in self._watchers:
                watcher = reference()

                if watcher is not None:
                    watcher(signal)

            return signal


def adopt(signal: Signal) -> SendingSignal:
    """Make a foreign signal send as the signals of the bus do, and return it.

    blinker has no hook for this, so the signal gets a subclass of its own class. With a plain
    signal, ``send_async()`` would refuse the bridge, and ``send()`` would refuse ``async def``
    receivers and return the bridge among the results. The order of receivers would be undefined.
    """
    if not isinstance(signal, SendingSignal):
        kind = type(signal)

        if kind not in _adopted:
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            _adopted[kind] = type(kind.__name__, (AdoptedSignal, kind), names)

        signal.__class__ = _adopted[kind]

    return cast(SendingSignal, signal)


#: The subclasses of adopted signals, by their original class.
_adopted: dict[type, type[Signal]] = {}


def _reserved_key(signal: Signal, payload: dict[str, Any]) -> PayloadError:
    """Return the error of a payload with a key that receivers would not get."""
    name = getattr(signal, "name", signal)

    if "sender" in payload:
        return PayloadError(
            f"The payload of {name!r} has a key 'sender', which every receiver already gets as "
            "its first argument. Give the value another name."
        )

    return PayloadError(
        f"The payload of {name!r} has a key '_async_wrapper' or '_sync_wrapper'. blinker's "
        "send() and send_async() use these names. Give the value another name."
    )


def _to_sync(receiver: Receiver) -> Receiver:
    def call(sender: Any, **kwargs: Any) -> Any:
        return run_coroutine(receiver(sender, **kwargs))

    return call


def _refuse_sync(receiver: Receiver) -> Callable[..., Coroutine[Any, Any, Any]]:
    raise RuntimeError(
        f"send_async() cannot call {receiver!r}, which is not a coroutine function. "
        "Pass _sync_wrapper, as blinker requires."
    )
