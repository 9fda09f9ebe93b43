"""The users of the Compose stack, on a real server: each may do what it needs, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from servers import RedisServer, server_executable
from waiting import wait_until

from flask_eventbus import Bus

MakeBus = Callable[..., Bus]

REDIS = Path(__file__).parent.parent / "deploy" / "redis"

SIGNALS = ("user_registered", "price_changed", "api_call", "order_paid")

#: What each service publishes, and what it hears; ``*`` is the pattern of all signals.
RIGHTS = {
    "accounts": ({"user_registered", "api_call"}, set()),
    "mailer": ({"api_call"}, {"user_registered"}),
    "catalog": ({"price_changed", "api_call"}, {"price_changed"}),
    "analytics": (set(), {"api_call"}),
    "audit": (set(), {"*"}),
    "ops": (set(SIGNALS), {*SIGNALS, "*"}),
}

#: Commands that read, change or end what is not an event.
FOREIGN = (
    "GET a",
    "SET a 1",
    "DEL a",
    "KEYS *",
    "XADD a * b c",
    "FLUSHALL",
    "CONFIG SET maxmemory 1",
    "ACL LIST",
    "CLIENT KILL TYPE pubsub",
    "SCRIPT FLUSH",
    "REPLICAOF no one",
    "SHUTDOWN",
)


class GuardedServer(RedisServer):
    """The server of the Compose stack, started as its container starts it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._path = folder / "bin"
        self._path.mkdir()
        (self._path / "redis-server").symlink_to(str(server_executable()))
        self.passwords = {f"{user.upper()}_PASSWORD": f"secret-of-{user}" for user in RIGHTS}

    @property
    def client(self) -> redis.Redis:
        return self._client("health", "any")

    @property
    def users(self) -> str:
        """The ACL file that the entry point wrote."""
        return (self._folder / "users.acl").read_text()

    def client_of(self, user: str) -> redis.Redis:
        """A client that was let in as one of the services."""
        return self._client(user, self.passwords[f"{user.upper()}_PASSWORD"])

    def url_of(self, user: str) -> str:
        """As a service is told of it."""
        password = self.passwords[f"{user.upper()}_PASSWORD"]
        return f"redis://{user}:{password}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = self.run(self.passwords)
        wait_until(self.answers, what="the Redis server answers")

    def run(self, passwords: dict[str, str]) -> subprocess.Popen[bytes]:
        """What the container's entry point does, with these passwords in its environment."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1"]
        path = f"{self._path}{os.pathsep}{os.environ['PATH']}"

        with (self._folder / "redis.log").open("ab") as log:
            return subprocess.Popen(
                ["sh", str(REDIS / "start"), *options],
                cwd=self._folder,
                env=passwords | {"PATH": path},
                stdout=log,
                stderr=log,
            )

    def _client(self, user: str, password: str) -> redis.Redis:
        return redis.Redis(
            port=self.port,
            username=user,
            password=password,
            socket_timeout=5,
            # RESP2 answers a SUBSCRIBE as it answers other commands.
            protocol=2,
        )

    @property
    def log(self) -> str:
        """What it and its entry point said."""
        return (self._folder / "redis.log").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    server = GuardedServer(tmp_path_factory.mktemp("guarded"))
    server.start()
    yield server
    server.kill()


def may(server: GuardedServer, user: str, *command: str) -> bool:
    with server.client_of(user) as client:
        try:
            client.execute_command(*command)
        except redis.exceptions.NoPermissionError:
            return False

    return True


def channel(name: str) -> str:
    return f"eventbus:{{{name}}}:channel"


@pytest.mark.parametrize("user", RIGHTS)
def test_a_service_may_publish_what_it_publishes_and_nothing_else(
    server: GuardedServer, user: str
) -> None:
    publishes, _ = RIGHTS[user]

    assert {name for name in SIGNALS if may(server, user, "PUBLISH", channel(name), "")} == (
        publishes
    )


@pytest.mark.parametrize("user", RIGHTS)
def test_a_service_may_hear_what_it_hears_and_nothing_else(
    server: GuardedServer, user: str
) -> None:
    _, hears = RIGHTS[user]
    heard = {name for name in SIGNALS if may(server, user, "SUBSCRIBE", channel(name))}

    if may(server, user, "PSUBSCRIBE", channel("*")):
        heard.add("*")

    assert heard == hears
    assert not may(server, user, "PSUBSCRIBE", "*")
    assert not may(server, user, "SUBSCRIBE", "elsewhere")


@pytest.mark.parametrize("command", FOREIGN)
@pytest.mark.parametrize("user", RIGHTS)
def test_nobody_may_read_change_or_end_anything_else(
    server: GuardedServer, user: str, command: str
) -> None:
    assert not may(server, user, *command.split())


def test_nobody_comes_in_without_a_name_or_with_a_wrong_password(server: GuardedServer) -> None:
    with redis.Redis(port=server.port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()

    wrong = server.url_of("mailer").replace("mailer:", "accounts:")

    with redis.Redis.from_url(wrong) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_the_health_check_may_ask_for_a_pong_alone(server: GuardedServer) -> None:
    with server.client as client:
        assert client.ping()

        with pytest.raises(redis.exceptions.NoPermissionError):
            client.info()


def test_the_bus_needs_nothing_that_it_is_refused(server: GuardedServer, make_bus: MakeBus) -> None:
    heard: list[str] = []
    publish = {"price_changed": {"confirm": True}}
    changing = make_bus(server.url_of("catalog"), "catalog", publish=publish)
    caching = make_bus(server.url_of("catalog"), "catalog")
    caching.on("price_changed")(lambda sender, sku: heard.append(sku))
    audit = make_bus(server.url_of("audit"), "audit")
    audit.on("*")(lambda sender, sku: heard.append(sku))

    with server.client_of("ops") as ops:
        ops.execute_command("ACL", "LOG", "RESET")
        caching.start()
        audit.start()
        assert caching.ready(10)
        assert audit.ready(10)
        changing.signal("price_changed").send(sku="A1")

        wait_until(lambda: heard == ["A1", "A1"], what="both hear it")
        assert ops.acl_log() == []


def test_whoever_may_not_hear_a_signal_is_told_so(server: GuardedServer, make_bus: MakeBus) -> None:
    analytics = make_bus(server.url_of("analytics"), "analytics", subscribe=["user_registered"])

    analytics.start()
    wait_until(lambda: analytics.health().refused, what="the refusal is told")

    assert "user_registered" in analytics.health().refused
    assert not analytics.health().connected


def test_the_file_of_the_users_holds_no_password(server: GuardedServer) -> None:
    assert not re.search("secret-of|_PASSWORD", server.users)
    assert len(re.findall(r"#[0-9a-f]{64} ", server.users)) == len(RIGHTS)


def test_a_password_that_is_not_set_ends_the_start_and_names_itself(tmp_path: Path) -> None:
    server = GuardedServer(tmp_path)
    del server.passwords["CATALOG_PASSWORD"]

    assert server.run(server.passwords).wait(10) == 1
    assert "CATALOG_PASSWORD is not set. Run deploy/make-secrets" in server.log


def test_every_setting_of_the_server_is_in_force(server: GuardedServer) -> None:
    settings = dict(
        line.split(" ", 1)
        for line in (REDIS / "redis.conf").read_text().splitlines()
        if line and not line.startswith("#")
    )
    del settings["aclfile"]

    with server.client_of("ops") as ops:
        found = {name: ops.config_get(name)[name] for name in settings}

    assert found["save"] == ""
    assert found["maxmemory"] == str(256 * 1024 * 1024)
    assert found["maxmemory-policy"] == "noeviction"
    assert "pubsub 67108864 16777216 60" in found["client-output-buffer-limit"]
    assert found["tcp-keepalive"] == "60"
    assert len(found) == 5
