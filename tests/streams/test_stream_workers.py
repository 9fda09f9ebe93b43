"""Workers of a service share its streams: real processes that start, end, and are killed."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest
from waiting import wait_until
from workers import COUNTING, HOLDING, Workers, once

pytestmark = pytest.mark.second_look("pauses and kills workers, and lets their claims expire")


# -- where a group begins -----------------------------------------------------------------


def test_a_restart_does_not_skip_the_backlog(workers: Workers) -> None:
    program = workers.worker()
    workers.send(0, 1, 2)
    workers.wait_until_handled()
    program.send_signal(signal.SIGTERM)
    assert program.end() == 0

    workers.send(3, 4, 5)
    workers.worker()

    workers.wait_until_handled()
    assert workers.done() == once(6)


def test_a_second_worker_that_starts_does_not_move_the_group(workers: Workers) -> None:
    workers.worker("""
@bus.on("work")
def hold(sender, n):
    wait_until_released("RELEASE")
    report("done", n=n)
""")
    workers.send(*range(50))
    workers.worker()
    workers.release.touch()

    workers.wait_until_handled()
    assert workers.done() == once(50)


@pytest.mark.parametrize(
    ("start", "received"), [("'new'", [2]), ("'earliest'", [0, 1, 2]), ("MIDDLE", [1, 2])]
)
def test_a_new_group_starts_at_the_start_option(
    workers: Workers, start: str, received: list[int]
) -> None:
    workers.send(0)
    middle = workers.redis.xinfo_stream(workers.stream)["last-generated-id"].decode()
    workers.send(1)

    workers.worker(COUNTING.replace("echo=True", f"start={start.replace('MIDDLE', repr(middle))}"))
    workers.send(2)

    workers.wait_until_handled()
    assert sorted(workers.done()) == received


def test_start_is_ignored_if_the_group_exists(workers: Workers) -> None:
    program = workers.worker()
    workers.send(0)
    workers.wait_until_handled()
    program.send_signal(signal.SIGTERM)
    program.end()

    workers.worker(COUNTING.replace("echo=True", "start='earliest'"))
    workers.send(1)

    workers.wait_until_handled()
    assert workers.done() == once(2)


def test_several_workers_that_start_at_once_all_run(workers: Workers) -> None:
    programs = [workers.work() for _ in range(4)]

    for program in programs:
        workers.wait_for("ready", pid=program.pid)

    workers.send(*range(20))
    workers.wait_until_handled()
    assert workers.done() == once(20)


# -- each service once --------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8])
def test_workers_of_a_service_handle_every_event_once(workers: Workers, count: int) -> None:
    programs = [workers.work() for _ in range(count)]

    for program in programs:
        workers.wait_for("ready", pid=program.pid)

    workers.send(*range(2_000))

    workers.wait_until_handled()
    assert workers.done() == once(2_000)
    assert len({line["pid"] for line in workers.reports("done")}) > 1


def test_two_services_receive_every_event_once_each(workers: Workers) -> None:
    workers.worker()
    workers.worker()
    other = COUNTING.replace('"done"', '"other"')
    workers.worker(other, EVENTBUS_SERVICE="other")
    workers.worker(other, EVENTBUS_SERVICE="other")

    workers.send(*range(500))

    workers.wait_until_handled()
    workers.wait_until_handled("other")
    assert workers.done() == workers.done("other") == once(500)


def test_a_free_worker_gets_the_events_that_a_busy_one_would_delay(
    workers: Workers,
) -> None:
    busy = """
@bus.on("work")
def hold(sender, n):
    report("begun", n=n)
    wait_until_released("RELEASE")
    report("done", n=n)
"""
    workers.worker(busy)
    workers.send(0)
    workers.wait_for("begun", 1)
    workers.worker(busy)

    workers.send(1)

    workers.wait_for("begun", 2)
    workers.release.touch()
    workers.wait_until_handled()
    assert len({line["pid"] for line in workers.reports("done")}) == 2


def test_events_that_a_busy_worker_has_read_go_to_a_free_one(workers: Workers) -> None:
    busy = """
@bus.on("work")
def hold(sender, n):
    report("begun", n=n)
    wait_until_released("RELEASE")
    report("done", n=n)
"""
    first = workers.worker(busy, EVENTBUS_CLAIM_AFTER="60")
    workers.send(*range(6))
    workers.wait_for("begun", 1)
    wait_until(lambda: workers.group()["pending"] == 6, what="it has read all of them")

    workers.worker(COUNTING, EVENTBUS_CLAIM_AFTER="60")

    workers.wait_for("done", 5)
    assert workers.done() == Counter(range(1, 6))
    workers.release.touch()
    workers.wait_until_handled()
    assert [line["n"] for line in workers.reports("done", pid=first.pid)] == [0]


def test_two_slow_events_at_once_are_shared_by_two_workers(workers: Workers) -> None:
    busy = """
@bus.on("work")
def hold(sender, n):
    report("begun", n=n)
    wait_until_released("RELEASE")
"""
    workers.worker(busy)
    workers.worker(busy)

    workers.send(0, 1)

    workers.wait_for("begun", 2)
    assert len({line["pid"] for line in workers.reports("begun")}) == 2
    workers.release.touch()


# -- workers that are killed --------------------------------------------------------------


def test_events_in_flight_of_a_killed_worker_are_reclaimed_within_one_and_a_half_claim_times(
    workers: Workers,
) -> None:
    victim = workers.worker(HOLDING)
    workers.send(*range(10))
    workers.wait_for("begun")
    workers.worker(COUNTING)

    victim.kill()
    killed = time.monotonic()
    workers.wait_until_handled()

    # A claim time, and half of one until a look; the rest is this machine's.
    assert time.monotonic() - killed < 10
    assert workers.done() == once(10)
    assert [line["attempt"] for line in workers.reports("done", n=0)] == [2]


def test_workers_that_are_killed_one_after_the_other_lose_nothing(workers: Workers) -> None:
    slow = """
@bus.on("work")
def count(sender, n):
    report("begun", n=n)
    time.sleep(0.005)
    report("done", n=n)
"""
    victims = [workers.worker(slow) for _ in range(3)]
    workers.send(*range(600))

    for number, victim in enumerate(victims):
        workers.wait_for("begun", 60 * (number + 1))
        victim.kill()
        workers.work(slow)

    workers.wait_until_handled(timeout=40)
    done = workers.done()
    assert sorted(done) == list(range(600))
    # What was settled was not done again: of each victim what it did in its last moments.
    assert sum(done.values()) - 600 <= 3 * 10


def test_events_handled_before_a_long_receiver_started_are_not_repeated(workers: Workers) -> None:
    mixed = """
@bus.on("work")
def count(sender, n):
    report("begun", n=n, attempt=current_event.attempt)

    if n == 5 and current_event.attempt == 1:
        wait_until_released("RELEASE")

    report("done", n=n)
"""
    victim = workers.worker(mixed)
    workers.send(*range(10))
    workers.wait_for("begun", n=5)

    wait_until(lambda: workers.group()["pending"] <= 5, what="what is done is acknowledged")
    victim.kill()
    workers.worker(mixed)

    workers.wait_until_handled()
    assert workers.done() == once(10)


def test_a_worker_that_was_paused_starts_nothing_that_others_reclaimed(
    workers: Workers,
) -> None:
    still = workers.worker(HOLDING)
    workers.send(*range(10))
    workers.wait_for("begun")
    workers.worker(COUNTING)

    still.send_signal(signal.SIGSTOP)
    workers.wait_until_handled()
    workers.release.touch()
    still.send_signal(signal.SIGCONT)
    workers.wait_for("done", pid=still.pid)
    workers.send(10)
    workers.wait_until_handled()

    # What it was at when it stood still cannot be taken back from it; it is told from the rest.
    assert workers.done() == once(11) + Counter({0: 1})


def test_an_event_that_kills_its_worker_each_time_becomes_a_dead_letter(
    workers: Workers,
) -> None:
    deadly = """
@bus.on("work")
def count(sender, n):
    report("begun", n=n, attempt=current_event.attempt)

    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)

    report("done", n=n)
"""
    # What the receiver asks for counts, and not the setting.
    deadly = deadly.replace('"work"', '"work", retries=2')
    settings = {"EVENTBUS_RETRIES": "9", "EVENTBUS_CLAIM_AFTER": "0.5"}
    workers.send(*range(8))
    program = workers.work(deadly.replace('"work"', '"work", start="earliest"'), **settings)
    starts = 1

    while not workers.dead_letters():
        wait_until(
            lambda p=program: p.process.poll() is not None or workers.dead_letters(),  # type: ignore[misc]
            timeout=20,
            what="the worker dies, or the event is a dead letter",
        )

        if not workers.dead_letters():
            program.kill()
            program = workers.work(deadly, **settings)
            starts += 1

    workers.wait_until_handled()
    letter, attempts = (
        workers.dead_letters()[0],
        [e["attempt"] for e in workers.reports("begun", n=3)],
    )
    assert attempts == [1, 2, 3]
    assert (letter["reason"], letter["attempts"], letter["receiver"]) == (b"killed", b"3", b"")
    assert sorted(workers.done()) == [0, 1, 2, 4, 5, 6, 7]
    assert starts == 4
    assert program.process.poll() is None


def test_a_retry_that_kills_its_worker_each_time_becomes_a_dead_letter(workers: Workers) -> None:
    deadly = """
@bus.on("work", retries=2)
def count(sender, n):
    report("begun", n=n, attempt=current_event.attempt)

    if current_event.attempt > 1:
        os.kill(os.getpid(), signal.SIGKILL)

    raise Retry(after=0)

@bus.on("work")
def other(sender, n):
    report("done", n=n)
"""
    program = workers.worker(deadly, EVENTBUS_CLAIM_AFTER="0.5")
    workers.send(0)

    for _ in range(2):
        wait_until(lambda p=program: p.process.poll() is not None, timeout=20, what="it dies")  # type: ignore[misc]
        program.kill()
        program = workers.work(deadly, EVENTBUS_CLAIM_AFTER="0.5")

    wait_until(workers.dead_letters, timeout=20, what="it is a dead letter")
    workers.wait_until_handled()
    assert [line["attempt"] for line in workers.reports("begun")] == [1, 2, 3]
    assert workers.done() == once(1)
    letter = workers.dead_letters()[0]
    assert (letter["reason"], letter["attempts"]) == (b"killed", b"3")
    assert letter["receiver"] == b"__main__.count"
