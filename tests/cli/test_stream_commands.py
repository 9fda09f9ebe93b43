"""`status`: what it shows of streams, and when its exit code says that something is wrong."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from flask import Flask
from flask.cli import ScriptInfo
from servers import RedisServer, free_port
from stream_store import NODE, StreamStore
from waiting import wait_until

from flask_eventbus import EventBus
from flask_eventbus.__main__ import main
from flask_eventbus.admin.status import consumer_of, lag_of
from flask_eventbus.cli.app import flask_commands

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams of this test alone."""
    return StreamStore(shared_redis)


@pytest.fixture
def make_app(store: StreamStore) -> Callable[..., Flask]:
    """Make an app with a bus on the shared server."""

    def make(**settings: Any) -> Flask:
        app = Flask("mailer")
        app.config.update(
            EVENTBUS_SERVICE="mailer", EVENTBUS_URL=store.url, EVENTBUS_PREFIX=store.prefix
        )
        app.config.update(settings)
        EventBus().init_app(app)
        return app

    return make


def run_in(app: Flask, *words: str) -> Result:
    """Run ``flask eventbus WORDS`` on an app."""
    return app.test_cli_runner().invoke(flask_commands, words)


def fill(store: StreamStore) -> list[str]:
    """A stream with a bit of everything for 'mailer'; the ids of its entries."""
    ids = [store.add("user_registered", user_id=number)[0] for number in range(5)]
    store.group("user_registered")
    store.read("user_registered", 3)
    store.client.xack(store.keys.stream("user_registered"), "mailer", ids[0])
    store.give_up("user_registered")
    store.client.zadd(store.keys.retry("user_registered", "mailer"), {b"one": 1, b"two": 2})
    return ids


def as_json(result: Result) -> dict[str, Any]:
    """Return the JSON output of a command."""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# -- what it shows ------------------------------------------------------------------------


def test_status_shows_the_lag_and_the_workers_of_a_service(store: StreamStore) -> None:
    fill(store)

    result = store.run("status")

    assert result.exit_code == 0, result.output
    assert (
        re.sub(r" +\d+ s$", "  0 s", result.output, flags=re.MULTILINE).replace("0 s  ", "")
        == f"""\
Stream           Events  Service  Lag  Pending  Oldest  Retries  Dead
user_registered       5  mailer     2        2     {"      2     1"}

Service  Stream           Host    Pid  Node          Pending  Idle
mailer   user_registered  web-1  4711  {NODE}        2  0 s
"""
    )


def test_status_shows_the_same_as_json(store: StreamStore) -> None:
    fill(store)

    found = as_json(store.run("status", "--json"))

    (stream,) = found["streams"]
    (group,) = stream["groups"]
    (consumer,) = group.pop("consumers")
    assert found["exceeded"] == []
    assert (stream["name"], stream["length"]) == ("user_registered", 5)
    assert 0 <= group.pop("oldest_pending_seconds") < 60
    assert group == {
        "service": "mailer",
        "exists": True,
        "lag": 2,
        "lost": 0,
        "pending": 2,
        "retries": 2,
        "dead": 1,
        "dead_dropped": 0,
    }
    assert 0 <= consumer.pop("idle_seconds") < 60
    assert consumer == {
        "name": f"web-1-4711-{NODE}",
        "host": "web-1",
        "pid": 4711,
        "node": NODE,
        "pending": 2,
    }


def test_status_counts_events_trimmed_before_they_were_read(store: StreamStore) -> None:
    store.add("paid", n=0)
    store.group("paid")
    store.read("paid", 1)

    for number in range(1, 10):
        store.add("paid", n=number)

    store.client.xtrim(store.keys.stream("paid"), maxlen=4, approximate=False)

    result = store.run("status", "--max-lag", "100")

    assert result.exit_code == 1
    assert result.output.count("5 events of 'paid' were trimmed before 'mailer' got them.") == 2
    (stream,) = as_json(store.run("status", "--json"))["streams"]
    assert (stream["groups"][0]["lag"], stream["groups"][0]["lost"]) == (4, 5)


@pytest.mark.parametrize("option", ["--max-lag", "--max-dead"])
def test_status_with_a_limit_fails_when_there_is_no_stream_to_check(
    store: StreamStore, option: str
) -> None:
    fill(store)

    result = store.run("status", option, "1000", service="mailr")

    assert result.exit_code == 1
    assert "has no stream under the prefix" in result.stderr
    assert "No limit could be checked" in result.stderr


def test_status_treats_a_lost_group_as_more_than_any_lag(store: StreamStore) -> None:
    fill(store)
    store.client.xgroup_destroy(store.keys.stream("user_registered"), "mailer")

    result = store.run("status", "--max-lag", "1000")

    assert result.exit_code == 1
    assert "'mailer' has no group at 'user_registered', so its lag is unknown" in result.stderr


def test_status_without_a_service_or_with_all_shows_every_service(store: StreamStore) -> None:
    fill(store)
    store.group("user_registered", "audit")
    store.add("price_changed")

    alone = store.run("status", "--json")
    everything = [
        store.run("status", "--all", "--json"),
        store.run("status", "--json", service=None),
    ]

    assert [stream["name"] for stream in as_json(alone)["streams"]] == ["user_registered"]
    for result in everything:
        price, user = as_json(result)["streams"]
        assert (price["name"], price["length"], price["groups"]) == ("price_changed", 1, [])
        assert [group["service"] for group in user["groups"]] == ["audit", "mailer"]


def test_status_of_an_app_shows_subscribed_and_published_streams(
    store: StreamStore, make_app: Callable[..., Flask]
) -> None:
    for name in ("user_registered", "mail_sent", "price_changed", "order_paid", "order_sent"):
        store.add(name)
        store.group(name)
        store.group(name, "audit")

    app = make_app(
        EVENTBUS_PUBLISH={"mail_*": "stream", "price_changed": "channel"},
        EVENTBUS_SUBSCRIBE={"user_registered": {}, "order_*": {}, "price_*": "channel"},
    )
    found = as_json(run_in(app, "status", "--json"))

    services = {
        stream["name"]: [group["service"] for group in stream["groups"]]
        for stream in found["streams"]
    }
    assert services == {
        "mail_sent": [],
        "order_paid": ["mailer"],
        "order_sent": ["mailer"],
        "user_registered": ["mailer"],
    }
    assert len(as_json(run_in(app, "status", "--all", "--json"))["streams"]) == 5


def test_status_finds_a_stream_missing_from_the_set_of_names(
    store: StreamStore, make_app: Callable[..., Flask]
) -> None:
    store.add("user_registered")
    store.client.delete(store.keys.names)

    found = as_json(run_in(make_app(EVENTBUS_SUBSCRIBE=["user_registered"]), "status", "--json"))

    assert [stream["name"] for stream in found["streams"]] == ["user_registered"]


def test_status_shows_dead_letters_of_a_service_that_lost_its_group(store: StreamStore) -> None:
    store.give_up("user_registered")

    result = store.run("status")

    assert re.search(r"user_registered +0  mailer +- +- +- +0 +1\n", result.output)


def test_status_says_that_there_are_no_streams(
    store: StreamStore, make_app: Callable[..., Flask]
) -> None:
    every = store.run("status", service=None)
    own = run_in(make_app(), "status")
    store.group("paid", "audit")
    store.client.sadd(store.keys.names, "paid")
    others = store.run("status")

    assert every.output == f"There is no stream under the prefix '{store.prefix}' yet.\n"
    assert own.output == others.output
    assert own.output == (
        f"The service 'mailer' has no stream under the prefix '{store.prefix}' yet. To show all "
        "services, pass --all.\n"
    )
    assert (every.exit_code, own.exit_code, others.exit_code) == (0, 0, 0)


def test_names_in_redis_cannot_send_escape_sequences(
    store: StreamStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.add("user_registered")
    store.group("user_registered", "a\x1b[2Jb\n")
    store.read("user_registered", 1, "a\x1b[2Jb\n", "c\x1b[2J\u202ed-1-a")
    store.client.sadd(store.keys.names, "e\x1b[2J", b"\xff" * 500)

    result = store.run("status", "--all", "--max-lag", "0", "--max-dead", "0")

    assert result.exit_code == 0, result.output
    assert r"a\x1b[2Jb\n" in result.stdout
    assert r"c\x1b[2J\u202ed" in result.stdout
    assert r"is not a valid name of a signal; skipping it: 'e\x1b[2J'" in caplog.text
    assert "\x1b" not in result.output + caplog.text
    assert len(max(caplog.messages, key=len)) < 300


# -- lag ----------------------------------------------------------------------------------


def test_the_lag_at_both_ends_of_a_stream_needs_no_count_of_the_server(
    store: StreamStore,
) -> None:
    ids = [store.add("paid")[0] for _ in range(6)]
    store.group("paid", "behind", "0")
    store.group("paid", "ahead", ids[-1])
    # What redis 7.0 counts of what was trimmed is wrong.
    store.client.xtrim(store.keys.stream("paid"), maxlen=3, approximate=False)

    (stream,) = as_json(store.run("status", "--all", "--json"))["streams"]

    lags = {group["service"]: group["lag"] for group in stream["groups"]}
    assert lags == {"behind": 3, "ahead": 0}


def test_the_lag_is_unknown_if_the_server_cannot_count_it(store: StreamStore) -> None:
    ids = [store.add("paid")[0] for _ in range(6)]
    store.group("paid")
    store.read("paid", 2)
    store.client.xdel(store.keys.stream("paid"), ids[3])

    shown = store.run("status")
    enough = store.run("status", "--max-lag", "4")
    too_much = store.run("status", "--max-lag", "3")

    assert re.search(r"paid +5  mailer +\? ", shown.output)
    assert enough.exit_code == 0, enough.output
    assert too_much.exit_code == 1
    assert too_much.stderr == (
        "Redis does not know the lag of 'mailer' at 'paid'; it may be up to 4, more than 3.\n"
    )


@pytest.mark.parametrize(
    ("position", "counted", "lag"),
    [
        ("0-0", None, 4),
        ("9-0", 7, 0),
        ("5-0", None, None),
        ("5-0", 3, 3),
        ("5-0", 4, None),
        ("5-0", 9, None),
        ("5-0", 0, None),
        ("5-0", -1, None),
    ],
)
def test_an_impossible_lag_is_ignored(position: str, counted: int | None, lag: int | None) -> None:
    group = {"last-delivered-id": position.encode(), "lag": counted}

    assert lag_of(group, 4, (4, 0), (8, 0)) == lag


def test_a_missing_lag_of_redis_6_is_not_an_error() -> None:
    assert lag_of({"last-delivered-id": b"5-0"}, 4, (4, 0), (8, 0)) is None
    assert lag_of({"last-delivered-id": b"5-0"}, 0, None, None) == 0


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (f"web-1.eu-4711-{NODE}", ("web-1.eu", 4711, NODE)),
        ("released", (None, None, None)),
        ("a-b", (None, None, None)),
        ("web-x-y", (None, None, None)),
        (f"web-{'9' * 5000}-n", (None, None, None)),
        (f"-1-{NODE}", (None, None, None)),
        ("", (None, None, None)),
    ],
    ids=["own", "word", "two", "text", "huge", "hostless", "empty"],
)
def test_a_consumer_with_a_foreign_name_has_no_host(
    name: str, parts: tuple[str | None, int | None, str | None]
) -> None:
    found = consumer_of(name, {"idle": 1500, "pending": 2})

    assert (found.host, found.pid, found.node) == parts
    assert (found.name, found.idle_seconds, found.pending) == (name, 1.5, 2)


# -- for monitoring -----------------------------------------------------------------------


def test_status_exits_with_1_and_names_each_exceeded_limit(store: StreamStore) -> None:
    fill(store)

    fine = store.run("status", "--max-lag", "2", "--max-dead", "1")
    bad = store.run("status", "--max-lag", "1", "--max-dead", "0")
    in_json = store.run("status", "--max-lag", "1", "--json")

    assert fine.exit_code == 0, fine.output
    assert fine.stderr == ""
    assert (bad.exit_code, in_json.exit_code) == (1, 1)
    assert bad.stdout.startswith("Stream ")
    assert bad.stderr == (
        "The lag of 'mailer' at 'user_registered' is 2, more than 1.\n"
        "The dead letters of 'mailer' at 'user_registered' are 1, more than 0.\n"
    )
    assert as_json(in_json)["exceeded"] == bad.stderr.splitlines()[:1]


@pytest.mark.parametrize("words", [["--max-lag", "-1"], ["--max-dead", "x"], ["--interval", "0"]])
def test_a_usage_error_of_status_exits_with_2(store: StreamStore, words: list[str]) -> None:
    assert store.run("status", *words).exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["dead", "list"],
        ["dead", "purge", "--yes"],
        ["seek", "paid", "--to", "new", "--yes"],
    ],
    ids=" ".join,
)
def test_an_unreachable_redis_is_reported_in_one_line_without_the_password(
    words: list[str],
) -> None:
    url = f"redis://ada:s3cret@127.0.0.1:{free_port()}/0"

    result = CliRunner().invoke(main, ["--url", url, "--service", "mailer", *words])

    assert result.exit_code == 1
    assert result.output.startswith("Error: Redis at redis://ada:***@127.0.0.1:")
    assert result.output.endswith("Start it there, or correct 'EVENTBUS_URL'.\n")
    assert "s3cret" not in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["status"], "+smembers"),
        (["dead", "list"], "+smembers"),
        (["dead", "show", "--signal", "paid"], "+smembers"),
        (["seek", "paid", "--to", "new", "--yes"], "+xinfo|groups"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_error_names_a_missing_right(
    redis_server: RedisServer, words: list[str], refused: str
) -> None:
    user = ["ACL", "SETUSER", "ada", "on", ">pw", "~eb:*"]
    settings = ["--prefix", "eb", "--service", "mailer", *words]
    url = redis_server.url.replace("127", "ada:pw@127", 1)

    redis_server.client.execute_command(*user)
    # To choose a database is the only right without which nobody connects.
    elsewhere = url.removesuffix("/0") + "/1"
    outside = CliRunner().invoke(main, ["--url", elsewhere, *settings])
    result = CliRunner().invoke(main, ["--url", url, *settings])

    assert (outside.exit_code, result.exit_code) == (1, 1)
    assert "does not let this user connect" in outside.output
    assert "Grant it the right to connect in the ACL." in outside.output
    assert "to this user" in result.output
    assert f"Grant the user in the ACL: '{refused} ~eb:*'." in result.output


def test_a_wrong_password_is_reported(redis_server: RedisServer) -> None:
    url = redis_server.url.replace("127", "ada:pw@127", 1)

    result = CliRunner().invoke(main, ["--url", url, "status"])

    assert result.exit_code == 1
    assert "does not let this user in" in result.output
    assert "Correct the user and the password in 'EVENTBUS_URL'." in result.output


@pytest.mark.parametrize(
    "words", [["routes"], ["publish", "price_changed"]], ids=["routes", "publish"]
)
def test_a_wrong_password_has_its_remedy(redis_server: RedisServer, words: list[str]) -> None:
    url = redis_server.url.replace("127", "ada:pw@127", 1)

    result = CliRunner().invoke(main, ["--url", url, *words])

    assert result.exit_code == 1
    assert "Correct the user and the password in 'EVENTBUS_URL'." in result.output


def test_a_key_of_another_type_is_reported(store: StreamStore) -> None:
    store.client.set(store.keys.names, "mine")

    result = store.run("status")

    assert result.exit_code == 1
    assert "Another program stores a different type under" in result.output
    assert f"'{store.keys.names}'" in result.output


@pytest.mark.parametrize("kind", ["stream", "retry", "dead", "dropped"])
@pytest.mark.parametrize("words", [("status",), ("status", "--all")], ids=" ".join)
def test_one_key_of_another_type_is_named_and_the_rest_is_shown(
    store: StreamStore, words: tuple[str, ...], kind: str
) -> None:
    keys = store.keys
    store.add("fine")
    store.group("fine")
    store.add("paid")
    store.group("paid")
    key = {
        "stream": keys.stream("paid"),
        "retry": keys.retry("paid", "mailer"),
        "dead": keys.dead("paid", "mailer"),
        "dropped": keys.dead_dropped("paid", "mailer"),
    }[kind]
    store.client.delete(key)
    store.client.sadd(key, "mine")

    shown = store.run(*words)
    limited = store.run(*words, "--max-dead", "0")
    as_json = store.run(*words, "--json")

    assert shown.exit_code == 0, shown.output
    assert "fine" in shown.output
    assert f"Another program stores a different type under '{key}'." in shown.output
    assert shown.output.count("WRONGTYPE") == 1
    # A key that cannot be read must not pass as one without dead letters.
    assert limited.exit_code == 1
    assert key in limited.stderr
    streams = {stream["name"]: stream for stream in json.loads(as_json.output)["streams"]}
    assert key in streams["paid"]["unreadable"][0]
    assert streams["fine"]["unreadable"] == []
    assert streams["fine"]["groups"][0]["lag"] == 1


@pytest.mark.parametrize(
    "words",
    [["status"], ["dead", "list"], ["seek", "paid", "--to", "new"]],
    ids=" ".join,
)
def test_in_a_cluster_the_stream_commands_say_that_there_are_no_streams(words: list[str]) -> None:
    url = "redis+cluster://127.0.0.1:7000"

    result = CliRunner().invoke(main, ["--url", url, "--service", "mailer", *words])

    assert result.exit_code == 1
    assert "'EVENTBUS_URL' names a Redis Cluster, and this version has no streams there" in (
        result.output
    )


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["dead", "list"],
        ["seek", "paid", "--to", "new", "--yes"],
        ["replay", "paid", "--from", "1h", "--receivers", "reactions"],
    ],
    ids=lambda words: words[0],
)
def test_no_stream_command_loads_flask_without_an_app(
    store: StreamStore, tmp_path: Path, words: list[str]
) -> None:
    store.add("paid")
    store.group("paid")
    (tmp_path / "reactions.py").write_text("def register(bus):\n    bus.on('paid')(print)\n")
    settings = ["--url", store.url, "--prefix", store.prefix, "--service", "mailer", *words]
    program = f"""
import runpy, sys
sys.argv[1:] = {settings!r}
try:
    runpy.run_module("flask_eventbus", run_name="__main__")
finally:
    print("loaded", *sorted(sys.modules))
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )

    loaded = outcome.stdout.partition("loaded")[2].split()
    assert outcome.returncode == 0, outcome.stderr
    assert "flask_eventbus.admin.streams" in loaded
    assert {name.partition(".")[0] for name in loaded}.isdisjoint({"flask", "werkzeug"})


# -- watching -----------------------------------------------------------------------------


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start `status --watch` with its output in a file."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(store: StreamStore, *words: str, out: int) -> subprocess.Popen[bytes]:
        settings = ["--url", store.url, "--prefix", store.prefix, "status", "--watch", *words]
        process = subprocess.Popen(
            [sys.executable, "-m", "flask_eventbus", *settings, "--interval", "0.1"],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        )
        processes.append(process)
        return process

    yield start

    for process in processes:
        process.kill()
        process.wait()


def test_watch_survives_an_outage_and_ctrl_c_exits_with_0(
    redis_server: RedisServer, tmp_path: Path, watch: Callable[..., subprocess.Popen[bytes]]
) -> None:
    store = StreamStore(redis_server)
    store.add("paid")
    log = tmp_path / "out"

    with log.open("wb") as out:
        process = watch(store, out=out.fileno())

    wait_until(lambda: log.read_text().count("paid  ") > 1, what="it is shown twice")
    redis_server.kill()
    wait_until(lambda: "cannot be used" in log.read_text(), what="it says that Redis is away")
    redis_server.start()
    store.add("sold")
    wait_until(lambda: "sold  " in log.read_text(), what="it is shown again")
    process.send_signal(signal.SIGINT)

    assert process.wait(20) == 0
    assert "Traceback" not in log.read_text()


def test_watch_in_json_prints_one_object_per_line(
    store: StreamStore, tmp_path: Path, watch: Callable[..., subprocess.Popen[bytes]]
) -> None:
    store.add("paid")
    log = tmp_path / "out"

    with log.open("wb") as out:
        process = watch(store, "--json", out=out.fileno())

    wait_until(lambda: log.read_text().count("\n") > 1, what="two lines")
    process.send_signal(signal.SIGINT)

    assert process.wait(20) == 0
    for line in log.read_text().splitlines():
        assert json.loads(line)["streams"][0]["name"] == "paid"


def test_tables_are_as_wide_as_the_terminal(
    store: StreamStore, watch: Callable[..., subprocess.Popen[bytes]]
) -> None:
    name = "a_name_of_a_signal/that_goes_on_and_on/until_it_is_wider_than_half_a_terminal"
    service = "a-service-with-a-name-that-is-as-long-as-one-may-be.eu-west-1"
    ids = [store.add(name)[0] for _ in range(3)]
    store.group(name, service)
    store.read(name, len(ids), service, f"{'host' * 10}-4711-{NODE}")
    ours, theirs = pty.openpty()

    process = watch(store, "--max-lag", "0", out=theirs)
    os.close(theirs)
    shown = b""

    while shown.count(b"Idle") < 2:
        shown += os.read(ours, 65536)

    process.send_signal(signal.SIGINT)
    os.close(ours)
    lines = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", shown.decode()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("a_name") and "..." in line for line in lines)


# -- the page -----------------------------------------------------------------------------

PAGES = ("commands", "status", "stream-commands")
PAGE = "\n".join((ROOT / "docs" / f"{name}.md").read_text() for name in PAGES)

#: What differs from run to run: ids, times, ages, and how wide that makes a column.
_VARIES = [
    (re.compile(r"\b\d{13}-\d+"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "TIME"),
    (re.compile(r"\b\d+ (s|min|h|d)\b"), "AGE"),
    (re.compile(r" {2,}"), "  "),
]


def examples(heading: str) -> list[tuple[list[str], str]]:
    """The commands that a section of the page shows with what they print; only as text."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [
        (shlex.split(example.partition("\n")[0].partition(" | ")[0]), example.partition("\n")[2])
        for text in re.findall(r"^```text\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        for example in text.removeprefix("$ ").split("\n$ ")
    ]


def normalized(text: str) -> str:
    """The text without what varies."""
    for pattern, word in _VARIES:
        text = pattern.sub(word, text)

    return text.strip()


def shop_store(server: RedisServer) -> StreamStore:
    """The state that the page shows."""
    store = StreamStore(server, "eventbus")
    now = int(time.time() * 1000)

    for number, letter in enumerate("xyabc"):
        email = f"{letter}@example.com"
        # The first two are too old for the replay of the page.
        id = f"{now - (10 - 9 * (number > 1)) * 3_600_000 + number}-0"
        store.add("user_registered", id=id, user_id=number % 3, email=email)

    store.group("user_registered", "shop")
    read = store.read("user_registered", 3, "shop")
    store.client.xack(store.keys.stream("user_registered"), "shop", read[0])
    store.give_up(
        "user_registered",
        service="shop",
        id="1763848800000-0",
        entry="1763848690000-0",
        receiver="shop.greet",
        error="ConnectionRefusedError: [Errno 111] Connection refused",
        traceback='Traceback (most recent call last):\n  File "shop.py", line 10, in greet\n',
        event_id=f"{NODE}-1",
    )
    store.client.zadd(store.keys.retry("user_registered", "shop"), {b"one": 1})
    return store


@pytest.fixture
def shop(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ScriptInfo]:
    """The app of the page, on a server with the state that the page shows."""
    shop_store(redis_server)
    text = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "shop.py").write_text(text.replace("redis://localhost:6379/0", redis_server.url))
    monkeypatch.chdir(tmp_path)
    yield ScriptInfo(app_import_path="shop")
    sys.modules.pop("shop", None)


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (words, output)
        for heading in ("status", "dead", "replay", "seek")
        for words, output in examples(heading)
        if output and "retry" not in words
    ],
    ids=lambda value: "_".join(value[4:]) if isinstance(value, list) else "",
)
def test_the_page_shows_the_output_of_the_commands(
    shop: ScriptInfo, words: list[str], output: str
) -> None:
    answer = "y\n" if "[y/N]" in output else ""

    result = CliRunner().invoke(flask_commands, words[4:], obj=shop, input=answer)

    assert result.exit_code == 0, result.output
    assert normalized(result.output) == normalized(output)


def test_the_other_examples_of_the_page_are_well_formed() -> None:
    for words, _ in [*examples("status"), *examples("dead")]:
        name, *rest = words[4:]
        command: Any = flask_commands.commands[name]

        with click.Context(flask_commands) as parent:
            while isinstance(command, click.Group):
                command, rest = command.commands[rest[0]], rest[1:]

            assert command.make_context(name, [*rest], parent=parent).params


@pytest.mark.parametrize("name", ["list", "show", "retry", "drop", "purge"])
def test_the_page_has_every_option_of_dead(name: str) -> None:
    section = PAGE.partition("\n## dead\n")[2].partition("\n## ")[0]
    command: Any = flask_commands.commands["dead"]

    assert f"| `dead {name}" in section
    for option in command.commands[name].params:
        if option.param_type_name == "option":
            assert f"`{option.opts[0]}" in section, option.opts
