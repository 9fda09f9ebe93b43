"""Ends the programs of the demo when the demo has ended, however it did.

Its standard input ends with the demo, even by ``kill -9``. Each program puts a file, named after
its process group, into a folder before anything else. Whoever is found there gets SIGTERM, and
later SIGKILL; the folder goes, so that no further program can start.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

#: How long they have between the one and the other, in seconds.
GRACE = 5.0


def main() -> None:
    sys.stdin.read()
    groups = clear(Path(sys.argv[1]))
    tell(groups, signal.SIGTERM)
    deadline = time.monotonic() + GRACE

    while (groups := living(groups)) and time.monotonic() < deadline:
        time.sleep(0.02)

    tell(groups, signal.SIGKILL)


def clear(folder: Path) -> list[int]:
    """Remove the folder; the process groups that were in it."""
    groups = []

    while folder.exists():
        for file in folder.iterdir():
            groups.append(int(file.name))
            file.unlink()

        remove_if_empty(folder)

    return groups


def remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        # Somebody has come in the meantime.
        if error.errno != errno.ENOTEMPTY:
            raise


def tell(groups: list[int], number: signal.Signals) -> None:
    for group in groups:
        lives(group, number)


def living(groups: list[int]) -> list[int]:
    return [group for group in groups if lives(group, 0)]


def lives(group: int, number: int) -> bool:
    """Send a signal to a process group, 0 to send none; whether there is such a group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False

    return True


if __name__ == "__main__":
    main()
