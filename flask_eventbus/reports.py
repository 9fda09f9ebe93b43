"""What `routes` and `check` show to people: tables, and findings with their remedies."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import click

from .findings import Finding
from .rendering import table

#: How findings are marked in a terminal.
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "ok": "green"}

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
        ("Hears", "From", "Echo", "Receivers"),
        [
            row
            for heard in found["subscribes"]
            for row in _per_receiver(
                heard["name"],
                ", ".join(heard["from"] or ["anyone"]),
                _yes(heard["echo"]),
                receivers=heard["receivers"],
            )
        ],
    )
    yield from _section(
        ("Local only", "Receivers"),
        [
            row
            for local in found["local"]
            for row in _per_receiver(local["name"], receivers=local["receivers"])
        ],
    )


def _per_receiver(*cells: str, receivers: Sequence[str]) -> Iterator[tuple[str, ...]]:
    first, *others = receivers or ["none"]
    yield (*cells, first)

    for receiver in others:
        yield (*("" for _ in cells), receiver)


def _section(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return

    head, *lines = table(heads, rows)
    yield ""
    yield click.style(head, bold=True)
    yield from lines


def _leaves(route: dict[str, Any]) -> str:
    if route["outbox"]:
        return "by outbox"

    return "after commit" if route["after_commit"] else "at send"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def channels_report(found: dict[str, Any]) -> Iterator[str]:
    """The lines of `routes` without a program: who listens now."""
    channels, services = found["channels"], found["services"]

    if not channels and not services:
        yield "No channel has listeners now."

    yield from _section(("Channel of", "Listeners"), _counts(channels))
    yield from _section(("Service", "Processes that listen"), _counts(services or {}))

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
    yield f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}."


def _wrapped(text: str, indent: int) -> str:
    """The text on one line, or, in a terminal, on as many as it is wide for."""
    if not sys.stdout.isatty():
        return text

    width = shutil.get_terminal_size().columns - indent
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    margin = "\n" + " " * indent
    return margin.join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
