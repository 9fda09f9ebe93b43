"""Read names of signals, patterns and the options that routes and subscriptions share."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast, get_args

from blinker import NamedSignal, Signal

from ..config import SIGNAL_NAME
from ..errors import ConfigError
from ..text import did_you_mean
from ..typing import Via

T = TypeVar("T")

_PATTERN = re.compile(r"[\w./*?-]{1,128}")

_VIAS = get_args(Via)


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


def load(path: str, where: str) -> Any:
    """Return the object at the import path ``package.module:name``.

    :raises ConfigError: it cannot be imported; chained to the original error.
    """
    module_name, _, attribute = path.partition(":")

    try:
        found: Any = importlib.import_module(module_name)

        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        # Any error that the module raises on import is a fault of this setting.
        raise ConfigError(
            f"{where}: {path!r} cannot be imported: {type(error).__name__}: {error}. Write "
            "'package.module:name' of an object that can be imported."
        ) from error

    return found


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


def options_of(options: Any, known: tuple[str, ...], where: str) -> Mapping[str, Any]:
    """Return the options of a signal as a mapping; a plain string is its ``via``.

    :raises ConfigError: ``options`` is not a mapping, or has an unknown option.
    """
    if options is None:
        return {}

    if isinstance(options, str):
        return {"via": options}

    if not isinstance(options, Mapping):
        raise ConfigError(
            f"{where} is {options!r}. Write 'channel', or a mapping such as {{'via': 'channel'}}."
        )

    for option in options:
        _check_option(option, known, where)

    return options


def _check_option(option: Any, known: tuple[str, ...], where: str) -> None:
    if option in known:
        return

    raise ConfigError(f"{where} has no option {option!r}. {did_you_mean(str(option), known)}")


def read_via(via: Any, where: str) -> Via | None:
    if via is None or via in _VIAS:
        return cast(Via | None, via)

    raise ConfigError(
        f"{where} asks for via {via!r}. Use 'channel' (only services that listen now receive the "
        "event) or 'stream' (each service receives it, even if it is down now)."
    )


def read_optional(
    read: Callable[[str, Any], T], options: Mapping[str, Any], option: str, where: str
) -> T | None:
    value = options.get(option)
    return None if value is None else read(f"{where}[{option!r}]", value)


def read_name(name: Any, where: str, *, pattern: bool) -> str:
    if pattern and isinstance(name, str) and is_pattern(name) and _PATTERN.fullmatch(name):
        return name

    return check_signal_name(name, where)


def read_flag(value: Any, where: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)

    raise ConfigError(f"{where} is {value!r}. Set it to True or False.")


def shown(entry: Any) -> Any:
    return entry.name if isinstance(entry, NamedSignal) else entry
