"""The wire format is what its page and its vectors say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import wire_vectors
from bad_events import BAD, packed
from click.testing import CliRunner, Result
from servers import RedisServer, require
from waiting import wait_until

from flask_eventbus import Bus, Reject, current_event
from flask_eventbus.__main__ import main
from flask_eventbus.codec import values
from flask_eventbus.codec.codec import Codec, split_message
from flask_eventbus.codec.records import DeadLetter, RetryRecord
from flask_eventbus.errors import DecodeError

pytestmark = pytest.mark.second_look("runs the programs of the page beside a real Redis")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "\n".join(
    (DOCS / f"{name}.md").read_text()
    for name in ("wire-format", "stream-format", "other-languages")
)
VECTORS = wire_vectors.read()
EVENTS = [vector for vector in VECTORS if "event" in vector]
REFUSED = [vector for vector in VECTORS if "reason" in vector]
RETRIES = [vector for vector in VECTORS if "retry" in vector]
DEAD = [vector for vector in VECTORS if "dead" in vector]
MESSAGES = [vector for vector in VECTORS if "message" in vector]

codec = Codec()


def what(vector: dict[str, Any]) -> str:
    return str(vector["what"])


@pytest.mark.parametrize("vector", EVENTS, ids=what)
def test_an_event_vector_decodes_as_described(vector: dict[str, Any]) -> None:
    event = codec.decode(wire_vectors.body_of(vector))

    described = wire_vectors.meaning(vector["event"])
    assert event == wire_vectors.event_of(described)
    assert repr(event.payload) == repr(described["data"])


@pytest.mark.parametrize("vector", [v for v in EVENTS if v.get("exact")], ids=what)
def test_an_event_vector_is_encoded_byte_for_byte(vector: dict[str, Any]) -> None:
    attributes = wire_vectors.meaning(vector["event"])

    assert wire_vectors.encode(attributes) == wire_vectors.body_of(vector)


@pytest.mark.parametrize("vector", REFUSED, ids=what)
def test_an_invalid_vector_is_refused_with_the_reason_it_names(vector: dict[str, Any]) -> None:
    with pytest.raises(DecodeError) as caught:
        codec.decode(wire_vectors.body_of(vector))

    assert caught.value.reason == vector["reason"]


@pytest.mark.parametrize("vector", MESSAGES, ids=what)
def test_a_message_vector_is_split_into_its_events(vector: dict[str, Any]) -> None:
    bodies = split_message(wire_vectors.body_of(vector))

    for body, part in zip(bodies, vector["message"], strict=True):
        if "event" in part:
            assert codec.decode(body) == wire_vectors.event_of(wire_vectors.meaning(part["event"]))
        else:
            with pytest.raises(DecodeError) as caught:
                codec.decode(body)

            assert caught.value.reason == part["reason"]


@pytest.mark.parametrize(("before", "max_bytes"), [(1, 1024 * 1024), (1, 100), (300, 1024 * 1024)])
@pytest.mark.parametrize("vector", [*MESSAGES, *EVENTS, *REFUSED], ids=what)
def test_a_message_is_decoded_as_its_parts_are(
    vector: dict[str, Any], before: int, max_bytes: int
) -> None:
    limited = codec.limited(max_bytes)
    good = wire_vectors.body_of(EVENTS[0])
    message = good * before + wire_vectors.body_of(vector) + good

    def decoded_alone(body: bytes) -> tuple[Any, int]:
        try:
            return limited.decode_for_queue(body)
        except DecodeError as error:
            return (error.reason, str(error)), 0

    found = [
        (body, (event.reason, str(event)) if isinstance(event, DecodeError) else event, memory)
        for body, event, memory, _ in limited.decode_message(message)
    ]

    assert repr(found) == repr([(body, *decoded_alone(body)) for body in split_message(message)])


@pytest.mark.parametrize("reason", BAD)
def test_a_stream_event_after_a_like_one_is_checked_as_strictly(reason: str) -> None:
    def decoded(decode: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        try:
            return decode()[:2]
        except DecodeError as error:
            return error.reason, str(error)

    last = codec.decode(packed(), via="stream")

    for body in BAD[reason]:
        alone = decoded(partial(codec.decode_for_queue, body, via="stream"))
        assert repr(decoded(partial(codec.decode_next, body, last, "foreign-"))) == repr(alone)


def test_a_stream_event_after_a_like_one_is_the_same_event_as_alone() -> None:
    last = codec.decode(packed(), via="stream")

    for changes in ({}, {"id": "foreign-2"}, {"id": "other-1"}, {"hops": 2}, {"data": {"n": [1]}}):
        body = packed(**changes)
        *found, is_like_last = codec.decode_next(body, last, "foreign-")

        assert tuple(found) == codec.decode_for_queue(body, via="stream")
        assert is_like_last == (changes in ({}, {"id": "foreign-2"}))


def test_the_vector_file_is_up_to_date() -> None:
    assert wire_vectors.FILE.read_text() == wire_vectors.text_of(wire_vectors.made())


@pytest.mark.parametrize("vector", RETRIES, ids=what)
def test_a_retry_vector_is_decoded_and_encoded_byte_for_byte(
    vector: dict[str, Any],
) -> None:
    body = wire_vectors.body_of(vector)

    record = RetryRecord.unpacked(body)

    assert asdict(record) == wire_vectors.meaning(vector["retry"])
    assert record.packed() == body


@pytest.mark.parametrize("vector", DEAD, ids=what)
def test_a_dead_letter_vector_is_decoded_and_encoded_byte_for_byte(
    vector: dict[str, Any],
) -> None:
    fields = wire_vectors.meaning(vector["fields"])
    raw = {
        name.encode(): content if isinstance(content, bytes) else content.encode()
        for name, content in fields.items()
    }

    letter = DeadLetter.from_fields(raw)

    assert wire_vectors.fields_of(letter) == fields


def test_a_worker_runs_the_retry_of_the_vectors(
    redis_server: RedisServer, make_bus: Callable[..., Bus]
) -> None:
    vector = RETRIES[0]
    tried: list[tuple[str, int]] = []
    bus = make_bus(redis_server.url, "mailer")

    def send_welcome(sender: str, user_id: int, email: str) -> None:
        tried.append((email, current_event.attempt))

    send_welcome.__module__, send_welcome.__qualname__ = "mailer.receivers", "send_welcome"
    bus.on("user_registered")(send_welcome)
    redis_server.client.zadd(vector["key"], {wire_vectors.body_of(vector): 0})

    bus.start()

    wait_until(lambda: tried, what="the receiver runs")
    assert tried == [("ada@example.com", 2)]
    wait_until(lambda: not redis_server.client.exists(vector["key"]), what="it is taken out")


def test_a_dead_letter_has_the_fields_of_the_vectors_and_of_the_page(
    redis_server: RedisServer, make_bus: Callable[..., Bus]
) -> None:
    entry = next(vector for vector in VECTORS if vector["what"] == "an entry of a stream")
    letter = DEAD[0]
    client: Any = redis_server.client
    bus = make_bus(redis_server.url, "mailer")

    @bus.on("user_registered")
    def send_welcome(sender: str, **payload: Any) -> None:
        raise Reject("no mail today")

    bus.start()
    assert bus.ready(10)
    client.xadd(entry["key"], wire_vectors.meaning(entry["fields"]))

    wait_until(lambda: client.exists(letter["key"]), what="it is given up")
    [[_, fields]] = client.xrange(letter["key"])
    names = [name.decode() for name in fields]
    assert names == list(letter["fields"])
    assert names == re.findall(r"^\| `(\w+)` \|", section("Dead letters"), flags=re.MULTILINE)
    assert fields[b"event"] == wire_vectors.body_of(entry)


def test_the_page_has_every_key_of_a_retry() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", section("Retries"), flags=re.MULTILINE)

    assert listed == list(RETRIES[0]["retry"])


def test_every_reason_has_a_vector_and_a_line_on_the_page() -> None:
    listed = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", section("Reading"), flags=re.MULTILINE)

    # The last two are told by the listener, which knows channels and nodes.
    assert listed[-2:] == ["wrong_channel", "forged_source"]
    assert set(listed[:-2]) == {vector["reason"] for vector in REFUSED}


def test_every_attribute_on_the_page_is_in_a_vector() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", section("An event"), flags=re.MULTILINE)

    assert set(listed) == {name for vector in EVENTS for name in vector["event"]}


def test_the_page_has_the_codes_and_the_limits_of_the_code() -> None:
    codes = re.findall(r"^\| (\d) \| ", section("What is in `data`"), flags=re.MULTILINE)

    assert [int(code) for code in codes] == sorted(values.EXTENSIONS.values())
    numbers = re.findall(r"\| ([\d,]+)(?: bytes)? \|$", section("Limits"), flags=re.MULTILINE)
    assert [int(number.replace(",", "")) for number in numbers] == [
        values.MAX_DEPTH,
        values.MAX_ITEMS,
        values.MAX_CONTAINERS,
        values.MAX_SET_NESTING,
        values.MAX_COLLISIONS,
        values.MAX_INTEGER_BYTES,
    ]


def test_the_dump_on_the_page_is_a_vector() -> None:
    dump = code("text")
    columns = [re.match(r"^((?: *[0-9a-f]{2})+)(?:   |$)", line) for line in dump.splitlines()]
    body = bytes.fromhex("".join(column[1] for column in columns if column))

    vector = next(v for v in EVENTS if v["what"] == "a channel event, with its running number")
    assert body.hex() == vector["hex"]
    assert f"writes it, {len(body)} bytes:" in PAGE


def section(title: str) -> str:
    """The text under a heading, up to the next."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def code(language: str, word: str = "") -> str:
    """The one block of code in a language that has a word in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if word in block]
    return str(block)


@pytest.fixture
def received(shared_redis: RedisServer, make_bus: Callable[..., Bus]) -> list[Any]:
    """Return the payloads of ``user_registered`` that a service received."""
    received: list[Any] = []
    bus = make_bus(shared_redis.url, "mailer")

    @bus.on("user_registered")
    def note(sender: str, user_id: int, email: str) -> None:
        received.append((sender, user_id, email))

    bus.start()
    assert bus.ready(10)
    return received


def run(server: RedisServer, *command: str) -> str:
    environment = {**os.environ, "REDIS_URL": server.url}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=30
    ).stdout


def test_the_example_in_python_reaches_a_service(
    shared_redis: RedisServer, received: list[Any]
) -> None:
    run(shared_redis, sys.executable, "-c", code("python", "client.publish"))

    wait_until(lambda: received, what="the event arrives")
    assert received == [("billing", 7, "ada@example.com")]


def test_the_example_with_redis_cli_reaches_a_service(
    shared_redis: RedisServer, received: list[Any]
) -> None:
    require("redis-cli", shutil.which("redis-cli"))

    answer = run(shared_redis, "sh", "-c", code("sh"))

    wait_until(lambda: received, what="the event arrives")
    assert received == [("shell", 7, "ada@example.com")]
    assert answer == "1\n"


def test_the_example_in_python_for_a_stream_reaches_a_service(
    shared_redis: RedisServer, received: list[Any]
) -> None:
    run(shared_redis, sys.executable, "-c", code("python", "client.xadd"))

    wait_until(lambda: received, what="the event arrives")
    assert received == [("billing", 8, "grace@example.com")]
    assert b"user_registered" in shared_redis.client.smembers("eventbus:streams")


def test_an_event_that_redis_cli_adds_to_a_stream_reaches_a_service(
    shared_redis: RedisServer, received: list[Any]
) -> None:
    require("redis-cli", shutil.which("redis-cli"))
    made, _, _ = code("sh").partition("|")
    [command] = re.findall(r"^    (redis-cli .* XADD .*) < EVENT$", PAGE, re.MULTILINE)

    run(shared_redis, "sh", "-c", f"{made} | {command}")

    wait_until(lambda: received, what="the event arrives")
    assert received == [("shell", 7, "ada@example.com")]


@pytest.fixture
def consumer(redis_server: RedisServer, tmp_path: Path) -> Iterator[Path]:
    """The consumer of the page, and what it says; it claims after a tenth of a second."""
    log = tmp_path / "log"
    program = code("python", "xreadgroup").replace("6, 60_000", "6, 100")
    assert "6, 100" in program
    # Its handler fails at some of the events.
    program = program.replace("    print(", '    event["data"].get("fails") and 1 / 0\n    print(')
    redis_server.client.xgroup_create(KEY, "crm", "$", mkstream=True)

    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "REDIS_URL": redis_server.url},
            stdout=out,
            stderr=out,
        )

    yield log
    still_runs = process.poll() is None
    process.kill()
    process.wait()
    assert still_runs, log.read_text()


def test_the_example_listener_prints_every_event_of_a_message(
    shared_redis: RedisServer,
) -> None:
    [vector] = [vector for vector in MESSAGES if vector["what"].startswith("two events")]
    key = "eventbus:{user_registered}:channel"
    subscribers = "PUBSUB", "NUMSUB", key
    client: Any = shared_redis.client
    before = client.execute_command(*subscribers)[1]

    with subprocess.Popen(
        [sys.executable, "-c", code("python", "pubsub.listen")],
        env={**os.environ, "REDIS_URL": shared_redis.url},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(
            lambda: client.execute_command(*subscribers)[1] > before, what="the program listens"
        )
        client.publish(key, wire_vectors.body_of(vector))
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        process.kill()

    assert [line.split()[1] for line in lines] == ["9f3ac2d1b07e-12", "9f3ac2d1b07e-13"]


KEY = "eventbus:{user_registered}:stream"


def dead_letters(server: RedisServer) -> list[DeadLetter]:
    client: Any = server.client
    found = client.xrange("eventbus:{user_registered}:dead:crm")
    return [DeadLetter.from_fields(fields) for _, fields in found]


def operate(server: RedisServer, *words: str) -> Result:
    return CliRunner().invoke(main, ["--url", server.url, "--service", "crm", *words])


def test_the_example_consumer_gets_the_events_of_a_service(
    redis_server: RedisServer, make_bus: Callable[..., Bus], consumer: Path
) -> None:
    client: Any = redis_server.client
    bus = make_bus(redis_server.url, "accounts", publish={"user_registered": "stream"})

    bus.signal("user_registered").send(user_id=7)
    bus.signal("user_registered").send(user_id=8)

    wait_until(lambda: "{'user_id': 7}" in consumer.read_text(), what="the first event")
    wait_until(lambda: "{'user_id': 8}" in consumer.read_text(), what="the next event")
    wait_until(lambda: not client.xpending(KEY, "crm")["pending"], what="both acknowledged")


def test_the_example_consumer_continues_after_every_bad_entry(
    redis_server: RedisServer, make_bus: Callable[..., Bus], consumer: Path
) -> None:
    client: Any = redis_server.client
    bodies = [body for vector in REFUSED if len(body := wire_vectors.body_of(vector)) < 100_000]
    bus = make_bus(redis_server.url, "accounts", publish={"user_registered": "stream"})

    for body in bodies:
        client.xadd(KEY, {"event": body})

    client.xadd(KEY, {"other": b"\xff", "reason": "mine"})
    client.zadd("eventbus:{user_registered}:retry:crm", {b"no record": 0})
    bus.signal("user_registered").send(user_id=7)

    wait_until(lambda: "{'user_id': 7}" in consumer.read_text(), what="the event behind them")
    wait_until(lambda: not client.xpending(KEY, "crm")["pending"], what="nothing is pending")
    letters = wait_until(lambda: dead_letters(redis_server), what="bad entries are dead letters")
    assert {letter.reason for letter in letters} <= {"undecodable", "retries"}
    [foreign] = [letter for letter in letters if b"other" in letter.fields]
    assert foreign.fields == {b"other": b"\xff", b"reason": b"mine"}
    wait_until(
        lambda: not client.exists("eventbus:{user_registered}:retry:crm"), what="no retry is left"
    )
    assert operate(redis_server, "dead", "list").exit_code == 0


def test_an_operator_can_retry_a_dead_letter_of_the_example_consumer(
    redis_server: RedisServer, make_bus: Callable[..., Bus], consumer: Path
) -> None:
    bus = make_bus(redis_server.url, "accounts", publish={"user_registered": "stream"})
    bus.signal("user_registered").send(user_id=7, fails=True)

    letters = wait_until(lambda: dead_letters(redis_server), timeout=30, what="it is given up")
    assert [(letter.reason, letter.attempts) for letter in letters] == [("retries", 6)]
    assert letters[0].error == "ZeroDivisionError: division by zero"

    retried = operate(redis_server, "dead", "retry", "--all", "--wait", "20")

    assert "crm.handle: a dead letter again: ZeroDivisionError" in retried.output
    wait_until(lambda: dead_letters(redis_server), what="its letter is back")
