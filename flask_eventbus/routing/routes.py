"""What a service publishes, and how each signal travels: its routes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from blinker import NamedSignal, Signal

from ..config import MOST_REPLICAS, Age, read_maxlen, read_whole
from ..errors import ConfigError
from ..typing import Extractor, PublishOptions, Via
from .flask_signals import payload_of
from .options import (
    entries_of,
    load,
    matches,
    options_of,
    read_flag,
    read_name,
    read_optional,
    read_via,
    shown,
)

_IMPORT_PATH = re.compile(r"[\w.]+:[\w.]+")

_ROUTE_OPTIONS = tuple(PublishOptions.__annotations__)

#: Options that make no sense on a channel.
_STREAM_ONLY = ("key", "maxlen", "replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A signal bound to a way to travel."""

    #: The name on the wire, or a pattern over the bus's own signals.
    name: str
    via: Via = "channel"
    #: The signal, where it is not the bus's own of that name.
    signal: Signal | None = None
    #: What makes the payload; for Flask's own signals there is one where none is given.
    payload: Extractor | None = None
    #: Whether ``send()`` waits until Redis has the event; on a stream, unless told otherwise.
    confirm: bool = False
    #: Whether an event sent inside a database transaction waits for its commit.
    after_commit: bool = False
    #: Whether an event is written to the database, and published by a relay.
    outbox: bool = False
    #: The key of the payload whose value keeps events in order among each other; streams only.
    key: str | None = None
    #: How much the stream keeps; ``None`` for ``EVENTBUS_MAXLEN``.
    maxlen: int | Age | None = None
    #: Replicas that are waited for; ``None`` for ``EVENTBUS_REPLICAS``.
    replicas: int | None = None

    def covers(self, name: str) -> bool:
        """Whether this route carries the bus's own signal ``name``."""
        return self.signal is None and matches(self.name, name)


def read_routes(value: Any, where: str = "EVENTBUS_PUBLISH") -> dict[str, Route]:
    """Read what a service publishes: a name, a list of them, or a mapping to options.

    :raises ConfigError: an entry is wrong; the message names it.
    """
    routes = {}

    for entry, options in entries_of(value, where):
        route = read_route(entry, options, f"{where}[{shown(entry)!r}]")

        if route.name in routes:
            raise ConfigError(f"{where} names {route.name!r} twice. Keep one of them.")

        routes[route.name] = route

    return routes


def read_route(entry: Any, options: Any, where: str) -> Route:
    """Read one route; ``entry`` is a name, a pattern, a signal or an import path.

    :raises ConfigError: something of it is wrong.
    """
    options = options_of(options, _ROUTE_OPTIONS, where)
    signal = _read_signal(options.get("signal"), f"{where}['signal']")

    if isinstance(entry, Signal):
        signal, entry = entry, _name_of(entry, where)
    elif isinstance(entry, str) and _IMPORT_PATH.fullmatch(entry):
        signal = _read_signal(entry, where)
        entry = _name_of(signal, where)

    via = read_via(options.get("via"), where) or "channel"
    _refuse_stream_options(options, via, where)

    return Route(
        name=read_name(entry, where, pattern=signal is None),
        via=via,
        signal=signal,
        payload=_read_payload(options.get("payload"), where) or payload_of(signal),
        confirm=_read_confirm(options, via, where),
        key=_read_key(options.get("key"), f"{where}['key']"),
        maxlen=read_optional(read_maxlen, options, "maxlen", where),
        replicas=read_optional(_read_replicas, options, "replicas", where),
        after_commit=_read_database_flag(options.get("after_commit"), f"{where}['after_commit']"),
        outbox=_read_outbox(options, where),
    )


def _refuse_stream_options(options: Mapping[str, Any], via: str, where: str) -> None:
    for option in _STREAM_ONLY:
        if via == "channel" and options.get(option) is not None:
            raise ConfigError(
                f"{where}[{option!r}] belongs to streams, and this route goes via 'channel'. Add "
                "'via': 'stream', or remove the option."
            )


def _read_confirm(options: Mapping[str, Any], via: str, where: str) -> bool:
    value = options.get("confirm")

    if value is False and options.get("replicas"):
        raise ConfigError(
            f"{where} has 'confirm' False and 'replicas' {options['replicas']!r}: nobody would "
            "wait for the replicas. Take one of the two off."
        )

    # What is confirmed is never lost: on a stream that is the point of it.
    if value is None:
        return via == "stream" and not options.get("outbox")

    return read_flag(value, f"{where}['confirm']")


def _read_key(value: Any, where: str) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value

    raise ConfigError(
        f"{where} is {value!r}. Set it to the name of a payload key, for example 'user_id': events "
        "with the same value of it keep their order."
    )


def _read_replicas(key: str, value: Any) -> int:
    return read_whole(key, value, 0, MOST_REPLICAS)


def _read_signal(value: Any, where: str) -> Signal | None:
    if isinstance(value, str):
        value = load(value, where)

    if value is None or isinstance(value, Signal):
        return value

    raise ConfigError(
        f"{where} is {value!r}, which is not a blinker signal. Name one by its import path, for "
        "example 'flask:request_finished'."
    )


def _name_of(signal: Signal | None, where: str) -> str:
    if isinstance(signal, NamedSignal):
        return signal.name

    raise ConfigError(
        f"{where}: {signal!r} has no name to travel under. Write "
        "{'a_name': {'signal': ...}} instead."
    )


def _read_payload(value: Any, where: str) -> Extractor | None:
    if isinstance(value, str):
        value = load(value, f"{where}['payload']")

    if value is None or callable(value):
        return value  # type: ignore[no-any-return]  # whatever is callable may be one

    raise ConfigError(
        f"{where}['payload'] is {value!r}. Set it to a function, or to its import path, that "
        "returns the payload as a mapping."
    )


def _read_database_flag(value: Any, where: str) -> bool:
    flag = read_flag(value, where)

    if flag and find_spec("sqlalchemy") is None:
        raise ConfigError(
            f"{where} needs SQLAlchemy, which is not installed. Install it with: "
            "pip install 'sqlalchemy>=2.0'"
        )

    return flag


def _read_outbox(options: Mapping[str, Any], where: str) -> bool:
    outbox = _read_database_flag(options.get("outbox"), f"{where}['outbox']")

    if outbox and options.get("confirm"):
        raise ConfigError(
            f"{where} has both 'outbox' and 'confirm'. Remove 'confirm': send() does not reach "
            "Redis there, and the relay always waits for it."
        )

    return outbox
