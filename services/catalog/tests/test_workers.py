"""Two real workers of gunicorn over a real Redis, which is killed and started again."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from flask_eventbus.transport.embedded import find_executable

FOLDER = Path(__file__).parent.parent
PRODUCT = "/products/A1"

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


class Catalog:
    """The service with two workers, at an address."""

    def __init__(self, address: str, process: subprocess.Popen[bytes]) -> None:
        self._address = address
        self.process = process

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def put(self, path: str, body: object) -> Any:
        return self._ask("PUT", path, json.dumps(body))

    def get_many(self, path: str, count: int) -> list[Any]:
        """The answers to requests of which four come at a time, so that each worker gets some."""
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(self.get, [path] * count))

    def ask_both(self, path: str = PRODUCT) -> list[Any]:
        """The last answer of each worker."""
        found: dict[int, Any] = {}

        def have_answered() -> bool:
            found.update({answer["worker"]: answer for answer in self.get_many(path, 8)})
            return len(found) == 2

        wait_until(have_answered, "both workers answer")
        return list(found.values())

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=10)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.load(response)
        connection.close()
        assert response.status == 200, answer
        return answer


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    server = Redis(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def service(redis: Redis, tmp_path: Path) -> Iterator[Catalog]:
    log = tmp_path / "gunicorn.log"
    command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "2"]
    settings = {
        "FLASK_EVENTBUS_URL": redis.url,
        "FLASK_CATALOG_DATABASE": str(tmp_path / "catalog.db"),
    }
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
            address = wait_until(lambda: address_in(log, process), "gunicorn listens")
            service = Catalog(address, process)
            wait_until(lambda: all_cached(service), "both workers serve from their caches")
            yield service
        finally:
            process.terminate()


def test_after_a_change_no_worker_serves_the_old_price(service: Catalog) -> None:
    assert prices(service.ask_both()) == {"12.50"}

    service.put(f"{PRODUCT}/price", {"price": "13.00"})

    wait_until(lambda: prices(service.ask_both()) == {"13.00"}, "both workers serve the new price")
    assert prices(service.get_many(PRODUCT, 100)) == {"13.00"}
    assert all_cached(service)


def test_the_worker_that_changed_a_price_never_serves_the_old_one(service: Catalog) -> None:
    for price in ("21.00", "22.00", "23.00", "24.00", "25.00"):
        changed = service.put(f"{PRODUCT}/price", {"price": price})

        answers = service.get_many(PRODUCT, 40)
        assert prices(a for a in answers if a["worker"] == changed["worker"]) <= {price}


def test_no_old_price_is_served_during_and_after_an_outage_of_redis(
    service: Catalog, redis: Redis
) -> None:
    redis.kill()
    wait_until(lambda: not any_cached(service), "both workers serve from the store")
    service.put(f"{PRODUCT}/price", {"price": "14.00"})

    assert prices(service.get_many(PRODUCT, 50)) == {"14.00"}
    assert not any_cached(service)

    redis.start()
    seen = set()

    def is_as_before() -> bool:
        answers = service.ask_both()
        seen.update(prices(answers))
        return all(answer["cached"] for answer in answers)

    wait_until(is_as_before, "both workers serve from their caches again")
    assert seen == {"14.00"}

    service.put(f"{PRODUCT}/price", {"price": "15.00"})

    wait_until(lambda: prices(service.ask_both()) == {"15.00"}, "both workers serve the new price")
    assert prices(service.get_many(PRODUCT, 50)) == {"15.00"}


def test_no_process_is_left_when_the_service_ends(service: Catalog) -> None:
    workers = [answer["worker"] for answer in service.ask_both()]

    service.process.terminate()

    assert service.process.wait(timeout=30) == 0
    assert [worker for worker in workers if Path(f"/proc/{worker}").exists()] == []


def prices(answers: Iterable[Any]) -> set[str]:
    return {answer["price"] for answer in answers}


def all_cached(service: Catalog) -> bool:
    return all(answer["cached"] for answer in service.ask_both())


def any_cached(service: Catalog) -> bool:
    return any(answer["cached"] for answer in service.ask_both())


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
