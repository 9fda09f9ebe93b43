"""Output that its reader cannot take: a terminal that is not UTF-8, a disk that is full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import RedisServer
from stream_store import StreamStore

from flask_eventbus import Bus

EMOJI = "smile \N{GRINNING FACE}"
FULL = Path("/dev/full")

#: Those that show what others sent.
SHOWING = [
    ["tail", "paid", "--count", "1", "--seconds", "60"],
    ["dead", "list"],
    ["dead", "show", "--all"],
]

#: Those that write something, each in another way.
WRITING = [
    SHOWING[0],
    ["dead", "list"],
    ["routes"],
    ["status"],
    ["check"],
    ["publish", "paid"],
    ["services", "--help"],
    ["tail", "--help"],
    ["--version"],
]


def start(
    store: StreamStore, words: list[str], encoding: str = "utf-8", stdout: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    settings = {
        "EVENTBUS_URL": store.url,
        "EVENTBUS_PREFIX": store.prefix,
        "EVENTBUS_SERVICE": "mailer",
        "PYTHONIOENCODING": encoding,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flask_eventbus", *words],
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """A stream with a dead letter that no such terminal can show."""
    store = StreamStore(shared_redis)
    store.group("paid")
    store.give_up("paid", error=EMOJI, payload=f'{{"text": "{EMOJI}"}}')
    return store


def end(program: subprocess.Popen[bytes], keep_on: Callable[[], object]) -> tuple[str, str]:
    """Wait for a program; ``keep_on`` is called until it ends."""
    while program.poll() is None:
        keep_on()

        try:
            program.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue

    out, err = program.communicate()
    return (out or b"").decode("latin-1"), err.decode()


def publisher(store: StreamStore, make_bus: Callable[..., Bus]) -> Callable[[], object]:
    bus = make_bus(store.url, "shop", prefix=store.prefix, publish=["paid"])
    return lambda: bus.signal("paid").send(text=EMOJI)


@pytest.mark.parametrize("words", SHOWING, ids=" ".join)
def test_a_terminal_without_utf_8_shows_escape_sequences(
    store: StreamStore, make_bus: Callable[..., Bus], words: list[str]
) -> None:
    program = start(store, words, "latin-1")

    out, err = end(program, publisher(store, make_bus))

    assert program.returncode == 0, err
    assert "Traceback" not in err
    assert "\\U0001f600" in out


@pytest.mark.skipif(not FULL.exists(), reason="This system has no /dev/full.")
@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_a_full_disk_gives_a_message_and_an_exit_code(
    store: StreamStore, make_bus: Callable[..., Bus], words: list[str]
) -> None:
    with FULL.open("wb") as full:
        program = start(store, words, stdout=full.fileno())

    _, err = end(program, publisher(store, make_bus))

    assert program.returncode == 1, err
    assert err.splitlines()[-1] == (
        "Error: Could not write the output: No space left on device. Free disk space, or write to "
        "another place."
    )
    assert "Traceback" not in err
