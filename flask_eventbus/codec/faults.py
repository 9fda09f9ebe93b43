"""Find the value in a payload that cannot be encoded. Used only after encoding failed."""

from __future__ import annotations

from collections.abc import Iterator
from reprlib import repr as short
from typing import Any

from .values import MAX_DEPTH, MAX_ITEMS, UnfitError, Values, check

_CONTAINERS = (dict, list, tuple, set, frozenset)


def find_fault(values: Values, payload: dict[Any, Any], error: Exception) -> str:
    """Return the path of the first value that cannot be encoded, the reason and the remedy.

    :param error: the error of the encoding, used if no single value is at fault.
    """
    faults = _faults(values, "payload", payload, ())
    return next(faults, f"payload: {_describe(payload, error)}")


def _faults(values: Values, path: str, value: Any, above: tuple[int, ...]) -> Iterator[str]:
    if id(value) in above:
        yield f"{path}: {_kind(value)} contains itself. Send an id instead of the reference."
        return

    try:
        plain = values.to_plain(value)
    except Exception as error:
        yield f"{path}: {_describe(value, error)}"
        return

    if type(plain) in _CONTAINERS:
        yield from _container_faults(values, path, plain, (*above, id(value)))
    else:
        yield from _packing_faults(values, path, plain)


def _container_faults(
    values: Values, path: str, container: Any, above: tuple[int, ...]
) -> Iterator[str]:
    if len(above) > MAX_DEPTH:
        yield f"{path}: nested deeper than {MAX_DEPTH} levels. Send a flatter payload."
        return
    if len(container) > MAX_ITEMS:
        yield (
            f"{path}: {len(container)} items, and a {_kind(container)} can have {MAX_ITEMS}. "
            "Send them in several events, or a reference to them."
        )
        return

    if isinstance(container, dict):
        yield from _key_faults(path, container)
    for step, inner in _steps(container):
        yield from _faults(values, path + step, inner, above)
    if isinstance(container, set | frozenset):
        yield from _packing_faults(values, path, container)


def _key_faults(path: str, container: dict[Any, Any]) -> Iterator[str]:
    for key in container:
        if not isinstance(key, str):
            yield (
                f"{path}: the key {short(key)} is of type {_kind(key)}, and keys must be strings. "
                "Convert it with str()."
            )
        elif not _is_unicode(key):
            yield f"{path}: the key {short(key)} {_SURROGATE}"


def _steps(container: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(container, dict):
        return ((_key_step(key), value) for key, value in container.items())
    if isinstance(container, set | frozenset):
        return (("[member]", value) for value in container)

    return ((f"[{index}]", value) for index, value in enumerate(container))


def _key_step(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{short(key)}]"


def _packing_faults(values: Values, path: str, value: Any) -> Iterator[str]:
    try:
        check({"value": values.unpack(values.pack(value))})
    except Exception as error:
        yield f"{path}: {_describe(value, error)}"


_SURROGATE = (
    "holds a lone surrogate, which no other program can read. "
    "Decode the text without 'surrogateescape', or send bytes."
)


def _describe(value: Any, error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"the text {short(value)} {_SURROGATE}"
    if isinstance(error, UnfitError):
        return str(error)

    return f"{_kind(value)} cannot be encoded: {type(error).__name__}: {error}"


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _kind(value: Any) -> str:
    return type(value).__name__
