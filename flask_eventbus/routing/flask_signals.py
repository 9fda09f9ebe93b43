"""Payloads of Flask's own signals, whose live objects cannot be encoded.

This module does not import Flask: a program that names one of Flask's signals has loaded it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from blinker import Signal

Payload = Callable[..., Mapping[str, Any]]


def payload_of(signal: Signal | None) -> Payload | None:
    """Return the payload function of a signal of Flask; ``None`` for any other signal."""
    flask_signals = sys.modules.get("flask.signals")

    if signal is None or flask_signals is None:
        return None

    return next(
        (make for name, make in _PAYLOADS.items() if getattr(flask_signals, name, None) is signal),
        None,
    )


def is_built_in(payload: object) -> bool:
    """Return True if ``payload`` is a payload function of this module."""
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


_PAYLOADS: dict[str, Payload] = {
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
