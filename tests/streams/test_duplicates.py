"""Events that come twice in a stream: how they are noted, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus
from flask_eventbus.codec.codec import Codec
from flask_eventbus.config import TIMING, Config
from flask_eventbus.logs import Counters
from flask_eventbus.receivers.delivery import Delivery
from flask_eventbus.receivers.workers import DeliveryQueue
from flask_eventbus.streams.decoder import Duplicates
from flask_eventbus.transport.connections import Connections
from flask_eventbus.transport.pipe import Pipe

pytestmark = pytest.mark.second_look("waits for ids to expire in a real Redis")

Make = Callable[..., Bus]

WINDOW = 600.0


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams under a prefix of this test's own."""
    return StreamStore(shared_redis)


def listen(bus: Bus) -> list[int]:
    """The numbers of the events that are handled, from the beginning of the stream."""
    handled: list[int] = []
    bus.on("tick", via="stream", start="earliest")(lambda sender, n: handled.append(n))
    bus.start()
    assert bus.ready(10)
    return handled


def test_two_copies_of_an_event_in_one_batch_are_handled_once(
    store: StreamStore, make_bus: Make
) -> None:
    for n in range(3):
        body = Codec().encode(store.event("tick", n=n))
        # All of it is there before the first read.
        for _ in range(2):
            store.add_fields("tick", {b"event": body})

    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    handled = listen(bus)

    wait_until(lambda: bus.health().counts.get("duplicates") == 3, what="the copies are dropped")
    wait_until(lambda: len(handled) == 3, what="the events are handled")
    assert handled == [0, 1, 2]


def test_events_of_several_answers_are_looked_up_together(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[int] = []
    find = Duplicates.find

    def note(duplicates: Duplicates, deliveries: Sequence[Delivery]) -> list[Delivery]:
        looked_up.append(len(deliveries))
        return find(duplicates, deliveries)

    bus = make_bus(store.url, "mailer", prefix=store.prefix, concurrency=1)
    # However slow this machine is, the receiver counts as a fast one.
    monkeypatch.setattr(DeliveryQueue, "room", 1_000)
    monkeypatch.setattr(Duplicates, "find", note)
    handled = listen(bus)
    store.add_together("tick", *({"n": n} for n in range(200)))

    wait_until(lambda: len(handled) == 200, what="the events are handled")
    assert handled == list(range(200))
    assert looked_up == [200]


def test_the_ids_of_events_expire_two_windows_after_the_last_one(
    store: StreamStore, make_bus: Make
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix, duplicate_window=WINDOW)
    handled = listen(bus)
    _, event = store.add("tick", n=1)
    wait_until(lambda: handled, what="the event is handled")

    key = store.keys.seen("tick", "mailer", int(event.time.timestamp() // WINDOW))
    # The test itself takes a moment.
    assert 2 * WINDOW - 60 < store.client.ttl(key) <= 2 * WINDOW


def test_every_stored_id_is_deleted_with_a_lost_group(
    store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000_000 * WINDOW + 1
    monkeypatch.setattr(time, "time", lambda: now)
    config = Config.from_mapping(
        {
            "EVENTBUS_SERVICE": "mailer",
            "EVENTBUS_PREFIX": store.prefix,
            "EVENTBUS_DUPLICATE_WINDOW": WINDOW,
        }
    )
    pipe = Pipe(Connections(store.url, name="eventbus:mailer:tests"), timeout=5.0)
    # Kept for two windows after their last id, which a clock that is slow by one may have given;
    # and one that a fast clock gave.
    numbers = range(1_000_000 - 3, 1_000_000 + 2)
    keys = [store.keys.seen("tick", "mailer", number) for number in numbers]
    for key in keys:
        store.client.hset(key, "abc-1", "digest")
    other = store.keys.seen("tock", "mailer", 1_000_000)
    store.client.hset(other, "abc-1", "digest")

    context = mock.Mock(config=config, keys=store.keys, counters=Counters(), timing=TIMING)
    Duplicates(pipe, context).forget("tick")
    pipe.close()

    assert store.client.exists(*keys) == 0
    assert store.client.exists(other) == 1
