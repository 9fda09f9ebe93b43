"""Real programs that tests start beside them, and what these say."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from waiting import wait_until

TESTS = Path(__file__).parent
ROOT = TESTS.parent

#: Where servers say they are: gunicorn, werkzeug, and the tests' own.
_ADDRESS = re.compile(r"(?:Listening at:|Running on|Serving at) (http://[\d.]+:\d+)")


class Program:
    """A program in a process group of its own, with all it says in one file.

    :param folder: its working directory, and where what it says is kept.
    :param settings: added to the environment.
    """

    def __init__(self, command: Sequence[str], folder: Path, settings: Mapping[str, str]) -> None:
        self._log = folder / f"{len(list(folder.glob('*.log')))}.log"
        path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])

        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **settings},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process that was started, not of its children."""
        return self.process.pid

    @property
    def said(self) -> str:
        """Everything on its standard output and error so far."""
        return self._log.read_text()

    @property
    def address(self) -> str:
        """Where it serves, once it says so."""
        found: list[str] = wait_until(
            lambda: _ADDRESS.findall(self.said), what="an address is served"
        )
        return found[0]

    def get(self, path: str = "/", *, method: str = "GET") -> str:
        """What its server answers, within five seconds."""
        request = urllib.request.Request(self.address + path, method=method)  # noqa: S310 - http

        with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310 - http
            return str(response.read().decode())

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self, *, said: str = "", timeout: float = 20) -> int:
        """Give it its last input, wait for its end, and return its exit code."""
        self.process.communicate(said.encode(), timeout=timeout)
        return self.process.returncode

    def kill(self) -> None:
        """End it and its children, whatever they do."""
        if self.process.stdin is not None:
            self.process.stdin.close()

        # They may have ended by themselves.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

        self.process.wait()
