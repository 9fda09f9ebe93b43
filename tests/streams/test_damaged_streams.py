"""Tests that damage to the streams of other services is noticed and can be repaired."""

from __future__ import annotations

import re
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, PublishError
from flask_eventbus.checks.server import check

pytestmark = [
    pytest.mark.second_look("waits for checks that run several times a second"),
    pytest.mark.timing(
        check_trimmed_every=0.1, list_many_streams_every=0.1, check_flushed_every=0.1
    ),
]

Make = Callable[..., Bus]

PAGE = (Path(__file__).parents[2] / "docs" / "damaged-streams.md").read_text()

#: The last id that an entry may have.
LAST = f"{2**64 - 1}-{2**64 - 1}"


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    return StreamStore(shared_redis)


def mailer(
    store: StreamStore, make_bus: Make, name: str = "tick", **settings: float
) -> tuple[Bus, list[int]]:
    """A service that hears a stream, and what it has received."""
    received: list[int] = []
    bus = make_bus(store.url, "mailer", prefix=store.prefix, **settings)
    bus.on(name, via="stream")(lambda sender, number: received.append(number))
    bus.start()
    assert bus.ready(10)
    return bus, received


def errors(bus: Bus) -> list[str]:
    """Return the errors of ``check``, each with its remedy."""
    return [f"{each.text} {each.remedy}" for each in check(bus.node) if each.level == "error"]


def test_a_group_that_starts_after_the_last_entry_raises_no_alarm(
    store: StreamStore, make_bus: Make
) -> None:
    store.client.sadd(store.keys.names, "tick")
    store.client.xgroup_create(store.keys.stream("tick"), "other", "0", mkstream=True)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    received: list[int] = []
    bus.on("*", via="stream")(lambda sender, number: received.append(number))
    bus.start()
    assert bus.ready(10)
    groups = store.client.xinfo_groups(store.keys.stream("tick"))
    assert {group["last-delivered-id"] for group in groups} > {b"0-0"}
    status = store.run("status", "--max-lag", "100")
    assert (status.exit_code, "past its end" in status.output) == (0, False)

    # The worker looks before it reads.
    store.add("tick", number=1)
    wait_until(lambda: received == [1], what="the next event is handled")
    assert errors(bus) == []


def test_a_group_moved_past_the_end_raises_an_alarm_until_it_is_moved_back(
    store: StreamStore, make_bus: Make
) -> None:
    bus, received = mailer(store, make_bus)
    store.add("tick", number=1)
    wait_until(lambda: received == [1], what="the first event is handled")
    before = store.client.xinfo_groups(store.keys.stream("tick"))[0]["last-delivered-id"].decode()

    place = f"{2**64 - 1}-{2**64 - 2}"
    store.client.execute_command(
        "XCLAIM", store.keys.stream("tick"), "mailer", "evil", 0, "0-1", "LASTID", place
    )
    store.add("tick", number=2)

    wait_until(lambda: bus.health().alarms, what="the worker notices")
    assert "past its end" in bus.health().alarms["tick"]
    [found] = errors(bus)
    assert f"'mailer' is at {place} in the stream of 'tick', past its end" in found
    status = store.run("status", "--max-lag", "100")
    assert status.exit_code == 1
    assert "eventbus --service mailer seek tick --to TIME" in status.output

    moved = store.run("seek", "tick", "--to", before, "--yes")

    assert moved.exit_code == 0, moved.output
    wait_until(lambda: received == [1, 2], what="the second event is handled")
    wait_until(lambda: not bus.health().alarms, what="the alarm is over")
    assert errors(bus) == []
    assert store.run("status", "--max-lag", "100").exit_code == 0


def test_a_stream_with_the_last_possible_id_raises_an_alarm_and_the_documented_commands_repair_it(
    store: StreamStore, make_bus: Make
) -> None:
    bus, received = mailer(store, make_bus)
    publisher = make_bus(store.url, "accounts", prefix=store.prefix, publish={"tick": "stream"})
    tick = publisher.signal("tick")
    tick.send(number=1)
    wait_until(lambda: received == [1], what="the first event is handled")
    store.add_fields("tick", {b"event": b"x"}, id=LAST)

    with pytest.raises(PublishError):
        tick.send(number=2)

    wait_until(lambda: bus.health().alarms, what="the worker notices")
    assert "more than a day in the future" in bus.health().alarms["tick"]
    assert any("more than a day in the future" in each for each in errors(bus))
    assert store.run("status", "--max-lag", "100").exit_code == 1

    for words in commands_of_the_page(store):
        if words[0] == "redis-cli":
            store.client.execute_command(*words[1:])
        else:
            moved = store.run(*words[2:], "--yes")
            assert moved.exit_code == 0, moved.output

    tick.send(number=3)
    wait_until(lambda: received == [1, 3], what="the next event is handled")
    wait_until(lambda: not bus.health().alarms, what="the alarm is over")
    assert errors(bus) == []


def test_check_raises_the_alarm_in_a_publisher_too(store: StreamStore, make_bus: Make) -> None:
    publish = {"tick": "stream"}
    publisher = make_bus(store.url, "accounts", prefix=store.prefix, publish=publish)
    store.add_fields("tick", {b"event": b"x"}, id=LAST)

    assert any("more than a day in the future" in each for each in errors(publisher))


def test_a_process_without_a_group_raises_the_alarm_too(store: StreamStore, make_bus: Make) -> None:
    bus = make_bus(store.url, "cache", prefix=store.prefix)
    received: list[int] = []
    bus.on("tick", via="stream", group=None)(lambda sender, number: received.append(number))
    bus.start()
    assert bus.ready(10)
    first, _ = store.add("tick", number=1)
    wait_until(lambda: received == [1], what="the first event is received")
    store.add_fields("tick", {b"event": b"x"}, id=LAST)
    wait_until(lambda: bus.health().alarms, what="the process notices")
    assert "more than a day in the future" in bus.health().alarms["tick"]

    store.client.xdel(store.keys.stream("tick"), LAST)
    store.client.execute_command("XSETID", store.keys.stream("tick"), first)
    store.add("tick", number=2)

    wait_until(lambda: 2 in received, what="the next event is received")
    assert not bus.health().alarms


def commands_of_the_page(store: StreamStore) -> list[list[str]]:
    """Return the commands of the page, with the key and the ids of the test."""
    [(first, _)] = store.client.xrange(store.keys.stream("tick"), count=1)
    section = PAGE[PAGE.index("## An id far in the future") :]
    lines = re.findall(r"^\$ (.*)$", section[: section.index("\n## ")], re.MULTILINE)
    shown = {
        "eventbus:{user_registered}:stream": store.keys.stream("tick"),
        "1764300000000-0": first.decode(),
        "user_registered": "tick",
    }

    for name, own in shown.items():
        lines = [line.replace(name, own) for line in lines]

    assert len(lines) == 4
    return [shlex.split(line) for line in lines]


def test_an_id_less_than_a_day_ahead_raises_no_alarm(store: StreamStore, make_bus: Make) -> None:
    store.add("tick", id=f"{int(time.time() * 1000) + 23 * 3_600_000}-0", number=1)
    store.group("tick")

    assert store.run("status", "--max-lag", "100").exit_code == 0


def test_an_emptied_stream_raises_an_alarm(store: StreamStore, make_bus: Make) -> None:
    bus, _ = mailer(store, make_bus)
    bus.stop()

    for number in range(10):
        store.add("tick", number=number)

    store.client.xadd(store.keys.stream("tick"), {"event": b"x"}, maxlen=0, approximate=False)

    status = store.run("status", "--max-lag", "100")
    assert status.exit_code == 1
    assert "events of 'tick' were trimmed before 'mailer' got them" in status.output


@pytest.mark.timing(max_names=20)
def test_patterns_match_a_bounded_number_of_streams_and_log_it(
    store: StreamStore, make_bus: Make
) -> None:
    bus, received = mailer(store, make_bus, "*")
    store.add("tick", number=1)
    wait_until(lambda: received == [1], what="the stream is found")

    store.client.sadd(store.keys.names, *(f"a{number:04}" for number in range(2_000)))
    wait_until(lambda: bus.health().alarms, what="the flood is noticed")

    store.add("tick", number=2)
    wait_until(lambda: received == [1, 2], what="what was received before is received on")
    assert "2,001 names of streams. Patterns match 20" in bus.health().alarms["*"]
    assert len(store.client.keys(f"{store.prefix}:{{a*")) <= 20
    assert any("2,001 names of streams" in each for each in errors(bus))
    assert "2,001 names of streams" in store.run("status", service=None).output

    store.client.delete(store.keys.names)
    store.add("new", number=3)
    wait_until(lambda: received == [1, 2, 3], what="other streams are found again")
    wait_until(lambda: not bus.health().alarms, what="the alarm is over")


def test_two_hundred_thousand_stream_names_do_not_stop_a_subscriber(
    store: StreamStore, make_bus: Make
) -> None:
    bus, received = mailer(store, make_bus, "*")
    store.add("tick", number=1)
    wait_until(lambda: received == [1], what="the stream is found")
    pipe = store.client.pipeline(transaction=False)

    for start in range(0, 200_000, 10_000):
        pipe.sadd(store.keys.names, *(f"x{n:060}" for n in range(start, start + 10_000)))

    pipe.execute()
    wait_until(lambda: bus.health().alarms, timeout=30, what="the flood is noticed")
    store.add("tick", number=2)

    wait_until(
        lambda: received == [1, 2], timeout=30, what="what was received before is received on"
    )
    store.client.delete(store.keys.names)


# -- what other readers do to the entries of a group --------------------------------------


def take_all(store: StreamStore, consumer: str) -> list[str]:
    """Read as another program does that may read the stream."""
    return store.read("tick", 1_000, consumer=consumer)


def test_a_consumer_that_is_not_a_worker_raises_an_alarm(
    store: StreamStore, make_bus: Make
) -> None:
    bus, _ = mailer(store, make_bus)
    bus.stop()
    store.add("tick", number=1)
    key = store.keys.stream("tick")
    store.client.xack(key, "mailer", *take_all(store, "evil"))

    status = store.run("status", "--max-lag", "100")
    bus, received = mailer(store, make_bus)

    assert status.exit_code == 1
    assert "'evil' is in the group of 'mailer' at the stream of 'tick'" in status.output
    wait_until(lambda: "'evil' is in the group" in bus.health().alarms.get("tick", ""))
    assert any("'evil' is in the group" in each for each in errors(bus))
    # What the remedy says brings the event back.
    assert store.run("seek", "tick", "--to", "earliest", "--yes").exit_code == 0
    wait_until(lambda: received == [1], what="the event is handled")


def test_queued_events_are_handled_although_somebody_acknowledged_them(
    store: StreamStore, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=1.5)
    received: list[int] = []
    goes_on = threading.Event()

    @bus.on("tick", via="stream")
    def receive(sender: str, number: int) -> None:
        # Shorter than what lets other workers have what waits.
        goes_on.wait(20)
        received.append(number)

    bus.start()
    assert bus.ready(10)
    entries = store.add_together("tick", *({"number": number} for number in range(5)))
    key = store.keys.stream("tick")
    wait_until(lambda: store.client.xpending(key, "mailer")["pending"] == 5, what="all are read")

    assert store.client.xack(key, "mailer", *entries) == 5
    wait_until(lambda: bus.health().alarms, what="the worker notices")
    assert "Another program acknowledged 4 entries of 'tick'" in bus.health().alarms["tick"]
    goes_on.set()

    wait_until(lambda: sorted(received) == [0, 1, 2, 3, 4], what="all are handled")
    assert "Another program acknowledged 4 entries" in caplog.text
    assert any("Another program acknowledged 4 entries" in each for each in errors(bus))
    status = store.run("status", "--max-lag", "100")
    assert (status.exit_code, "Another program acknowledged" in status.output) == (1, True)


def test_a_late_acknowledgement_by_a_paused_worker_raises_no_alarm(
    store: StreamStore, make_bus: Make
) -> None:
    store.group("tick")
    paused = [store.add("tick", number=number)[0] for number in (1, 2)]
    assert store.read("tick", 2) == paused
    bus = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=1.5)
    received: list[int] = []
    goes_on = threading.Event()

    @bus.on("tick", via="stream")
    def receive(sender: str, number: int) -> None:
        goes_on.wait(20)
        received.append(number)

    bus.start()
    key = store.keys.stream("tick")
    wait_until(lambda: bus.health().lag == 2, what="both are claimed")
    last, _ = store.add("tick", number=3)
    wait_until(lambda: bus.health().lag == 3, what="the last is read")

    assert store.client.xack(key, "mailer", *paused) == 2
    idle = [0]

    def renewed() -> bool:
        (found,) = store.client.xpending_range(key, "mailer", last, last, 1)
        idle.append(found["time_since_delivered"])
        return idle[-1] < idle[-2]

    wait_until(renewed, what="the worker looks at what it has")
    goes_on.set()

    wait_until(lambda: bus.health().lag == 0, what="nothing is left")
    assert received == [1, 3]
    assert bus.health().alarms == {}


@pytest.mark.parametrize(
    ("id", "count"),
    [("*", 1_000), ("*", 6), ("1000-0", 7)],
    ids=["far too many", "too soon", "one too many"],
)
def test_an_impossible_delivery_count_raises_an_alarm(
    store: StreamStore, make_bus: Make, id: str, count: int
) -> None:
    bus, _ = mailer(store, make_bus)
    bus.stop()
    store.add("tick", id=id, number=1)
    ids = take_all(store, "web-1-4711-3f2a9c1b2d3e")
    head = ("XCLAIM", store.keys.stream("tick"), "mailer", "web-1-4711-3f2a9c1b2d3e", 0)
    store.client.execute_command(*head, *ids, "IDLE", 10**9, "RETRYCOUNT", count)

    bus, received = mailer(store, make_bus, claim_after=2)

    wait_until(lambda: received == [1], what="it is handled")
    text = f"counts as delivered {count} times, which workers of 'mailer' cannot have done"
    assert text in bus.health().alarms["tick"]
    assert any(text in each for each in errors(bus))
    assert text in store.run("status", "--max-lag", "100").output
    assert store.run("status", "--max-lag", "100").exit_code == 1
    assert store.dead("tick") == []


def test_status_shows_the_rest_to_a_user_without_rights_to_worker_records(
    store: StreamStore,
) -> None:
    store.add("tick", number=1)
    store.group("tick")
    store.client.hset(store.keys.tampered("tick", "mailer"), "alarm", "Somebody did it.")
    assert "Somebody did it." in store.run("status").output
    user = f"{store.prefix}-user"
    store.client.execute_command(
        "ACL", "SETUSER", user, "on", ">secret", "~*", "&*", "+@all", "-hmget"
    )
    store.url = store.url.replace("://", f"://{user}:secret@")

    status = store.run("status", "--max-lag", "100")

    store.client.execute_command("ACL", "DELUSER", user)
    assert status.exit_code == 0, status.output
    assert "Somebody did it." not in status.output
