"""Tests of the maintenance of streams, where a mistake would lose events."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytest
import redis
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, Reject, current_event
from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.records import DeadLetter, RetryRecord
from flask_eventbus.config import TIMING
from flask_eventbus.receivers.delivery import Delivery, InFlight
from flask_eventbus.receivers.workers import DeliveryQueue
from flask_eventbus.routing.subscriptions import Subscription
from flask_eventbus.streams import acknowledger, consumer, outcomes
from flask_eventbus.streams.group import Group
from flask_eventbus.streams.outcomes import DeadLimit, Outcome
from flask_eventbus.transport.pipe import Command, Pipe

pytestmark = [
    pytest.mark.second_look("waits for maintenance that runs several times a second"),
    pytest.mark.timing(first_retry=0.05, check_released_every=0.2),
]

Make = Callable[..., Bus]


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams under a prefix of this test's own."""
    return StreamStore(shared_redis)


def listen(bus: Bus, receive: Callable[..., object], **options: Any) -> None:
    """Hear ``tick`` from its beginning."""
    bus.on("tick", via="stream", start="earliest", **options)(receive)
    bus.start()
    assert bus.ready(10)


def dead_letters(store: StreamStore) -> list[DeadLetter]:
    """The dead letters of ``tick``, as they read."""
    key = store.keys.dead("tick", "mailer")
    return [DeadLetter.from_fields(fields) for _, fields in store.client.xrange(key)]


def pending(store: StreamStore) -> int:
    """Return the number of pending entries."""
    found: Any = store.client.xpending(store.keys.stream("tick"), "mailer")
    return int(found["pending"])


def delivery_of(store: StreamStore) -> Delivery:
    """A first attempt that was read and not started."""
    event = store.event("tick", n=1)
    return Delivery(
        name="tick",
        entry="1700000000000-0",
        event=event,
        body=Codec().encode(event),
        subscription=Subscription(name="tick", via="stream"),
        claimed_until=time.monotonic() + 60,
        identity=("tick", "1700000000000-0", b""),
    )


# -- what became of an event --------------------------------------------------------------


@pytest.mark.parametrize(("retries", "kept"), [(5, "ZADD"), (0, "XADD")], ids=["retry", "dead"])
def test_the_record_of_a_failure_and_the_acknowledgement_are_one_transaction(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch, retries: int, kept: str
) -> None:
    reported: list[list[object]] = []
    run = Pipe.run

    def note(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        reported.append([command[0] for command in commands])
        return run(pipe, commands, **how)

    def fail(sender: str, n: int) -> None:
        if current_event.attempt == 1:
            raise ValueError

    monkeypatch.setattr(Pipe, "run", note)
    listen(make_bus(store.url, "mailer", prefix=store.prefix), fail, retries=retries)
    store.add("tick", n=1)

    wait_until(lambda: any("XACK" in words for words in reported), what="it is acknowledged")
    assert next(words for words in reported if "XACK" in words) == ["MULTI", kept, "XACK", "EXEC"]


def test_the_outcome_of_a_retry_is_written_again_if_redis_did_not_get_it(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    lost: list[object] = []
    run = Pipe.run

    def lose_once(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        words = [command[0] for command in commands]

        if words == ["MULTI", "ZADD", "ZREM", "EXEC"] and not lost:
            lost.append(commands)
            raise redis.ConnectionError

        return run(pipe, commands, **how)

    def fail_twice(sender: str, n: int) -> None:
        tries.append(current_event.attempt)

        if len(tries) < 3:
            raise ValueError

    monkeypatch.setattr(Pipe, "run", lose_once)
    listen(make_bus(store.url, "mailer", prefix=store.prefix), fail_twice)
    store.add("tick", n=1)

    wait_until(lambda: tries == [1, 2, 3], what="it is tried a third time")
    assert lost


@pytest.mark.timing(check_released_every=60.0, pause_reading_after=60.0)
def test_an_outcome_is_written_while_the_next_receiver_runs(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker thread itself writes at the end of the batch only.
    monkeypatch.setattr(consumer, "WRITE_EVERY", 600.0)
    started: list[int] = []
    gates = {0: threading.Event(), 2: threading.Event()}

    def receive(sender: str, n: int) -> None:
        started.append(n)

        if n in gates:
            gates[n].wait(30)

    # No claim is renewed before the test ends.
    bus = make_bus(store.url, "mailer", prefix=store.prefix, concurrency=1, claim_after=300)
    listen(bus, receive)
    store.add("tick", n=0)
    wait_until(lambda: started == [0], what="the only thread is busy")
    last, _ = [store.add("tick", n=n) for n in (1, 2)][-1]
    wait_until(lambda: store.position("tick") == last, what="two more are read")
    schedule = bus.node._inbound.consumer._acknowledger.schedule
    wait_until(lambda: 5 < schedule.next - time.monotonic() < 600, what="maintenance sleeps")
    gates[0].set()

    wait_until(lambda: started == [0, 1, 2], what="the last one runs")
    wait_until(lambda: pending(store) == 1, what="the others are acknowledged")
    gates[2].set()
    wait_until(lambda: pending(store) == 0, what="all are acknowledged")


def test_short_receivers_of_several_threads_share_a_write(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    run = Pipe.run

    def note(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        writes.extend(len(command) - 3 for command in commands if command[0] == "XACK")
        return run(pipe, commands, **how)

    bus = make_bus(store.url, "mailer", prefix=store.prefix, concurrency=4)
    bus.on("tick", via="stream")(lambda sender, n: None)
    # However slow this machine is, no receiver counts as a long one.
    monkeypatch.setattr(DeliveryQueue, "room", 1_000)
    bus.start()
    assert bus.ready(10)
    monkeypatch.setattr(consumer, "WRITE_EVERY", 1_000.0)
    monkeypatch.setattr(consumer, "WRITE_SOON", 1_000.0)
    monkeypatch.setattr(Pipe, "run", note)
    store.add_together("tick", *({"n": n} for n in range(60)))

    wait_until(lambda: sum(writes) == 60, what="all events are acknowledged")
    assert len(writes) < 30


def test_an_event_whose_outcome_cannot_be_determined_is_delivered_again(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    judge = outcomes.Outcomes.of

    def stumble_once(*arguments: Any) -> Any:
        if len(tries) == 1:
            raise RuntimeError("a defect")

        return judge(*arguments)

    def fail_once(sender: str, n: int) -> None:
        tries.append(n)

        if len(tries) == 1:
            raise ValueError

    monkeypatch.setattr(outcomes.Outcomes, "of", stumble_once)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=0.5)
    listen(bus, fail_once)
    store.add("tick", n=1)

    wait_until(lambda: tries == [1, 1], what="it comes again")
    wait_until(lambda: not pending(store), what="it is settled")
    assert bus.health().counts["handling_failed"] == 1


def test_an_internal_error_stops_no_receiver_thread(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []
    runs: list[object] = []
    run = consumer.Consumer.run

    def stumble_once(self: consumer.Consumer, deliveries: Any) -> float:
        runs.append(deliveries)

        if len(runs) == 1:
            raise RuntimeError("a defect")

        return run(self, deliveries)

    monkeypatch.setattr(consumer.Consumer, "run", stumble_once)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    listen(bus, lambda sender, n: received.append(n))
    store.add("tick", n=1)
    wait_until(lambda: runs, what="the defect is met")
    store.add("tick", n=2)

    wait_until(lambda: received == [2], what="the next event is handled")
    assert bus.health().counts["handling_failed"] == 1


def test_dead_letters_are_kept_when_streams_are_trimmed_by_age(
    store: StreamStore, make_bus: Make
) -> None:
    def refuse(sender: str, n: int) -> None:
        raise Reject("no")

    bus = make_bus(store.url, "mailer", prefix=store.prefix, maxlen="1h")
    listen(bus, refuse)
    store.add("tick", n=1)
    store.add("tick", n=2)

    wait_until(lambda: bus.health().counts.get("dead_lettered") == 2, what="both are given up")
    assert len(dead_letters(store)) == 2


def test_a_retry_without_a_receiver_for_an_hour_becomes_a_dead_letter(
    store: StreamStore, make_bus: Make
) -> None:
    long_ago = int(time.time() * 1000) - 2 * 3_600_000
    record = RetryRecord(
        entry="1700000000000-0",
        event=Codec().encode(store.event("tick", n=1)),
        receiver="mailer.renamed",
        attempts=1,
        first=long_ago,
        last=long_ago,
        error="ConnectionError: away",
    )
    key = store.keys.retry("tick", "mailer")
    store.client.zadd(key, {record.packed(): 1})
    listen(make_bus(store.url, "mailer", prefix=store.prefix), lambda sender, n: None)

    wait_until(lambda: dead_letters(store), what="it is given up")
    assert [letter.reason for letter in dead_letters(store)] == ["gone"]
    assert not store.client.zcard(key)


def old_retry(store: StreamStore, name: str, *, hours: float, key: str = "mailer.old") -> None:
    """Add a retry of ``mailer`` that failed so long ago and has been due since."""
    failed = int((time.time() - hours * 3_600) * 1_000)
    record = RetryRecord(
        entry="1700000000000-0",
        event=Codec().encode(store.event(name, n=1)),
        receiver=key,
        attempts=1,
        first=failed,
        last=failed,
        error="ConnectionError: away",
    )
    store.client.zadd(store.keys.retry(name, "mailer"), {record.packed(): failed + 1_000})
    store.client.sadd(store.keys.names, name)


@pytest.mark.timing(check_released_every=600.0, max_ahead=10)
def test_retries_beyond_the_free_room_follow_at_once(store: StreamStore, make_bus: Make) -> None:
    # Not found by the next look for what others left.
    handled: list[int] = []

    def receive(sender: str, n: int) -> None:
        handled.append(n)

    now = int(time.time() * 1000)
    for n in range(30):
        record = RetryRecord(
            entry=f"1700000000000-{n}",
            event=Codec().encode(store.event("tick", n=n)),
            receiver=f"{__name__}.{receive.__qualname__}",
            attempts=1,
            first=now,
            last=now,
            error="ConnectionError: away",
        )
        store.client.zadd(store.keys.retry("tick", "mailer"), {record.packed(): now - 1_000 + n})

    listen(make_bus(store.url, "mailer", prefix=store.prefix), receive)

    wait_until(lambda: len(handled) == 30, timeout=30, what="all of them run")
    assert sorted(handled) == list(range(30))


@pytest.mark.timing(resend_after=0.1)
def test_the_log_says_that_refused_outcomes_were_accepted_once_all_of_them_are(
    store: StreamStore,
    make_bus: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # From the end: the first of two is accepted, the second one is refused once more.
    is_refused = [True, False]
    run = Pipe.run

    def refuse(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        if commands[0][0] == "XACK" and is_refused and is_refused.pop():
            return [redis.ResponseError("no") for _ in commands]

        return run(pipe, commands, **how)

    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    listen(bus, lambda sender, n: None)
    writer = bus.node._inbound.consumer._acknowledger
    refused = [Outcome("tick", "1-0", delivery=delivery_of(store)) for _ in range(2)]
    monkeypatch.setattr(acknowledger, "MAX_PER_WRITE", 1)
    monkeypatch.setattr(Pipe, "run", refuse)

    with writer.lock:
        writer._keep_refused(refused, redis.ResponseError("no"))

    wait_until(lambda: not len(writer), what="both are accepted")
    wait_until(lambda: "Redis accepted the outcomes" in caplog.text, what="it is logged")
    assert is_refused == []
    assert caplog.text.count("Redis accepted the outcomes") == 1


@pytest.mark.parametrize("attempts", [[1], [1, 2]], ids=["first", "retry"])
def test_a_slow_answer_of_redis_does_not_make_the_process_read_less_ahead(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch, attempts: list[int]
) -> None:
    tries: list[int] = []
    slow: list[object] = []
    run = Pipe.run

    def answer_slowly(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        words = [command[0] for command in commands]

        # The start of a retry is written before its receiver runs, and the outcome after it.
        if words == ["XACK"] or "ZADD" in words:
            slow.append(commands)
            time.sleep(0.3)

        return run(pipe, commands, **how)

    def receive(sender: str, n: int) -> None:
        tries.append(current_event.attempt)

        if current_event.attempt < attempts[-1]:
            raise ValueError

    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    listen(bus, receive)
    before = bus.node._inbound.pool.queue.room
    monkeypatch.setattr(Pipe, "run", answer_slowly)
    store.add("tick", n=1)

    wait_until(lambda: tries == attempts, what="the receiver has run")
    wait_until(lambda: not bus.health().lag, what="the outcome is written")
    assert len(slow) >= len(attempts)
    assert bus.node._inbound.pool.queue.room >= before


def test_a_delivery_that_was_released_does_not_start(store: StreamStore) -> None:
    in_flight, delivery = InFlight(), delivery_of(store)
    in_flight.add([delivery])

    assert in_flight.release_waiting() == [delivery]
    assert not in_flight.start(delivery, time.monotonic())
    assert not in_flight


def test_a_delivery_that_was_queued_twice_does_not_count_as_stalled(store: StreamStore) -> None:
    # Redis's clock was set forward, so this process leases its own retry again.
    in_flight, deliveries = InFlight(), [delivery_of(store), delivery_of(store)]

    for delivery in deliveries:
        in_flight.add([delivery])

    assert [in_flight.start(delivery, time.monotonic()) for delivery in deliveries] == [True, True]
    in_flight.remove(deliveries)
    assert not in_flight
    assert in_flight.stalled_for == 0.0


class WatchedLock:
    """A lock, and the threads that have asked for it."""

    def __init__(self, lock: AbstractContextManager[bool]) -> None:
        self._lock = lock
        self.asked: set[int] = set()

    def __enter__(self) -> bool:
        self.asked.add(threading.get_ident())
        return self._lock.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)


class AddedNames(set[str]):
    """A set of names that knows which ones were ever added."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[str] = []

    def add(self, name: str) -> None:
        self.added.append(name)
        super().add(name)


def test_the_reader_learns_of_released_entries_only_once_it_can_find_them(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    listen(bus, lambda sender, n: None)
    maintenance = bus.node._inbound.consumer._maintenance
    lock = WatchedLock(maintenance._acknowledger.lock)
    monkeypatch.setattr(maintenance._acknowledger, "lock", lock)
    # The reader removes a name as soon as it finds it.
    names = maintenance._reclaimer.unfinished = AddedNames()
    releasing = threading.Thread(target=maintenance._release, args=[[delivery_of(store)]])

    with lock:
        releasing.start()
        wait_until(lambda: releasing.ident in lock.asked, what="it waits for the lock")
        assert names.added == []

    releasing.join(10)
    assert names.added == ["tick"]


def test_of_two_workers_that_find_a_retry_at_the_same_time_one_runs_it(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    scores: list[float] = []
    attempts_seen: list[int] = []
    run = Pipe.run

    def lease_together(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        if not any("INCR" in command for command in commands):
            return run(pipe, commands, **how)

        with suppress(threading.BrokenBarrierError):
            both.wait(5)

        answers = run(pipe, commands, **how)
        scores.extend(map(float, answers[-1][1::2]))

        with suppress(threading.BrokenBarrierError):
            both.wait(5)

        return answers

    def receive(sender: str, n: int) -> None:
        attempts_seen.append(current_event.attempt)

    buses = [make_bus(store.url, "mailer", prefix=store.prefix) for _ in range(2)]

    for bus in buses:
        listen(bus, receive)

    monkeypatch.setattr(Pipe, "run", lease_together)
    old_retry(store, "tick", hours=0.1, key=f"{__name__}.{receive.__qualname__}")

    wait_until(lambda: attempts_seen and not store.retries("tick"), what="it is handled")
    assert attempts_seen == [2]
    assert len(scores) == 2
    assert [bus.health().counts.get("released", 0) for bus in buses] == [0, 0]


@pytest.mark.timing(check_released_every=0.1)
def test_a_retry_is_run_soon_if_a_worker_without_the_receiver_postpones_it_at_the_same_time(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = store.keys.retry("tick", "mailer")
    postponed: list[bytes] = []
    attempts_seen: list[int] = []
    run = Pipe.run

    def postpone_before(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        if not postponed and any("INCR" in command for command in commands):
            postponed.extend(store.client.zrange(key, 0, -1))
            soon = round(time.time() * 1000) + 200
            store.client.zadd(key, dict.fromkeys(postponed, soon), xx=True)

        return run(pipe, commands, **how)

    def receive(sender: str, n: int) -> None:
        attempts_seen.append(current_event.attempt)

    monkeypatch.setattr(Pipe, "run", postpone_before)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=60)
    listen(bus, receive)
    old_retry(store, "tick", hours=0.1, key=f"{__name__}.{receive.__qualname__}")

    wait_until(lambda: attempts_seen == [2], timeout=20, what="it is run")
    assert postponed


@pytest.mark.parametrize("score", [None, 1.0], ids=["an hour ago", "in 1970"])
def test_a_retry_is_run_soon_if_both_workers_that_lease_it_at_once_are_lost(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch, score: float | None
) -> None:
    both = threading.Barrier(2)
    leased: list[float] = []
    run = Pipe.run

    def lose_the_answer(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        if not any("INCR" in command for command in commands):
            return run(pipe, commands, **how)

        with suppress(threading.BrokenBarrierError):
            both.wait(5)

        answers = run(pipe, commands, **how)

        if len(leased) < 2:
            leased.append(time.time())
            raise redis.ConnectionError("lost")

        return answers

    handled: list[int] = []

    def receive(sender: str, n: int) -> None:
        handled.append(n)

    old_retry(store, "tick", hours=1, key=f"{__name__}.{receive.__qualname__}")
    key = store.keys.retry("tick", "mailer")

    if score is not None:
        store.client.zadd(key, dict.fromkeys(store.client.zrange(key, 0, -1), score))

    monkeypatch.setattr(Pipe, "run", lose_the_answer)

    for _ in range(2):
        listen(make_bus(store.url, "mailer", prefix=store.prefix, claim_after=0.5), receive)

    wait_until(lambda: len(leased) == 2, what="both have added to the score")
    both.abort()
    wait_until(lambda: handled == [1], what="it is run")


@pytest.mark.parametrize("score", ["-inf", "-1e300", "1.5"])
def test_a_retry_with_an_edited_due_time_is_run(
    store: StreamStore, make_bus: Make, score: str
) -> None:
    handled: list[int] = []

    def receive(sender: str, n: int) -> None:
        handled.append(n)

    old_retry(store, "tick", hours=0.1, key=f"{__name__}.{receive.__qualname__}")
    key = store.keys.retry("tick", "mailer")
    store.client.zadd(key, dict.fromkeys(store.client.zrange(key, 0, -1), score))

    listen(make_bus(store.url, "mailer", prefix=store.prefix, claim_after=0.5), receive)

    wait_until(lambda: handled == [1], what="it is run")


@pytest.mark.timing(search_orphans_every=0.1)
@pytest.mark.parametrize("subscribe", [{}, {"paid": {"via": "stream"}}], ids=["no", "no receiver"])
def test_retries_of_an_unsubscribed_signal_become_dead_letters_after_an_hour(
    store: StreamStore, make_bus: Make, subscribe: Any
) -> None:
    old_retry(store, "paid", hours=2)
    old_retry(store, "paid", hours=0.5)
    store.client.zadd(store.keys.retry("paid", "mailer"), {b"no record": 1})
    bus = make_bus(store.url, "mailer", prefix=store.prefix, subscribe=subscribe)
    listen(bus, lambda sender, n: None)

    wait_until(
        lambda: len(store.dead("paid")) == 2, what="the old one and the bad one are given up"
    )
    found = store.client.xrange(store.keys.dead("paid", "mailer"))
    letters = [DeadLetter.from_fields(fields) for _, fields in found]
    assert {(letter.reason, letter.receiver) for letter in letters} == {
        ("gone", "mailer.old"),
        ("undecodable", ""),
    }
    [(kept, _)] = store.retries("paid")
    assert time.time() - kept.last / 1_000 < 3_600


@pytest.mark.timing(search_orphans_every=0.1)
def test_the_log_names_the_right_to_list_streams_that_old_retries_need(
    redis_server: RedisServer,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = StreamStore(redis_server)
    owner = store.client
    rights = ("on", ">pw", "+@all", "-smembers", f"~{store.prefix}:{{*", "allchannels")
    owner.execute_command("ACL", "SETUSER", "mailer", *rights)
    old_retry(store, "paid", hours=2)
    url = store.url.replace("//", "//mailer:pw@")
    bus = make_bus(url, "mailer", prefix=store.prefix)
    listen(bus, lambda sender, n: None)
    wait_until(lambda: "does not let 'mailer' list the streams" in caplog.text)
    [grant] = re.findall(r"Grant its user \((\+\w+ ~\S+)\) in the ACL", caplog.text)
    assert store.dead("paid") == []

    owner.execute_command("ACL", "SETUSER", "mailer", *grant.split())

    wait_until(lambda: len(store.dead("paid")) == 1, what="the retry is given up")


@pytest.mark.timing(search_orphans_every=0.1)
def test_retries_that_another_process_of_the_service_receives_are_left_to_it(
    store: StreamStore, make_bus: Make
) -> None:
    tried: list[int] = []

    def handle(sender: str, n: int) -> None:
        tried.append(n)

    listen(make_bus(store.url, "mailer", prefix=store.prefix), lambda sender, n: None)
    other = make_bus(store.url, "mailer", prefix=store.prefix)
    other.on("paid", via="stream")(handle)
    other.start()
    assert other.ready(10)
    old_retry(store, "paid", hours=0.9, key=f"{__name__}.{handle.__qualname__}")

    wait_until(lambda: tried == [1], what="it is tried by the process that has the receiver")
    assert store.dead("paid") == []


# -- what is in hand ----------------------------------------------------------------------


def test_events_queued_longer_than_the_claim_time_are_handled_by_their_worker(
    store: StreamStore, make_bus: Make
) -> None:
    tried: list[int] = []

    def take_time(sender: str, n: int) -> None:
        time.sleep(0.4)
        tried.append(current_event.attempt)

    for n in range(5):
        store.add("tick", n=n)

    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=0.5, concurrency=1)
    listen(bus, take_time)

    wait_until(lambda: len(tried) == 5, what="all are handled")
    assert tried == [1, 1, 1, 1, 1]
    assert "released" not in bus.health().counts


@pytest.mark.timing(idle_consumer_after=0.2)
def test_only_consumers_without_pending_entries_are_removed(
    store: StreamStore, make_bus: Make
) -> None:
    stream = store.keys.stream("tick")
    store.group("tick")
    store.client.xgroup_createconsumer(stream, "mailer", "host-1-empty")

    for n in range(3):
        store.add("tick", n=n)

    store.client.xreadgroup("mailer", "host-2-dead", {stream: ">"}, count=3)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=60)
    listen(bus, lambda sender, n: None)

    def consumers() -> dict[bytes, int]:
        found: Any = store.client.xinfo_consumers(stream, "mailer")
        return {each["name"]: each["pending"] for each in found}

    wait_until(lambda: b"host-1-empty" not in consumers(), what="the empty one is removed")
    assert consumers()[b"host-2-dead"] == 3


@pytest.mark.timing(idle_consumer_after=2.0)
def test_workers_that_wait_for_events_are_not_removed(store: StreamStore, make_bus: Make) -> None:
    stream = store.keys.stream("tick")

    for _ in range(3):
        bus = make_bus(store.url, "mailer", prefix=store.prefix)
        listen(bus, lambda sender, n: None)

    def consumers() -> set[bytes]:
        return {found["name"] for found in store.client.xinfo_consumers(stream, "mailer")}

    workers = consumers()
    assert len(workers) == 3

    for gone in (b"host-1-empty", b"host-2-empty"):
        store.client.xgroup_createconsumer(stream, "mailer", gone)
        wait_until(lambda gone=gone: gone not in consumers(), what="the idle one is removed")  # type: ignore[misc]

    assert consumers() == workers


@pytest.mark.timing(idle_consumer_after=0.2)
def test_an_entry_delivered_to_a_consumer_during_its_removal_is_handled(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []
    late = "host-1-late"
    look = Group.report_alive

    def look_too_early(group: Group, names: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = look(group, names)

        if any(consumer == late and idle > 0.2 for consumer, _, idle in found["tick"]):
            # The worker that was silent reads, after the look and before the removal.
            store.client.xadd(store.keys.stream("tick"), {"event": body})
            read.extend(store.read("tick", 1, consumer=late))

        return found

    def read_nothing(group: Group, names: Sequence[str], *, count: int, block: float) -> list[Any]:
        time.sleep(0.05)
        return []

    body = Codec().encode(store.event("tick", n=1))
    read: list[str] = []
    store.group("tick")
    store.client.xgroup_createconsumer(store.keys.stream("tick"), "mailer", late)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=60)
    # It reads nothing by itself: what it hears, it takes over.
    monkeypatch.setattr(Group, "read", read_nothing)
    monkeypatch.setattr(Group, "report_alive", look_too_early)
    listen(bus, lambda sender, n: received.append(n))

    wait_until(lambda: read, what="the entry is given to the consumer")
    wait_until(lambda: received == [1] * len(read), what="a worker handles it")
    wait_until(lambda: not pending(store), what="it is acknowledged")


def test_an_event_published_while_a_stream_is_deleted_is_received(
    store: StreamStore, make_bus: Make
) -> None:
    stream = store.keys.stream("tick")
    received: list[int] = []
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    bus.on("tick", via="stream", start="new")(lambda sender, n: received.append(n))
    bus.start()
    assert bus.ready(10)
    store.add("tick", n=1)
    wait_until(lambda: received == [1], what="the first is received")

    with store.client.pipeline(transaction=True) as both:
        both.delete(stream)
        both.xadd(stream, {b"event": Codec().encode(store.event("tick", n=2))})
        both.execute()

    wait_until(lambda: received == [1, 2], what="what came right after the end is received")


def test_a_worker_of_many_streams_reads_no_further_ahead_than_a_worker_of_one(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    send = Pipe.send

    def note(pipe: Pipe, command: Command) -> None:
        reads.append((int(command[command.index("COUNT") + 1]), command.count(">")))
        send(pipe, command)

    monkeypatch.setattr(Pipe, "send", note)
    received: list[int] = []
    bus = make_bus(store.url, "mailer", prefix=store.prefix)

    for number in range(60):
        store.add(f"tick_{number}", n=number)
        name = f"tick_{number}"
        bus.on(name, via="stream", start="earliest")(lambda sender, n: received.append(n))

    bus.start()
    assert bus.ready(10)
    wait_until(lambda: len(received) == 60, what="all are received")

    first, streams = next(read for read in reads if read[1] == 60)
    assert first * streams <= TIMING.max_ahead


def test_a_delivery_whose_start_cannot_be_recorded_starts_later(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []
    refused: list[object] = []
    record_start = Group.record_start

    def refuse_once(group: Group, name: str, id: str, *, times: int) -> bool:
        if not refused:
            refused.append(id)
            raise redis.ResponseError("NOREPLICAS Not enough good replicas to write.")

        return record_start(group, name, id, times=times)

    monkeypatch.setattr(Group, "record_start", refuse_once)
    store.add("tick", n=1)
    store.group("tick")
    store.client.xreadgroup("mailer", "host-2-dead", {store.keys.stream("tick"): ">"})
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=0.5)
    listen(bus, lambda sender, n: received.append(n))

    wait_until(lambda: received == [1], what="it is handled")
    assert refused


def test_an_event_becomes_a_dead_letter_in_only_one_of_two_workers(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = store.keys.retry("tick", "mailer")
    store.client.zadd(key, {b"edited by hand": 1})
    # The outcome is not written.
    monkeypatch.setattr(acknowledger.Acknowledger, "write", lambda *_: None)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=60)
    listen(bus, lambda sender, n: None)

    def is_kept() -> bool:
        score: Any = store.client.zscore(key, b"edited by hand")
        return bool(score > time.time() * 1000)

    wait_until(is_kept, what="it is this worker's")


@pytest.mark.parametrize("lost", ["XTRIM", "INCRBY"])
def test_dead_letters_are_trimmed_and_counted_after_an_outage_in_the_middle(
    store: StreamStore, make_bus: Make, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    for _ in range(250):
        store.give_up("tick")

    bus = make_bus(store.url, "mailer", prefix=store.prefix, dead_maxlen=100)
    pipe = Pipe(bus.node.connections, timeout=5)
    run, outages = pipe.run, [redis.ConnectionError("away")]

    def run_or_fail(commands: Sequence[Command], **how: Any) -> list[Any]:
        if outages and commands[0][0] == lost:
            raise outages.pop()

        return run(commands, **how)

    monkeypatch.setattr(pipe, "run", run_or_fail)
    limit = DeadLimit(pipe, bus.node.context, lock=nullcontext())
    limit.grown.add("tick")
    limit.enforce()
    limit.enforce()
    pipe.close()

    assert outages == []
    left = len(store.dead("tick"))
    assert left < 250
    assert int(store.client.get(store.keys.dead_dropped("tick", "mailer"))) == 250 - left
