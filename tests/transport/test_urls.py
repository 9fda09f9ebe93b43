"""Tests of the parts of Redis URLs, and of the errors about wrong ones."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.connection import parse_url
from servers import RedisServer, server_executable
from waiting import wait_until

from flask_eventbus import Bus, ConfigError
from flask_eventbus.transport.connections import Connections

MASTER = "mymaster"

SECRET = "s3cr3t"  # noqa: S105 - of no server

WRONG_OPTIONS = [
    ("redis://h/0?pasword=x", "it has no option 'pasword'. Did you mean 'password'?"),
    ("redis://h/0?db=0&Socket-Timeout=1", "no option 'Socket-Timeout'. Did you mean 'socket_timeo"),
    ("rediss://h/0?ssl_ca_cert=x", "it has no option 'ssl_ca_cert'. Did you mean 'ssl_ca_certs'?"),
    ("unix:///run/redis.sock?dbb=1", "it has no option 'dbb'. Did you mean 'db'?"),
    ("redis://h/0?no_such_thing=1", "it has no option 'no_such_thing'. Remove it, or see docs/con"),
    ("redis+cluster://h,i?usernam=x", "it has no option 'usernam'. Did you mean 'username'?"),
    (
        "redis+sentinel://h/m/0?sentinel_pasword=x",
        "no option 'sentinel_pasword'. Did you mean 'sentinel_password'?",
    ),
    ("redis://h/0?sentinel_password=x", "'sentinel_password' belongs to 'redis.sentinel://'"),
    ("redis://h/0?ssl_ca_certs=x", "'ssl_ca_certs' belongs to TLS, .* Start the URL with 'rediss:"),
    ("redis+sentinel://h/m/0?ssl_ca_certs=x", "Start the URL with 'rediss.sentinel://'"),
    ("redis+cluster://h?ssl_ca_certs=x", "'redis.cluster://' does not use. Remove it"),
    ("redis://h/0?socket_timeout=soon", "the value of its option 'socket_timeout' is not valid"),
    ("redis://h/0?retry=3", "it has no option 'retry'"),
]


@pytest.mark.parametrize(("url", "words"), WRONG_OPTIONS)
def test_the_error_for_an_invalid_url_option_names_the_remedy(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Bus(url, service="x")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h/shop", "'redis://h/shop', and its database is not a number"),
        (
            "rediss://h:6380/0x",
            "and its database is not a number. End the URL with a number, as in '/0'",
        ),
        ("redis://h/1/2", "'redis://h/1/2', and its database is not a number"),
        ("redis://ada:1/2@h/0", r"'redis://\*{3}', and its database is not a number"),
        ("redis+sentinel://h/mymaster/shop", "and its database is not a number"),
        ("redis+cluster://h,i/3", "a cluster has only the database 0"),
    ],
)
def test_a_database_that_is_not_a_number_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Bus(url, service="x")


@pytest.mark.parametrize("url", ["redis://h", "redis://h/", "redis://h/15/", "redis+cluster://h/0"])
def test_a_url_names_a_database_or_none(url: str) -> None:
    Connections(url, name="tests")


@pytest.mark.parametrize(
    "url",
    [
        f"redis://h/0?password=a&{SECRET}=1",
        f"redis://h/0?password=a&{SECRET}",
        f"redis://ada:x?{SECRET}@h/0",
        f"redis://h/0?socket_timeout={SECRET}",
        f"rediss://h/0?ssl_cert_reqs={SECRET}",
    ],
)
def test_an_error_about_a_url_shows_nothing_that_may_be_part_of_a_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Bus(url, service="x")

    assert SECRET not in str(caught.value)


#: Passwords that mean something else in a URL, in a query, or to ``str.format``.
PASSWORDS = {
    "a%26db%3D5": "a&db=5",
    "a%2525": "a%25",
    "{host}": "{host}",
    "x{0}%7B%7D": "x{0}{}",
    "a%20b%2Bc": "a b+c",
}


@pytest.mark.parametrize("url", ["redis+sentinel://h/m/0", "redis+cluster://h:1"])
@pytest.mark.parametrize(("quoted", "password"), PASSWORDS.items())
def test_a_quoted_option_is_unquoted(
    url: str, quoted: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = options_of_connection(f"{url}?password={quoted}", monkeypatch)
    by_user = options_of_connection(url.replace("://", f"://ada:{quoted}@"), monkeypatch)

    # An option as in a URL of one server: versions of redis-py before 6 unquote those twice.
    assert made["password"] == parse_url(f"redis://h/0?password={quoted}")["password"]
    assert by_user["password"] == password
    assert made["db"] == 0


def options_of_connection(url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the options of a connection to ``url``."""
    made: list[Any] = []

    def note(connection: Any) -> None:
        made.append(connection)
        raise redis.ConnectionError("noted")

    with monkeypatch.context() as patch:
        patch.setattr(redis.Connection, "connect", note)
        patch.setattr(Connections, "_ask_for_master", lambda *_: ("127.0.0.1", 1))

        with pytest.raises(redis.ConnectionError, match="noted"):
            Connections(url, name="tests").open(timeout=1)

    return {"password": made[0].password, "db": made[0].db}


@pytest.fixture
def sentinel(tmp_path: Path, shared_redis: RedisServer) -> Iterator[int]:
    """The port of a Sentinel that asks for a password, as its user ``default``."""
    room = RedisServer(tmp_path)
    file = tmp_path / "sentinel.conf"
    file.write_text(
        f"port {room.port}\nbind 127.0.0.1\ndir {tmp_path}\nrequirepass open&sesame\n"
        f"sentinel monitor {MASTER} 127.0.0.1 {shared_redis.port} 1\n"
    )

    with (tmp_path / "log").open("wb") as log:
        command = [str(server_executable()), str(file), "--sentinel"]
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def answers() -> bool:
        try:
            with redis.Redis(port=room.port, password="open&sesame") as client:  # noqa: S106
                return bool(client.ping())
        except redis.RedisError:
            return False

    try:
        wait_until(answers, what="the Sentinel answers")
        yield room.port
    finally:
        process.kill()
        process.wait()


def failure_of(url: str) -> str:
    with pytest.raises(redis.ConnectionError) as caught:
        Connections(url, name="tests").open(timeout=5)

    return str(caught.value)


def test_sentinels_have_a_user_and_a_password_of_their_own(sentinel: int) -> None:
    url = f"redis+sentinel://127.0.0.1:{sentinel}/{MASTER}/0"

    refused = failure_of(url)
    wrong = failure_of(f"{url}?sentinel_password=x&sentinel_username=default")
    connections = Connections(f"{url}?sentinel_password=open%26sesame", name="tests")

    connections.open(timeout=5).disconnect()
    assert f"The Sentinel at 127.0.0.1:{sentinel} does not let this user in" in refused
    assert "add 'sentinel_password=...'" in refused
    assert "does not let this user in: invalid username-password pair" in wrong
    assert "sesame" not in connections.shown


def test_the_error_names_a_master_that_the_sentinels_do_not_know(sentinel: int) -> None:
    url = f"redis+sentinel://127.0.0.1:{sentinel}/other/0?sentinel_password=open%26sesame"

    assert "knows no master 'other'. Write the name in 'EVENTBUS_URL' as" in failure_of(url)


def test_the_error_names_wrong_and_unreachable_sentinels(shared_redis: RedisServer) -> None:
    port = shared_redis.port
    failure = failure_of(f"redis+sentinel://127.0.0.1:{port},127.0.0.1:1/{MASTER}/0")

    assert f"The server at 127.0.0.1:{port} is not a Sentinel" in failure
    assert "The Sentinel at 127.0.0.1:1 cannot be reached: Error 111" in failure
    assert "start it with 'redis://'" in failure
