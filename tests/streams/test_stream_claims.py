"""What a worker has claimed and what it leaves to others, in real processes."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until
from workers import COUNTING, HOLDING, Workers, once

from flask_eventbus import Bus
from flask_eventbus.routing.subscriptions import Subscription
from flask_eventbus.streams.group import Entry
from flask_eventbus.streams.reader import StreamReader

pytestmark = pytest.mark.second_look("pauses and kills workers, and lets their claims expire")


# -- slow receivers, many entries ---------------------------------------------------------


def blocked(workers: Workers) -> list[str]:
    """Return the commands in which clients wait."""
    found: Any = workers.redis.client_list()
    return [client["cmd"] for client in found if "b" in client["flags"]]


def test_a_receiver_slower_than_the_claim_time_runs_once(workers: Workers) -> None:
    slow = """
@bus.on("work")
def count(sender, n):
    report("begun", n=n)
    time.sleep(2.0)
    report("done", n=n)
"""
    workers.worker(slow, EVENTBUS_CLAIM_AFTER="0.5")
    workers.worker(COUNTING.replace('"done"', '"stolen"'), EVENTBUS_CLAIM_AFTER="0.5")
    workers.send(*range(4))

    workers.wait_until_handled()
    done = workers.done() + workers.done("stolen")
    assert done == once(4)
    assert workers.done("begun") == workers.done()


#: Fails at its first attempt, and is held at its second.
FAILING = """
@bus.on("work", retries=1)
def hold(sender, n):
    report("begun", n=n, attempt=current_event.attempt)

    if current_event.attempt == 1:
        raise Retry(after=1)

    wait_until_released("RELEASE")
    report("done", n=n)

@bus.on("long")
def take_long(sender, n):
    report("holding")
    wait_until_released("RELEASE")
"""


def all_leased(workers: Workers, count: int) -> bool:
    """Return True if a worker has leased that many retries, and none is left."""
    retries = workers.keys.retry("work", workers.name)
    due = workers.redis.zcount(retries, "-inf", int(time.time() * 1000))
    return bool(workers.redis.zcard(retries) == count and due == 0)


def test_retries_that_a_killed_worker_had_not_started_are_run_by_another(workers: Workers) -> None:
    killed = workers.worker(FAILING)
    workers.send(*range(10))
    [begun] = workers.wait_for("begun", attempt=2)
    wait_until(lambda: all_leased(workers, 10), what="the worker has all of the retries")
    killed.kill()
    workers.release.touch()
    workers.worker(FAILING)

    workers.wait_until_handled()
    assert workers.done() == once(10) - Counter([begun["n"]])
    assert [letter["reason"] for letter in workers.dead_letters()] == [b"killed"]


def test_a_retry_does_not_wait_behind_a_long_receiver_if_another_worker_is_free(
    workers: Workers,
) -> None:
    busy = workers.worker(FAILING, EVENTBUS_CONCURRENCY="1")
    workers.send(0)
    workers.wait_for("begun", attempt=1)
    workers.send(0, name="long")
    workers.wait_for("holding", pid=busy.pid)
    wait_until(lambda: all_leased(workers, 1), what="the busy worker has the retry")
    free = workers.worker(FAILING, EVENTBUS_CONCURRENCY="1")

    workers.wait_for("begun", attempt=2, pid=free.pid)
    workers.release.touch()
    workers.wait_until_handled()
    assert workers.done() == once(1)


def test_an_event_that_reached_a_paused_worker_runs_in_the_other_worker_only(
    workers: Workers,
) -> None:
    paused = workers.worker()
    wait_until(lambda: "xreadgroup" in blocked(workers), what="the worker waits for events")
    paused.send_signal(signal.SIGSTOP)
    workers.send(1)
    other = workers.worker()
    workers.wait_until_handled()
    other.send_signal(signal.SIGTERM)
    assert other.end() == 0

    paused.send_signal(signal.SIGCONT)
    workers.send(2)

    workers.wait_for("done", n=2)
    assert workers.done() == Counter([1, 2])


def test_events_that_a_paused_worker_claims_before_their_answer_is_read_run_once(
    shared_redis: RedisServer, make_bus: Callable[..., Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StreamStore(shared_redis)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=1.0, concurrency=1)
    take = StreamReader._take_answer
    was_taken = threading.Event()
    handled: list[int] = []

    def take_late(
        reader: StreamReader,
        entries: Sequence[Entry],
        refusals: Mapping[str, Exception],
        streams: Mapping[str, Subscription],
        *,
        latest: float,
    ) -> None:
        # After the pause, the maintenance thread may run before the reader.
        if entries:
            wait_until(lambda: bus.health().counts.get("claimed"), what="they are claimed")

        take(reader, entries, refusals, streams, latest=latest)

        if entries:
            was_taken.set()

    @bus.on("tick", via="stream", start="earliest")
    def handle(sender: object, n: int) -> None:
        was_taken.wait(30)
        handled.append(n)

    monkeypatch.setattr(StreamReader, "_take_answer", take_late)
    bus.start()
    assert bus.ready(10)
    store.add_together("tick", {"n": 0}, {"n": 1}, {"n": 2})
    assert was_taken.wait(30)
    # It waits behind all the others.
    store.add("tick", n=3)

    wait_until(lambda: 3 in handled, what="the last event is handled")
    assert handled == [0, 1, 2, 3]


def test_a_worker_that_was_paused_releases_nothing_that_another_has_handled(
    workers: Workers,
) -> None:
    failing = FAILING.replace("retries=1", "retries=5")
    stopped = workers.worker(failing, EVENTBUS_GRACE="1")
    workers.send(*range(5))
    workers.wait_for("begun", attempt=2)
    wait_until(lambda: all_leased(workers, 5), what="the worker has all of the retries")
    stopped.send_signal(signal.SIGSTOP)
    workers.worker(failing.replace('wait_until_released("RELEASE")', "pass"))
    workers.wait_until_handled()
    stopped.send_signal(signal.SIGTERM)
    stopped.send_signal(signal.SIGCONT)

    assert stopped.end() == 0
    workers.wait_until_handled()
    assert workers.done() == once(5)


def test_a_refused_renewal_does_not_stop_other_renewals(workers: Workers) -> None:
    workers.worker(FAILING, EVENTBUS_CONCURRENCY="2")
    workers.send(0, name="long")
    workers.wait_for("holding")
    stream = workers.keys.stream("long")

    def idle() -> int:
        found = workers.redis.xpending_range(stream, workers.name, "-", "+", 1)
        return int(found[0]["time_since_delivered"])

    workers.send(0)
    workers.wait_for("begun", attempt=2)
    workers.worker(FAILING, EVENTBUS_CONCURRENCY="2")
    workers.redis.set(workers.keys.retry("work", workers.name), "a string")
    looks = [idle()]

    def is_renewed_again() -> bool:
        looks.append(idle())
        return sum(new < old for old, new in pairwise(looks)) >= 6

    wait_until(is_renewed_again, what="what runs is renewed again and again")
    workers.redis.delete(workers.keys.retry("work", workers.name))
    workers.release.touch()
    workers.wait_until_handled()
    assert len(workers.reports("holding")) == 1


def test_a_retry_slower_than_the_claim_time_runs_once(workers: Workers) -> None:
    # Each looks often for what the other may have left.
    slow = """
bus = Bus.from_env(_timing=Timing(check_released_every=0.2))

@bus.on("work")
def count(sender, n):
    report("begun", n=n)

    if current_event.attempt == 1:
        raise Retry(after=0)

    time.sleep(2.0)
    report("done", n=n)
"""
    workers.worker(slow, EVENTBUS_CLAIM_AFTER="0.5")
    workers.worker(slow, EVENTBUS_CLAIM_AFTER="0.5")
    workers.send(0)

    workers.wait_until_handled()
    assert workers.done() == once(1)
    assert workers.done("begun") == Counter({0: 2})


def test_two_hundred_stale_entries_behind_a_hundred_fresh_ones_are_all_claimed(
    workers: Workers,
) -> None:
    fresh = workers.worker(HOLDING, EVENTBUS_CLAIM_AFTER="60", EVENTBUS_CONCURRENCY="100")
    workers.send(*range(100))
    workers.wait_for("begun", 100)
    stale = workers.worker(HOLDING, EVENTBUS_CONCURRENCY="200")
    workers.send(*range(100, 300))
    workers.wait_for("begun", 300)

    stale.kill()
    workers.worker(COUNTING)

    wait_until(lambda: len(workers.done()) >= 200, timeout=20, what="what is stale is done")
    workers.release.touch()
    workers.wait_until_handled()
    assert sorted(workers.done()) == list(range(300))
    assert fresh.process.poll() is None


def test_thousands_of_stale_entries_are_claimed_quickly(workers: Workers) -> None:
    workers.send(*range(5_000))
    workers.redis.xgroup_create(workers.stream, workers.name, "0")
    workers.redis.xreadgroup(workers.name, "gone-1-2", {workers.stream: ">"}, count=5_000)

    workers.worker(COUNTING)

    workers.wait_until_handled(timeout=60)
    assert workers.done() == once(5_000)


# -- what a worker leaves to the others, in a service with many streams -------------------

#: Seconds after which another worker has what is left to it, however many streams there are.
TAKEN_WITHIN = 10.0

MANY_STREAMS = """
bus = Bus.from_env()

@bus.on("work", via="stream")
def work(sender, n):
    report("begun", n=n, attempt=current_event.attempt)

    if n == 0:
        wait_until_released("RELEASE")

    if n == 100 and current_event.attempt == 1:
        raise Retry(after=2.0)

    report("done", n=n, attempt=current_event.attempt)

for number in range(99):
    bus.on(f"idle_{number}", via="stream")(lambda sender, **payload: None)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_retry_whose_worker_ended_runs_within_ten_seconds_with_a_hundred_streams(
    workers: Workers, number: signal.Signals
) -> None:
    programs = [workers.work(MANY_STREAMS, EVENTBUS_CLAIM_AFTER="60") for _ in range(2)]
    workers.wait_for("ready", 2)
    retry = workers.keys.retry("work", workers.name)
    workers.send(100)
    wait_until(lambda: workers.redis.zcard(retry), what="the retry waits")
    [failed] = workers.reports("begun")

    [program] = [found for found in programs if found.pid == failed["pid"]]
    program.send_signal(number)

    wait_until(workers.done, timeout=2.0 + TAKEN_WITHIN, what="the other worker ran the retry")
    [done] = workers.reports("done")
    assert done["attempt"] == 2
    assert done["pid"] != failed["pid"]


def test_a_released_entry_is_taken_within_ten_seconds_with_a_hundred_streams(
    workers: Workers,
) -> None:
    for _ in range(2):
        workers.work(MANY_STREAMS, EVENTBUS_CLAIM_AFTER="60")

    workers.wait_for("ready", 2)
    workers.send(*range(10))
    workers.wait_for("begun", n=0)

    def are_all_done_but_one() -> bool:
        return workers.done() == Counter(range(1, 10))

    # A worker hands back what waits behind a receiver after three seconds.
    wait_until(are_all_done_but_one, timeout=3.0 + TAKEN_WITHIN, what="the other has the rest")
    workers.release.touch()
    workers.wait_until_handled()
