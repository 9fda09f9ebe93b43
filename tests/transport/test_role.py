"""A server that becomes a replica, or was one all along: nothing is published or received there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from proxies import Proxy
from servers import RedisServer, free_port
from waiting import wait_until

from flask_eventbus import Bus

pytestmark = pytest.mark.second_look("turns a running Redis server into a replica")

MakeBus = Callable[..., Bus]


def demote(server: RedisServer) -> int:
    """Make it the replica of a master that is not there; return that master's port."""
    port = free_port()

    with server.client as client:
        client.replicaof("127.0.0.1", port)

    return port


def promote(server: RedisServer) -> None:
    with server.client as client:
        client.replicaof("NO", "ONE")


def times_asked(server: RedisServer) -> int:
    """Return how often the server was asked for its role."""
    with server.client as client:
        found = client.info("commandstats").get("cmdstat_role", {"calls": 0})

    return int(found["calls"])


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    found = Proxy(redis_server.port)
    yield found
    found.close()


@pytest.mark.parametrize("via", ["channel", "stream"])
def test_a_publisher_keeps_its_events_while_its_server_is_a_replica(
    redis_server: RedisServer, make_bus: MakeBus, via: str
) -> None:
    received: list[int] = []
    listening = make_bus(redis_server.url, "clock")
    listening.on("tick")(lambda sender, number: received.append(number))
    listening.start()
    assert listening.ready(10)
    publisher = make_bus(redis_server.url, "shop", publish={"tick": via})
    tick = publisher.signal("tick")
    tick.send(number=0)
    wait_until(lambda: received == [0])

    demote(redis_server)
    wait_until(lambda: tick.send(number=1) or not publisher.health().publishing)
    tick.send(number=2)
    assert not publisher.flush(0.2)
    assert 2 not in received
    promote(redis_server)

    assert publisher.flush(10)
    wait_until(lambda: 2 in received, what="the event arrives")


@pytest.mark.timing(ping_after=0.1)
def test_an_idle_publisher_notices_that_its_server_became_a_replica(
    redis_server: RedisServer, make_bus: MakeBus
) -> None:
    publisher = make_bus(redis_server.url, "shop", publish=["tick"])
    publisher.signal("tick").send(number=0)
    assert publisher.flush(10)

    demote(redis_server)

    wait_until(lambda: not publisher.health().publishing, what="the outage is noticed")


@pytest.mark.timing(ask_role_every=0.0)
def test_a_batch_accepted_by_a_replica_is_published_again_at_the_master(
    redis_server: RedisServer, make_bus: MakeBus
) -> None:
    publish = {"tick": {"confirm": True}}
    publisher = make_bus(redis_server.url, "shop", publish=publish, timeout=2.0)
    publisher.signal("tick").send(number=0)
    demote(redis_server)

    publisher.signal("tick").send(number=1)

    assert publisher.health().buffered == 1
    assert not publisher.health().publishing


def test_the_log_names_the_master_of_the_replica_that_a_url_leads_to(
    redis_server: RedisServer, make_bus: MakeBus, caplog: pytest.LogCaptureFixture
) -> None:
    port = demote(redis_server)
    publisher = make_bus(redis_server.url, "shop", publish=["tick"])

    publisher.signal("tick").send(number=0)

    wait_until(lambda: f"a replica of 127.0.0.1:{port}, not a master" in caplog.text)


@pytest.mark.timing(ping_after=0.1)
def test_a_channel_listener_leaves_a_server_that_becomes_a_replica(
    redis_server: RedisServer, make_bus: MakeBus
) -> None:
    listening = make_bus(redis_server.url, "clock")
    listening.on("tick", via="channel")(lambda sender, **payload: None)
    listening.start()
    assert listening.ready(10)

    demote(redis_server)
    wait_until(lambda: not listening.health().connected, what="the listener leaves")
    promote(redis_server)

    wait_until(lambda: listening.health().connected, what="the listener is back")


@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
def test_a_stream_reader_leaves_a_server_that_becomes_a_replica(
    redis_server: RedisServer, make_bus: MakeBus, group: bool | None
) -> None:
    options: dict[str, Any] = {} if group else {"group": None}
    reading = make_bus(redis_server.url, "clock")
    reading.on("tick", via="stream", **options)(lambda sender, **payload: None)
    reading.start()
    assert reading.ready(10)

    demote(redis_server)
    before = times_asked(redis_server)
    wait_until(
        lambda: times_asked(redis_server) >= before + 5, what="the reader tries to come back"
    )
    assert not reading.health().connected
    promote(redis_server)

    wait_until(lambda: reading.health().connected, what="the reader is back")


@pytest.mark.timing(ask_role_every=3600.0)
def test_the_role_is_asked_at_most_once_a_second(
    redis_server: RedisServer, proxy: Proxy, make_bus: MakeBus
) -> None:
    asked = []

    def count() -> Callable[[bytes], bytes]:
        return lambda data: asked.append(data.count(b"ROLE")) or data  # type: ignore[func-returns-value]

    proxy.request = count
    publisher = make_bus(proxy.url, "shop", publish={"tick": "stream"})

    for number in range(50):
        publisher.signal("tick").send(number=number)

    assert len(asked) > 50
    assert sum(asked) == 1


def test_a_user_without_the_right_to_role_works_and_gets_one_warning(
    redis_server: RedisServer, make_bus: MakeBus, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server.client as client:
        client.acl_setuser("ada", True, passwords=["+pw"], categories=["+@all"], keys=["*"])
        client.execute_command("ACL", "SETUSER", "ada", "allchannels", "-role")

    url = redis_server.url.replace("://", "://ada:pw@")
    received: list[int] = []
    caplog.set_level(logging.WARNING)
    bus = make_bus(url, "shop", publish={"tick": "stream", "tock": "channel"})
    bus.on("tick", echo=True)(lambda sender, number: received.append(number))
    bus.start()
    assert bus.ready(10)
    bus.signal("tick").send(number=1)
    bus.signal("tock").send(number=2)

    # Here at once, and once more as it comes back.
    wait_until(lambda: received == [1, 1], what="the event is received")
    assert bus.flush(10)
    assert caplog.text.count("does not answer ROLE") == 1
    assert "'+role'" in caplog.text
