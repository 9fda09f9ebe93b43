"""Tests of the listener: it hands the events of a read to the worker threads."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from flask_eventbus import Bus
from flask_eventbus.channels.listener import QUEUED_AT_ONCE
from flask_eventbus.channels.reader import Frame
from flask_eventbus.codec.codec import MESSAGE_EVENTS
from flask_eventbus.routing.subscriptions import Subscription


def event(number: int, **changes: Any) -> bytes:
    """Return the bytes of an event of ``tick``; ``None`` leaves an attribute out."""
    attributes = {
        "specversion": "1.0",
        "source": "elsewhere",
        "type": "tick",
        "id": f"foreign-{number}",
        "time": msgpack.Timestamp.from_unix(1_709_209_815),
        "data": {"n": number},
        "seq": number,
        **changes,
    }
    kept = {name: value for name, value in attributes.items() if value is not None}
    body: bytes = msgpack.packb(kept)
    return body


#: Changes to an event that its listener must treat as it does in a message of its own.
CHANGES: list[dict[str, Any]] = [
    {"id": "foreign-x-7"},
    {"id": "foreign-\N{ARABIC-INDIC DIGIT SEVEN}"},
    {"id": "foreign-" + "1" * 21},
    {"id": "foreign-"},
    {"id": "foreign"},
    {"id": 7},
    {"id": None},
    {"source": "other"},
    {"source": "unwanted"},
    {"type": "tock"},
    {"specversion": "2.0"},
    {"time": 7},
    {"seq": None},
    {"seq": 0},
    {"seq": True},
    {"seq": 1, "data": {"n": "forged"}},
    {"seq": 2**64 - 1},
    {"seq": None, "key": "a"},
    {"hops": 1},
    {"data": {"sender": "x"}},
    {"data": {"n": [1, {"a": 2}]}},
    {"data": {"n": msgpack.ExtType(99, b"")}},
    {"data": {"n": "x" * 2_000}},
    {"data": {b"n": 1}},
    {"data": [1]},
]


@pytest.mark.parametrize("seed", range(20))
def test_events_that_share_a_message_are_treated_as_in_messages_of_their_own(
    make_bus: Callable[..., Bus], seed: int
) -> None:
    dice = random.Random(seed)  # noqa: S311 - the same test data every time
    changes = itertools.cycle(dice.sample(CHANGES, len(CHANGES)))
    bodies: list[bytes] = []
    number = 0

    for _ in range(400):
        number += dice.choice([1, 1, 1, 1, 2])
        kind = dice.random()

        if kind < 0.6:
            bodies.append(event(number))
        elif kind < 0.7 and bodies:
            bodies.append(dice.choice(bodies[-20:]))
        elif kind < 0.8:
            # Another node, with numbers of its own.
            bodies.append(event(number, id=f"foreign-b-{number}", seq=number // 2 + 1))
        else:
            bodies.append(event(number, **next(changes)))

    def receive(messages: list[bytes]) -> tuple[list[str], dict[str, int]]:
        bus = make_bus(f"memory://{time.time_ns()}", "consumer")
        node = bus.node
        decoder = node._inbound.listener._decoder
        subscription = Subscription(name="tick", sources=frozenset(["elsewhere", "other"]))
        found: tuple[list[Any], list[int]] = [], []

        for message in messages:
            decoder.decode("tick", subscription, message, *found)

        return list(map(repr, zip(*found, strict=True))), node.counters.all()

    joined = [b"".join(bodies[first : first + 100]) for first in range(0, len(bodies), 100)]

    together, alone = receive(joined), receive(bodies)

    assert together == alone
    assert {"missed", "duplicates", "conflicts", "rejected", "filtered"} <= alone[1].keys()


def test_the_events_of_a_long_read_reach_the_workers_in_small_batches(
    make_bus: Callable[..., Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue of the workers is bounded: as one batch, they would push each other out of it."""
    bus = make_bus(f"memory://{time.time_ns()}", "consumer")
    bus.on("tick")(print)
    bus.start()
    assert bus.ready(10)
    batches: list[list[int]] = []
    monkeypatch.setattr(
        bus.node._inbound.pool,
        "put",
        lambda events, sizes: batches.append([event.payload["n"] for event in events]),
    )
    channel = b"eventbus:{tick}:channel"
    numbers = list(range(1, 3_001))
    messages = [
        Frame("message", channel, channel, b"".join(map(event, numbers[first : first + 150])))
        for first in range(0, len(numbers), 150)
    ]

    bus.node._inbound.listener._accept(messages)

    assert [number for batch in batches for number in batch] == numbers
    assert max(map(len, batches)) < QUEUED_AT_ONCE + MESSAGE_EVENTS
    assert bus.health().counts["received"] == len(numbers)


def test_events_are_counted_as_received_before_their_receivers_can_run(
    make_bus: Callable[..., Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(f"memory://{time.time_ns()}", "consumer")
    bus.on("tick")(print)
    bus.start()
    assert bus.ready(10)
    counts: list[int] = []
    monkeypatch.setattr(
        bus.node._inbound.pool,
        "put",
        lambda events, sizes: counts.append(bus.health().counts.get("received", 0)),
    )
    channel = b"eventbus:{tick}:channel"

    bus.node._inbound.listener._accept([Frame("message", channel, channel, event(1))])

    assert counts == [1]
