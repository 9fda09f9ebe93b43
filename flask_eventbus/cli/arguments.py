"""Parse command line arguments: names, ``KEY=VALUE`` pairs, JSON, times and ages."""

from __future__ import annotations

import json
import sys
from reprlib import repr as short
from typing import Any

import click

from ..admin.places import Place, read_age, read_place
from ..errors import ConfigError
from ..routing.options import check_signal_name
from ..routing.subscriptions import read_subscription
from ..text import read_value


def read_name(ctx: click.Context, param: click.Parameter, name: str) -> str:
    """Return a signal's name.

    :raises click.BadParameter: the name is not valid.
    """
    try:
        return check_signal_name(name, "NAME")
    except ConfigError as error:
        raise click.BadParameter(str(error).removeprefix("NAME: ")) from error


def read_names(
    ctx: click.Context, param: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Return names and patterns of signals, without duplicates; ``*`` if none is given.

    :raises click.BadParameter: a name is not valid.
    """
    for name in names:
        try:
            read_subscription(name, None, "NAME")
        except ConfigError as error:
            raise click.BadParameter(str(error).removeprefix("NAME: ")) from error

    return tuple(dict.fromkeys(names)) or ("*",)


def read_moment(ctx: click.Context, param: click.Parameter, text: str | None) -> Place | None:
    """Return a place in a stream: an entry, a time or an age.

    :raises click.BadParameter: the text is none of these.
    """
    try:
        return None if text is None else read_place(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def read_span(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Return an age such as ``7d`` in milliseconds.

    :raises click.BadParameter: the text is not an age.
    """
    try:
        return None if text is None else read_age(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def read_pairs(
    ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Return each ``KEY=VALUE`` as a key and the text after ``=``.

    :raises click.BadParameter: a text has no key or no ``=``.
    """
    return tuple(_pair(text) for text in texts)


def read_payload(ctx: click.Context, param: click.Parameter, text: str | None) -> dict[str, Any]:
    """Return a JSON object; ``-`` reads it from stdin.

    :raises click.BadParameter: the text is not a JSON object.
    """
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

    raise click.BadParameter(
        f"{short(text)} is not a JSON object. Write for example '{{\"a\": 1}}'."
    )


def values_of(pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Return the payload that pairs of keys and texts stand for.

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

    raise click.BadParameter(f"{text!r} is not KEY=VALUE. Write for example 'user_id=7'.")
