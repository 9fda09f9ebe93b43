"""Routes: which signals a service publishes, and with which options."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from blinker import NamedSignal, Signal

from ..config import MAX_REPLICAS, Age, Reader, read_maxlen, read_whole
from ..errors import ConfigError
from ..typing import Extractor, Via
from .options import (
    entries_of,
    load,
    matches,
    read_flag,
    read_name,
    read_options,
    shown,
)

_IMPORT_PATH = re.compile(r"[\w.]+:[\w.]+")

#: Options that only a stream supports.
_STREAM_ONLY = ("key", "maxlen", "replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A published signal, and how it is published."""

    #: The name on the wire, or a pattern that matches signals of the bus.
    name: str
    via: Via = "channel"
    #: The signal, unless it is the bus's own signal of this name.
    signal: Signal | None = None
    #: Returns the payload; Flask's own signals have a default.
    payload: Extractor | None = None
    #: True if ``send()`` waits until Redis has the event; the default on a stream.
    confirm: bool = False
    #: True if an event sent inside a database transaction waits for its commit.
    after_commit: bool = False
    #: True if an event is written to the database, and published by a relay.
    outbox: bool = False
    #: The payload key whose value orders events: equal values are handled in order. Streams only.
    key: str | None = None
    #: Number of entries, or their age, that the stream keeps; ``None`` for ``EVENTBUS_MAXLEN``.
    maxlen: int | Age | None = None
    #: Number of replicas that must confirm an event; ``None`` for ``EVENTBUS_REPLICAS``.
    replicas: int | None = None

    def covers(self, name: str) -> bool:
        """Return True if this route publishes the bus's own signal ``name``."""
        return self.signal is None and matches(self.name, name)


def read_routes(value: Any, where: str = "EVENTBUS_PUBLISH") -> dict[str, Route]:
    """Read the routes of a setting: a name, a list of names, or a mapping of names to options.

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

    :raises ConfigError: the entry or an option is wrong.
    """
    found = read_options(options, _READERS, where)

    if isinstance(entry, str) and _IMPORT_PATH.fullmatch(entry):
        entry = _read_signal(where, entry)

    if isinstance(entry, Signal):
        found["signal"] = signal = entry

        if not isinstance(signal, NamedSignal):
            raise ConfigError(
                f"{where}: {signal!r} has no name. Write {{'a_name': {{'signal': ...}}}} instead."
            )

        entry = signal.name

    _check_together(found, where)
    is_stream = found.get("via") == "stream"
    defaults = {
        # Streams are for events that must not be lost, so they are confirmed by default.
        "confirm": is_stream and not found.get("outbox"),
        "payload": _payload_of(found.get("signal")),
    }
    name = read_name(entry, where, pattern="signal" not in found)
    return Route(name=name, **{**defaults, **found})


def _check_together(options: Mapping[str, Any], where: str) -> None:
    """Check that the options of a route do not contradict each other."""
    for option in _STREAM_ONLY:
        if option in options and options.get("via") != "stream":
            raise ConfigError(
                f"{where}[{option!r}] belongs to streams, and this route goes via 'channel'. Add "
                "'via': 'stream', or remove the option."
            )

    if options.get("confirm") is False and options.get("replicas"):
        raise ConfigError(
            f"{where} has 'confirm' False and 'replicas' {options['replicas']!r}: send() would "
            "not wait for the replicas. Remove one of the two."
        )

    if options.get("outbox") and options.get("confirm"):
        raise ConfigError(
            f"{where} has both 'outbox' and 'confirm'. Remove 'confirm': send() does not reach "
            "Redis there, and the relay always waits for it."
        )


def _read_key(where: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value

    raise ConfigError(
        f"{where} is {value!r}. Set it to the name of a payload key, for example 'user_id': events "
        "with the same value of it keep their order."
    )


def _read_signal(where: str, value: Any) -> Signal:
    if isinstance(value, str):
        value = load(where, value)

    if isinstance(value, Signal):
        return value

    raise ConfigError(
        f"{where} is {value!r}, which is not a blinker signal. Name one by its import path, for "
        "example 'flask:request_finished'."
    )


def _read_payload(where: str, value: Any) -> Extractor:
    if isinstance(value, str):
        value = load(where, value)

    if callable(value):
        return value  # type: ignore[no-any-return]  # any callable may be one

    raise ConfigError(
        f"{where} is {value!r}. Set it to a function, or to its import path, that returns the "
        "payload as a mapping."
    )


def _read_database_flag(where: str, value: Any) -> bool:
    flag = read_flag(where, value)

    if flag and find_spec("sqlalchemy") is None:
        raise ConfigError(
            f"{where} needs SQLAlchemy, which is not installed. Install it with: "
            "pip install 'sqlalchemy>=2.0'"
        )

    return flag


def _payload_of(signal: Signal | None) -> Extractor | None:
    """Return the payload function of a signal of Flask; ``None`` for any other signal.

    The live objects of Flask's own signals cannot be encoded. This does not import Flask: a
    program that names one of its signals has loaded it.
    """
    flask_signals = sys.modules.get("flask.signals")

    if signal is None or flask_signals is None:
        return None

    return next(
        (make for name, make in _PAYLOADS.items() if getattr(flask_signals, name, None) is signal),
        None,
    )


def is_built_in(payload: object) -> bool:
    """Return True if ``payload`` is the payload function of a signal of Flask."""
    return payload in _PAYLOADS.values()


def _request_started(sender: Any, **extra: Any) -> dict[str, Any]:
    return _request()


def _request_finished(sender: Any, *, response: Any, **extra: Any) -> dict[str, Any]:
    return {**_request(), "status": response.status_code}


def _got_request_exception(sender: Any, *, exception: Any, **extra: Any) -> dict[str, Any]:
    return {**_request(), "exception": _type_of(exception)}


def _request_tearing_down(sender: Any, *, exc: Any = None, **extra: Any) -> dict[str, Any]:
    return {**_request(), "exception": _type_of(exc)}


def _appcontext_tearing_down(sender: Any, *, exc: Any = None, **extra: Any) -> dict[str, Any]:
    return {"exception": _type_of(exc)}


def _appcontext(sender: Any, **extra: Any) -> dict[str, Any]:
    return {}


def _template(sender: Any, *, template: Any, **extra: Any) -> dict[str, Any]:
    return {**_request(), "template": template.name}


def _message_flashed(sender: Any, *, message: Any, category: Any, **extra: Any) -> dict[str, Any]:
    return {**_request(), "message": str(message), "category": str(category)}


def _request() -> dict[str, Any]:
    """Return the current request, without values that a client chose, such as its path."""
    flask = sys.modules["flask"]

    if not flask.has_request_context():
        return {"method": None, "rule": None, "endpoint": None}

    request = flask.request
    rule = request.url_rule
    return {
        "method": request.method,
        "rule": None if rule is None else rule.rule,
        "endpoint": request.endpoint,
    }


def _type_of(error: BaseException | None) -> str | None:
    """Return the name of an exception's class as a traceback shows it."""
    if error is None:
        return None

    kind = type(error)
    is_plain = kind.__module__ == "builtins"
    return kind.__qualname__ if is_plain else f"{kind.__module__}.{kind.__qualname__}"


_PAYLOADS: dict[str, Extractor] = {
    "request_started": _request_started,
    "request_finished": _request_finished,
    "got_request_exception": _got_request_exception,
    "request_tearing_down": _request_tearing_down,
    "template_rendered": _template,
    "before_render_template": _template,
    "message_flashed": _message_flashed,
    "appcontext_tearing_down": _appcontext_tearing_down,
    "appcontext_pushed": _appcontext,
    "appcontext_popped": _appcontext,
}


#: The options of a route, besides ``via``, each with the function that checks its value.
_READERS: dict[str, Reader] = {
    "signal": _read_signal,
    "payload": _read_payload,
    "confirm": read_flag,
    "after_commit": _read_database_flag,
    "outbox": _read_database_flag,
    "key": _read_key,
    "maxlen": read_maxlen,
    "replicas": partial(read_whole, least=0, most=MAX_REPLICAS),
}
