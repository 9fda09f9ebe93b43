"""The service as a fresh module, as an app, and as a real process beside a real Redis."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import redis
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session
from flask import Flask

from flask_eventbus.transport.embedded import find_executable

FOLDER = Path(__file__).parent.parent

# From Python 3.13 a certificate is refused that does not say what it may be used for.
USE = ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]


@pytest.fixture
def mailer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``app.py`` as nobody has used it before."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    return importlib.import_module("app")


@pytest.fixture
def make_app(mailer: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Flask]]:
    """Make the app with settings; it is stopped in the end."""
    apps = []

    def make(**settings: Any) -> Flask:
        app: Flask = mailer.create_app({**files(tmp_path), **settings})
        assert app.test_cli_runner().invoke(args=["init-db"]).exit_code == 0
        apps.append(app)
        return app

    yield make

    for app in apps:
        mailer.bus.stop(app, flush=0)

    mailer.mailbox.close()


def files(folder: Path) -> dict[str, str]:
    """Return the settings that name the files of the service."""
    names = {"BOOK_FILE": "book.db", "NEWSLETTER_FILE": "newsletter.db"}
    return {key: str(folder / name) for key, name in names.items()}


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


class Sink:
    """``smtp_sink.py`` as a process; it can go away and come back on its port."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "mails.jsonl"
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def start(self, *, pause: float = 0.0) -> None:
        """Take mails, and as many seconds for each as ``pause``."""
        command = [sys.executable, "smtp_sink.py", "--port", str(self.port), f"--pause={pause}"]
        self._process = subprocess.Popen(
            [*command, "--file", str(self._file)], cwd=FOLDER, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().rpartition(":")[2].rstrip(".\n"))

    def stop(self) -> None:
        if self._process is None:
            return

        self._process.terminate()
        self._process.communicate(timeout=30)
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


class SmtpServer(Controller):
    """An SMTP server within the test, which knows over which connection each mail came.

    :param certificate: a file with a certificate and its key; the server then asks for encryption
        and for the password of the user ``mailer``.
    """

    password = "a pass word"  # noqa: S105 - of this test

    def __init__(self, certificate: Path | None = None) -> None:
        self.certificate = certificate
        #: For each mail the number of its connection, and who logged in.
        self.mails: list[tuple[int, str | None]] = []
        self._sessions: list[Session] = []
        self._transports: list[asyncio.BaseTransport] = []
        #: The transports of all connections, also of those on which no mail came.
        self._opened: list[asyncio.BaseTransport] = []
        super().__init__(self, hostname="localhost", port=free_port(), **self._security())

    def hang_up(self) -> None:
        """Close every connection, as servers do with those that wait for long."""
        for transport in self._transports:
            self.loop.call_soon_threadsafe(transport.close)

        wait_until(lambda: all(transport.is_closing() for transport in self._transports))

    def factory(self) -> SMTP:
        server: SMTP = super().factory()  # type: ignore[no-untyped-call]
        connection_made = server.connection_made

        def note(transport: asyncio.BaseTransport) -> None:
            self._opened.append(transport)
            connection_made(transport)

        server.connection_made = note  # type: ignore[method-assign]
        return server

    def stop(self, no_assert: bool = False) -> None:
        """Close what clients and aiosmtpd left open, and end the server."""

        async def close() -> None:
            for transport in self._opened:
                transport.abort()  # type: ignore[attr-defined]

            # They are closed in the next rounds of the loop.
            for _ in range(3):
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(close(), self.loop).result(10)
        super().stop(no_assert)

    async def handle_MAIL(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if session not in self._sessions and server.transport is not None:
            self._sessions.append(session)
            self._transports.append(server.transport)

        envelope.mail_from = address
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's name
        login = session.auth_data.login.decode() if session.auth_data else None
        self.mails.append((self._sessions.index(session) + 1, login))
        return "250 OK"

    def _security(self) -> dict[str, Any]:
        if self.certificate is None:
            return {}

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        return {
            "tls_context": context,
            "require_starttls": True,
            "auth_required": True,
            "authenticator": self._authenticate,
        }

    def _authenticate(self, *given: Any) -> AuthResult:
        data = given[-1]
        return AuthResult(success=data.password.decode() == self.password, auth_data=data)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def smtp_server() -> Iterator[SmtpServer]:
    yield from run(SmtpServer())


@pytest.fixture
def secure_smtp_server(tmp_path: Path) -> Iterator[SmtpServer]:
    """A server that asks for encryption and for a password."""
    if shutil.which("openssl") is None:
        pytest.skip("This test needs openssl.")

    file = tmp_path / "smtp.pem"
    key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-keyout",
        str(file),
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", str(file)]
    command = ["openssl", "req", "-x509", *USE, "-days", "2", *key, *names]
    subprocess.run(command, check=True, capture_output=True)
    yield from run(SmtpServer(file))


def run(server: SmtpServer) -> Iterator[SmtpServer]:
    server.start()
    yield server
    server.stop()
    # What it left open is reported here, and not in a later test.
    gc.collect()


class Service:
    """The mailer as its processes: what serves HTTP, and workers."""

    def __init__(self, folder: Path, redis_url: str, smtp_port: int) -> None:
        self.log = folder / "mailer.log"
        self._book = folder / "book.db"
        self._redis_url = redis_url
        self._processes: list[subprocess.Popen[bytes]] = []
        self._settings = {
            "FLASK_EVENTBUS_URL": redis_url,
            # So that what a killed worker left is taken over within a second or two.
            "FLASK_EVENTBUS_CLAIM_AFTER": "1",
            "FLASK_MAIL_HOST": "127.0.0.1",
            "FLASK_MAIL_PORT": str(smtp_port),
            **{f"FLASK_{key}": path for key, path in files(folder).items()},
        }
        assert self._start("init-db").wait(20) == 0, self.log.read_text()
        self._processes.clear()

    def serve(self) -> str:
        """Start what serves HTTP; its address."""
        process = self._start("run", "--port", "0")
        return str(wait_until(lambda: address_in(self.log, process)))

    def work(self, count: int) -> None:
        """Start so many workers, and wait until they read the stream."""
        for _ in range(count):
            self._start("eventbus", "run")

        said = "Reading the streams of user_registered"
        wait_until(lambda: self.log.read_text().count(said) == count)

    def consumers(self) -> set[int]:
        """Return the process ids of the workers that got an entry of the stream."""
        with redis.Redis.from_url(self._redis_url) as client:
            found = client.xinfo_consumers("eventbus:{user_registered}:stream", "mailer")

        return {int(each["name"].split(b"-")[-2]) for each in found}

    def sent_by(self) -> dict[int, int]:
        """Return the number of mails in the book, by the process id of the worker."""
        with closing(sqlite3.connect(self._book)) as book:
            found = book.execute("SELECT worker, count(*) FROM mail GROUP BY worker").fetchall()

        return {int(name.rpartition("-")[2]): count for name, count in found}

    def kill(self, pid: int) -> None:
        """Let a process end as by a crash."""
        [process] = [process for process in self._processes if process.pid == pid]
        process.kill()
        process.wait()

    def end(self) -> list[int]:
        """End what still runs; the exit codes of all."""
        for process in self._processes:
            process.terminate()

        return [process.wait(timeout=20) for process in self._processes]

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flask", "--app", "app", *words]

        with self.log.open("a") as log:
            process = subprocess.Popen(
                command, cwd=FOLDER, env=os.environ | self._settings, stdout=log, stderr=log
            )

        self._processes.append(process)
        return process


@pytest.fixture
def service(redis_url: str, sink: Sink, tmp_path: Path) -> Iterator[Service]:
    """The mailer as processes that a test starts."""
    service = Service(tmp_path, redis_url, sink.port)
    yield service
    service.end()


def get(url: str) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an answer."""
    try:
        with urlopen(url, timeout=10) as answer:  # noqa: S310 - the service's own
            return answer.status, json.load(answer)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.fixture(name="get")
def get_fixture() -> Callable[[str], tuple[int, dict[str, Any]]]:
    return get


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
