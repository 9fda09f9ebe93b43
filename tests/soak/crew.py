"""The processes of a soak: started, killed, ended and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from servers import free_port
from soak.cast import SITE, SITE_REQUESTS, SITE_WORKERS, settings

#: Seconds that a process has for its end, a publisher's last flush included.
END = 90.0

_TESTS = Path(__file__).parent.parent

#: What would configure the processes in the soak's place.
_FOREIGN = ("EVENTBUS_", "FLASK_")


class Member:
    """One process, which has many lives.

    :param command: the program that it runs, and its arguments.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, url: str) -> None:
        self.name = name
        self._command = list(command)
        self._said = folder / f"{name}.log"
        self._environment = _environment(name.rpartition("-")[0] or name, url, folder)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of its present life."""
        assert self._process is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Return True if it ended by itself."""
        return self._process is not None and self._process.poll() is not None

    @property
    def output(self) -> str:
        """Return the standard error of all its processes."""
        return self._said.read_text(errors="replace")

    @property
    def children(self) -> list[int]:
        """The processes that it has forked."""
        return [
            int(pid)
            for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        ]

    def start(self) -> None:
        """Begin a life."""
        with self._said.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stderr=log
            )

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> int:
        """End it at once; which process that was."""
        pid = self.pid
        self.send_signal(signal.SIGKILL)
        self._reap()
        return pid

    def end(self) -> int:
        """End it as a deployment would, and return its exit code."""
        self.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        assert self._process is not None
        return self._process.wait(timeout=END)


class Crew:
    """All processes of a run."""

    def __init__(self, folder: Path, url: str, *, seed: int) -> None:
        self._folder = folder
        self._url = url
        self._seed = seed
        self.workers: list[Member] = []
        self.screens: list[Member] = []
        self.publishers: list[Member] = []
        self.sites: list[Member] = []
        self.site_port = free_port()

    @property
    def all(self) -> list[Member]:
        """Everybody."""
        return [*self.sites, *self.publishers, *self.screens, *self.workers]

    def hire_worker(self, name: str) -> Member:
        """Start a worker of a service, ``SERVICE-NUMBER``."""
        command = [sys.executable, "-m", "soak.worker", name, str(self._folder), str(self._seed)]
        return self._hire(name, command)

    def hire_site(self) -> Member:
        """Start uWSGI with workers that publish."""
        file = Path(__file__).with_name("site.py")
        options = ["--http-socket", f"127.0.0.1:{self.site_port}", "--wsgi-file", str(file)]
        options += ["--master", "--processes", str(SITE_WORKERS), "--enable-threads"]
        options += ["--die-on-term", "--need-app", "--max-requests", str(SITE_REQUESTS)]
        options += ["--disable-logging", "--worker-reload-mercy", "20"]
        return self._hire(SITE, [str(Path(sys.executable).with_name("pyuwsgi")), *options])

    def hire_publisher(self, name: str, *, rate: float) -> Member:
        """Start a publisher."""
        command = [sys.executable, "-m", "soak.publisher", name, str(self._folder), str(rate)]
        return self._hire(name, command)

    def kill_all(self) -> None:
        """End whatever runs."""
        for member in self.all:
            if not member.has_ended:
                member.kill()

    def _hire(self, name: str, command: Sequence[str]) -> Member:
        member = Member(name, command, self._folder, self._url)
        member.start()
        return member


def _environment(service: str, url: str, folder: Path) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    path = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
    return {**own, "PYTHONPATH": path, **settings(service, url, folder)}
