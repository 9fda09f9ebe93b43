"""Lines for a plain terminal of 80 columns, coloured where it can be."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

_WIDTH = 79
_BOLD, _DIM, _RED, _GREEN = 1, 2, 31, 32

#: How many lines of its log show why a program failed.
_LAST_LINES = 12


class Screen:
    """Writes the demo's lines to standard output.

    :param colour: whether it takes ANSI colours.
    :param ascii_only: whether it has no characters beyond ASCII.
    """

    def __init__(self, *, colour: bool, ascii_only: bool) -> None:
        self.colour = colour
        self.ascii_only = ascii_only
        self._done, self._failed = ("ok", "--") if ascii_only else ("✓", "✗")

    @classmethod
    def on(cls, stream: TextIO) -> Screen:
        """A screen that does what the stream can."""
        return cls(colour=_takes_colour(stream), ascii_only=_is_ascii_only(stream))

    @classmethod
    def from_settings(cls, environ: Mapping[str, str]) -> Screen:
        """The screen of the program that passes on what this one writes."""
        return cls(colour=environ["DEMO_COLOUR"] == "1", ascii_only=environ["DEMO_ASCII"] == "1")

    def as_settings(self) -> dict[str, str]:
        """For the environment of a program whose lines this one passes on."""
        return {"DEMO_COLOUR": str(int(self.colour)), "DEMO_ASCII": str(int(self.ascii_only))}

    def title(self, words: str, right: str = "") -> None:
        self._write(self._painted(_BOLD, words), words, right)

    def done(self, name: str, words: str, right: str = "") -> None:
        self._entry(_GREEN, self._done, f"{name:10} {words}", right)

    def failed(self, name: str, words: str) -> None:
        self._entry(_RED, self._failed, f"{name:10} {words}", "")

    def line(self, words: str = "") -> None:
        self._write(words, words, "")

    def end_of(self, log: Path) -> None:
        """The last lines of a log."""
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []

        for line in lines[-_LAST_LINES:] or ["(nothing)"]:
            self._write(f"    {self._painted(_DIM, line)}", line, "")

    def _entry(self, colour: int, mark: str, words: str, right: str) -> None:
        plain = f"  {mark} {words}"
        self._write(f"  {self._painted(colour, mark)} {words}", plain, right)

    def _write(self, shown: str, plain: str, right: str) -> None:
        """``right`` ends where the terminal does, whatever colours take in ``shown``."""
        gap = max(_WIDTH - len(plain) - len(right), 1) if right else 0
        print(f"{shown}{' ' * gap}{right}", flush=True)

    def _painted(self, code: int, words: str) -> str:
        return f"\033[{code}m{words}\033[0m" if self.colour else words


def in_milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _takes_colour(stream: TextIO) -> bool:
    """Whether to colour what goes there: https://no-color.org has the exception."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _is_ascii_only(stream: TextIO) -> bool:
    """Whether a tick cannot be written there."""
    try:
        "✓✗".encode(stream.encoding or sys.getdefaultencoding())
    except UnicodeEncodeError:
        return True

    return False
