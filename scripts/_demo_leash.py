"""Ends the programs of the demo when the demo has ended, however it did.

Reads the ids of their process groups from standard input, one a line. At its end, which comes
with the end of the demo, even by ``kill -9``, whoever is left gets SIGTERM, and later SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
import time

#: How long they have between the one and the other, in seconds.
GRACE = 5.0


def main() -> None:
    groups = [int(line) for line in sys.stdin]
    tell(groups, signal.SIGTERM)
    deadline = time.monotonic() + GRACE

    while (groups := living(groups)) and time.monotonic() < deadline:
        time.sleep(0.02)

    tell(groups, signal.SIGKILL)


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
