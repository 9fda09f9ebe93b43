"""Bad connections and strange servers: nothing hangs, nothing is lost without being counted."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from proxies import Impostor, Proxy
from servers import RedisServer, free_port
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, PublishError, signals
from flask_eventbus.transport.connections import Connections
from flask_eventbus.typing import Via

pytestmark = [
    pytest.mark.second_look("cuts and delays connections while events arrive"),
    pytest.mark.timing(
        tick=0.1,
        ping_after=0.5,
        ping_timeout=0.5,
        max_listener_backoff=0.2,
        max_writer_backoff=0.2,
        listeners_return=0.4,
        write_timeout=0.4,
    ),
]

Make = Callable[..., Bus]


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """A connection to the server that a test may spoil."""
    proxy = Proxy(redis_server.port)
    yield proxy
    proxy.close()


def received_by(bus: Bus, name: str = "tick", *, via: Via | None = None) -> list[Any]:
    """Start listening to ``name`` and return the list that its numbers go to."""
    received: list[Any] = []

    @bus.on(name, via=via)
    def receive(sender: str, n: int, **extra: Any) -> None:
        received.append(n)

    bus.start()
    assert bus.ready(10)
    return received


def changes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The first words of what was logged as lost and regained, by both halves."""
    texts = [record.getMessage() for record in caplog.records]
    return [t[:16] for t in texts if "lost Redis" in t or "is back" in t or "is away" in t]


# -- connections that break ---------------------------------------------------------------


@pytest.mark.timing(ping_after=0.05)
def test_a_connection_closed_while_idle_is_not_an_outage(
    redis_server: RedisServer,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    received = received_by(make_bus(redis_server.url, "consumer"), via="channel")
    publisher = make_bus(
        redis_server.url, publish={"tick": {"confirm": True}}, on_outage="raise", timeout=5
    )

    for n in range(3):
        publisher.signal("tick").send("test", n=n)
        before = latest_connection(redis_server)
        # As a server's `timeout`, or a firewall, does with connections that say nothing.
        redis_server.client.execute_command("CLIENT", "KILL", "TYPE", "normal")
        wait_until(newer_than(before, redis_server), what="it connects again")

    wait_until(lambda: received == [0, 1, 2], what="all events arrive")
    assert changes(caplog) == []


def latest_connection(server: RedisServer) -> int:
    """The number of the latest connection of a publisher."""
    clients = server.client.client_list(_type="normal")
    ours = [int(found["id"]) for found in clients if found["name"].startswith("eventbus")]
    return max(ours, default=0)


def newer_than(before: int, server: RedisServer) -> Callable[[], bool]:
    return lambda: latest_connection(server) > before


@pytest.mark.timing(ping_after=0.05)
def test_an_idle_publisher_knows_that_redis_is_away(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publisher = make_bus(redis_server.url, publish=["tick"], on_outage="raise")
    publisher.signal("tick").send("test")
    assert publisher.flush(10)

    redis_server.kill()
    wait_until(lambda: not publisher.health().publishing, what="the loss is known")
    with pytest.raises(PublishError):
        publisher.signal("tick").send("test")
    redis_server.start()

    wait_until(lambda: publisher.health().publishing, what="the return is known")


def test_every_event_lost_by_constantly_killed_connections_is_counted(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = make_bus(redis_server.url, "consumer")
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    received = received_by(consumer)
    calm = threading.Event()

    def kill() -> None:
        client = redis_server.client
        while not calm.wait(0.02):
            client.execute_command("CLIENT", "KILL", "SKIPME", "yes")

    killing = threading.Thread(target=kill)
    publisher.signal("tick").send("test", n=0)
    wait_until(lambda: received == [0], what="the first event arrives")
    killing.start()
    for n in range(1, 1000):
        publisher.signal("tick").send("test", n=n)
        time.sleep(0.001)
    calm.set()
    killing.join()
    assert publisher.flush(10)
    assert consumer.ready(10)
    publisher.signal("tick").send("test", n=1000)

    wait_until(lambda: received[-1:] == [1000], what="the last event arrives")
    assert received == sorted(set(received))
    assert len(received) + consumer.health().missed == 1001
    # A connection that comes and goes does not fill the log.
    assert len(changes(caplog)) <= 4 * 10


@pytest.mark.timing(listeners_return=0.0)
def test_after_a_connection_breaks_in_a_large_batch_smaller_ones_pass(
    redis_server: RedisServer, proxy: Proxy, make_bus: Make
) -> None:
    received = received_by(make_bus(redis_server.url, "consumer"))
    publisher = make_bus(proxy.url, "publisher", publish=["tick"])

    def ending() -> Callable[[bytes], bytes | None]:
        passed: list[int] = []

        def passing(data: bytes) -> bytes | None:
            passed.append(len(data))
            return data if sum(passed) < 60_000 else None

        return passing

    proxy.request = ending
    for n in range(100):
        publisher.signal("tick").send("test", n=n, text="x" * 2_000)

    wait_until(lambda: len(received) == 100, timeout=20, what="all events arrive")
    assert received == list(range(100))


def test_late_replies_count_as_an_outage_and_nothing_arrives_twice(
    redis_server: RedisServer, proxy: Proxy, make_bus: Make
) -> None:
    received = received_by(make_bus(redis_server.url, "consumer"))
    publisher = make_bus(proxy.url, "publisher", publish=["tick"])
    slow = threading.Event()
    slow.set()

    def late(data: bytes) -> bytes:
        if slow.is_set() and data.startswith(b":"):
            time.sleep(1)
        return data

    proxy.answer = lambda: late
    for n in range(20):
        publisher.signal("tick").send("test", n=n)
    wait_until(lambda: not publisher.health().publishing, what="the outage is known")
    slow.clear()

    assert publisher.flush(10)
    publisher.signal("tick").send("test", n=20)
    wait_until(lambda: received[-1:] == [20], what="the last event arrives")
    assert received == list(range(21))


@pytest.mark.timing(ping_after=60.0)
def test_a_message_that_comes_in_two_halves_arrives_whole(
    redis_server: RedisServer, proxy: Proxy, make_bus: Make
) -> None:
    halves = threading.Event()

    def stalling(data: bytes) -> bytes:
        if b"halve me" in data and not halves.is_set():
            halves.set()
            proxy._sockets[-2].sendall(data[:60])
            time.sleep(0.5)  # the reader's tick passes five times
            return data[60:]
        return data

    proxy.answer = lambda: stalling
    consumer = make_bus(proxy.url, "consumer")
    received = received_by(consumer, via="channel")
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    publisher.signal("tick").send("test", n=1, text="halve me")
    publisher.signal("tick").send("test", n=2)

    wait_until(lambda: received == [1, 2], what="both events arrive")
    assert halves.is_set()
    assert proxy.connections == 1
    assert consumer.health().missed == 0


def test_a_closed_connection_does_not_reconnect_by_itself(redis_server: RedisServer) -> None:
    connection = Connections(redis_server.url, name="tests").open(timeout=1)
    connection.disconnect()

    with pytest.raises(redis.ConnectionError, match="The connection was closed"):
        connection.send_packed_command(connection.pack_commands([("PING",)]))
    with pytest.raises(redis.ConnectionError, match="The connection was closed"):
        connection.can_read()


# -- servers that answer something else ---------------------------------------------------

STRANGE = {
    "another protocol": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
    "nonsense": bytes(range(128, 256)),
    "a number": b":1\r\n",
    "nothing": b"$-1\r\n",
    "silence": b"",
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "no more clients": b"-ERR max number of clients reached\r\n",
    "a wrong password": b"-WRONGPASS invalid username-password pair or user is disabled.\r\n",
    "an error": b"-ERR unknown command\r\n",
}


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE)
def test_a_foreign_server_in_place_of_redis_is_an_outage_until_it_is_gone(
    redis_server: RedisServer,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
    answer: bytes,
) -> None:
    redis_server.kill()
    impostor = Impostor(answer, port=redis_server.port)
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    consumer = make_bus(redis_server.url, "consumer")
    received: list[int] = []
    consumer.on("tick")(lambda sender, n: received.append(n))
    consumer.start()
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: impostor.connections >= 6, what="both tried again and again")
    # A number is what PUBLISH answers, so that this one is taken for sent.
    assert publisher.health().buffered == 1 or answer.startswith((b":", b"$"))
    assert not consumer.health().connected
    impostor.close()
    redis_server.start()

    assert consumer.ready(10)
    assert publisher.flush(10)
    publisher.signal("tick").send("test", n=2)
    wait_until(lambda: received[-1:] == [2], what="the last event arrives")
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 6


PASSING = [
    "LOADING Redis is loading the dataset in memory",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "READONLY You can't write against a read only replica.",
    "CLUSTERDOWN The cluster is down",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "NOAUTH Authentication required.",
]


@pytest.mark.parametrize("error", PASSING, ids=[error.split()[0] for error in PASSING])
def test_a_temporary_error_keeps_events_and_subscriptions(
    redis_server: RedisServer, proxy: Proxy, make_bus: Make, error: str
) -> None:
    hindered = threading.Event()
    hindered.set()

    def hindering(data: bytes) -> bytes:
        served = data.startswith((b":", b"*3\r\n$9\r\nsubscribe"))
        return f"-{error}\r\n".encode() if hindered.is_set() and served else data

    proxy.answer = lambda: hindering
    consumer = make_bus(proxy.url, "consumer")
    publisher = make_bus(proxy.url, "publisher", publish=["tick"])
    received: list[int] = []
    consumer.on("tick")(lambda sender, n: received.append(n))
    consumer.start()
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: not publisher.health().publishing, what="the publisher waits")
    assert not consumer.ready(0.2)
    assert consumer.health().refused == {}
    hindered.clear()

    assert consumer.ready(10)
    assert publisher.flush(10)
    assert publisher.health().counts.get("refused", 0) == 0
    publisher.signal("tick").send("test", n=2)
    wait_until(lambda: received[-1:] == [2], what="the next event arrives")


def test_a_script_that_keeps_redis_busy_loses_no_event(
    redis_server: RedisServer, make_bus: Make
) -> None:
    redis_server.client.config_set("busy-reply-threshold", 20)
    received = received_by(make_bus(redis_server.url, "consumer"))
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: received == [1], what="the first event arrives")

    def work() -> None:
        with pytest.raises(Exception, match="killed"):
            redis_server.client.eval("while true do end", 0)

    working = threading.Thread(target=work)
    working.start()
    wait_until(lambda: not redis_server.answers(), what="Redis is busy")
    publisher.signal("tick").send("test", n=2)
    wait_until(lambda: not publisher.health().publishing, what="the outage is known")
    redis_server.client.execute_command("SCRIPT", "KILL")
    working.join()

    assert publisher.flush(10)
    wait_until(lambda: received == [1, 2], what="the second event arrives")


def test_a_password_that_is_wrong_works_once_it_is_right(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    url = redis_server.url.replace("://", "://:secret-word@")
    admin = redis_server.client
    admin.config_set("requirepass", "another")
    publisher = make_bus(url, "publisher", publish=["tick"])
    consumer = make_bus(url, "consumer")
    received: list[int] = []
    consumer.on("tick")(lambda sender, n: received.append(n))
    consumer.start()
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: not publisher.health().publishing, what="the refusal is known")
    admin.config_set("requirepass", "secret-word")

    assert consumer.ready(10)
    assert publisher.flush(10)
    publisher.signal("tick").send("test", n=2)
    wait_until(lambda: received[-1:] == [2], what="the next event arrives")
    assert "secret-word" not in caplog.text


def test_a_server_with_too_many_clients_is_used_once_it_has_room(
    redis_server: RedisServer, make_bus: Make
) -> None:
    admin = redis_server.client
    admin.ping()
    admin.config_set("maxclients", 1)
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    consumer = make_bus(redis_server.url, "consumer")
    received: list[int] = []
    consumer.on("tick")(lambda sender, n: received.append(n))
    consumer.start()
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: not publisher.health().publishing, what="the refusal is known")
    admin.config_set("maxclients", 100)

    assert consumer.ready(10)
    assert publisher.flush(10)
    wait_until(lambda: received == [1], what="the event arrives")


def test_a_server_without_the_command_client_is_usable(
    tmp_path: Path, request: pytest.FixtureRequest, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path, "--rename-command", "CLIENT", "")
    server.start()
    request.addfinalizer(server.kill)
    received: list[int] = []
    bus = make_bus(server.url, publish={"tick": "stream", "tock": {"confirm": True}})
    other = make_bus(server.url, "mailer")

    for name in ("tick", "tock"):
        other.on(name)(lambda sender, n: received.append(n))

    other.start()
    assert other.ready(10)
    bus.signal("tick").send(n=1)
    bus.signal("tock").send(n=2)

    wait_until(lambda: sorted(received) == [1, 2], what="both events arrive")
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2, "one of each bus"
    assert all("Remove CLIENT from 'rename-command' in the server's" in line for line in lines)


def test_operator_commands_work_without_the_command_client_and_do_not_warn(
    tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path, "--rename-command", "CLIENT", "")
    server.start()
    request.addfinalizer(server.kill)
    store = StreamStore(server)
    store.add("tick", n=1)

    outcome = store.run("status", service=None)
    checked = store.run("check", service=None)
    server.kill()

    assert outcome.exit_code == 0, outcome.output
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert "with args" not in checked.output


def test_an_operator_command_that_needs_a_renamed_command_names_the_remedy(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = RedisServer(tmp_path, "--rename-command", "XPENDING", "")
    server.start()
    request.addfinalizer(server.kill)
    store = StreamStore(server)
    store.add("tick", n=1)
    store.group("tick")
    store.read("tick", 1)

    outcome = store.run("status")

    assert outcome.exit_code == 1
    assert "unknown command 'XPENDING'. Remove the command from 'rename-command'" in outcome.output


def test_an_unresolvable_host_name_is_retried_until_it_resolves(
    redis_server: RedisServer, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    known = threading.Event()

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "redis.invalid" and not known.is_set():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve("127.0.0.1" if host == "redis.invalid" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    url = f"redis://redis.invalid:{redis_server.port}/0"
    publisher = make_bus(url, "publisher", publish=["tick"])
    consumer = make_bus(url, "consumer")
    received: list[int] = []
    consumer.on("tick")(lambda sender, n: received.append(n))
    consumer.start()
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: not publisher.health().publishing, what="the outage is known")
    known.set()

    assert consumer.ready(10)
    assert publisher.flush(10)
    wait_until(lambda: received == [1], what="the event arrives")


@pytest.mark.timing(listener_end=0.2)
def test_stop_does_not_wait_for_a_silent_name_server(
    make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        asked.set()
        answered.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    bus = make_bus(f"redis://redis.invalid:{free_port()}/0", publish=["tick"])
    bus.on("tick")(lambda sender: None)
    bus.start()
    bus.signal("tick").send("test")
    assert asked.wait(10)

    began = time.monotonic()
    bus.stop(flush=0.1)

    assert time.monotonic() - began < 5
    assert bus.health().counts["dropped"] == 1
    answered.set()


# -- what is refused ----------------------------------------------------------------------


def test_a_refused_subscription_is_retried_under_load(
    redis_server: RedisServer, make_bus: Make
) -> None:
    admin = redis_server.client
    admin.execute_command("ACL", "SETUSER", "default", "resetchannels", "&eventbus:{tick}:*")
    consumer = make_bus(redis_server.url, "consumer")
    consumer.on("tock")(lambda sender, n: None)
    consumer.on("tick")(lambda sender, n: None)
    consumer.start()
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    wait_until(lambda: consumer.health().refused, what="the refusal is known")
    admin.execute_command("ACL", "SETUSER", "default", "allchannels")

    def granted() -> bool:
        publisher.signal("tick").send("test", n=1)
        return consumer.health().connected

    wait_until(granted, what="the refused subscription is granted")


def test_a_lost_connection_and_its_return_are_signalled_despite_a_refused_subscription(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[str] = []
    note_lost = noting("lost", reported)
    note_connected = noting("connected", reported)
    admin = redis_server.client
    admin.execute_command("ACL", "SETUSER", "default", "resetchannels", "&eventbus:{tick}:*")
    consumer = make_bus(redis_server.url, "consumer")
    consumer.on("tock")(lambda sender, n: None)
    consumer.on("tick")(lambda sender, n: None)

    with (
        signals.listener_lost.connected_to(note_lost, sender="consumer"),
        signals.listener_connected.connected_to(note_connected, sender="consumer"),
    ):
        consumer.start()
        for times in range(3):
            wait_until(lambda: reported.count("connected") > times, what="it is connected")  # noqa: B023 - it is called at once
            admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            # It may be connected again by the time that this looks.
            wait_until(lambda: reported.count("lost") > times, what="the loss is reported")  # noqa: B023 - it is called at once

    assert reported[:6] == ["connected", "lost"] * 3


def noting(word: str, reported: list[str]) -> Callable[..., None]:
    def note(sender: str, **values: Any) -> None:
        reported.append(word)

    return note
