"""A promise about time holds for the whole, and not for each answer, address or event of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import redis
from click.testing import CliRunner
from proxies import Proxy
from servers import RedisServer
from stream_store import StreamStore

from flask_eventbus import Bus, PublishError
from flask_eventbus.__main__ import main
from flask_eventbus.admin.dead_letters import Choice, DeadLetters
from flask_eventbus.admin.server import census, publish_one
from flask_eventbus.admin.streams import StreamAccess
from flask_eventbus.channels.reader import ChannelReader
from flask_eventbus.checks.server import check_server
from flask_eventbus.config import TIMING, Config
from flask_eventbus.errors import OperationError
from flask_eventbus.publisher import writer
from flask_eventbus.transport.connection import OUTAGE
from flask_eventbus.transport.connections import Connections
from flask_eventbus.transport.pipe import Pipe

pytestmark = pytest.mark.second_look("measures time limits, which a busy machine can exceed")

Make = Callable[..., Bus]

#: Seconds between two answers of the slow server: less than any single wait may take.
PAUSE = 0.4

#: Seconds more than promised that a machine which is busy may need.
BUSY = 1.0


@pytest.fixture
def slow(shared_redis: RedisServer) -> Iterator[Proxy]:
    """A server that can be made slow."""
    proxy = Proxy(shared_redis.port)
    yield proxy
    proxy.close()


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """The block takes no longer than that, and a little for a machine that is busy."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + BUSY


@pytest.fixture
def hanging() -> Iterator[str]:
    """Four servers that take connections and never answer."""
    with ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        yield ",".join(f"127.0.0.1:{each.getsockname()[1]}" for each in listening)


@contextmanager
def deaf() -> Iterator[tuple[str, int]]:
    """The address of a server that does not so much as take connections."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address: tuple[str, int] = listening.getsockname()

        # They fill its queue: of those that follow, none gets an answer.
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)

        yield address


def _address(host: str, port: int) -> tuple[int, int, int, str, tuple[str, int]]:
    return socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port)


def test_the_connect_timeout_covers_all_replies_of_the_handshake(slow: Proxy) -> None:
    slow.pause = PAUSE
    connections = Connections(slow.url[:-1] + "5", name="tests")

    with ends_within(0.6), pytest.raises(OUTAGE):
        connections.open(timeout=0.6)


@pytest.mark.parametrize("url", ["redis+sentinel://{}/mymaster", "redis+cluster://{}"])
def test_the_connect_timeout_covers_all_addresses_of_the_url(url: str, hanging: str) -> None:
    connections = Connections(url.format(hanging), name="tests")

    with ends_within(0.6), pytest.raises(OUTAGE):
        connections.open(timeout=0.6)


def test_an_address_that_hangs_leaves_time_for_the_next_one(
    hanging: str, shared_redis: RedisServer
) -> None:
    url = f"redis+cluster://{hanging},127.0.0.1:{shared_redis.port}"

    # The order is by chance.
    for _ in range(3):
        Connections(url, name="tests").open(timeout=3.0).disconnect()


def test_closing_a_pipe_gives_all_replies_together_the_remaining_time(slow: Proxy) -> None:
    pipe = Pipe(Connections(slow.url, name="tests"), timeout=2.0)
    pipe.ask("PING")
    slow.pause = PAUSE
    pipe.deadline = time.monotonic() + 0.6

    with ends_within(0.6), pytest.raises(redis.TimeoutError):
        pipe.run([("PING",)] * 20)


def test_send_blocks_at_most_its_timeout_when_replies_come_one_by_one(
    slow: Proxy, make_bus: Make
) -> None:
    bus = make_bus(slow.url, prefix="time-limits", publish={"tick": "stream"}, timeout=0.6)
    bus.signal("tick").send("test", n=0)
    slow.pause = PAUSE

    # With the lock nobody else writes: the sender has all of it in one batch.
    with ends_within(0.6), bus.node._publisher._buffer.lock:
        for number in range(1, 12):
            bus.node.publish("tick", {"n": number}, confirm=False)

        bus.signal("tick").send("test", n=12)

    slow.pause = 0.0
    assert bus.flush(20)


@pytest.mark.parametrize("form", ["redis://{}", "redis+sentinel://{}/mymaster"])
def test_the_connect_timeout_holds_when_a_reply_trickles(slow: Proxy, form: str) -> None:
    slow.pause, slow.dribbles = 0.1, True
    connections = Connections(form.format(f"127.0.0.1:{slow.port}"), name="tests")

    with ends_within(0.6), pytest.raises(OUTAGE):
        connections.open(timeout=0.6)


@pytest.mark.parametrize("given", [True, False])
def test_a_pipe_ends_at_its_deadline_when_a_reply_trickles(slow: Proxy, given: bool) -> None:
    pipe = Pipe(Connections(slow.url, name="tests"), timeout=2.0)
    pipe.ask("PING")
    slow.pause, slow.dribbles = PAUSE, True
    end = time.monotonic() + 1.0

    if given:
        pipe.deadline = end
    else:
        # The bus stops while an answer comes.
        threading.Timer(PAUSE, setattr, [pipe, "deadline", end]).start()

    with ends_within(1.0), pytest.raises(redis.TimeoutError):
        pipe.ask("INFO", "server")


def test_asking_for_the_role_blocks_a_listener_for_a_second_at_most(
    slow: Proxy,
) -> None:
    reader = ChannelReader(Connections(slow.url, name="tests"))
    reader.connect()
    reader.check_role()
    slow.pause, slow.dribbles = PAUSE, True

    with ends_within(TIMING.tick):
        reader.check_role()

    reader.close()


def test_send_blocks_at_most_its_timeout_when_a_reply_trickles(slow: Proxy, make_bus: Make) -> None:
    bus = make_bus(slow.url, prefix="time-limits", publish={"tick": "stream"}, timeout=0.6)
    bus.signal("tick").send("test", n=0)
    slow.pause, slow.dribbles = PAUSE, True

    with ends_within(0.6):
        bus.signal("tick").send("test", n=1)

    slow.pause, slow.dribbles = 0.0, False
    assert bus.flush(20)


def test_the_connect_timeout_covers_all_addresses_of_a_host_name(
    shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = [("127.0.0.1", shared_redis.port)]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args: [_address(*each) for each in addresses]
    )
    connections = Connections("redis://redis.example:6379", name="tests")

    with ExitStack() as stack:
        addresses[:0] = [stack.enter_context(deaf()) for _ in range(3)]
        connections.open(timeout=3.0).disconnect()
        addresses.pop()

        with ends_within(0.6), pytest.raises(OUTAGE):
            connections.open(timeout=0.6)


def test_the_connect_timeout_covers_the_tls_handshake(hanging: str) -> None:
    connections = Connections(f"rediss://{hanging.partition(',')[0]}", name="tests")

    with ends_within(0.6), pytest.raises(OUTAGE):
        connections.open(timeout=10.0, within=0.6)


def test_send_blocks_at_most_its_timeout_when_no_thread_can_be_started(
    redis_server: RedisServer, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"}, timeout=0.3)
    monkeypatch.setattr(writer.Writer, "_start", lambda writer: None)
    redis_server.hang()

    with ends_within(0.3), pytest.raises(PublishError, match="was not published"):
        bus.signal("tick").send("test", n=0)

    redis_server.resume()


def test_a_commit_waits_once_for_room_for_all_its_events(slow: Proxy, make_bus: Make) -> None:
    bus = make_bus(
        slow.url, prefix="time-limits", publish=["tick"], buffer_size=1, timeout=2 * PAUSE
    )
    bus.signal("tick").send("test", n=0)
    assert bus.flush(10)
    node = bus.node
    route = node.route_for("tick")
    drafts = [node._publisher.prepare_pending("tick", {"n": number}, route) for number in range(10)]
    slow.pause = PAUSE

    with ends_within(2 * PAUSE):
        node._after_commit.publish(drafts)


def test_a_commit_that_waits_for_confirmations_ends_as_soon_as_redis_refuses(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, publish={"tick": "stream"}, timeout=30)
    bus.signal("tick").send("test", n=0)
    node = bus.node
    route = node.route_for("tick")
    drafts = [node._publisher.prepare_pending("tick", {"n": number}, route) for number in range(3)]
    redis_server.kill()

    with ends_within(10):
        assert node._after_commit.publish(drafts) == drafts


def test_the_publish_command_waits_three_seconds_for_all_replies(
    slow: Proxy, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_eventbus.admin.server.TIMEOUT", 1.0)
    node = make_bus(slow.url, prefix="time-limits", publish=["tick"]).node
    slow.pause = 0.3

    with ends_within(1.0), pytest.raises(PublishError, match="cannot be used"):
        publish_one(node, "tick", {})


@pytest.mark.parametrize(
    ("command", "module"),
    [("check", "checks.server"), ("routes", "admin.server"), ("status", "cli.status")],
)
def test_an_inspecting_command_has_one_timeout_for_all_replies(
    slow: Proxy, monkeypatch: pytest.MonkeyPatch, command: str, module: str
) -> None:
    monkeypatch.setattr(f"flask_eventbus.{module}.PATIENCE", 1.0)
    slow.pause, slow.dribbles = 0.1, True

    with ends_within(1.0):
        result = CliRunner().invoke(main, ["--url", slow.url, command])

    assert result.exit_code == 1
    assert "Check that the server is not blocked and no firewall drops packets." in result.output


def test_check_and_routes_ask_about_many_streams_in_few_round_trips(
    redis_server: RedisServer, make_bus: Make
) -> None:
    requests: list[bytes] = []
    names = [f"tick_{number}" for number in range(40)]

    def note(data: bytes) -> bytes:
        requests.append(data)
        return data

    proxy = Proxy(redis_server.port, request=lambda: note)
    publisher = make_bus(proxy.url, publish=dict.fromkeys(names, "stream"))
    subscriber = make_bus(proxy.url, subscribe={name: {"via": "stream"} for name in names})

    for name in names:
        publisher.signal(name).send("test")

    requests.clear()
    census(publisher.node)
    of_routes = len(requests)
    list(check_server(subscriber.node, service="tests"))
    of_check = len(requests) - of_routes
    proxy.close()

    assert of_routes < len(names)
    # Three times for each stream, and some for the server.
    assert of_check < 5 * len(names)


def test_dead_retry_watches_for_its_wait_when_replies_trickle(
    slow: Proxy, shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_eventbus.admin.dead_letters.TIMEOUT", 0.5)
    store = StreamStore(shared_redis)
    store.give_up("tick")
    config = Config(service="mailer", url=slow.url, prefix=store.prefix)

    with StreamAccess(config, name="tests") as access:
        retrials = DeadLetters(access, "mailer")
        (letter,) = retrials.find(Choice())
        retrial = retrials.put_back(letter)
        assert retrial is not None
        slow.pause, slow.dribbles = 0.2, True

        with ends_within(1.0), pytest.raises(OperationError, match="cannot be used"):
            list(retrials.settled([retrial], 0.5))
