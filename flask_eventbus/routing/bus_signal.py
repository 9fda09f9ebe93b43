"""The bus's own signals, and what the signals of others become once the bus works with them.

A bridge publishes what a signal sends. It runs after the local receivers, which therefore run
even if Redis is away, and ``send()`` returns what it returns without a bridge.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakMethod

from blinker import ANY, NamedSignal, Namespace, Signal

from ..config import SIGNAL_NAME
from ..coroutines import run_coroutine
from ..errors import ConfigError, PayloadError

Receiver = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])

#: Senders whose receivers a signal keeps in mind; their names come from the wire.
MOST_SENDERS = 100


def _report_at_end(
    name: object, is_ending: Callable[[], bool] = sys.is_finalizing, write: Any = os.write
) -> None:
    """Write a line to stderr if the interpreter ends: it has taken the bridges before ``__del__``.

    Logging may be gone by then, and so may this module's names: what it needs is a default.
    """
    if is_ending():
        text = (
            f"flask-eventbus: An event of {name!r} was sent while the interpreter ended, and is "
            "not published. Send it in a function that is registered with atexit, not in __del__.\n"
        )

        try:
            write(2, text.encode())
        except OSError:
            return


class Outbound:
    """A bridge: publishes what a signal sends."""

    def __call__(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission."""
        raise NotImplementedError

    async def publish(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission, in a coroutine."""
        raise NotImplementedError


class SendingSignal(Signal):
    """A signal that calls its local receivers first, ``async def`` ones too, then its bridges."""

    @property
    def bridges(self) -> Sequence[Outbound]:
        """The bridges that publish this signal."""
        raise NotImplementedError

    def publish_by(self, bridge: Outbound) -> None:
        """Publish by ``bridge`` from now on, as long as it lives."""
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
        :raises PayloadError: a value cannot travel, or a key is reserved.
        :raises PublishError: Redis did not take the event, and the route asks for an error.
        """
        results = super().send(sender, _async_wrapper=_async_wrapper or _to_sync, **kwargs)

        if not self.is_muted:
            for bridge in self.bridges:
                bridge(sender, **kwargs)

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
        wrapper = _sync_wrapper or _refuse_sync
        results = await super().send_async(sender, _sync_wrapper=wrapper, **kwargs)

        if not self.is_muted:
            for bridge in self.bridges:
                await bridge.publish(sender, **kwargs)

        return results


class AdoptedSignal(SendingSignal):
    """A signal of others that the bus publishes, or connects receivers to.

    Its bridges are connected as receivers: code that asks ``has_receivers_for()`` before it
    sends goes on to send.
    """

    #: True once a route carried it.
    _is_published = False

    @property
    def bridges(self) -> Sequence[Outbound]:
        """The bridges among the connected receivers."""
        found = [each for each in super().receivers_for(ANY) if isinstance(each, Outbound)]

        if self._is_published and not found:
            _report_at_end(getattr(self, "name", self))

        return found

    def publish_by(self, bridge: Outbound) -> None:
        """Publish by ``bridge`` from now on, as long as it lives."""
        self._is_published = True
        self.connect(bridge)

    def receivers_for(self, sender: Any) -> Generator[Receiver, None, None]:
        """Yield the local receivers for ``sender``."""
        return (found for found in super().receivers_for(sender) if not isinstance(found, Outbound))


class BusSignal(SendingSignal, NamedSignal):
    """One of the bus's own signals; a route of it is invisible to whoever looks at the signal."""

    def __init__(self, name: str, doc: str | None = None) -> None:
        super().__init__(name, doc)
        #: The local receivers for a sender, as long as nobody connects or disconnects.
        self._found: dict[str, list[Receiver]] = {}
        #: True if a local receiver may vanish without notice.
        self._has_weak = False
        self._bridges: tuple[weakref.ref[Outbound], ...] = ()

    @property
    def bridges(self) -> Sequence[Outbound]:
        """The bridges of the nodes that live."""
        living = [found for reference in self._bridges if (found := reference()) is not None]

        if self._bridges and not living:
            _report_at_end(self.name)

        return living

    def publish_by(self, bridge: Outbound) -> None:
        """Publish by ``bridge`` from now on, as long as it lives."""
        self._bridges = (*map(weakref.ref, self.bridges), weakref.ref(bridge))

    def connect(self, receiver: F, sender: Any = ANY, weak: bool = True) -> F:
        """Connect ``receiver``, as blinker does."""
        self._has_weak = self._has_weak or weak

        try:
            return super().connect(receiver, sender, weak)
        finally:
            self._found = {}

    def disconnect(self, receiver: Receiver, sender: Any = ANY) -> None:
        """Disconnect ``receiver``, as blinker does."""
        try:
            super().disconnect(receiver, sender)
        finally:
            self._found = {}

    def _clear_state(self) -> None:
        super()._clear_state()
        self._found = {}

    def local_receivers(self, sender: str) -> list[Receiver]:
        """The receivers for a service, kept for the next event."""
        # Whoever connects meanwhile leaves this one behind.
        known = self._found
        found = known.get(sender)

        if found is None:
            found = list(self.receivers_for(sender))

            if not self._has_weak and len(known) < MOST_SENDERS:
                known[sender] = found

        return found

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
        :raises PayloadError: a value cannot travel, or a key is reserved.
        :raises PublishError: Redis did not take the event, and the route asks for an error.
        """
        _refuse_reserved(self.name, kwargs, _async_wrapper)
        return super().send(sender, _async_wrapper=_async_wrapper, **kwargs)

    async def send_async(
        self,
        sender: Any | None = None,
        /,
        *,
        _sync_wrapper: Callable[[Receiver], Callable[..., Coroutine[Any, Any, Any]]] | None = None,
        **kwargs: Any,
    ) -> list[tuple[Receiver, Any]]:
        """Await the receivers for ``sender``, then publish as :meth:`send` does."""
        _refuse_reserved(self.name, kwargs, _sync_wrapper)
        return await super().send_async(sender, _sync_wrapper=_sync_wrapper, **kwargs)


class BusNamespace(Namespace):
    """Makes :class:`BusSignal` objects, and tells when a new one is born."""

    def __init__(self) -> None:
        super().__init__()
        #: Held while a signal is made and told of, so that there is one of each name.
        self.lock = threading.RLock()
        self._watchers: list[WeakMethod[Callable[[NamedSignal], None]]] = []
        #: The names of signals that the program asked for, in order to send them.
        self.asked: set[str] = set()

    def watch(self, watcher: Callable[[NamedSignal], None]) -> None:
        """Call ``watcher``, a method, with each new signal as long as its object lives."""
        living = [each for each in self._watchers if each() is not None]
        self._watchers = [*living, WeakMethod(watcher)]

    def signal(self, name: str, doc: str | None = None) -> NamedSignal:
        """The signal called ``name``, made at the first call.

        :raises ConfigError: the name cannot be part of a Redis key.
        """
        signal = self.make(name, doc)
        self.asked.add(name)
        return signal

    def make(self, name: str, doc: str | None = None) -> NamedSignal:
        """Return the signal called ``name``, on behalf of a route or a receiver."""
        with self.lock:
            if name in self:
                return self[name]

            check_signal_name(name, "signal()")
            signal = self[name] = BusSignal(name, doc)
            self._tell(signal)
            return signal

    def _tell(self, signal: NamedSignal) -> None:
        for reference in self._watchers:
            watcher = reference()

            if watcher is not None:
                watcher(signal)


def adopt(signal: Signal) -> SendingSignal:
    """Let a signal of others send as the bus's own do, and return it.

    blinker has no hook for that. Its ``send_async()`` would refuse the bridge, ``send()`` would
    refuse ``async def`` receivers and return the bridge among the results, and the order of
    receivers would be undefined. So the signal gets a subclass of its own class.
    """
    if not isinstance(signal, SendingSignal):
        kind = type(signal)

        if kind not in _adopted:
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            _adopted[kind] = type(kind.__name__, (AdoptedSignal, kind), names)

        signal.__class__ = _adopted[kind]

    return cast(SendingSignal, signal)


#: The classes that adopted signals get, by those they had.
_adopted: dict[type, type[Signal]] = {}


def check_signal_name(name: object, where: str) -> str:
    """Return ``name`` if a signal can be called so.

    :raises ConfigError: it cannot; ``where`` says who asked.
    """
    if isinstance(name, str) and SIGNAL_NAME.fullmatch(name):
        return name

    raise ConfigError(
        f"{where}: {name!r} cannot be a signal's name. Use letters, digits, '_', '-', '.' and "
        "'/', at most 128 of them, beginning with a letter or digit, for example "
        "'user_registered'."
    )


def _refuse_reserved(name: str, payload: dict[str, Any], wrapper: object) -> None:
    """Refuse keys that receivers would not get.

    :param wrapper: what was sent as the wrapper of blinker's that goes with this way to send.
    """
    if "sender" in payload:
        raise PayloadError(
            f"The payload of {name!r} has a key 'sender', which every receiver already gets as "
            "its first argument. Give the value another name."
        )

    is_value = wrapper is not None and not callable(wrapper)

    if is_value or "_async_wrapper" in payload or "_sync_wrapper" in payload:
        raise PayloadError(
            f"The payload of {name!r} has a key '_async_wrapper' or '_sync_wrapper'. blinker's "
            "send() and send_async() take those for themselves. Give the value another name."
        )


def _to_sync(receiver: Receiver) -> Receiver:
    def call(sender: Any, **kwargs: Any) -> Any:
        return run_coroutine(receiver(sender, **kwargs))

    return call


def _refuse_sync(receiver: Receiver) -> Callable[..., Coroutine[Any, Any, Any]]:
    raise RuntimeError(
        f"send_async() cannot call {receiver!r}, which is no coroutine function. "
        "Pass _sync_wrapper, as blinker asks for."
    )
