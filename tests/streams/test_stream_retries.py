"""Receivers of stream events that fail: each is tried again by itself, then given up."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import redis
from flask import Flask, g
from servers import RedisServer, unread
from stream_store import StreamStore
from waiting import wait_until
from workers import Workers

from flask_eventbus import Bus, ConfigError, EventBus, Reject, Retry, current_event, signals
from flask_eventbus.codec.records import RetryRecord
from flask_eventbus.config import Timing
from flask_eventbus.receivers import dispatcher
from flask_eventbus.streams import acknowledger, retry_queue
from flask_eventbus.transport.keys import StreamKeys

pytestmark = pytest.mark.second_look("waits for retries that are due in fractions of a second")

Make = Callable[..., Bus]

_numbers = itertools.count()

#: The backoff begins with a hundredth of a second.
quick = pytest.mark.timing(first_retry=0.01)


class Line:
    """The stream of ``work`` on a real server: a service that hears it, another that sends."""

    def __init__(self, server: RedisServer, make_bus: Make, prefix: str) -> None:
        self.server, self.prefix = server, prefix
        self.keys = StreamKeys(prefix)
        self.redis: redis.Redis = server.client
        self.bus = make_bus(server.url, "consumer", prefix=prefix)
        self.publisher = make_bus(server.url, "publisher", prefix=prefix, publish={"*": "stream"})

    def listen(self) -> None:
        """Read, from what is sent next."""
        self.bus.start()
        assert self.bus.ready(10)

    def send(self, *numbers: Any) -> None:
        """Publish an event for each number."""
        for number in numbers:
            self.publisher.node.publish("work", {"n": number}, confirm=False)

        assert self.publisher.flush(10)

    def settled(self) -> bool:
        """Return True if no entry or retry is left."""
        key = self.keys.stream("work")

        # In the order of an event's way, so that one that goes on in between is found later.
        if unread(self.redis, key, "consumer"):
            return False

        (group,) = self.redis.xinfo_groups(key)
        return not (group["pending"] or self.waiting())

    def wait_until_handled(self, timeout: float = 15) -> None:
        """Wait until nothing is left to do."""
        wait_until(self.settled, timeout=timeout, what="everything is settled")

    def waiting(self) -> list[tuple[bytes, float]]:
        """Return the retries, each with its due time in milliseconds."""
        found: Any = self.redis.zrange(self.keys.retry("work", "consumer"), 0, -1, withscores=True)
        return list(found)

    def dead_letters(self) -> list[dict[str, str]]:
        """The dead letters, as ``redis-cli`` shows them."""
        found: Any = self.redis.xrange(self.keys.dead("work", "consumer"))
        return [
            {key.decode(): value.decode(errors="replace") for key, value in fields.items()}
            for _, fields in found
        ]


@pytest.fixture
def line(shared_redis: RedisServer, make_bus: Make) -> Iterator[Line]:
    """A stream of this test's own."""
    found = Line(shared_redis, make_bus, f"retries-{os.getpid()}-{next(_numbers)}")
    yield found
    found.redis.close()


# -- only what failed, and when -----------------------------------------------------------


@quick
def test_only_failed_receivers_are_retried(line: Line) -> None:
    ran: list[tuple[str, int]] = []

    @line.bus.on("work")
    def first(sender: str, n: int) -> None:
        ran.append(("first", current_event.attempt))

    @line.bus.on("work")
    def second(sender: str, n: int) -> None:
        ran.append(("second", current_event.attempt))
        if current_event.attempt < 3:
            raise RuntimeError("not yet")

    @line.bus.on("work")
    async def third(sender: str, n: int) -> None:
        ran.append(("third", current_event.attempt))
        await asyncio.sleep(0)
        if current_event.attempt < 2:
            raise RuntimeError("not yet")

    line.listen()
    line.send(1)

    wait_until(lambda: len(ran) == 6, what="all have succeeded")
    line.wait_until_handled()
    assert sorted(ran) == [
        ("first", 1),
        ("second", 1),
        ("second", 2),
        ("second", 3),
        ("third", 1),
        ("third", 2),
    ]
    assert not line.dead_letters()


def wrapped(function: Callable[..., None]) -> Callable[..., None]:
    """A decorator that does not hand on the name of what it decorates."""

    def wrapper(sender: str, **payload: Any) -> None:
        function(sender, **payload)

    return wrapper


@quick
def test_retries_of_receivers_with_the_same_name_are_kept_apart(line: Line) -> None:
    ran: list[tuple[str, int]] = []

    @line.bus.on("work")
    @wrapped
    def first(sender: str, n: int) -> None:
        ran.append(("first", current_event.attempt))

    @line.bus.on("work", retries=3)
    @wrapped
    def second(sender: str, n: int) -> None:
        ran.append(("second", current_event.attempt))
        raise RuntimeError("never")

    @line.bus.on("work", retries=3)
    @wrapped
    def third(sender: str, n: int) -> None:
        ran.append(("third", current_event.attempt))
        raise RuntimeError("never")

    line.listen()
    line.send(1)

    wait_until(lambda: len(line.dead_letters()) == 2, what="both are given up")
    line.wait_until_handled()
    expected = [("first", 1)]
    expected += [(name, attempt) for name in ("second", "third") for attempt in (1, 2, 3, 4)]
    assert sorted(ran) == expected
    assert len({letter["receiver"] for letter in line.dead_letters()}) == 2


def test_the_delay_doubles_and_is_bounded() -> None:
    delays = [dispatcher.delay(attempts, jitter=0.0) for attempts in range(1, 12)]

    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert all(1 <= dispatcher.delay(1) <= 1.25 for _ in range(100))
    assert dispatcher.delay(10_000) == 300


def test_a_retry_waits_in_redis_until_it_is_due(line: Line) -> None:
    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        raise RuntimeError("not yet")

    line.listen()
    before = time.time()
    line.send(1)

    wait_until(line.waiting, what="the retry waits")
    ((_, due),) = line.waiting()
    assert before + 1.0 <= due / 1000 <= time.time() + 1.25
    wait_until(lambda: line.bus.health().counts.get("retries") == 1, what="it is counted")


@pytest.mark.parametrize("after", [0, 0.2, 3_600], ids=str)
def test_a_receiver_can_set_the_delay_of_its_retry(
    line: Line, caplog: pytest.LogCaptureFixture, after: float
) -> None:
    caplog.set_level(logging.INFO, "flask_eventbus")
    begun: list[float] = []

    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        begun.append(time.time())
        if current_event.attempt == 1:
            raise Retry("the shop is closed", after=after)

    line.listen()
    line.send(1)

    if after < 60:
        wait_until(lambda: len(begun) == 2, what="it is tried again")
        # The clock of Redis is known as exactly as it answers fast.
        assert after - 0.1 < begun[1] - begun[0]
        assert f"and is tried again in {after:.1f} s" in caplog.text
        line.wait_until_handled()
    else:
        wait_until(line.waiting, what="the retry waits")
        assert abs(line.waiting()[0][1] / 1000 - begun[0] - after) < 60


@pytest.mark.parametrize("after", [float("inf"), float("nan"), -1, "soon", 1e300], ids=str)
def test_an_invalid_retry_delay_counts_as_a_failure(line: Line, after: Any) -> None:
    received: list[int] = []

    @line.bus.on("work", retries=0)
    def receive(sender: str, n: int) -> None:
        received.append(n)
        if n == 1:
            raise Retry(after=after)

    line.listen()
    line.send(1, 2)

    wait_until(line.dead_letters, what="it is given up")
    line.wait_until_handled()
    assert received == [1, 2]
    assert "'after'" in line.dead_letters()[0]["error"]


def test_the_memory_for_waiting_retries_is_bounded() -> None:
    clock = mock.Mock()
    clock.now.return_value = 1_000_000.25
    schedule = acknowledger.Schedule(clock, Timing(expect_within=60.0))

    for n in range(20_000):
        schedule.expect("work", 1_000_000.25 + n / 100)

    assert len(schedule._due) <= 60.0 * acknowledger.LOOKS_PER_SECOND + 1
    assert set().union(*schedule._due.values()) == {"work"}


@pytest.mark.timing(check_released_every=0.2, expect_within=0.1)
def test_a_retry_due_much_later_is_found_by_a_later_look(line: Line) -> None:
    begun: list[int] = []

    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        begun.append(current_event.attempt)
        if current_event.attempt == 1:
            raise Retry(after=0.5)

    line.listen()
    line.send(1)

    wait_until(lambda: begun == [1, 2], what="it is tried again")
    line.wait_until_handled()


@quick
def test_hundreds_of_retries_due_at_once_run_without_delay(line: Line) -> None:
    done: list[int] = []

    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        if current_event.attempt == 1:
            raise Retry(after=0.5)
        done.append(n)

    line.listen()
    line.send(*range(400))

    wait_until(lambda: len(done) == 400, timeout=8, what="all are tried again")
    assert sorted(done) == list(range(400))


def test_two_workers_share_retries_and_run_each_once(
    line: Line, shared_redis: RedisServer, make_bus: Make
) -> None:
    done: list[int] = []
    other = make_bus(shared_redis.url, "consumer", prefix=line.bus.node.config.prefix)

    def receive(sender: str, n: int) -> None:
        if current_event.attempt <= 2:
            raise Retry(after=0.1)
        done.append(n)

    for bus in (line.bus, other):
        bus.on("work")(receive)
        bus.start()
        assert bus.ready(10)

    line.send(*range(500))

    wait_until(lambda: len(done) >= 500, timeout=15, what="all are tried again")
    line.wait_until_handled()
    assert sorted(done) == list(range(500))


# -- given up -----------------------------------------------------------------------------


@quick
def test_after_its_last_retry_an_event_becomes_a_complete_dead_letter(line: Line) -> None:
    reported: list[dict[str, Any]] = []
    attempts: list[int] = []

    def note(sender: str, **facts: Any) -> None:
        reported.append({"service": sender, **facts})

    @line.bus.on("work", retries=2)
    def receive(sender: str, n: int) -> None:
        attempts.append(current_event.attempt)
        raise RuntimeError(f"attempt {current_event.attempt}: the mail server is away")

    line.listen()
    with signals.event_dead_lettered.connected_to(note):
        line.send(7)
        wait_until(lambda: reported, what="it is reported")

    (letter,) = line.dead_letters()
    name = f"{__name__}.{receive.__qualname__}"
    found: Any = line.redis.xrange(line.keys.stream("work"))
    ((entry, fields),) = found
    assert attempts == [1, 2, 3]
    assert letter["reason"] == "retries"
    assert letter["receiver"] == name
    assert letter["attempts"] == "3"
    assert letter["error"] == "RuntimeError: attempt 3: the mail server is away"
    assert "in receive" in letter["traceback"]
    assert len(letter["traceback"]) <= 4_000
    assert letter["entry"] == entry.decode()
    assert letter["source"] == "publisher"
    assert json.loads(letter["payload"]) == {"n": 7}
    assert letter["first_failed"] < letter["last_failed"]
    dead: Any = line.redis.xrange(line.keys.dead("work", "consumer"))
    ((_, raw),) = dead
    assert raw[b"event"] == fields[b"event"]
    assert reported == [
        {
            "service": "consumer",
            "name": "work",
            "receiver": name,
            "reason": "retries",
            "event_id": letter["id"],
            "error": letter["error"],
        }
    ]
    line.wait_until_handled()
    assert line.bus.health().counts["dead_lettered"] == 1


def test_an_event_that_is_rejected_is_a_dead_letter_at_once(line: Line) -> None:
    received: list[int] = []

    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        raise Reject("no such user")

    @line.bus.on("work")
    def other(sender: str, n: int) -> None:
        received.append(n)

    line.listen()
    line.send(1)

    wait_until(line.dead_letters, what="it is a dead letter")
    line.wait_until_handled()
    (letter,) = line.dead_letters()
    assert (letter["reason"], letter["attempts"]) == ("rejected", "1")
    assert letter["error"] == "Reject: no such user"
    assert received == [1]


@pytest.mark.parametrize("maxlen", [1, "1s"])
def test_trimming_the_stream_keeps_its_dead_letters(
    line: Line, make_bus: Make, maxlen: int | str
) -> None:
    ago = round(time.time() * 1000) - 3_600_000
    key = line.keys.dead("work", "consumer")
    for number in range(20):
        line.redis.xadd(key, {"reason": "rejected", "error": "x" * 5_000}, id=f"{ago}-{number}")
    line.bus = make_bus(line.server.url, "consumer", prefix=line.prefix, maxlen=maxlen)

    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        raise Reject("no such user")

    line.listen()
    line.send(1, 2, 3)
    line.wait_until_handled()

    assert line.redis.xlen(key) == 23
    assert "dead_dropped" not in line.bus.health().counts


def test_dead_letters_over_their_limit_are_dropped_counted_logged_and_shown(
    line: Line, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[dict[str, Any]] = []
    store = StreamStore(line.server, line.prefix)
    line.bus = make_bus(line.server.url, "consumer", prefix=line.prefix, dead_maxlen=5)

    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        raise Reject("x" * 400)

    @signals.events_dropped.connect_via("consumer")
    def note(sender: str, **facts: Any) -> None:
        reported.append(facts)

    line.listen()
    line.send(*range(40))
    line.wait_until_handled()
    wait_until(lambda: line.bus.health().counts.get("dead_dropped"), what="some are dropped")
    line.bus.stop()

    kept = [json.loads(letter["payload"])["n"] for letter in line.dead_letters()]
    dropped = 40 - len(kept)
    assert 5 <= len(kept) < 40
    assert kept == list(range(dropped, 40))
    assert line.bus.health().counts["dead_dropped"] == dropped
    assert sum(facts["count"] for facts in reported) == dropped
    assert {facts["where"] for facts in reported} == {"dead"}
    assert "'consumer' has more than 5 dead letters of 'work'" in caplog.text
    assert "(python -m flask_eventbus dead list)" in caplog.text
    sentence = f"{dropped} dead letters of 'consumer' at 'work' were dropped"
    assert sentence in store.run("status", service="consumer").output
    alarm = store.run("status", "--max-dead", "1000", service="consumer")
    assert (alarm.exit_code, sentence in alarm.stderr) == (1, True)
    assert store.run("dead", "purge", "--yes", service="consumer").exit_code == 0
    assert "were dropped" not in store.run("status", service="consumer").output


class UntellableError(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> str:
        raise ValueError("there are no words for it")


BAD: dict[str, Callable[[], BaseException]] = {
    "a file name of another encoding": lambda: FileNotFoundError(os.fsdecode(b"caf\xe9")),
    "no text": UntellableError,
    "the end of the process": lambda: SystemExit(1),
    "a group": lambda: BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError()]),
    "very long": lambda: ValueError("x" * 1_000_000),
    "zeros": lambda: ValueError("\0" * 10),
}


@pytest.fixture
def _silence() -> Iterator[None]:
    """Log nothing: what cannot be written does not fit into the report of a test either."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@quick
@pytest.mark.usefixtures("_silence")
@pytest.mark.parametrize("bad", BAD)
def test_any_exception_of_a_receiver_leads_to_retries_and_then_a_dead_letter(
    line: Line, bad: str
) -> None:
    received: list[int] = []

    @line.bus.on("work", retries=1)
    def receive(sender: str, n: int) -> None:
        received.append(n)
        if n == 1:
            raise BAD[bad]()

    line.listen()
    line.send(1, 2)

    wait_until(line.dead_letters, what="it is a dead letter")
    line.wait_until_handled()
    assert sorted(received) == [1, 1, 2]
    assert len(line.dead_letters()[0]["error"]) <= 500


# -- how often ----------------------------------------------------------------------------


@quick
@pytest.mark.parametrize(
    ("setting", "subscription", "receiver", "attempts"),
    [(1, None, None, 2), (1, None, 3, 4), (1, 2, 3, 3), (5, 0, None, 1), (5, None, 0, 1)],
)
def test_retries_are_set_by_the_subscription_the_receiver_or_the_setting_in_this_order(
    line: Line,
    shared_redis: RedisServer,
    make_bus: Make,
    setting: int,
    subscription: int | None,
    receiver: int | None,
    attempts: int,
) -> None:
    named = {} if subscription is None else {"retries": subscription}
    line.bus = make_bus(
        shared_redis.url,
        "consumer",
        prefix=line.bus.node.config.prefix,
        retries=setting,
        subscribe={"work": named},
    )
    ran: list[int] = []

    @line.bus.on("work", retries=receiver)
    def receive(sender: str, n: int) -> None:
        ran.append(current_event.attempt)
        raise RuntimeError("never")

    line.listen()
    line.send(1)

    wait_until(line.dead_letters, what="it is given up")
    assert ran == list(range(1, attempts + 1))


@pytest.mark.parametrize("wrong", [-1, 1.5, "often", True, 10**9], ids=str)
def test_retries_of_a_receiver_must_be_a_number(line: Line, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="Set it to a whole number from 0 to 10,000"):
        line.bus.on("work", retries=wrong)(lambda sender, n: None)


# -- how long -----------------------------------------------------------------------------


@quick
def test_an_async_receiver_over_its_timeout_is_cancelled_and_has_failed(line: Line) -> None:
    ended: list[int] = []

    @line.bus.on("work", timeout=0.05, retries=1)
    async def receive(sender: str, n: int) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(current_event.attempt)

    line.listen()
    line.send(1)

    wait_until(line.dead_letters, what="it is given up")
    assert ended == [1, 2]
    letter = line.dead_letters()[0]
    assert letter["error"] == "TimeoutError: It took longer than its timeout of 0.05 s."
    assert "During handling of the above" not in letter["traceback"]


@quick
def test_a_timeout_error_raised_by_an_async_receiver_is_reported_as_its_own(line: Line) -> None:
    @line.bus.on("work", timeout=60, retries=0)
    async def receive(sender: str, n: int) -> None:
        raise TimeoutError("the other side is silent")

    line.listen()
    line.send(1)

    wait_until(line.dead_letters, what="it is given up")
    assert line.dead_letters()[0]["error"] == "TimeoutError: the other side is silent"


def test_retry_with_a_positional_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Write Retry\(after=60\)"):
        Retry(60)  # type: ignore[arg-type]  # that is the point


def test_a_timeout_too_long_for_python_is_refused(line: Line) -> None:
    def receive(sender: str, n: int) -> None: ...

    with pytest.raises(ConfigError, match="Python cannot interrupt a function that is not 'async"):
        line.bus.on("work", timeout=5)(receive)


@pytest.mark.parametrize("wrong", [0, -1, "5", True, float("inf")], ids=str)
def test_a_timeout_that_is_not_a_number_of_seconds_is_refused(line: Line, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="Set it to a number of seconds, more than 0"):
        line.bus.on("work", timeout=wrong)


# -- in an app ----------------------------------------------------------------------------


@pytest.fixture
def app(line: Line, shared_redis: RedisServer, timing: Timing) -> Iterator[tuple[Flask, EventBus]]:
    """An app that hears the stream."""
    app = Flask(__name__)
    app.config.from_mapping(
        EVENTBUS_SERVICE="consumer",
        EVENTBUS_URL=shared_redis.url,
        EVENTBUS_PREFIX=line.bus.node.config.prefix,
    )
    bus = EventBus(_timing=timing)
    bus.init_app(app)
    yield app, bus
    bus.node(app).stop(flush=0)


@quick
def test_each_attempt_has_a_new_app_context(line: Line, app: tuple[Flask, EventBus]) -> None:
    flask_app, bus = app
    seen: list[tuple[int, list[int]]] = []
    torn: list[int] = []

    @flask_app.teardown_appcontext
    def tear_down(error: BaseException | None) -> None:
        torn.append(g.get("attempts", [0])[0])

    @bus.on("work")
    def receive(sender: str, n: int) -> None:
        g.setdefault("attempts", []).append(current_event.attempt)
        seen.append((current_event.attempt, list(g.attempts)))
        if current_event.attempt < 3:
            raise RuntimeError("not yet")

    node = bus.node(flask_app)
    node.start()
    assert node.ready(10)
    line.send(1)

    wait_until(lambda: len(torn) == 3, what="all contexts are torn down")
    assert seen == [(1, [1]), (2, [2]), (3, [3])]
    assert torn == [1, 2, 3]


def test_a_teardown_that_raises_does_not_fail_the_receiver(
    line: Line, app: tuple[Flask, EventBus], caplog: pytest.LogCaptureFixture
) -> None:
    flask_app, bus = app
    received: list[int] = []

    @flask_app.teardown_appcontext
    def tear_down(error: BaseException | None) -> None:
        raise RuntimeError("the session is gone")

    @bus.on("work")
    def receive(sender: str, n: int) -> None:
        received.append(n)

    node = bus.node(flask_app)
    node.start()
    assert node.ready(10)
    line.send(1, 2, 3)

    line.wait_until_handled()
    assert received == [1, 2, 3]
    assert not line.dead_letters()
    assert "the session is gone" in caplog.text


# -- past the process ---------------------------------------------------------------------


def test_a_retry_survives_the_process_that_failed(workers: Workers) -> None:
    failing = """
@bus.on("work")
def fail(sender, n):
    report("begun", n=n, attempt=current_event.attempt, at=time.time())

    if current_event.attempt == 1:
        raise Retry(after=2)
"""
    program = workers.worker(failing)
    workers.send(0)
    wait_until(lambda: workers.redis.zcard(workers.keys.retry("work", workers.name)), what="it is")
    program.kill()

    workers.worker(failing)

    wait_until(workers.all_handled, what="it is tried again")
    first, second = workers.reports("begun")
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert second["at"] - first["at"] > 1.9


@pytest.mark.timing(check_released_every=0.05, max_postpone=0.2)
def test_a_retry_is_left_to_a_worker_that_has_the_receiver(
    line: Line, shared_redis: RedisServer, make_bus: Make
) -> None:
    other = make_bus(shared_redis.url, "consumer", prefix=line.bus.node.config.prefix)
    lacking = make_bus(shared_redis.url, "consumer", prefix=line.bus.node.config.prefix)
    done = threading.Event()

    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        if current_event.attempt > 1:
            done.set()
        raise Retry(after=0 if current_event.attempt > 1 else 600)

    line.listen()
    line.send(1)
    wait_until(line.waiting, what="the retry waits")
    line.bus.stop()
    # Due now, and not before the first worker has ended.
    [(retry, _)] = line.waiting()
    line.redis.zadd(line.keys.retry("work", "consumer"), {retry: time.time() * 1000})
    lacking.on("work")(lambda sender, n: None)
    lacking.start()
    assert lacking.ready(10)
    other.on("work", retries=1)(receive)
    other.start()

    wait_until(line.dead_letters, timeout=20, what="it was tried again")
    assert done.is_set()
    assert line.dead_letters()[0]["attempts"] == "2"


@pytest.mark.timing(check_released_every=0.05, max_postpone=0.2)
def test_a_retry_whose_receiver_disappears_at_its_start_is_not_acknowledged(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = retry_queue.RetryQueue.record_start
    begun: list[bool] = []
    ran: list[int] = []

    @line.bus.on("work")
    def receive(sender: str, n: int) -> None:
        ran.append(current_event.attempt)
        if current_event.attempt == 1:
            raise Retry(after=0)

    def disconnect_meanwhile(*arguments: Any) -> bool:
        begun.append(begin(*arguments))
        line.bus.signal("work").disconnect(receive)
        return begun[-1]

    monkeypatch.setattr(retry_queue.RetryQueue, "record_start", disconnect_meanwhile)
    line.listen()
    line.send(1)
    wait_until(lambda: begun, what="the retry begins, and its receiver is gone")
    monkeypatch.setattr(retry_queue.RetryQueue, "record_start", begin)
    wait_until(lambda: line.waiting() and not running(line), what="the retry is put back")
    assert ran == [1]
    line.bus.signal("work").connect(receive, weak=False)

    line.wait_until_handled()
    assert ran == [1, 2]
    assert not line.dead_letters()


def running(line: Line) -> list[bytes]:
    """The retries that are being tried."""
    return [member for member, _ in line.waiting() if RetryRecord.unpacked(member).running]
