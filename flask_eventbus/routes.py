"""Which signal travels how: the routes out of a service and its subscriptions."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, TypeVar

from blinker import NamedSignal, Signal

from .config import (
    MOST_REPLICAS,
    MOST_RETRIES,
    Age,
    did_you_mean,
    read_maxlen,
    read_whole,
)
from .errors import ConfigError
from .names import SERVICE_NAME
from .namespace import check_signal_name

#: What makes plain values of a live emission: called as a receiver is. ``None`` from it
#: means that this emission is not published.
Extractor = Callable[..., Mapping[str, Any] | None]

T = TypeVar("T")

_PATTERN = re.compile(r"[\w./*?-]{1,128}")
_IMPORT_PATH = re.compile(r"[\w.]+:[\w.]+")

_ROUTE_OPTIONS = (
    *("via", "signal", "payload", "confirm", "after_commit", "outbox"),
    *("key", "maxlen", "replicas"),
)
_SUBSCRIPTION_OPTIONS = ("via", "from", "echo", "retries", "start", "group")

#: Options that make no sense on a channel.
_STREAM_ONLY = ("key", "maxlen", "replicas")

_VIAS = ("channel", "stream")

#: Where a stream is read from by default: behind its last entry.
NEW = "$"
_ENTRY_ID = re.compile(r"\d{1,20}(-\d{1,20})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A signal bound to a way to travel."""

    #: The name on the wire, or a pattern over the bus's own signals.
    name: str
    via: str = "channel"
    #: The signal, where it is not the bus's own of that name.
    signal: Signal | None = None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A signal's name, or a pattern of names, that a service hears from others."""

    name: str
    #: The services it is heard from; ``None`` for all.
    sources: frozenset[str] | None = None
    #: Whether events come back to where they were emitted: on a channel to the node, on a
    #: stream to the service.
    echo: bool = False
    #: ``"channel"`` or ``"stream"``; ``None`` for both.
    via: str | None = None
    #: How often a receiver that failed is tried again; ``None`` for ``EVENTBUS_RETRIES``.
    retries: int | None = None
    #: Where a stream is read from the first time: ``"$"`` for what comes from then on, or an id.
    start: str = NEW
    #: Whether the workers of the service share the events of a stream; each hears all otherwise.
    group: bool = True

    def hears(self, source: str) -> bool:
        """Whether the service ``source`` is one it is heard from."""
        return self.sources is None or source in self.sources


def is_pattern(name: str) -> bool:
    """Whether ``name`` stands for several signals."""
    return "*" in name or "?" in name


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern``, which may be a plain name, stands for ``name``."""
    return pattern == name or (is_pattern(pattern) and fnmatchcase(name, pattern))


def subscription_for(name: str, subscriptions: Mapping[str, Subscription]) -> Subscription | None:
    """The subscription that handles ``name``: its own, else the first pattern for it.

    Redis delivers once per subscription that fits; one of them is to count.
    """
    if name in subscriptions:
        return subscriptions[name]

    return next((found for found in subscriptions.values() if matches(found.name, name)), None)


def read_routes(value: Any, where: str = "EVENTBUS_PUBLISH") -> dict[str, Route]:
    """Read what a service publishes: a name, a list of them, or a mapping to options.

    :raises ConfigError: an entry is wrong; the message names it.
    """
    routes = {}

    for entry, options in _entries(value, where):
        route = read_route(entry, options, f"{where}[{_shown(entry)!r}]")

        if route.name in routes:
            raise ConfigError(f"{where} names {route.name!r} twice. Keep one of them.")

        routes[route.name] = route

    return routes


def read_route(entry: Any, options: Any, where: str) -> Route:
    """Read one route; ``entry`` is a name, a pattern, a signal or an import path.

    :raises ConfigError: something of it is wrong.
    """
    options = _options(options, _ROUTE_OPTIONS, where)
    signal = _read_signal(options.get("signal"), f"{where}['signal']")

    if isinstance(entry, Signal):
        signal, entry = entry, _name_of(entry, where)
    elif isinstance(entry, str) and _IMPORT_PATH.fullmatch(entry):
        signal = _read_signal(entry, where)
        entry = _name_of(signal, where)

    via = _read_via(options.get("via"), where) or "channel"
    _refuse_stream_options(options, via, where)

    return Route(
        name=_read_name(entry, where, pattern=signal is None),
        via=via,
        signal=signal,
        payload=_read_payload(options.get("payload"), where),
        confirm=_read_confirm(options, via, where),
        key=_read_key(options.get("key"), f"{where}['key']"),
        maxlen=_read_optional(read_maxlen, options, "maxlen", where),
        replicas=_read_optional(_read_replicas, options, "replicas", where),
        after_commit=_read_database_flag(options.get("after_commit"), f"{where}['after_commit']"),
        outbox=_read_outbox(options, where),
    )


def read_subscriptions(value: Any, where: str = "EVENTBUS_SUBSCRIBE") -> dict[str, Subscription]:
    """Read what a service hears: a name, a list of them, or a mapping to options.

    :raises ConfigError: an entry is wrong; the message names it.
    """
    subscriptions = {}

    for entry, options in _entries(value, where):
        name = entry.name if isinstance(entry, NamedSignal) else entry
        subscription = read_subscription(name, options, f"{where}[{_shown(entry)!r}]")
        subscriptions[subscription.name] = subscription

    return subscriptions


def read_subscription(name: Any, options: Any, where: str) -> Subscription:
    """Read one subscription.

    :raises ConfigError: something of it is wrong.
    """
    options = _options(options, _SUBSCRIPTION_OPTIONS, where)
    via = _read_via(options.get("via"), where)
    _refuse_stream_subscription(options, via, where)

    return Subscription(
        name=_read_name(name, where, pattern=True),
        sources=_read_sources(options.get("from"), f"{where}['from']"),
        echo=_read_flag(options.get("echo"), f"{where}['echo']"),
        via=via,
        retries=_read_optional(read_retries, options, "retries", where),
        start=_read_start(options.get("start"), f"{where}['start']"),
        group=_read_group(options, where),
    )


def unite(first: Subscription, second: Subscription, where: str) -> Subscription:
    """Two subscriptions of one service to one name, as the one that serves both.

    :raises ConfigError: one is for the group, and the other for every process.
    """
    if first.group is not second.group:
        raise ConfigError(
            f"{where}: one receiver has 'group': None and another has not. A process reads a "
            "stream in one of the two ways: give both of them the same."
        )

    return replace(
        second,
        echo=first.echo or second.echo,
        via=first.via if first.via == second.via else None,
        start=first.start if second.start == NEW else second.start,
        retries=first.retries if second.retries is None else second.retries,
    )


def load(path: str, where: str) -> Any:
    """The object at the import path ``package.module:name``.

    :raises ConfigError: it cannot be imported; chained to the reason.
    """
    module_name, _, attribute = path.partition(":")

    try:
        found: Any = importlib.import_module(module_name)

        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        # The module's own errors as well: whatever it raises, this setting asked for it.
        raise ConfigError(
            f"{where}: {path!r} cannot be imported: {type(error).__name__}: {error}. Write "
            "'package.module:name' of something that can."
        ) from error

    return found


def _entries(value: Any, where: str) -> Iterable[tuple[Any, Any]]:
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


def _options(options: Any, known: tuple[str, ...], where: str) -> Mapping[str, Any]:
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


def _read_via(via: Any, where: str) -> str | None:
    if via is None or via in _VIAS:
        return via  # type: ignore[no-any-return]  # one of the two words

    raise ConfigError(
        f"{where} asks for via {via!r}. Use 'channel' (whoever listens now hears the event) or "
        "'stream' (each service hears it once, also when it is down now)."
    )


def _refuse_stream_options(options: Mapping[str, Any], via: str, where: str) -> None:
    for option in _STREAM_ONLY:
        if via == "channel" and options.get(option) is not None:
            raise ConfigError(
                f"{where}[{option!r}] belongs to streams, and this route goes via 'channel'. Add "
                "'via': 'stream', or remove the option."
            )


def _refuse_stream_subscription(options: Mapping[str, Any], via: str | None, where: str) -> None:
    given = [option for option in ("retries", "start") if options.get(option) is not None]
    given += ["group"] if options.get("group", True) is None else []

    if via == "channel" and given:
        raise ConfigError(
            f"{where}[{given[0]!r}] belongs to streams, and this subscription hears the channel "
            "alone. Take 'via' off, or remove the option."
        )


def _read_confirm(options: Mapping[str, Any], via: str, where: str) -> bool:
    value = options.get("confirm")

    # What is confirmed is never lost: on a stream that is the point of it.
    if value is None:
        return via == "stream" and not options.get("outbox")

    return _read_flag(value, f"{where}['confirm']")


def _read_key(value: Any, where: str) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value

    raise ConfigError(
        f"{where} is {value!r}. Set it to the name of a payload key, for example 'user_id': events "
        "with the same value of it keep their order."
    )


def _read_optional(
    read: Callable[[str, Any], T], options: Mapping[str, Any], option: str, where: str
) -> T | None:
    value = options.get(option)
    return None if value is None else read(f"{where}[{option!r}]", value)


def _read_replicas(key: str, value: Any) -> int:
    return read_whole(key, value, 0, MOST_REPLICAS)


def read_retries(key: str, value: Any) -> int:
    """How often a receiver that failed is tried again.

    :raises ConfigError: it is no whole number from 0.
    """
    return read_whole(key, value, 0, MOST_RETRIES)


def _read_start(value: Any, where: str) -> str:
    words = {None: NEW, "new": NEW, "earliest": "0"}

    if isinstance(value, datetime) and value.tzinfo is not None:
        return f"{max(0, int(value.timestamp() * 1000))}-0"

    if isinstance(value, str | None) and value in words:
        return words[value]

    if isinstance(value, str) and _is_entry_id(value):
        return value

    raise ConfigError(
        f"{where} is {value!r}. Set it to 'new', 'earliest', the id of an entry such as "
        "'1700000000000-0', or an aware datetime. It counts only when the service subscribes for "
        "the first time."
    )


def _is_entry_id(value: str) -> bool:
    is_one = _ENTRY_ID.fullmatch(value) is not None
    return is_one and all(int(part) < 2**64 for part in value.split("-"))


def _read_group(options: Mapping[str, Any], where: str) -> bool:
    if "group" not in options or options["group"] is True:
        return True

    if options["group"] is not None:
        raise ConfigError(
            f"{where}['group'] is {options['group']!r}. The group is the service, so leave it out; "
            "or set it to None, so that every process of the service hears every event."
        )

    if options.get("retries") is not None:
        raise ConfigError(
            f"{where} has both 'group': None and 'retries'. Remove one: without a group nothing "
            "is kept for a receiver that failed."
        )

    return False


def _read_name(name: Any, where: str, *, pattern: bool) -> str:
    if pattern and isinstance(name, str) and is_pattern(name) and _PATTERN.fullmatch(name):
        return name

    return check_signal_name(name, where)


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


def _read_flag(value: Any, where: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)

    raise ConfigError(f"{where} is {value!r}. Set it to True or False.")


def _read_database_flag(value: Any, where: str) -> bool:
    flag = _read_flag(value, where)

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


def _read_sources(value: Any, where: str) -> frozenset[str] | None:
    if value is None:
        return None

    names = [value] if isinstance(value, str) else value

    if isinstance(names, Iterable) and not isinstance(names, bytes | Mapping):
        names = list(names)

        if names and all(isinstance(name, str) and SERVICE_NAME.fullmatch(name) for name in names):
            return frozenset(names)

    raise ConfigError(
        f"{where} is {value!r}. Set it to a list of services' names, for example ['accounts']."
    )


def _shown(entry: Any) -> Any:
    return entry.name if isinstance(entry, NamedSignal) else entry
