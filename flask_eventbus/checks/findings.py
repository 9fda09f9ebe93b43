"""A finding of a check: its level, its text and its remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note", "ok"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about a program or its server.

    ``error``: something does not work. ``warning``: something may go wrong later. ``note``: good
    to know, or not checked. ``ok``: checked and fine.
    """

    level: Level
    text: str
    #: How to fix it; empty if there is nothing to fix.
    remedy: str = ""


def error(text: str, remedy: str) -> Finding:
    """Return a finding that something does not work."""
    return Finding("error", text, remedy)


def warning(text: str, remedy: str) -> Finding:
    """Return a finding that something may go wrong later."""
    return Finding("warning", text, remedy)


def note(text: str, remedy: str = "") -> Finding:
    """Return a finding that is good to know, or that something was not checked."""
    return Finding("note", text, remedy)


def ok(text: str) -> Finding:
    """Return a finding that something is fine."""
    return Finding("ok", text)


def listed(names: Iterable[str]) -> str:
    """Return names in quotation marks, to be read in a sentence."""
    return ", ".join(map(repr, names))
