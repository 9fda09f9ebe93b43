"""The bus's own signals: real blinker signals that run the local receivers first.

What bridges a signal is one more receiver of it, marked as :class:`Outbound`. blinker
calls receivers in no order; a :class:`BusSignal` calls the outbound ones last, so the
local receivers run whatever Redis does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Generator, Iterable
from inspect import iscoroutinefunction
from typing import Any, TypeVar
from weakref import WeakMethod

from blinker import ANY, NamedSignal, Namespace

from .coroutines import run_coroutine
from .errors import ConfigError, PayloadError
from .names import SIGNAL_NAME

Receiver = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])

#: Senders whose receivers a signal keeps in mind; their names come from the wire.
MOST_SENDERS = 100


class Outbound:
    """Marks a receiver that publishes what it receives."""


class BusSignal(NamedSignal):
    """A :class:`blinker.NamedSignal` whose local receivers run before it is published."""

    def __init__(self, name: str, doc: str | None = None) -> None:
        super().__init__(name, doc)
        #: The local receivers for a sender, as long as nobody connects or disconnects.
        self._found: dict[str, list[Receiver]] = {}
        #: Whether a local receiver may vanish without a word.
        self._has_weak = False

    def connect(self, receiver: F, sender: Any = ANY, weak: bool = True) -> F:
        """Connect ``receiver``, as blinker does."""
        self._has_weak = self._has_weak or (weak and not isinstance(receiver, Outbound))

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
        """The receivers for a service, those left out that publish."""
        # Whoever connects meanwhile leaves this one behind.
        known = self._found
        found = known.get(sender)

        if found is None:
            found = local(self.receivers_for(sender))

            if not self._has_weak and len(known) < MOST_SENDERS:
                known[sender] = found

        return found

    def receivers_for(self, sender: Any) -> Generator[Receiver, None, None]:
        """Yield the receivers for ``sender``, those that publish last."""
        outbound: list[Receiver] = []

        for receiver in super().receivers_for(sender):
            if isinstance(receiver, Outbound):
                outbound.append(receiver)
            else:
                yield receiver

        yield from outbound

    def send(
        self,
        sender: Any | None = None,
        /,
        *,
        _async_wrapper: Callable[[Receiver], Receiver] | None = None,
        **kwargs: Any,
    ) -> list[tuple[Receiver, Any]]:
        """Call the receivers for ``sender``, ``async def`` ones included, and publish.

        :raises PayloadError: a value cannot travel, or a key is ``sender``.
        :raises PublishError: Redis did not take the event, and the route is to tell.
        """
        _refuse_sender(self.name, kwargs)

        if self.is_muted:
            return []

        wrapper = _async_wrapper or _to_sync
        results = []

        # As blinker does it, which looks at what publishes for as long as that takes.
        for receiver in self.receivers_for(sender):
            call = receiver

            if not isinstance(receiver, Outbound) and iscoroutinefunction(receiver):
                call = wrapper(receiver)

            results.append((receiver, call(sender, **kwargs)))

        return results

    async def send_async(
        self,
        sender: Any | None = None,
        /,
        *,
        _sync_wrapper: Callable[[Receiver], Callable[..., Coroutine[Any, Any, Any]]] | None = None,
        **kwargs: Any,
    ) -> list[tuple[Receiver, Any]]:
        """Await the receivers for ``sender`` and publish; what publishes needs no wrapper."""
        _refuse_sender(self.name, kwargs)
        wrapper = _wrap_outbound(_sync_wrapper)
        return await super().send_async(sender, _sync_wrapper=wrapper, **kwargs)


class BusNamespace(Namespace):
    """Makes :class:`BusSignal` objects, and tells when a new one is born."""

    def __init__(self) -> None:
        super().__init__()
        #: Held while a signal is made and told of, so that there is one of each name.
        self.lock = threading.RLock()
        self._watchers: list[WeakMethod[Callable[[NamedSignal], None]]] = []

    def watch(self, watcher: Callable[[NamedSignal], None]) -> None:
        """Call ``watcher``, a method, with each new signal as long as its object lives."""
        self._watchers.append(WeakMethod(watcher))

    def signal(self, name: str, doc: str | None = None) -> NamedSignal:
        """The signal called ``name``, made at the first call.

        :raises ConfigError: the name cannot be part of a Redis key.
        """
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


def local(receivers: Iterable[Receiver]) -> list[Receiver]:
    """Those of ``receivers`` that do not publish."""
    return [receiver for receiver in receivers if not isinstance(receiver, Outbound)]


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


def _refuse_sender(name: str, payload: dict[str, Any]) -> None:
    if "sender" in payload:
        raise PayloadError(
            f"The payload of {name!r} has a key 'sender', which every receiver already gets as "
            "its first argument. Give the value another name."
        )


def _to_sync(receiver: Receiver) -> Receiver:
    def call(sender: Any, **kwargs: Any) -> Any:
        return run_coroutine(receiver(sender, **kwargs))

    return call


def _wrap_outbound(
    wrapper: Callable[[Receiver], Callable[..., Coroutine[Any, Any, Any]]] | None,
) -> Callable[[Receiver], Callable[..., Coroutine[Any, Any, Any]]]:
    def wrap(receiver: Receiver) -> Callable[..., Coroutine[Any, Any, Any]]:
        if isinstance(receiver, Outbound):
            return _to_async(receiver)

        if wrapper is None:
            raise RuntimeError(
                f"send_async() cannot call {receiver!r}, which is no coroutine function. "
                "Pass _sync_wrapper, as blinker asks for."
            )

        return wrapper(receiver)

    return wrap


def _to_async(receiver: Receiver) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def call(sender: Any, **kwargs: Any) -> Any:
        return receiver(sender, **kwargs)

    return call
