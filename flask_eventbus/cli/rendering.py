"""Events and tables as text, for people and for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from ..event import Event
from ..text import plain, printable, read_value

#: Characters of one value, and of a whole payload, in a line for people.
MOST_OF_A_VALUE = 60
MOST_OF_A_PAYLOAD = 240

_PLAIN_WORD = re.compile(r"[\w@.,+:/-]+")


def as_line(event: Event) -> str:
    """The event in one line: local time, way, name, source, id, and the payload in short.

    Nothing of it can move a terminal's cursor, whatever the payload holds.
    """
    payload = " ".join(f"{_word(key)}={_short(value)}" for key, value in event.payload.items())
    line = f"{_clock(event.time)} {event.via:7} {event.name} {event.source} {event.id}"
    return f"{line} {_cut(payload, MOST_OF_A_PAYLOAD)}" if payload else line


def as_json(event: Event, entry: str | None = None) -> str:
    """The whole event as a JSON object in one line, with the names of CloudEvents.

    :param entry: the id of its entry, where it came over a stream.
    """
    attributes = {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.name,
        "time": event.time.isoformat().replace("+00:00", "Z"),
        "data": event.payload,
        "seq": event.seq,
        "correlationid": event.correlation_id,
        "causationid": event.causation_id,
        "hops": event.hops or None,
        "traceparent": event.traceparent,
        "partitionkey": event.key,
        "via": event.via,
        "entry": entry,
    }
    return json.dumps(
        {name: plain(value) for name, value in attributes.items() if value is not None},
        allow_nan=False,
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as what stands in them."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _clock(moment: datetime) -> str:
    try:
        moment = moment.astimezone()
    except (OverflowError, ValueError, OSError):
        # So early or late that this place's time cannot be told: the wire allows it.
        return f"{moment:%H:%M:%S}Z"

    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}"


def _short(value: Any) -> str:
    value = plain(value)
    return _word(value) if isinstance(value, str) else _cut(_as_json_text(value), MOST_OF_A_VALUE)


def _word(text: str) -> str:
    """The text as it could be written in a command: bare where that is not ambiguous."""
    bare = _PLAIN_WORD.fullmatch(text) and isinstance(read_value(text), str)
    return _cut(text if bare else _as_json_text(text), MOST_OF_A_VALUE)


def _as_json_text(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
