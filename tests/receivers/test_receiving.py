"""Receivers that do whatever code can do: the others run, and the next event arrives."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from gc import collect
from pathlib import Path
from typing import Any

import blinker
import pytest
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus, ConfigError, current_event, signals
from flask_eventbus.routing.bus_signal import MAX_CACHED_SENDERS, BusSignal, SendingSignal

pytestmark = pytest.mark.second_look("waits for events that cross two processes")

Make = Callable[..., Bus]


@pytest.fixture
def url() -> str:
    """A server in memory, of this test's own."""
    return f"memory://receiving-{time.time_ns()}"


@pytest.fixture
def consumer(url: str, make_bus: Make) -> Bus:
    """A bus that listens once something is subscribed."""
    bus = make_bus(url, "consumer")
    bus.start()
    return bus


@pytest.fixture
def send(url: str, make_bus: Make) -> Callable[..., None]:
    """Send an event from another service."""
    publisher = make_bus(url, "publisher", publish=["*"])

    def send(name: str = "tick", **payload: Any) -> None:
        publisher.signal(name).send("test", **payload)

    return send


def received_by(bus: Bus, name: str = "tick") -> list[Any]:
    """The list that the numbers of ``name`` go to."""
    received: list[Any] = []

    @bus.on(name)
    def receive(sender: str, n: int) -> None:
        received.append(n)

    assert bus.ready(10)
    return received


# -- receivers that raise -----------------------------------------------------------------


class UnspeakableError(Exception):
    """An error that has no text."""

    def __str__(self) -> str:
        raise ValueError("there are no words for it")


class Nameless:
    """A receiver that cannot be told by any name."""

    def __call__(self, sender: str, n: int) -> None:
        raise UnspeakableError

    def __repr__(self) -> str:
        raise ValueError("it has no name")

    def __getattr__(self, name: str) -> Any:
        raise ValueError("it has nothing")


def raising(error: BaseException) -> Callable[..., None]:
    def receive(sender: str, n: int) -> None:
        raise error

    return receive


def recursing(sender: str, n: int) -> None:
    recursing(sender, n)


async def cancelled(sender: str, n: int) -> None:
    import asyncio

    raise asyncio.CancelledError


BAD: dict[str, Callable[[], Any]] = {
    "KeyboardInterrupt": lambda: raising(KeyboardInterrupt()),
    "GeneratorExit": lambda: raising(GeneratorExit()),
    "SystemExit": lambda: raising(SystemExit(1)),
    "StopIteration": lambda: raising(StopIteration()),
    "a group": lambda: raising(BaseExceptionGroup("both", [SystemExit(), ValueError()])),
    "recursion": lambda: recursing,
    "cancellation": lambda: cancelled,
    "what cannot be told": Nameless,
}


@pytest.mark.parametrize("bad", BAD)
def test_after_any_error_of_a_receiver_the_others_run_and_the_next_event_arrives(
    consumer: Bus, send: Callable[..., None], bad: str
) -> None:
    consumer.on("tick")(BAD[bad]())
    received = received_by(consumer)
    late = received_by(consumer)

    send(n=1)
    send(n=2)

    wait_until(lambda: (received, late) == ([1, 2], [1, 2]), what="the others hear both")
    wait_until(lambda: consumer.health().counts["handled"] == 2, what="both are handled")
    assert consumer.health().counts["failed"] == 2


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()])
def test_after_any_error_of_a_lifecycle_receiver_the_bus_continues(
    redis_server: RedisServer, make_bus: Make, error: BaseException
) -> None:
    def fail(sender: str, **values: Any) -> None:
        raise error

    reported = [signals.receiver_failed, signals.listener_lost, signals.listener_connected]
    reported += [signals.publisher_lost, signals.publisher_restored, signals.event_rejected]
    for signal in reported:
        signal.connect(fail)
    bus = make_bus(redis_server.url, "consumer")
    bus.start()
    bus.on("tick")(raising(ValueError("no")))
    received = received_by(bus)
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: received == [1], what="the first event arrives")
    redis_server.client.publish("eventbus:{tick}:channel", b"no event")
    redis_server.kill()
    publisher.signal("tick").send("test", n=2)
    wait_until(lambda: not publisher.health().publishing, what="the outage is known")
    redis_server.start()

    assert bus.ready(10)
    wait_until(lambda: received == [1, 2], what="the next event arrives")
    for signal in reported:
        signal.disconnect(fail)


@pytest.fixture
def broken_log() -> Iterator[None]:
    """A filter as programs have them, which looks for a request where there is none."""

    class NeedsARequest(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("Working outside of request context.")

    needs_a_request = NeedsARequest()
    names = [name for name in logging.root.manager.loggerDict if name.startswith("flask_eventbus.")]
    loggers = [logging.getLogger(name) for name in names]

    assert {"flask_eventbus.channels.listener", "flask_eventbus.publisher.outage"} <= set(names)

    for logger in loggers:
        logger.addFilter(needs_a_request)

    yield

    for logger in loggers:
        logger.removeFilter(needs_a_request)


@pytest.mark.usefixtures("broken_log")
def test_a_log_handler_that_raises_stops_no_thread(
    redis_server: RedisServer, make_bus: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    bus = make_bus(redis_server.url, "consumer")
    bus.start()
    bus.on("tick")(raising(ValueError("no")))
    received = received_by(bus)
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    publisher.signal("tick").send("test", n=1)
    redis_server.client.publish("eventbus:{tick}:channel", b"no event")
    wait_until(lambda: received == [1], what="the first event arrives")
    redis_server.restart()
    publisher.signal("tick").send("test", n=2)

    assert bus.ready(10)
    wait_until(lambda: received == [1, 2], what="the next event arrives")
    # As logging does with handlers that raise.
    assert "Working outside of request context." in capsys.readouterr().err


# -- receivers that use the bus -----------------------------------------------------------


def test_a_receiver_may_declare_connect_and_send(
    consumer: Bus, send: Callable[..., None], url: str, make_bus: Make
) -> None:
    caused: list[Any] = []
    other = make_bus(url, "other")
    other.start()

    @other.on("caused")
    def note(sender: str, n: int) -> None:
        caused.append((n, current_event.hops))

    assert other.ready(10)
    later: list[int] = []

    @consumer.on("tick")
    def receive(sender: str, n: int) -> None:
        if n == 1:
            consumer.publishes("caused", confirm=True).send("consumer", n=n)
            consumer.signal("unheard_of").send("consumer")
            consumer.on("later")(lambda sender, n: later.append(n))
            assert consumer.ready(10)
            consumer.start()
            assert consumer.health().listening

    assert consumer.ready(10)
    send(n=1)
    wait_until(lambda: "later" in consumer.node.subscriptions, what="the receiver runs")
    assert consumer.ready(10)
    send("later", n=2)

    wait_until(lambda: later == [2], what="what it subscribed arrives")
    wait_until(lambda: caused == [(1, 1)], what="what it sent arrives")
    assert "failed" not in consumer.health().counts


class Point:
    """A type of the application."""


def test_a_type_of_the_application_is_decoded_outside_of_events(url: str, make_bus: Make) -> None:
    consumer, publisher = make_bus(url, "consumer"), make_bus(url, "publisher", publish=["*"])
    began, release = threading.Event(), threading.Event()
    received: list[int] = []
    seen: set[bool] = set()

    def unpack(data: bytes) -> Point:
        seen.add(bool(current_event))
        return Point()

    for bus in (consumer, publisher):
        bus.register_type(40, Point, pack=lambda point: b"", unpack=unpack)

    @consumer.on("tick")
    def receive(sender: str, n: int, point: Point | None = None) -> None:
        began.set()
        release.wait(30)
        received.append(n)

    consumer.start()
    assert consumer.ready(10)
    tick = publisher.signal("tick")
    tick.send("test", n=0)
    assert began.wait(10)

    # They wait together.
    tick.send("test", n=1)
    tick.send("test", n=2, point=Point())
    wait_until(lambda: consumer.health().counts.get("received") == 3)
    release.set()

    wait_until(lambda: received == [0, 1, 2], what="the events are handled")
    assert seen == {False}


def test_receivers_can_be_disconnected_while_events_arrive(
    consumer: Bus, send: Callable[..., None]
) -> None:
    signal = consumer.signal("tick")
    received = received_by(consumer)
    ran = itertools.count()
    receivers = [lambda sender, n, i=i: next(ran) and None for i in range(50)]

    def turn() -> None:
        for receiver in receivers:
            signal.connect(receiver, weak=False)
            consumer.on("tick", from_="publisher")(receiver)
            signal.disconnect(receiver)
            signal.disconnect(receiver, sender="publisher")

    turning = threading.Thread(target=turn)
    turning.start()
    for n in range(500):
        send(n=n)
    turning.join()

    wait_until(lambda: received == list(range(500)), what="all events arrive")
    assert "failed" not in consumer.health().counts


def test_an_event_that_comes_while_its_name_is_declared_reaches_the_receivers_of_patterns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bus = Bus("memory://declared", service="consumer")

    @bus.on("ti*")
    def receive(sender: str, n: int) -> None: ...

    found: list[list[Any]] = []
    threads: list[threading.Thread] = []
    connect = BusSignal.connect

    def connect_late(signal: BusSignal, receiver: Any, *args: Any, **options: Any) -> Any:
        if not threads:
            threads.append(
                threading.Thread(target=lambda: found.append(bus.receivers_of("tick", "shop")))
            )
            threads[0].start()
            # It may wait until the receivers are connected.
            threads[0].join(0.2)

        return connect(signal, receiver, *args, **options)

    monkeypatch.setattr(BusSignal, "connect", connect_late)
    bus.signal("tick")

    threads[0].join()

    assert found == [[receive]]


def test_receivers_connected_and_disconnected_between_events_take_effect_at_once(
    consumer: Bus, send: Callable[..., None]
) -> None:
    received = received_by(consumer)
    tick = consumer.signal("tick")
    once: list[int] = []
    later: list[int] = []

    def hear_once(sender: str, n: int) -> None:
        once.append(n)
        tick.disconnect(hear_once)
        tick.connect(hear_later, weak=False)

    def hear_later(sender: str, n: int) -> None:
        later.append(n)

    tick.connect(hear_once, sender="publisher", weak=False)
    for n in range(50):
        send(n=n)

    wait_until(lambda: len(received) == 50, what="all are received")
    wait_until(lambda: later[-1:] == [49], what="the last is received by the one that came later")
    assert once == [0]
    assert later[0] in (0, 1)
    assert later[1:] == list(range(later[0] + 1, 50))


def test_a_weakly_connected_receiver_gets_events_as_long_as_it_lives(
    consumer: Bus, send: Callable[..., None]
) -> None:
    received = received_by(consumer)
    weakly: list[int] = []

    def receive(sender: str, n: int) -> None:
        weakly.append(n)

    consumer.signal("tick").connect(receive)
    send(n=0)
    wait_until(lambda: received == [0] and weakly == [0], what="both hear it")
    del receive
    collect()
    send(n=1)
    wait_until(lambda: received == [0, 1], what="the other hears it")
    assert weakly == [0]


def test_the_cache_of_receivers_per_sender_is_bounded() -> None:
    signal = BusSignal("tick")
    signal.connect(print, sender="shop", weak=False)

    found = [signal.local_receivers(f"service-{n}") for n in range(2 * MAX_CACHED_SENDERS)]

    assert found == [[]] * 2 * MAX_CACHED_SENDERS
    assert signal.local_receivers("shop") == [print]
    assert len(signal.cached_receivers) == MAX_CACHED_SENDERS


def test_a_muted_signal_is_neither_received_nor_published(
    consumer: Bus, send: Callable[..., None], url: str, make_bus: Make
) -> None:
    received = received_by(consumer)
    publisher = make_bus(url, "publisher", publish=["tock"])
    end = received_by(consumer, "end")

    with consumer.signal("tick").muted():
        send(n=1)
        send("end", n=1)
        wait_until(lambda: end == [1], what="the event is passed over")
    with publisher.signal("tock").muted():
        publisher.signal("tock").send("test", n=1)
    send(n=2)

    wait_until(lambda: received == [2], what="the next event is received")
    assert publisher.flush(5)
    assert "published" not in publisher.health().counts


def test_an_event_that_receivers_filter_out_is_not_reported_as_unreceived(
    consumer: Bus, send: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    consumer.on("tick", from_="billing")(lambda sender, n: None)
    consumer.on("tock")(lambda sender, n: None)
    assert consumer.ready(10)

    with consumer.signal("tock").muted():
        send("tick", n=1)
        send("tock", n=1)
        wait_until(
            lambda: consumer.health().counts.get("passed_over") == 2, what="both are passed over"
        )

    assert "Nothing here receives" not in caplog.text
    assert "unknown" not in consumer.health().counts


@pytest.mark.parametrize(
    ("receiver", "reason"),
    [
        (lambda user_id, email: None, "its first parameter is 'user_id', which gets the sender"),
        (lambda user_id, **extra: None, "its first parameter is 'user_id', which gets the sender"),
        (lambda: None, "it has no parameter for the sender"),
        (lambda *, user_id, email: None, "it has no parameter for the sender"),
        (lambda sender, user_id, /, email: None, "it needs 'user_id' by position"),
    ],
)
def test_a_receiver_that_can_never_take_an_event_makes_a_dead_letter_at_once(
    consumer: Bus, url: str, make_bus: Make, receiver: Callable[..., None], reason: str
) -> None:
    errors: list[str] = []

    def note(sender: Any, error: str, **extra: Any) -> None:
        errors.append(error)

    consumer.on("user_registered")(receiver)
    assert consumer.ready(10)
    publisher = make_bus(url, "accounts", publish={"user_registered": "stream"})

    with signals.event_dead_lettered.connected_to(note):
        publisher.signal("user_registered").send(user_id=7, email="ada@example.com")
        wait_until(lambda: errors, what="the event is a dead letter")

    assert reason in errors[0]
    assert consumer.health().counts["failed"] == 1


def test_two_processes_that_answer_each_other_stop_at_the_hop_limit(
    shared_redis: RedisServer, make_bus: Make, tmp_path: Path
) -> None:
    prefix = f"circle-{time.time_ns()}"
    program = """
import logging, sys
from flask_eventbus import Bus, HopLimitError, current_event
hears, sends = sys.argv[1:]
bus = Bus({url!r}, service=hears + "s", prefix={prefix!r}, publish=[sends])

@bus.on(hears)
def answer(sender):
    try:
        bus.signal(sends).send("me")
    except HopLimitError as error:
        print("LIMIT", current_event.hops, error, flush=True)

bus.start()
assert bus.ready(10)
print("ready", flush=True)
bus.run()
"""
    path = tmp_path / "circle.py"
    path.write_text(program.format(url=shared_redis.url, prefix=prefix))
    seen: list[int] = []
    witness = make_bus(shared_redis.url, "witness", prefix=prefix)

    @witness.on("p*ng")
    def note(sender: str) -> None:
        seen.append(current_event.hops)

    witness.start()
    assert witness.ready(10)
    both = [
        subprocess.Popen([sys.executable, str(path), *names], stdout=subprocess.PIPE, text=True)
        for names in (("ping", "pong"), ("pong", "ping"))
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    make_bus(shared_redis.url, "starter", prefix=prefix).node.publish("ping", {})

    wait_until(lambda: len(seen) == 17, what="the first event and sixteen that it caused")
    for process in both:
        process.terminate()
    said = "".join(process.communicate(timeout=20)[0] for process in both)
    assert seen == list(range(17))
    assert said.count("LIMIT") == 1
    assert "LIMIT 16 An event of 'pong' would be number 18 of a chain" in said
    assert [process.returncode for process in both] == [0, 0]


def test_a_receiver_that_forks_does_not_run_the_next_events_twice(
    shared_redis: RedisServer, make_bus: Make, tmp_path: Path
) -> None:
    prefix = f"forking-{time.time_ns()}"
    path = tmp_path / "forking.py"
    path.write_text(f"""
import os
from flask_eventbus import Bus
bus = Bus({shared_redis.url!r}, service="forking", prefix={prefix!r})

@bus.on("tick")
def receive(sender, n):
    # The line is written at once: two processes share this output.
    os.write(1, f"{{n}}\\n".encode())
    if n == 0:
        os.fork()

bus.start()
assert bus.ready(10)
print("ready", flush=True)
bus.run()
""")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    publisher = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])
    for n in range(50):
        publisher.signal("tick").send("test", n=n)
    lines = [int(process.stdout.readline()) for _ in range(50)]
    process.terminate()

    assert lines + [int(line) for line in process.communicate(timeout=20)[0].split()] == list(
        range(50)
    )
    assert process.returncode == 0


# -- waiting ------------------------------------------------------------------------------


def test_ready_does_not_wait_without_subscriptions_or_on_a_disabled_bus(
    url: str, make_bus: Make
) -> None:
    assert make_bus(url).ready()
    switched_off = make_bus(url, enabled=False)
    switched_off.on("tick")(lambda sender: None)
    switched_off.start()

    assert not switched_off.ready()


def test_a_stop_ends_a_waiting_ready(make_bus: Make) -> None:
    bus = make_bus("redis://127.0.0.1:1/0")
    bus.on("tick")(lambda sender: None)
    bus.start()
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(bus.ready()))
    waiting.start()

    bus.stop()
    waiting.join(10)

    assert answers == [False]


# -- many signals -------------------------------------------------------------------------


def test_thousands_of_signals_can_be_declared_and_received(url: str, make_bus: Make) -> None:
    publisher = make_bus(url, "publisher", publish=["tick_*"])
    consumer = make_bus(url, "consumer", subscribe=["tock_*"])
    received: list[str] = []
    began = time.thread_time()

    for n in range(2_000):
        publisher.signal(f"tick_{n}")
        publisher.publishes(f"tack_{n}")
        consumer.on(f"tick_{n}")(lambda sender: received.append(current_event.name))
    # Half a second of a processor, whatever else runs on it.
    assert time.thread_time() - began < 15

    consumer.start()
    assert consumer.ready(60)
    publisher.signal("tick_1999").send("test")
    publisher.signal("tick_0").send("test")
    wait_until(lambda: received == ["tick_1999", "tick_0"], what="both arrive")


@pytest.mark.parametrize("adopts", [False, True])
def test_threads_that_create_a_signal_at_once_get_the_same_one(
    make_bus: Make, adopts: bool
) -> None:
    namespace = blinker.Namespace() if adopts else None
    bus = make_bus("memory://signals", namespace=namespace, publish=["tick_*"])
    born: list[tuple[int, int]] = []
    together = threading.Barrier(4)

    def make() -> None:
        for n in range(300):
            together.wait()
            signal = bus.signal(f"tick_{n}")
            # Whoever gets it finds its bridge connected.
            assert isinstance(signal, SendingSignal)
            born.append((id(signal), len(signal.bridges)))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {count for _, count in born} == {1}
    assert len({identity for identity, _ in born}) == 300


def test_threads_that_subscribe_at_once_all_receive_events(url: str, make_bus: Make) -> None:
    publisher = make_bus(url, "publisher", publish=["*"])
    consumer = make_bus(url, "consumer")
    consumer.start()
    received: list[str] = []

    def subscribe(start: int) -> None:
        for n in range(start, 200, 4):
            consumer.on(f"tick_{n}")(lambda sender: received.append(current_event.name))

    threads = [threading.Thread(target=subscribe, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert consumer.ready(10)
    for n in range(200):
        publisher.signal(f"tick_{n}").send("test")

    wait_until(lambda: len(received) == 200, what="all are received")
    assert sorted(received) == sorted(f"tick_{n}" for n in range(200))


def test_a_name_belongs_to_one_signal(make_bus: Make) -> None:
    bus = make_bus("memory://names")
    one, another = blinker.NamedSignal("one"), blinker.NamedSignal("another")
    bus.publishes(one, as_="saved")
    bus.publishes(one, as_="saved", confirm=True)

    with pytest.raises(ConfigError, match="another signal is published as 'saved'"):
        bus.publishes(another, as_="saved")


def test_signals_created_by_others_in_an_adopted_namespace_are_published_from_the_start(
    url: str, make_bus: Make
) -> None:
    namespace = blinker.Namespace()
    bus = make_bus(url, "publisher", namespace=namespace, publish=["order_*"])
    received = received_by(started(make_bus(url, "consumer")), "order_paid")
    paid = namespace.signal("order_paid")

    bus.start()
    paid.send("test", n=1)

    wait_until(lambda: received == [1], what="the event arrives")


def started(bus: Bus) -> Bus:
    bus.start()
    return bus
