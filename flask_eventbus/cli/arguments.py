"""Reads what is written on a command line: names, key=value pairs, JSON."""

from __future__ import annotations

import json
import sys
from reprlib import repr as short
from typing import Any

import click

from ..admin.places import Place, read_age, read_place
from ..errors import ConfigError
from ..routing.bus_signal import check_signal_name
from ..routing.subscriptions import read_subscription
from ..text import read_value


def read_name(ctx: click.Context, param: click.Parameter, name: str) -> str:
    """A signal's name."""
    try:
        return check_signal_name(name, "NAME")
    except ConfigError as error:
        raise click.BadParameter(str(error).removeprefix("NAME: ")) from error


def read_names(
    ctx: click.Context, param: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Signals' names and patterns; all signals where none is given."""
    for name in names:
        try:
            read_subscription(name, None, "NAME")
        except ConfigError as error:
            raise click.BadParameter(str(error).removeprefix("NAME: ")) from error

    return tuple(dict.fromkeys(names)) or ("*",)


def read_moment(ctx: click.Context, param: click.Parameter, text: str | None) -> Place | None:
    """Return a place in a stream."""
    try:
        return None if text is None else read_place(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def read_span(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Return the milliseconds of an age that is written as ``7d``."""
    try:
        return None if text is None else read_age(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def read_pairs(
    ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Keys and what stands behind their ``=``, as it is written."""
    return tuple(_pair(text) for text in texts)


def read_payload(ctx: click.Context, param: click.Parameter, text: str | None) -> dict[str, Any]:
    """A JSON object, from stdin where ``-`` is written."""
    if text is None:
        return {}

    if text == "-":
        text = sys.stdin.read()

    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{short(text)} is not JSON: {error}.") from error

    if isinstance(value, dict):
        return value

    raise click.BadParameter(f"{short(text)} is no JSON object. Write for example '{{\"a\": 1}}'.")


def values_of(pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The values that pairs stand for.

    :raises click.UsageError: a key is given twice.
    """
    values: dict[str, Any] = {}

    for key, text in pairs:
        if key in values:
            raise click.UsageError(f"{key!r} is given twice. Write one list: '{key}=[1, 2]'.")

        values[key] = read_value(text)

    return values


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")

    if key and equals:
        return key, value

    raise click.BadParameter(f"{text!r} is no KEY=VALUE. Write for example 'user_id=7'.")
