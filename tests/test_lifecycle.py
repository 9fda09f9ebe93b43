"""Receivers of lifecycle signals: whatever they do, the bus goes on meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blinker import NamedSignal
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, Event, Reject, current_event, signals
from flask_eventbus.signals import emit, wait_until_sent
from flask_eventbus.testing import Isolation

pytestmark = pytest.mark.second_look("lets short claims expire while receivers block")

Make = Callable[..., Bus]

#: Longer than any of these tests may take.
PATIENCE = 20.0


class Gate:
    """A receiver of lifecycle signals that does not return before it may."""

    def __init__(self) -> None:
        self.reported: list[dict[str, Any]] = []
        self._open = threading.Event()

    def __call__(self, sender: str, **values: Any) -> None:
        self.reported.append(values)
        assert self._open.wait(PATIENCE)

    def open(self) -> None:
        """Let it return, now and from now on."""
        self._open.set()


@pytest.fixture
def hold() -> Iterator[Callable[[NamedSignal], Gate]]:
    """Connect a receiver that holds up whoever calls it."""
    gates: list[tuple[NamedSignal, Gate]] = []

    def hold(signal: NamedSignal) -> Gate:
        gate = Gate()
        gates.append((signal, gate))
        signal.connect(gate)
        return gate

    yield hold

    for signal, gate in gates:
        signal.disconnect(gate)
        gate.open()

    wait_until(wait_until_sent, what="all receivers have run")


#: Milliseconds by which two looks at one claim may differ.
CLAIM_JITTER = 20


@pytest.fixture
def url() -> str:
    """A server in memory, of this test's own."""
    return f"memory://lifecycle-{time.time_ns()}"


def test_claims_are_renewed_during_a_slow_receiver_of_event_dead(
    shared_redis: RedisServer, make_bus: Make, hold: Callable[[NamedSignal], Gate]
) -> None:
    store = StreamStore(shared_redis)
    gate = hold(signals.event_dead_lettered)
    entered, done = threading.Event(), threading.Event()

    def handle(sender: str, n: int) -> None:
        if n == 0:
            raise Reject("no")
        entered.set()
        assert done.wait(PATIENCE)

    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=0.5, concurrency=2)
    bus.on("tick", via="stream", start="earliest")(handle)
    bus.start()
    assert bus.ready(10)
    entry, _ = store.add("tick", n=1)
    assert entered.wait(PATIENCE)
    store.add("tick", n=0)
    wait_until(lambda: gate.reported, what="the dead letter is reported")

    for _ in range(3):
        before = claimed_at(store, entry)
        wait_until(
            lambda before=before: claimed_at(store, entry) > before + CLAIM_JITTER,  # type: ignore[misc]
            what="it is renewed",
        )

    done.set()


def claimed_at(store: StreamStore, entry: str) -> int:
    """Return when an entry was claimed, in Redis's milliseconds, give or take `CLAIM_JITTER`."""
    key = store.keys.stream("tick")
    pipe = store.client.pipeline(transaction=True)
    pipe.time()
    pipe.xpending_range(key, "mailer", min=entry, max=entry, count=1)
    (seconds, microseconds), (found,) = pipe.execute()
    now = int(seconds) * 1000 + int(microseconds) // 1000

    return now - int(found["time_since_delivered"])


def test_every_successful_receiver_is_signalled(
    url: str, make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(url, "consumer")
    audit: list[tuple[str, str, str]] = []

    @bus.on("tick")
    def good(sender: str, n: int) -> None: ...

    @bus.on("tick")
    def bad(sender: str, n: int) -> None:
        raise ValueError("no")

    def note(sender: str, receiver: Any, event: Event, seconds: float) -> None:
        assert seconds >= 0
        assert current_event.id == event.id
        audit.append((sender, receiver.__name__, event.id))

    with signals.receiver_succeeded.connected_to(note), pytest.raises(ValueError, match="no"):
        eventbus.deliver("tick", n=1)

    assert [entry[:2] for entry in audit] == [("consumer", "good")]


@pytest.mark.parametrize("name", ["events_dropped", "publisher_lost"])
def test_a_send_does_not_wait_for_receivers_of_lifecycle_signals(
    redis_server: RedisServer, make_bus: Make, hold: Callable[[NamedSignal], Gate], name: str
) -> None:
    gate = hold(getattr(signals, name))
    bus = make_bus(redis_server.url, publish=["tick"], buffer_size=1, timeout=0.1)
    redis_server.kill()

    for n in range(3):
        bus.signal("tick").send("test", n=n)

    wait_until(lambda: gate.reported, what="the receiver is reported")
    bus.signal("tick").send("test", n=3)
    assert bus.health().counts["dropped"] >= 2


def test_events_arrive_while_a_receiver_of_event_rejected_runs(
    redis_server: RedisServer, make_bus: Make, hold: Callable[[NamedSignal], Gate]
) -> None:
    gate = hold(signals.event_rejected)
    bus = make_bus(redis_server.url, "consumer")
    received: list[int] = []
    bus.on("tick")(lambda sender, n: received.append(n))
    bus.start()
    assert bus.ready(10)
    redis_server.client.publish("eventbus:{tick}:channel", b"no event")
    wait_until(lambda: gate.reported, what="the receiver is reported")

    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    publisher.signal("tick").send("test", n=1)

    wait_until(lambda: received == [1], what="the event is received")


def test_a_lifecycle_receiver_that_raises_does_not_stop_the_others() -> None:
    reported: list[str] = []

    def bad(sender: str, **values: Any) -> None:
        raise SystemExit(1)

    async def asynchronous(sender: str, **values: Any) -> None:
        reported.append("asynchronous")

    def good(sender: str, **values: Any) -> None:
        reported.append("good")

    receivers = [bad, asynchronous, good]
    for receiver in receivers:
        signals.events_trimmed.connect(receiver)
    emit(signals.events_trimmed, "tests", name="tick", count=1)

    wait_until(wait_until_sent, what="all receivers have run")
    assert sorted(reported) == ["asynchronous", "good"]
    for receiver in receivers:
        signals.events_trimmed.disconnect(receiver)


def test_a_signal_handler_that_raises_while_the_lifecycle_thread_starts_keeps_no_signal_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "_thread", None)
    reported: list[str] = []

    def strike(thread: threading.Thread) -> None:
        raise ArithmeticError("what a signal handler raises")

    def note(sender: str, name: str, **values: Any) -> None:
        reported.append(name)

    with signals.events_trimmed.connected_to(note):
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", strike)
            with pytest.raises(ArithmeticError, match="what a signal handler raises"):
                emit(signals.events_trimmed, "tests", name="tick", count=1)
        emit(signals.events_trimmed, "tests", name="tock", count=1)

        wait_until(lambda: reported == ["tick", "tock"], what="both signals are sent")


def test_a_lifecycle_receiver_that_causes_its_own_signal_does_not_loop(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, publish=["tick"], buffer_size=1, timeout=0.1)
    redis_server.kill()
    reported: list[int] = []
    bus.node.ask()

    def send_again(sender: str, where: str, count: int) -> None:
        reported.append(count)
        bus.signal("tick").send("test", n=0)

    with signals.events_dropped.connected_to(send_again):
        wait_until(lambda: not bus.health().publishing, what="the outage is known")
        bus.signal("tick").send("test", n=1)
        bus.signal("tick").send("test", n=2)
        wait_until(wait_until_sent, what="all receivers have run")

    assert reported == [1]


def test_the_queue_of_lifecycle_signals_is_bounded_and_dropped_signals_are_logged_once(
    monkeypatch: pytest.MonkeyPatch,
    hold: Callable[[NamedSignal], Gate],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(signals, "MAX_QUEUED", 3)
    gate = hold(signals.events_missed)
    emit(signals.events_missed, "tests", n=0)
    wait_until(lambda: gate.reported, what="the receiver runs")

    for n in range(1, 6):
        emit(signals.events_missed, "tests", n=n)
    gate.open()

    wait_until(wait_until_sent, what="all receivers have run")
    assert [values["n"] for values in gate.reported] == [0, 1, 2, 3]
    wait_until(lambda: "2 were dropped" in caplog.text, what="its end is logged")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2


def test_a_bus_that_stops_waits_for_receivers_of_lifecycle_signals_but_not_for_ever(
    url: str, make_bus: Make, monkeypatch: pytest.MonkeyPatch, hold: Callable[[NamedSignal], Gate]
) -> None:
    reported: list[int] = []

    def note(sender: str, count: int, **values: Any) -> None:
        reported.append(count)

    with signals.events_missed.connected_to(note):
        emit(signals.events_missed, "tests", count=1)
        make_bus(url).stop()
        assert reported == [1]

    monkeypatch.setattr(signals, "STOP_TIMEOUT", 0.01)
    gate = hold(signals.events_missed)
    emit(signals.events_missed, "tests", count=2)
    wait_until(lambda: gate.reported, what="the receiver runs")
    make_bus(url).stop()
