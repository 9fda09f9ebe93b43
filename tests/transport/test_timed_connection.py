"""Connections that keep a deadline: which class is used, and what the public API alone can do."""

from __future__ import annotations

import io
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.connection import DefaultParser
from servers import RedisServer
from waiting import wait_until

import flask_eventbus
from flask_eventbus import Bus
from flask_eventbus.transport.connection import Connection
from flask_eventbus.transport.connections import Connections
from flask_eventbus.transport.timed_connection import (
    PublicConnection,
    TimedConnection,
    class_for,
    reason_for_public_api,
)

Make = Callable[..., Bus]

#: Sends an event to itself, with the parser that redis-py uses without hiredis.
PROGRAM = """
import logging, sys, threading

import redis.connection
from redis._parsers import _RESP2Parser

redis.connection.DefaultParser = _RESP2Parser
logging.basicConfig(level="INFO", stream=sys.stdout)

from flask_eventbus import Bus

bus = Bus(sys.argv[1], service="shop", publish=["order_paid"], prefix="python-parser")
heard = threading.Event()

@bus.on("order_paid")
def receive(sender, **payload):
    heard.set()

bus.start()
assert bus.ready(10)
bus.signal("order_paid").send(None, order_id=5)
assert heard.wait(10)
bus.stop()
print("heard")
"""


@pytest.fixture
def untried() -> Iterator[None]:
    """The private names of redis-py are tried again, and after the test once more."""
    reason_for_public_api.cache_clear()
    yield
    reason_for_public_api.cache_clear()


@pytest.fixture(params=["private names", "public API"])
def connections(request: pytest.FixtureRequest, shared_redis: RedisServer) -> Connections:
    """Connections of either class."""
    if request.param == "public API":
        request.getfixturevalue("public_api")

    return Connections(shared_redis.url, name="tests")


@pytest.fixture
def connection(connections: Connections) -> Iterator[Connection]:
    """A connection of either class."""
    opened = connections.open(timeout=30.0)
    yield opened
    opened.disconnect()


# -- which class is used ------------------------------------------------------------------


@pytest.mark.usefixtures("untried")
def test_the_private_names_of_the_installed_redis_py_work() -> None:
    assert reason_for_public_api() is None
    assert issubclass(class_for(redis.Connection), TimedConnection)


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (DefaultParser, "read_from_socket"),
        (DefaultParser, "parse_error"),
        (redis.SSLConnection, "_wrap_socket_with_ssl"),
    ],
)
def test_without_a_private_name_the_public_api_is_used_and_the_log_says_so_once(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(next(each for each in owner.__mro__ if name in vars(each)), name)
    caplog.set_level(logging.INFO)

    assert issubclass(class_for(redis.Connection), PublicConnection)
    assert issubclass(class_for(redis.SSLConnection), PublicConnection)

    [message] = [each.getMessage() for each in caplog.records]
    assert message.startswith(f"redis-py {redis.__version__} with the parser ")
    assert name in message
    assert "Install a newer flask-eventbus" in message


@pytest.mark.usefixtures("untried")
def test_with_another_signature_the_public_api_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis.SSLConnection, "_wrap_socket_with_ssl", lambda self: None)

    assert "too many positional arguments" in str(reason_for_public_api())


@pytest.mark.usefixtures("untried")
def test_without_room_for_two_sockets_the_private_names_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)

    assert reason_for_public_api() is None


def test_with_a_parser_without_read_from_socket_an_event_arrives(shared_redis: RedisServer) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, shared_redis.url],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heard"
    assert result.stdout.count("with the parser _RESP2Parser lacks") == 1


def test_no_other_module_uses_names_that_redis_py_keeps_private() -> None:
    names = r"\b(_sock|_parser|_wrap_socket_with_ssl|read_from_socket|DefaultParser|redis\._\w+)\b"
    package = Path(flask_eventbus.__file__).parent
    others = [path for path in package.rglob("*.py") if path.name != "timed_connection.py"]

    assert len(others) > 50
    assert not [path for path in others if re.search(names, path.read_text())]


# -- what both classes do -----------------------------------------------------------------


def test_a_wait_ends_at_the_deadline_of_the_connection(connection: Connection) -> None:
    connection.set_deadline(time.monotonic() + 0.05)

    with pytest.raises(redis.TimeoutError):
        connection.read_response()

    assert not connection.is_open


def test_a_reply_that_has_arrived_is_read_after_the_deadline(connection: Connection) -> None:
    connection.send_command("PING")
    wait_until(lambda: connection.can_read(0), what="the reply has arrived")
    connection.set_deadline(time.monotonic() - 1)

    assert connection.read_response() == b"PONG"


def test_a_wait_that_may_go_on_keeps_the_connection(connection: Connection) -> None:
    connection.set_deadline(time.monotonic() + 0.05)

    with pytest.raises(redis.TimeoutError):
        connection.read_response(disconnect_on_error=False)

    connection.set_deadline(time.monotonic() + 10)
    connection.send_command("PING")
    assert connection.read_response() == b"PONG"


def test_another_thread_can_end_a_wait(connection: Connection) -> None:
    timer = threading.Timer(0.1, connection.shut_down)
    timer.start()

    with pytest.raises(redis.ConnectionError):
        connection.read_response()

    timer.join()


def test_a_closed_connection_is_not_opened_again(connection: Connection) -> None:
    connection.disconnect()

    assert not connection.is_open

    with pytest.raises(redis.ConnectionError):
        connection.send_command("PING")


def test_a_connection_tells_whether_a_reply_is_buffered(connection: Connection) -> None:
    assert not connection.has_buffered()

    connection.send_packed_command(connection.pack_commands([("PING",), ("ECHO", "second")]))
    assert connection.read_response() == b"PONG"
    wait_until(lambda: connection.can_read(0), what="the second reply has arrived")

    assert connection.read_response() == b"second"
    assert not connection.has_buffered()


def test_a_host_that_does_not_exist_is_an_outage(connections: Connections) -> None:
    unknown = Connections("redis://no-such-host.invalid:6379/0", name="tests")

    with pytest.raises(redis.ConnectionError, match=r"no-such-host\.invalid"):
        unknown.open(timeout=5.0)


# -- what the public API cannot do --------------------------------------------------------


@pytest.mark.usefixtures("public_api")
def test_the_public_api_has_no_descriptors_and_reads_whole_replies(
    shared_redis: RedisServer,
) -> None:
    connections = Connections(shared_redis.url, name="tests")
    connection = connections.open(timeout=5.0)

    assert not connections.has_descriptors
    assert connection.received_bytes() is None

    with pytest.raises(io.UnsupportedOperation):
        connection.fileno()

    connection.disconnect()


@pytest.mark.usefixtures("public_api")
def test_events_of_many_streams_arrive_with_the_public_api(
    make_bus: Make, shared_redis: RedisServer
) -> None:
    names = [f"order_{number}" for number in range(20)]
    streams = {name: {"via": "stream"} for name in names}
    shop = make_bus(shared_redis.url, "shop", publish=streams, prefix="many-public")
    audit = make_bus(shared_redis.url, "audit", prefix="many-public")
    heard: set[str] = set()

    for name in names:
        audit.on(name, via="stream")(partial(lambda sender, name, **_: heard.add(name), name=name))

    audit.start()
    assert audit.ready(10)

    for name in names:
        shop.signal(name).send(None, n=1)

    wait_until(lambda: len(heard) == len(names), what="an event of each stream is received")
