"""Workers that read streams come to their end: in order, by force, or because they must."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import Program
from servers import RedisServer
from waiting import wait_until
from workers import COUNTING, HOLDING, Workers

from flask_eventbus import Bus
from flask_eventbus.node import LONGEST_STOP

pytestmark = pytest.mark.second_look("sends signals to workers as they handle events")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_lets_a_receiver_finish_and_leaves_the_rest_pending(
    workers: Workers, number: signal.Signals
) -> None:
    program = workers.worker(HOLDING)
    workers.send(*range(10))
    workers.wait_for("begun")

    program.send_signal(number)
    wait_until(
        lambda: "Waiting for running receivers" in program.output, what="the signal is taken"
    )
    workers.release.touch()

    assert program.end() == 0
    assert workers.done() == Counter({0: 1})
    assert workers.done("begun") == Counter({0: 1})
    assert workers.group()["pending"] + workers.unread() == 9
    assert len(workers.reports("ended")) == 1


def test_released_entries_are_handled_by_another_worker_at_once_and_in_order(
    workers: Workers,
) -> None:
    program = workers.worker(HOLDING)
    workers.send(*range(10))
    workers.wait_for("begun")
    program.send_signal(signal.SIGTERM)
    wait_until(
        lambda: "Waiting for running receivers" in program.output, what="the signal is taken"
    )
    workers.release.touch()
    program.end()
    workers.send(*range(10, 500))

    workers.worker(COUNTING, EVENTBUS_CLAIM_AFTER="60")

    workers.wait_until_handled(timeout=8)
    assert [line["n"] for line in workers.reports("done")] == list(range(500))
    assert {line["attempt"] for line in workers.reports("done")[1:]} == {1}


def test_a_second_signal_forces_the_end_and_the_event_is_delivered_again(workers: Workers) -> None:
    program = workers.worker(HOLDING)
    workers.send(0, 1)
    workers.wait_for("begun")

    program.send_signal(signal.SIGTERM)
    wait_until(
        lambda: "Waiting for running receivers" in program.output, what="the signal is taken"
    )
    program.send_signal(signal.SIGTERM)

    assert program.end() == 128 + signal.SIGTERM
    assert not workers.done()
    workers.worker(COUNTING)
    workers.wait_until_handled()
    assert workers.done() == Counter([0, 1])


def test_after_the_grace_only_unfinished_events_stay_pending(
    workers: Workers,
) -> None:
    long = """
@bus.on("work")
def hold(sender, n):
    if n == 3:
        report("begun", n=n)
        wait_until_released("RELEASE")

    report("done", n=n)
"""
    program = workers.worker(long, EVENTBUS_GRACE="0.2")
    workers.send(*range(6))
    workers.wait_for("begun")

    program.send_signal(signal.SIGTERM)

    assert program.end() == 0
    assert "still running after the grace of 0.2 s" in program.output
    assert workers.group()["pending"] + workers.unread() == 3
    workers.worker(COUNTING)
    workers.wait_until_handled()
    assert workers.done() == Counter(range(6))


def test_replacing_workers_under_load_loses_and_repeats_nothing(
    workers: Workers,
) -> None:
    short = """
@bus.on("work")
def count(sender, n):
    time.sleep(0.001)
    report("done", n=n)
"""
    settings = {"EVENTBUS_CLAIM_AFTER": "60"}
    running = [workers.worker(short, **settings) for _ in range(2)]
    total = 0

    for _ in range(6):
        workers.send(*range(total, total + 300))
        total += 300
        wait_until(lambda: len(workers.reports("done")) > total - 250, what="it goes on")  # noqa: B023 - it is called at once
        running.append(workers.work(short, **settings))
        ended = running.pop(0)
        ended.send_signal(signal.SIGTERM)
        assert ended.end() == 0

    workers.wait_until_handled(timeout=20)
    assert workers.done() == Counter(range(total))


def test_a_retry_that_was_not_started_is_released_to_the_next_worker_at_once(
    workers: Workers,
) -> None:
    failing = """
@bus.on("work")
def hold(sender, n):
    report("begun", n=n, attempt=current_event.attempt)

    if current_event.attempt == 1 and n < 5:
        raise Retry(after=0)

    wait_until_released("RELEASE")
    report("done", n=n, attempt=current_event.attempt)
"""
    program = workers.worker(failing, EVENTBUS_CLAIM_AFTER="60")
    workers.send(*range(5))
    workers.wait_for("begun", attempt=2)
    program.send_signal(signal.SIGTERM)
    wait_until(
        lambda: "Waiting for running receivers" in program.output, what="the signal is taken"
    )
    workers.release.touch()
    program.end()

    workers.worker(failing, EVENTBUS_CLAIM_AFTER="60")

    workers.wait_until_handled(timeout=10)
    assert workers.done() == Counter(range(5))
    assert {line["attempt"] for line in workers.reports("done")} == {2}


def test_a_refused_stream_does_not_stop_the_release_of_others(
    workers: Workers,
) -> None:
    holding = (
        HOLDING
        + """
@bus.on("another")
def hear(sender, n):
    pass
"""
    )
    program = workers.worker(holding, EVENTBUS_CLAIM_AFTER="60")
    workers.send(*range(5))
    workers.wait_for("begun")
    workers.redis.delete(workers.keys.stream("another"))
    workers.redis.set(workers.keys.stream("another"), "a string")
    program.send_signal(signal.SIGTERM)
    wait_until(
        lambda: "Waiting for running receivers" in program.output, what="the signal is taken"
    )
    workers.release.touch()

    assert program.end() == 0
    # The reader may notice it before the signal comes.
    refused = (
        r"Redis refuses to (release the entries|let '\S+' read the stream) of 'another': WRONG"
    )
    assert re.search(refused, program.output)
    assert "Traceback" not in program.output
    workers.redis.delete(workers.keys.stream("another"))
    workers.worker(COUNTING, EVENTBUS_CLAIM_AFTER="60")
    workers.wait_until_handled()
    assert workers.done() == Counter(range(5))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_undecodable_entry_becomes_a_dead_letter_after_its_worker_could_not_add_it(
    workers: Workers, number: signal.Signals
) -> None:
    dead = workers.keys.dead("work", workers.name)
    workers.redis.set(dead, "a string")
    program = workers.worker()
    workers.redis.xadd(workers.stream, {"event": b"\xc1 no event"})
    wait_until(lambda: "Redis rejected the outcomes" in program.output, what="it is reported")
    program.send_signal(number)
    program.end()

    workers.redis.delete(dead)
    workers.worker()

    wait_until(lambda: workers.dead_letters(), what="it is a dead letter")
    workers.wait_until_handled()
    assert [letter["reason"] for letter in workers.dead_letters()] == [b"undecodable"]


def test_a_worker_that_ends_leaves_no_consumer_behind(workers: Workers) -> None:
    program = workers.worker()
    workers.send(*range(20))
    workers.wait_until_handled()

    program.send_signal(signal.SIGTERM)
    program.end()

    assert workers.group()["consumers"] == 0


def test_a_worker_that_ends_while_redis_hangs_waits_only_briefly(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    workers = Workers(tmp_path, redis_server)
    workers.set_up()
    program = workers.worker(HOLDING)
    workers.send(*range(5))
    workers.wait_for("begun")

    redis_server.hang()
    workers.release.touch()
    workers.wait_for("done")
    program.send_signal(signal.SIGTERM)

    assert program.end(timeout=25) == 0
    assert "stay pending" in program.output
    redis_server.resume()
    workers.worker(COUNTING)
    workers.wait_until_handled()
    assert sorted(workers.done()) == list(range(5))
    workers.finish()


#: Seconds that a process may take to end beyond what is promised, on a machine that is busy. It is
#: less than any of the steps of a stop, done once more, would add to their sum.
BUSY = 4.0

#: A service that has everything in hand that its end may wait for: receivers that never return,
#: of streams and of channels, entries and events that wait, and an alarm that hangs.
ENDLESS = """
import threading
from flask_eventbus import signals

buses = [bus]
forever = threading.Event()

def hang(sender, **payload):
    report("hangs")
    forever.wait()

def set_up(bus):
    bus.on("work", echo=True)(hang)
    bus.on("price", via="channel")(hang)
    bus.on("all", group=None)(lambda sender, **payload: None)

def send_on():
    while bus.health().publishing:
        for each in list(buses):
            each.node.publish("price", {"n": 0}, confirm=False)

        time.sleep(0.01)

set_up(bus)
signals.publisher_lost.connect(hang, weak=False)
threading.Thread(target=send_on, daemon=True).start()
"""

#: A second bus; both are stopped by the end of the process, and not by their own run().
TWO = """
buses.append(Bus.from_env())
set_up(buses[1])

for each in buses:
    each.start()
    assert each.ready(20)

report("ready")

# Not signal.pause(): Linux may hand SIGTERM to another thread, which does not wake this one.
while True:
    time.sleep(0.1)
"""


def test_processes_end_within_the_documented_time_while_redis_hangs(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    services: dict[str, Workers] = {}
    processes: dict[str, Program] = {}

    for name, more in {"run": "", "two buses": TWO}.items():
        (tmp_path / name).mkdir()
        services[name] = Workers(tmp_path / name, redis_server)
        services[name].set_up()
        processes[name] = services[name].worker(ENDLESS + more, EVENTBUS_GRACE="1")
        services[name].send(*range(20))
        services[name].wait_for("hangs")

    redis_server.hang()

    for process in processes.values():
        wait_until(lambda p=process: "Redis is away" in p.output, timeout=20, what="it is known")  # type: ignore[misc]

    began = time.monotonic()

    for process in processes.values():
        process.send_signal(signal.SIGTERM)

    try:
        for process in processes.values():
            process.end(timeout=60)

            assert time.monotonic() - began < 1 + LONGEST_STOP + BUSY
            assert "were not published before the end" in process.output
    finally:
        redis_server.resume()

        for service in services.values():
            service.finish()


# -- a Redis that has no streams ----------------------------------------------------------


@pytest.fixture(params=["XREADGROUP", "XGROUP"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    """A service whose Redis is too old for streams."""
    server = RedisServer(tmp_path, "--rename-command", request.param, "")
    server.start()
    service = Workers(tmp_path, server)
    service.set_up()
    yield service
    service.finish()
    server.kill()


def test_a_worker_on_a_redis_without_streams_ends_with_the_reason(old: Workers) -> None:
    program = old.work()

    assert program.end() == 1
    assert "cannot listen: this Redis has no streams" in program.output
    assert "Use Redis 6.2 or later, or Valkey" in program.output


def test_the_run_command_ends_on_a_redis_without_streams(old: Workers) -> None:
    old.write(
        "app.py",
        "from flask import Flask\n"
        "from flask_eventbus import EventBus\n"
        "bus = EventBus()\n"
        "@bus.on('work')\n"
        "def work(sender, n): ...\n"
        "app = Flask(__name__)\n"
        "app.config.from_prefixed_env()\n"
        "bus.init_app(app)\n",
    )

    program = old.run("-m", "flask", "eventbus", "run")

    assert program.end() == 1
    assert "Error: " in program.output
    assert "cannot listen: this Redis has no streams" in program.output


def test_a_web_process_on_a_redis_without_streams_still_receives_channels(
    old: Workers, make_bus: Callable[..., Bus]
) -> None:
    received: list[int] = []
    bus = make_bus(
        old.server.url, "web", prefix=old.name, subscribe={"work": {"via": "stream"}, "tick": {}}
    )

    @bus.on("tick")
    def tick(sender: str, n: int) -> None:
        received.append(n)

    @bus.on("work")
    def work(sender: str, **payload: Any) -> None: ...

    bus.start()
    assert not bus.ready(10)
    make_bus(old.server.url, "other", prefix=old.name).node.publish("tick", {"n": 1})

    wait_until(lambda: received == [1], what="the channel is received")
    health = bus.health()
    assert not health.connected
    assert "unknown command" in health.refused["work"]
