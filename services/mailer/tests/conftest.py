"""The service as a fresh module, as an app, and as a real process beside a real Redis."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from flask import Flask

from flask_eventbus import ConfigError
from flask_eventbus.embedded import find_executable

FOLDER = Path(__file__).parent.parent


@pytest.fixture
def mailer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``app.py`` as nobody has used it before."""
    spec = importlib.util.spec_from_file_location("app", FOLDER / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "app", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_app(mailer: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Flask]]:
    """Make the app with settings; it is stopped in the end."""
    apps = []

    def make(**settings: Any) -> Flask:
        settings = {"NEWSLETTER_FILE": str(tmp_path / "newsletter.db"), **settings}
        app: Flask = mailer.create_app(settings)
        apps.append(app)
        return app

    yield make

    for app in apps:
        mailer.bus.stop(app, flush=0)


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A real server of this test's own, behind a socket."""
    socket = tmp_path / "redis.sock"
    command = [server_program(), "--port", "0", "--unixsocket", str(socket), "--save", ""]

    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(socket.exists)
            yield f"unix://{socket}"
        finally:
            server.kill()


def server_program() -> str:
    try:
        return find_executable()
    except ConfigError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs redis-server: {error}")

        pytest.skip(f"This test needs redis-server: {error}")


class Sink:
    """``smtp_sink.py`` as a process; it can go away and come back on its port."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "mails.jsonl"
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def start(self) -> None:
        command = [sys.executable, "smtp_sink.py", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--file", str(self._file)], cwd=FOLDER, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().rpartition(":")[2].rstrip(".\n"))

    def stop(self) -> None:
        if self._process is None:
            return

        self._process.terminate()
        self._process.communicate(timeout=10)
        assert self._process.returncode == 0
        self._process = None

    def mails(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []

        with self._file.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    """An SMTP server that keeps what it gets."""
    sink = Sink(tmp_path)

    try:
        sink.start()
        yield sink
    finally:
        sink.stop()


class Service:
    """The mailer, served by ``flask run``."""

    def __init__(self, address: str, log: Path) -> None:
        self.log = log
        self._address = address

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of an answer."""
        try:
            with urlopen(f"{self._address}{path}", timeout=10) as answer:  # noqa: S310 - its own
                return answer.status, json.load(answer)
        except HTTPError as error:
            with error:
                return error.code, json.load(error)


@pytest.fixture
def service(redis_url: str, sink: Sink, tmp_path: Path) -> Iterator[Service]:
    """The mailer as a process, listening."""
    log = tmp_path / "mailer.log"
    command = [sys.executable, "-m", "flask", "--app", "app", "run", "--port", "0"]
    settings = {
        "FLASK_EVENTBUS_URL": redis_url,
        "FLASK_MAIL_HOST": "127.0.0.1",
        "FLASK_MAIL_PORT": str(sink.port),
        "FLASK_NEWSLETTER_FILE": str(tmp_path / "newsletter.db"),
    }

    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=FOLDER, env=os.environ | settings, stdout=output, stderr=output
        ) as process,
    ):
        try:
            service = Service(wait_until(lambda: address_in(log, process)), log)
            wait_until(lambda: service.get("/health")[0] == 200)
            yield service
        finally:
            process.terminate()


def address_in(log: Path, process: subprocess.Popen[bytes]) -> str | None:
    """The address that a server says it serves at."""
    text = log.read_text()
    assert process.poll() is None, text
    found = re.search(r"http://\S+", text)
    return found and found.group()


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
