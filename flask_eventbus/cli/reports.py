"""What `routes` and `check` show to people: tables, and findings with their remedies."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ..checks.findings import Finding
from ..text import counted, printable
from .tables import fitted_table

#: How findings are marked in a terminal.
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "ok": "green"}

#: Units of an age, the largest first, with their seconds.
_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))

#: Characters before the text of a finding: the longest mark and a space.
_MARGIN = len("warning ") + 1


def routes_report(found: dict[str, Any]) -> Iterator[str]:
    """The lines of `routes` for a program: what it publishes, hears, and keeps to itself."""
    yield f"Service {found['service']}"
    yield from _section(
        ("Publishes", "Via", "Leaves", "Confirmed", "Of signal", "Payload by"),
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
        ("Into stream", "Keeps", "Replicas", "In order by"),
        [
            (route["name"], _kept(stream), f"{stream['replicas']}", stream["key"] or "-")
            for route in found["publishes"]
            if (stream := route["stream"])
        ],
        numbers=(1, 2),
    )
    yield from _section(
        ("Hears", "Via", "From", "Echo", "Group", "Start"),
        [_heard(heard) for heard in found["subscribes"]],
    )
    yield from _section(
        ("Signal", "Receivers", "Retries", "Timeout"),
        [row for heard in found["subscribes"] for row in _receivers(heard)],
        numbers=(2, 3),
    )
    yield from _section(
        ("Local only", "Receivers"),
        [row for local in found["local"] for row in _per_receiver(local)],
    )


def _heard(heard: dict[str, Any]) -> tuple[str, ...]:
    reads = "stream" in heard["via"]
    return (
        heard["name"],
        "both" if len(heard["via"]) == 2 else heard["via"][0],
        ", ".join(heard["from"] or ["anyone"]),
        _yes(heard["echo"]),
        (heard["group"] or "none") if reads else "-",
        heard["start"] or "-",
    )


def _receivers(heard: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    name = heard["name"]

    for each in heard["receivers"]:
        retries, timeout = each["retries"], each["timeout"]
        yield (
            name,
            each["name"],
            "-" if retries is None else f"{retries}",
            "-" if timeout is None else f"{timeout:g} s",
        )
        # Said once: the eye finds the names.
        name = ""

    if not heard["receivers"]:
        yield name, "none", "-", "-"


def _per_receiver(local: dict[str, Any]) -> Iterator[tuple[str, str]]:
    name = local["name"]

    for receiver in local["receivers"]:
        yield name, receiver
        name = ""


def _section(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()
) -> Iterator[str]:
    if not rows:
        return

    texts = [column for column in range(len(heads)) if column not in numbers]
    yield ""
    yield from fitted_table(heads, rows, names=texts)


def _leaves(route: dict[str, Any]) -> str:
    if route["outbox"]:
        return "by outbox"

    return "after commit" if route["after_commit"] else "at send"


def _kept(stream: dict[str, Any]) -> str:
    """How much a stream keeps: a number of events, or their age as settings have it."""
    if stream["maxlen"] is not None:
        return f"{stream['maxlen']:,}"

    seconds: int = stream["max_age_seconds"]
    unit, size = next(each for each in _UNITS if not seconds % each[1])
    return f"{seconds // size}{unit}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def live_report(found: dict[str, Any]) -> Iterator[str]:
    """The lines of `routes` without a program: who listens now, and which streams there are."""
    channels, streams, services = found["channels"], found["streams"], found["services"]

    if not channels and not services and not streams:
        yield "No channel has listeners now, and there is no stream."

    yield from _section(("Channel of", "Listeners"), _counts(channels), numbers=(1,))
    yield from _section(
        ("Stream of", "Events", "Groups"),
        [
            (name, f"{facts['events']:,}", ", ".join(map(printable, facts["groups"])) or "none")
            for name, facts in (streams or {}).items()
        ],
        numbers=(1,),
    )
    yield from _section(("Service", "Processes that listen"), _counts(services or {}), numbers=(1,))

    if streams is None:
        yield (
            "Which streams there are cannot be told: this user may not ask. Allow '+smembers +xlen "
            "+xinfo|groups' in the ACL."
        )

    if services is None:
        yield "Which services listen cannot be told: this user may not ask for CLIENT LIST."


def _counts(found: dict[str, int]) -> list[tuple[str, str]]:
    return [(name, str(count)) for name, count in found.items()]


def findings_report(findings: Sequence[Finding]) -> Iterator[str]:
    """The lines of `check`: each finding, what to do about it, and the sum."""
    for finding in findings:
        mark = click.style(finding.level.ljust(_MARGIN), fg=_COLOURS[finding.level])
        yield mark + _wrapped(finding.text, _MARGIN)

        if finding.remedy:
            yield " " * _MARGIN + _wrapped(f"-> {finding.remedy}", _MARGIN + 3)

    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    yield f"{counted(errors, 'error')}, {counted(warnings, 'warning')}."


def _wrapped(text: str, indent: int) -> str:
    """The text on one line, or, in a terminal, on as many as it is wide for."""
    if not sys.stdout.isatty():
        return text

    width = shutil.get_terminal_size().columns - indent
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    margin = "\n" + " " * indent
    return margin.join(lines)
