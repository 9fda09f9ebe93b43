"""``app.signal``: declaration, sender and connection point for code that has the app."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from blinker import ANY, NamedSignal

from .errors import ConfigError
from .receivers.dispatcher import name_of
from .routing.registry import Declarations

if TYPE_CHECKING:
    from flask import Flask

F = TypeVar("F", bound=Callable[..., Any])
#: The receivers that were called, and what each returned.
Results = list[tuple[Callable[..., Any], Any]]

_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)


class AppSignal:
    """One signal as an app's code meets it.

    Called with a plain function it declares: the function's parameters become the
    signal's, and the function a receiver. Called with anything else it sends.
    """

    def __init__(self, declarations: Declarations, name: str) -> None:
        self._declarations = declarations
        #: The blinker signal behind it.
        self.signal: NamedSignal = declarations.signal(name)

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
        """Declare with a plain function, or send from ``subject``.

        :raises TypeError: the values do not fit the declared parameters.
        """
        if inspect.isfunction(subject) and not args and not payload:
            return self._declare(subject)

        return self.send(subject, *args, **payload)

    def send(self, sender: Any = None, /, *args: Any, **payload: Any) -> Results:
        """Send; positional values take the names of the declared parameters, in order.

        :return: blinker's list of receivers and what they returned.
        :raises TypeError: the values do not fit the declared parameters.
        """
        return self.signal.send(sender, **self._named(args, payload))

    def connect(self, receiver: F, sender: Any = ANY) -> F:
        """Connect a receiver, strongly: a closure made inside a view stays connected."""
        return self.signal.connect(receiver, sender=sender, weak=False)

    def disconnect(self, receiver: Callable[..., Any], sender: Any = ANY) -> None:
        """Disconnect a receiver."""
        self.signal.disconnect(receiver, sender)

    def _declare(self, receiver: F) -> F:
        signature = inspect.signature(receiver)
        self._check(receiver, signature)
        declared = self._declarations.parameters.setdefault(self.name, _without_sender(signature))
        self._check_fits(receiver, signature, declared)
        return self.connect(receiver)

    def _check(self, receiver: Callable[..., Any], signature: inspect.Signature) -> None:
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
                    f"{name_of(receiver)} declares {shown!r}, which has no name that could "
                    "travel. Give each value a parameter of its own."
                )

    def _check_fits(
        self,
        receiver: Callable[..., Any],
        signature: inspect.Signature,
        declared: inspect.Signature,
    ) -> None:
        names = [
            parameter.name
            for parameter in declared.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]

        try:
            signature.bind(None, **dict.fromkeys(names))
        except TypeError as error:
            raise ConfigError(
                f"{name_of(receiver)} does not accept what {self.name!r} was declared with, "
                f"{declared}: {error}. Give it the same parameters, or let it end with **extra."
            ) from error

    def _named(self, args: tuple[Any, ...], payload: dict[str, Any]) -> dict[str, Any]:
        declared = self._declarations.parameters.get(self.name)

        if declared is None:
            return self._undeclared(args, payload)

        try:
            bound = declared.bind(*args, **payload)
        except TypeError as error:
            raise TypeError(f"{self.name}{declared}: {error}") from None

        bound.apply_defaults()
        return _flat(bound)

    def _undeclared(self, args: tuple[Any, ...], payload: dict[str, Any]) -> dict[str, Any]:
        if args:
            raise TypeError(
                f"{self.name} was sent {len(args)} positional values, but its parameters were "
                f"never declared. Name the values, or declare them with @app.signal({self.name!r})."
            )

        return payload


class AppSignals:
    """What ``app.signal`` is: ``app.signal("name")``, or a bare decorator of a function."""

    def __init__(self, declarations: Declarations) -> None:
        self._declarations = declarations

    @overload
    def __call__(self, signal: str | NamedSignal, /) -> AppSignal: ...

    @overload
    def __call__(self, receiver: F, /) -> F: ...

    def __call__(self, subject: Any, /) -> Any:
        """The signal of a name; or declare one named after a function, less ``signal_``."""
        if isinstance(subject, str):
            return AppSignal(self._declarations, subject)

        if isinstance(subject, NamedSignal):
            return AppSignal(self._declarations, subject.name)

        if not inspect.isfunction(subject):
            raise TypeError(
                f"app.signal() got {subject!r}. Give it a signal's name, or decorate a function."
            )

        name = subject.__name__.removeprefix("signal_")
        return AppSignal(self._declarations, name)(subject)


def _without_sender(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())[1:]
    return inspect.Signature(parameters)


def _flat(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The bound values by name, those of ``**extra`` among them."""
    payload: dict[str, Any] = {}

    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            payload.update(value)
        else:
            payload[name] = value

    return payload
