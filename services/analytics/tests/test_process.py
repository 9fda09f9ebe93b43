"""The service as a process beside a real Redis, which is killed and started again."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from flask_eventbus import Bus
from flask_eventbus.transport.embedded import find_executable

FOLDER = Path(__file__).parent.parent

T = TypeVar("T")


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


class Analytics:
    """The service at an address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._address, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, body

    def is_listening(self) -> bool:
        return self.get("/health")[0] == 200

    def services(self) -> dict[str, Any]:
        counts = json.loads(self.get("/counts.json")[1])
        return {service["name"]: service for service in counts["services"]}

    def total(self, service: str) -> int:
        found = self.services().get(service)
        return found["total"] if found else 0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def service(redis: Redis, tmp_path: Path) -> Iterator[Analytics]:
    log = tmp_path / "gunicorn.log"
    command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--threads", "4"]

    with (
        log.open("w") as output,
        subprocess.Popen(
            [*command, "--no-control-socket", "app:create_app()"],
            cwd=FOLDER,
            env=os.environ | {"FLASK_EVENTBUS_URL": redis.url},
            stderr=output,
        ) as process,
    ):
        try:
            service = Analytics(wait_until(lambda: address_in(log, process), "gunicorn listens"))
            wait_until(service.is_listening, "it listens")
            yield service
        finally:
            process.terminate()

    assert process.returncode == 0


@pytest.fixture
def call(redis: Redis) -> Iterator[Callable[[str], None]]:
    """Publish one call as another service."""
    buses: dict[str, Bus] = {}

    def emit(service: str) -> None:
        if service not in buses:
            buses[service] = Bus(redis.url, service=service, publish=["api_call"])

        buses[service].signal("api_call").send(
            None, method="GET", rule="/", status=200, milliseconds=2.5
        )

    yield emit

    for bus in buses.values():
        bus.stop(flush=0)


def test_calls_of_several_services_arrive(service: Analytics, call: Callable[[str], None]) -> None:
    for name in ("accounts", "catalog", "catalog"):
        call(name)

    wait_until(lambda: service.total("catalog") == 2, "both calls of catalog are counted")
    wait_until(lambda: service.total("accounts") == 1, "the call of accounts is counted")
    wait_until(lambda: sum(service.services()["catalog"]["per_second"]) == 2, "they are shown")
    assert service.services()["catalog"]["median"] == 2.5
    assert service.get("/")[0] == 200


def test_counting_continues_after_an_outage_of_redis(
    service: Analytics, call: Callable[[str], None], redis: Redis
) -> None:
    call("catalog")
    wait_until(lambda: service.total("catalog") == 1, "the first call is counted")

    redis.kill()
    wait_until(lambda: not service.is_listening(), "it notices the outage")
    assert service.get("/counts.json")[0] == 200

    redis.start()
    wait_until(service.is_listening, "it listens again")
    call("catalog")

    wait_until(lambda: service.total("catalog") == 2, "the next call is counted")


def address_in(log: Path, process: subprocess.Popen[bytes]) -> str | None:
    """The host and port that gunicorn says it listens at."""
    text = log.read_text()
    assert process.poll() is None, text
    found = re.search(r"http://(\S+)", text)
    return found and found[1]


def wait_until(condition: Callable[[], T | None], what: str, timeout: float = 30.0) -> T:
    """Return what the condition returns as soon as it is true."""
    deadline = time.monotonic() + timeout

    while not (result := condition()):
        assert time.monotonic() < deadline, f"Not so after {timeout} s: {what}"
        time.sleep(0.02)

    return result
