"""What a check found: how bad it is, what it is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note", "ok"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about a program or its server.

    ``error``: something will not work. ``warning``: it may surprise. ``note``: good to know,
    or could not be looked at. ``ok``: looked at, and as it should be.
    """

    level: Level
    text: str
    #: What to do; empty where nothing is to be done.
    remedy: str = ""


def error(text: str, remedy: str) -> Finding:
    """Something will not work."""
    return Finding("error", text, remedy)


def warning(text: str, remedy: str) -> Finding:
    """Something may surprise."""
    return Finding("warning", text, remedy)


def note(text: str, remedy: str = "") -> Finding:
    """Something good to know, or that could not be looked at."""
    return Finding("note", text, remedy)


def ok(text: str) -> Finding:
    """Something is as it should be."""
    return Finding("ok", text)
