"""Whatever comes over a channel is counted, logged with its reason, and the next event arrives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bad_events import BAD, packed
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus, signals
from flask_eventbus.channels import listener
from flask_eventbus.codec.codec import MESSAGE_BYTES, MESSAGE_EVENTS, Codec, split_message
from flask_eventbus.config import Timing
from flask_eventbus.event import Event
from flask_eventbus.receivers.dispatcher import Finding
from flask_eventbus.signals import wait_until_sent

pytestmark = pytest.mark.second_look("waits for events of a real Redis")

Make = Callable[..., Bus]


@pytest.fixture
def consumer(shared_redis: RedisServer, make_bus: Make) -> Bus:
    """A bus that listens to ``tick`` under a prefix of its own."""
    bus = make_bus(shared_redis.url, "consumer", prefix=f"bad-{time.time_ns()}")
    bus.start()
    return bus


@pytest.fixture
def received(consumer: Bus) -> list[Any]:
    """Return the events that the consumer received."""
    received: list[Any] = []

    @consumer.on("tick")
    def receive(sender: str, n: Any) -> None:
        received.append((sender, n))

    assert consumer.ready(10)
    return received


@pytest.fixture
def rejected() -> Iterator[list[str]]:
    """The reasons of rejected events."""
    reasons: list[str] = []

    def note(sender: str, name: str, reason: str, error: Exception) -> None:
        reasons.append(reason)

    with signals.event_rejected.connected_to(note):
        yield reasons


def publish(server: RedisServer, bus: Bus, body: bytes, name: str = "tick") -> None:
    server.client.publish(f"{bus.node.config.prefix}:{{{name}}}:channel", body)


@pytest.mark.parametrize(
    ("reason", "body"),
    [
        # Named by hand: bytes that hold the time would be another test in every run.
        pytest.param(reason, body, id=f"{reason}-{number}")
        for reason, bodies in BAD.items()
        for number, body in enumerate(bodies, start=1)
        # On a channel these are an event, and a part that is none.
        if body[:-1] not in split_message(body)
    ],
)
def test_undecodable_bytes_are_counted_and_logged_and_the_next_event_arrives(
    shared_redis: RedisServer,
    consumer: Bus,
    received: list[Any],
    rejected: list[str],
    caplog: pytest.LogCaptureFixture,
    reason: str,
    body: bytes,
) -> None:
    publish(shared_redis, consumer, body)
    publish(shared_redis, consumer, packed(id="foreign-2"))

    wait_until(lambda: received, what="the good event arrives")
    assert received == [("elsewhere", 1)]
    wait_until(wait_until_sent, what="all receivers have run")
    assert rejected == [reason]
    counts = consumer.health().counts
    assert counts["rejected"] == counts[f"rejected_{reason}"] == 1
    assert f"({reason})" in caplog.text
    assert len(caplog.text) < 2_000  # a sample, not the whole


def test_events_of_one_message_arrive_in_order_and_a_bad_one_among_them_is_rejected_alone(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], rejected: list[str]
) -> None:
    good = [packed(id=f"foreign-{n}", data={"n": n}, seq=n) for n in range(1, 4)]

    publish(shared_redis, consumer, b"".join((*good[:2], packed(source=7), good[2], b"\xc1")))

    wait_until(lambda: len(received) == 3, what="the good events arrive")
    assert received == [("elsewhere", 1), ("elsewhere", 2), ("elsewhere", 3)]
    wait_until(wait_until_sent, what="all receivers have run")
    assert rejected == ["bad_attribute", "not_msgpack"]
    assert "missed" not in consumer.health().counts


def test_a_gap_between_events_of_one_message_is_counted(
    shared_redis: RedisServer, consumer: Bus, received: list[Any]
) -> None:
    message = b"".join(packed(id=f"foreign-{n}", data={"n": n}, seq=n) for n in (1, 2, 7))

    publish(shared_redis, consumer, message)

    wait_until(lambda: len(received) == 3, what="the events arrive")
    assert consumer.health().counts["missed"] == 4


def test_a_message_above_the_limit_for_several_events_is_rejected_whole(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], rejected: list[str]
) -> None:
    publish(shared_redis, consumer, packed() * (MESSAGE_BYTES // len(packed()) + 1))
    publish(shared_redis, consumer, packed(id="foreign-2"))

    wait_until(lambda: received, what="the good event arrives")
    wait_until(wait_until_sent, what="all receivers have run")
    assert (received, rejected) == ([("elsewhere", 1)], ["not_msgpack"])


def test_a_message_of_empty_maps_is_rejected_in_no_more_parts_than_a_message_has_events(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], rejected: list[str]
) -> None:
    publish(shared_redis, consumer, b"\x80" * MESSAGE_BYTES)
    publish(shared_redis, consumer, packed(id="foreign-2"))

    wait_until(lambda: received, what="the good event arrives")
    wait_until(wait_until_sent, what="all receivers have run")
    assert rejected == ["missing_attribute"] * (MESSAGE_EVENTS - 1) + ["not_msgpack"]


@pytest.mark.parametrize("count", [MESSAGE_EVENTS, MESSAGE_EVENTS + 1])
def test_a_message_has_at_most_256_events(count: int) -> None:
    body = packed()

    bodies = split_message(body * count)

    rest = body * (count - MESSAGE_EVENTS + 1)
    assert bodies == [*[body] * (MESSAGE_EVENTS - 1), rest]


def test_a_flood_of_undecodable_bytes_is_logged_ten_times_a_minute(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        publish(shared_redis, consumer, b"\xc1")
    publish(shared_redis, consumer, packed())

    wait_until(lambda: received, what="the good event arrives")
    assert consumer.health().counts["rejected"] == 50
    assert caplog.text.count("are rejected") == 10


def test_an_event_with_this_nodes_id_that_it_never_sent_is_a_forgery(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], rejected: list[str]
) -> None:
    node = consumer.health().node
    publish(shared_redis, consumer, packed(id=f"{node}-99", source="consumer"))
    publish(shared_redis, consumer, packed(id=f"{node}-1", source="elsewhere"))
    publish(shared_redis, consumer, packed())

    wait_until(lambda: received, what="the good event arrives")
    wait_until(wait_until_sent, what="all receivers have run")
    assert rejected == ["forged_source", "forged_source"]


@pytest.fixture
def conflicts() -> Iterator[list[str]]:
    """The ids of events that contradicted others."""
    ids: list[str] = []

    def note(sender: str, name: str, event: Event) -> None:
        ids.append(event.id)

    with signals.event_conflict.connected_to(note):
        yield ids


def numbers(received: list[Any]) -> list[Any]:
    return [n for _, n in received]


def test_events_of_a_node_whose_id_is_forged_still_arrive(
    shared_redis: RedisServer,
    consumer: Bus,
    received: list[Any],
    rejected: list[str],
    conflicts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(shared_redis, consumer, packed(id="abc-1", source="forger", seq=1))
    for n in range(2, 6):
        honest = packed(id=f"abc-{n}", source="accounts", seq=n, data={"n": n})
        publish(shared_redis, consumer, honest)

    wait_until(lambda: len(received) == 5, what="all events arrive")
    assert received == [("forger", 1), *(("accounts", n) for n in range(2, 6))]
    assert rejected == []
    wait_until(lambda: conflicts == ["abc-2"], what="the conflict is signalled")
    assert consumer.health().counts["conflicts"] == 1
    [record] = [each for each in caplog.records if "contradicts" in each.getMessage()]
    assert "The event abc-2 of 'tick', which says it is from 'accounts'" in record.getMessage()
    assert vars(record)["event_id"] == "abc-2"
    assert (vars(record)["signal"], vars(record)["service"]) == (
        "tick",
        consumer.node.config.service,
    )


def test_a_forged_higher_number_loses_no_event(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], conflicts: list[str]
) -> None:
    for n in (1, 2):
        publish(shared_redis, consumer, packed(id=f"abc-{n}", seq=n, data={"n": n}))
    publish(shared_redis, consumer, packed(id="abc-9999", seq=60_000, data={"n": "forged"}))
    for n in range(3, 300):
        publish(shared_redis, consumer, packed(id=f"abc-{n}", seq=n, data={"n": n}))

    wait_until(lambda: len(received) == 300, what="all events arrive")
    assert numbers(received) == [1, 2, "forged", *range(3, 300)]
    assert "duplicates" not in consumer.health().counts
    # The count goes on from the second event after the forged one.
    wait_until(lambda: conflicts == ["abc-3"], what="the conflict is signalled")


def test_an_impossibly_high_number_is_a_conflict_and_not_a_loss(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], conflicts: list[str]
) -> None:
    most = 2**64 - 1
    for n, seq in [(1, 1), (2, 2), (most, most), (3, 3), (most - 9, most - 9), (6, 6), (7, 7)]:
        publish(shared_redis, consumer, packed(id=f"abc-{n}", seq=seq, data={"n": n}))

    wait_until(lambda: len(received) == 7, what="all events arrive")
    assert numbers(received) == [1, 2, most, 3, most - 9, 6, 7]
    wait_until(lambda: len(conflicts) == 2, what="the conflicts are signalled")
    assert conflicts == [f"abc-{most}", f"abc-{most - 9}"]
    # The honest gap is counted all the same.
    assert consumer.health().missed == 2


def test_counting_continues_from_a_jump_that_the_next_number_confirms(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], conflicts: list[str]
) -> None:
    far = 1 + listener.MAX_MISSED + 2
    for seq in (1, far, far + 1, far + 3):
        publish(shared_redis, consumer, packed(id=f"abc-{seq}", seq=seq, data={"n": seq}))
    near = far + 3 + listener.MAX_MISSED + 1
    publish(shared_redis, consumer, packed(id=f"abc-{near}", seq=near, data={"n": near}))

    wait_until(lambda: len(received) == 5, what="all events arrive")
    wait_until(lambda: conflicts, what="the conflict is signalled")
    assert conflicts == [f"abc-{far}"]
    assert consumer.health().missed == 1 + listener.MAX_MISSED


def test_a_forged_lower_number_is_received_and_hides_no_gap(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], conflicts: list[str]
) -> None:
    for n in (5, 6, 7):
        publish(shared_redis, consumer, packed(id=f"abc-{n}", seq=n, data={"n": n}))
    publish(shared_redis, consumer, packed(id="abc-6", seq=6, data={"n": "forged"}))
    publish(shared_redis, consumer, packed(id="abc-8", seq=8, data={"n": 8}))
    publish(shared_redis, consumer, packed(id="abc-11", seq=11, data={"n": 11}))

    wait_until(lambda: len(received) == 6, what="all events arrive")
    assert numbers(received) == [5, 6, 7, "forged", 8, 11]
    wait_until(lambda: conflicts == ["abc-6"], what="the conflict is signalled")
    assert consumer.health().missed == 2


def test_an_event_that_comes_twice_is_handled_once(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], conflicts: list[str]
) -> None:
    one, two, three = (packed(id=f"abc-{n}", seq=n, data={"n": n}) for n in (1, 2, 3))
    for body in (one, two, one, two, three):
        publish(shared_redis, consumer, body)

    wait_until(lambda: len(received) == 3, what="three events arrive")
    assert numbers(received) == [1, 2, 3]
    assert consumer.health().counts["duplicates"] == 2
    assert conflicts == []


def test_an_id_forged_in_advance_hides_no_unnumbered_event(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], conflicts: list[str]
) -> None:
    honest = packed(id="relay-1", data={"n": "honest"})
    for body in (packed(id="relay-1", data={"n": "forged"}), honest, honest, packed(id="relay-2")):
        publish(shared_redis, consumer, body)

    wait_until(lambda: len(received) == 3, what="three events arrive")
    assert numbers(received) == ["forged", "honest", 1]
    wait_until(lambda: conflicts == ["relay-1"], what="the conflict is signalled")
    assert consumer.health().counts["duplicates"] == 1


def test_the_memory_of_other_nodes_is_bounded() -> None:
    codec, received = Codec(), listener.Sequences(Timing(max_remembered=5, max_hashes=20))
    bodies = [packed(id=f"n{node}-{n}", seq=n) for node in range(10) for n in range(1, 6)]
    bodies += [packed(id=f"relay{n}-1") for n in range(10)]
    for body in bodies:
        event = codec.decode(body)
        received.observe(event, event.node, body)

    assert len(received._routes) <= 5
    assert sum(len(route.bodies) for route in received._routes.values()) == received._hashes <= 20
    assert len(received._ids) == len(received._sources) == 5


def test_an_event_without_a_number_does_not_continue_the_sequence_of_another_node() -> None:
    codec, received = Codec(), listener.Sequences(Timing())
    bodies = [packed(id="steady-1", seq=1), packed(id="other-1"), packed(id="other-2", seq=2)]
    events = [codec.decode(body) for body in bodies]

    for event, body in zip(events[:2], bodies, strict=False):
        received.observe(event, event.node, body)

    assert not received.follow(events[2], bodies[2])
    body = packed(id="steady-2", seq=2)
    assert received.observe(codec.decode(body), "steady", body) == 0


def test_a_node_that_sends_often_is_not_forgotten_first() -> None:
    codec, received = Codec(), listener.Sequences(Timing(max_remembered=5))

    def hear(node: str, seq: int) -> int | Finding:
        body = packed(id=f"{node}-{seq}", seq=seq)
        event = codec.decode(body)
        return received.observe(event, event.node, body)

    hear("steady", 1)
    missing = []
    for number in range(1, 10):
        hear(f"passing{number}", 1)
        missing.append(hear("steady", 2 * number + 1))

    assert missing == [1] * 9


def test_an_undeclared_signal_is_skipped_and_counted(
    shared_redis: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = f"bad-{time.time_ns()}"
    bus = make_bus(shared_redis.url, "consumer", prefix=prefix, subscribe=["tock", "t*"])
    bus.start()
    assert bus.ready(10)
    publish(shared_redis, bus, packed(type="tock"), "tock")
    publish(shared_redis, bus, packed(type="tuck", id="foreign-2"), "tuck")

    wait_until(lambda: bus.health().counts.get("unknown") == 2, what="both are counted")
    assert "Nothing here receives 'tock'" in caplog.text
    # Names from the wire do not pile up as signals.
    assert "tuck" not in bus.namespace


def test_unknown_attributes_are_ignored(
    shared_redis: RedisServer, consumer: Bus, received: list[Any]
) -> None:
    publish(shared_redis, consumer, packed(novelty={"deep": [1]}, datacontenttype="x"))

    wait_until(lambda: received, what="the event arrives")


def test_a_payload_that_does_not_fit_one_receiver_fails_only_that_receiver(
    shared_redis: RedisServer, consumer: Bus, received: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    publish(shared_redis, consumer, packed(data={"n": 1, "m": 2}))
    publish(shared_redis, consumer, packed(id="foreign-2"))

    wait_until(lambda: received, what="the good event arrives")
    assert consumer.health().counts["failed"] == 1
    assert "receive does not accept the event foreign-1 of 'tick'" in caplog.text
    assert "got an unexpected keyword argument 'm'" in caplog.text
