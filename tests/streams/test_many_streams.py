"""A service with many streams: busy ones are read apart from silent ones."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus
from flask_eventbus.streams import reader, split
from flask_eventbus.streams.group import Group

pytestmark = pytest.mark.second_look("measures how long an event of a silent stream takes")

Make = Callable[..., Bus]

NAMES = [f"work/{number}" for number in range(split.FEW * 2)]

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker join the groups in several steps."""
    monkeypatch.setattr(reader, "JOINED_AT_ONCE", 8)


@pytest.fixture
def store(shared_redis: RedisServer) -> Iterator[StreamStore]:
    with shared_redis.client:
        yield StreamStore(shared_redis, f"many-{os.getpid()}-{next(_numbers)}")


class Received(defaultdict[str, list[Any]]):
    """The numbers that a bus received, by stream."""

    def __init__(self, bus: Bus, names: Sequence[str] = NAMES, **options: Any) -> None:
        super().__init__(list)

        for name in names:
            self._receive(bus, name, options)

        bus.start()
        assert bus.ready(20)

    def _receive(self, bus: Bus, name: str, options: dict[str, Any]) -> None:
        @bus.on(name, via="stream", **options)
        def receive(sender: str, n: Any) -> None:
            self[name].append(n)


def connect_all(bus: Bus, receive: Callable[..., object], **options: Any) -> None:
    for name in NAMES:
        bus.on(name, via="stream", **options)(receive)


def all_acknowledged(store: StreamStore) -> bool:
    """Return True if no event is pending, so that none is received again."""
    keys = map(store.keys.stream, NAMES)
    return all(store.client.xpending(key, "mailer")["pending"] == 0 for key in keys)


@pytest.fixture
def make(make_bus: Make, store: StreamStore) -> Make:
    def make(service: str = "mailer", **settings: Any) -> Bus:
        return make_bus(store.url, service, prefix=store.prefix, **settings)

    return make


def test_events_of_many_streams_are_received_once_and_in_order(
    make: Make, store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Streams change sides often.
    monkeypatch.setattr(split, "BUSY_FOR", 0.2)
    received = Received(make(concurrency=1))
    sent: dict[str, list[int]] = defaultdict(list)

    for number in range(600):
        # Some streams get most events, and each gets one now and then.
        name = NAMES[number % 7 if number % 3 else number % len(NAMES)]
        store.add(name, n=number)
        sent[name].append(number)

        if number % 20 == 0:
            # So that they are read in many rounds.
            wait_until(
                lambda: sum(map(len, received.values())) >= number - 19,  # noqa: B023
                what="the events before the last twenty arrive",
            )

    wait_until(
        lambda: sum(map(len, received.values())) >= 600, what="all events arrive", timeout=20
    )
    wait_until(lambda: all_acknowledged(store), what="all events are acknowledged")
    assert received == sent


def test_a_silent_stream_is_read_before_the_end_of_a_round_while_another_is_busy(
    make: Make, store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK", 4.0)
    received = Received(make())
    store.add(NAMES[0], n=0)
    wait_until(lambda: received[NAMES[0]] == [0], what="the first stream is busy")
    delays = []

    for number, name in enumerate(NAMES[1:], 1):
        started = time.monotonic()
        store.add(name, n=number)
        wait_until(lambda: received[name], what="the event of a silent stream")  # noqa: B023
        delays.append(time.monotonic() - started)

    assert sorted(delays)[len(delays) // 2] < 2.0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of streams of each read that was sent."""
    send_read = Group.send_read
    found: list[int] = []

    def count_names(group: Group, names: Sequence[str], **options: Any) -> None:
        found.append(len(names))
        send_read(group, names, **options)

    monkeypatch.setattr(Group, "send_read", count_names)
    return found


def test_a_new_stream_is_read_while_the_read_of_the_silent_ones_waits(
    make: Make, store: StreamStore, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    monkeypatch.setattr(reader, "BLOCK_SILENT", 60.0)
    bus = make(claim_after=240)
    Received(bus)
    wait_until(lambda: reads == [len(NAMES)], what="the read of the silent streams")
    added: list[int] = []

    @bus.on("added", via="stream")
    def receive(sender: str, n: int) -> None:
        added.append(n)

    assert bus.ready(20)
    for n in range(3):
        store.add("added", n=n)

    wait_until(lambda: added == [0, 1, 2], what="the events of the new stream")
    assert reads[0] == len(NAMES)
    assert set(reads[1:]) == {1}


def test_a_silent_stream_that_gets_an_event_is_read_with_the_busy_ones_soon(
    make: Make, store: StreamStore, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    monkeypatch.setattr(reader, "BLOCK_SILENT", 60.0)
    received = Received(make(claim_after=240))
    store.add(NAMES[3], n=0)
    wait_until(lambda: received[NAMES[3]] == [0], what="the first event")

    wait_until(lambda: 1 in reads, what="a read of the busy stream alone", timeout=20)
    assert reads.index(1) <= 3


def test_an_event_of_a_busy_stream_costs_no_read_of_the_silent_ones(
    make: Make, store: StreamStore, reads: list[int]
) -> None:
    received = Received(make())
    store.add(NAMES[0], n=0)
    wait_until(lambda: received[NAMES[0]] == [0], what="the stream is busy")
    started = time.monotonic()

    for number in range(1, 40):
        store.add(NAMES[0], n=number)
        wait_until(lambda: received[NAMES[0]][-1] == number, what="the next event")  # noqa: B023

    # A round takes a second.
    rounds = time.monotonic() - started + 3
    assert sum(count > 1 for count in reads) <= rounds
    assert len(reads) >= 20


def test_a_few_streams_are_read_together(
    make: Make, store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_reads: list[Any] = []
    monkeypatch.setattr(Group, "send_read", lambda *args, **options: split_reads.append(args))
    received = Received(make(), NAMES[: split.FEW])
    store.add(NAMES[0], n=1)
    wait_until(lambda: received[NAMES[0]] == [1], what="the event arrives")
    assert not split_reads


def test_many_streams_are_received_after_a_flush(redis_server: RedisServer, make_bus: Make) -> None:
    store = StreamStore(redis_server)
    received = Received(make_bus(store.url, "mailer", prefix=store.prefix))
    store.add(NAMES[0], n=1)
    wait_until(lambda: received[NAMES[0]] == [1], what="an event before the flush")

    store.client.flushall()
    for name in NAMES[:3]:
        store.add(name, n=2)

    wait_until(
        lambda: [received[name][-1:] for name in NAMES[:3]] == [[2]] * 3,
        what="the events after the flush",
    )


def test_events_read_before_the_connections_are_lost_are_received_once(
    redis_server: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(redis_server)
    received = Received(make_bus(store.url, "mailer", prefix=store.prefix))

    for number in range(60):
        store.add(NAMES[number % len(NAMES)], n=number)
        if number % 20 == 10:
            store.client.client_kill_filter(_type="normal", skipme=True)

    wait_until(lambda: sum(map(len, received.values())) >= 60, what="all events arrive", timeout=20)
    wait_until(lambda: all_acknowledged(store), what="all events are acknowledged")
    assert sorted(n for numbers in received.values() for n in numbers) == list(range(60))


def test_a_stream_that_redis_refuses_does_not_stop_the_others(
    make: Make, store: StreamStore
) -> None:
    bus = make()
    received = Received(bus)
    store.client.set(store.keys.stream(NAMES[5]), "another program's value")
    store.add(NAMES[0], n=1)
    wait_until(lambda: received[NAMES[0]] == [1], what="an event of another stream")
    wait_until(lambda: NAMES[5] in bus.health().refused, what="the stream is refused")
    store.add(NAMES[1], n=2)
    wait_until(lambda: received[NAMES[1]] == [2], what="an event after the refusal")


def test_entries_that_arrive_while_receivers_are_slow_stay_in_order(
    make: Make, store: StreamStore
) -> None:
    bus = make(concurrency=1)
    order: list[int] = []

    def slow(sender: str, n: int) -> None:
        time.sleep(0.01)
        order.append(n)

    connect_all(bus, slow)
    bus.start()
    assert bus.ready(20)

    for number in range(200):
        store.add(NAMES[3], n=number)

    wait_until(lambda: len(order) >= 200, what="all events arrive", timeout=30)
    assert order == list(range(200))


def test_a_stop_leaves_no_entry_of_a_read_that_waits(make: Make, store: StreamStore) -> None:
    first = make()
    received = Received(first)
    store.add(NAMES[0], n=1)
    wait_until(lambda: received[NAMES[0]] == [1], what="the first event")
    first.stop()
    store.add(NAMES[0], n=2)
    store.add(NAMES[9], n=3)

    again = Received(make())

    wait_until(lambda: again == {NAMES[0]: [2], NAMES[9]: [3]}, what="the events after the stop")


def test_the_first_events_do_not_wait_until_all_groups_are_joined(
    make: Make, store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = Group.join
    received: list[str] = []
    first, gave_up = threading.Event(), threading.Event()

    def join_others_later(group: Group, starts: dict[str, str]) -> Any:
        if NAMES[0] not in starts and not first.wait(10):
            gave_up.set()

        return join(group, starts)

    def receive(sender: str, n: int) -> None:
        received.append(NAMES[n])
        first.set()

    monkeypatch.setattr(Group, "join", join_others_later)
    for number, name in enumerate(NAMES):
        store.add(name, n=number)

    bus = make()
    connect_all(bus, receive, start="earliest")
    bus.start()

    wait_until(lambda: len(received) >= len(NAMES), what="the events of all streams", timeout=30)
    assert not gave_up.is_set()
    assert sorted(received) == sorted(NAMES)


def test_a_slow_receiver_does_not_delay_the_joining_of_other_groups(
    make: Make, store: StreamStore
) -> None:
    over = threading.Event()
    bus = make(concurrency=1)
    for name in NAMES[:4]:
        store.add(name, n=1)

    connect_all(bus, lambda sender, n: over.wait(30), start="earliest")
    bus.start()

    try:
        assert bus.ready(10)
    finally:
        over.set()


def test_a_worker_that_joins_many_groups_takes_the_released_entries_first(
    make: Make, store: StreamStore
) -> None:
    may_end = threading.Event()
    received: dict[int, list[int]] = defaultdict(list)

    def receive(sender: str, stream: int, n: int) -> None:
        may_end.wait(30)
        received[stream].append(n)

    for n in range(3):
        for stream, name in enumerate(NAMES):
            store.add(name, stream=stream, n=n)

    first = make(concurrency=1)
    connect_all(first, receive, start="earliest")
    first.start()
    assert first.ready(10)
    wait_until(
        lambda: store.client.xpending(store.keys.stream(NAMES[0]), "mailer")["pending"],
        what="the worker has read entries",
    )
    stopping = threading.Thread(target=first.stop)
    stopping.start()
    may_end.set()
    stopping.join()

    second = make(concurrency=1)
    connect_all(second, receive, start="earliest")
    second.start()

    wait_until(
        lambda: sum(map(len, received.values())) >= 3 * len(NAMES), what="all events", timeout=20
    )
    assert list(received.values()) == [[0, 1, 2]] * len(NAMES)
