"""The wire format is what its page and its vectors say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wire_vectors
from servers import RedisServer, require
from waiting import wait_until

from flask_eventbus import Bus, forms, values
from flask_eventbus.codec import Codec
from flask_eventbus.errors import DecodeError

PAGE = (Path(__file__).parents[1] / "docs" / "wire-format.md").read_text()
VECTORS = wire_vectors.read()
EVENTS = [vector for vector in VECTORS if "event" in vector]
REFUSED = [vector for vector in VECTORS if "reason" in vector]

codec = Codec()


def what(vector: dict[str, Any]) -> str:
    return str(vector["what"])


@pytest.mark.parametrize("vector", EVENTS, ids=what)
def test_an_event_of_the_vectors_is_read_as_described(vector: dict[str, Any]) -> None:
    event = codec.decode(wire_vectors.body_of(vector))

    described = wire_vectors.meaning(vector["event"])
    assert event == wire_vectors.event_of(described)
    assert repr(event.payload) == repr(described["data"])


@pytest.mark.parametrize("vector", [v for v in EVENTS if v.get("exact")], ids=what)
def test_an_event_of_the_vectors_is_written_as_it_stands_there(vector: dict[str, Any]) -> None:
    attributes = wire_vectors.meaning(vector["event"])

    assert wire_vectors.encode(attributes).hex() == vector["hex"]


@pytest.mark.parametrize("vector", REFUSED, ids=what)
def test_what_the_vectors_refuse_is_refused_with_the_same_word(vector: dict[str, Any]) -> None:
    with pytest.raises(DecodeError) as caught:
        codec.decode(wire_vectors.body_of(vector))

    assert caught.value.reason == vector["reason"]


def test_the_vectors_are_those_that_their_program_writes() -> None:
    assert wire_vectors.FILE.read_text() == wire_vectors.text_of(wire_vectors.made())


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

    assert [int(code) for code in codes] == sorted(forms.EXTENSIONS.values())
    numbers = re.findall(r"\| ([\d,]+)(?: bytes)? \|$", section("Limits"), flags=re.MULTILINE)
    assert [int(number.replace(",", "")) for number in numbers] == [
        values.MAX_DEPTH,
        values.MAX_ITEMS,
        values.MAX_CONTAINERS,
        values.MAX_SET_NESTING,
        values.MAX_COLLISIONS,
        forms.MAX_INTEGER_BYTES,
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


def code(language: str) -> str:
    """The one block of code in a language."""
    [block] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture
def heard(shared_redis: RedisServer, make_bus: Callable[..., Bus]) -> list[Any]:
    """What a service hears of user_registered."""
    heard: list[Any] = []
    bus = make_bus(shared_redis.url, "mailer")

    @bus.on("user_registered")
    def note(sender: str, user_id: int, email: str) -> None:
        heard.append((sender, user_id, email))

    bus.start()
    assert bus.ready(10)
    return heard


def run(server: RedisServer, *command: str) -> str:
    environment = {**os.environ, "REDIS_URL": server.url}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=30
    ).stdout


def test_the_example_in_python_reaches_a_service(
    shared_redis: RedisServer, heard: list[Any]
) -> None:
    run(shared_redis, sys.executable, "-c", code("python"))

    wait_until(lambda: heard, what="the event arrives")
    assert heard == [("billing", 7, "ada@example.com")]


def test_the_example_with_redis_cli_reaches_a_service(
    shared_redis: RedisServer, heard: list[Any]
) -> None:
    require("redis-cli", shutil.which("redis-cli"))

    answer = run(shared_redis, "sh", "-c", code("sh"))

    wait_until(lambda: heard, what="the event arrives")
    assert heard == [("shell", 7, "ada@example.com")]
    assert answer == "1\n"
