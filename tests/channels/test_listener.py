"""Tests of the listener: it hands the events of a read to the worker threads."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgpack
import pytest

from flask_eventbus import Bus
from flask_eventbus.channels.listener import QUEUED_AT_ONCE
from flask_eventbus.channels.reader import Frame
from flask_eventbus.codec.codec import MESSAGE_EVENTS


def event(number: int) -> bytes:
    """Return the bytes of an event of ``tick``."""
    attributes = {
        "specversion": "1.0",
        "source": "elsewhere",
        "type": "tick",
        "id": f"foreign-{number}",
        "time": msgpack.Timestamp.from_unix(1_709_209_815),
        "data": {"n": number},
        "seq": number,
    }
    body: bytes = msgpack.packb(attributes)
    return body


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
        lambda batch: batches.append([event.payload["n"] for event, _ in batch]),
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
