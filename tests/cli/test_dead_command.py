"""Tests of `dead`: it lists, shows, retries and deletes dead letters."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from click.testing import Result
from flask import Flask
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, EventBus
from flask_eventbus.admin.dead_letters import Choice, DeadLetters, Letter
from flask_eventbus.admin.streams import StreamAccess
from flask_eventbus.cli.app import flask_commands
from flask_eventbus.cli.output import as_json
from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.records import RetryRecord
from flask_eventbus.config import Config
from flask_eventbus.streams.outcomes import readable

HOUR = 3_600_000

#: How the commands without an app are called.
PROGRAM = "python -m flask_eventbus"

SUBCOMMANDS = ("list", "show", "retry", "drop", "purge")


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams of this test alone."""
    return StreamStore(shared_redis)


def ids_of(result: Result) -> list[str]:
    """The ids that `list --json` printed."""
    assert result.exit_code == 0, result.output
    return [json.loads(line)["id"] for line in result.stdout.splitlines()]


def ago(milliseconds: int, number: int = 0) -> str:
    """The id of something that was given up so long ago."""
    return f"{int(time.time() * 1000) - milliseconds}-{number}"


# -- list ---------------------------------------------------------------------------------


def test_dead_list_shows_two_lines_per_letter_and_a_total(store: StreamStore) -> None:
    first, _ = store.give_up("user_registered", id=ago(3 * HOUR))
    second = store.give_up_unread("user_registered", id=ago(5 * 60_000))

    result = store.run("dead", "list")

    assert result.exit_code == 0, result.output
    assert result.output == (
        f"{first}  user_registered  mailer.receivers.send_welcome  3 h ago\n"
        "  retries: SMTPServerDisconnected: Connection unexpectedly closed\n"
        f"{second}  user_registered  no receiver  5 min ago\n"
        "  undecodable: DecodeError: It is not msgpack\n"
        "2 dead letters.\n"
    )


def test_dead_list_in_json_has_every_field(store: StreamStore) -> None:
    found, letter = store.give_up("user_registered", first=1_700_000_000_000)

    (line,) = store.run("dead", "list", "--json").stdout.splitlines()

    shown = json.loads(line)
    assert shown.pop("given_up")[:4] == shown.pop("last_failed")[:4]
    assert len(shown.pop("fields")["event"]) > 100
    assert shown == {
        "id": found,
        "signal": "user_registered",
        "service": "mailer",
        "reason": "retries",
        "receiver": "mailer.receivers.send_welcome",
        "attempts": 6,
        "first_failed": "2023-11-14T22:13:20.000+00:00",
        "event_id": letter.event_id,
        "source": "accounts",
        "entry": "1763848800000-0",
        "error": letter.error,
        "traceback": letter.traceback,
        "payload": {"user_id": 7},
        "payload_cut": None,
    }


def test_unknown_fields_are_null_in_json(store: StreamStore) -> None:
    store.give_up_unread("user_registered")

    shown = json.loads(store.run("dead", "list", "--json").stdout)

    assert shown["fields"] == {"event": "/wBqdW5r", "reason": "aGk="}
    for name in (
        "receiver",
        "event_id",
        "source",
        "first_failed",
        "last_failed",
        "payload",
        "payload_cut",
    ):
        assert shown[name] is None


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], "abcde"),
        (["--signal", "user_registered"], "abc"),
        (["--signal", "order_*", "--signal", "user_registered"], "abcde"),
        (["--signal", "nothing_*"], ""),
        (["--receiver", "send_welcome"], "ad"),
        (["--receiver", "mailer.receivers.send_welcome"], "ad"),
        (["--receiver", "welcome"], ""),
        (["--receiver", "count", "--receiver", "send_welcome"], "abd"),
        (["--reason", "rejected"], "be"),
        (["--reason", "rejected", "--reason", "undecodable"], "bce"),
        (["--older-than", "1d"], "ae"),
        (["--newer-than", "1d"], "bcd"),
        (["--older-than", "1h", "--newer-than", "2d"], "bc"),
        (["--older-than", "30s", "--receiver", "send_welcome"], "ad"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_options_of_dead_list_filter(store: StreamStore, words: list[str], chosen: str) -> None:
    days = 24 * HOUR
    count = "mailer.receivers.count"
    facts: dict[str, Any] = {"receiver": count, "reason": "rejected"}
    known = {
        store.give_up("user_registered", id=ago(3 * days))[0]: "a",
        store.give_up("user_registered", id=ago(5 * HOUR), **facts)[0]: "b",
        store.give_up_unread("user_registered", id=ago(4 * HOUR)): "c",
        store.give_up("order_paid", id=ago(60_000))[0]: "d",
    }
    other = {"receiver": "mailer.other", "reason": "rejected"}
    known[store.give_up("order_sent", id=ago(9 * days), **other)[0]] = "e"
    store.give_up("user_registered", service="audit")

    found = ids_of(store.run("dead", "list", "--json", *words))

    assert "".join(sorted(known[each] for each in found)) == chosen


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def test_a_payload_is_the_same_json_in_dead_list_dead_show_and_tail(
    store: StreamStore,
) -> None:
    values: dict[str, Any] = {
        "number": float("nan"),
        "most": float("-inf"),
        "members": {1, 2},
        "body": b"\xff",
        "moment": datetime(2026, 1, 2, 3, 4),
        "price": Decimal("1.10"),
        "nested": [{"inner": frozenset({b"a"})}],
    }
    event = store.event("tick", **values)
    text = readable(event)
    store.give_up("tick", payload=text)

    tailed = json.loads(as_json(event), parse_constant=_refuse)["data"]
    listed = json.loads(store.run("dead", "list", "--json").output, parse_constant=_refuse)

    assert tailed == {
        "number": "nan",
        "most": "-inf",
        "members": [1, 2],
        "body": "/w==",
        "moment": "2026-01-02T03:04:00",
        "price": "1.10",
        "nested": [{"inner": ["YQ=="]}],
    }
    assert listed["payload"] == tailed
    assert text in store.run("dead", "show", "--all").output


def test_a_truncated_payload_that_decodes_is_complete_in_json_and_marked_in_show(
    store: StreamStore,
) -> None:
    event = store.event("tick", text="x" * 5_000, members={1, 2})
    store.give_up("tick", payload=readable(event), fields={b"event": Codec().encode(event)})

    listed = json.loads(store.run("dead", "list", "--json").output)
    shown = store.run("dead", "show", "--all").output

    assert listed["payload"] == json.loads(as_json(event))["data"]
    assert listed["payload_cut"] is None
    assert f"{readable(event)} ... (cut; see 'dead list --json')" in shown


def test_a_truncated_payload_that_does_not_decode_is_marked_in_json(
    store: StreamStore,
) -> None:
    cut = readable(store.event("tick", text="x" * 5_000))
    # An event of a type that only the app has registered, for example.
    store.give_up("tick", payload=cut, fields={b"event": b"\xc7\x00\x05"})

    listed = json.loads(store.run("dead", "list", "--json").output)

    assert listed["payload"] is None
    assert listed["payload_cut"] == cut


def test_a_complete_payload_is_not_marked_as_truncated(store: StreamStore) -> None:
    store.give_up("tick", payload=readable(store.event("tick", text="x" * 3_000)))

    assert "(cut" not in store.run("dead", "show", "--all").output


def test_nan_in_an_old_dead_letter_is_printed_as_text(
    store: StreamStore,
) -> None:
    store.give_up("tick", payload='{"a": NaN, "b": -Infinity, "c": 1e999}')

    listed = json.loads(store.run("dead", "list", "--json").output, parse_constant=_refuse)

    assert listed["payload"] == {"a": "nan", "b": "-inf", "c": "inf"}


def test_a_dead_letter_can_be_named_by_its_id_or_its_events_id(store: StreamStore) -> None:
    first, _ = store.give_up("user_registered", id="1-0")
    second, letter = store.give_up("user_registered", id="2-0")
    third, _ = store.give_up("order_paid", id="3-0")

    assert ids_of(store.run("dead", "list", "--json", first)) == [first]
    assert ids_of(store.run("dead", "list", "--json", letter.event_id)) == [second]
    assert ids_of(store.run("dead", "list", "--json", first, third)) == [third, first]


def test_a_named_signal_is_examined_even_if_the_set_of_names_lacks_it(
    store: StreamStore,
) -> None:
    found, _ = store.give_up("user_registered")
    store.client.delete(store.keys.names)

    assert ids_of(store.run("dead", "list", "--json")) == []
    named = store.run("dead", "list", "--json", "--signal", "user_registered")
    assert ids_of(named) == [found]


def test_many_dead_letters_are_read_page_by_page(store: StreamStore) -> None:
    written = [store.give_up("user_registered")[0] for _ in range(250)]

    assert ids_of(store.run("dead", "list", "--json")) == written
    assert store.run("dead", "list").output.endswith("\n250 dead letters.\n")


def test_the_first_dead_letters_are_shown_without_reading_the_others(store: StreamStore) -> None:
    written = [store.give_up("user_registered", id=f"{n}-0")[0] for n in range(1, 301)]

    with commands_of(store) as asked:
        listed = store.run("dead", "list", "--limit", "20")
        assert ids_of(store.run("dead", "list", "--limit", "20", "--json")) == written[:20]

    assert listed.output.count("user_registered") == 20
    assert listed.output.endswith("\nThe first 20 dead letters; there are more.\n")
    assert asked("XRANGE") == 2
    assert store.run("dead", "list", "--limit", "300").output.endswith("\n300 dead letters.\n")


@pytest.mark.parametrize("words", [("list", "--json"), ("show",), ("drop", "--yes")])
def test_a_dead_letter_named_by_its_id_is_read_without_the_others(
    store: StreamStore, words: tuple[str, ...]
) -> None:
    for n in range(1, 301):
        store.give_up("user_registered", id=f"{n}-0")

    with commands_of(store) as asked:
        result = store.run("dead", *words, "250-0")

    assert result.exit_code == 0, result.output
    assert asked("XRANGE") == 1


def test_the_age_filter_applies_to_a_named_dead_letter_too(store: StreamStore) -> None:
    old, _ = store.give_up("user_registered", id=ago(3 * HOUR))

    assert ids_of(store.run("dead", "list", "--json", "--newer-than", "4h", old)) == [old]
    assert ids_of(store.run("dead", "list", "--json", "--newer-than", "2h", old)) == []


@contextmanager
def commands_of(store: StreamStore) -> Iterator[Callable[[str], int]]:
    """Count how often a command is called meanwhile: by what Redis counts."""

    def calls(command: str) -> int:
        found = store.client.info("commandstats").get(f"cmdstat_{command.lower()}", {})
        return int(found.get("calls", 0))

    before = {"XRANGE": calls("XRANGE")}
    yield lambda command: calls(command) - before[command]


def test_with_an_app_the_dead_letters_are_those_of_its_service(store: StreamStore) -> None:
    app = Flask("mailer")
    app.config.update(
        EVENTBUS_SERVICE="mailer", EVENTBUS_URL=store.url, EVENTBUS_PREFIX=store.prefix
    )
    EventBus().init_app(app)
    found, _ = store.give_up("user_registered")
    store.give_up("user_registered", service="audit")

    result = app.test_cli_runner().invoke(flask_commands, ["dead", "list", "--json"])

    assert ids_of(result) == [found]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_dead_commands_require_a_service(store: StreamStore, name: str) -> None:
    words = [] if name in ("list", "purge") else ["1-0"]

    result = store.run("dead", name, *words, service=None)

    assert result.exit_code == 1
    assert result.output == (
        "Error: No service given. Pass '--service NAME' before the command, or set "
        "'EVENTBUS_SERVICE' in the environment.\n"
    )


@pytest.mark.parametrize(
    "words", [["list"], ["show", "--all"], ["retry", "--all"], ["drop", "--all"], ["purge"]]
)
def test_the_dead_commands_say_when_there_are_no_dead_letters(
    store: StreamStore, words: list[str]
) -> None:
    result = store.run("dead", *words)

    assert result.exit_code == 0
    assert result.output == "'mailer' has no dead letters.\n"


def test_dead_list_says_when_no_dead_letter_matches(store: StreamStore) -> None:
    result = store.run("dead", "list", "--reason", "killed")

    assert result.output == "'mailer' has no such dead letters.\n"


# -- show ---------------------------------------------------------------------------------


def test_dead_show_prints_the_payload_the_error_and_the_traceback(store: StreamStore) -> None:
    found, letter = store.give_up("user_registered", traceback="Traceback:\n  in send\n\tx = 1\n")

    lines = store.run("dead", "show", found).output.splitlines()

    assert lines[0] == f"{found}  user_registered"
    assert "  reason     retries: every attempt failed" in lines
    assert "  receiver   mailer.receivers.send_welcome" in lines
    assert f"  event      {letter.event_id} from accounts" in lines
    assert "  error      SMTPServerDisconnected: Connection unexpectedly closed" in lines
    assert '  payload    {"user_id": 7}' in lines
    assert any(line.startswith("  attempts   6, 20") for line in lines)
    assert any(line.startswith("  entry      1763848800000-0, added 2025-11-2") for line in lines)
    assert lines[-3:] == ["    Traceback:", "      in send", r"    \tx = 1"]


def test_dead_show_prints_the_fields_of_an_undecodable_entry(store: StreamStore) -> None:
    found = store.give_up_unread("user_registered")

    lines = store.run("dead", "show", found).output.splitlines()

    assert r"  event      \xff\x00junk" in lines
    assert "  reason     hi" in lines
    assert "  receiver   -" in lines


HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202e\r\n\x00"


@pytest.mark.parametrize("words", [["list"], ["show", "--all"], ["retry", "--all", "--wait", "0"]])
def test_a_dead_letter_cannot_send_escape_sequences(store: StreamStore, words: list[str]) -> None:
    facts = dict.fromkeys(
        ("reason", "entry", "event_id", "source", "payload", "receiver", "error", "traceback"),
        HOSTILE,
    )
    fields = {HOSTILE.encode(): HOSTILE.encode(), b"event": HOSTILE.encode()}
    store.give_up("user_registered", **facts, fields=fields)

    result = store.run("dead", *words)

    printed = result.output.replace("\n", "")
    assert r"\x1b[2J" in printed
    assert printed.isprintable(), printed


@pytest.mark.parametrize(
    "fields",
    [
        {"nothing": "known"},
        {"attempts": "9" * 5_000, "event": "x"},
        {"attempts": "-1", "first_failed": "yesterday", "last_failed": "9999-12-31T23:59:59-23:59"},
        {"entry": f"{2**70}-0", "first_failed": "0001-01-01T00:00:00", "payload": "[" * 20_000},
        {
            "reason": b"\xff\xfe",
            "receiver": b"\xff",
            "error": b"\xff",
            "entry": b"\xff",
            b"\xff": 1,
        },
        {"event": ""},
    ],
    ids=["foreign", "attempts", "times", "far", "bytes", "empty"],
)
@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["show", "--all"]], ids=" ".join)
def test_the_readable_part_of_an_edited_dead_letter_is_shown(
    store: StreamStore, words: list[str], fields: dict[Any, Any]
) -> None:
    store.client.sadd(store.keys.names, "paid")
    store.client.xadd(store.keys.dead("paid", "mailer"), fields)
    store.give_up("paid", error="the next one")

    result = store.run("dead", *words)

    assert result.exit_code == 0, (result.output, result.exception)
    assert "the next one" in result.output


def test_an_id_from_the_far_future_is_shown(store: StreamStore) -> None:
    found, _ = store.give_up("paid", id=f"{2**63}-1")

    for words in (["list"], ["list", "--json"], ["show", found]):
        result = store.run("dead", *words)
        assert result.exit_code == 0, result.output
        assert found in result.output


# -- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["show", "retry", "drop"])
def test_the_dead_commands_require_a_selection(store: StreamStore, name: str) -> None:
    nothing = store.run("dead", name)
    both = store.run("dead", name, "--all", "1-0")

    assert (nothing.exit_code, both.exit_code) == (2, 2)
    assert "No dead letters selected. Pass ids, a filter" in nothing.output
    assert "--all cannot be combined with ids or filters." in both.output


@pytest.mark.parametrize("name", ["show", "retry", "drop"])
def test_a_missing_dead_letter_is_reported_and_nothing_is_done(
    store: StreamStore, name: str
) -> None:
    found, _ = store.give_up("user_registered")
    yes = ["--yes"] if name == "drop" else []

    result = store.run("dead", name, found, "12-0", "\x1b[2J", *yes)

    assert result.exit_code == 1
    assert "'mailer' has no such dead letter: '12-0'." in result.stderr
    assert "\x1b" not in result.output
    assert f"Nothing was done. To list the dead letters: {PROGRAM} dead list" in result.stderr
    assert store.dead("user_registered") == [found]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--older-than", "7"], "'7' is not an age. Write a number and a unit: '30s', '15m',"),
        (["--newer-than", "-1d"], "'-1d' is not an age."),
        (["--signal", "a b"], "'a b' cannot be a signal's name"),
        (["--reason", "bad"], "'bad' is not one of 'retries', 'rejected', 'killed', 'gone'"),
    ],
    ids=["age", "sign", "signal", "reason"],
)
@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_a_usage_error_of_dead_exits_with_2(
    store: StreamStore, name: str, words: list[str], text: str
) -> None:
    result = store.run("dead", name, *words)

    assert result.exit_code == 2
    assert text in " ".join(result.output.split())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_dead_command_documents_examples_exit_codes_and_options(
    store: StreamStore, name: str
) -> None:
    text = store.run("dead", name, "--help").output

    assert "Examples:\n\n    flask eventbus dead" in text
    assert "Exit codes: 0" in text
    assert max(map(len, text.splitlines())) <= 80


# -- drop and purge -----------------------------------------------------------------------


def test_dead_drop_deletes_the_selected_letters_after_a_prompt(store: StreamStore) -> None:
    first, _ = store.give_up("user_registered", id="1-0")
    second, letter = store.give_up("user_registered", id="2-0")
    third, _ = store.give_up("order_paid", id="3-0")

    refused = store.run("dead", "drop", first, input="n\n")
    left = store.dead("user_registered")
    done = store.run("dead", "drop", letter.event_id, third, input="y\n")

    assert refused.exit_code == 1
    assert "Delete 1 dead letter of 'mailer' for good? [y/N]" in refused.output
    assert left == [first, second]
    assert done.exit_code == 0, done.output
    assert done.output.endswith("\nDeleted 2 dead letters.\n")
    assert (store.dead("user_registered"), store.dead("order_paid")) == ([first], [])


@pytest.mark.parametrize(
    "words", [["show"], ["retry", "--wait", "0"], ["drop", "--yes"]], ids=" ".join
)
def test_an_id_that_two_signals_share_is_ambiguous(store: StreamStore, words: list[str]) -> None:
    store.give_up("user_registered", id="1-0")
    store.give_up("order_paid", id="1-0")

    result = store.run("dead", *words, "1-0")
    reported = store.run("dead", *words, "1-0", "--signal", "order_paid")

    assert result.exit_code == 1
    assert result.output == (
        "Error: 1-0 is the id of several dead letters: of order_paid, user_registered. Select one "
        "with --signal.\n"
    )
    assert (
        reported.output.count("order_paid") + reported.output.count("Deleted 1 dead letter.") == 1
    )
    assert store.dead("user_registered") == ["1-0"]


def test_without_an_answer_to_the_prompt_nothing_is_deleted(store: StreamStore) -> None:
    found, _ = store.give_up("user_registered")

    result = store.run("dead", "purge", input="")

    assert result.exit_code == 1
    assert store.dead("user_registered") == [found]


def test_dead_purge_deletes_old_or_all_letters(store: StreamStore) -> None:
    store.give_up("user_registered", id=ago(25 * HOUR))
    young, _ = store.give_up("user_registered", id=ago(23 * HOUR))
    theirs, _ = store.give_up("user_registered", service="audit")

    old = store.run("dead", "purge", "--older-than", "1d", "--yes")
    left = store.dead("user_registered")
    rest = store.run("dead", "purge", "--yes")

    assert (old.exit_code, rest.exit_code) == (0, 0)
    assert old.output == rest.output == "Deleted 1 dead letter.\n"
    assert left == [young]
    assert store.dead("user_registered") == []
    assert store.dead("user_registered", "audit") == [theirs]


def test_ages_of_dead_letters_use_the_clock_of_redis(
    store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = store.give_up("user_registered", id=ago(25 * HOUR))
    young, _ = store.give_up("user_registered", id=ago(23 * HOUR))
    here = time.time
    monkeypatch.setattr(time, "time", lambda: here() + 2 * HOUR / 1000)

    listed = store.run("dead", "list", "--newer-than", "1d")
    purged = store.run("dead", "purge", "--older-than", "1d", "--yes")

    assert young in listed.output
    assert old not in listed.output
    assert purged.output == "Deleted 1 dead letter.\n"
    assert store.dead("user_registered") == [young]


def test_dead_purge_deletes_hundreds_of_letters(store: StreamStore) -> None:
    for _ in range(250):
        store.give_up("user_registered")

    assert store.run("dead", "purge", "--yes").output == "Deleted 250 dead letters.\n"
    assert store.dead("user_registered") == []


# -- retry --------------------------------------------------------------------------------


@contextmanager
def worker(
    store: StreamStore, act: Callable[[RetryRecord], RetryRecord | str | None]
) -> Iterator[None]:
    """A worker of 'mailer' at the stream of 'paid': what ``act`` says becomes of a retry.

    A record is the next attempt, a text the error of a dead letter, ``None`` that it is handled.
    """
    key = store.keys.retry("paid", "mailer")
    ended = threading.Event()

    def settle(member: bytes, record: RetryRecord) -> None:
        outcome = act(record)
        pipeline = store.client.pipeline()
        pipeline.zrem(key, member)

        if isinstance(outcome, RetryRecord):
            pipeline.zadd(key, {outcome.packed(): (time.time() + 30) * 1000})
        elif outcome is not None:
            letter = {"receiver": record.receiver, "entry": record.entry, "error": outcome}
            pipeline.xadd(store.keys.dead("paid", "mailer"), letter)

        pipeline.execute()

    def run() -> None:
        while not ended.wait(0.01):
            members = store.client.zrange(key, 0, -1)

            for member in members:
                if not (record := RetryRecord.unpacked(member)).attempts:
                    settle(member, record)

    thread = threading.Thread(target=run)
    thread.start()

    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_dead_retry_gives_the_failed_receiver_all_its_attempts(store: StreamStore) -> None:
    found, letter = store.give_up("paid")
    before = time.time() * 1000

    result = store.run("dead", "retry", found, "--wait", "0.2")

    ((record, due),) = store.retries("paid")
    assert store.dead("paid") == []
    assert before - 1 <= due <= time.time() * 1000
    assert before - 1 <= record.last <= time.time() * 1000
    assert record == RetryRecord(
        entry=letter.entry,
        event=letter.fields[b"event"],
        receiver=letter.receiver,
        attempts=0,
        first=letter.first,
        last=record.last,
        error=letter.error,
        traceback=letter.traceback,
    )
    assert result.exit_code == 1
    assert result.output == (
        f"{found} paid mailer.receivers.send_welcome: put back, but no worker of 'mailer' took it "
        f"within 0.2 s. Start a worker: {PROGRAM} run\n"
    )


def test_dead_retry_reports_that_all_were_handled_and_exits_with_0(store: StreamStore) -> None:
    first, _ = store.give_up("paid")
    second, _ = store.give_up("paid", receiver="mailer.receivers.count")

    with worker(store, lambda record: None):
        result = store.run("dead", "retry", "--all")

    assert result.exit_code == 0, result.output
    assert sorted(result.output.splitlines()) == [
        f"{first} paid mailer.receivers.send_welcome: handled.",
        f"{second} paid mailer.receivers.count: handled.",
    ]
    assert store.dead("paid") == []


def test_dead_retry_reports_the_outcome_of_each_letter(store: StreamStore) -> None:
    names = ("a.handled", "b.fails", "c.rejected", "d.slow")
    found = [store.give_up("paid", receiver=name)[0] for name in names]
    unread = store.give_up_unread("paid")

    def act(record: RetryRecord) -> RetryRecord | str | None:
        if record.receiver == "a.handled":
            return None

        if record.receiver == "c.rejected":
            return "Reject: no \x1b[2J such user"

        slow = record.receiver == "d.slow"
        error = record.error if slow else "OSError: again"
        return replace(record, attempts=1, running=slow, error=error)

    with worker(store, act):
        result = store.run("dead", "retry", "--all", "--wait", "3")

    assert result.exit_code == 1
    # The command may print it a while after the worker has set it.
    lines = re.sub(r"in [12]\d s", "in 30 s", result.output).splitlines()
    assert sorted(lines) == sorted(
        [
            f"{found[0]} paid a.handled: handled.",
            f"{found[1]} paid b.fails: failed again, next attempt in 30 s: OSError: again",
            rf"{found[2]} paid c.rejected: a dead letter again: Reject: no \x1b[2J such user",
            f"{found[3]} paid d.slow: still running after 3 s.",
            f"{unread} paid: cannot be retried, it could not be decoded, and no receiver "
            "ran for it. Drop it.",
        ]
    )
    assert unread in store.dead("paid")


def test_dead_retry_does_not_mistake_an_older_letter_for_a_new_failure(
    store: StreamStore,
) -> None:
    first, _ = store.give_up("paid")
    second, _ = store.give_up("paid")

    with worker(store, lambda record: None):
        result = store.run("dead", "retry", first)

    assert result.exit_code == 0, result.output
    assert store.dead("paid") == [second]


def test_dead_retry_names_the_replay_command_for_an_event_that_killed_its_workers(
    store: StreamStore,
) -> None:
    id, _ = store.give_up("paid", reason="killed", receiver="", entry="1763848800000-7")

    result = store.run("dead", "retry", "--all")

    assert result.exit_code == 1
    place = "1763848800000-7"
    assert f"{PROGRAM} replay paid --from {place} --to {place}" in result.output
    assert store.dead("paid") == [id]


def test_a_letter_that_cannot_be_retried_is_kept(store: StreamStore) -> None:
    id, _ = store.give_up("user_registered")
    store.client.set(store.keys.retry("user_registered", "mailer"), "a string")

    result = store.run("dead", "retry", "--all", "--wait", "0")

    assert result.exit_code == 1
    assert "Another program stores a different type under" in result.output
    assert store.dead("user_registered") == [id]


@pytest.mark.parametrize("words", [("list",), ("show", "{id}"), ("drop", "--all", "--yes")])
def test_dead_letters_of_another_type_are_named_and_the_rest_is_found(
    store: StreamStore, words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    id, _ = store.give_up("paid")
    key = store.keys.dead("aaa", "mailer")
    store.add("aaa")
    store.client.set(key, "mine")

    result = store.run("dead", *(word.format(id=id) for word in words))

    assert result.exit_code == 0, result.output
    assert "send_welcome" in result.output or "Deleted 1 dead letter." in result.output
    assert f"Another program stores a different type under '{key}'." in caplog.text
    assert store.client.get(key) == b"mine"


def test_two_concurrent_retries_of_the_same_letters_queue_each_once(store: StreamStore) -> None:
    for number in range(20):
        store.give_up("paid", receiver=f"mailer.number_{number}")

    config = Config(service="mailer", url=store.url, prefix=store.prefix)
    both = threading.Barrier(2)
    put_back: list[str] = []

    def retry() -> None:
        with StreamAccess(config, name="tests") as access:
            kept = DeadLetters(access, "mailer")
            letters = list(kept.find(Choice()))
            both.wait(10)
            put_back.extend(found.id for found in letters if kept.put_back(found))

    threads = [threading.Thread(target=retry) for _ in range(2)]

    for thread in threads:
        thread.start()

    for thread in threads:
        thread.join()

    assert len(put_back) == len(set(put_back)) == 20
    assert len(store.retries("paid")) == 20
    assert store.dead("paid") == []


def test_dead_retry_reports_a_letter_that_somebody_else_has_removed(
    store: StreamStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = store.give_up("paid")
    find = DeadLetters.find

    def find_late(self: DeadLetters, choice: Choice) -> Iterator[Letter]:
        yield from find(self, choice)
        store.client.xdel(store.keys.dead("paid", "mailer"), found)

    monkeypatch.setattr(DeadLetters, "find", find_late)
    result = store.run("dead", "retry", found)

    assert result.exit_code == 1
    assert result.output.endswith(": no longer exists; it was retried or deleted meanwhile.\n")
    assert store.retries("paid") == []


def test_a_missing_right_keeps_the_letter(
    redis_server: RedisServer,
) -> None:
    store = StreamStore(redis_server)
    found, _ = store.give_up("paid")
    redis_server.client.execute_command(
        *("ACL", "SETUSER", "ada", "on", ">pw", f"~{store.prefix}:*", "+@all", "-zadd", "-xdel")
    )
    store.url = redis_server.url.replace("127", "ada:pw@127", 1)

    retried = store.run("dead", "retry", found)
    dropped = store.run("dead", "drop", found, "--yes")

    assert (retried.exit_code, dropped.exit_code) == (1, 1)
    assert "Redis refuses ZADD of " in retried.output
    assert f"Grant the user in the ACL: '+zadd ~{store.prefix}:*'." in retried.output
    assert "Grant the user in the ACL: '+xdel ~" in dropped.output
    assert store.dead("paid") == [found]


@pytest.mark.timing(check_released_every=0.2)
def test_a_worker_runs_only_the_failed_receiver_of_a_retried_letter(
    store: StreamStore, make_bus: Callable[..., Bus]
) -> None:
    bus = make_bus(store.url, "mailer", prefix=store.prefix, retries=0, claim_after=0.5)
    broken = threading.Event()
    broken.set()
    ran: list[str] = []

    @bus.on("paid", start="earliest")
    def bill(sender: str, **payload: Any) -> None:
        if broken.is_set():
            raise OSError("no paper")

        ran.append("bill")

    @bus.on("paid", start="earliest")
    def count(sender: str, **payload: Any) -> None:
        ran.append("count")

    store.add("paid", amount=7)
    bus.start()
    wait_until(lambda: store.dead("paid"), what="there is a dead letter")

    failed = store.run("dead", "retry", "--receiver", "bill")
    broken.clear()
    handled = store.run("dead", "retry", "--receiver", "bill")

    assert failed.exit_code == 1
    assert failed.output.endswith(": a dead letter again: OSError: no paper\n")
    assert handled.exit_code == 0, handled.output
    assert handled.output.endswith(": handled.\n")
    assert ran == ["count", "bill"]
    assert store.dead("paid") == []
