"""Clocks that are wrong, or are set while workers run."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, current_event
from flask_eventbus.streams import retry_queue
from flask_eventbus.transport.pipe import RedisClock

pytestmark = pytest.mark.second_look("lets claims expire while workers run")

#: An hour, less what the questions for the time may have taken on a busy machine.
STEP = re.compile(r"Redis was set by \+(3600|35\d\d)\.")

Make = Callable[..., Bus]

#: Longer than any of these tests may take.
PATIENCE = 20.0


class WallClock:
    """The clock of this machine, which can be set; the monotonic clock goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + self.ahead)


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    return WallClock(monkeypatch)


class Held:
    """A receiver that runs until it may end, and counts how often it was begun."""

    def __init__(self, fails_at: int = 0) -> None:
        self.attempts: list[int] = []
        self.may_end = threading.Event()
        self._fails_at = fails_at

    def __call__(self, sender: str, n: int) -> None:
        self.attempts.append(current_event.attempt)
        if current_event.attempt == self._fails_at:
            raise ValueError("not yet")
        assert self.may_end.wait(PATIENCE)


def workers(make_bus: Make, receiver: Held, count: int, **settings: Any) -> list[Bus]:
    """Workers of a service on a server in memory, whose clock is that of this machine."""
    url = f"memory://clocks-{time.monotonic_ns()}"
    found = [make_bus(url, "mailer", claim_after=0.9, **settings) for _ in range(count)]

    for bus in found:
        bus.on("tick", via="stream")(receiver)
        bus.start()
        assert bus.ready(10)

    return found


def send(bus: Bus) -> None:
    publisher = Bus(bus.node.config.url, service="shop", publish={"tick": "stream"})
    publisher.signal("tick").send("test", n=1)
    publisher.stop()


def test_a_clock_step_of_redis_takes_no_event_from_a_live_worker(
    make_bus: Make, wall_clock: WallClock, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Held()
    buses = workers(make_bus, receiver, 3)
    # They have looked at Redis's clock.
    for bus in buses:
        wait_until(lambda bus=bus: is_steady(bus), what="its clock is believed")  # type: ignore[misc]
    send(buses[0])
    wait_until(lambda: receiver.attempts, what="the event is begun")

    for number in range(1, 4):
        wall_clock.ahead += 3_600
        wait_until(
            lambda number=number: len(STEP.findall(caplog.text)) == 3 * number,  # type: ignore[misc]
            what="each worker has noticed the step",
        )
    for bus in buses:
        wait_until(lambda bus=bus: is_steady(bus), what="its clock is believed")  # type: ignore[misc]
    receiver.may_end.set()

    wait_until(lambda: sum(b.health().counts.get("acked", 0) for b in buses) == 1, what="its end")
    assert receiver.attempts == [1]


@pytest.mark.timing(first_retry=0.05, check_released_every=0.05, max_postpone=0.05)
def test_a_clock_step_of_redis_takes_no_retry_from_a_live_worker(
    make_bus: Make, wall_clock: WallClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = Held(fails_at=1)
    buses = workers(make_bus, receiver, 3)
    for bus in buses:
        wait_until(lambda bus=bus: is_steady(bus), what="its clock is believed")  # type: ignore[misc]
    send(buses[0])
    wait_until(lambda: receiver.attempts == [1, 2], what="the retry is begun")

    # The others look before the worker that lives has renewed its lease.
    renew = retry_queue.RetryQueue.renew
    monkeypatch.setattr(retry_queue.RetryQueue, "renew", lambda line, delivery: True)
    wall_clock.ahead += 3_600
    for bus in buses:
        bus.node._inbound.consumer._maintenance.wake()
    for bus in buses:
        wait_until(lambda bus=bus: not is_steady(bus), what="it noticed the step")  # type: ignore[misc]
    monkeypatch.setattr(retry_queue.RetryQueue, "renew", renew)
    for bus in buses:
        wait_until(lambda bus=bus: is_steady(bus), what="its clock is believed")  # type: ignore[misc]
    receiver.may_end.set()

    wait_until(lambda: sum(b.health().counts.get("acked", 0) for b in buses) == 2, what="its end")
    assert receiver.attempts == [1, 2]


def is_steady(bus: Bus) -> bool:
    clock: RedisClock = bus.node._inbound.consumer._acknowledger.clock
    return clock._offset is not None and clock.is_steady


@pytest.mark.timing(first_retry=0.2)
def test_a_worker_whose_clock_is_set_back_runs_its_retries_on_time(
    shared_redis: RedisServer,
    make_bus: Make,
    wall_clock: WallClock,
) -> None:
    store = StreamStore(shared_redis)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    attempts: list[int] = []

    @bus.on("tick", via="stream", start="earliest")
    def fail(sender: str, n: int) -> None:
        attempts.append(current_event.attempt)
        if current_event.attempt <= 2:
            raise ValueError("not yet")

    bus.start()
    assert bus.ready(10)
    store.add("tick", n=1)
    wait_until(lambda: attempts, what="it fails")
    wall_clock.ahead = -30.0
    wait_until(lambda: attempts == [1, 2, 3], what="it is tried again", timeout=PATIENCE)

    wall_clock.ahead = +3_600.0
    key = store.keys.retry("tick", "mailer")
    assert not store.client.zcard(key)


@pytest.mark.timing(check_released_every=0.05)
def test_clocks_that_disagree_are_logged_at_the_start_and_at_the_end(
    shared_redis: RedisServer,
    make_bus: Make,
    wall_clock: WallClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = StreamStore(shared_redis)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    wall_clock.ahead = -30.0

    bus.on("tick", via="stream")(lambda sender: None)
    bus.start()
    assert bus.ready(10)
    wait_until(lambda: "is 30.0 s behind that of Redis" in caplog.text, what="it is logged")
    wall_clock.ahead = 0.0
    wait_until(lambda: "agree again" in caplog.text, what="its end is logged")

    assert caplog.text.count("that of Redis.") == 1


@pytest.mark.timing(first_retry=0.01)
def test_a_redis_that_refuses_time_is_read_and_the_remedy_is_logged(
    redis_server: RedisServer,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    redis_server.client.execute_command("ACL", "SETUSER", "default", "-time")
    bus = make_bus(redis_server.url, "mailer")
    attempts: list[int] = []

    @bus.on("tick", via="stream")
    def fail(sender: str, n: int) -> None:
        attempts.append(current_event.attempt)
        if current_event.attempt == 1:
            raise ValueError("not yet")

    bus.start()
    assert bus.ready(10)
    send(bus)

    wait_until(lambda: attempts == [1, 2], what="it is tried again")
    assert "Grant '+time' to the user of 'mailer' in the ACL." in caplog.text
