"""Whatever stands in a stream, or beside it, ends in the dead letters or in a clear error."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import msgpack
import pytest
import redis
from bad_events import BAD, packed
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, current_event, signals
from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.records import DeadLetter, RetryRecord
from flask_eventbus.event import Event
from flask_eventbus.streams.group import Group
from flask_eventbus.streams.retry_queue import RetryQueue
from flask_eventbus.transport.pipe import Command, Pipe

pytestmark = pytest.mark.timing(first_retry=0.1, check_released_every=0.2, resend_after=0.2)

Make = Callable[..., Bus]


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams under a prefix of this test's own."""
    return StreamStore(shared_redis)


@pytest.fixture
def service(store: StreamStore, make_bus: Make) -> Bus:
    """A service that is about to listen."""
    return make_bus(store.url, "mailer", prefix=store.prefix, claim_after=1)


@pytest.fixture
def received(service: Bus) -> list[Any]:
    """Return the events of ``tick`` that it received."""
    return received_by(service)


def received_by(bus: Bus, name: str = "tick") -> list[Any]:
    """Listen to a stream, and return the list that its numbers go to."""
    received: list[Any] = []

    @bus.on(name, via="stream", start="earliest")
    def receive(sender: str, n: Any) -> None:
        received.append(n)

    bus.start()
    assert bus.ready(10)
    return received


def dead_letters(store: StreamStore, name: str = "tick") -> list[DeadLetter]:
    """The dead letters of a signal, as they read."""
    key = store.keys.dead(name, "mailer")
    return [DeadLetter.from_fields(fields) for _, fields in store.client.xrange(key)]


def is_settled(store: StreamStore, name: str = "tick") -> bool:
    """Return True if no entry is unread or pending."""
    [group] = store.client.xinfo_groups(store.keys.stream(name))
    last = store.client.xinfo_stream(store.keys.stream(name))["last-generated-id"]
    return bool(group["pending"] == 0 and group["last-delivered-id"] == last)


def next_event_arrives(store: StreamStore, received: list[Any], number: int = 42) -> None:
    """The next event arrives, and nothing is left behind."""
    store.add("tick", n=number)
    wait_until(lambda: number in received, what="the next event arrives")
    wait_until(lambda: is_settled(store), what="everything is acknowledged")


# -- entries ------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", sorted(BAD.keys() - {"too_large"}))
def test_undecodable_bytes_become_dead_letters_unchanged(
    store: StreamStore, service: Bus, received: list[Any], reason: str
) -> None:
    entries = [store.add_fields("tick", {b"event": body}) for body in BAD[reason]]

    next_event_arrives(store, received)
    assert received == [42]
    found = dead_letters(store)
    assert [letter.entry for letter in found] == entries
    assert [letter.fields for letter in found] == [{b"event": body} for body in BAD[reason]]
    assert {letter.reason for letter in found} == {"undecodable"}
    assert all(letter.error.startswith(f"{reason}: ") for letter in found)
    assert service.health().counts["rejected"] == len(entries)


def test_the_dead_letter_of_an_oversized_entry_has_a_sample_and_a_hash(
    store: StreamStore, received: list[Any]
) -> None:
    body = b"x" * 5_000_000
    id = store.add_fields("tick", {b"event": body, b"more": b"y"})
    wait_until(lambda: store.dead("tick"), what="it is a dead letter")

    ((_, fields),) = store.client.xrange(store.keys.dead("tick", "mailer"))
    refused = store.run("dead", "retry", "--all")

    assert fields[b"entry.event.sample"] == body[:64]
    assert fields[b"entry.event.length"] == b"5000000"
    assert fields[b"entry.event.sha256"] == sha256(body).hexdigest().encode()
    assert sum(map(len, fields.values())) < 2_000
    assert b"event" not in fields
    assert f"--from {id} --to {id}" in refused.output


FOREIGN = {
    "no field of ours": {b"temperature": b"21.5", b"unit": b"C"},
    "our field in capitals": {b"EVENT": b"x"},
    "an empty name": {b"": b""},
    "our own names": {b"reason": b"hi", b"error": b"no", b"id": b"7", b"traceback": b"x" * 9_000},
    "our mark": {b"entry.event": b"a", b"entry.": b"b", b"entry.reason": b"c"},
    "bytes that are no text": {b"\xff\xfe\x00": b"\xff\x00", b"a\r\nb": b"$-1\r\n"},
    "a terminal's language": {b"\x1b[2J\x1b]0;x\x07": b"\x1b[31m"},
    "ours and others": {b"event": b"junk", b"entry": b"1-1", b"payload": b"{"},
    "very many": {b"f%d" % number: b"x" for number in range(5_000)},
    "very long": {b"f" * 100_000: b"x" * 900_000},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_entries_become_dead_letters_with_all_their_fields(
    store: StreamStore, received: list[Any], kind: str
) -> None:
    entry = store.add_fields("tick", FOREIGN[kind])

    next_event_arrives(store, received)
    [letter] = dead_letters(store)
    assert (letter.reason, letter.entry) == ("undecodable", entry)
    assert letter.fields == FOREIGN[kind]


def test_an_event_of_a_newer_version_becomes_a_readable_dead_letter(
    store: StreamStore, received: list[Any]
) -> None:
    body = packed(specversion="2.0", data={"n": 1}, novelty=True)
    store.add_fields("tick", {b"event": body, b"hint": b"signed"})

    next_event_arrives(store, received)
    [letter] = dead_letters(store)
    assert letter.error.startswith("version: ")
    assert "2.0" in letter.error
    assert letter.fields == {b"event": body, b"hint": b"signed"}


def test_unknown_attributes_and_extra_fields_are_ignored(
    store: StreamStore, received: list[Any]
) -> None:
    store.add_fields("tick", {b"event": packed(novelty=[1], data={"n": 7}), b"signature": b"x"})

    next_event_arrives(store, received)
    assert received == [7, 42]
    assert dead_letters(store) == []


@pytest.mark.parametrize(
    "moment",
    [0, -1_000_000_000, 253_402_300_799],
    ids=["1970", "before 1970", "the last second of 9999"],
)
def test_an_event_of_any_time_is_handled(
    store: StreamStore, received: list[Any], moment: int
) -> None:
    body = packed(time=msgpack.Timestamp(moment, 0), data={"n": 7})
    store.add_fields("tick", {b"event": body})

    next_event_arrives(store, received)
    assert received == [7, 42]


def test_a_flood_of_foreign_entries_is_logged_ten_times_a_minute(
    store: StreamStore, received: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        store.add_fields("tick", {b"a": b"b"})

    next_event_arrives(store, received)
    assert len(dead_letters(store)) == 50
    assert caplog.text.count("is rejected (missing_attribute)") == 10


def test_entries_with_ids_of_the_far_future_and_later_entries_are_handled(
    store: StreamStore, received: list[Any]
) -> None:
    store.add("tick", n=1)
    late = packed(id="foreign-9", data={"n": 2})
    store.add_fields("tick", {b"event": late}, id="18446744073709551615-18446744073709551000")

    # Redis counts on from there: its clock does not matter any more.
    next_event_arrives(store, received)
    assert received == [1, 2, 42]
    assert dead_letters(store) == []


# -- what a person sees -------------------------------------------------------------------


def test_redis_cli_can_read_a_dead_letter(
    store: StreamStore, service: Bus, shared_redis: RedisServer
) -> None:
    @service.on("tick", via="stream", start="earliest", retries=0)
    def send_welcome(sender: str, email: str) -> None:
        raise ConnectionError("the mail server is away")

    service.start()
    assert service.ready(10)
    entry, event = store.add("tick", email="ada@example.com")
    wait_until(lambda: dead_letters(store), what="it is given up")

    said = redis_cli(shared_redis, "XRANGE", store.keys.dead("tick", "mailer"), "-", "+")

    lines = said.splitlines()
    assert lines[lines.index("reason") + 1] == "retries"
    assert lines[lines.index("receiver") + 1].endswith("send_welcome")
    assert lines[lines.index("error") + 1] == "ConnectionError: the mail server is away"
    assert lines[lines.index("attempts") + 1] == "1"
    assert lines[lines.index("entry") + 1] == entry
    assert lines[lines.index("id") + 1] == event.id
    assert lines[lines.index("source") + 1] == "accounts"
    assert lines[lines.index("payload") + 1] == '{"email": "ada@example.com"}'
    assert "raise ConnectionError" in said
    assert lines[lines.index("first_failed") + 1].startswith(time.strftime("%Y-"))


def redis_cli(server: RedisServer, *command: str) -> str:
    """Return the output of ``redis-cli`` without a terminal."""
    done = subprocess.run(
        ["redis-cli", "-p", str(server.port), *command], capture_output=True, check=True
    )
    return done.stdout.decode(errors="replace")


# -- what is tried again ------------------------------------------------------------------


def record_of(store: StreamStore, receiver: str, **payload: Any) -> RetryRecord:
    """A record of a receiver that failed once, a moment ago."""
    now = int(time.time() * 1000)
    return RetryRecord(
        entry="1700000000000-0",
        event=Codec().encode(store.event("tick", **payload)),
        receiver=receiver,
        attempts=1,
        first=now,
        last=now,
        error="ConnectionError: away",
    )


EDITS: dict[str, Callable[[RetryRecord], bytes]] = {
    "no msgpack": lambda record: b"\xc1 edited by hand",
    "nothing": lambda record: b"",
    "a list": lambda record: msgpack.packb([1, 2]),
    "text attempts": lambda record: edited(record, attempts="three"),
    "too many attempts": lambda record: edited(record, attempts=2**64 - 1),
    "negative attempts": lambda record: edited(record, attempts=-(2**40)),
    "a time past all calendars": lambda record: edited(record, first=10**18, last=10**18),
    "a negative time": lambda record: edited(record, first=-(10**18), last=-(10**18)),
    "no event": lambda record: edited(record, event=b"junk"),
    "another signal's event": lambda record: edited(record, event=packed(type="tock")),
    "a missing key": lambda record: edited(record, receiver=...),
    "a list for a name": lambda record: edited(record, receiver=["a"]),
    "no text": lambda record: record.packed().replace(b"away", b"\xff\xff\xff\xff"),
}


def edited(record: RetryRecord, **changes: Any) -> bytes:
    values = {name: getattr(record, name) for name in record.__slots__}
    changed = {name: found for name, found in {**values, **changes}.items() if found is not ...}
    body: bytes = msgpack.packb(changed)
    return body


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_retry_record_becomes_a_dead_letter_and_the_others_run(
    store: StreamStore, service: Bus, received: list[Any], edit: str
) -> None:
    receiver = receiver_name(received, service, store)
    member = EDITS[edit](record_of(store, receiver, n="edited"))
    key = store.keys.retry("tick", "mailer")
    store.client.zadd(key, {member: 0})
    store.client.zadd(key, {record_of(store, receiver, n="good").packed(): 1})

    wait_until(lambda: "good" in received, what="the good one is tried again")
    wait_until(lambda: not store.client.zcard(key), what="nothing is left to be tried again")
    [letter] = dead_letters(store)
    assert "edited" not in received
    assert letter.reason == "undecodable"
    assert letter.fields == {b"record": member}
    assert letter.error.startswith("The record of a retry cannot be decoded: ")
    next_event_arrives(store, received)


def test_a_retry_packed_differently_by_another_program_is_run_and_removed(
    store: StreamStore, service: Bus, received: list[Any]
) -> None:
    record = record_of(store, receiver_name(received, service, store), n=7)
    values = {name: getattr(record, name) for name in reversed(record.__slots__)}
    key = store.keys.retry("tick", "mailer")
    store.client.zadd(key, {msgpack.packb(values): 0})

    wait_until(lambda: received == [7], what="it is tried again")
    wait_until(lambda: not store.client.zcard(key), what="it is removed")
    next_event_arrives(store, received)
    assert received == [7, 42]


def receiver_name(received: list[Any], service: Bus, store: StreamStore) -> str:
    """Return the name of the receiver of ``tick``."""
    return f"{__name__}.received_by.<locals>.receive"


@pytest.mark.parametrize("score", ["-inf", "1e300", "+inf"])
def test_an_edited_due_time_harms_no_other_retry(
    store: StreamStore, service: Bus, received: list[Any], score: str
) -> None:
    receiver = receiver_name(received, service, store)
    key = store.keys.retry("tick", "mailer")
    store.client.zadd(key, {record_of(store, receiver, n="edited").packed(): score})
    store.client.zadd(key, {record_of(store, receiver, n="good").packed(): 1})

    wait_until(lambda: "good" in received, what="the good one is tried again")
    next_event_arrives(store, received)

    # No lease can be added to such a score, so that the retry runs a lease later.
    if score == "-inf":
        wait_until(lambda: "edited" in received, what="the edited one is tried again")

    assert ("edited" in received) == (score == "-inf")


def test_a_worker_decodes_no_retry_that_another_one_leased_first(
    store: StreamStore, service: Bus, received: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receiver_name(received, service, store)
    key = store.keys.retry("tick", "mailer")
    lease, unpacked = RetryQueue._lease, RetryRecord.unpacked
    half_a_lease = round(service.node.config.claim_after * 500)
    others: list[float] = []
    decoded: list[bytes] = []

    def lease_second(queue: RetryQueue, name: str, members: Sequence[bytes], *times: int) -> Any:
        for member in members:
            store.client.zadd(key, {member: times[0]}, xx=True, gt=True)
            others.append(store.client.zincrby(key, half_a_lease, member))

        return lease(queue, name, members, *times)

    def note(member: bytes) -> RetryRecord:
        decoded.append(member)
        return unpacked(member)

    monkeypatch.setattr(RetryQueue, "_lease", lease_second)
    monkeypatch.setattr(RetryRecord, "unpacked", note)
    store.client.zadd(key, {record_of(store, receiver, n="other").packed(): 1})

    wait_until(lambda: others, what="the other worker leases it first")
    next_event_arrives(store, received)
    wait_until(lambda: len(others) > 1, what="it is due again when that lease ends")
    assert not decoded
    assert "other" not in received


# -- keys that hold something else --------------------------------------------------------


def test_a_key_that_is_not_a_stream_is_reported_and_other_streams_are_read(
    store: StreamStore, service: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    store.client.set(store.keys.stream("tock"), "a string")
    service.on("tock", via="stream")(lambda sender, **payload: None)
    received: list[int] = []
    service.on("tick", via="stream", start="earliest")(lambda sender, n: received.append(n))
    service.start()
    wait_until(lambda: service.health().refused, what="it is refused")
    assert not service.ready(0)

    next_event_arrives(store, received)
    refused = service.health().refused
    assert set(refused) == {"tock"}
    assert "WRONGTYPE" in refused["tock"]
    assert "Redis refuses to let 'mailer' read the stream of 'tock'" in caplog.text
    assert not service.health().connected


def test_a_retry_queue_of_a_wrong_type_stops_no_other_signal(
    store: StreamStore, service: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    store.client.set(store.keys.retry("tack", "mailer"), "a string")
    service.on("tack", via="stream")(lambda sender, **payload: None)
    tries: list[int] = []

    @service.on("tick", via="stream", start="earliest")
    def fail_once(sender: str, n: int) -> None:
        tries.append(current_event.attempt)

        if current_event.attempt == 1:
            raise ValueError

    service.start()
    assert service.ready(10)
    store.add("tick", n=1)

    wait_until(lambda: tries == [1, 2], what="the receiver of the other signal is tried again")
    wait_until(lambda: "'tack'" in caplog.text, what="the wrong type is reported")
    assert "WRONGTYPE" in caplog.text


@pytest.mark.parametrize("outcome", ["retry", "dead"])
def test_an_outcome_is_written_again_until_redis_accepts_it(
    store: StreamStore, service: Bus, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {
        "retry": store.keys.retry("tick", "mailer"),
        "dead": store.keys.dead("tick", "mailer"),
    }[outcome]
    tries: list[int] = []

    @service.on("tick", via="stream", start="earliest", retries=0 if outcome == "dead" else 5)
    def fail(sender: str, n: int) -> None:
        tries.append(n)

        if store.client.type(wrong) == b"string":
            raise ValueError

    store.client.set(wrong, "a string")
    service.start()
    assert service.ready(10)
    store.add("tick", n=1)
    wait_until(lambda: "Redis rejected the outcomes of" in caplog.text)
    assert "WRONGTYPE" in caplog.text
    # Redis has it as what is not handled: another worker takes it over if this one ends.
    wait_until(lambda: not is_settled(store), what="it is pending again")

    store.client.delete(wrong)
    wait_until(
        lambda: len(tries) == 2 if outcome == "retry" else dead_letters(store),
        what="it is reported again",
    )
    assert is_settled(store)


def test_a_partly_written_outcome_is_written_again_after_a_lost_connection(
    store: StreamStore, service: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    retries = store.keys.retry("tick", "mailer")
    lost: list[object] = []
    run = Pipe.run

    def lose_once(pipe: Pipe, commands: Sequence[Command], **how: Any) -> list[Any]:
        if ("MULTI",) in commands and not store.client.exists(retries) and not lost:
            lost.append(commands)
            raise redis.ConnectionError

        return run(pipe, commands, **how)

    monkeypatch.setattr(Pipe, "run", lose_once)
    # It is acknowledged, and nobody can make it pending again.
    monkeypatch.setattr(Group, "restore_command", lambda *_, **__: ("NOSUCHCOMMAND",))

    @service.on("tick", via="stream", start="earliest")
    def fail_once(sender: str, n: int) -> None:
        tries.append(current_event.attempt)

        if current_event.attempt == 1:
            raise ValueError

    store.client.set(retries, "a string")
    service.start()
    assert service.ready(10)
    store.add("tick", n=1)
    wait_until(
        lambda: service.health().counts.get("outcomes_refused"), what="Redis refused a part of it"
    )

    store.client.delete(retries)
    wait_until(lambda: tries == [1, 2], what="it is tried again")
    assert lost


def test_a_retry_whose_outcome_cannot_be_written_is_not_lost(
    store: StreamStore, service: Bus
) -> None:
    dead = store.keys.dead("tick", "mailer")
    tries: list[int] = []

    @service.on("tick", via="stream", start="earliest", retries=1)
    def fail(sender: str, n: int) -> None:
        tries.append(current_event.attempt)
        raise ValueError

    store.client.set(dead, "a string")
    service.start()
    assert service.ready(10)
    store.add("tick", n=1)
    wait_until(lambda: len(tries) == 2, what="the last attempt fails")
    wait_until(lambda: service.health().counts.get("outcomes_refused"), what="Redis refused it")
    retries = store.keys.retry("tick", "mailer")
    wait_until(lambda: store.client.zcard(retries) == 1, what="Redis has it as a retry again")

    store.client.delete(dead)
    wait_until(lambda: dead_letters(store), what="it is a dead letter in the end")
    assert not store.client.zcard(retries)


@pytest.mark.parametrize("apart", [False, True], ids=["in one batch", "one after the other"])
def test_an_id_forged_in_advance_hides_no_stream_event(
    store: StreamStore,
    service: Bus,
    caplog: pytest.LogCaptureFixture,
    apart: bool,
) -> None:
    event = store.event("tick", n="honest")
    honest = Codec().encode(event)
    forged = Codec().encode(replace(event, payload={"n": "forged"}, source="somebody"))
    conflicts: list[str] = []

    def note(sender: str, name: str, event: Event) -> None:
        conflicts.append(f"{event.id} {event.source}")

    with signals.event_conflict.connected_to(note):
        store.add_fields("tick", {b"event": forged})
        received = received_by(service) if apart else []
        wait_until(lambda: not apart or received == ["forged"], what="the forged event arrives")
        store.add_fields("tick", {b"event": honest})
        store.add_fields("tick", {b"event": honest})
        received = received if apart else received_by(service)
        next_event_arrives(store, received)
        wait_until(lambda: conflicts, what="the conflict is signalled")

    assert received == ["forged", "honest", 42]
    assert conflicts == [f"{event.id} accounts"]
    counts = service.health().counts
    assert (counts["conflicts"], counts["duplicates"]) == (1, 1)
    assert f"The event {event.id} of 'tick', which says it is from 'accounts'" in caplog.text


def test_an_id_with_other_bytes_is_a_conflict_for_a_process_without_a_group_too(
    store: StreamStore, service: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    event = store.event("tick", n="honest")
    honest = Codec().encode(event)
    forged = Codec().encode(replace(event, payload={"n": "forged"}, source="somebody"))
    conflicts: list[str] = []
    received: list[Any] = []
    service.on("tick", group=None, start="earliest")(lambda sender, n: received.append(n))

    def note(sender: str, name: str, event: Event) -> None:
        conflicts.append(f"{event.id} {event.source}")

    for body in (forged, honest, honest):
        store.add_fields("tick", {b"event": body})

    with signals.event_conflict.connected_to(note):
        service.start()
        wait_until(lambda: len(received) == 3, what="the events arrive")
        wait_until(lambda: conflicts, what="the conflict is signalled")

    # What is in the stream twice is received twice, as the page says.
    assert sorted(received) == ["forged", "honest", "honest"]
    assert conflicts == [f"{event.id} accounts"]
    assert service.health().counts["conflicts"] == 1
    assert f"The event {event.id} of 'tick', which says it is from 'accounts'" in caplog.text


def test_ids_that_cannot_be_stored_do_not_stop_events(
    store: StreamStore, received: list[Any], service: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    window = int(time.time() // 600)

    for number in (window, window + 1):
        store.client.set(store.keys.seen("tick", "mailer", number), "a string")

    next_event_arrives(store, received)
    assert "Redis refuses to store the ids of received events" in caplog.text


@pytest.mark.timing(ask_command_again_after=0.0)
def test_storing_ids_is_tried_again_after_a_failure(
    store: StreamStore, received: list[Any]
) -> None:
    window = int(time.time() // 600)
    keys = [store.keys.seen("tick", "mailer", number) for number in (window, window + 1)]

    for key in keys:
        store.client.set(key, "a string")

    next_event_arrives(store, received, 1)
    store.client.delete(*keys)
    body = Codec().encode(store.event("tick", n=2))
    store.add_fields("tick", {b"event": body})
    store.add_fields("tick", {b"event": body})

    next_event_arrives(store, received, 3)
    assert received == [1, 2, 3]


@pytest.mark.parametrize(
    "name",
    [b"\xff\xfe", b"a b", b"x}:y", b"", b"n" * 5_000, b"\x1b[2J", b"ti\nck"],
    ids=["no text", "a space", "a brace", "empty", "too long", "an escape", "a new line"],
)
def test_a_pattern_ignores_invalid_signal_names(
    store: StreamStore, service: Bus, name: bytes
) -> None:
    store.client.sadd(store.keys.names, name)
    received = received_by(service, "*")

    next_event_arrives(store, received)
    keys = list(store.client.scan_iter(match=f"{store.prefix}:*:stream"))
    assert keys == [store.keys.stream("tick").encode()]


def test_a_pattern_whose_start_cannot_be_stored_does_not_stop_subscriptions_by_name(
    store: StreamStore, service: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    store.client.set(store.keys.since("mailer"), "a string")
    received: list[Any] = []
    patterns: list[Any] = []
    service.on("ta*", via="stream")(lambda sender, n: patterns.append(n))
    service.on("tick", via="stream", start="earliest")(lambda sender, n: received.append(n))
    service.start()
    store.add("tick", n=1)

    wait_until(lambda: received == [1], what="what is subscribed by name is received")
    assert "Redis refuses to list the streams for ta*: WRONGTYPE" in caplog.text
    store.client.delete(store.keys.since("mailer"))
    assert service.ready(10)
    store.add("tack", n=2)
    wait_until(lambda: patterns == [2], what="the pattern is received once it can be noted")


@pytest.mark.timing(list_streams_every=60.0)
def test_a_refused_search_for_streams_lasts_until_the_next_one(
    store: StreamStore, service: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    store.client.set(store.keys.since("mailer"), "a string")
    received = received_by(service)
    service.on("ta*", via="stream")(lambda sender, n: None)
    wait_until(lambda: "Redis refuses to list the streams" in caplog.text, what="it is refused")

    for n in (1, 2, 3):
        next_event_arrives(store, received, n)

    assert "lists the streams for ta* again" not in caplog.text


def test_a_set_of_names_of_a_wrong_type_is_logged(
    store: StreamStore, service: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    store.client.set(store.keys.names, "a string")
    named = received_by(service)
    patterns: list[Any] = []
    service.on("ta*", via="stream")(lambda sender, n: patterns.append(n))

    wait_until(lambda: "WRONGTYPE" in caplog.text, what="it is reported")
    body = Codec().encode(store.event("tick", n=1))
    store.client.xadd(store.keys.stream("tick"), {b"event": body})
    wait_until(lambda: named == [1], what="what is subscribed by name is received")


@pytest.mark.parametrize("since", ["yesterday", "9" * 5_000], ids=["words", "many digits"])
def test_a_pattern_with_an_edited_start_is_read_from_now_on(
    store: StreamStore, service: Bus, since: str
) -> None:
    store.client.hset(store.keys.since("mailer"), "t*", since)
    received = received_by(service, "t*")

    store.add("tick", n=1)
    wait_until(lambda: received == [1], what="the event arrives")


def test_two_records_of_one_retry_are_both_renewed_while_they_run(
    store: StreamStore, make_bus: Make
) -> None:
    tries: list[int] = []
    release = threading.Event()

    for _ in range(2):
        service = make_bus(store.url, "mailer", prefix=store.prefix, claim_after=1, concurrency=2)

        @service.on("tick", via="stream", start="earliest")
        def hold(sender: str, n: int) -> None:
            tries.append(n)
            assert release.wait(20)

        service.start()
        assert service.ready(10)

    receiver = f"{__name__}.{hold.__qualname__}"
    record = record_of(store, receiver, n=1)
    key = store.keys.retry("tick", "mailer")
    store.client.zadd(key, {record.packed(): 1, replace(record, attempts=2).packed(): 1})
    wait_until(lambda: len(tries) == 2, what="both are tried")
    leases = [store.client.zrange(key, 0, 0, withscores=True)[0][1]]

    def is_renewed_again() -> bool:
        leases.append(store.client.zrange(key, 0, 0, withscores=True)[0][1])
        return len(set(leases)) >= 6

    wait_until(is_renewed_again, what="the one whose lease ends first is renewed again and again")
    release.set()
    wait_until(lambda: not store.client.zcard(key), what="nothing is left")
    assert len(tries) == 2


def test_two_records_of_one_retry_both_run(
    store: StreamStore, service: Bus, received: list[Any]
) -> None:
    receiver = receiver_name(received, service, store)
    record = record_of(store, receiver, n="once")
    key = store.keys.retry("tick", "mailer")
    store.client.zadd(key, {record.packed(): 1, replace(record, attempts=2).packed(): 1})

    wait_until(lambda: received == ["once", "once"], what="both are tried")
    wait_until(lambda: not store.client.zcard(key), what="nothing is left")
