"""Real programs that tests start beside them, and what these say."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import redis
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus

TESTS = Path(__file__).parent
ROOT = TESTS.parent

#: Where servers say they are: gunicorn, werkzeug, and the tests' own.
_ADDRESS = re.compile(r"(?:Listening at:|Running on|Serving at|Serving on) (http://[\d.]+:\d+)")


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
                env={**_environment(), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **settings},
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
    def output(self) -> str:
        """Everything on its standard output and error so far."""
        return self._log.read_text()

    @property
    def address(self) -> str:
        """The address of the server, once it has printed it."""
        found: list[str] = wait_until(
            lambda: _ADDRESS.findall(self.output), what="an address is served"
        )
        return found[0]

    def get(self, path: str = "/", *, method: str = "GET") -> str:
        """Return the response of its server, within five seconds."""
        return get(self.address + path, method=method)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self, *, typed: str = "", timeout: float = 20) -> int:
        """Give it its last input, wait for its end, and return its exit code."""
        self.process.communicate(typed.encode(), timeout=timeout)
        return self.process.returncode

    def kill(self) -> None:
        """End it and its children, whatever they do."""
        if self.process.stdin is not None:
            self.process.stdin.close()

        # They may have ended by themselves.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

        self.process.wait()


def get(url: str, *, method: str = "GET") -> str:
    """Return what a server answers, within five seconds."""
    request = urllib.request.Request(url, method=method)  # noqa: S310 - http

    with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310 - http
        return str(response.read().decode())


def _environment() -> dict[str, str]:
    """The environment without what would configure the programs in the tests' place."""
    foreign = ("EVENTBUS_", "FLASK_", "GUNICORN_", "WERKZEUG_")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)}


class Service:
    """One service with a name of its own: its processes, and what they report."""

    def __init__(self, folder: Path, server: RedisServer) -> None:
        self.name = f"sample-{secrets.token_hex(4)}"
        self.server = server
        self.folder = folder
        self.release = folder / "release"
        self._reports = folder / "reports"
        self._programs: list[Program] = []
        self._numbers = itertools.count()
        self._other = Bus(server.url, service="tests", prefix=self.name)
        self.redis: redis.Redis = server.client

    def write(self, name: str, text: str) -> Path:
        """Write a file where the programs run."""
        path = self.folder / name
        path.write_text(text)
        return path

    def run(self, *command: str, **settings: str) -> Program:
        """Start a program of the service."""
        bus = {"SERVICE": self.name, "PREFIX": self.name, "URL": self.server.url}
        fixed = {f"{start}EVENTBUS_{key}": bus[key] for start in ("", "FLASK_") for key in bus}
        files = {"REPORTS": str(self._reports), "RELEASE": str(self.release)}
        program = Program(command, self.folder, {**fixed, **files, **settings})
        self._programs.append(program)
        return program

    def publish(self, name: str, **payload: Any) -> None:
        """Publish an event from another service, and wait until Redis has it."""
        self._other.node.publish(name, payload)
        assert self._other.flush(5)

    def reports(self, what: str, **facts: Any) -> list[dict[str, Any]]:
        """Return the reports of the service's processes."""
        lines = self._reports.read_text().splitlines() if self._reports.exists() else []
        found = [json.loads(line) for line in lines]
        return [line for line in found if {"what": what, **facts}.items() <= line.items()]

    def wait_for(self, what: str, count: int = 1, **facts: Any) -> list[dict[str, Any]]:
        """Wait for so many reports."""
        wait_until(
            lambda: len(self.reports(what, **facts)) >= count, what=f"{count} reports of {what!r}"
        )
        return self.reports(what, **facts)

    def nodes(self, kind: str) -> set[str]:
        """The nodes that have a connection: ``pubsub`` to listen, ``normal`` for the rest."""
        start = f"eventbus:{self.name}:"

        names = [found["name"] for found in self.redis.client_list(_type=kind)]
        nodes = [name.removeprefix(start) for name in names if name.startswith(start)]
        assert kind != "pubsub" or len(nodes) == len(set(nodes)), "A node listens twice."
        return set(nodes)

    def listeners(self, count: int, *, besides: Set[str] = frozenset()) -> set[str]:
        """Wait until exactly so many nodes listen, none of them of those ``besides``."""
        wait_until(
            lambda: self._subscribed() == len(self.nodes("pubsub") - besides) == count,
            what=f"exactly {count} nodes listen",
        )
        return self.nodes("pubsub")

    def receiving_processes(self, count: int) -> set[int]:
        """Publish an event; the processes that hear it: so many, each once and by all receivers.

        Another event goes after it: when that has arrived, the first cannot come again.
        """
        nodes = self.listeners(count)
        number, after = next(self._numbers), next(self._numbers)

        for each in (number, after):
            self.publish("called", number=each)
            self.wait_for("called", count, number=each)
            self.wait_for("called late", count, number=each)

        lines = self.reports("called", number=number)
        late = self.reports("called late", number=number)
        processes = {line["pid"] for line in lines}
        assert len(lines) == len(late) == len(processes) == count
        assert {line["pid"] for line in late} == processes
        assert {line["node"] for line in lines} == nodes
        return processes

    def end(self) -> None:
        """End all that was started, and show what it said, in case that a test failed."""
        for program in self._programs:
            program.kill()
            print(program.output)

        self._other.stop(flush=0)
        self.redis.close()

    def _subscribed(self) -> int:
        return int(self.redis.pubsub_numsub(f"{self.name}:{{called}}:channel")[0][1])
