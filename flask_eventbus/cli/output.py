"""Format events, tables and findings as text and as JSON."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import click

from ..checks.findings import Finding
from ..event import Event
from ..text import counted, plain, printable, read_value

#: Characters of one value, and of a whole payload, in a line of `tail`.
MAX_VALUE_CHARS = 60
MAX_PAYLOAD_CHARS = 240

_PLAIN_WORD = re.compile(r"[\w@.,+:/-]+")


def as_line(event: Event) -> str:
    """Return an event as one line: local time, transport, name, source, id, short payload.

    Control characters are escaped, so that a payload cannot move the cursor of a terminal.
    """
    payload = " ".join(f"{_word(key)}={_short(value)}" for key, value in event.payload.items())
    line = f"{_clock(event.time)} {event.via:7} {event.name} {event.source} {event.id}"
    return f"{line} {cut(payload, MAX_PAYLOAD_CHARS)}" if payload else line


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON, as :func:`.plain` represents it."""
    return json.dumps(plain(value), allow_nan=False, indent=indent)


def as_json(event: Event, entry: str | None = None) -> str:
    """Return the whole event as a JSON object in one line, with the names of CloudEvents.

    :param entry: the id of its stream entry; ``None`` if it came over a channel.
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
    return to_json({name: value for name, value in attributes.items() if value is not None})


def _clock(moment: datetime) -> str:
    try:
        moment = moment.astimezone()
    except (OverflowError, ValueError, OSError):
        # The wire format allows times that the local time zone cannot represent.
        return f"{moment:%H:%M:%S}Z"

    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}"


def _short(value: Any) -> str:
    value = plain(value)
    return _word(value) if isinstance(value, str) else cut(_as_json_text(value), MAX_VALUE_CHARS)


def _word(text: str) -> str:
    """Return the text as one would type it in a command: unquoted if it stays text."""
    bare = _PLAIN_WORD.fullmatch(text) and isinstance(read_value(text), str)
    return cut(text if bare else _as_json_text(text), MAX_VALUE_CHARS)


def _as_json_text(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False))


def cut(text: str, most: int | None) -> str:
    """Return a text with its end cut off if it is longer than ``most``; ``None`` for no limit."""
    return text if most is None or len(text) <= most else f"{text[: most - 3]}..."


def terminal_width() -> int | None:
    """Return the number of columns of the terminal; ``None`` if stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


#: Names in a table are not cut below this number of characters.
LEAST_OF_A_NAME = 12


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, names: Sequence[int]
) -> Iterator[str]:
    """Yield the lines of a table with a bold head, cut to the width of the terminal if possible.

    :param names: the columns with names, which are aligned to the left and may be cut; the others
        hold short values, and are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    least = [max(len(head), LEAST_OF_A_NAME) for head in heads]

    width = terminal_width()

    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        longest = max(names, key=lambda column: widths[column] - least[column])

        if widths[longest] <= least[longest]:
            break

        widths[longest] -= 1

    for line in (heads, *rows):
        cells = [
            _without_middle(cell, width).ljust(width) if column in names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text = "  ".join(cells).rstrip()
        yield click.style(text, bold=True) if line is heads else text


def span(seconds: float | None) -> str:
    """Return a duration such as ``90 s`` or ``2 h``: in the largest unit that it has two of."""
    if seconds is None:
        return "-"

    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"

    return f"{seconds:.0f} s"


def _without_middle(text: str, most: int) -> str:
    """Cut the middle out of a text, since names differ at their ends."""
    if len(text) <= most:
        return text

    tail = (most - 3) // 2
    return f"{text[: most - 3 - tail]}...{text[-tail:]}"


#: Colour of each level of a finding.
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "ok": "green"}

#: Shown in place of the receivers of a subscription that has none.
_NONE = {"name": "none", "retries": None, "timeout": None}

#: Units of an age with their seconds, the largest first.
_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))

#: Characters before the text of a finding: the longest level and a space.
_MARGIN = len("warning ") + 1


def routes_report(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of `routes` for an app: routes, subscriptions and local signals."""
    yield f"Service {found['service']}"
    yield from _section(
        ("Publishes", "Via", "Sent", "Confirmed", "Signal", "Payload from"),
        [
            (
                route["name"],
                route["via"],
                _leaves(route),
                _yes(route["confirm"]),
                route["signal"] or ", ".join(route["covers"]) or "none yet",
                route["payload"] or "-",
            )
            for route in found["publishes"]
        ],
    )
    yield from _section(
        ("Stream", "Keeps", "Replicas", "Ordered by"),
        [
            (route["name"], _kept(stream), f"{stream['replicas']}", stream["key"] or "-")
            for route in found["publishes"]
            if (stream := route["stream"])
        ],
        numbers=(1, 2),
    )
    yield from _section(
        ("Subscribes to", "Via", "From", "Echo", "Group", "Start"),
        [_subscription(each) for each in found["subscribes"]],
    )
    yield from _section(
        ("Signal", "Receivers", "Retries", "Timeout"),
        [
            row
            for each in found["subscribes"]
            for row in _under(each["name"], map(_receiver, each["receivers"] or [_NONE]))
        ],
        numbers=(2, 3),
    )
    yield from _section(
        ("Local only", "Receivers"),
        [
            row
            for each in found["local"]
            for row in _under(each["name"], ((receiver,) for receiver in each["receivers"]))
        ],
    )


def _subscription(found: dict[str, Any]) -> tuple[str, ...]:
    reads = "stream" in found["via"]
    return (
        found["name"],
        "both" if len(found["via"]) == 2 else found["via"][0],
        ", ".join(found["from"] or ["anyone"]),
        _yes(found["echo"]),
        (found["group"] or "none") if reads else "-",
        found["start"] or "-",
    )


def _receiver(found: dict[str, Any]) -> tuple[str, ...]:
    retries, timeout = found["retries"], found["timeout"]
    return (
        found["name"],
        "-" if retries is None else f"{retries}",
        "-" if timeout is None else f"{timeout:g} s",
    )


def _under(name: str, rows: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield rows with a name before the first one."""
    for row in rows:
        yield name, *row
        name = ""


def _section(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()
) -> Iterator[str]:
    if not rows:
        return

    texts = [column for column in range(len(heads)) if column not in numbers]
    yield ""
    yield from table(heads, rows, names=texts)


def _leaves(route: dict[str, Any]) -> str:
    if route["outbox"]:
        return "by outbox"

    return "after commit" if route["after_commit"] else "at send"


def _kept(stream: dict[str, Any]) -> str:
    """Return the limit of a stream: a number of events, or an age such as ``7d``."""
    if stream["maxlen"] is not None:
        return f"{stream['maxlen']:,}"

    seconds: int = stream["max_age_seconds"]
    unit, size = next(each for each in _UNITS if not seconds % each[1])
    return f"{seconds // size}{unit}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def live_report(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of `routes` without an app: channels, streams and services in Redis."""
    channels, streams, services = found["channels"], found["streams"], found["services"]

    if not channels and not services and not streams:
        yield "No channel has listeners, and there is no stream."

    yield from _section(
        ("Channel of", "Listeners"),
        [(name, f"{count}") for name, count in channels.items()],
        numbers=(1,),
    )
    yield from _section(
        ("Stream of", "Events", "Groups"),
        [
            (name, f"{facts['events']:,}", ", ".join(map(printable, facts["groups"])) or "none")
            for name, facts in (streams or {}).items()
        ],
        numbers=(1,),
    )
    yield from _section(
        ("Service", "Processes that listen"),
        [(name, f"{count}") for name, count in (services or {}).items()],
        numbers=(1,),
    )

    if streams is None:
        yield (
            "Could not list the streams: this user has no right to. Grant '+smembers +xlen "
            "+xinfo|groups' in the ACL."
        )

    if services is None:
        yield (
            "Could not list the services: this user has no right to CLIENT LIST. Grant "
            "'+client|list' in the ACL."
        )


def findings_report(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the lines of `check`: each finding with its remedy, then the totals."""
    for finding in findings:
        mark = click.style(finding.level.ljust(_MARGIN), fg=_COLOURS[finding.level])
        yield mark + _wrapped(finding.text, _MARGIN)

        if finding.remedy:
            yield " " * _MARGIN + _wrapped(f"-> {finding.remedy}", _MARGIN + 3)

    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    yield f"{counted(errors, 'error')}, {counted(warnings, 'warning')}."


def _wrapped(text: str, indent: int) -> str:
    """Wrap the text at the width of the terminal; return it unchanged if there is none."""
    width = terminal_width()

    if width is None:
        return text

    lines = textwrap.wrap(text, width - indent, break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * indent).join(lines)
