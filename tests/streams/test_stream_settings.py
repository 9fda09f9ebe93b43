"""Tests of the settings of stream subscriptions, of their errors, and of missing rights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, ConfigError, Reject, Retry, current_event
from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.records import DeadLetter

pytestmark = [
    pytest.mark.second_look("lets short claims and windows expire"),
    pytest.mark.timing(
        first_retry=0.02, check_released_every=0.2, ask_stream_again_after=0.2, resend_after=0.2
    ),
]

Make = Callable[..., Bus]


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams under a prefix of this test's own."""
    return StreamStore(shared_redis)


def listen(bus: Bus, name: str = "tick", **options: Any) -> list[Any]:
    """Hear a signal, and return the list that its numbers go to."""
    received: list[Any] = []

    @bus.on(name, **options)
    def receive(sender: str, n: Any) -> None:
        received.append(n)

    bus.start()
    assert bus.ready(10)
    return received


def failing(bus: Bus, **options: Any) -> list[int]:
    """Connect a receiver that always fails, and return the attempts that it makes."""
    attempts: list[int] = []

    @bus.on("tick", via="stream", **options)
    def fail(sender: str, n: int) -> None:
        attempts.append(current_event.attempt)
        raise ValueError("not now")

    bus.start()
    assert bus.ready(10)
    return attempts


def dead_letters(store: StreamStore) -> list[DeadLetter]:
    """The dead letters of ``tick``, as they read."""
    key = store.keys.dead("tick", "mailer")
    return [DeadLetter.from_fields(fields) for _, fields in store.client.xrange(key)]


# -- retries ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "options", "attempts"),
    [
        ({"retries": 2}, {}, 3),
        ({"retries": 0}, {}, 1),
        ({"retries": 4}, {"retries": 1}, 2),
        ({"retries": 4, "subscribe": {"tick": {"via": "stream", "retries": 2}}}, {"retries": 1}, 3),
        ({"retries": 4, "subscribe": {"tick": {"via": "stream", "retries": 0}}}, {"retries": 1}, 1),
    ],
    ids=["the setting", "none", "the receiver", "the subscription", "none by subscription"],
)
def test_a_receiver_is_retried_as_often_as_configured(
    store: StreamStore,
    make_bus: Make,
    settings: dict[str, Any],
    options: dict[str, Any],
    attempts: int,
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix, **settings)
    made = failing(bus, **options)
    store.add("tick", n=1)

    wait_until(lambda: dead_letters(store), what="it is given up")
    [letter] = dead_letters(store)
    assert made == list(range(1, attempts + 1))
    assert (letter.attempts, letter.reason) == (attempts, "retries")


@pytest.mark.parametrize("value", [-1, 10_001, 1.5, "many", True, None])
def test_retries_must_be_a_number(value: Any) -> None:
    wrong = "Set it to a whole number from 0 to 10,000."

    if value is not None:
        with pytest.raises(ConfigError, match=f"'EVENTBUS_RETRIES' is {value!r}. {wrong}"):
            Bus("memory://", service="mailer", retries=value)

        with pytest.raises(ConfigError, match=wrong):
            Bus("memory://", service="mailer").on("tick", retries=value)

    # None means: as the setting says.
    Bus("memory://", service="mailer", subscribe={"tick": {"retries": None}})


@pytest.mark.parametrize("after", [float("inf"), float("nan"), -1, "soon", timedelta(minutes=5)])
def test_a_retry_with_an_invalid_delay_is_an_error_of_the_receiver(
    store: StreamStore, make_bus: Make, after: Any
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix, retries=1)

    @bus.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        raise Retry("later", after=after)

    bus.start()
    assert bus.ready(10)
    store.add("tick", n=1)

    wait_until(lambda: dead_letters(store), what="it is given up")
    [letter] = dead_letters(store)
    assert letter.attempts == 2
    assert f"Retry has 'after' {after!r}" in letter.error
    assert "Set it to a number of seconds from 0" in letter.error


# -- from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in code", "in settings"])
def test_a_stream_is_received_only_from_the_named_services(
    store: StreamStore, make_bus: Make, how: str
) -> None:
    subscribe = {"tick": {"from": ["accounts", "billing"], "via": "stream"}}
    settings = {"subscribe": subscribe} if how == "in settings" else {}
    bus = make_bus(store.url, "mailer", prefix=store.prefix, **settings)
    received = listen(
        bus, from_=["accounts", "billing"] if how == "in code" else None, via="stream"
    )
    for number, source in enumerate(["accounts", "intruder", "billing", "accounts2"]):
        store.add("tick", source=source, n=number)
    store.add("tick", n=9)

    wait_until(lambda: 9 in received, what="the last event arrives")
    assert received == [0, 2, 9]
    wait_until(lambda: not store.client.xpending(store.keys.stream("tick"), "mailer")["pending"])


# -- echo ---------------------------------------------------------------------------------


def test_a_service_does_not_receive_its_own_stream_events(
    store: StreamStore, make_bus: Make
) -> None:
    settings = {"prefix": store.prefix, "publish": {"tick": "stream"}}
    first = make_bus(store.url, "mailer", **settings)
    second = make_bus(store.url, "mailer", **settings)
    received = [listen(bus, via="stream") for bus in (first, second)]
    first.signal("tick").send("test", n=1)
    store.add("tick", n=2)

    wait_until(lambda: sum(map(len, received)) == 2, what="both are handled")
    # At send(), the local receiver had it.
    assert received[0][0] == 1
    assert sorted(received[0] + received[1]) == [1, 2]
    counts = [bus.health().counts.get("echoes", 0) for bus in (first, second)]
    assert sum(counts) == 1


def test_with_echo_one_worker_receives_events_of_its_service(
    store: StreamStore, make_bus: Make
) -> None:
    settings = {"prefix": store.prefix, "publish": {"tick": "stream"}}
    buses = [make_bus(store.url, "mailer", **settings) for _ in range(2)]
    received = [listen(bus, via="stream", echo=True) for bus in buses]
    buses[0].signal("tick").send("test", n=1)

    # Once at send(), and once over the stream.
    wait_until(lambda: sum(map(len, received)) == 2, what="it comes back")
    wait_until(lambda: not store.client.xpending(store.keys.stream("tick"), "mailer")["pending"])
    assert [len(found) for found in received] in ([2, 0], [1, 1])


@pytest.mark.parametrize("value", ["yes", 1, 0, []])
def test_echo_must_be_true_or_false(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"\['echo'\] is .*Set it to True or False."):
        Bus("memory://", service="mailer", subscribe={"tick": {"echo": value}})


# -- start --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("new", []),
        (None, []),
        ("earliest", [1, 2, 3]),
        ("2000-0", [3]),
        ("2000", [2, 3]),
        ("1999-5", [2, 3]),
        (datetime(1970, 1, 1, 0, 0, 2, tzinfo=UTC), [2, 3]),
        (datetime(1970, 1, 1, 0, 0, 1, 999_500, tzinfo=UTC), [2, 3]),
        (datetime(1960, 1, 1, tzinfo=UTC), [1, 2, 3]),
    ],
    ids=[
        "new",
        "nothing",
        "earliest",
        "an id",
        "a millisecond",
        "between",
        "a time",
        "a fraction",
        "before 1970",
    ],
)
def test_a_new_group_begins_at_its_start_option(
    store: StreamStore, make_bus: Make, start: Any, expected: list[int]
) -> None:
    for number in (1, 2, 3):
        store.add("tick", id=f"{number * 1000}-0", n=number)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    received = listen(bus, via="stream", start=start)
    store.add("tick", n=4)

    wait_until(lambda: 4 in received, what="the next event arrives")
    assert received == [*expected, 4]


@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
@pytest.mark.parametrize("start", ["2000", datetime(1970, 1, 1, 0, 0, 2, tzinfo=UTC)])
def test_a_start_time_includes_all_entries_of_its_millisecond(
    store: StreamStore, make_bus: Make, start: Any, group: Literal[True] | None
) -> None:
    for number, id in enumerate(["1999-7", "2000-0", "2000-1", "2001-0"]):
        store.add("tick", id=id, n=number)

    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    received = listen(bus, via="stream", start=start, group=group)

    wait_until(lambda: 3 in received, what="the last entry arrives")
    assert received == [1, 2, 3]


@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
def test_a_pattern_receives_entries_of_the_millisecond_of_its_subscription(
    store: StreamStore, make_bus: Make, group: Literal[True] | None
) -> None:
    since = int(time.time() * 1000) - 60_000
    store.client.hset(store.keys.since("mailer"), "ti*", since)
    for number, id in enumerate([f"{since - 1}-5", f"{since}-0", f"{since}-1"]):
        store.add("tick", id=id, n=number)

    received = listen(make_bus(store.url, "mailer", prefix=store.prefix), "ti*", group=group)

    wait_until(lambda: 2 in received, what="the last entry arrives")
    assert received == [1, 2]


def test_without_a_group_start_applies_to_every_process(store: StreamStore, make_bus: Make) -> None:
    store.add("tick", n=1)

    for _ in range(2):
        bus = make_bus(store.url, "mailer", prefix=store.prefix)
        received = listen(bus, via="stream", group=None, start="earliest")
        wait_until(lambda found=received: found == [1], what="the past is received")  # type: ignore[misc]


@pytest.mark.parametrize(
    "start",
    ["now", "", "0-", "-1", "1-2-3", 7, datetime(2026, 1, 1), "99999999999999999999-0", b"0"],
)
def test_an_invalid_start_is_refused(start: Any) -> None:
    with pytest.raises(ConfigError, match="Set it to 'new', 'earliest', the id of an entry"):
        Bus("memory://", service="mailer").on("tick", start=start)


# -- group --------------------------------------------------------------------------------


def test_without_a_group_every_process_gets_every_event_and_nothing_is_stored(
    store: StreamStore, make_bus: Make
) -> None:
    buses = [make_bus(store.url, "mailer", prefix=store.prefix) for _ in range(3)]
    received = [listen(bus, via="stream", group=None) for bus in buses]
    for number in range(20):
        store.add("tick", n=number)

    wait_until(lambda: received == [list(range(20))] * 3, what="all hear all")
    assert store.client.xinfo_groups(store.keys.stream("tick")) == []


def test_a_failed_receiver_without_a_group_is_counted_and_not_retried(
    store: StreamStore, make_bus: Make
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    attempts = failing(bus, group=None)
    store.add("tick", n=1)
    store.add("tick", n=2)

    wait_until(lambda: attempts == [1, 1], what="both are tried")
    assert bus.health().counts["failed"] == 2
    assert store.retries("tick") == []
    assert dead_letters(store) == []


def test_a_process_without_a_group_misses_nothing_while_redis_refuses_the_stream(
    store: StreamStore, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    stream = store.keys.stream("tick")
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    received = listen(bus, via="stream", group=None)
    store.add("tick", n=1)
    wait_until(lambda: received == [1], what="the first is received")

    store.client.rename(stream, "elsewhere")
    store.client.set(stream, "a string")
    wait_until(lambda: "Redis refuses to let 'mailer' read" in caplog.text, what="it is reported")
    store.client.xadd("elsewhere", {b"event": Codec().encode(store.event("tick", n=2))})

    with store.client.pipeline(transaction=True) as both:
        both.delete(stream)
        both.rename("elsewhere", stream)
        both.execute()

    wait_until(lambda: received == [1, 2], what="what was sent meanwhile is received")


def test_entries_that_are_no_events_stop_no_process_without_a_group(
    store: StreamStore, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    received = listen(bus, via="stream", group=None)
    store.add_fields("tick", {b"event": b"\xc1"})
    store.add_fields("tick", {b"\xff": b"\xff"})
    store.add("tick", n=1)

    wait_until(lambda: received == [1], what="the event arrives")
    assert bus.health().counts["rejected"] == 2
    assert "is rejected (missing_attribute)" in caplog.text


def test_receivers_with_and_without_a_group_do_not_mix() -> None:
    bus = Bus("memory://", service="mailer")
    bus.on("tick", group=None)(lambda sender: None)

    with pytest.raises(ConfigError, match="one receiver has 'group': None and another has not"):
        bus.on("tick")(lambda sender: None)


@pytest.mark.parametrize("group", ["others", False, 0, ""])
def test_a_group_of_another_name_is_refused(group: Any) -> None:
    with pytest.raises(ConfigError, match=r"\['group'\] is .*The group is the service, so leave"):
        Bus("memory://", service="mailer").on("tick", group=group)


# -- via ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("via", "expected"), [(None, {1, 2}), ("channel", {1}), ("stream", {2})], ids=str
)
def test_a_signal_is_received_over_the_requested_transports(
    store: StreamStore, make_bus: Make, via: str | None, expected: set[int]
) -> None:
    received = listen(make_bus(store.url, "mailer", prefix=store.prefix), via=via)
    others = [
        make_bus(store.url, "clock", prefix=store.prefix, publish={"tick": way})
        for way in ("channel", "stream")
    ]
    marks = listen(make_bus(store.url, "witness", prefix=store.prefix))
    for number, other in enumerate(others, start=1):
        other.signal("tick").send("test", n=number)
        assert other.flush(5)

    wait_until(lambda: set(marks) == {1, 2}, what="who hears both hears both")
    wait_until(lambda: set(received) == expected, what="what was asked for is received")
    exists = store.client.exists(store.keys.stream("tick"))
    groups = store.client.xinfo_groups(store.keys.stream("tick")) if exists else []
    names = {group["name"] for group in groups}
    assert (b"mailer" in names) == (via != "channel")


# -- claim_after --------------------------------------------------------------------------


def test_entries_of_a_silent_worker_are_reclaimed_after_the_claim_time_and_not_before(
    store: StreamStore, make_bus: Make
) -> None:
    store.group("tick")
    store.add("tick", n=1)
    began = time.monotonic()
    store.read("tick", 1, consumer="dead")
    received = listen(make_bus(store.url, "mailer", prefix=store.prefix, claim_after=1.5))

    wait_until(lambda: received == [1], what="it is taken over")
    # A claim time, and half of one until a look; the rest is this machine's.
    assert 1.4 < time.monotonic() - began < 1.5 * 1.5 + 5


@pytest.mark.parametrize("value", [0, -1, "soon", 90_000, True, float("nan")])
def test_an_invalid_claim_time_is_refused(value: Any) -> None:
    words = f"'EVENTBUS_CLAIM_AFTER' is {value!r}. Set it to a number of seconds from 0.1 to 86,400"

    with pytest.raises(ConfigError, match=words):
        Bus("memory://", service="mailer", claim_after=value)


# -- duplicate_window ---------------------------------------------------------------------


@pytest.mark.parametrize(("window", "expected"), [(600, [1, 2]), (0, [1, 1, 2])])
def test_a_duplicate_event_is_recognized_within_the_window(
    store: StreamStore, make_bus: Make, window: float, expected: list[int]
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix, duplicate_window=window)
    received = listen(bus, via="stream")
    body = Codec().encode(store.event("tick", n=1))
    store.add_fields("tick", {b"event": body})
    store.add_fields("tick", {b"event": body})
    store.add("tick", n=2)

    wait_until(lambda: 2 in received, what="the last event arrives")
    assert received == expected
    seen = list(store.client.scan_iter(match=f"{store.prefix}:*:seen:*"))
    assert len(seen) == bool(window)
    assert all(0 < store.client.ttl(key) <= 2 * window for key in seen)


def test_copies_delivered_to_two_workers_are_handled_once(
    store: StreamStore, make_bus: Make
) -> None:
    buses = [make_bus(store.url, "mailer", prefix=store.prefix) for _ in range(2)]
    received = [listen(bus, via="stream") for bus in buses]

    for number in range(100):
        body = Codec().encode(store.event("tick", n=number))
        store.add_fields("tick", {b"event": body})
        store.add_fields("tick", {b"event": body})

    wait_until(lambda: sum(map(len, received)) >= 100, what="all are handled")
    wait_until(lambda: not store.client.xpending(store.keys.stream("tick"), "mailer")["pending"])
    assert sorted(received[0] + received[1]) == list(range(100))


def test_each_service_recognizes_duplicates_separately(store: StreamStore, make_bus: Make) -> None:
    received = [listen(make_bus(store.url, name, prefix=store.prefix)) for name in ("one", "two")]
    store.add("tick", n=1)

    wait_until(lambda: received == [[1], [1]], what="both services handle it")


# -- what a user may not ------------------------------------------------------------------


class Guard:
    """A user of the server, with rights that can be changed."""

    def __init__(self, store: StreamStore) -> None:
        self._store = store
        self.name = f"user-{store.prefix}"
        self.url = store.url.replace("://", f"://{self.name}:secret@")
        self.allow("reset", "on", ">secret", "allkeys", "allchannels", "+@all")

    def allow(self, *rules: str) -> None:
        """Change what it may."""
        self._store.client.execute_command("ACL", "SETUSER", self.name, *rules)

    def end(self) -> None:
        """Take it away."""
        self._store.client.execute_command("ACL", "DELUSER", self.name)


@pytest.fixture
def guard(store: StreamStore) -> Iterator[Guard]:
    """A user who may everything, to begin with."""
    guard = Guard(store)
    yield guard
    guard.end()


@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
def test_a_forbidden_stream_is_logged_with_the_remedy_and_read_once_granted(
    store: StreamStore,
    guard: Guard,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
    group: Literal[True] | None,
) -> None:
    open_key, closed_key = store.keys.stream("tick"), store.keys.stream("tock")
    guard.allow("resetkeys", f"~{open_key}", f"~{store.prefix}:streams")
    guard.allow(*(f"~{store.prefix}:{{{name}}}:[srd]e[ea][ntd]*" for name in ("tick", "tock")))
    bus = make_bus(guard.url, "mailer", prefix=store.prefix)
    received: list[str] = []
    for name in ("tick", "tock"):
        bus.on(name, via="stream", group=group)(lambda sender, n: received.append(n))
    bus.start()

    wait_until(lambda: bus.health().refused, what="it is refused")
    assert not bus.ready(0)
    store.add("tick", n="open")
    wait_until(lambda: received == ["open"], what="the other stream is read")
    health = bus.health()
    assert set(health.refused) == {"tock"}
    assert "no permissions" in health.refused["tock"].lower()
    assert not health.connected
    assert f"~{closed_key}) in the ACL." in caplog.text
    assert "Grant its user (+x" in caplog.text

    guard.allow(f"~{closed_key}")
    wait_until(lambda: bus.health().connected, what="it is read")
    store.add("tock", n="granted")
    wait_until(lambda: received == ["open", "granted"], what="it is received")
    assert bus.health().refused == {}
    assert "Traceback" not in caplog.text


@pytest.mark.timing(resend_after=0.05)
def test_a_dead_letter_is_written_once_if_redis_refuses_transactions(
    store: StreamStore, guard: Guard, make_bus: Make
) -> None:
    guard.allow("-multi")
    bus = make_bus(guard.url, "mailer", prefix=store.prefix)

    @bus.on("tick", via="stream", start="earliest")
    def reject(sender: str, n: int) -> None:
        raise Reject

    store.add("tick", n=1)
    bus.start()

    wait_until(lambda: bus.health().counts.get("dead_lettered"), what="it is a dead letter")
    assert len(store.dead("tick")) == 1
    assert bus.health().counts.get("outcomes_refused", 0) == 0


@pytest.mark.parametrize("command", ["xreadgroup", "xgroup|create"])
def test_a_missing_required_command_is_logged(
    store: StreamStore,
    guard: Guard,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
    command: str,
) -> None:
    guard.allow(f"-{command}")
    bus = make_bus(guard.url, "mailer", prefix=store.prefix)
    received: list[int] = []
    bus.on("tick", via="stream", start="earliest")(lambda sender, n: received.append(n))
    store.add("tick", n=1)
    bus.start()
    wait_until(lambda: bus.health().refused, what="it is refused")
    assert not bus.ready(0)

    assert command.partition("|")[0] in bus.health().refused["tick"]
    wait_until(lambda: f"+{command}" in caplog.text, what="it is logged")
    assert "Traceback" not in caplog.text
    guard.allow(f"+{command}")
    wait_until(lambda: received == [1], what="it is read once it may be")


@pytest.fixture(params=["acl", "rename-command"])
def lacking(
    request: pytest.FixtureRequest, store: StreamStore, guard: Guard, tmp_path: Path
) -> Iterator[Callable[[str], StreamStore]]:
    """Make a Redis that lacks a command: a user may not run it, or it is renamed.

    Returned is a store whose URL lacks it and whose client has it, unless it is renamed.
    """
    servers: list[RedisServer] = []

    def make(command: str) -> StreamStore:
        if request.param == "acl":
            guard.allow(f"-{command}")
            store.url = guard.url
            return store

        servers.append(RedisServer(tmp_path, "--rename-command", command, ""))
        servers[0].start()
        return StreamStore(servers[0])

    yield make

    for server in servers:
        server.kill()


def refusals(store: StreamStore) -> int:
    """Count what the server has refused, to anybody."""
    found = store.client.info("errorstats")
    kinds = (found.get(f"errorstat_{kind}", {}) for kind in ("NOPERM", "ERR"))
    return sum(int(kind.get("count", 0)) for kind in kinds)


def lines_of(caplog: pytest.LogCaptureFixture, command: str) -> list[str]:
    """The lines of the log that name a command, and are no information."""
    lines = [found.getMessage() for found in caplog.records if found.levelname != "INFO"]
    return [line for line in lines if command in line.partition("Grant")[0].lower()]


@pytest.mark.timing(
    check_trimmed_every=0.05,
    ask_command_again_after=0.05,
    check_flushed_every=0.05,
    idle_consumer_after=1.0,
)
@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
@pytest.mark.parametrize("command", ["xinfo", "xpending", "client", "time"])
def test_a_worker_works_without_an_optional_command_and_logs_one_line(
    lacking: Callable[[str], StreamStore],
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
    command: str,
    group: Literal[True] | None,
) -> None:
    store = lacking(command)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=0.5)
    received: list[int] = []

    @bus.on("tick", via="stream", start="earliest", group=group)
    def receive(sender: str, n: int) -> None:
        if n == 2 and group and current_event.attempt == 1:
            raise Retry(after=0.01)

        if n == 3 and group:
            raise Reject

        received.append(n)

    for n in range(4):
        store.add("tick", n=n)
    bus.start()
    assert bus.ready(10)
    wait_until(
        lambda: {*received} >= ({0, 1, 2} if group else {0, 1, 2, 3}), what="all are handled"
    )
    before = refusals(store)
    is_asked_again = command not in ("client", "time") and (group or command == "xinfo")
    # A process without a group asks once a second, as often as it reads.
    times = 12 if group else 3
    if is_asked_again:
        wait_until(lambda: refusals(store) >= before + times, what="it is refused again and again")
    store.add("tick", n=4)
    wait_until(lambda: 4 in received, what="it reads on")
    bus.stop()

    assert sorted(received) == ([0, 1, 2, 4] if group else [0, 1, 2, 3, 4])
    lines = lines_of(caplog, command)
    # Of a group both its place and its consumers are asked for.
    expected = {"xinfo": 2 if group else 1, "client": 1}.get(command, int(bool(group)))
    assert len(lines) == len({*lines}) == expected, lines
    assert [found for found in caplog.records if found.levelname == "ERROR"] == []
    if group:
        assert not dead_letters(store)[1:]
        assert store.retries("tick") == []


@pytest.mark.timing(granted_after=0.5)
def test_a_partly_missing_right_is_logged_once_and_so_is_its_return(
    store: StreamStore,
    guard: Guard,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard.allow("-zrangebyscore")
    bus = make_bus(guard.url, "mailer", prefix=store.prefix, claim_after=0.5)
    attempts = failing(bus, retries=1)
    store.add("tick", n=1)
    before = refusals(store)
    wait_until(lambda: refusals(store) >= before + 12, what="it is refused again and again")
    assert attempts == [1]

    [line] = lines_of(caplog, "zrangebyscore")
    assert "+zrangebyscore" in line
    assert "maintain the stream of 'tick' again" not in caplog.text

    guard.allow("+zrangebyscore")
    wait_until(lambda: dead_letters(store), what="it is tried again and given up")
    wait_until(lambda: "maintain the stream of 'tick' again" in caplog.text, what="the end")
    assert caplog.text.count("maintain the stream of 'tick'") == 2


def test_the_rights_logged_for_a_missing_xpending_are_sufficient(
    store: StreamStore, guard: Guard, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store.group("tick")
    store.add("tick", n=1)
    store.read("tick", 1, consumer="dead")
    guard.allow("-xpending")
    bus = make_bus(guard.url, "mailer", prefix=store.prefix, claim_after=0.5)
    received = listen(bus, via="stream")
    store.add("tick", n=2)
    wait_until(lambda: received == [2], what="it reads on")

    [line] = lines_of(caplog, "xpending")
    right = f"(+xpending ~{store.keys.stream('tick')})"
    assert f"Grant its user {right} in the ACL." in line
    guard.allow(right)

    wait_until(lambda: received == [2, 1], what="what a worker left is taken over")
    wait_until(
        lambda: "lets 'mailer' list the pending events of 'tick' again" in caplog.text,
        what="the end is reported",
    )


def test_an_idle_worker_notices_that_it_may_list_pending_events_again(
    store: StreamStore, guard: Guard, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    listen(make_bus(guard.url, "mailer", prefix=store.prefix, claim_after=1), via="stream")
    guard.allow("-xpending")
    wait_until(lambda: lines_of(caplog, "xpending"), what="the refusal is reported")

    guard.allow("+xpending")

    wait_until(
        lambda: "lets 'mailer' list the pending events of 'tick' again" in caplog.text,
        what="the end is reported",
    )


def test_a_slow_event_of_a_worker_without_xpending_is_not_reclaimed(
    store: StreamStore, guard: Guard, make_bus: Make
) -> None:
    guard.allow("-xpending")
    blind = make_bus(guard.url, "mailer", prefix=store.prefix, claim_after=1)
    done, runs = threading.Event(), []

    @blind.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        runs.append("blind")
        done.wait(30)

    blind.start()
    assert blind.ready(10)
    store.add("tick", n=1)
    wait_until(lambda: runs, what="it runs")
    other = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=1)
    other.on("tick", via="stream")(lambda sender, n: runs.append("other"))
    other.start()
    assert other.ready(10)

    # A lease of one second is long over by then.
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() > begin + 3.5, what="the lease ended several times")
    done.set()
    wait_until(
        lambda: not store.client.xpending(store.keys.stream("tick"), "mailer")["pending"],
        what="it is acknowledged",
    )
    assert runs == ["blind"]


@pytest.mark.timing(pause_reading_after=0.1, release_after=0.3)
def test_a_worker_without_xpending_keeps_the_events_behind_a_slow_receiver(
    store: StreamStore, guard: Guard, make_bus: Make
) -> None:
    guard.allow("-xpending")
    bus = make_bus(guard.url, "mailer", prefix=store.prefix)
    done, received = threading.Event(), []

    @bus.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        done.wait(30)
        received.append(n)

    bus.start()
    assert bus.ready(10)
    for n in range(5):
        store.add("tick", n=n)
    key = store.keys.stream("tick")
    wait_until(lambda: store.client.xpending(key, "mailer")["pending"] == 5, what="all are read")
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() > begin + 1, what="it stands still for too long")
    done.set()

    wait_until(lambda: sorted(received) == [0, 1, 2, 3, 4], what="all are handled here")


@pytest.mark.parametrize("command", ["xack", "xclaim", "xrange", "xinfo", "zadd", "zrangebyscore"])
def test_a_missing_maintenance_command_is_logged_and_no_event_is_lost(
    store: StreamStore,
    guard: Guard,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
    command: str,
) -> None:
    store.group("tick")
    store.add("tick", n=1)
    store.read("tick", 1, consumer="dead")
    guard.allow(f"-{command}")
    bus = make_bus(guard.url, "mailer", prefix=store.prefix, claim_after=0.5)
    received: list[int] = []

    @bus.on("tick", via="stream")
    def receive(sender: str, n: int) -> None:
        if current_event.attempt == 1 and n == 2:
            raise ValueError

        received.append(n)

    bus.start()
    assert bus.ready(10)
    store.add("tick", n=2)

    wait_until(lambda: f"'{command}" in caplog.text, what="the command is named")
    assert "Traceback" not in caplog.text.replace("Traceback (most recent call last):\n  File", "")
    guard.allow(f"+{command}")
    wait_until(lambda: {1, 2} <= set(received), what="both are handled")
    wait_until(lambda: not store.client.xpending(store.keys.stream("tick"), "mailer")["pending"])
    wait_until(lambda: not store.retries("tick"), what="nothing is left to be tried")


def test_a_worker_whose_rights_are_revoked_continues_once_regranted(
    store: StreamStore, guard: Guard, make_bus: Make
) -> None:
    bus = make_bus(guard.url, "mailer", prefix=store.prefix)
    received = listen(bus, via="stream")
    store.add("tick", n=1)
    wait_until(lambda: received == [1], what="the first event arrives")

    guard.allow("resetkeys")
    store.add("tick", n=2)
    wait_until(lambda: bus.health().refused, what="it is refused")
    guard.allow("allkeys")

    wait_until(lambda: received == [1, 2], what="the second event arrives")
    assert threading.active_count() > 1
