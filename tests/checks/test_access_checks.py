"""Tests of ``check`` for connections that others can read, and for open servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from servers import RedisServer
from tls_servers import Authority, TlsServer

from flask_eventbus import Bus
from flask_eventbus.__main__ import main
from flask_eventbus.checks.acl import check_access, check_transport, hosts_of, is_loopback
from flask_eventbus.checks.server import check

pytestmark = pytest.mark.second_look("starts a Redis server for each test")

Make = Callable[..., Bus]

OPEN = "Anyone who can connect to it becomes 'default'"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every server is one of another machine, as far as a check knows."""
    monkeypatch.setattr("flask_eventbus.checks.acl.is_loopback", lambda host: False)


def levels(url: str, words: str) -> list[str]:
    """The levels of what a check of an URL says with these words."""
    return [found.level for found in check_access(url) if words in found.text]


def test_a_local_server_without_acl_is_a_note(
    redis_server: RedisServer,
) -> None:
    assert levels(redis_server.url, OPEN) == ["note"]


@pytest.mark.usefixtures("here")
def test_a_remote_server_without_acl_is_a_warning(
    redis_server: RedisServer, make_bus: Make
) -> None:
    redis_server.client.execute_command("ACL", "SETUSER", "ada", "on", ">pw", "+@all", "~*", "&*")
    own = redis_server.url.replace("127", "ada:pw@127", 1)

    found = {each.text: each for each in check(make_bus(own).node) if each.text.startswith(OPEN)}

    assert [each.level for each in found.values()] == ["warning"]
    assert "user default off resetpass" in next(iter(found.values())).remedy


@pytest.mark.parametrize(
    "rules",
    [("off",), (">pw",), ("-@all",), ("-flushall",), ("resetkeys", "~mine:*")],
    ids=" ".join,
)
def test_a_default_user_with_limited_rights_passes_the_check(
    redis_server: RedisServer, rules: tuple[str, ...]
) -> None:
    if rules == (">pw",):
        rules = ("resetpass", ">pw")

    redis_server.client.execute_command("ACL", "SETUSER", "ada", "on", ">pw", "+@all", "~*")
    redis_server.client.execute_command("ACL", "SETUSER", "default", *rules)

    assert levels(redis_server.url.replace("127", "ada:pw@127", 1), OPEN) == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://redis/0", "travel unencrypted"),
        ("redis://ada:pw@10.0.0.7:6379/0", "travel unencrypted"),
        ("redis+sentinel://localhost,10.0.0.8/mymaster", "travel unencrypted"),
        ("redis+cluster://10.0.0.7,10.0.0.8", "travel unencrypted"),
        ("rediss://redis/0?ssl_cert_reqs=none", "certificate is not verified"),
        ("rediss://localhost/0?ssl_cert_reqs=none", "certificate is not verified"),
        ("rediss://redis/0?ssl_cert_reqs=optional", "certificate is not verified"),
        ("rediss://redis/0?ssl_check_hostname=false", "is not compared with the host"),
    ],
)
def test_an_unencrypted_remote_connection_is_a_warning(url: str, words: str) -> None:
    is_here = all(map(is_loopback, hosts_of(url)))

    [finding] = check_transport(url, is_here=is_here)

    assert finding.level == "warning"
    assert words in finding.text
    assert finding.remedy


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost/0",
        "redis://ada:p%40w@127.0.0.1:6379/0",
        "redis://[::1]:6379/0",
        "redis:///0",
        "redis+sentinel://localhost:1,127.0.0.2:2/mymaster",
        "unix:///run/redis.sock",
        "rediss://redis/0",
        "rediss://redis/0?ssl_cert_reqs=required&ssl_check_hostname=true",
    ],
)
def test_an_encrypted_or_local_connection_passes_the_check(url: str) -> None:
    is_here = url.startswith("unix") or all(map(is_loopback, hosts_of(url)))

    assert list(check_transport(url, is_here=is_here)) == []


def test_check_warns_of_a_certificate_that_is_not_verified(tmp_path: Path) -> None:
    server = TlsServer(tmp_path, Authority(tmp_path, "authority"))
    server.start()
    url = f"{server.url}&ssl_cert_reqs=none"

    said = CliRunner().invoke(main, ["--url", url, "check"]).output
    verified = CliRunner().invoke(main, ["--url", server.url, "check"]).output
    server.kill()

    assert "warning  The server's certificate is not verified" in said
    assert f"note     {OPEN}" in said
    assert "is not verified" not in verified
