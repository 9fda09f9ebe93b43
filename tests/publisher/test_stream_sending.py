"""Sending into streams: what is confirmed is there, whatever happens to Redis meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from proxies import Proxy
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus, PayloadError, PublishError, signals
from flask_eventbus.admin.server import publish_one
from flask_eventbus.config import Age, Config, Timing
from flask_eventbus.publisher.connection import PublishConnection
from flask_eventbus.publisher.message import (
    ChannelDestination,
    Destination,
    Message,
    StreamDestination,
    TooFewReplicasError,
)
from flask_eventbus.publisher.writer import LEAD_BYTES, Writer
from flask_eventbus.signals import wait_until_sent
from flask_eventbus.transport.connections import Connections

pytestmark = [
    pytest.mark.second_look("hangs and kills Redis servers while events are sent"),
    pytest.mark.timing(listeners_return=0.0, max_writer_backoff=0.2),
]

Make = Callable[..., Bus]

#: Seconds that a slow machine may take beyond what a caller is held.
SLACK = 2.0


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own on the shared server."""
    return str(request.node.name)[:60].replace("[", "-").replace("]", "")


def entries(server: RedisServer, name: str = "tick", prefix: str = "eventbus") -> list[Any]:
    """The events of a stream, each a map, in order."""
    with server.client as client:
        found = client.xrange(f"{prefix}:{{{name}}}:stream")

    return [msgpack.unpackb(fields[b"event"], timestamp=3) for _, fields in found]


def values(server: RedisServer, name: str = "tick", prefix: str = "eventbus") -> list[int]:
    """The numbers that the events of a stream hold."""
    return [event["data"]["n"] for event in entries(server, name, prefix)]


# -- what streams keep, and their names ---------------------------------------------------


def hours_ago(hours: float) -> int:
    return int((time.time() - hours * 3_600) * 1_000)


def fill(server: RedisServer, prefix: str, *, since: int) -> None:
    """Add 300 entries of one millisecond each to the stream of ``tick``."""
    with server.client as client, client.pipeline(transaction=False) as together:
        for number in range(300):
            together.xadd(f"{prefix}:{{tick}}:stream", {"event": b""}, id=f"{since + number}-0")

        together.execute()


def length(server: RedisServer, prefix: str) -> int:
    with server.client as client:
        return int(client.xlen(f"{prefix}:{{tick}}:stream"))


def aging(make_bus: Make, url: str, prefix: str) -> Bus:
    """A publisher whose stream keeps what is younger than an hour."""
    route = {"via": "stream", "maxlen": "1h"}
    return make_bus(url, "accounts", prefix=prefix, publish={"tick": route})


@pytest.fixture
def two_hours_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this machine is two hours ahead of Redis's."""
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + 7_200)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 7_200_000_000_000)


def test_a_publisher_whose_clock_is_ahead_trims_no_recent_event(
    shared_redis: RedisServer,
    make_bus: Make,
    prefix: str,
    two_hours_ahead: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill(shared_redis, prefix, since=hours_ago(2))
    bus = aging(make_bus, shared_redis.url, prefix)

    for number in range(3):
        bus.signal("tick").send("test", n=number)

    assert length(shared_redis, prefix) == 303
    assert caplog.text.count("s ahead of Redis's") == 1
    assert "Synchronize both clocks with NTP" in caplog.text


@pytest.mark.parametrize("count", [1, 2])
def test_a_publisher_trims_by_age_with_its_first_event(
    shared_redis: RedisServer, make_bus: Make, prefix: str, count: int
) -> None:
    fill(shared_redis, prefix, since=hours_ago(2))
    bus = aging(make_bus, shared_redis.url, prefix)

    for number in range(count):
        bus.signal("tick").send("test", n=number)

    assert length(shared_redis, prefix) < 100 + count


def test_an_event_does_not_trim_itself_when_ids_are_ahead_of_redis(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    fill(shared_redis, prefix, since=hours_ago(-5))
    bus = aging(make_bus, shared_redis.url, prefix)

    for number in range(3):
        bus.signal("tick").send("test", n=number)

    assert length(shared_redis, prefix) == 303


def test_a_user_without_the_right_to_time_trims_by_the_ids_of_its_events(
    redis_server: RedisServer, make_bus: Make
) -> None:
    with redis_server.client as client:
        client.acl_setuser(
            "shop", enabled=True, passwords=["+pw"], keys="*", commands=["+@all", "-time"]
        )
    fill(redis_server, "eventbus", since=hours_ago(2))
    url = redis_server.url.replace("//", "//shop:pw@")
    bus = aging(make_bus, url, "eventbus")

    bus.signal("tick").send("test", n=1)
    assert length(redis_server, "eventbus") == 301
    bus.signal("tick").send("test", n=2)

    assert length(redis_server, "eventbus") < 102


def test_a_user_without_the_right_to_time_is_refused_once_per_batch(
    redis_server: RedisServer, make_bus: Make
) -> None:
    with redis_server.client as client:
        client.acl_setuser(
            "shop", enabled=True, passwords=["+pw"], keys="*", commands=["+@all", "-time"]
        )
    publisher = PublishConnection(
        Connections(redis_server.url.replace("//", "//shop:pw@"), name="test", timing=Timing()),
        Config.from_mapping({"EVENTBUS_URL": redis_server.url, "EVENTBUS_SERVICE": "shop"}),
        timeout=5.0,
    )
    tick = StreamDestination("tick", "eventbus:{tick}:stream", maxlen=Age(3_600))

    assert publisher.publish([(tick, b"event")] * 20) == [None] * 20
    publisher.close()

    with redis_server.client as client:
        found: Any = client.info("commandstats")
        assert found["cmdstat_time"]["rejected_calls"] == 1


def test_the_name_of_a_stream_is_registered_again_after_a_flush(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, "accounts", publish={"tick": "stream"})
    bus.signal("tick").send("test", n=1)

    with redis_server.client as client:
        client.flushall()
        bus.signal("tick").send("test", n=2)

        assert client.sismember("eventbus:streams", "tick")


@pytest.mark.timing(ping_after=0.1)
def test_an_idle_publisher_registers_its_streams_again_after_a_flush(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, "accounts", publish={"tick": "stream"})
    bus.signal("tick").send("test", n=1)

    with redis_server.client as client:
        client.flushall()

        wait_until(
            lambda: client.sismember("eventbus:streams", "tick"), what="the name is noted again"
        )


# -- what is written ----------------------------------------------------------------------


def test_a_stream_event_is_an_entry_with_one_field_and_no_sequence_number(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, "accounts", prefix=prefix, publish={"tick": "stream"})

    bus.signal("tick").send("test", n=1)

    with shared_redis.client as client:
        [(_, fields)] = client.xrange(f"{prefix}:{{tick}}:stream")
    assert list(fields) == [b"event"]
    event = msgpack.unpackb(fields[b"event"], timestamp=3)
    assert (event["source"], event["type"], event["data"]) == ("accounts", "tick", {"n": 1})
    assert "seq" not in event
    assert bus.health().counts["published"] == 1


def test_a_confirmed_send_returns_when_the_event_is_in_the_stream(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"})

    for n in range(20):
        bus.signal("tick").send("test", n=n)
        assert values(shared_redis, prefix=prefix)[-1] == n


def test_an_unconfirmed_event_costs_no_round_trip(
    redis_server: RedisServer, make_bus: Make
) -> None:
    route = {"tick": {"via": "stream", "confirm": False}}
    bus = make_bus(redis_server.url, publish=route)
    bus.signal("tick").send("test", n=0)
    assert bus.flush(10)
    redis_server.hang()

    began = time.monotonic()
    for n in range(1, 500):
        bus.signal("tick").send("test", n=n)
    assert time.monotonic() - began < SLACK
    redis_server.resume()

    assert bus.flush(20)
    assert set(values(redis_server)) == set(range(500))


def test_channel_and_stream_events_leave_in_send_order(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    publish = {
        "tick": {"via": "stream", "confirm": False},
        "tock": "channel",
        "last": {"via": "stream"},
    }
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish)

    for n in range(100):
        bus.signal("tick").send("test", n=n)
        bus.signal("tock").send("test", n=n)
    bus.signal("last").send("test", n=0)

    # What was sent before is there before.
    assert values(shared_redis, prefix=prefix) == list(range(100))
    assert bus.health().counts["published"] == 201


def test_the_names_of_streams_are_kept_in_a_set(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"t*": "stream", "c": "channel"})

    for name in ("tick", "tock", "tick"):
        bus.signal(name).send("test")
    bus.node.publish("c", {})

    with shared_redis.client as client:
        assert set(client.smembers(f"{prefix}:streams")) == {b"tick", b"tock"}


def test_an_event_is_published_although_the_stream_name_may_not_be_registered(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "flask_eventbus")
    bus = make_bus(user(redis_server, "+@all", "-sadd", "~*"), publish={"tick": "stream"})

    for n in range(3):
        bus.signal("tick").send("test", n=n)

    assert values(redis_server) == [0, 1, 2]
    assert caplog.text.count("This user cannot register the stream of 'tick'") == 1
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_a_stream_name_is_registered_on_the_next_connection_once_granted(
    redis_server: RedisServer, make_bus: Make
) -> None:
    url = user(redis_server, "+@all", "-sadd", "~*")
    bus = make_bus(url, publish={"tick": "stream"})
    bus.signal("tick").send("test", n=1)
    client = redis_server.client
    assert not client.exists("eventbus:streams")

    user(redis_server, "+@all", "~*")
    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    bus.signal("tick").send("test", n=2)

    assert bus.flush(10)
    assert {*client.smembers("eventbus:streams")} == {b"tick"}


@pytest.mark.parametrize("place", ["route", "setting"])
def test_a_stream_keeps_about_max_length_events(
    shared_redis: RedisServer, make_bus: Make, prefix: str, place: str
) -> None:
    route: dict[str, Any] = {"via": "stream", "confirm": False}
    settings: dict[str, Any] = {"maxlen": 200} if place == "setting" else {}
    publish = {"tick": {**route, "maxlen": 200} if place == "route" else route}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish, **settings)

    for n in range(1_000):
        bus.signal("tick").send("test", n=n)
    assert bus.flush(10)

    left = values(shared_redis, prefix=prefix)
    # Redis lets go of whole nodes of a hundred entries.
    assert 200 <= len(left) <= 400
    assert left[-1] == 999


def test_a_stream_keeps_events_up_to_max_age(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    publish = {"tick": {"via": "stream", "maxlen": "1h"}}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish)
    now = int(time.time() * 1_000)

    with shared_redis.client as client:
        for n in range(300):
            fields = {"event": msgpack.packb({"data": {"n": -1}})}
            client.xadd(f"{prefix}:{{tick}}:stream", fields, id=f"{now - 7_200_000 + n}-0")

    for n in range(5):
        bus.signal("tick").send("test", n=n)

    left = values(shared_redis, prefix=prefix)
    assert left[-5:] == list(range(5))
    assert len(left) < 150


# -- the key ------------------------------------------------------------------------------


def test_the_event_key_of_a_route_travels_as_text(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    publish = {"tick": {"via": "stream", "key": "user_id"}}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish)

    for user_id in (7, "ada", 0, False):
        bus.signal("tick").send("test", user_id=user_id)

    keys = [event["partitionkey"] for event in entries(shared_redis, prefix=prefix)]
    assert keys == ["7", "ada", "0", "False"]


UNFIT_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (
        {"n": 1},
        r"payload\.user_id: the route of 'tick' .* and the key is missing\. Send it",
    ),
    "None": ({"user_id": None}, r"payload\.user_id: .* None is not a usable value"),
    "empty": ({"user_id": ""}, "'' is not a usable value. Send another"),
    "too long": ({"user_id": "x" * 300}, "has 300 bytes, and the limit is 256. Choose a shorter"),
    "surrogate": ({"user_id": b"\xff".decode(errors="surrogateescape")}, "lone surrogate"),
}


@pytest.mark.parametrize("case", UNFIT_KEYS)
def test_an_invalid_event_key_fails_at_send(make_bus: Make, case: str) -> None:
    payload, words = UNFIT_KEYS[case]
    publish = {"tick": {"via": "stream", "key": "user_id", "confirm": False}}
    bus = make_bus("redis://127.0.0.1:1/0", publish=publish)

    with pytest.raises(PayloadError, match=words):
        bus.signal("tick").send("test", **payload)

    assert bus.health().buffered == 0


# -- confirmation, many at once -----------------------------------------------------------


def send_in_threads(bus: Bus, threads: int, each: int) -> list[tuple[int, BaseException | None]]:
    """Send ``n`` from several threads; what became of each."""
    outcomes: list[tuple[int, BaseException | None]] = []

    def send(first: int) -> None:
        for n in range(first, first + each):
            outcomes.append((n, outcome_of(bus, n)))

    running = [threading.Thread(target=send, args=(k * each,)) for k in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return outcomes


def outcome_of(bus: Bus, n: int) -> BaseException | None:
    try:
        bus.signal("tick").send("test", n=n)
    except PublishError as error:
        return error

    return None


def test_concurrent_senders_share_round_trips_and_each_thread_keeps_its_order(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    send = PublishConnection.send

    def note(exchange: PublishConnection, batch: Any, deadline: float) -> None:
        sizes.append(len(batch))
        send(exchange, batch, deadline)

    monkeypatch.setattr(PublishConnection, "send", note)
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=20)

    outcomes = send_in_threads(bus, threads=16, each=100)

    assert [error for _, error in outcomes if error] == []
    found = values(shared_redis, prefix=prefix)
    assert sorted(found) == list(range(1_600))
    for k in range(16):
        mine = [n for n in found if n // 100 == k]
        assert mine == sorted(mine)
    assert sum(sizes) == 1_600
    assert len(sizes) < 1_200


def test_a_confirmed_send_in_one_thread_wakes_no_other_thread(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"})
    bus.signal("tick").send("test", n=0)
    threads: Counter[bool] = Counter()
    send = PublishConnection.send

    def note(exchange: PublishConnection, batch: Any, deadline: float) -> None:
        threads[threading.current_thread() is threading.main_thread()] += 1
        send(exchange, batch, deadline)

    monkeypatch.setattr(PublishConnection, "send", note)
    for n in range(1, 200):
        bus.signal("tick").send("test", n=n)

    # The thread that writes may still have been at the end of the first.
    assert threads[True] > 150
    assert values(shared_redis, prefix=prefix) == list(range(200))


def test_an_event_too_large_for_one_socket_write_is_published(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=10)

    for n in range(10):
        bus.signal("tick").send("test", n=n, data=bytes(500_000 if n % 2 else 1))

    assert values(shared_redis, prefix=prefix) == list(range(10))


# -- refused ------------------------------------------------------------------------------


def user(server: RedisServer, *rights: str) -> str:
    """The URL of a user with some rights."""
    with server.client as client:
        client.execute_command("ACL", "SETUSER", "sender", "reset", "on", ">secret", *rights)

    return server.url.replace("redis://", "redis://sender:secret@")


def test_an_event_that_redis_refuses_fails_its_sender_and_no_other(
    redis_server: RedisServer, make_bus: Make
) -> None:
    url = user(redis_server, "+@all", "~eventbus:{tick}:*", "~eventbus:streams")
    publish = {"tick": "stream", "tock": "stream"}
    bus = make_bus(url, publish=publish, timeout=10)
    failed: list[str] = []

    def send_refused() -> None:
        for _ in range(50):
            with pytest.raises(PublishError) as caught:
                bus.signal("tock").send("test")
            failed.append(str(caught.value))

    refused = threading.Thread(target=send_refused)
    refused.start()
    outcomes = send_in_threads(bus, threads=4, each=50)
    refused.join()

    assert [error for _, error in outcomes if error] == []
    assert sorted(values(redis_server)) == list(range(200))
    assert len(failed) == 50
    assert "of 'tock' was not published: this user has no permissions to access" in failed[0]
    assert bus.health().counts["refused"] == 50


def test_a_key_that_is_not_a_stream_is_reported(redis_server: RedisServer, make_bus: Make) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"})
    with redis_server.client as client:
        client.set("eventbus:{tick}:stream", "text")

    with pytest.raises(PublishError, match="was not published: WRONGTYPE") as caught:
        bus.signal("tick").send("test", n=1)

    assert caught.value.event_id
    assert bus.health().buffered == 0


def test_a_server_without_memory_fails_the_send_with_the_policy_raise(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publish = {"tick": "stream", "later": {"via": "stream", "confirm": False}}
    bus = make_bus(redis_server.url, publish=publish, on_outage="raise", timeout=5)
    bus.signal("tick").send("test", n=0)
    with redis_server.client as client:
        client.config_set("maxmemory", "1")

    with pytest.raises(PublishError, match=r"was not confirmed by Redis: .*command not allowed"):
        bus.signal("tick").send("test", n=1)

    assert not bus.health().publishing
    with redis_server.client as client:
        client.config_set("maxmemory", "0")
    wait_until(lambda: bus.health().publishing, what="it takes events again")
    bus.signal("tick").send("test", n=2)
    bus.signal("later").send("test", n=3)
    assert bus.flush(10)
    assert values(redis_server) == [0, 2]
    with redis_server.client as client:
        assert set(client.smembers("eventbus:streams")) == {b"tick", b"later"}


# -- replicas -----------------------------------------------------------------------------


@pytest.fixture
def replica(redis_server: RedisServer, tmp_path: Path) -> Iterator[RedisServer]:
    """A replica of the test's own server."""
    folder = tmp_path / "replica"
    folder.mkdir()
    with redis_server.client as client:
        client.config_set("repl-diskless-sync-delay", "0")
    server = RedisServer(folder, "--replicaof", "127.0.0.1", str(redis_server.port))
    server.start()
    wait_until(lambda: is_followed(redis_server), what="the replica follows")
    yield server
    server.kill()


def is_followed(server: RedisServer) -> bool:
    with server.client as client:
        found: dict[str, Any] = client.info("replication")

    return bool(found.get("slave0", {}).get("state") == "online")


@pytest.mark.parametrize("place", ["route", "setting"])
def test_an_event_counts_as_confirmed_once_a_replica_has_it(
    redis_server: RedisServer, replica: RedisServer, make_bus: Make, place: str
) -> None:
    route = {"via": "stream", "replicas": 1} if place == "route" else "stream"
    settings: dict[str, Any] = {} if place == "route" else {"replicas": 1}
    bus = make_bus(redis_server.url, publish={"tick": route}, timeout=5, **settings)

    for n in range(5):
        bus.signal("tick").send("test", n=n)
        assert values(replica)[-1] == n


def test_too_few_replicas_fail_the_send_and_say_that_the_event_is_stored(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    publish = {"tick": {"via": "stream", "replicas": 2}, "tock": "stream"}
    # Replicas have most of that time; the rest of it is for a machine that is busy.
    bus = make_bus(redis_server.url, publish=publish, timeout=2)

    with pytest.raises(PublishError, match="is stored, but only 0 of 2 replicas have it") as caught:
        bus.signal("tick").send("test", n=1)
    bus.signal("tock").send("test", n=2)

    [event] = entries(redis_server)
    assert event["id"] == caught.value.event_id
    assert caught.value.in_doubt
    assert "Call resend() of this error" in str(caught.value)
    assert "is stored, but only 0 of 2 replicas have it" in caplog.text
    assert bus.health().counts["published"] == 2
    assert "refused" not in bus.health().counts


@pytest.mark.parametrize("refused", [True, False], ids=["refused", "counted"])
def test_only_events_that_require_replicas_fail_without_them(
    shared_redis: RedisServer, prefix: str, refused: bool
) -> None:
    user, url = f"{prefix}-user", shared_redis.url
    rules = ["on", ">secret", "~*", "&*", "+@all", *(["-wait"] if refused else [])]
    shared_redis.client.execute_command("ACL", "SETUSER", user, *rules)
    connections = Connections(url.replace("://", f"://{user}:secret@"), name="test")
    config = Config(service="tests", prefix=prefix, timeout=0.1)
    exchange = PublishConnection(connections, config, timeout=5)
    ways: list[Destination] = [
        StreamDestination("tick", f"{prefix}:{{tick}}:stream", maxlen=10, replicas=1),
        StreamDestination("tock", f"{prefix}:{{tock}}:stream", maxlen=10),
        ChannelDestination("tack", f"{prefix}:{{tack}}:channel"),
    ]

    stored, *others = exchange.publish([(way, b"event") for way in ways])

    exchange.close()
    shared_redis.client.execute_command("ACL", "DELUSER", user)
    assert isinstance(stored, TooFewReplicasError)
    assert ("did not report" in str(stored)) is refused
    assert others == [None, None]


# -- Redis away ---------------------------------------------------------------------------


def away(bus: Bus, server: RedisServer) -> None:
    """Take Redis away, and let the bus know."""
    server.kill()
    bus.node.ask()
    wait_until(lambda: not bus.health().publishing, what="the outage is known")


@pytest.mark.parametrize("state", ["full", "replicas", "disk"])
def test_events_wait_in_memory_while_redis_refuses_writes(
    redis_server: RedisServer, make_bus: Make, tmp_path: Path, state: str
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"}, timeout=60)
    bus.signal("tick").send("test", n=0)
    refuse_writes(redis_server, tmp_path, state)

    for n in range(1, 20):
        bus.signal("tick").send("test", n=n)

    assert bus.health().buffered == 19
    take_writes(redis_server, state)
    assert bus.flush(10)
    assert [event["data"]["n"] for event in entries(redis_server)] == list(range(20))
    assert "refused" not in bus.health().counts


def refuse_writes(server: RedisServer, folder: Path, state: str) -> None:
    """Let a server refuse writes: its memory is full, it lacks replicas, or it cannot save."""
    with server.client as client:
        if state == "disk":
            # The snapshot cannot take the place of a directory.
            (folder / "dump.rdb" / "full").mkdir(parents=True)
            client.config_set("save", "3600 1000000")
            client.bgsave()
            wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        else:
            client.config_set(NO_WRITES[state], 1)


def take_writes(server: RedisServer, state: str) -> None:
    """Let a server take writes again."""
    with server.client as client:
        client.config_set(NO_WRITES[state], "no" if state == "disk" else 0)


NO_WRITES = {
    "full": "maxmemory",
    "replicas": "min-replicas-to-write",
    "disk": "stop-writes-on-bgsave-error",
}


@pytest.fixture
def changes() -> Iterator[list[str]]:
    """Return the lifecycle signals of publishers, in order."""
    reported: list[str] = []

    def lost(sender: str, **extra: object) -> None:
        reported.append("lost")

    def restored(sender: str, **extra: object) -> None:
        reported.append("restored")

    with (
        signals.publisher_lost.connected_to(lost),
        signals.publisher_restored.connected_to(restored),
    ):
        yield reported


@pytest.mark.parametrize("state", ["full", "replicas", "disk"])
def test_a_send_raises_at_once_while_redis_refuses_writes_and_each_change_is_logged_once(
    redis_server: RedisServer,
    make_bus: Make,
    tmp_path: Path,
    changes: list[str],
    caplog: pytest.LogCaptureFixture,
    state: str,
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"}, on_outage="raise", timeout=60)
    bus.signal("tick").send("test", n=0)
    refuse_writes(redis_server, tmp_path, state)
    before = refused_writes(redis_server)

    # Far less than the timeout, which is over only where a send waits for it.
    began = time.monotonic()
    for n in range(1, 10):
        with pytest.raises(PublishError, match="was not confirmed by Redis") as caught:
            bus.signal("tick").send("test", n=n)
        assert not caught.value.in_doubt
        assert not bus.health().publishing
    assert time.monotonic() - began < 20

    # It finds out again and again, and each time it is so.
    wait_until(lambda: refused_writes(redis_server) > before + 4, what="writes are tried")
    wait_until(wait_until_sent, what="all receivers have run")
    assert (changes, bus.health().publishing) == (["lost"], False)
    assert caplog.text.count("Redis takes no writes (") == 1

    take_writes(redis_server, state)
    wait_until(lambda: bus.health().publishing, what="it is known that writes are taken")
    bus.signal("tick").send("test", n=10)
    wait_until(wait_until_sent, what="all receivers have run")
    assert changes == ["lost", "restored"]
    assert caplog.text.count("Redis takes writes again after") == 1
    assert "Redis is away" not in caplog.text
    assert values(redis_server) == [0, 10]


def refused_writes(server: RedisServer) -> int:
    """Count the XADDs that the server rejected before it looked at them."""
    with server.client as client:
        found: Any = client.info("commandstats")
        return int(found["cmdstat_xadd"]["rejected_calls"])


@pytest.mark.parametrize("state", ["full", "replicas", "disk"])
def test_channel_events_continue_while_redis_refuses_stream_events(
    redis_server: RedisServer, make_bus: Make, tmp_path: Path, changes: list[str], state: str
) -> None:
    publish = {"tick": "stream", "price": "channel", "sure": {"confirm": True}}
    bus = make_bus(redis_server.url, publish=publish, buffer_size=10, timeout=60)
    hearing = make_bus(redis_server.url, "listens")
    received: list[int] = []
    hearing.on("price", via="channel")(lambda sender, n: received.append(n))
    hearing.on("sure", via="channel")(lambda sender, n: received.append(n))
    hearing.start()
    assert hearing.ready(10)
    bus.signal("tick").send("test", n=0)
    refuse_writes(redis_server, tmp_path, state)

    # The buffer is full with stream events, which channel events do not find in their way.
    for n in range(1, 11):
        bus.signal("tick").send("test", n=n)
    with pytest.raises(PublishError, match="the buffer is full"):
        bus.signal("tick").send("test", n=11)
    for n in range(100):
        bus.signal("sure" if n % 10 == 0 else "price").send("test", n=n)

    wait_until(lambda: len(received) == 100, what="all channel events arrive")
    assert received == list(range(100))
    assert bus.health().buffered == 10
    take_writes(redis_server, state)
    assert bus.flush(10)
    assert values(redis_server) == list(range(11))
    wait_until(wait_until_sent, what="all receivers have run")
    assert changes == ["lost", "restored"]
    assert "dropped" not in bus.health().counts


class Meanwhile(logging.Handler):
    """Sends in another thread for each line of the log, and waits for its end."""

    def __init__(self, bus: Bus) -> None:
        super().__init__()
        self.bus = bus
        self.in_time: dict[str, bool] = {}

    def emit(self, record: logging.LogRecord) -> None:
        send = threading.Thread(target=self.bus.signal("price").send, args=("log",), daemon=True)
        send.start()
        send.join(5)
        self.in_time[record.getMessage().partition(" (")[0][:24]] = not send.is_alive()


def test_a_slow_log_handler_blocks_no_send(
    redis_server: RedisServer, make_bus: Make, tmp_path: Path
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream", "price": "channel"})
    handler = Meanwhile(bus)
    log = logging.getLogger("flask_eventbus.publisher.outage")
    log.addHandler(handler)

    try:
        bus.signal("tick").send("test", n=0)
        refuse_writes(redis_server, tmp_path, "full")
        bus.signal("tick").send("test", n=1)
        take_writes(redis_server, "full")
        wait_until(lambda: len(handler.in_time) == 2, what="both changes are logged")
    finally:
        log.removeHandler(handler)

    assert set(handler.in_time.values()) == {True}, handler.in_time


def test_a_redis_that_returns_without_accepting_writes_is_signalled_as_one_outage(
    redis_server: RedisServer, make_bus: Make, changes: list[str]
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"})
    bus.signal("tick").send("test", n=0)
    away(bus, redis_server)
    bus.signal("tick").send("test", n=1)

    redis_server._options = ("--maxmemory", "1")
    redis_server.start()
    wait_until(lambda: not bus.node._publisher._outage.away, what="Redis is found")
    wait_until(wait_until_sent, what="all receivers have run")
    assert (changes, bus.health().publishing) == (["lost"], False)
    take_writes(redis_server, "full")

    assert bus.flush(10)
    wait_until(lambda: changes == ["lost", "restored"], what="the lifecycle signals are sent")


def test_events_wait_in_memory_while_redis_is_away_and_arrive_in_order(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"})
    away(bus, redis_server)

    began = time.monotonic()
    for n in range(100):
        bus.signal("tick").send("test", n=n)

    assert time.monotonic() - began < SLACK
    assert bus.health().buffered == 100
    redis_server.start()
    assert bus.flush(10)
    assert values(redis_server) == list(range(100))


@pytest.mark.parametrize("on_outage", ["buffer", "raise"])
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://127.0.0.1:1/0", "Error 111"),
        ("unix:///nowhere/redis.sock", "Error 2"),
        ("redis://nowhere.invalid/0", "connecting to nowhere.invalid"),
        ("redis://nobody:wrong@{address}/0", "invalid username-password pair"),
        ("redis://{address}/99", "DB index is out of range"),
        ("redis+sentinel://127.0.0.1:1,127.0.0.1:2/mymaster/0", "cannot be reached"),
    ],
    ids=["port", "socket", "name", "password", "database", "Sentinels"],
)
def test_a_confirmed_send_fails_as_soon_as_the_connection_is_refused(
    shared_redis: RedisServer, make_bus: Make, on_outage: str, url: str, reason: str
) -> None:
    url = url.format(address=shared_redis.url.split("/")[2])
    bus = make_bus(url, publish={"tick": "stream"}, on_outage=on_outage, timeout=60)
    outcomes: list[BaseException | None] = []
    sending = threading.Thread(target=lambda: outcomes.append(outcome_of(bus, 1)), daemon=True)

    sending.start()
    # Far less than the timeout, which is over only where nobody wakes the sender.
    sending.join(20)

    [outcome] = outcomes
    assert not bus.health().publishing
    if on_outage == "raise":
        assert "was not confirmed by Redis" in str(outcome)
        assert reason in str(outcome)
    else:
        assert outcome is None
        assert bus.health().buffered == 1


def test_only_the_first_send_waits_for_a_server_that_hangs(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"}, timeout=1.0)
    for n in range(3):
        bus.signal("tick").send("test", n=n)
    redis_server.hang()

    began = time.monotonic()
    bus.signal("tick").send("test", n=3)
    held = time.monotonic() - began
    for n in range(4, 50):
        bus.signal("tick").send("test", n=n)
    all_held = time.monotonic() - began

    assert 0.9 < held < 1.0 + SLACK
    assert all_held - held < SLACK
    redis_server.resume()
    assert bus.flush(20)
    # The answer to the first was late and is not asked for twice.
    assert values(redis_server) == list(range(50))


def test_a_send_fails_with_the_policy_raise(redis_server: RedisServer, make_bus: Make) -> None:
    publish = {"tick": "stream"}
    bus = make_bus(redis_server.url, publish=publish, on_outage="raise", timeout=2.0)
    bus.signal("tick").send("test", n=0)
    redis_server.hang()

    with pytest.raises(PublishError, match=r"no answer within 2\.0 s"):
        bus.signal("tick").send("test", n=1)
    began = time.monotonic()
    with pytest.raises(PublishError, match="Send it again when Redis is back"):
        bus.signal("tick").send("test", n=2)

    assert time.monotonic() - began < 2.0
    redis_server.resume()
    wait_until(lambda: bus.health().publishing, what="Redis is found")
    bus.signal("tick").send("test", n=3)
    # What was on its way already may be there, what was only waiting is not.
    assert values(redis_server) in ([0, 3], [0, 1, 3])


def test_an_event_in_doubt_that_is_sent_again_from_its_error_is_handled_once(
    redis_server: RedisServer, make_bus: Make
) -> None:
    consumer = make_bus(redis_server.url, "consumer")
    received: list[int] = []
    consumer.on("tick", via="stream")(lambda sender, n: received.append(n))
    consumer.start()
    assert consumer.ready(10)
    publish = {"tick": "stream"}
    bus = make_bus(redis_server.url, publish=publish, on_outage="raise", timeout=1.0)
    bus.signal("tick").send("test", n=0)
    redis_server.hang()

    with pytest.raises(PublishError, match="Redis may have it") as caught:
        bus.signal("tick").send("test", n=1)
    assert caught.value.in_doubt
    assert "Send it again" not in str(caught.value)
    with pytest.raises(PublishError, match="Redis may have it") as again:
        caught.value.resend()
    assert (again.value.in_doubt, again.value.event_id) == (True, caught.value.event_id)

    redis_server.resume()
    wait_until(lambda: bus.health().publishing, what="Redis is found")
    again.value.resend()
    bus.signal("tick").send("test", n=2)
    wait_until(lambda: 2 in received, what="the next event arrives")
    assert received == [0, 1, 2]
    same = [event for event in entries(redis_server) if event["data"]["n"] == 1]
    assert len(same) >= 1
    assert [event["id"] for event in same] == [caught.value.event_id] * len(same)
    assert same == [same[0]] * len(same)


def test_an_event_that_was_never_sent_is_not_in_doubt(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publish = {"tick": "stream"}
    bus = make_bus(redis_server.url, publish=publish, on_outage="raise", timeout=60)
    redis_server.kill()

    for _ in range(2):
        with pytest.raises(PublishError, match=r"[^.]\. Redis does not have it\.") as caught:
            bus.signal("tick").send("test", n=1)
        assert not caught.value.in_doubt
        assert bus.health().buffered == 0

    redis_server.start()
    wait_until(lambda: bus.health().publishing, what="Redis is found")
    caught.value.resend()
    assert values(redis_server) == [1]


def test_a_pickled_in_doubt_error_does_not_carry_its_event(
    make_bus: Make,
) -> None:
    url = "redis://127.0.0.1:1/0"
    bus = make_bus(url, publish={"tick": "stream"}, on_outage="raise", timeout=60)
    with pytest.raises(PublishError) as caught:
        bus.signal("tick").send("test", n=1)

    there = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - made in this test

    assert (str(there), there.event_id, there.in_doubt) == (
        str(caught.value),
        caught.value.event_id,
        False,
    )
    with pytest.raises(RuntimeError, match="in the process whose send"):
        there.resend()


def test_the_event_loop_keeps_running_while_a_coroutine_sends(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"}, timeout=5)
    bus.signal("tick").send("test", n=0)
    order: list[str] = []

    async def send() -> None:
        await bus.signal("tick").send_async("test", n=1)
        order.append("sent")

    async def main() -> None:
        redis_server.hang()
        sending = asyncio.create_task(send())
        await asyncio.sleep(0.05)
        order.append("the loop goes on")
        redis_server.resume()
        await sending

    asyncio.run(main())

    assert order == ["the loop goes on", "sent"]
    assert values(redis_server) == [0, 1]
    assert bus.health().buffered == 0


def test_a_task_cancelled_during_send_does_not_damage_its_event(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"}, timeout=5)
    bus.signal("tick").send("test", n=0)

    async def main() -> None:
        redis_server.hang()
        sending = asyncio.create_task(bus.signal("tick").send_async("test", n=1))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        redis_server.resume()

    asyncio.run(main())

    assert bus.flush(10)
    assert values(redis_server) == [0, 1]


def test_a_coroutine_that_sends_gets_the_errors_of_send(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publish = {"tick": "stream"}
    bus = make_bus(redis_server.url, publish=publish, on_outage="raise", timeout=1.0)
    bus.signal("tick").send("test", n=0)

    async def main() -> None:
        with pytest.raises(PayloadError, match=r"payload\.n"):
            await bus.signal("tick").send_async("test", n=object())
        redis_server.hang()
        with pytest.raises(PublishError, match="Redis may have it"):
            await bus.signal("tick").send_async("test", n=1)
        with pytest.raises(PublishError, match="Redis does not have it"):
            await bus.signal("tick").send_async("test", n=2)

    asyncio.run(main())


def test_the_event_loop_keeps_running_while_a_coroutine_waits_for_room(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, publish={"price": "channel"}, timeout=60, buffer_size=2)
    bus.signal("price").send("test", n=0)
    assert bus.flush(10)

    async def main() -> None:
        redis_server.hang()
        sending = asyncio.gather(
            *(bus.signal("price").send_async("test", n=n) for n in range(1, 6))
        )
        await asyncio.sleep(0.05)
        redis_server.resume()
        await sending

    asyncio.run(main())

    assert bus.flush(10)
    assert bus.health().counts["published"] == 6
    assert "dropped" not in bus.health().counts


def test_a_closed_connection_loses_no_event(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=5)

    for n in range(50):
        bus.signal("tick").send("test", n=n)
        if n % 10 == 5:
            kill_connections(shared_redis, bus)

    assert bus.flush(10)
    assert sorted(set(values(shared_redis, prefix=prefix))) == list(range(50))


def kill_connections(server: RedisServer, bus: Bus) -> None:
    with server.client as client:
        for found in client.client_list():
            if found["name"].endswith(bus.node.name):
                client.client_kill_filter(_id=found["id"])


def test_a_full_buffer_drops_channel_events_before_it_refuses_a_stream_event(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publish = {"tick": "stream", "tock": "channel"}
    bus = make_bus(redis_server.url, publish=publish, buffer_size=10)
    bus.signal("tick").send("test", n=-1)
    away(bus, redis_server)

    for n in range(5):
        bus.signal("tock").send("test", n=n)
        bus.signal("tick").send("test", n=n)
    for n in range(5, 10):
        bus.signal("tick").send("test", n=n)
    assert bus.health().counts["dropped"] == 5
    with pytest.raises(PublishError, match=r"the buffer is full with 1\d stream events, which "):
        bus.signal("tick").send("test", n=10)
    bus.signal("tock").send("test", n=10)

    assert bus.health().counts["dropped"] == 6
    assert bus.health().buffered == 10
    redis_server.start()
    assert bus.flush(10)
    assert values(redis_server) == list(range(10))


def test_the_error_for_a_full_buffer_names_the_remedy(make_bus: Make) -> None:
    bus = make_bus("redis://127.0.0.1:1/0", publish={"tick": "stream"}, buffer_size=1)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().publishing, what="the outage is known")

    with pytest.raises(
        PublishError, match=r"Send it again .* or raise 'EVENTBUS_BUFFER_SIZE'"
    ) as caught:
        bus.signal("tick").send("test", n=1)

    assert caught.value.event_id
    assert bus.health().buffered == 1


def test_events_not_written_before_the_end_are_logged_by_id(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"})
    away(bus, redis_server)
    for n in range(3):
        bus.signal("tick").send("test", n=n)
    node = bus.node.name

    bus.stop(flush=0)

    assert "3 events were not published before the end" in caplog.text
    assert f"tick {node}-1 to {node}-3 (3)" in caplog.text


# -- senders that write for each other ----------------------------------------------------


class Turns:
    """Holds senders where they read the answers to a batch, or send the next for another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_read = threading.Event()
        self.may_send = threading.Event()
        self.sent: list[int] = []
        self.senders: set[threading.Thread] = set()
        send, read = PublishConnection.send, PublishConnection.read

        def hold_send(exchange: PublishConnection, batch: Any, deadline: float) -> None:
            assert not self.sent or self.may_send.wait(10)
            self.sent.append(len(batch))
            self.senders.add(threading.current_thread())
            send(exchange, batch, deadline)

        def hold_read(exchange: PublishConnection, deadline: float) -> bool:
            assert self.may_read.wait(10)
            return read(exchange, deadline)

        monkeypatch.setattr(PublishConnection, "send", hold_send)
        monkeypatch.setattr(PublishConnection, "read", hold_read)


def begin_to_send(
    bus: Bus, n: int, errors: dict[int, BaseException | None] | None = None
) -> threading.Thread:
    """Send ``n`` in a thread, and return when it is on its way.

    :param errors: gets the error of the send, or ``None``.
    """
    buffered = bus.health().buffered
    found = {} if errors is None else errors

    def send() -> None:
        try:
            bus.signal("tick").send("test", n=n)
        except (PublishError, ArithmeticError, InterruptionError) as error:
            found[n] = error
        else:
            found[n] = None

    sending = threading.Thread(target=send)
    sending.start()
    wait_until(lambda: bus.health().buffered > buffered, what="it is on its way")
    return sending


def test_events_that_arrive_during_a_write_are_sent_before_their_senders_wake(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=20)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().buffered, what="it has left")
    turns = Turns(monkeypatch)
    turns.may_send.set()
    senders = [begin_to_send(bus, n) for n in range(1, 5)]

    turns.may_read.set()
    for sender in senders:
        sender.join()

    assert turns.sent == [1, 3]
    assert turns.senders == {senders[0]}
    assert sorted(values(shared_redis, prefix=prefix)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("who", ["the writer thread", "a sender"])
def test_a_batch_that_is_answered_after_a_stop_gave_it_up_is_counted_and_raises_nothing(
    shared_redis: RedisServer,
    make_bus: Make,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    who: str,
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=20)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().buffered, what="it has left")
    turns = Turns(monkeypatch)
    turns.may_send.set()
    errors: dict[int, BaseException | None] = {}
    publish, lead = Writer._publish, Writer._lead

    # As stop() does when its time is over, while another thread writes.
    def published(self: Writer, batch: Any) -> Any:
        found = publish(self, batch)
        self._buffer.clear()
        return found

    def led(self: Writer, deadline: float) -> None:
        if self._is_sent:
            self._buffer.clear()

        lead(self, deadline)

    monkeypatch.setattr(Writer, "_publish", published)
    monkeypatch.setattr(Writer, "_lead", led)

    if who == "the writer thread":
        turns.may_read.set()
        bus.node.publish("tick", {"n": 1}, confirm=False)
    else:
        senders = [begin_to_send(bus, n, errors) for n in (1, 2)]
        turns.may_read.set()

        for sender in senders:
            sender.join()

        assert errors == {1: None, 2: None}

    published_count = 2 if who == "the writer thread" else 3
    wait_until(lambda: bus.health().counts["published"] == published_count, what="all are counted")
    bus.signal("tick").send("test", n=3)
    assert values(shared_redis, prefix=prefix)[-1] == 3


def test_a_sender_leaves_large_events_to_the_writer_thread(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=20)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().buffered, what="it has left")
    turns = Turns(monkeypatch)
    turns.may_send.set()
    first = begin_to_send(bus, 1)
    bus.node.publish("tick", {"n": "x" * LEAD_BYTES}, confirm=False)
    second = begin_to_send(bus, 2)

    turns.may_read.set()
    first.join()
    second.join()

    assert turns.sent == [1, 2]
    assert turns.senders == {first, bus.node._publisher._writer.thread}


def test_a_sender_that_times_out_leaves_the_reply_to_the_writer_thread(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=1)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().buffered, what="it has left")
    turns = Turns(monkeypatch)
    first, second = begin_to_send(bus, 1), begin_to_send(bus, 2)

    turns.may_read.set()
    second.join()
    turns.may_send.set()
    first.join()

    assert bus.flush(5)
    assert turns.sent == [1, 1]
    bus.signal("tick").send("test", n=3)
    assert values(shared_redis, prefix=prefix) == [0, 1, 2, 3]
    assert bus.health().publishing


@pytest.mark.timing(batch_events=1)
def test_a_sender_whose_event_is_dropped_leaves_the_replies_it_was_to_read_to_the_thread(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": {"confirm": True}}, timeout=20)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().buffered, what="it has left")
    turns, may_go_on = Turns(monkeypatch), threading.Event()
    turns.may_send.set()
    wait = Message.wait_for_wakeup
    monkeypatch.setattr(
        Message, "wait_for_wakeup", lambda *args: wait(*args) and may_go_on.wait(10)
    )
    first = begin_to_send(bus, 1)
    bus.node.publish("tick", {"n": 2}, confirm=False)
    second = begin_to_send(bus, 3)

    # The first sender sends the unconfirmed event on behalf of the second, whose own is dropped.
    turns.may_read.set()
    first.join()
    dropped = bus.node._publisher._buffer.drop_oldest()
    assert dropped is not None
    dropped.finish(PublishError("The buffer was full."))
    may_go_on.set()
    second.join()

    assert turns.sent == [1, 1]
    assert bus.flush(10)
    bus.signal("tick").send("test", n=4)


# -- with channel events between them -----------------------------------------------------


MIXED: dict[str, Any] = {
    "channel": "channel",
    "confirmed": "stream",
    "unconfirmed": {"via": "stream", "confirm": False},
}


@pytest.mark.timing(ping_after=60.0)
def test_a_channel_event_after_a_confirmed_event_leaves_at_once(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish=MIXED)

    for n in range(10):
        bus.signal("channel").send("test", n=n)
        bus.signal("confirmed").send("test", n=n)
        bus.signal("channel").send("test", n=n)

        assert bus.flush(10)


@pytest.fixture
def mixed_bus(make_bus: Make) -> Bus:
    # An idle writer does not look by itself while the test runs.
    timing = Timing(ping_after=60.0)
    return make_bus("memory://interleavings", publish=MIXED, timeout=10, timing=timing)


# What fails depends on the moment: a smaller example shows nothing more.
@settings(
    deadline=None,
    max_examples=100,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(scripts=st.lists(st.lists(st.sampled_from(sorted(MIXED)), max_size=8), max_size=4))
def test_no_event_waits_while_the_connection_is_free(
    mixed_bus: Bus, scripts: list[list[str]]
) -> None:
    begin = threading.Barrier(len(scripts) + 1)

    def run(script: list[str]) -> None:
        begin.wait(10)
        for name in script:
            mixed_bus.signal(name).send("test", n=0)

    threads = [threading.Thread(target=run, args=(script,)) for script in scripts]
    for thread in threads:
        thread.start()
    begin.wait(10)
    for thread in threads:
        thread.join()

    assert mixed_bus.flush(10)


# -- in the middle of traffic -------------------------------------------------------------


class Traffic:
    """Threads that send and note what was confirmed, and how long each was held."""

    def __init__(self, bus: Bus, threads: int = 6) -> None:
        self._bus = bus
        self._enough = threading.Event()
        self.confirmed: list[int] = []
        self.failed: list[int] = []
        self.longest = 0.0
        self._threads = [threading.Thread(target=self._send, args=(k,)) for k in range(threads)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, count: int) -> None:
        """Wait until so many more are confirmed."""
        enough = len(self.confirmed) + count
        wait_until(lambda: len(self.confirmed) > enough, what="events are confirmed")

    def end(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _send(self, k: int) -> None:
        n = k

        while not self._enough.is_set():
            began = time.monotonic()
            error = outcome_of(self._bus, n)
            self.longest = max(self.longest, time.monotonic() - began)
            (self.failed if error else self.confirmed).append(n)
            n += 1_000
            # While it fails at once, it is not to fill the memory.
            if error:
                self._enough.wait(0.01)


def assert_all_there(server: RedisServer, traffic: Traffic) -> None:
    """Everything confirmed is in the stream, and whatever is there twice has one id."""
    ids: dict[int, set[str]] = {}
    for event in entries(server):
        ids.setdefault(event["data"]["n"], set()).add(event["id"])

    assert set(traffic.confirmed) - ids.keys() == set()
    assert {n for n, found in ids.items() if len(found) > 1} == set()


def test_a_server_that_hangs_under_load_blocks_no_sender_long_and_loses_nothing(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publish = {"tick": {"via": "stream", "maxlen": 10_000_000}}
    bus = make_bus(redis_server.url, publish=publish, on_outage="raise", timeout=0.5)
    traffic = Traffic(bus)
    traffic.wait_for(200)

    redis_server.hang()
    time.sleep(3)  # the time for which it hangs
    redis_server.resume()
    traffic.wait_for(200)
    traffic.end()

    assert traffic.longest < 0.5 + SLACK
    assert traffic.failed
    assert_all_there(redis_server, traffic)


def test_a_server_killed_under_load_keeps_confirmed_events(tmp_path: Path, make_bus: Make) -> None:
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    server.start()
    publish = {"tick": {"via": "stream", "maxlen": 10_000_000}}
    bus = make_bus(server.url, publish=publish, on_outage="raise", timeout=0.5)
    traffic = Traffic(bus)

    for _ in range(3):
        traffic.wait_for(100)
        server.kill()
        server.start()

    traffic.wait_for(100)
    traffic.end()

    assert traffic.longest < 0.5 + SLACK
    assert_all_there(server, traffic)
    server.kill()


def test_an_event_whose_reply_is_lost_has_one_id(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    losing = threading.Event()

    def lose() -> Callable[[bytes], bytes | None]:
        return lambda data: None if losing.is_set() and b"-" in data else data

    proxy = Proxy(shared_redis.port, answer=lose)
    bus = make_bus(proxy.url, prefix=prefix, publish={"tick": "stream"}, timeout=10)
    bus.signal("tick").send("test", n=0)

    losing.set()
    sending = threading.Thread(target=lambda: bus.signal("tick").send("test", n=1))
    sending.start()
    wait_until(lambda: values(shared_redis, prefix=prefix).count(1) >= 1, what="it is written")
    wait_until(lambda: not bus.health().publishing, what="the answer is missed")
    losing.clear()
    sending.join()
    bus.signal("tick").send("test", n=2)
    proxy.close()

    with shared_redis.client as client:
        found = [fields[b"event"] for _, fields in client.xrange(f"{prefix}:{{tick}}:stream")]
    assert len(found) >= 4
    assert len(set(found)) == 3
    assert values(shared_redis, prefix=prefix)[-1] == 2


# -- wherever it is sent ------------------------------------------------------------------


def test_a_signal_handler_that_sends_during_a_confirmed_send_does_not_block(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    publish = {"tick": {"via": "stream", "maxlen": 10_000_000}}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish, on_outage="raise", timeout=20)
    handled: list[int] = []
    numbers = itertools.count(1)

    def send(number: int, frame: Any) -> None:
        n = -next(numbers)
        bus.signal("tick").send("handler", n=n)
        handled.append(n)

    before = signal.signal(signal.SIGALRM, send)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    began = time.monotonic()
    try:
        for n in range(3_000):
            bus.signal("tick").send("test", n=n)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert time.monotonic() - began < 15
    assert bus.flush(10)
    assert len(handled) > 20
    found = values(shared_redis, prefix=prefix)
    assert [n for n in found if n >= 0] == list(range(3_000))
    assert sorted(n for n in found if n < 0) == sorted(handled)


def test_a_confirmed_send_does_not_wait_if_its_thread_holds_the_lock_of_the_buffer(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    """A signal handler or a finalizer may run at any point of another send in its thread."""
    publish = {"tick": {"via": "stream"}}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish, on_outage="raise", timeout=1)
    publisher = bus.node._publisher

    with publisher._buffer.lock:
        bus.signal("tick").send("handler", n=1)
        pending = publisher.prepare_pending("tick", {"n": 2}, bus.node.route_for("tick"))
        publisher.publish_pending(pending, time.monotonic() + 1)

        assert publisher.wait_for_confirmations([pending], time.monotonic() + 1) == []

    assert bus.flush(10)
    assert values(shared_redis, prefix=prefix) == [1, 2]


class InterruptionError(BaseException):
    """An error that a signal handler raises."""


def send_interrupted(bus: Bus, numbers: Sequence[int], *, step: float) -> list[int]:
    """Send each number, interrupted later and later after its begin; those that were."""
    interrupted: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        raise InterruptionError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for n in numbers:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00002 + n % 40 * step)
                bus.signal("tick").send("test", n=n)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except InterruptionError:
                interrupted.append(n)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    return interrupted


# What interrupts a finalizer is lost in it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_send_leaves_the_bus_usable(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    publish = {"tick": {"via": "stream", "maxlen": 10_000_000}}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish, timeout=20)
    bus.signal("tick").send("test", n=-1)

    interrupted = send_interrupted(bus, range(300), step=0.000_005)

    began = time.monotonic()
    bus.signal("tick").send("test", n=300)
    assert time.monotonic() - began < 10
    assert interrupted
    assert set(range(300)) - set(interrupted) <= set(values(shared_redis, prefix=prefix))


# What interrupts a finalizer is lost in it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_send_does_not_block_other_senders(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    publish = {"tick": {"via": "stream", "maxlen": 10_000_000}}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish, on_outage="raise", timeout=20)
    traffic = Traffic(bus, threads=3)

    interrupted = send_interrupted(bus, range(-600, 0), step=0.000_02)

    traffic.wait_for(10)
    traffic.end()
    assert interrupted
    assert traffic.longest < 10
    assert traffic.failed == []
    confirmed = {*traffic.confirmed, *range(-600, 0)} - set(interrupted)
    assert confirmed <= set(values(shared_redis, prefix=prefix))


def test_a_time_limit_raised_while_a_sender_writes_for_another_is_passed_on(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"})
    bus.signal("tick").send("test", n=0)
    publisher = bus.node._publisher
    another = publisher.prepare_pending("tick", {"n": 1}, bus.node.route_for("tick"))

    def strike(deadline: float) -> None:
        raise ArithmeticError("what a signal handler raises")

    with monkeypatch.context() as patched:
        patched.setattr(publisher._writer, "_send", strike)
        with pytest.raises(ArithmeticError, match="what a signal handler raises"):
            publisher._writer._send_for(another, time.monotonic() + 1)
    bus.signal("tick").send("test", n=2)

    assert values(shared_redis, prefix=prefix) == [0, 2]


def test_a_sender_that_is_interrupted_as_it_wakes_the_next_one_delays_no_other(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=20)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().buffered, what="it has left")
    turns, strikes = Turns(monkeypatch), itertools.count()
    errors: dict[int, BaseException | None] = {}
    wake = Message.wake

    def strike(message: Message) -> None:
        if threading.current_thread() is first and not next(strikes):
            raise InterruptionError
        wake(message)

    first = begin_to_send(bus, 1, errors)
    second = begin_to_send(bus, 2)
    monkeypatch.setattr(Message, "wake", strike)
    turns.may_send.set()
    turns.may_read.set()
    first.join()
    second.join(10)

    assert isinstance(errors[1], InterruptionError)
    assert not second.is_alive()
    assert bus.health().publishing
    assert set(values(shared_redis, prefix=prefix)) == {0, 1, 2}


def test_a_sender_that_is_interrupted_as_it_reports_results_reports_those_of_others(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=20)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().buffered, what="it has left")
    turns, strikes = Turns(monkeypatch), itertools.count()
    writer = bus.node._publisher._writer
    count = writer._count

    def strike(*args: Any) -> None:
        if not next(strikes):
            count(*args)
        else:
            raise ArithmeticError("what a signal handler raises")

    monkeypatch.setattr(writer, "_count", strike)
    turns.may_send.set()
    errors: dict[int, BaseException | None] = {}
    senders = [begin_to_send(bus, n, errors) for n in (1, 2, 3)]
    turns.may_read.set()

    for sender in senders:
        sender.join(10)

    assert not any(sender.is_alive() for sender in senders)
    assert turns.sent == [1, 2]
    assert sum(error is None for error in errors.values()) == 2
    assert sorted(values(shared_redis, prefix=prefix)) == [0, 1, 2, 3]


def test_an_event_that_cannot_be_encoded_fails_no_sender_that_sends_it_for_another(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"}, timeout=20)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().buffered, what="it has left")
    turns = Turns(monkeypatch)
    turns.may_send.set()
    errors: dict[int, BaseException | None] = {}
    encoded = Message.encoded

    def encode(message: Message) -> bytes:
        if message.number == 3:
            raise ValueError("it cannot be encoded")
        return encoded(message)

    monkeypatch.setattr(Message, "encoded", encode)
    senders = [begin_to_send(bus, n, errors) for n in (1, 2)]
    turns.may_read.set()

    for sender in senders:
        sender.join(10)

    assert errors[1] is None
    assert "it cannot be encoded" in str(errors[2])
    assert values(shared_redis, prefix=prefix) == [0, 1]


def test_a_forked_child_sends_as_a_separate_node(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish={"tick": "stream"})
    bus.signal("tick").send("test", n=0)

    child = os.fork()
    if not child:
        try:
            bus.signal("tick").send("child", n=1)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    bus.signal("tick").send("test", n=2)

    found = entries(shared_redis, prefix=prefix)
    assert [event["data"]["n"] for event in found] == [0, 1, 2]
    nodes = [event["id"].rpartition("-")[0] for event in found]
    assert nodes[0] == nodes[2] != nodes[1]


def test_an_event_sent_at_the_end_of_a_script_arrives(
    shared_redis: RedisServer, prefix: str
) -> None:
    program = f"""
from flask_eventbus import Bus
bus = Bus({shared_redis.url!r}, service="script", prefix={prefix!r},
          publish={{"tick": {{"via": "stream", "confirm": False}}}})
for n in range(100):
    bus.signal("tick").send("script", n=n)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)

    assert values(shared_redis, prefix=prefix) == list(range(100))


# -- with a database ----------------------------------------------------------------------


def test_an_after_commit_event_goes_into_the_stream_after_the_commit(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    orm = pytest.importorskip("sqlalchemy.orm")
    publish = {"tick": {"via": "stream", "after_commit": True}}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish)
    session = orm.Session(sqlalchemy.create_engine("sqlite://"))
    bus.register_session(session)

    session.begin()
    bus.signal("tick").send("test", n=1)
    bus.signal("tick").send("test", n=2)
    before = values(shared_redis, prefix=prefix)
    session.commit()

    assert before == []
    assert values(shared_redis, prefix=prefix) == [1, 2]
    session.begin()
    bus.signal("tick").send("test", n=3)
    session.rollback()
    assert values(shared_redis, prefix=prefix) == [1, 2]


def test_a_committed_event_that_does_not_fit_the_buffer_is_logged_and_the_others_wait(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    orm = pytest.importorskip("sqlalchemy.orm")
    publish = {"tick": {"via": "stream", "after_commit": True}}
    bus = make_bus(redis_server.url, publish=publish, buffer_size=2)
    session = orm.Session(sqlalchemy.create_engine("sqlite://"))
    bus.register_session(session)
    away(bus, redis_server)

    session.begin()
    for n in range(3):
        bus.signal("tick").send("test", n=n)
    session.commit()

    assert "Redis did not confirm 3 of the events" in caplog.text
    assert f"tick {bus.node.name}-3" in caplog.text
    assert bus.health().buffered == 2
    redis_server.start()
    assert bus.flush(10)
    assert values(redis_server) == [0, 1]


@pytest.fixture
def shop(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> Iterator[tuple[Bus, Any, Callable[[], Any]]]:
    """A bus with an outbox, its session, and what relays the outbox once."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    orm = pytest.importorskip("sqlalchemy.orm")
    from flask_eventbus.cli.relay import _relay
    from flask_eventbus.database import outbox

    publish = {"tick": {"via": "stream", "outbox": True, "key": "n", "maxlen": 100}}
    bus = make_bus(shared_redis.url, "shop", prefix=prefix, publish=publish)
    engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.StaticPool)
    outbox.create(engine)
    session = orm.Session(engine)
    bus.register_session(session)

    def relay() -> Any:
        waiting = outbox.Outbox(engine)
        with _relay(bus.node, waiting, 50) as relay:
            relay.run_once(threading.Event(), until=waiting.last(), patience=1)
            return relay

    yield bus, session, relay
    session.close()
    engine.dispose()


def test_an_outbox_event_is_relayed_into_the_stream_of_its_route(
    shared_redis: RedisServer, prefix: str, shop: tuple[Bus, Any, Callable[[], Any]]
) -> None:
    bus, session, relay = shop

    session.begin()
    for n in range(500):
        bus.signal("tick").send("test", n=n)
    before = values(shared_redis, prefix=prefix)
    session.commit()
    relayed = relay()

    assert before == []
    assert relayed.published == 500
    left = entries(shared_redis, prefix=prefix)
    # The route's maxlen: Redis lets go of whole nodes of a hundred entries.
    assert 100 <= len(left) <= 200
    assert [event["data"]["n"] for event in left] == list(range(500 - len(left), 500))
    assert left[-1]["partitionkey"] == "499"
    assert "seq" not in left[-1]


# -- by hand ------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Return the output of ``python -m flask_eventbus``."""
    return subprocess.run(
        [sys.executable, "-m", "flask_eventbus", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_publish_command_puts_an_event_into_a_stream(redis_server: RedisServer) -> None:
    done = command("--url", redis_server.url, "publish", "--stream", "tick", "n=7")

    [event] = entries(redis_server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Published {event['id']}. Entry ")
    assert done.stdout.endswith(" in the stream 'eventbus:{tick}:stream'.\n")
    assert event["data"] == {"n": 7}
    assert "seq" not in event
    with redis_server.client as client:
        assert set(client.smembers("eventbus:streams")) == {b"tick"}


def test_the_publish_command_follows_the_route(redis_server: RedisServer, make_bus: Make) -> None:
    publish = {"t*": {"via": "stream", "key": "n"}, "price": "channel"}
    bus = make_bus(redis_server.url, "shop", publish=publish)

    into_stream = publish_one(bus.node, "tick", {"n": 7})
    over_channel = publish_one(bus.node, "price", {"n": 7})
    told_to = publish_one(bus.node, "price", {"n": 7}, stream=True)

    [event] = entries(redis_server)
    assert (into_stream.event_id, event["partitionkey"]) == (event["id"], "7")
    assert (over_channel.entry, over_channel.listeners) == (None, 0)
    assert (told_to.entry is None, len(entries(redis_server, "price"))) == (False, 1)
    with pytest.raises(PayloadError, match="the key is missing"):
        publish_one(bus.node, "tick", {})


def test_the_publish_command_reports_a_refusal_of_redis(redis_server: RedisServer) -> None:
    with redis_server.client as client:
        client.set("eventbus:{tick}:stream", "text")
    url = user(redis_server, "+@all", "~eventbus:{tick}:*")

    wrong = command("--url", url, "publish", "--stream", "tick")
    denied = command("--url", url, "publish", "--stream", "tock")

    assert (wrong.returncode, denied.returncode) == (1, 1)
    assert "'tick' was not published: Redis refuses it: WRONGTYPE" in wrong.stderr
    assert "Grant the user in the ACL: '+xadd ~eventbus:{tock}:stream'." in denied.stderr
