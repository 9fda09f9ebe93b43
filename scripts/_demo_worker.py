"""Runs a Python program, and runs it anew when it was killed, as Compose does with a container."""

from __future__ import annotations

import signal
import subprocess
import sys


def main() -> int:
    """The exit code of a program that ended otherwise."""
    told: list[int] = []

    for number in (signal.SIGTERM, signal.SIGINT):
        # The program is told as well: it is in the same process group.
        signal.signal(number, lambda number, frame: told.append(number))

    while True:
        code = subprocess.call([sys.executable, *sys.argv[1:]])

        if told or code != -signal.SIGKILL:
            return code if code >= 0 else 128 - code

        print("It was killed, and is started anew.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
