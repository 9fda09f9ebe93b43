"""Fixtures that more than one test module uses."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import RedisServer
from workers import Workers

from flask_eventbus import Bus
from flask_eventbus.config import Timing
from flask_eventbus.node import nodes
from flask_eventbus.transport import timed_connection

pytest_plugins = ["pytester"]

#: What a test would only wait for, shorter than in a service. Its marks set others.
SHORT = {"list_streams_every": 0.2, "check_released_every": 1.0}

#: The files that take longest, the longest first: they start in this order, so that none ends last.
LONGEST = [
    "test_serving.py",
    "test_stream_outages.py",
    "test_demo.py",
    "test_stream_claims.py",
    "test_topologies.py",
    "test_stream_workers.py",
    "test_stream_ending.py",
    "test_running.py",
    "test_stream_settings.py",
    "test_damaged_streams.py",
    "test_outbox.py",
    "test_stream_bad_input.py",
    "test_memory.py",
    "test_sending.py",
    "test_attacks.py",
    "test_tailing.py",
    "test_time_limits.py",
    "test_contract.py",
    "test_stream_sending.py",
    "test_receiving.py",
    "test_testing_kit.py",
    "test_fork.py",
    "test_wire_format.py",
    "test_mailer.py",
    "test_stack.py",
    "test_requirements.py",
    "test_types.py",
]

# Without cached bytecode each program that a test starts would compile all it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what it runs in the background, and nohup, with SIGINT ignored: so would be the
# programs that tests end by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files start first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Leave what pytest collected out of garbage collections, of which tests make many."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real server of this test's own, running."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real server for tests that do not disturb it; use prefixes of your own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def public_api() -> Iterator[None]:
    """The connections use the public API of redis-py alone."""

    def lack() -> None:
        raise AttributeError("read_from_socket")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed_connection, "_try_private_names", lack)
        timed_connection.reason_for_public_api.cache_clear()
        yield

    timed_connection.reason_for_public_api.cache_clear()


@pytest.fixture
def workers(tmp_path: Path, shared_redis: RedisServer) -> Iterator[Workers]:
    """A service that reads streams, without a process yet."""
    service = Workers(tmp_path, shared_redis)
    service.set_up()
    yield service
    service.finish()


@pytest.fixture
def timing(request: pytest.FixtureRequest) -> Timing:
    """The times and sizes that ``@pytest.mark.timing`` sets, on the test or on its module."""
    values: dict[str, Any] = dict(SHORT)

    for mark in reversed(list(request.node.iter_markers("timing"))):
        values |= mark.kwargs

    return Timing(**values)


@pytest.fixture
def make_bus(timing: Timing) -> Iterator[Callable[..., Bus]]:
    """Make buses that are stopped when the test ends.

    Their ``send()`` waits longer than that of a service, so that it returns confirmed on a machine
    that is busy. A test of that time sets it.
    """
    buses: list[Bus] = []
    timing_of_test = timing

    def make(
        url: str, service: str = "tests", *, timing: Timing = timing_of_test, **settings: Any
    ) -> Bus:
        bus = Bus(url, service=service, _timing=timing, **{"timeout": 10.0, **settings})
        buses.append(bus)
        return bus

    yield make

    for bus in buses:
        bus.stop(flush=0)


@pytest.fixture(autouse=True)
def _forget_nodes() -> Iterator[None]:
    """Let no bus of another test take part: a blocked receiver or a module may keep it alive."""
    before = set(nodes)
    nodes.clear()
    yield
    nodes.clear()
    nodes.update(before)
