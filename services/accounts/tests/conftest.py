"""The service as a fresh module, as an app, and as a real process beside a real Redis."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from flask_eventbus.testing import Isolation
from flask_eventbus.transport.embedded import find_executable

FOLDER = Path(__file__).parent.parent


@pytest.fixture
def accounts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``app.py`` as nobody has used it before."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    return importlib.import_module("app")


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/accounts.db"


@pytest.fixture
def client(accounts: ModuleType, database: str, eventbus: Isolation) -> Iterator[FlaskClient]:
    """A client of the app, whose bus is the testing kit's."""
    app: Flask = accounts.create_app({"SQLALCHEMY_DATABASE_URI": database})
    assert app.test_cli_runner().invoke(args=["init-db"]).exit_code == 0
    yield app.test_client()

    with app.app_context():
        accounts.db.engine.dispose()


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A real server of this test's own, behind a socket."""
    socket = tmp_path / "redis.sock"
    words = ["--port", "0", "--unixsocket", str(socket), "--save", ""]

    with subprocess.Popen(
        [find_executable(), *words], cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as server:
        yield f"unix://{socket}"
        server.kill()


@pytest.fixture
def address(redis_url: str, database: str, tmp_path: Path) -> Iterator[str]:
    """Return the address at which gunicorn serves the service."""
    log = tmp_path / "gunicorn.log"
    command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "2"]
    settings = {"FLASK_EVENTBUS_URL": redis_url, "FLASK_SQLALCHEMY_DATABASE_URI": database}
    environment = os.environ | settings
    init_db = [sys.executable, "-m", "flask", "--app", "app", "init-db"]
    subprocess.run(init_db, cwd=FOLDER, env=environment, check=True)

    with (
        log.open("w") as output,
        subprocess.Popen(
            [*command, "--no-control-socket", "app:create_app()"],
            cwd=FOLDER,
            env=environment,
            stderr=output,
        ) as process,
    ):
        try:
            yield wait_until(lambda: address_in(log, process))
        finally:
            process.terminate()

    assert process.returncode == 0


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
