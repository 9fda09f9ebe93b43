"""Lines that processes write as they work, in files that survive a SIGKILL."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Lines:
    """One process's file of lines; a line is written whole or not at all.

    :param folder: where all processes of a run have theirs.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        path = folder / f"{name}.{os.getpid()}.lines"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str, **facts: Any) -> None:
        """Add a line; with it in the file, a crash does not undo it."""
        line = {"what": what, "who": self._name, "pid": os.getpid(), "at": time.time(), **facts}
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All lines of all processes, in order of time."""
    return sorted(_read(folder), key=lambda line: line["at"])


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    for path in folder.glob("*.lines"):
        for line in path.read_bytes().splitlines():
            yield json.loads(line)
