"""The script as a fresh module, and as a real process beside a Redis that can be killed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flask_eventbus.transport.embedded import find_executable

FOLDER = Path(__file__).parent.parent


class Trail:
    """The file that audit writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, what: str | None = None) -> list[dict[str, Any]]:
        """The lines, or those of one kind."""
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        # The last part has no end yet; other ends of lines may stand in a payload.
        whole = text.split("\n")[:-1]
        lines = [json.loads(line, parse_constant=refuse) for line in whole]
        return [line for line in lines if what in (None, line["what"])]


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON.")


@pytest.fixture
def trail(tmp_path: Path) -> Trail:
    return Trail(tmp_path / "audit.jsonl")


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, trail: Trail) -> ModuleType:
    """``audit.py`` as nobody has used it before."""
    monkeypatch.setenv("AUDIT_FILE", str(trail.path))
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "audit", raising=False)
    return importlib.import_module("audit")


class Redis:
    """A real server of this test's own, behind a socket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "redis.sock"
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        words = ["--port", "0", "--unixsocket", str(self._socket), "--save", ""]
        self._process = subprocess.Popen(
            [find_executable(), *words], cwd=self._folder, stdout=subprocess.DEVNULL
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def run(redis_server: Redis, trail: Trail) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start the script, and wait until it listens."""
    settings = {"EVENTBUS_URL": redis_server.url, "AUDIT_FILE": str(trail.path)}
    processes: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        known = len(trail.lines("connected"))
        command = [sys.executable, "audit.py"]
        processes.append(subprocess.Popen(command, cwd=FOLDER, env=os.environ | settings))
        wait_until(lambda: len(trail.lines("connected")) > known)
        return processes[-1]

    yield run

    for process in processes:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture
def process(run: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """The script, listening."""
    return run()


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[..., Any]:
    return wait_until


def wait_until(condition: Callable[[], Any], timeout: float = 20.0) -> Any:
    """Return what the condition returns as soon as it is true."""
    deadline = time.monotonic() + timeout

    while not (result := condition()):
        assert time.monotonic() < deadline, f"Not so after {timeout} s: {condition}"
        time.sleep(0.02)

    return result
