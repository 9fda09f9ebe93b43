"""Run a publisher and receivers as programs of their own, and read what they report."""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from contenders import Contender

PROGRAMS = Path(__file__).parent / "programs"

#: Seconds after which a program counts as hanging.
PATIENCE = 120.0


class FailedError(Exception):
    """A program ended, or does not answer."""


@dataclass
class Result:
    """Figures of one run of one contender."""

    #: Events a second, from the first ``send()`` to the last call of a receiver.
    rate: float
    #: Microseconds of CPU an event: of the publisher, of one receiver, and of Redis.
    publish: float
    receive: float
    redis: float
    #: With a rate only: median microseconds of a ``send()``, and milliseconds from ``send()`` to
    #: the receiver, of half of the events and of 99 %.
    send: float = 0.0
    p50: float = 0.0
    p99: float = 0.0


class Server:
    """A Redis of this program's own, on a free port, that stores nothing on disk."""

    def __init__(self, url: str, client: redis.Redis) -> None:
        self.url = url
        self.client = client
        self.version = client.info("server")["redis_version"]

    def cpu(self) -> float:
        """Seconds of CPU that Redis has used."""
        used = self.client.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


@contextmanager
def redis_server() -> Iterator[Server]:
    executable = shutil.which("redis-server") or shutil.which("valkey-server")

    if executable is None:
        raise SystemExit("There is no redis-server on PATH. Install one and run this again.")

    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [executable, "--port", str(port), "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=port)

        try:
            wait_for(client)
            yield Server(f"redis://127.0.0.1:{port}/0", client)
        finally:
            process.terminate()
            process.wait()


def wait_for(client: redis.Redis) -> None:
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            time.sleep(0.05)


class Program:
    """A running publisher or receiver."""

    def __init__(self, contender: Contender, role: str, *words: str) -> None:
        command = [contender.python, str(PROGRAMS / contender.program), role, contender.way, *words]
        self._name = f"{contender.name} ({role})"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in end()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=PROGRAMS,
        )

    def read(self) -> dict[str, Any]:
        """Return the next line of the program that is a JSON object."""
        assert self._process.stdout is not None

        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found

        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        raise FailedError(f"{self._name} ended: {lines[-1] if lines else 'it printed no error'}")

    def go(self) -> None:
        """Let a publisher begin."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def end_after(self, seconds: float) -> threading.Timer:
        """Kill the program unless the returned timer is cancelled."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        return timer


def exchange(
    server: Server,
    contender: Contender,
    count: int,
    *,
    receivers: int = 1,
    rate: float | None = None,
    warm: int = 1_000,
) -> Result:
    """Send ``count`` events from one process to others, and measure it.

    :param rate: events a second; as fast as the publisher can unless given.
    :raises FailedError: a program ended early, or took more than :data:`PATIENCE`.
    """
    server.client.flushall()
    words = (server.url, str(count), "--warm", str(warm))

    with ExitStack() as stack:

        def start(role: str, *more: str) -> Program:
            program = Program(contender, role, *words, *more)
            stack.callback(program.end)
            stack.callback(program.end_after(PATIENCE).cancel)
            return program

        listening = [start("receive") for _ in range(receivers)]

        for program in listening:
            program.read()

        publisher = start("publish", *(("--rate", str(rate)) if rate else ()))
        publisher.read()

        for program in listening:
            program.read()

        work = server.cpu()
        publisher.go()
        sent = publisher.read()
        heard = [program.read() for program in listening]
        work = server.cpu() - work

    delays = sorted(delay for each in heard for delay in each["delays"])

    return Result(
        rate=count / (max(each["end"] for each in heard) - sent["start"]),
        publish=sent["cpu"] / count * 1e6,
        receive=statistics.median(each["cpu"] for each in heard) / count * 1e6,
        redis=work / count * 1e6,
        send=share(sorted(sent["taken"]), 0.5) * 1e6,
        p50=share(delays, 0.5) * 1e3,
        p99=share(delays, 0.99) * 1e3,
    )


def share(ordered: Sequence[float], part: float) -> float:
    """Return the value that a part of the ordered values does not exceed; 0 if there are none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0
