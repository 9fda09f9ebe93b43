"""`seek`: the only thing that moves a group, and only after it was told what that means."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, EventBus
from flask_eventbus.admin.services import make_move, plan_move
from flask_eventbus.admin.streams import StreamAccess
from flask_eventbus.cli.app import flask_commands
from flask_eventbus.config import Config


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams of this test alone."""
    return StreamStore(shared_redis)


def fill(store: StreamStore, *, read: int = 4) -> list[str]:
    """Ten events of an hour, some of which the group got; the ids of their entries."""
    now = int(time.time() * 1000)
    ids = [
        store.add("paid", id=f"{now - (10 - number) * 360_000}-0", number=number)[0]
        for number in range(10)
    ]
    store.group("paid")
    store.read("paid", read)
    store.client.xack(store.keys.stream("paid"), "mailer", *ids)
    return ids


def left(store: StreamStore) -> list[str]:
    """The ids of the entries that the group gets from now on."""
    return store.read("paid", 100)


def test_seek_says_how_many_events_it_skips_and_moves_after_yes(store: StreamStore) -> None:
    ids = fill(store)

    result = store.run("seek", "paid", "--to", "new", input="y\n")

    assert result.exit_code == 0, result.output
    stamp = r"\(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)"
    assert re.fullmatch(
        rf"""'mailer' in the stream of 'paid'
  from  {ids[3]} {stamp}
  to    {ids[9]} {stamp}
6 events are skipped: no worker will get them\.
Move 'mailer'\? \[y/N\]: y
Moved 'mailer' to {ids[9]} {stamp}\.
""",
        result.output,
    )
    assert store.position("paid") == ids[9]
    assert left(store) == []


def test_seek_says_how_many_events_repeat_and_are_pending(store: StreamStore) -> None:
    ids = fill(store, read=3)
    pending = store.read("paid", 1)

    result = store.run("seek", "paid", "--to", "earliest", "--yes")

    assert result.exit_code == 0, result.output
    assert "  to    the beginning\n" in result.output
    assert "4 events are repeated: receivers run for them again.\n" in result.output
    assert "1 event is pending: workers finish it.\n" in result.output
    assert pending == [ids[3]]
    assert left(store) == ids


@pytest.mark.parametrize("answer", ["n\n", "", "\n"])
def test_seek_without_yes_moves_nothing(store: StreamStore, answer: str) -> None:
    ids = fill(store)
    store.client.sadd(store.keys.seen("paid", "mailer", 1), "x")

    result = store.run("seek", "paid", "--to", "earliest", input=answer)

    assert result.exit_code == 1
    assert store.position("paid") == ids[3]
    assert store.client.exists(store.keys.seen("paid", "mailer", 1))


def test_seek_accepts_an_entry_a_time_or_an_age(store: StreamStore) -> None:
    ids = fill(store)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 0.5 * 3600 - 60))

    for place, count in [
        (ids[2], 7),
        ("33m", 5),
        (moment, 5),
        ("30d", 10),
        ("0", 10),
        ("1s", 0),
        ("earliest", 10),
        ("new", 0),
    ]:
        result = store.run("seek", "paid", "--to", place, "--yes")
        assert result.exit_code == 0, result.output
        assert len(left(store)) == count, place


def test_an_age_in_seek_uses_the_clock_of_redis(
    store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    here = time.time
    monkeypatch.setattr(time, "time", lambda: here() + 1_800)

    result = store.run("seek", "paid", "--to", "33m", "--yes")

    assert result.exit_code == 0, result.output
    assert len(left(store)) == 5


def test_without_the_right_to_time_seek_uses_the_local_clock(store: StreamStore) -> None:
    fill(store)
    user = f"blind-{store.prefix}"
    rules = ("on", ">secret", "+@all", "allkeys", "allchannels", "-time")
    store.client.execute_command("ACL", "SETUSER", user, *rules)
    url = store.url.replace("://", f"://{user}:secret@")

    result = store.run("--url", url, "seek", "paid", "--to", "33m", "--yes")

    store.client.execute_command("ACL", "DELUSER", user)
    assert result.exit_code == 0, result.output
    assert len(left(store)) == 5


@pytest.mark.parametrize("place", ["2023-11-14T22:13:20+00:00", "1700000000000"])
def test_seek_to_a_time_repeats_an_entry_of_that_time(store: StreamStore, place: str) -> None:
    ids = [store.add("paid", id=f"1700000000000-{number}")[0] for number in range(3)]
    store.group("paid", start="$")

    result = store.run("seek", "paid", "--to", place, "--yes")

    assert result.exit_code == 0, result.output
    assert re.search(r"  to    2023-11-1\d \d\d:13:20\n", result.output)
    assert left(store) == ids


def test_repeated_events_are_not_dropped_as_duplicates(store: StreamStore) -> None:
    fill(store)
    keys, others = (
        [store.keys.seen("paid", "mailer", 1), store.keys.seen("paid", "mailer", 29_999)],
        [store.keys.seen("paid", "mailer2", 1), store.keys.seen("sold", "mailer", 1)],
    )

    for key in (*keys, *others):
        store.client.sadd(key, "x")

    store.run("seek", "paid", "--to", "earliest", "--yes")
    assert store.client.exists(*keys) == 0
    assert store.client.exists(*others) == 2


def test_a_group_that_has_passed_the_position_is_not_moved_back(store: StreamStore) -> None:
    store.add("paid", n=1)
    store.group("paid")
    config = Config(service="mailer", url=store.url, prefix=store.prefix)

    with StreamAccess(config, name="tests") as access:
        move = plan_move(access, "mailer", "paid", None)
        later, _ = store.add("paid", n=2)
        store.read("paid", 2)
        make_move(access, move)

    assert store.position("paid") == later


def test_the_lag_is_correct_after_seek(store: StreamStore) -> None:
    ids = fill(store)
    store.client.xtrim(store.keys.stream("paid"), maxlen=8, approximate=False)

    for place, lag in [(ids[4], 5), ("earliest", 8), ("new", 0), (ids[7], 2)]:
        store.run("seek", "paid", "--to", place, "--yes")
        groups = store.client.xinfo_groups(store.keys.stream("paid"))
        assert groups[0]["lag"] == lag, place


def test_seek_passes_no_count_to_a_server_without_counts(
    store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = fill(store)
    stream_of = StreamAccess.stream_of
    asked: list[tuple[Any, ...]] = []
    together = StreamAccess.together

    def of_redis_6(self: StreamAccess, name: str) -> dict[str, Any]:
        found = stream_of(self, name)
        return {key: found[key] for key in found if key != "entries-added"}

    def note(self: StreamAccess, commands: Any) -> list[Any] | None:
        asked.extend(commands)
        return together(self, commands)

    monkeypatch.setattr(StreamAccess, "stream_of", of_redis_6)
    monkeypatch.setattr(StreamAccess, "together", note)
    result = store.run("seek", "paid", "--to", ids[5], "--yes")

    assert result.exit_code == 0, result.output
    assert asked == [("XGROUP", "SETID", store.keys.stream("paid"), "mailer", ids[5])]
    assert left(store) == ids[6:]


def test_seek_to_the_current_position_does_not_prompt(store: StreamStore) -> None:
    ids = fill(store)

    result = store.run("seek", "paid", "--to", ids[3])

    assert result.exit_code == 0
    assert result.output.startswith(f"'mailer' in the stream of 'paid' is at {ids[3]} (")
    assert result.output.endswith(") already.\n")


def test_seek_does_not_move_other_groups(store: StreamStore) -> None:
    fill(store)
    store.group("paid", "audit", "0")

    store.run("seek", "paid", "--to", "new", "--yes")

    assert store.position("paid", "audit") == "0-0"


def test_seek_with_an_app_moves_its_service(store: StreamStore) -> None:
    fill(store)
    app = Flask("mailer")
    app.config.update(
        EVENTBUS_SERVICE="mailer", EVENTBUS_URL=store.url, EVENTBUS_PREFIX=store.prefix
    )
    EventBus().init_app(app)

    words = ["seek", "paid", "--to", "earliest", "--yes"]
    result = app.test_cli_runner().invoke(flask_commands, words)

    assert result.exit_code == 0, result.output
    assert store.position("paid") == "0-0"


def test_a_worker_continues_from_the_new_position(
    store: StreamStore, make_bus: Callable[..., Bus]
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix)
    numbers: list[int] = []
    bus.on("paid", start="earliest")(lambda sender, number: numbers.append(number))
    store.add("paid", number=1)
    store.add("paid", number=2)
    bus.start()
    wait_until(lambda: numbers == [1, 2], what="both are received")
    wait_until(
        lambda: not store.client.xpending(store.keys.stream("paid"), "mailer")["pending"],
        what="both are acknowledged",
    )

    result = store.run("seek", "paid", "--to", "earliest", "--yes")

    assert result.exit_code == 0, result.output
    wait_until(lambda: numbers == [1, 2, 1, 2], what="both are received again")


# -- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["{ahead}", "2999-01-01"])
def test_seek_past_the_last_event_is_refused(store: StreamStore, place: str) -> None:
    ids = fill(store)
    ahead = f"{int(ids[9][:-2]) + 10**9}-0"

    result = store.run("seek", "paid", "--to", place.format(ahead=ahead), "--yes")

    assert result.exit_code == 1
    assert "is after the last event" in result.output
    assert "To skip all events so far, pass: --to new" in result.output
    assert store.position("paid") == ids[3]


def test_seek_reports_a_missing_group(store: StreamStore) -> None:
    store.add("paid")

    for name in ("paid", "unknown"):
        result = store.run("seek", name, "--to", "new", "--yes")
        assert result.exit_code == 1
        assert f"'mailer' has no group at the stream of '{name}'" in result.output

    assert not store.client.exists(store.keys.stream("unknown"))


def test_seek_requires_a_service(store: StreamStore) -> None:
    result = store.run("seek", "paid", "--to", "new", service=None)

    assert result.exit_code == 1
    assert "Pass '--service NAME' before the command" in result.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["paid"], "Missing option '--to'"),
        (["paid", "--to", "later"], "'later' is not a place in a stream"),
        (["paid", "--to", "12"], "'12' is not a place in a stream"),
        (["order_*", "--to", "new"], "'order_*' cannot be a signal's name"),
    ],
    ids=["none", "word", "short", "pattern"],
)
def test_a_usage_error_of_seek_exits_with_2(
    store: StreamStore, words: list[str], text: str
) -> None:
    result = store.run("seek", *words)

    assert result.exit_code == 2
    assert text in " ".join(result.output.split())


def test_without_the_right_seek_leaves_the_group_in_place(redis_server: RedisServer) -> None:
    store = StreamStore(redis_server)
    ids = fill(store)
    redis_server.client.execute_command(
        *("ACL", "SETUSER", "ada", "on", ">pw", f"~{store.prefix}:*", "+@all", "-xgroup|setid")
    )
    store.url = redis_server.url.replace("127", "ada:pw@127", 1)

    result = store.run("seek", "paid", "--to", "new", "--yes")

    assert result.exit_code == 1
    assert "Grant the user in the ACL: '+xgroup|setid ~" in result.output
    assert store.position("paid") == ids[3]
