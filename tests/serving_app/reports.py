"""Reports of processes, one JSON line each, in the file named by ``REPORTS``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path


def report(what: str, **facts: object) -> None:
    """Add a line about this process; one write, so that lines of processes do not mix."""
    line = json.dumps({"what": what, "pid": os.getpid(), "parent": os.getppid(), **facts})

    with Path(os.environ["REPORTS"]).open("a") as file:
        file.write(f"{line}\n")


def until_released(what: str) -> Iterator[None]:
    """Go round until the test makes the file that the variable ``what`` names."""
    while not Path(os.environ[what]).exists():
        yield


def wait_until_released(what: str) -> None:
    """Hold the caller until the test lets it go."""
    for _ in until_released(what):
        time.sleep(0.01)
