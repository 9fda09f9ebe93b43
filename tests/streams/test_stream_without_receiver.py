"""Streams for which a process has no receiver: it leaves them to processes that have one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus
from flask_eventbus.streams import catalogue

pytestmark = pytest.mark.second_look("waits for entries that workers release and take")

Make = Callable[..., Bus]


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams under a prefix of this test's own."""
    return StreamStore(shared_redis)


def start(make_bus: Make, store: StreamStore, *, subscribe: Any, **receivers: Any) -> Bus:
    """Start a worker of ``mailer`` that has these receivers, and wait until it is ready."""
    bus = make_bus(store.url, "mailer", prefix=store.prefix, subscribe=subscribe)

    for name, receiver in receivers.items():
        bus.signal(name).connect(receiver, weak=False)

    bus.start()
    assert bus.ready(10)
    return bus


def pending(store: StreamStore, name: str = "tick") -> int:
    return int(store.client.xpending(store.keys.stream(name), "mailer")["pending"])


def test_a_worker_without_a_receiver_leaves_events_to_one_that_has_it(
    store: StreamStore, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[int] = []
    without = start(make_bus, store, subscribe={"tick": {}, "tock": {}}, tock=lambda _, n: None)
    start(make_bus, store, subscribe={"tick": {}}, tick=lambda _, n: received.append(n))

    for number in range(20):
        store.add("tick", n=number)

    wait_until(lambda: len(received) == 20, what="every event is handled")
    assert sorted(received) == list(range(20))
    assert without.health().without_receiver == {"tick"}
    assert without.health().counts.get("received", 0) == 0
    [record] = [each for each in caplog.records if "Nothing here receives" in each.getMessage()]
    assert record.levelno == logging.ERROR
    assert "does not read its stream" in record.getMessage()
    assert "'EVENTBUS_RECEIVERS'" in record.getMessage()


@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
def test_a_stream_is_read_once_a_receiver_is_connected(
    store: StreamStore, make_bus: Make, group: bool | None
) -> None:
    received: list[int] = []
    subscription = {} if group else {"group": None}
    bus = start(make_bus, store, subscribe={"tick": subscription})
    store.add("tick", n=1)
    assert bus.health().without_receiver == {"tick"}

    bus.signal("tick").connect(lambda _, n: received.append(n), weak=False)

    wait_until(lambda: received == [1], what="the event that waited is handled")
    assert bus.health().without_receiver == set()


@pytest.mark.timing(list_streams_every=0.05)
def test_a_pattern_creates_no_group_without_a_receiver(store: StreamStore, make_bus: Make) -> None:
    received: list[int] = []
    bus = start(make_bus, store, subscribe={"t*": {}}, tick=lambda _, n: received.append(n))
    store.add("tock", n=1)
    store.add("tick", n=2)
    wait_until(lambda: received == [2], what="the event with a receiver is handled")
    wait_until(lambda: bus.health().without_receiver == {"tock"}, what="the other is reported")
    assert store.client.xinfo_groups(store.keys.stream("tock")) == []

    bus.signal("tock").connect(lambda _, n: received.append(n), weak=False)

    wait_until(lambda: received == [2, 1], what="the event that waited is handled")


def test_entries_whose_receiver_was_disconnected_are_released(
    store: StreamStore, make_bus: Make
) -> None:
    received: list[int] = []
    bus = make_bus(store.url, "mailer", prefix=store.prefix, concurrency=1)

    def receive(sender: str, n: int) -> None:
        received.append(n)
        bus.signal("tick").disconnect(receive)

    bus.on("tick", via="stream", start="earliest")(receive)
    for number in range(5):
        store.add("tick", n=number)
    bus.start()
    wait_until(lambda: received == [0], what="the first event is handled")
    wait_until(lambda: bus.health().without_receiver == {"tick"}, what="the stream is left")
    wait_until(lambda: bus.health().lag == 0, what="what was read is handed back")

    start(make_bus, store, subscribe={"tick": {}}, tick=lambda _, n: received.append(n))

    wait_until(lambda: len(received) == 5, what="another worker handles the rest")
    assert received == [0, 1, 2, 3, 4]
    wait_until(lambda: not pending(store), what="all are acknowledged")


@pytest.mark.timing(
    list_streams_every=600.0, list_many_streams_every=600.0, ask_stream_again_after=600.0
)
def test_a_stream_is_left_once_one_of_its_events_finds_no_receiver(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "CHECK_EVERY", 600.0)
    received: list[int] = []
    bus = make_bus(store.url, "mailer", prefix=store.prefix, concurrency=1)

    def receive(sender: str, n: int) -> None:
        received.append(n)
        bus.signal("tick").disconnect(receive)

    bus.on("tick", via="stream")(receive)
    bus.start()
    assert bus.ready(10)
    store.add_together("tick", {"n": 1}, {"n": 2})

    wait_until(lambda: bus.health().without_receiver == {"tick"}, what="the stream is left")
    assert received == [1]


def test_a_receiver_of_some_services_acknowledges_events_of_others(
    store: StreamStore, make_bus: Make
) -> None:
    received: list[int] = []
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    bus.on("tick", from_="accounts", start="earliest")(lambda _, n: received.append(n))
    store.add("tick", source="clock", n=1)
    store.add("tick", source="accounts", n=2)

    bus.start()

    wait_until(lambda: received == [2], what="the event is handled")
    wait_until(lambda: not pending(store), what="both are acknowledged")
    assert bus.health().without_receiver == set()


def test_events_wait_for_a_receiver_even_after_redis_lost_its_data(
    redis_server: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(redis_server)
    received: list[int] = []
    bus = start(make_bus, store, subscribe={"tick": {}})
    store.client.flushall()
    store.add("tick", n=1)

    bus.signal("tick").connect(lambda _, n: received.append(n), weak=False)

    wait_until(lambda: received == [1], what="the event that waited is handled")


def test_a_worker_without_a_receiver_leaves_no_consumer_behind(
    store: StreamStore, make_bus: Make
) -> None:
    bus = start(make_bus, store, subscribe={"tick": {}})
    bus.stop()

    assert store.client.xinfo_consumers(store.keys.stream("tick"), "mailer") == []


def test_a_bus_is_ready_as_soon_as_a_pattern_that_is_added_was_looked_at(
    shared_redis: RedisServer, make_bus: Callable[..., Bus]
) -> None:
    bus = make_bus(shared_redis.url, "mailer", prefix="ready-with-patterns")
    bus.on("tick", via="stream")(lambda sender: None)
    bus.start()
    assert bus.ready(10)

    for number in range(4):
        bus.on(f"o{number}*", via="stream")(lambda sender: None)
        began = time.monotonic()
        assert bus.ready(40)
        # Its time would be over by then if nothing woke it.
        assert time.monotonic() - began < 30
