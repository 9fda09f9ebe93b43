"""Tests of streams: delivery, order and threads."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from servers import RedisServer, unread
from waiting import wait_until

from flask_eventbus import Bus, current_event
from flask_eventbus.config import TIMING
from flask_eventbus.streams.group import LONG_IDLE, RELEASED, Group
from flask_eventbus.transport.connections import Connections
from flask_eventbus.transport.keys import StreamKeys
from flask_eventbus.transport.pipe import Pipe

pytestmark = pytest.mark.second_look("cuts connections while events arrive")

Make = Callable[..., Bus]

_numbers = itertools.count()


@pytest.fixture
def prefix() -> str:
    """A prefix of this test's own on the shared server."""
    return f"streams-of-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def client(shared_redis: RedisServer) -> Iterator[redis.Redis]:
    """For the test's own questions."""
    with shared_redis.client as found:
        yield found


@pytest.fixture
def make(shared_redis: RedisServer, make_bus: Make, prefix: str) -> Make:
    """Make buses on the shared server with the test's prefix."""

    def make(service: str, **settings: Any) -> Bus:
        return make_bus(shared_redis.url, service, prefix=prefix, **settings)

    return make


@pytest.fixture
def send(make: Make) -> Callable[..., None]:
    """Publish numbered events into the stream of ``work``, in order."""
    bus = make("publisher", publish={"work": "stream", "keyed": {"via": "stream", "key": "key"}})

    def send(*numbers: int, name: str = "work", **payload: Any) -> None:
        for number in numbers:
            bus.node.publish(name, {"n": number, **payload}, confirm=False)

        assert bus.flush(20)

    return send


def listening(bus: Bus) -> Bus:
    """The bus, once it hears everything."""
    bus.start()
    assert bus.ready(10)
    return bus


def settled(client: redis.Redis, prefix: str, name: str = "work", group: str = "consumer") -> bool:
    """Return True if a group has handled all entries."""
    key = StreamKeys(prefix).stream(name)

    groups = [found["name"].decode() for found in client.xinfo_groups(key)]

    # Unread entries are counted first: one that is read in between is pending afterwards.
    if group not in groups or unread(client, key, group):
        return False

    return bool(client.xinfo_groups(key)[groups.index(group)]["pending"] == 0)


# -- whichever way ------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [("channel", "stream"), ("stream", "channel")], ids="-".join)
def test_a_subscriber_receives_a_signal_over_channel_or_stream(
    make: Make, ways: tuple[str, str]
) -> None:
    received: list[tuple[int, str, int]] = []
    bus = make("consumer")

    @bus.on("work")
    def receive(sender: str, n: int) -> None:
        received.append((n, current_event.via, current_event.attempt))

    listening(bus)

    for number, way in enumerate(ways):
        make("publisher", publish={"work": way}).signal("work").send("test", n=number)
        wait_until(lambda n=number: len(received) > n, what="it is received")  # type: ignore[misc]

    assert received == [(number, way, 1) for number, way in enumerate(ways)]


@pytest.mark.parametrize("via", ["channel", "stream"])
def test_a_subscription_can_be_limited_to_one_transport(make: Make, via: str) -> None:
    received: list[str] = []
    bus = make("consumer", subscribe={"work": {"via": via}, "end": {}})
    bus.on("work")(lambda sender, n: received.append(current_event.via))
    bus.on("end")(lambda sender: received.append("end"))
    listening(bus)

    for way in ("channel", "stream"):
        publisher = make("publisher", publish={"work": way, "end": way})
        publisher.signal("work").send("test", n=1)
        publisher.signal("end").send("test")
        assert publisher.flush(10)

    wait_until(lambda: received.count("end") == 2, what="both ways are received to their ends")
    assert [way for way in received if way != "end"] == [via]


def test_a_service_receives_its_own_stream_events_with_echo(make: Make) -> None:
    received: list[tuple[str, Any]] = []
    asking = make("consumer", publish={"*": "stream"}, subscribe={"a": {"echo": True}, "b": {}})
    sibling = make("consumer", publish={"*": "stream"})

    for name in ("a", "b"):
        asking.on(name)(lambda sender, n, name=name: received.append((name, n)))

    listening(asking)

    for name in ("b", "a"):
        sibling.signal(name).send("test", n=1)

    wait_until(lambda: received, what="the echo is received")
    assert received == [("a", 1)]
    wait_until(lambda: asking.health().counts.get("echoes") == 1, what="the other is counted")


def test_receivers_of_every_kind_run_for_a_stream_event(
    make: Make, send: Callable[..., None]
) -> None:
    received: list[str] = []
    bus = make("consumer")

    class Receivers:
        def method(self, sender: str, n: int) -> None:
            received.append("method")

        def __call__(self, sender: str, n: int) -> None:
            received.append("object")

    async def coroutine(sender: str, n: int) -> None:
        received.append("coroutine")

    receivers = Receivers()

    for receiver in (receivers, receivers.method, coroutine):
        bus.on("work")(receiver)

    bus.on("w*")(lambda sender, **payload: received.append("pattern"))
    listening(bus)
    send(1)

    wait_until(lambda: len(received) == 4, what="all have run")
    assert sorted(received) == ["coroutine", "method", "object", "pattern"]


# -- order --------------------------------------------------------------------------------


def test_one_thread_keeps_the_order_of_a_stream_through_lost_connections(
    make: Make, send: Callable[..., None], client: redis.Redis, prefix: str
) -> None:
    received: list[int] = []
    bus = listening_to(make("consumer"), received)

    for start in range(0, 3_000, 300):
        send(*range(start, start + 300))
        cut(client, bus)

    wait_until(lambda: len(received) >= 3_000 and settled(client, prefix), what="all are handled")
    assert received == list(range(3_000))


def listening_to(bus: Bus, received: list[int]) -> Bus:
    """The bus with a receiver that notes numbers."""

    @bus.on("work")
    def receive(sender: str, n: int) -> None:
        received.append(n)

    return listening(bus)


def cut(client: redis.Redis, bus: Bus) -> None:
    """Cut every connection of the bus."""
    found: Any = client.client_list()

    for each in found:
        if bus.node.name in each["name"]:
            client.client_kill_filter(_id=each["id"])


@pytest.mark.parametrize("cutting", [False, True], ids=["in peace", "with lost connections"])
def test_eight_threads_keep_the_order_of_each_key(
    make: Make, send: Callable[..., None], client: redis.Redis, prefix: str, cutting: bool
) -> None:
    received: dict[int, list[int]] = defaultdict(list)
    bus = make("consumer", concurrency=8)

    @bus.on("keyed")
    def receive(sender: str, key: int, n: int) -> None:
        time.sleep(0.0005 * (n % 3))
        received[key].append(n)

    listening(bus)

    for number in range(600):
        send(number, name="keyed", key=number % 13)

        if cutting and number % 100 == 50:
            cut(client, bus)

    wait_until(
        lambda: sum(map(len, received.values())) >= 600 and settled(client, prefix, "keyed"),
        timeout=20,
        what="all are handled",
    )
    assert received == {key: list(range(key, 600, 13)) for key in range(13)}


def test_events_of_other_keys_do_not_wait_for_a_slow_receiver(
    make: Make, send: Callable[..., None]
) -> None:
    received: list[int] = []
    release = threading.Event()
    bus = make("consumer", concurrency=8)

    @bus.on("keyed")
    def receive(sender: str, key: str, n: int) -> None:
        if key == "slow":
            release.wait(30)

        received.append(n)

    listening(bus)
    send(0, 1, 2, name="keyed", key="slow")
    keys = [key for key in map(str, range(100)) if lane(key) != lane("slow")]

    # Past the time after which other workers would get what waits.
    for number in range(100, 100 + round(TIMING.release_after / 0.1) + 10):
        send(number, name="keyed", key=keys[number % len(keys)])
        wait_until(lambda n=number: received[-1:] == [n], what="it is handled at once")  # type: ignore[misc]
        release.wait(0.1)

    release.set()
    wait_until(lambda: received[-3:] == [0, 1, 2], what="the others come, in order")


def lane(key: str) -> int:
    """The thread of eight in which the events of a key are handled."""
    from zlib import crc32

    return crc32(f"keyed\0{key}".encode()) % 8


def test_a_failed_event_does_not_delay_later_ones(make: Make, send: Callable[..., None]) -> None:
    received: list[tuple[int, int]] = []
    bus = make("consumer")

    @bus.on("work")
    def receive(sender: str, n: int) -> None:
        received.append((n, current_event.attempt))
        if n == 0 and current_event.attempt == 1:
            raise RuntimeError("not yet")

    listening(bus)
    send(*range(50))

    wait_until(lambda: len(received) == 51, what="all are handled")
    assert received == [*((n, 1) for n in range(50)), (0, 2)]


# -- what waits behind a long receiver ----------------------------------------------------


#: Look for what was handed back several times a second.
hasty = pytest.mark.timing(check_released_every=0.2)


@hasty
def test_another_worker_gets_the_events_behind_a_slow_receiver(
    make: Make, send: Callable[..., None], client: redis.Redis, prefix: str
) -> None:
    release = threading.Event()
    received: list[int] = []
    slow, free = make("consumer"), make("consumer")

    @slow.on("work")
    def hold(sender: str, n: int) -> None:
        release.wait(30)
        received.append(n)

    listening(slow)
    send(*range(10))
    wait_until(lambda: slow.node.health().lag >= 9, what="it has read ahead")
    listening_to(free, received)

    wait_until(lambda: len(received) == 9, what="the other has handled what waited")
    send(*range(10, 20))
    wait_until(lambda: len(received) == 19, what="the other handles what follows")
    release.set()
    wait_until(lambda: settled(client, prefix), what="all are handled")
    assert Counter(received) == Counter(range(20))


@hasty
def test_a_single_worker_keeps_the_order_behind_a_slow_receiver(
    make: Make, send: Callable[..., None], client: redis.Redis, prefix: str
) -> None:
    release = threading.Event()
    received: list[int] = []
    bus = make("consumer")

    @bus.on("work")
    def receive(sender: str, n: int) -> None:
        if n == 0:
            release.wait(30)

        received.append(n)

    listening(bus)
    send(*range(10))
    wait_until(lambda: pending_of(client, prefix, RELEASED) == 9, what="what waits is given away")
    send(*range(10, 300))
    release.set()

    wait_until(lambda: settled(client, prefix), what="all are handled")
    assert received == list(range(300))


def pending_of(client: redis.Redis, prefix: str, consumer: str) -> int:
    """Return the number of pending entries of a consumer."""
    found: Any = client.xpending(StreamKeys(prefix).stream("work"), "consumer")
    shares = {each["name"].decode(): each["pending"] for each in found["consumers"]}
    return int(shares.get(consumer, 0))


def test_only_one_of_two_workers_gets_a_released_entry(
    shared_redis: RedisServer, send: Callable[..., None], client: redis.Redis, prefix: str
) -> None:
    keys = StreamKeys(prefix)
    send(*range(10))
    client.xgroup_create(keys.stream("work"), "consumer", "0")
    first, second, third = (
        Group(
            Pipe(Connections(shared_redis.url, name="test"), timeout=5),
            keys=keys,
            service="consumer",
            consumer=name,
            max_bytes=1_000_000,
        )
        for name in ("first", "second", "third")
    )
    ids = [entry.id for entry in first.read(["work"], count=10, block=0)]
    first.release("work", dict.fromkeys(ids, 0))

    found = [group.pending("work", consumer=RELEASED) for group in (second, third)]
    got = [
        group.claim("work", each, idle=LONG_IDLE / 1000)
        for group, each in zip((second, third), found, strict=True)
    ]

    assert got == [set(ids), set()]

    for group in (first, second, third):
        group.pipe.close()


# -- threads ------------------------------------------------------------------------------


def test_no_thread_is_left_when_a_bus_has_stopped(make: Make, send: Callable[..., None]) -> None:
    received: list[int] = []
    bus = make("consumer", concurrency=4)
    bus.on("follow*")(lambda sender, n: None)
    listening_to(bus, received)
    send(1)
    wait_until(lambda: received == [1], what="it is received")
    name = bus.node.name

    bus.stop()

    left = [thread.name for thread in threading.enumerate() if name in thread.name]
    assert left == []


def test_a_restarted_bus_continues_where_it_stopped(
    make: Make, send: Callable[..., None], client: redis.Redis, prefix: str
) -> None:
    received: list[int] = []
    bus = listening_to(make("consumer"), received)

    for start in range(0, 500, 100):
        send(*range(start, start + 100))
        bus.stop()
        listening(bus)

    wait_until(lambda: settled(client, prefix), what="all are handled")
    assert received == list(range(500))


def test_a_receiver_connected_while_the_bus_listens_receives_later_events(
    make: Make, send: Callable[..., None]
) -> None:
    first: list[int] = []
    second: list[int] = []
    bus = listening(make("consumer"))
    listening_to(bus, first)
    send(1)
    wait_until(lambda: first == [1], what="it is received")

    bus.on("work")(lambda sender, n: second.append(n))
    send(2)

    wait_until(lambda: first == [1, 2] and second == [2], what="both hear it")
