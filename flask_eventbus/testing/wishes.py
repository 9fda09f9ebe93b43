"""Checks what a test asks of the kit, and says what it may have meant instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blinker import NamedSignal

from ..codec.codec import Codec
from ..errors import DecodeError
from ..event import Event


def check_attributes(event: Event) -> None:
    """Refuse attributes that cannot travel: most likely they are meant for the payload."""
    try:
        plain = Codec()
        plain.decode(plain.encode(replace(event, payload={})))
    except (AttributeError, TypeError, DecodeError) as error:
        raise TypeError(
            f"deliver() cannot make an event of this: {error} 'id', 'time', 'hops' and the like "
            "are the event's own. Payload keys of these names go into payload={...}."
        ) from error


def check_via(via: str, method: str) -> None:
    """Refuse a way that there is not."""
    __tracebackhide__ = True

    if via not in ("channel", "stream"):
        raise TypeError(
            f"{method}() cannot tell an event via {via!r}: give 'channel' or 'stream'. A payload "
            "key of this name goes into payload={...}."
        )


def check_retry(retry: bool, via: str | None) -> None:
    """Refuse what is no wish to try again, or one that cannot be met."""
    __tracebackhide__ = True

    if not isinstance(retry, bool):
        raise TypeError(
            f"deliver(retry={retry!r}) is neither True nor False. A payload key of this name goes "
            "into payload={...}."
        )

    if retry and via not in (None, "stream"):
        raise TypeError(
            f"deliver(via={via!r}, retry=True) cannot be: only what came over a stream is tried "
            "again. Take one of them away."
        )


def name_of(signal: str | NamedSignal) -> str:
    """The name that a test means."""
    return signal.name if isinstance(signal, NamedSignal) else signal


def merge(payload: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> dict[str, Any]:
    """A payload that was given in two parts."""
    return {**(payload or {}), **keys}
