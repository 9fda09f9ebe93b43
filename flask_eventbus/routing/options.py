"""Read names of signals and patterns, and the options of signals and receivers."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, get_args

from blinker import NamedSignal, Signal

from ..config import SIGNAL_NAME, Reader
from ..errors import ConfigError
from ..text import did_you_mean
from ..typing import Via

_PATTERN = re.compile(r"[\w./*?-]{1,128}")

_VIAS = get_args(Via)

Receiver = Callable[..., Any]


def check_signal_name(name: object, where: str) -> str:
    """Return ``name`` if it is a valid name of a signal.

    :param where: the setting or call that names it, for the message.
    :raises ConfigError: the name is not valid.
    """
    if isinstance(name, str) and SIGNAL_NAME.fullmatch(name):
        return name

    raise ConfigError(
        f"{where}: {name!r} cannot be a signal's name. Use letters, digits, '_', '-', '.' and "
        "'/', at most 128 of them, beginning with a letter or digit, for example "
        "'user_registered'."
    )


def is_pattern(name: str) -> bool:
    """Return True if ``name`` contains ``*`` or ``?``."""
    return "*" in name or "?" in name


def matches(pattern: str, name: str) -> bool:
    """Return True if ``pattern``, which may be a plain name, matches ``name``."""
    return pattern == name or (is_pattern(pattern) and fnmatchcase(name, pattern))


def load(where: str, path: str) -> Any:
    """Return the object at the import path ``package.module:name``.

    :raises ConfigError: it cannot be imported; chained to the original error.
    """
    module_name, _, attribute = path.partition(":")

    try:
        return attrgetter(attribute)(importlib.import_module(module_name))
    except Exception as error:
        # Any error that the module raises on import is a fault of this setting.
        raise ConfigError(
            f"{where}: {path!r} cannot be imported: {type(error).__name__}: {error}. Write "
            "'package.module:name' of an object that can be imported."
        ) from error


def entries_of(value: Any, where: str) -> Iterable[tuple[Any, Any]]:
    """Return the signals that a setting names, each with its options or ``None``.

    :raises ConfigError: ``value`` is not a name, a list or a mapping.
    """
    if value is None:
        return []

    if isinstance(value, str | Signal):
        return [(value, None)]

    if isinstance(value, Mapping):
        return list(value.items())

    if isinstance(value, Iterable):
        return [(entry, None) for entry in value]

    raise ConfigError(
        f"{where} is {value!r}. Set it to a list of signal names, or to a mapping such as "
        "{'user_registered': 'channel'}."
    )


def read_options(options: Any, readers: Mapping[str, Reader], where: str) -> dict[str, Any]:
    """Return the options of a signal, each checked by its reader; a plain string is its ``via``.

    An option that is ``None`` is left out, so that its default applies.

    :param readers: the options that the signal may have, besides ``via``.
    :raises ConfigError: ``options`` is not a mapping, has an unknown option, or a value is wrong.
    """
    if options is None or isinstance(options, str):
        options = {"via": options}

    if not isinstance(options, Mapping):
        raise ConfigError(
            f"{where} is {options!r}. Write 'channel', or a mapping such as {{'via': 'channel'}}."
        )

    for option in options:
        if option != "via" and option not in readers:
            hint = did_you_mean(str(option), ("via", *readers))
            raise ConfigError(f"{where} has no option {option!r}. {hint}")

    via = options.get("via")

    if via is not None and via not in _VIAS:
        raise ConfigError(
            f"{where} asks for via {via!r}. Use 'channel' (only services that listen now receive "
            "the event) or 'stream' (each service receives it, even if it is down now)."
        )

    return {
        option: value if option == "via" else readers[option](f"{where}[{option!r}]", value)
        for option, value in options.items()
        if value is not None
    }


def read_name(name: Any, where: str, *, pattern: bool) -> str:
    if pattern and isinstance(name, str) and is_pattern(name) and _PATTERN.fullmatch(name):
        return name

    return check_signal_name(name, where)


def read_flag(where: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value

    raise ConfigError(f"{where} is {value!r}. Set it to True or False.")


def shown(entry: Any) -> Any:
    return entry.name if isinstance(entry, NamedSignal) else entry


@dataclass(frozen=True, slots=True)
class ReceiverOptions:
    """The options of one receiver; ``None`` for the defaults of its subscription."""

    #: Number of retries after a failure.
    retries: int | None = None
    #: Seconds after which a coroutine is cancelled.
    timeout: float | None = None

    def check(self, receiver: Receiver, where: str) -> None:
        """Check that the receiver can be cancelled if it has a timeout.

        :raises ConfigError: it has a timeout and is not a coroutine function.
        """
        if self.timeout is not None and not is_coroutine_function(receiver):
            raise ConfigError(
                f"{where}: {receiver!r} has a timeout, and Python cannot interrupt a function that "
                "is not 'async def'. Write it as 'async def', or remove the timeout and set one in "
                "the call that blocks, for example requests.get(..., timeout=5)."
            )


DEFAULTS = ReceiverOptions()


class AllReceiverOptions:
    """The options of all receivers of a bus, by the name or pattern of their connection."""

    def __init__(self) -> None:
        self._by_receiver: dict[object, list[tuple[str, Receiver, ReceiverOptions]]] = {}

    def add(self, name: str, receiver: Receiver, options: ReceiverOptions) -> None:
        """Store the options with which a receiver was connected to ``name``."""
        if options != DEFAULTS:
            known = self._by_receiver.setdefault(_identity(receiver), [])
            known.append((name, receiver, options))

    def find(self, name: str, receiver: Receiver) -> ReceiverOptions:
        """Return the options of a receiver for events of ``name``; the latest, if several match."""
        known = self._by_receiver.get(_identity(receiver), ())
        found = (options for pattern, _, options in reversed(known) if matches(pattern, name))
        return next(found, DEFAULTS)


def name_of(receiver: object) -> str:
    """Return the name of a receiver for logs: ``module.qualname``."""
    try:
        function = inspect.unwrap(receiver) if callable(receiver) else receiver
        function = getattr(function, "__func__", function)
        name = getattr(function, "__qualname__", None)
        return f"{function.__module__}.{name}" if name else repr(receiver)
    except Exception:
        # A receiver may be any object, and its attributes may raise.
        return object.__repr__(receiver)


def read_timeout(where: str, value: object) -> float | None:
    if value is None:
        return None

    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 86_400:
        return float(value)

    raise ConfigError(f"{where} is {value!r}. Set it to a number of seconds, more than 0.")


def is_coroutine_function(receiver: Receiver) -> bool:
    """Return True if a call of ``receiver`` returns a coroutine."""
    call = getattr(receiver, "__call__", None)  # noqa: B004 - the method itself is inspected
    return inspect.iscoroutinefunction(receiver) or inspect.iscoroutinefunction(call)


def _identity(receiver: Receiver) -> object:
    """Return a key that is equal for each access to the same bound method."""
    owner = getattr(receiver, "__self__", None)
    function = getattr(receiver, "__func__", None)
    return id(receiver) if owner is None or function is None else (id(owner), id(function))
