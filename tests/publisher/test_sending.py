"""Sending from anywhere: signal handlers, finalizers, many threads, the end of a process."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus, PayloadError, PublishError, ending, signals
from flask_eventbus.codec.codec import Codec, Envelope, split_message
from flask_eventbus.config import TIMING, Timing
from flask_eventbus.event import Event, handling
from flask_eventbus.logs import Counters
from flask_eventbus.publisher import buffer, writer
from flask_eventbus.publisher.buffer import Buffer, MessageQueue
from flask_eventbus.publisher.connection import PublishConnection
from flask_eventbus.publisher.message import (
    ChannelDestination,
    Message,
    RouteState,
    StreamDestination,
)
from flask_eventbus.publisher.writer import Writer
from flask_eventbus.routing.routes import Route
from flask_eventbus.testing import isolated
from flask_eventbus.transport.keys import StreamKeys
from flask_eventbus.typing import Publish

pytestmark = [
    pytest.mark.second_look("runs many threads, and processes that are ending"),
    pytest.mark.timing(listeners_return=0.0, max_writer_backoff=0.2),
]

Make = Callable[..., Bus]


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own on the shared server."""
    return str(request.node.name)[:60].replace("[", "-").replace("]", "")


def received_by(bus: Bus, name: str = "tick") -> list[Any]:
    """Start listening to ``name`` and return the list that its numbers go to."""
    received: list[Any] = []

    @bus.on(name)
    def receive(sender: str, n: int, **extra: Any) -> None:
        received.append(n)

    bus.start()
    assert bus.ready(10)
    return received


# -- in the middle of another send --------------------------------------------------------


@pytest.fixture
def interrupting() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Run a function in the main thread every half millisecond of its work."""
    before = signal.getsignal(signal.SIGPROF)

    def interrupt(run: Callable[[], None]) -> None:
        signal.signal(signal.SIGPROF, lambda number, frame: run())
        signal.setitimer(signal.ITIMER_PROF, 0.0005, 0.0005)

    yield interrupt

    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def test_a_signal_handler_that_sends_during_a_send_loses_no_event(
    shared_redis: RedisServer,
    make_bus: Make,
    prefix: str,
    interrupting: Callable[[Callable[[], None]], None],
) -> None:
    consumer = make_bus(shared_redis.url, "consumer", prefix=prefix)
    received = received_by(consumer)
    publisher = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])
    handled: list[int] = []

    def send_three() -> None:
        for n in range(3):
            handled.append(n)
            publisher.signal("tick").send("handler", n=-1)

    interrupting(send_three)
    count = 0
    while len(handled) <= 100:
        publisher.signal("tick").send("test", n=count)
        count += 1
    signal.setitimer(signal.ITIMER_PROF, 0)

    assert publisher.flush(20)
    wait_until(lambda: len(received) == count + len(handled), what="all events arrive")
    assert [n for n in received if n >= 0] == list(range(count))
    assert consumer.health().missed == 0
    assert publisher.node._publisher._buffer.bytes == 0


def test_a_signal_handler_that_sends_while_events_are_dropped_does_not_block(
    make_bus: Make, interrupting: Callable[[Callable[[], None]], None]
) -> None:
    bus = make_bus("redis://127.0.0.1:1/0", "publisher", publish=["tick"], buffer_size=10)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().publishing, what="the outage is known")
    sent = [1]

    def send() -> None:
        sent[0] += 1
        bus.signal("tick").send("handler", n=-1)
        bus.health()

    interrupting(send)
    count = 0
    while sent[0] <= 100:
        bus.signal("tick").send("test", n=count)
        bus.health()
        count += 1
    signal.setitimer(signal.ITIMER_PROF, 0)
    # The handler may have sent its last event after the other had found room.
    bus.signal("tick").send("test", n=count)

    assert bus.health().buffered == 10
    assert bus.health().counts["dropped"] == count + 1 + sent[0] - 10
    assert len(bus.node._publisher._buffer) == 10


def test_a_finalizer_that_sends_at_any_point_loses_no_event(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    publisher = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])

    class Ring:
        def __init__(self, n: int) -> None:
            self.n = n
            self.itself = self

        def __del__(self) -> None:
            publisher.signal("tick").send("finalizer", n=self.n)

    for n in range(5_000):
        Ring(n)
        publisher.signal("tick").send("test", n=-1)

    def all_arrived() -> bool:
        # Where another thread is in the middle of a collection, this one does nothing.
        gc.collect()
        return len(received) == 10_000

    assert publisher.flush(20)
    wait_until(all_arrived, timeout=20, what="all events arrive")
    assert sorted(n for n in received if n >= 0) == list(range(5_000))


# -- from those who are told --------------------------------------------------------------


def test_a_receiver_of_events_dropped_may_send_without_blocking_others(make_bus: Make) -> None:
    bus = make_bus("redis://127.0.0.1:1/0", "publisher", publish=["tick"], buffer_size=5)
    ended: list[bool] = []

    def alarm(sender: str, where: str, count: int) -> None:
        if not ended:
            ended.append(False)
            other = threading.Thread(target=send_one)
            other.start()
            other.join(10)
            ended[0] = not other.is_alive()

        send_one()

    def send_one() -> None:
        bus.signal("tick").send("test", n=0)

    send_one()
    wait_until(lambda: not bus.health().publishing, what="the outage is known")
    with signals.events_dropped.connected_to(alarm, sender="publisher"):
        for _ in range(6):
            send_one()

        wait_until(lambda: ended == [True], what="the other thread has sent")

    assert bus.health().buffered == 5
    assert bus.health().counts["dropped"] >= 4


def test_a_confirmed_send_in_the_writer_thread_does_not_deadlock(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(
        redis_server.url, publish={"tick": {"confirm": True}}, on_outage="raise", timeout=30
    )
    sent = threading.Event()

    def announce(sender: str, **values: Any) -> None:
        bus.signal("tick").send("announcement", n=2)
        sent.set()

    redis_server.kill()
    bus.node.ask()
    wait_until(lambda: not bus.health().publishing, what="the outage is known")
    with signals.publisher_restored.connected_to(announce, sender="tests"):
        redis_server.start()
        assert sent.wait(10)

    assert bus.flush(10)
    assert bus.health().counts["published"] == 1


def test_a_receiver_of_a_lifecycle_signal_may_stop_the_bus(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, "publisher", publish=["tick"])
    received_by(bus, "tock")
    stopped = threading.Event()

    def stop(sender: str, **values: Any) -> None:
        bus.stop(flush=0)
        stopped.set()

    with signals.publisher_lost.connected_to(stop, sender="publisher"):
        redis_server.kill()
        bus.node.ask()
        assert stopped.wait(20)

    assert not bus.health().listening


def test_stop_in_the_writer_thread_is_refused_and_changes_nothing(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, "publisher", publish=["tick"])
    received = received_by(bus, "tock")
    refused: list[str] = []

    class Stopping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                bus.stop()
            except RuntimeError as error:
                refused.append(str(error))

    handler = Stopping()
    logger = logging.getLogger("flask_eventbus.publisher.outage")
    logger.addHandler(handler)
    redis_server.kill()
    bus.node.ask()
    wait_until(lambda: refused, what="it is refused")
    logger.removeHandler(handler)

    assert refused[0].startswith("stop() was called from a thread of the bus")
    redis_server.start()
    assert bus.ready(10)
    assert bus.health().listening
    make_bus(redis_server.url, "other", publish=["tock"]).signal("tock").send("test", n=1)
    wait_until(lambda: received == [1], what="it still listens")


# -- while Redis is away ------------------------------------------------------------------


def test_the_buffer_is_bounded_in_events_and_in_bytes(make_bus: Make) -> None:
    bus = make_bus("redis://127.0.0.1:1/0", publish=["tick"], buffer_size=1_000)
    bus.signal("tick").send("test", n=0)
    wait_until(lambda: not bus.health().publishing, what="the outage is known")

    for n in range(50_000):
        bus.signal("tick").send("test", n=n)
    assert bus.health().buffered == 1_000
    for n in range(200):
        bus.signal("tick").send("test", n=n, data=bytes(900_000))

    waiting = bus.node._publisher._buffer
    assert waiting.bytes == sum(outgoing.size for outgoing in waiting)
    assert waiting.bytes <= 64 * 1024 * 1024
    assert bus.health().counts["dropped"] == 50_201 - len(waiting)


class Watched(deque[Any]):
    """A line of events that counts how many of them were looked at."""

    looks = 0

    def __iter__(self) -> Iterator[Any]:
        for event in super().__iter__():
            Watched.looks += 1
            yield event

    def __getitem__(self, index: Any) -> Any:
        Watched.looks += 1
        return super().__getitem__(index)

    def remove(self, event: Any) -> None:
        if event in self:
            Watched.looks += self.index(event) + 1

        super().remove(event)

    def __contains__(self, event: Any) -> bool:
        return any(other is event for other in super().__iter__())


@pytest.mark.parametrize("waiting", ["channel", "stream", "both"])
def test_a_send_into_a_full_buffer_examines_few_events(
    make_bus: Make, monkeypatch: pytest.MonkeyPatch, waiting: str
) -> None:
    monkeypatch.setattr(buffer, "deque", Watched)
    publish = {"channel": "channel", "stream": {"via": "stream", "confirm": False}}
    bus = make_bus("redis://127.0.0.1:1/0", publish=publish, buffer_size=2_000)
    bus.signal("channel").send("test")
    wait_until(lambda: not bus.health().publishing, what="the outage is known")

    # Streams first: the channel events that are dropped wait behind them.
    for name in {"both": ["stream", "channel"]}.get(waiting, [waiting]):
        while bus.health().buffered < (1_000 if name == "stream" != waiting else 2_000):
            bus.signal(name).send("test")
    Watched.looks = 0
    for _ in range(100):
        bus.signal("channel").send("test")

    assert bus.health().counts["dropped"] >= 100
    # The thread that writes asks for Redis meanwhile, and looks at the first.
    assert Watched.looks < 1_000


def test_a_full_buffer_keeps_the_newest_channel_events_and_every_stream_event() -> None:
    publish: Publish = {"channel": "channel", "stream": {"via": "stream", "confirm": False}}

    with isolated() as eventbus, Bus(service="tests", publish=publish, buffer_size=5) as bus:
        with eventbus.redis_away():
            bus.signal("stream").send("test", n=0)
            for n in range(1, 9):
                bus.signal("channel").send("test", n=n)

        # The first event for the stream and the last four for the channel fit.
        kept = [event.payload["n"] for event in eventbus.published()]
        assert bus.health().counts["dropped"] == 4

    assert kept == [0, 5, 6, 7, 8]


def test_an_ending_program_waits_five_seconds_for_redis_and_an_idle_one_pings_as_often() -> None:
    assert inspect.signature(Bus.stop).parameters["flush"].default == ending.FLUSH_AT_EXIT
    assert ending.FLUSH_AT_EXIT == 5.0
    assert TIMING.ping_after == 5.0


def test_the_buffer_counts_bytes_on_the_wire(make_bus: Make) -> None:
    publish = {
        "channel": "channel",
        "stream": {"via": "stream", "confirm": False},
        "keyed": {"via": "stream", "confirm": False, "key": "user"},
    }
    bus = make_bus("redis://127.0.0.1:1/0", publish=publish)
    bus.signal("channel").send("test", n=1)
    wait_until(lambda: not bus.health().publishing, what="the outage is known")
    cause = Event(
        name="first",
        source="é" * 20,
        id="node-1",
        time=datetime.now(UTC),
        payload={},
        correlation_id="x" * 40,
        hops=3,
        traceparent="00-" + "0" * 52,
    )

    for n in range(40):
        bus.signal("channel").send("test", text="x" * n)
        bus.signal("stream").send("test", n=n)
        bus.signal("keyed").send("test", user="ü" * (n + 1))
    token = handling.set(cause)
    bus.signal("channel").send("test")
    bus.signal("keyed").send("test", user="x" * 250)
    handling.reset(token)

    waiting = list(bus.node._publisher._buffer)
    assert len(waiting) == 123
    for outgoing in waiting:
        outgoing.assign_seq()
        assert outgoing.size == len(outgoing.encoded())


def test_an_event_may_have_exactly_as_many_bytes_as_the_limit(make_bus: Make) -> None:
    small = make_bus("memory://limit", publish=["tick"], max_event_bytes=2_048)
    with pytest.raises(PayloadError, match="would have up to") as caught:
        small.signal("tick").send("test", data=bytes(2_000))
    [size] = re.findall(r"up to ([\d,]+) bytes", str(caught.value))
    most = int(size.replace(",", ""))

    make_bus("memory://limit", publish=["tick"], max_event_bytes=most).signal("tick").send(
        "test", data=bytes(2_000)
    )
    with pytest.raises(PayloadError, match=f"more than the {most - 1:,} of"):
        make_bus("memory://limit", publish=["tick"], max_event_bytes=most - 1).signal("tick").send(
            "test", data=bytes(2_000)
        )


def test_a_full_buffer_raises_with_the_policy_raise(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(
        redis_server.url, publish=["tick"], on_outage="raise", buffer_size=5, timeout=0.05
    )
    assert bus.flush(1)
    bus.signal("tick").send("test", n=0)
    assert bus.flush(10)
    redis_server.hang()
    accepted = 0

    def send_on() -> None:
        nonlocal accepted
        for n in range(1, 1_000):
            bus.signal("tick").send("test", n=n)
            accepted = n

    with pytest.raises(PublishError, match=r"no answer within 0\.05 s"):
        send_on()

    assert accepted >= 5
    assert "dropped" not in bus.health().counts
    redis_server.resume()
    assert bus.flush(10)
    assert bus.health().counts["published"] == accepted + 1
    bus.signal("tick").send("test", n=0)


@pytest.mark.timing(batch_events=50)
def test_a_late_confirmation_behind_a_long_buffer_drops_nothing(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = PublishConnection.send

    def slowly(exchange: PublishConnection, *arguments: Any) -> None:
        time.sleep(0.02)
        send(exchange, *arguments)

    # What waits takes nearly a second, and there is room again after a fiftieth of one.
    monkeypatch.setattr(PublishConnection, "send", slowly)
    bus = make_bus(
        shared_redis.url,
        prefix=prefix,
        publish={"tick": None, "tock": {"confirm": True}},
        buffer_size=2_000,
        timeout=0.5,
    )
    enough = threading.Event()

    def confirm() -> None:
        while not enough.is_set():
            bus.signal("tock").send("test")

    confirming = threading.Thread(target=confirm)
    confirming.start()
    for n in range(4_000):
        bus.signal("tick").send("test", n=n)
    enough.set()
    confirming.join()

    assert bus.flush(10)
    assert "dropped" not in bus.health().counts


def test_a_long_outage_logs_two_lines(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(redis_server.url, "publisher", publish=["tick"])
    redis_server.kill()
    deadline = time.monotonic() + 1.5

    while time.monotonic() < deadline:
        bus.signal("tick").send("test", n=0)
        time.sleep(0.001)
    redis_server.start()
    assert bus.flush(10)

    texts = [r.getMessage() for r in caplog.records if r.name.startswith("flask_eventbus")]
    assert len(texts) == 2
    assert "Redis is away" in texts[0]
    assert "Redis is back" in texts[1]


def test_listeners_count_dropped_events_as_missed(
    redis_server: RedisServer, make_bus: Make
) -> None:
    consumer = make_bus(redis_server.url, "consumer")
    received = received_by(consumer)
    publisher = make_bus(
        redis_server.url, "publisher", publish=["tick"], buffer_size=10, timeout=0.5
    )
    publisher.signal("tick").send("test", n=0)
    wait_until(lambda: received == [0], what="the first event arrives")
    redis_server.hang()

    for n in range(1, 101):
        publisher.signal("tick").send("test", n=n)
    redis_server.resume()
    assert publisher.flush(10)
    publisher.signal("tick").send("test", n=101)

    wait_until(lambda: received[-1:] == [101], what="the last event arrives")
    assert consumer.health().missed == publisher.health().counts["dropped"] > 0
    assert len(received) + consumer.health().missed == 102


@pytest.mark.skipif(ending.page is None, reason="the kernel does not mark the memory of a child")
def test_send_does_not_ask_the_kernel_for_the_process_id(
    make_bus: Make, shared_redis: RedisServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])
    tick = bus.signal("tick")
    tick.send("test", n=1)
    this, asked = threading.get_ident(), []
    getpid = os.getpid

    def ask() -> int:
        asked.append(threading.get_ident())
        return getpid()

    monkeypatch.setattr(os, "getpid", ask)
    tick.send("test", n=2)

    assert this not in asked


def buffer_of(
    count: int, *, most_events: int = 10, most_bytes: int = buffer.MAX_BYTES
) -> tuple[Buffer, list[Message]]:
    """Return a buffer with confirmed channel events, and those events."""
    waiting = Buffer(most_events=most_events, most_bytes=most_bytes)
    destination = ChannelDestination("tick", "tick")
    envelope = Envelope("tests", "tick")
    state = RouteState(route=Route(name="tick"), destination=destination, envelope=envelope)
    events = [Message(state, b"\x80", {}, True) for _ in range(count)]

    for number, event in enumerate(events, 1):
        event.assign_id("node", number, 0)
        waiting.put(event)

    return waiting, events


@pytest.mark.parametrize("first", [True, False])
def test_an_event_is_counted_before_its_confirmed_send_or_a_flush_returns(
    shared_redis: RedisServer,
    make_bus: Make,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    first: bool,
) -> None:
    bus = make_bus(shared_redis.url, publish=["tick"], prefix=prefix)
    bus.publishes("paid", confirm=True)

    # The writer thread writes the first event; later ones are written by their senders.
    if not first:
        bus.signal("paid").send("tests")

    seen: list[tuple[int, set[bool]]] = []
    writer, buffered = bus.node._publisher._writer, bus.node._publisher._buffer
    add = Counters.add

    def spy(counters: Counters, name: str, count: int = 1) -> None:
        if name == "published":
            seen.append((len(buffered), {message.is_finished for message in writer.senders}))

        add(counters, name, count)

    monkeypatch.setattr(Counters, "add", spy)
    bus.signal("paid").send("tests")
    bus.signal("tick").send("tests")
    assert bus.flush(10)
    monkeypatch.undo()

    confirmed, flushed = seen
    assert confirmed[1] == {False}
    assert flushed == (1, set())


def test_an_event_that_a_signal_handler_sent_unconfirmed_is_confirmed_when_sent_again() -> None:
    destination = StreamDestination("tick", "tick", maxlen=10)
    route = Route(name="tick", via="stream", confirm=True)
    envelope = Envelope("tests", "tick")
    state = RouteState(route=route, destination=destination, envelope=envelope)
    event = Message(state, b"\x80", {}, False)

    assert not event.copy().wait_for_wakeup(deadline=0.0)


def test_a_withdrawn_event_leaves_the_buffer_without_a_trace() -> None:
    waiting, events = buffer_of(4)
    assert waiting.take(most_events=2, most_bytes=1_000) == events[:2]
    waiting.put_back()
    events[0].withdrawn = events[2].withdrawn = True

    assert waiting.take(most_events=10, most_bytes=10_000) == [events[1], events[3]]
    assert [events[n].seq for n in range(4)] == [1, 2, None, 3]
    assert waiting.bytes == 0


def test_a_withdrawn_event_does_not_count_as_buffered() -> None:
    waiting, events = buffer_of(3)
    waiting.take(most_events=1, most_bytes=1_000)
    waiting.withdraw(events[0])
    waiting.withdraw(events[1])
    assert list(waiting) == [events[0], events[2]]

    waiting.put_back()
    assert list(waiting) == [events[2]]


def test_a_signal_handler_that_empties_the_buffer_ends_the_taking_of_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting, events = buffer_of(3)
    cleared: list[Message] = []
    monkeypatch.setattr(Message, "assign_seq", lambda _: cleared.extend(waiting.clear()))

    assert waiting.take(most_events=10, most_bytes=10_000) == [events[0]]
    assert cleared == events
    assert len(waiting) == 0


# -- many threads, and the ends of things -------------------------------------------------


def test_a_send_does_not_wait_for_a_thread_that_holds_the_lock_of_the_buffer(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    publish: Publish = {"tick": "channel", "soft": {"via": "stream", "confirm": False}}
    bus = make_bus(shared_redis.url, prefix=prefix, publish=publish)
    bus.signal("tick").send("tests", n=0)
    assert bus.flush(10)

    def send() -> None:
        bus.signal("tick").send("tests", n=1)
        bus.signal("soft").send("tests", n=2)

    with bus.node._publisher._buffer.lock:
        sender = threading.Thread(target=send)
        sender.start()
        sender.join(10)

        assert not sender.is_alive()
        assert bus.health().buffered == 2

    assert bus.flush(10)
    assert bus.health().counts["published"] == 3


def test_threads_that_send_at_the_same_moment_fill_the_buffer_up_to_its_limit(
    make_bus: Make,
) -> None:
    bus = make_bus("redis://127.0.0.1:1/0", publish=["tick"], buffer_size=500)
    bus.signal("tick").send("tests")
    wait_until(lambda: not bus.health().publishing, what="the outage is known")

    def send() -> None:
        for _ in range(1_000):
            bus.signal("tick").send("tests")

    senders = [threading.Thread(target=send) for _ in range(8)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()

    waiting = bus.node._publisher._buffer
    assert bus.health().buffered == 500
    assert bus.health().counts["dropped"] == 7_501
    assert waiting.bytes == sum(event.size for event in waiting)


@pytest.mark.parametrize(
    ("size", "limits"),
    [(5_000, {"most_events": 10_000}), (100, {"most_events": 100}), (100, {"most_bytes": 4_000})],
    ids=["a large event", "few places", "few bytes"],
)
def test_an_event_needs_the_lock_unless_it_is_small_and_there_is_much_room(
    size: int, limits: dict[str, int]
) -> None:
    waiting, [event] = buffer_of(1, **{"most_events": 10_000, **limits})
    event.size = 100
    assert waiting.has_room(event)
    assert waiting.has_much_room(event) is (size == 5_000)

    event.size = size
    assert not waiting.has_much_room(event)


def test_at_most_a_thousand_events_of_a_queue_are_uncounted() -> None:
    waiting, [event] = buffer_of(1, most_events=1_000_000)
    assert waiting.has_room(event)
    count = 0

    while waiting.has_much_room(event):
        waiting.put(event)
        count += 1

    assert count == 1_000
    assert waiting.bytes == 1_001 * event.size
    # Under the lock they are counted, and there is room for more.
    assert waiting.has_room(event)
    assert waiting.has_much_room(event)
    assert waiting.bytes == 1_001 * event.size


def test_no_event_is_added_without_the_lock_while_the_room_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting, [event] = buffer_of(1, most_events=10_000)
    assert waiting.has_room(event)
    count, found = MessageQueue.count, []

    def look(queue: MessageQueue) -> None:
        count(queue)
        found.append(waiting.has_much_room(event))

    waiting.put(event)
    monkeypatch.setattr(MessageQueue, "count", look)
    assert waiting.has_room(event)

    assert found == [False]
    assert waiting.has_much_room(event)


def test_a_flush_ends_once_the_last_event_is_taken_back_for_the_next_publisher() -> None:
    waiting, [event] = buffer_of(1)
    left: list[bool] = []
    flushing = threading.Thread(target=lambda: left.append(waiting.wait_until_left(1, 60)))
    flushing.start()
    wait_until(lambda: waiting._waiting, what="the flush waits")
    assert waiting.take_back(event)
    flushing.join(30)

    assert left == [True]
    assert not waiting.take_back(event)
    assert waiting.bytes == 0


def test_an_event_added_while_the_writer_thread_looks_for_work_is_written_at_once(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(ping_after=1_000.0)
    bus = make_bus(shared_redis.url, prefix=prefix, publish=["tick"], timing=timing)
    bus.signal("tick").send("tests", n=0)
    assert bus.flush(10)
    running = bus.node._publisher._writer
    wait_until(lambda: running.thread_waits, what="the writer thread waits")
    has_work: Any = Writer._has_work
    late: list[bool] = []

    def look(self: Writer) -> bool:
        found = bool(has_work.fget(self))

        if not found and not late:
            late.append(True)
            sender = threading.Thread(target=bus.signal("tick").send, args=["tests"])
            sender.start()
            sender.join()

        return found

    monkeypatch.setattr(Writer, "_has_work", property(look))
    bus.signal("tick").send("tests", n=1)
    wait_until(lambda: late, what="an event is added after the look")

    assert bus.flush(10)
    assert bus.health().counts["published"] == 3


def test_an_event_added_while_the_bus_stops_is_sent_by_the_next_publisher(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish=["tick"])
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus.signal("tick").send("tests", n=0)
    assert bus.flush(10)
    put = Buffer.put

    def stop_first(self: Buffer, message: Message) -> None:
        monkeypatch.setattr(Buffer, "put", put)
        bus.stop()
        put(self, message)

    monkeypatch.setattr(Buffer, "put", stop_first)
    former = bus.node._publisher
    bus.signal("tick").send("tests", n=1)

    assert bus.node._publisher is not former
    assert former.buffered == 0
    assert former._buffer.bytes == 0
    assert bus.flush(10)
    wait_until(lambda: len(received) == 2, what="both events arrive")
    assert received == [0, 1]


def test_a_stop_leaves_an_event_to_its_sender_that_is_about_to_take_it_back(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish=["tick"])
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus.signal("tick").send("tests", n=0)
    assert bus.flush(10)
    put, end = Buffer.put, Writer.end
    closed, added, ended = threading.Event(), threading.Event(), threading.Event()

    def put_late(self: Buffer, message: Message) -> None:
        monkeypatch.setattr(Buffer, "put", put)
        assert closed.wait(20)
        put(self, message)
        added.set()
        assert ended.wait(20)

    def end_late(self: Writer, *args: Any, **options: Any) -> None:
        monkeypatch.setattr(Writer, "end", end)
        closed.set()
        assert added.wait(20)
        end(self, *args, **options)

    monkeypatch.setattr(Buffer, "put", put_late)
    monkeypatch.setattr(Writer, "end", end_late)
    sender = threading.Thread(target=lambda: bus.signal("tick").send("tests", n=1))
    sender.start()
    bus.stop()
    ended.set()
    sender.join(20)

    assert bus.flush(10)
    wait_until(lambda: len(received) == 2, what="both events arrive")
    assert received == [0, 1]
    assert "dropped" not in bus.health().counts


def test_an_event_added_while_another_thread_ends_writing_is_not_lost(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])
    start, close = threading.Thread.start, PublishConnection.close
    late: list[bool] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("eventbus-writer"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def close_late(self: PublishConnection) -> None:
        close(self)

        if not late:
            late.append(True)
            sender = threading.Thread(target=lambda: bus.signal("tick").send("test", n=1))
            sender.start()
            sender.join()

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(PublishConnection, "close", close_late)
    bus.signal("tick").send("test", n=0)

    assert bus.health().buffered == 0
    assert "dropped" not in bus.health().counts
    wait_until(lambda: received == [0, 1], what="both events arrive")


def test_a_flush_waits_for_events_that_were_added_out_of_their_order() -> None:
    waiting, events = buffer_of(0)
    extra = buffer_of(3)[1]

    for event in (extra[2], extra[0], extra[1]):
        waiting.put(event)

    for left in (3, 2, 1):
        assert not waiting.wait_until_left(3, timeout=0.0)
        assert len(waiting) == left
        waiting.take(1, 1_000)
        assert not waiting.wait_until_left(3, timeout=0.0)
        waiting.finish()

    assert events == []
    assert waiting.wait_until_left(3, timeout=0.0)


def test_an_event_is_written_if_the_writer_thread_cannot_start_again(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish=["tick"])
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus.signal("tick").send("tests", n=0)
    assert bus.flush(10)
    put = Buffer.put
    running = bus.node._publisher._writer
    thread = running.thread

    def lose_thread(self: Buffer, message: Message) -> None:
        # As if another sender, which holds the lock, has tried to start the thread in vain.
        running.thread, running.thread_waits = None, False
        put(self, message)

    monkeypatch.setattr(Buffer, "put", lose_thread)
    bus.signal("tick").send("tests", n=1)
    monkeypatch.undo()

    wait_until(lambda: len(received) == 2, what="both events arrive")
    running.thread = thread


def test_a_bus_is_started_and_stopped_by_many_threads_while_others_send(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    publisher = make_bus(
        shared_redis.url, "publisher", prefix=prefix, publish=["tick"], buffer_size=1_000_000
    )
    consumer = make_bus(shared_redis.url, "consumer", prefix=prefix)
    received = received_by(consumer)
    received_by(publisher, "tock")
    enough = threading.Event()
    sent: list[int] = []

    def send(start: int) -> None:
        n = start
        while not enough.is_set():
            publisher.signal("tick").send("test", n=n)
            sent.append(n)
            n += 4
            time.sleep(0.0005)

    def turn() -> None:
        for _ in range(4):
            publisher.stop()
            publisher.start()

    senders = [threading.Thread(target=send, args=(start,)) for start in range(4)]
    turning = [threading.Thread(target=turn) for _ in range(2)]
    for thread in senders + turning:
        thread.start()
    for thread in turning:
        thread.join()
    enough.set()
    for thread in senders:
        thread.join()

    assert publisher.flush(10)
    wait_until(lambda: len(received) == len(sent), what="all events arrive")
    assert sorted(received) == sorted(sent)
    assert publisher.ready(10)
    assert consumer.health().missed == 0


def test_events_of_a_garbage_collected_bus_still_arrive(
    redis_server: RedisServer, make_bus: Make, timing: Timing
) -> None:
    received = received_by(make_bus(redis_server.url, "consumer"))

    def send_and_forget(n: int) -> None:
        bus = Bus(redis_server.url, service="passing", publish=["tick"], _timing=timing)
        bus.signal("tick").send("test", n=n)

    redis_server.hang()
    for n in range(6):
        send_and_forget(n)
        gc.collect()
    assert writers_without_bus()
    redis_server.resume()

    wait_until(lambda: sorted(received) == list(range(6)), what="all events arrive")
    wait_until(lambda: not writers_without_bus(), what="their threads end")


def writers_without_bus() -> list[str]:
    """The writing threads of buses that are gone."""
    from flask_eventbus.node import nodes

    living = {f"eventbus-writer-{node.name}" for node in list(nodes)}
    names = {thread.name for thread in threading.enumerate()}
    return sorted(name for name in names - living if name.startswith("eventbus-writer"))


def test_deleted_buses_leave_nothing_behind(shared_redis: RedisServer) -> None:
    from flask_eventbus.node import nodes

    gc.collect()
    before = len(nodes), threading.active_count(), len(os.listdir("/proc/self/fd"))

    for n in range(300):
        with Bus(shared_redis.url, service="passing", publish=["tick"]) as bus:
            bus.on("tock")(lambda sender, **payload: None)
            if n % 10 == 0:
                bus.start()
                assert bus.ready(10)
                bus.signal("tick").send("test")
        del bus

    gc.collect()
    assert (len(nodes), threading.active_count()) <= before[:2]
    assert len(os.listdir("/proc/self/fd")) <= before[2]


def test_an_event_is_written_by_its_sender_if_no_thread_can_be_started(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    route = {"tick": {"confirm": True}}
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=route)
    started = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("eventbus-writer"):
            raise RuntimeError("can't start new thread")
        started(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    for n in range(3):
        bus.signal("tick").send("test", n=n)
        assert bus.health().buffered == 0
    monkeypatch.undo()
    bus.signal("tick").send("test", n=3)

    wait_until(lambda: received == [0, 1, 2, 3], what="all events arrive")


def test_a_thread_that_can_be_started_later_writes_from_then_on(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"], timeout=1.0)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    bus.signal("tick").send("test", n=0)
    sent = time.monotonic()
    monkeypatch.setattr(threading.Thread, "start", start)
    wait_until(lambda: received == [0], what="the event of no thread arrives")
    wait_until(lambda: time.monotonic() > sent + 1.0, what="the sender's time to write is over")

    for n in range(1, 4):
        bus.signal("tick").send("test", n=n)
        assert bus.flush(10)

    wait_until(lambda: received == [0, 1, 2, 3], what="the thread's events arrive")


def test_at_the_end_of_a_process_a_send_returns_once_its_event_is_written(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads may be stopped for good then, also one that writes the events of others."""
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])
    connection = bus.node._publisher._writer._connection
    connect, writes, goes_on = connection.connect, threading.Event(), threading.Event()
    ends = threading.Event()
    ends.set()
    left: list[int] = []

    def wait_and_connect(*args: Any) -> float:
        writes.set()
        goes_on.wait(10)
        return connect(*args)

    def send_second() -> None:
        bus.signal("tick").send("test", n=1)
        left.append(bus.health().buffered)

    monkeypatch.setattr(writer, "process_ends", ends)
    monkeypatch.setattr(connection, "connect", wait_and_connect)
    first = threading.Thread(target=bus.signal("tick").send, args=("test",), kwargs={"n": 0})
    first.start()
    assert writes.wait(10)
    second = threading.Thread(target=send_second)
    second.start()
    wait_until(lambda: bus.health().buffered == 2, what="the second event is buffered")
    goes_on.set()
    first.join(10)
    second.join(10)

    assert left == [0]
    wait_until(lambda: received == [0, 1], what="both events arrive")


def test_at_the_end_of_a_process_a_send_within_a_send_does_not_wait_for_itself(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"], timeout=60)
    connection = bus.node._publisher._writer._connection
    connect = connection.connect
    ends = threading.Event()
    ends.set()

    def send_and_connect(*args: Any) -> float:
        monkeypatch.setattr(connection, "connect", connect)
        bus.signal("tick").send("finalizer", n=1)
        return connect(*args)

    monkeypatch.setattr(writer, "process_ends", ends)
    monkeypatch.setattr(connection, "connect", send_and_connect)
    bus.signal("tick").send("test", n=0)

    wait_until(lambda: sorted(received) == [0, 1], what="both events arrive", timeout=20)


def test_a_thread_that_starts_while_a_sender_writes_does_not_end_with_that_sender(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])
    writer = bus.node._publisher._writer
    start, connect, wake = threading.Thread.start, writer._connection.connect, writer.wake_thread
    writes, goes_on = threading.Event(), threading.Event()

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("eventbus-writer"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def wait_and_connect(*args: Any) -> float:
        writes.set()
        goes_on.wait(10)
        return connect(*args)

    def wake_and_wait() -> None:
        thread = writer.thread
        wake()
        # The sender has written everything: the thread looks for work before the sender returns.
        if threading.current_thread() is sender and writer.owner is None and thread is not None:
            looks.set()
            thread.join(0.5)

    looks = threading.Event()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(writer._connection, "connect", wait_and_connect)
    sender = threading.Thread(target=bus.signal("tick").send, args=("test",), kwargs={"n": 0})
    sender.start()
    assert writes.wait(10)
    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(writer, "wake_thread", wake_and_wait)
    bus.signal("tick").send("test", n=1)
    goes_on.set()
    sender.join(20)
    assert looks.is_set()
    monkeypatch.undo()
    bus.signal("tick").send("test", n=2)

    wait_until(lambda: received == [0, 1, 2], what="all events arrive")


@pytest.mark.parametrize("when", ["before it runs", "once it runs"])
def test_a_signal_handler_that_raises_while_the_writer_thread_starts_loses_no_event(
    shared_redis: RedisServer,
    make_bus: Make,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])
    start = threading.Thread.start

    def strike(thread: threading.Thread) -> None:
        if when == "once it runs":
            start(thread)

        raise ArithmeticError("what a signal handler raises")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", strike)
        with pytest.raises(ArithmeticError, match="what a signal handler raises"):
            bus.signal("tick").send("test", n=0)
    bus.signal("tick").send("test", n=1)

    wait_until(lambda: received == [0, 1], what="both events arrive")
    names = [thread.name for thread in threading.enumerate()]
    assert names.count(f"eventbus-writer-{bus.node.name}") == 1


def test_a_signal_handler_can_stop_the_bus_while_the_writer_thread_starts(
    shared_redis: RedisServer, make_bus: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix, publish=["tick"])
    start = threading.Thread.start
    stopped = []

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.undo()
        bus.stop(flush=0)
        stopped.append(True)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    bus.signal("tick").send("test", n=0)

    assert stopped
    assert bus.health().counts["dropped"] == 1
    bus.signal("tick").send("test", n=1)
    assert bus.flush(10)


def test_events_lost_at_interpreter_exit_are_logged_with_their_ids(
    make_bus: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus("redis://127.0.0.1:1/0", publish=["tick"], timeout=0.1)
    ended = threading.Event()
    ended.set()
    monkeypatch.setattr(writer, "process_ends", ended)

    for n in range(100):
        bus.signal("tick").send("test", n=n)

    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert [text.rpartition(" ")[2] for text in errors] == [
        f"{bus.health().node}-{n}" for n in range(1, 101)
    ]
    assert bus.health().counts["dropped"] == 100


END = """
import atexit, threading

def at_the_end():
    # This was registered before the bus was imported, so it runs after the bus has stopped.
    for n in range(3):
        bus.signal("tick").send("end", n=n)

atexit.register(at_the_end)

from flask_eventbus import Bus
bus = Bus({url!r}, service="cron", prefix={prefix!r}, publish=["tick"])

class Late:
    def __del__(self):
        bus.signal("tick").send("late", n=4)

def go_on():
    while True:
        bus.signal("tock").send("daemon")

{late}
threading.Thread(target=go_on, daemon=True).start()
atexit.register(lambda: bus.signal("tick").send("sooner", n=-1))
"""


FINALIZER = """
from blinker import NamedSignal, Namespace
from flask_eventbus import Bus
namespace = Namespace() if {signal!r} == "adopted" else None
foreign = NamedSignal("tick") if {signal!r} == "foreign" else None
route = {{"via": {via!r}, "signal": foreign}} if foreign else {via!r}
bus = Bus(
    {url!r}, service="cron", prefix={prefix!r}, publish={{"tick": route}}, namespace=namespace
)
tick = foreign or bus.signal("tick")

class Session:
    def __del__(self):
        tick.send(None, n=1)

session = Session()
{first}
"""


@pytest.mark.parametrize("via", ["channel", "stream"])
@pytest.mark.parametrize(
    "first",
    ["", "tick.send(None, n=0)", "session.bus, session.me = bus, session"],
    ids=["first", "second", "with its bus"],
)
@pytest.mark.parametrize("signal", ["own", "foreign", "adopted"])
def test_a_send_in_a_finalizer_at_interpreter_exit_is_not_lost_silently(
    shared_redis: RedisServer, make_bus: Make, prefix: str, via: str, first: str, signal: str
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    program = FINALIZER.format(
        url=shared_redis.url, prefix=prefix, via=via, first=first, signal=signal
    )

    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )

    if outcome.stderr:
        (line,) = outcome.stderr.splitlines()
        assert line.startswith("flask-eventbus: An event of 'tick' was sent while the interpreter")
    else:
        wait_until(lambda: 1 in received, what="it arrives, where Python took nothing before")


@pytest.mark.parametrize(
    ("late", "numbers"),
    [("", [-1, 0, 1, 2]), ("atexit.register(lambda late: None, Late())", [-1, 0, 1, 2, 4])],
)
def test_an_event_sent_at_the_very_end_of_a_process_arrives(
    shared_redis: RedisServer, make_bus: Make, prefix: str, late: str, numbers: list[int]
) -> None:
    received = received_by(make_bus(shared_redis.url, "consumer", prefix=prefix))
    program = END.format(url=shared_redis.url, prefix=prefix, late=late)

    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )

    assert outcome.stderr == ""
    wait_until(lambda: sorted(received) == numbers, what=f"all events arrive, of {received}")


DAEMONS = """
import os
import sys
import threading
import time
from flask_eventbus import Bus

bus = Bus(
    {url!r}, service="cron", prefix={prefix!r}, timeout=20,
    publish={{"tick": {{"via": "stream", "confirm": False}}}},
)
tick = bus.signal("tick")

def go_on(thread):
    for n in range(2_000):
        tick.send("daemon", n=f"{{thread}}-{{n}}")
        # Known to the test once send() has returned.
        os.write(1, f"{{thread}}-{{n}}\\n".encode())

for thread in range(8):
    threading.Thread(target=go_on, args=(thread,), daemon=True).start()

time.sleep(0.05)
"""


def test_no_event_of_a_daemon_thread_is_lost_silently_at_the_end_of_a_process(
    shared_redis: RedisServer, prefix: str
) -> None:
    program = DAEMONS.format(url=shared_redis.url, prefix=prefix)

    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )

    found: Any = shared_redis.client.xrange(StreamKeys(prefix).stream("tick"))
    stored = {Codec().decode(fields[b"event"], via="stream").payload["n"] for _, fields in found}
    assert outcome.stderr == ""
    assert set(outcome.stdout.split()) <= stored


# -- events that share a message ----------------------------------------------------------


@pytest.fixture
def messages(
    shared_redis: RedisServer, prefix: str
) -> Iterator[Callable[[], list[tuple[str, int]]]]:
    """Return the messages on the wire so far: the signal, and the number of events."""
    pubsub = shared_redis.client.pubsub(ignore_subscribe_messages=True)
    pubsub.psubscribe(f"{prefix}:*")
    found: list[tuple[str, int]] = []

    def read() -> list[tuple[str, int]]:
        while message := pubsub.get_message(timeout=0.05):
            name = message["channel"].decode().partition("{")[2].partition("}")[0]
            found.append((name, len(split_message(message["data"]))))

        return found

    read()
    yield read
    pubsub.close()


def publish_together(bus: Bus, *events: tuple[str, dict[str, Any]]) -> None:
    """Send events while the writer cannot write, so that all of them wait."""
    with bus.node._publisher._buffer.lock:
        for name, payload in events:
            bus.signal(name).send("tests", **payload)

    assert bus.flush(10)


def test_events_that_wait_share_a_message_and_signals_keep_their_order(
    shared_redis: RedisServer,
    make_bus: Make,
    prefix: str,
    messages: Callable[[], list[tuple[str, int]]],
) -> None:
    bus = make_bus(shared_redis.url, publish=["a", "b"], prefix=prefix)
    received: list[Any] = []
    listener = make_bus(shared_redis.url, "listener", prefix=prefix)

    for name in ("a", "b"):
        listener.on(name)(lambda sender, n, name=name: received.append((name, n)))

    listener.start()
    assert listener.ready(10)
    names = ["a", "a", "a", "b", "b", "a"]

    publish_together(bus, *((name, {"n": n}) for n, name in enumerate(names)))

    wait_until(lambda: len(received) == 6, what="the events arrive")
    assert received == [(name, n) for n, name in enumerate(names)]
    assert messages() == [("a", 3), ("b", 2), ("a", 1)]


def test_a_message_has_at_most_256_events_and_64_kib(
    shared_redis: RedisServer,
    make_bus: Make,
    prefix: str,
    messages: Callable[[], list[tuple[str, int]]],
) -> None:
    bus = make_bus(shared_redis.url, publish=["a"], prefix=prefix)
    large, larger = {"text": "x" * 30_000}, {"text": "x" * 100_000}

    publish_together(bus, *[("a", {"n": n}) for n in range(300)])
    publish_together(bus, ("a", large), ("a", large), ("a", large), ("a", larger), ("a", {"n": 1}))

    wait_until(lambda: sum(count for _, count in messages()) == 305, what="the events arrive")
    assert [count for _, count in messages()] == [256, 44, 2, 1, 1, 1]


def test_events_of_a_message_that_redis_refuses_fail_one_by_one(
    redis_server: RedisServer, make_bus: Make
) -> None:
    redis_server.client.execute_command("ACL", "SETUSER", "default", "-publish")
    bus = make_bus(redis_server.url, publish=["a"])

    publish_together(bus, *[("a", {"n": n}) for n in range(3)])

    wait_until(lambda: bus.health().counts.get("refused") == 3, what="three events are refused")
