"""A service that is taken out of use, or gets another name: ``services forget`` and ``rename``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus
from flask_eventbus.admin import services
from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.records import RetryRecord

pytestmark = pytest.mark.second_look("waits for workers of a real Redis")


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams under a prefix of this test's own."""
    return StreamStore(shared_redis)


@pytest.fixture
def _nobody_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consumers count as gone at once."""
    monkeypatch.setattr(services, "GONE", -1.0)


def fill(store: StreamStore) -> list[str]:
    """Let ``mailer`` have all that a service may have, with 2 of 4 events of ``paid`` to read."""
    ids = [store.add("paid", n=number)[0] for number in range(4)]
    store.group("paid")
    store.group("paid", "audit")
    store.read("paid", 2)
    store.client.xack(store.keys.stream("paid"), "mailer", ids[0])
    now = int(time.time() * 1000)
    record = RetryRecord(
        entry="1-1",
        event=Codec().encode(store.event("paid", n=9)),
        receiver=f"{__name__}.receive",
        attempts=1,
        first=now,
        last=now,
        error="OSError: away",
    )
    store.wait_for_retry(record, "paid")
    store.give_up("paid")
    store.client.incr(store.keys.dead_dropped("paid", "mailer"))
    store.client.sadd(store.keys.seen("paid", "mailer", 7), "a-1")
    store.client.hset(store.keys.trimmed("paid", "mailer"), "count", 7)
    store.client.hset(store.keys.tampered("paid", "mailer"), "alarm", "Somebody did it.")
    store.client.hset(store.keys.since("mailer"), "p*", 1)
    store.add("tick", n=1)
    store.group("tick")
    return ids


def state(store: StreamStore) -> dict[str, Any]:
    """All keys, and the groups of each stream."""
    keys = {key.decode() for key in store.client.scan_iter(f"{store.prefix}:*")}
    groups = {name: store.client.xinfo_groups(store.keys.stream(name)) for name in ("paid", "tick")}
    return {"keys": keys, "groups": groups}


def keys_of(store: StreamStore, service: str) -> set[str]:
    keys = store.keys
    return {
        keys.retry("paid", service),
        keys.dead("paid", service),
        keys.dead_dropped("paid", service),
        keys.seen("paid", service, 7),
        keys.trimmed("paid", service),
        keys.tampered("paid", service),
        keys.since(service),
    }


received: list[int] = []


def receive(sender: str, n: int) -> None:
    received.append(n)


# -- forget -------------------------------------------------------------------------------


@pytest.mark.usefixtures("_nobody_runs")
def test_a_forgotten_service_leaves_nothing_and_raises_no_alarm(store: StreamStore) -> None:
    fill(store)
    assert store.run("status", "--all", "--max-lag", "0", "--max-dead", "0").exit_code == 1

    result = store.run("services", "forget", "mailer", input="y\n")

    assert result.exit_code == 0, result.output
    assert "paid      yes    2        1        1     1" in result.output
    assert "Remove all of this for good? [y/N]: y" in result.output
    left = state(store)
    assert not left["keys"] & keys_of(store, "mailer")
    assert [group["name"] for group in left["groups"]["paid"]] == [b"audit"]
    assert left["groups"]["tick"] == []
    assert store.client.xlen(store.keys.stream("paid")) == 4


@pytest.mark.usefixtures("_nobody_runs")
@pytest.mark.parametrize(
    ("words", "answer", "code"),
    [
        (("forget", "mailer", "--dry-run"), None, 0),
        (("forget", "mailer"), "n\n", 1),
        (("rename", "mailer", "notifier", "--dry-run"), None, 0),
        (("rename", "mailer", "notifier"), "n\n", 1),
    ],
)
def test_a_dry_run_and_the_answer_no_change_nothing(
    store: StreamStore, words: tuple[str, ...], answer: str | None, code: int
) -> None:
    fill(store)
    before = state(store)

    result = store.run("services", *words, input=answer)

    assert result.exit_code == code, result.output
    assert "paid      yes    2        1        1     1" in result.output
    assert state(store) == before


@pytest.mark.parametrize("words", [("forget", "mailer"), ("rename", "mailer", "notifier")])
def test_a_service_with_running_workers_is_not_forgotten(
    store: StreamStore, words: tuple[str, ...], make_bus: Callable[..., Bus]
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    bus.on("paid")(receive)
    bus.start()
    assert bus.ready(10)

    result = store.run("services", *words, "--yes")

    assert result.exit_code == 1
    assert "1 worker of 'mailer' showed activity in the last 5 minutes" in result.output
    assert "Stop the workers of the service first" in result.output
    assert store.position("paid")


@pytest.mark.parametrize("words", [("forget", "mailr"), ("rename", "mailr", "notifier")])
def test_an_unknown_service_name_lists_the_known_ones(
    store: StreamStore, words: tuple[str, ...]
) -> None:
    fill(store)

    result = store.run("services", *words, "--yes")

    assert result.exit_code == 1
    assert "Redis has nothing of 'mailr'" in result.output
    assert "Services with a group at a stream: 'audit', 'mailer'." in result.output


# -- rename -------------------------------------------------------------------------------


@pytest.mark.usefixtures("_nobody_runs")
def test_a_renamed_service_continues_where_it_was(
    store: StreamStore, make_bus: Callable[..., Bus]
) -> None:
    fill(store)
    place = store.position("paid")

    result = store.run("services", "rename", "mailer", "notifier", "--yes")

    assert result.exit_code == 0, result.output
    assert "Renamed 'mailer' to 'notifier'." in result.output
    found = state(store)
    assert not found["keys"] & keys_of(store, "mailer")
    assert found["keys"] >= keys_of(store, "notifier")
    assert store.position("paid", "notifier") == place
    assert {group["name"] for group in found["groups"]["paid"]} == {b"audit", b"notifier"}
    assert len(store.dead("paid", "notifier")) == 1

    received.clear()
    bus = make_bus(store.url, "notifier", prefix=store.prefix)
    bus.on("paid")(receive)
    bus.start()

    wait_until(lambda: len(received) == 4, what="the pending one, two that wait, and the retry")
    assert sorted(received) == [1, 2, 3, 9]


@pytest.mark.usefixtures("_nobody_runs")
def test_pending_events_move_with_a_renamed_service_and_keep_their_counts(
    store: StreamStore,
) -> None:
    for number in range(250):
        store.add("paid", n=number)
    store.group("paid")
    ids = store.read("paid", 250)
    key = store.keys.stream("paid")
    store.client.execute_command("XCLAIM", key, "mailer", "x", 0, ids[7], "RETRYCOUNT", 4)

    result = store.run("services", "rename", "mailer", "notifier", "--yes")

    assert result.exit_code == 0, result.output
    found = store.client.xpending_range(key, "notifier", "-", "+", 1_000)
    assert [each["message_id"].decode() for each in found] == ids
    assert {each["consumer"] for each in found} == {b"released"}
    assert [each["times_delivered"] for each in found if each["times_delivered"] != 1] == [4]


@pytest.mark.usefixtures("_nobody_runs")
def test_two_services_are_not_merged(store: StreamStore) -> None:
    fill(store)
    before = state(store)

    result = store.run("services", "rename", "mailer", "audit", "--yes")

    assert result.exit_code == 1
    assert "'audit' has groups, retries or dead letters of 'paid' already" in result.output
    assert "services forget audit" in result.output
    assert state(store) == before


@pytest.mark.parametrize(
    "words", [("forget",), ("forget", "a b"), ("rename", "a"), ("rename", "a", "a")]
)
def test_a_usage_error_of_services_exits_with_2(store: StreamStore, words: tuple[str, ...]) -> None:
    assert store.run("services", *words).exit_code == 2


@pytest.mark.parametrize("words", [("forget", "mailer"), ("rename", "mailer", "notifier")], ids=str)
@pytest.mark.usefixtures("_nobody_runs")
def test_a_key_of_another_type_is_named_and_left_as_it_is(
    store: StreamStore, words: tuple[str, ...]
) -> None:
    fill(store)
    key, tick = store.keys.retry("paid", "mailer"), store.keys.stream("tick")
    store.client.delete(key, tick)
    store.client.set(key, "mine")
    store.client.set(tick, "mine")

    result = store.run("services", *words, "--yes")

    assert result.exit_code == 0, result.output
    assert f"Another program stores a different type under '{key}'." in result.output
    assert f"Another program stores a different type under '{tick}'." in result.output
    assert store.client.get(key) == store.client.get(tick) == b"mine"
    assert not any(map(store.client.exists, keys_of(store, "mailer") - {key}))
    groups = {group["name"] for group in store.client.xinfo_groups(store.keys.stream("paid"))}
    assert groups == {b"audit", *[word.encode() for word in words[2:]]}


@pytest.mark.usefixtures("_nobody_runs")
def test_a_service_is_not_renamed_over_a_key_of_another_type(store: StreamStore) -> None:
    fill(store)
    key = store.keys.retry("paid", "notifier")
    store.client.set(key, "mine")
    before = state(store)

    result = store.run("services", "rename", "mailer", "notifier", "--yes")

    assert result.exit_code == 1
    assert f"Another program stores a different type under '{key}'." in result.output
    assert state(store) == before


def test_the_list_of_known_services_leaves_out_a_key_of_another_type(store: StreamStore) -> None:
    fill(store)
    store.client.delete(store.keys.stream("tick"))
    store.client.set(store.keys.stream("tick"), "mine")

    result = store.run("services", "forget", "nobody")

    assert result.exit_code == 1
    assert "Services with a group at a stream: 'audit', 'mailer'." in result.output
