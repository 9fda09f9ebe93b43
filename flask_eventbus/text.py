"""Format values as text for people, and parse values from text."""

from __future__ import annotations

import base64
import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, date, datetime, time
from typing import Any

_AGE = re.compile(r"(\d{1,6})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def printable(text: str, most: int | None = None) -> str:
    """Return the text with every non-printable character escaped, such as terminal controls.

    :param most: number of characters to keep; a longer text is cut, and its length appended.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}... ({len(text)} characters)"

    if text.isprintable():
        return text

    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def reason_of(error: object) -> str:
    """Return the text of an error in one line without a full stop, to end a sentence with."""
    # redis-py appends the arguments of an unknown command.
    text, _, _ = str(error).partition(", with args beginning with")
    return printable(" ".join(text.split()).rstrip("."))


def counted(number: int, what: str) -> str:
    """Return a number with its noun: ``1 event``, ``2 events``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def clock(milliseconds: int) -> str:
    """Return milliseconds since 1970 as local time, to the second."""
    moment = _utc(milliseconds)
    return f"{milliseconds} ms" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def iso(milliseconds: int) -> str | None:
    """Return milliseconds since 1970 in ISO 8601, in UTC; ``None`` for 0."""
    moment = _utc(milliseconds) if milliseconds else None
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def _utc(milliseconds: int) -> datetime | None:
    try:
        moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
        # Raises if local time cannot represent it.
        return moment.astimezone().astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        # An id may be any number, if a program chose it.
        return None


def did_you_mean(word: str, known: Sequence[str], *, prefix: str = "") -> str:
    """Return ``Did you mean 'x'?`` for the most similar known word, else a list of all words.

    :param prefix: the common prefix of all words, which is ignored in the comparison.
    """
    rests = [name.removeprefix(prefix) for name in known]
    close = difflib.get_close_matches(word.upper().removeprefix(prefix), rests, n=1)
    close = close or difflib.get_close_matches(word.removeprefix(prefix), rests, n=1)

    if close:
        return f"Did you mean {prefix + close[0]!r}?"

    return f"Known are: {', '.join(sorted(known))}."


def plain(value: Any) -> Any:
    """Return a value that JSON can represent: bytes as base64, dataclasses as objects."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}

    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))

    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]

    if isinstance(value, set | frozenset):
        return [plain(inner) for inner in sorted(value, key=repr)]

    return _plain_scalar(value)


def read_value(text: str) -> Any:
    """Parse a value of a command line.

    A JSON number, ``true``, ``false``, ``null``, list or object is parsed. Anything else is
    returned as text, including a quoted JSON string and ``NaN``.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        return text

    return text if isinstance(value, str) else value


def seconds_of(age: str) -> int | None:
    """Return the seconds of an age such as ``"7d"`` or ``"12h"``; ``None`` if it is none."""
    found = _AGE.fullmatch(age)
    return int(found[1]) * _SECONDS[found[2]] if found else None


def _plain_scalar(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)

    if value is None or isinstance(value, str | int | float):
        return value

    if isinstance(value, bytes):
        return base64.b64encode(value).decode()

    return value.isoformat() if isinstance(value, date | time) else str(value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
