"""What an event of a channel takes, step by step: the parts of `send()` and of receiving."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from contenders import PAYLOAD
from measure import Server

from flask_eventbus import Bus
from flask_eventbus.codec.codec import Codec
from flask_eventbus.event import Event
from flask_eventbus.logs import Tally
from flask_eventbus.routing.subscriptions import Subscription

#: Events of a message, and messages of a round.
EVENTS, MESSAGES = 100, 100


def steps(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Microseconds of CPU of each step, without other threads beside it, medians of the rounds."""
    found: dict[str, list[float]] = {}

    for _ in range(options.rounds):
        for name, seconds in {**sending(server), **receiving(server)}.items():
            found.setdefault(name, []).append(seconds / (EVENTS * MESSAGES) * 1e6)

    return {name: {"step": {"median": statistics.median(each)}} for name, each in found.items()}


def sending(server: Server) -> dict[str, float]:
    """Seconds of each step of sending all events."""
    numbers = range(EVENTS * MESSAGES)
    codec = Codec()
    envelope = codec.envelope("publisher", "tick")
    data = codec.pack_payload(PAYLOAD)

    def pack() -> None:
        for _ in numbers:
            codec.pack_payload(PAYLOAD)

    def encode() -> None:
        for number in numbers:
            envelope.encode(data, "9f3ac2d1b07e-1", time.time_ns(), number, {})

    with Bus(server.url, service="publisher", publish=["tick"], buffer_size=1_000_000) as bus:
        signal = bus.signal("tick")
        signal.send("publisher", **PAYLOAD)
        bus.flush(60)

        def send() -> None:
            for _ in numbers:
                signal.send("publisher", **PAYLOAD)

        all_threads = time.process_time()
        sender = cpu(send)
        bus.flush(60)
        writer = time.process_time() - all_threads - sender

    packing, encoding = cpu(pack), cpu(encode)
    return {
        "send(): pack the payload": packing,
        "send(): the rest": sender - packing,
        "writer: encode the event": encoding,
        "writer: the rest": writer - encoding,
    }


def receiving(server: Server) -> dict[str, float]:
    """Seconds of each step of receiving all events."""
    bus = Bus(server.url, service="consumer")
    calls = 0

    @bus.on("tick")
    def receive(sender: str, **payload: Any) -> None:
        nonlocal calls
        calls += 1

    # Its own parts, so that no thread runs beside a step.
    listening = bus.node._inbound
    decoder, codec = listening.listener._decoder, listening.listener._decoder._codec
    subscription = Subscription(name="tick")
    messages = [message(codec, first) for first in range(1, EVENTS * MESSAGES, EVENTS)]
    batches: list[list[Event]] = []

    def unpack() -> None:
        for each in messages:
            for _ in codec._values.unpacker(each):
                pass

    def decode() -> None:
        for each in messages:
            for _ in codec.decode_message(each):
                pass

    def accept() -> None:
        for each in messages:
            events: list[Event] = []
            decoder.decode("tick", subscription, each, events, [])
            batches.append(events)

    def dispatch() -> None:
        for events in batches:
            bus.node.dispatcher.dispatch_all(events, Tally())

    def run() -> None:
        for events in batches:
            for event in events:
                receive(event.source, **event.payload)

    unpacking, decoding, accepting, dispatching = map(cpu, (unpack, decode, accept, dispatch))
    running = cpu(run)
    assert calls == 2 * EVENTS * MESSAGES
    bus.stop()

    return {
        "listener: msgpack": unpacking,
        "listener: check the event": decoding - unpacking,
        "listener: sequence and repetitions": accepting - decoding,
        "worker: dispatch": dispatching - running,
        "worker: the receiver": running,
    }


def message(codec: Codec, first: int) -> bytes:
    """Return a message with the events from number ``first`` on."""
    envelope = codec.envelope("publisher", "tick")
    data = codec.pack_payload(PAYLOAD)
    return b"".join(
        envelope.encode(data, f"9f3ac2d1b07e-{number}", time.time_ns(), number, {})
        for number in range(first, first + EVENTS)
    )


def cpu(run: Callable[[], None]) -> float:
    """Seconds of CPU that the calling thread takes to run a function."""
    start = time.thread_time()
    run()
    return time.thread_time() - start
