"""The users of the Compose stack, on a real server: each may do what it needs, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from servers import RedisServer, server_executable
from waiting import wait_until

from flask_eventbus import Bus, Reject, Retry, current_event
from flask_eventbus.__main__ import main
from flask_eventbus.codec.records import DeadLetter
from flask_eventbus.logs import Counters
from flask_eventbus.streams.alarms import Trims
from flask_eventbus.streams.group import Group
from flask_eventbus.transport.keys import StreamKeys
from flask_eventbus.transport.pipe import Pipe

MakeBus = Callable[..., Bus]

REDIS = Path(__file__).parents[2] / "deploy" / "redis"

SIGNALS = ("user_registered", "price_changed", "api_call", "order_paid")

#: What each service publishes over channels, and what it hears; ``*`` is the pattern of all.
RIGHTS: dict[str, tuple[set[str], set[str]]] = {
    "accounts": ({"api_call"}, set()),
    "mailer": ({"api_call"}, set()),
    "catalog": ({"price_changed", "api_call"}, {"price_changed"}),
    "analytics": (set(), {"api_call"}),
    "audit": (set(), {"*"}),
    "ops": (set(SIGNALS), {*SIGNALS, "*"}),
}

#: The streams that each service may write, and those that it may read as a group.
STREAMS: dict[str, tuple[set[str], set[str]]] = {
    "accounts": ({"user_registered"}, set()),
    "mailer": (set(), {"user_registered"}),
    "catalog": (set(), set()),
    "analytics": (set(), set()),
    "audit": (set(), set(SIGNALS)),
    "ops": (set(SIGNALS), set()),
}

#: What keeps a service's place and its failures, which are no other's.
BESIDE = ("HSET {}:seen:{}:1 a b", "ZADD {}:retry:{} 1 a", "XADD {}:dead:{} * a b")

#: Commands that read, change or end what is not an event.
FOREIGN = (
    "GET a",
    "SET a 1",
    "DEL a",
    "KEYS *",
    "XADD a * b c",
    "XADD eventbus:{other}:channel * event b",
    "DEL eventbus:{user_registered}:stream",
    "XTRIM eventbus:{user_registered}:stream MAXLEN 0",
    "XGROUP DESTROY eventbus:{user_registered}:stream mailer",
    "SREM eventbus:streams user_registered",
    "FLUSHALL",
    "CONFIG SET maxmemory 1",
    "ACL LIST",
    "CLIENT KILL TYPE pubsub",
    "SCRIPT FLUSH",
    "REPLICAOF no one",
    "SHUTDOWN",
)


#: The server, with one more user: the tests have to clean up behind the others.
WITH_OWNER = """\
#!/bin/sh
[ "$1" = --version ] || echo 'user owner on nopass ~* &* +@all' >>users.acl
exec '{program}' "$@"
"""


class GuardedServer(RedisServer):
    """The server of the Compose stack, started as its container starts it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._path = folder / "bin"
        self._path.mkdir()
        program = self._path / "redis-server"
        program.write_text(WITH_OWNER.format(program=server_executable()))
        program.chmod(0o755)
        users = (*RIGHTS, "health")
        self.passwords = {f"{user.upper()}_PASSWORD": f"secret-of-{user}" for user in users}

    @property
    def client(self) -> redis.Redis:
        return self.client_of("health")

    @property
    def users(self) -> str:
        """The ACL file that the entry point wrote."""
        return (self._folder / "users.acl").read_text()

    def client_of(self, user: str) -> redis.Redis:
        """A client that was let in as one of the services."""
        return self._client(user, self.passwords[f"{user.upper()}_PASSWORD"])

    def owner(self) -> redis.Redis:
        """A client that may do everything."""
        return self._client("owner", "any")

    def url_of(self, user: str) -> str:
        """Return the URL with the password of a user."""
        password = self.passwords[f"{user.upper()}_PASSWORD"]
        return f"redis://{user}:{password}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = self.run(self.passwords)
        wait_until(self.answers, what="the Redis server answers")

    def run(self, passwords: dict[str, str]) -> subprocess.Popen[bytes]:
        """Run the container's entry point with these passwords in its environment."""
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
        """Return the output of the server and its entry point."""
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
        except redis.ResponseError as error:
            # There is no such group, or key, which only who is let in is told.
            return "NOGROUP" in str(error) or "requires the key to exist" in str(error)

    return True


def channel(name: str) -> str:
    return f"eventbus:{{{name}}}:channel"


def stream(name: str) -> str:
    return f"eventbus:{{{name}}}:stream"


@pytest.mark.parametrize("user", RIGHTS)
def test_a_service_may_publish_only_its_own_events(server: GuardedServer, user: str) -> None:
    publishes, _ = RIGHTS[user]

    assert {name for name in SIGNALS if may(server, user, "PUBLISH", channel(name), "")} == (
        publishes
    )


@pytest.mark.parametrize("user", RIGHTS)
def test_a_service_may_subscribe_only_to_its_own_channels(server: GuardedServer, user: str) -> None:
    _, hears = RIGHTS[user]
    received = {name for name in SIGNALS if may(server, user, "SUBSCRIBE", channel(name))}

    if may(server, user, "PSUBSCRIBE", channel("*")):
        received.add("*")

    assert received == hears
    assert not may(server, user, "PSUBSCRIBE", "*")
    assert not may(server, user, "SUBSCRIBE", "elsewhere")


@pytest.mark.parametrize("user", STREAMS)
def test_a_service_may_write_only_the_streams_that_it_publishes(
    server: GuardedServer, user: str
) -> None:
    writes, _ = STREAMS[user]

    assert {
        name for name in SIGNALS if may(server, user, "XADD", stream(name), "*", "event", "")
    } == writes


@pytest.mark.parametrize("user", STREAMS)
def test_a_service_may_read_only_the_streams_that_it_subscribes_to(
    server: GuardedServer, user: str
) -> None:
    _, reads = STREAMS[user]
    group = ("GROUP", "tests", "tests", "STREAMS")

    assert {
        name for name in SIGNALS if may(server, user, "XREADGROUP", *group, stream(name), ">")
    } == reads


@pytest.mark.parametrize("command", BESIDE)
@pytest.mark.parametrize("user", STREAMS)
def test_a_service_may_write_only_its_own_group_retries_and_dead_letters(
    server: GuardedServer, user: str, command: str
) -> None:
    words = [command.format("eventbus:{user_registered}", owner).split() for owner in STREAMS]

    written = [
        owner for owner, each in zip(STREAMS, words, strict=True) if may(server, user, *each)
    ]

    if user == "ops":
        # People put what is to be tried again where it belongs.
        assert written == (list(STREAMS) if command.startswith("ZADD") else [])
    else:
        assert written == ([user] if "user_registered" in STREAMS[user][1] else [])


@pytest.mark.parametrize("command", FOREIGN)
@pytest.mark.parametrize("user", RIGHTS)
def test_no_service_may_run_any_other_command(
    server: GuardedServer, user: str, command: str
) -> None:
    # People remove the groups of services that are out of use.
    is_for_people = user == "ops" and command.startswith("XGROUP DESTROY")

    assert may(server, user, *command.split()) is is_for_people


def test_no_client_connects_without_a_user_or_with_a_wrong_password(server: GuardedServer) -> None:
    with redis.Redis(port=server.port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()

    for user in ("default", *RIGHTS, "health"):
        for password in ("", "any"):
            with raw_connection(server) as nobody:
                nobody.sendall(packed("AUTH", user, password))
                assert nobody.recv(100).startswith(b"-WRONGPASS")

    wrong = server.url_of("mailer").replace("mailer:", "accounts:")

    with redis.Redis.from_url(wrong) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_the_health_check_may_only_ping(server: GuardedServer) -> None:
    with server.client as client:
        assert client.ping()

        with pytest.raises(redis.exceptions.NoPermissionError):
            client.info()


@pytest.fixture
def refusals(server: GuardedServer) -> Iterator[Callable[[], list[object]]]:
    """Return the commands that the server refused since the test began."""
    with server.owner() as owner:
        owner.flushall()
        owner.acl_log_reset()
        yield owner.acl_log


def test_on_channels_the_bus_runs_no_command_that_the_acl_refuses(
    server: GuardedServer, make_bus: MakeBus, refusals: Callable[[], list[object]]
) -> None:
    received: list[str] = []
    publish = {"price_changed": {"confirm": True}}
    changing = make_bus(server.url_of("catalog"), "catalog", publish=publish)
    caching = make_bus(server.url_of("catalog"), "catalog")
    caching.on("price_changed", via="channel")(lambda sender, sku: received.append(sku))
    audit = make_bus(server.url_of("audit"), "audit")
    audit.on("*")(lambda sender, sku: received.append(sku))
    caching.start()
    audit.start()
    assert caching.ready(10)
    assert audit.ready(10)

    changing.signal("price_changed").send(sku="A1")

    wait_until(lambda: received == ["A1", "A1"], what="both hear it")
    assert refusals() == []


def test_on_streams_the_bus_runs_no_command_that_the_acl_refuses(
    server: GuardedServer, make_bus: MakeBus, refusals: Callable[[], list[object]]
) -> None:
    """The life of a stream: a retry, a dead letter, a worker that takes over, a group that goes."""
    written: list[int] = []
    mailed: list[int] = []
    at_work, go_on = threading.Event(), threading.Event()
    publish = {"user_registered": "stream"}
    subscribe = {"user_registered": {"via": "stream"}}
    registered = make_bus(server.url_of("accounts"), "accounts", publish=publish).signal(
        "user_registered"
    )
    first = make_bus(server.url_of("mailer"), "mailer", subscribe=subscribe)
    second = make_bus(server.url_of("mailer"), "mailer", subscribe=subscribe)
    audit = make_bus(server.url_of("audit"), "audit")

    @first.on("user_registered")
    def hesitate(sender: str, user_id: int) -> None:
        at_work.set()
        assert go_on.wait(10)

    @second.on("user_registered")
    def mail(sender: str, user_id: int) -> None:
        if user_id == 7:
            raise Reject("There is no such user.")

        if user_id == 8 and current_event.attempt == 1:
            raise Retry(after=0.01)

        mailed.append(user_id)

    @audit.on("*")
    def write(sender: str, user_id: int) -> None:
        written.append(user_id)

    for bus in (audit, first):
        bus.start()
        assert bus.ready(10)

    for user_id in range(1, 9):
        registered.send(user_id=user_id)

    assert at_work.wait(10)
    ending = threading.Thread(target=first.stop)
    ending.start()
    wait_until(lambda: not first.health().listening, what="the first worker ends")
    go_on.set()
    ending.join()
    second.start()

    wait_until(lambda: sorted(mailed) == [2, 3, 4, 5, 6, 8], what="the other worker takes over")
    wait_until(lambda: sorted(written) == [*range(1, 9)], what="audit hears all of it")
    wait_until(
        lambda: second.health().counts.get("dead_lettered") == 1, what="one is a dead letter"
    )
    with server.owner() as owner:
        owner.xgroup_destroy(stream("user_registered"), "mailer")

    wait_until(lambda: mailed.count(6) == 2, what="a new group begins at the beginning")
    second.stop()
    assert refusals() == []


def test_workers_may_record_trimmed_events(
    server: GuardedServer, make_bus: MakeBus, refusals: Callable[[], list[object]]
) -> None:
    counts = [Counters(), Counters()]
    key = stream("user_registered")

    for number, counters in enumerate(counts):
        pipe = Pipe(make_bus(server.url_of("mailer"), "mailer").node.connections, timeout=5)
        group = Group(
            pipe,
            keys=StreamKeys("eventbus"),
            service="mailer",
            consumer=f"{number}",
            max_bytes=1_000_000,
        )

        if number == 0:
            assert group.join({"user_registered": "$"}) == {"user_registered": None}

            with server.owner() as owner:
                for _ in range(10):
                    owner.xadd(key, {"event": b"x"})

                owner.xtrim(key, maxlen=3, approximate=False)

        Trims(group, service="mailer", counters=counters).check(["user_registered"])

    assert [counters.get("trimmed") for counters in counts] == [7, 0]
    assert refusals() == []


def test_a_restart_of_redis_keeps_the_outcome_of_an_event(
    server: GuardedServer, make_bus: MakeBus, refusals: Callable[[], list[object]]
) -> None:
    """A dead letter, a retry, and acknowledgements, which are written in transactions."""
    ran: list[int] = []
    key = stream("user_registered")
    outcomes = ("xlen", f"{key[:-7]}:dead:mailer"), ("zcard", f"{key[:-7]}:retry:mailer")
    registered = make_bus(
        server.url_of("accounts"), "accounts", publish={"user_registered": "stream"}
    ).signal("user_registered")

    def mailer() -> Bus:
        bus = make_bus(server.url_of("mailer"), "mailer")

        @bus.on("user_registered", via="stream")
        def mail(sender: str, user_id: int) -> None:
            ran.append(user_id)

            if user_id == 1:
                raise Reject("There is no such user.")

            if user_id == 2:
                raise Retry(after=3_600)

        bus.start()
        assert bus.ready(10)
        return bus

    def facts() -> list[int]:
        with server.owner() as owner:
            counts = [int(getattr(owner, command)(name)) for command, name in outcomes]
            return [*counts, int(owner.xpending(key, "mailer")["pending"])]

    first = mailer()

    for user_id in range(1, 51):
        registered.send(user_id=user_id)

    wait_until(lambda: len(ran) == 50 and facts() == [1, 1, 0], what="every event has its outcome")
    first.stop()

    server.restart()
    assert facts() == [1, 1, 0]
    second = mailer()
    registered.send(user_id=51)
    wait_until(lambda: 51 in ran, what="the next event is handled")
    assert ran == [*range(1, 52)]
    second.stop()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("status", 0),
        ("status --all", 0),
        ("dead list", 0),
        ("dead retry --all --wait 0", 1),  # no worker takes it
        ("dead purge --yes", 0),
        ("seek user_registered --to earliest --yes", 0),
        ("services forget mailer --yes", 0),
        ("services rename mailer notifier --yes", 0),
        ("routes", 0),
        ("check", 0),
        ("publish user_registered user_id=1 --stream", 0),
        ("publish price_changed sku=A1", 0),
        ("tail --seconds 0.1", 0),
    ],
)
def test_operators_may_run_every_command(
    server: GuardedServer, refusals: Callable[[], list[object]], words: str, code: int
) -> None:
    keep_a_stream_with_a_dead_letter(server)
    options = ["--url", server.url_of("ops"), "--service", "mailer"]

    result = CliRunner().invoke(main, [*options, *words.split()])

    assert result.exit_code == code, result.output
    assert refusals() == []


def keep_a_stream_with_a_dead_letter(server: GuardedServer) -> None:
    letter = DeadLetter(
        reason="retries",
        entry="1-1",
        fields={b"event": b"\x80"},
        event_id="0a1b2c3d4e5f-1",
        receiver="app.send_welcome",
        error="OSError: the mail server is away",
        attempts=6,
        first=1,
        last=2,
    )

    with server.owner() as owner:
        owner.sadd("eventbus:streams", "user_registered")
        owner.xadd(stream("user_registered"), {"event": b"\x80"}, id="1-1")
        owner.xgroup_create(stream("user_registered"), "mailer", id="$")
        owner.hset("eventbus:{user_registered}:seen:mailer:1", "0a1b2c3d4e5f-1", "digest")
        owner.execute_command(
            "XADD", "eventbus:{user_registered}:dead:mailer", "*", *letter.as_fields()
        )


def test_operators_may_repair_a_damaged_stream(
    server: GuardedServer, refusals: Callable[[], list[object]]
) -> None:
    keep_a_stream_with_a_dead_letter(server)
    key = stream("user_registered")

    assert may(server, "ops", "XREVRANGE", key, "+", "-", "COUNT", "2")
    assert may(server, "ops", "XDEL", key, "1-1")
    assert may(server, "ops", "XSETID", key, "1-1")
    assert may(server, "ops", "DEL", "eventbus:streams")


def test_a_refused_subscription_is_reported_in_health(
    server: GuardedServer, make_bus: MakeBus
) -> None:
    analytics = make_bus(server.url_of("analytics"), "analytics", subscribe=["user_registered"])

    analytics.start()
    wait_until(lambda: analytics.health().refused, what="the refusal is reported")

    assert "user_registered" in analytics.health().refused
    assert not analytics.health().connected


def test_the_acl_file_contains_no_password(server: GuardedServer) -> None:
    assert not re.search("secret-of|_PASSWORD", server.users)
    assert len(re.findall(r"#[0-9a-f]{64} ", server.users)) == len(server.passwords)


def test_a_missing_password_stops_the_start_and_is_named(tmp_path: Path) -> None:
    server = GuardedServer(tmp_path)
    del server.passwords["CATALOG_PASSWORD"]

    assert server.run(server.passwords).wait(10) == 1
    assert "CATALOG_PASSWORD is not set. Run deploy/make-secrets" in server.log


def test_every_setting_of_the_server_is_active(server: GuardedServer) -> None:
    settings = dict(
        line.split(" ", 1)
        for line in (REDIS / "redis.conf").read_text().splitlines()
        if line and not line.startswith("#")
    )
    del settings["aclfile"]

    with server.client_of("ops") as ops:
        found = {name: ops.config_get(name)[name] for name in settings}

    assert (found["appendonly"], found["appendfsync"], found["save"]) == ("yes", "everysec", "")
    assert found["maxmemory"] == str(256 * 1024 * 1024)
    assert found["maxmemory-policy"] == "noeviction"
    limits = found["client-output-buffer-limit"]
    assert "pubsub 67108864 16777216 60" in limits
    assert "normal 134217728 33554432 60" in limits
    assert found["maxmemory-clients"] == str(128 * 1024 * 1024)
    assert found["proto-max-bulk-len"] == str(4 * 1024 * 1024)
    assert found["client-query-buffer-limit"] == str(8 * 1024 * 1024)
    assert found["tcp-keepalive"] == "60"
    assert len(found) == 10


def raw_connection(server: GuardedServer) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(10)
    return connection


def packed(*words: str | bytes) -> bytes:
    """A command as Redis reads it."""
    parts = [word.encode() if isinstance(word, str) else word for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)


def let_in(server: GuardedServer, user: str) -> socket.socket:
    connection = raw_connection(server)
    connection.sendall(packed("AUTH", user, server.passwords[f"{user.upper()}_PASSWORD"]))
    assert connection.recv(100) == b"+OK\r\n"
    return connection


def test_an_argument_far_larger_than_an_event_is_refused_by_its_length(
    server: GuardedServer,
) -> None:
    with let_in(server, "health") as connection:
        connection.sendall(b"*2\r\n$4\r\nPING\r\n$%d\r\n" % (500 << 20))

        assert connection.recv(100) == b"-ERR Protocol error: invalid bulk length\r\n"


def test_a_client_that_does_not_read_its_replies_is_disconnected(
    server: GuardedServer, refusals: Callable[[], list[object]]
) -> None:
    """Nobody else notices: the events that others publish are taken."""
    key = stream("user_registered")

    with server.client_of("accounts") as accounts:
        for _ in range(20):
            accounts.xadd(key, {"event": b"x" * 1_000_000})

        with let_in(server, "mailer") as reader:
            reader.sendall(packed("XRANGE", key, "-", "+") * 10)
            wait_until(lambda: dropped(server, "client_output_buffer_limit") > 0, what="it is cut")

            assert accounts.xadd(key, {"event": b"y"})


def test_a_client_that_sends_behind_a_blocking_read_is_disconnected(
    server: GuardedServer, refusals: Callable[[], list[object]]
) -> None:
    """No argument is too long: it is what Redis has not run yet that is too much."""
    key = stream("user_registered")
    before = server.log.count("reached max query buffer length")

    with server.owner() as owner, let_in(server, "mailer") as attacker:
        owner.xgroup_create(key, "mailer", mkstream=True)
        read = ("XREADGROUP", "GROUP", "mailer", "a-1-b", "BLOCK", "60000", "STREAMS", key, ">")
        attacker.sendall(packed(*read))

        with suppress(OSError):
            for _ in range(10):
                attacker.sendall(packed("PING", b"x" * (3 << 20)))

        wait_until(
            lambda: server.log.count("reached max query buffer length") > before, what="it is cut"
        )

    with server.client_of("accounts") as accounts:
        assert accounts.xadd(key, {"event": b"y"})


def test_a_client_that_queues_an_endless_transaction_is_disconnected(
    server: GuardedServer, refusals: Callable[[], list[object]]
) -> None:
    """Redis 7.0 counts it as memory of a client, later versions as what is not run yet as well."""

    def cut() -> int:
        count = server.log.count("reached max query buffer length")
        return count + dropped(server, "evicted_clients")

    before = cut()

    with let_in(server, "mailer") as attacker, suppress(OSError):
        attacker.sendall(packed("MULTI"))

        for _ in range(100):
            attacker.sendall(packed("PING", b"x" * (3 << 20)))

    wait_until(lambda: cut() > before, what="it is cut")

    with server.client_of("accounts") as accounts:
        assert accounts.xadd(stream("user_registered"), {"event": b"y"})


def test_an_endless_publisher_is_refused_and_evicts_nothing(
    tmp_path: Path,
) -> None:
    server = GuardedServer(tmp_path)
    server.start()
    key = stream("user_registered")

    try:
        with let_in(server, "accounts") as attacker:
            answer = b""

            for _ in range(100):
                attacker.sendall(packed("XADD", key, "*", "event", b"x" * (3 << 20)))
                answer = attacker.recv(200)

                if answer.startswith(b"-"):
                    break

        assert answer.startswith(b"-OOM")

        with server.owner() as owner, server.client_of("accounts") as accounts:
            assert owner.xlen(key) > 60
            assert owner.info("stats")["evicted_keys"] == 0
            assert accounts.publish(channel("api_call"), b"y") == 0
    finally:
        server.kill()
        shutil.rmtree(tmp_path / "appendonlydir")


def test_a_listener_that_does_not_read_is_disconnected(
    server: GuardedServer, refusals: Callable[[], list[object]]
) -> None:
    before = dropped(server, "client_output_buffer_limit")

    with server.client_of("accounts") as accounts, let_in(server, "analytics") as listener:
        listener.sendall(packed("SUBSCRIBE", channel("api_call")))
        wait_until(lambda: accounts.publish(channel("api_call"), b"") == 1, what="it listens")
        sent = 0

        # What the sockets hold comes on top of the limit.
        while accounts.publish(channel("api_call"), b"x" * 1_000_000):
            sent += 1
            assert sent < 200

        assert sent > 60
        wait_until(
            lambda: dropped(server, "client_output_buffer_limit") > before, what="it is cut off"
        )


def test_the_buffers_of_all_clients_together_are_limited(
    server: GuardedServer, refusals: Callable[[], list[object]]
) -> None:
    """Each stays below the limit of one; the largest of them are cut off."""
    key = stream("user_registered")

    with server.client_of("accounts") as accounts, ExitStack() as stack:
        for _ in range(20):
            accounts.xadd(key, {"event": b"x" * 1_000_000})

        for _ in range(10):
            reader = stack.enter_context(let_in(server, "mailer"))
            reader.sendall(packed("XRANGE", key, "-", "+"))

        wait_until(lambda: dropped(server, "evicted_clients") > 0, what="the largest is cut off")
        assert accounts.xadd(key, {"event": b"y"})


def dropped(server: GuardedServer, what: str) -> int:
    """Return the number of clients that the server disconnected for a reason."""
    with server.owner() as owner:
        if what == "evicted_clients":
            return int(owner.info("stats")[what])

        return server.log.count("overcoming of output buffer limits")
