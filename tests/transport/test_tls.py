"""Redis behind TLS: certificates on both sides, and what is said when one of them is wrong."""

from __future__ import annotations

import gc
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import RedisServer, require, server_executable
from tls_servers import Authority, TlsServer
from topologies import Sentinel
from waiting import wait_until

from flask_eventbus import Bus, PublishError
from flask_eventbus.checks.server import check
from flask_eventbus.signals import listener_connected, listener_lost
from flask_eventbus.transport.connections import Connections
from flask_eventbus.transport.timed_connection import TimedConnection, class_for

pytestmark = pytest.mark.second_look("starts and restarts TLS servers")

MakeBus = Callable[..., Bus]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


class TlsSentinel(TlsServer):
    """A Sentinel that speaks TLS alone, with its clients and with its master."""

    def __init__(self, folder: Path, master: TlsServer, host: str = "localhost") -> None:
        super().__init__(folder, master.authority)
        options = " ".join(self._options).removeprefix("--").split(" --")
        lines = [
            *(*options, "tls-replication yes", "bind 127.0.0.1", f"dir {folder}"),
            "sentinel resolve-hostnames yes",
            "sentinel announce-hostnames yes",
            f"sentinel monitor mymaster {host} {master.port} 1",
        ]
        (folder / "sentinel.conf").write_text("\n".join(lines))

    def start(self) -> None:
        command = [str(server_executable()), str(self._folder / "sentinel.conf"), "--sentinel"]

        with (self._folder / "sentinel.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

        wait_until(self.answers, what="the Sentinel answers")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TlsServer]:
    require("a redis-server, whose builds have TLS", shutil.which("redis-server"))
    server = TlsServer(folder, Authority(folder, "ours"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[TlsServer]:
    """One that a test may restart."""
    require("a redis-server, whose builds have TLS", shutil.which("redis-server"))
    server = TlsServer(tmp_path, Authority(tmp_path, "ours"))
    server.start()
    yield server
    server.kill()


def test_sentinels_and_the_master_are_reached_over_tls(
    tmp_path: Path, server: TlsServer, make_bus: MakeBus
) -> None:
    sentinel = TlsSentinel(tmp_path, server)
    sentinel.start()
    url = sentinel.url.replace("rediss", "rediss+sentinel").replace("/0?", "/mymaster/0?")
    plain = url.partition("?")[0].replace("rediss", "redis")

    try:
        bus = make_bus(url, publish={"tick": "stream"}, on_outage="raise", timeout=5)
        bus.signal("tick").send("test", n=1)

        with pytest.raises(redis.ConnectionError, match=r"start 'EVENTBUS_URL' with 'rediss\+sent"):
            Connections(plain, name="tests").open(timeout=5)
    finally:
        sentinel.kill()


def test_the_error_for_a_master_certificate_with_another_name_gives_the_reason(
    tmp_path: Path, server: TlsServer
) -> None:
    sentinel = TlsSentinel(tmp_path, server, "127.0.0.1")
    sentinel.start()
    url = sentinel.url.replace("rediss", "rediss+sentinel").replace("/0?", "/mymaster/0?")
    url += "&ssl_check_hostname=true"

    try:
        with pytest.raises(redis.ConnectionError, match="set 'sentinel announce-hostnames yes'"):
            Connections(url, name="tests").open(timeout=5)
    finally:
        sentinel.kill()


def test_the_error_for_tls_to_plain_sentinels_gives_the_reason(
    tmp_path: Path, server: TlsServer
) -> None:
    sentinel = Sentinel(tmp_path, server)
    sentinel.start()
    url = f"rediss+sentinel://127.0.0.1:{sentinel.port}/mymaster/0"

    try:
        with pytest.raises(redis.ConnectionError, match=r"does not speak TLS, start .*'redis.sent"):
            Connections(url, name="tests").open(timeout=5)
    finally:
        sentinel.kill()


def loss_of(bus: Bus) -> str:
    """Return the error of a bus that cannot connect to listen."""
    errors: list[str] = []

    def note(sender: str, error: Exception) -> None:
        errors.append(str(error))

    with listener_lost.connected_to(note, sender=bus.health().service):
        bus.start()
        wait_until(lambda: errors, what="the loss is reported")

    return errors[0]


def test_events_travel_over_tls_with_a_certificate_on_each_side(
    server: TlsServer, make_bus: MakeBus
) -> None:
    publisher = make_bus(server.url, "shop", publish={"order_paid": {"confirm": True}})
    listener = make_bus(server.url, "mailer")
    received: list[tuple[str, int]] = []
    listener.on("order_paid")(lambda sender, number: received.append((sender, number)))
    listener.start()
    assert listener.ready(10)

    for number in range(500):
        publisher.signal("order_paid").send(number=number)

    wait_until(lambda: len(received) == 500, what="every event arrives")
    assert received == [("shop", number) for number in range(500)]


def test_a_large_event_arrives_whole_over_tls(server: TlsServer, make_bus: MakeBus) -> None:
    publisher = make_bus(server.url, "shop", publish=["report_ready"])
    listener = make_bus(server.url, "mailer")
    received: list[bytes] = []
    listener.on("report_ready")(lambda sender, body: received.append(body))
    listener.start()
    assert listener.ready(10)

    body = bytes(range(256)) * 3_000
    publisher.signal("report_ready").send(body=body)

    assert wait_until(lambda: received, what="the event arrives") == [body]


def test_a_server_signed_by_an_unknown_authority_is_refused_with_the_reason(
    server: TlsServer, folder: Path, make_bus: MakeBus
) -> None:
    url = server.url_with(ssl_ca_certs=Authority(folder, "theirs").certificate)
    bus = make_bus(url, "wrong-ca", subscribe=["order_paid"])

    loss = loss_of(bus)
    assert "CERTIFICATE_VERIFY_FAILED" in loss
    assert "Add 'ssl_ca_certs=FILE' to 'EVENTBUS_URL'" in loss


def test_publishing_to_a_server_with_a_wrong_certificate_fails_with_the_reason(
    server: TlsServer, folder: Path, make_bus: MakeBus
) -> None:
    url = server.url_with(ssl_ca_certs=Authority(folder, "others").certificate)
    publish = {"order_paid": {"confirm": True}}
    bus = make_bus(url, "shop", publish=publish, on_outage="raise", timeout=1.0)

    begin = time.monotonic()

    with pytest.raises(PublishError, match="CERTIFICATE_VERIFY_FAILED"):
        bus.signal("order_paid").send(number=1)

    assert time.monotonic() - begin < 5
    assert not bus.health().publishing


def test_a_server_whose_certificate_names_another_host_is_refused_with_the_reason(
    server: TlsServer, make_bus: MakeBus
) -> None:
    url = server.url.replace("localhost", "127.0.0.1") + "&ssl_check_hostname=true"
    bus = make_bus(url, "other-host", subscribe=["order_paid"])

    loss = loss_of(bus)
    assert "mismatch" in loss
    assert "Write the host in 'EVENTBUS_URL' as in the server's certificate" in loss


def test_a_client_without_a_certificate_is_refused(server: TlsServer, make_bus: MakeBus) -> None:
    url = server.url_with(ssl_certfile=None, ssl_keyfile=None)
    bus = make_bus(url, "no-certificate", subscribe=["order_paid"])

    # Over TLS 1.3 the server says why after the handshake; the words depend on who is faster.
    assert "add 'ssl_certfile=FILE' and 'ssl_keyfile=FILE'" in loss_of(bus)
    assert not bus.ready(0.5)


def test_a_plain_url_on_a_tls_port_is_reported_as_a_lost_connection(
    server: TlsServer, make_bus: MakeBus
) -> None:
    bus = make_bus(f"redis://localhost:{server.port}/0", "plain", subscribe=["order_paid"])

    assert "If the port speaks TLS, start 'EVENTBUS_URL' with 'rediss://'" in loss_of(bus)

    begin = time.monotonic()
    bus.stop(flush=0)
    assert time.monotonic() - begin < 5


def test_the_error_for_a_tls_url_on_a_plain_port_names_the_right_scheme(
    shared_redis: RedisServer, make_bus: MakeBus
) -> None:
    url = shared_redis.url.replace("redis://", "rediss://")
    bus = make_bus(url, "tls-on-plain", subscribe=["order_paid"])

    assert "If the port does not speak TLS, start 'EVENTBUS_URL' with 'redis://'" in loss_of(bus)


def test_the_error_names_a_missing_certificate_file(server: TlsServer, make_bus: MakeBus) -> None:
    url = server.url_with(ssl_ca_certs=Path("/no/such/ca.crt"))
    bus = make_bus(url, "no-file", subscribe=["order_paid"])

    assert "Correct the path of 'ssl_ca_certs' in 'EVENTBUS_URL': '/no/such/ca.crt'" in loss_of(bus)


def test_check_reports_a_tls_error_instead_of_advising_to_start_the_server(
    server: TlsServer, make_bus: MakeBus
) -> None:
    bus = make_bus(f"redis://localhost:{server.port}/0", "checked", publish=["order_paid"])

    [finding] = [found for found in check(bus.node) if found.level == "error"]

    assert finding.remedy == "If the port speaks TLS, start 'EVENTBUS_URL' with 'rediss://'."
    assert "rediss" not in finding.text


def test_a_listener_over_tls_reconnects_after_a_restart(
    own_server: TlsServer, make_bus: MakeBus
) -> None:
    publisher = make_bus(own_server.url, "shop", publish=["order_paid"])
    listener = make_bus(own_server.url, "restarts")
    received: list[int] = []
    listener.on("order_paid")(lambda sender, number: received.append(number))
    listener.start()
    assert listener.ready(10)
    back: list[float] = []

    def note(sender: str, reconnected: bool, seconds: float) -> None:
        back.append(seconds)

    with listener_connected.connected_to(note, sender="restarts"):
        own_server.restart()
        wait_until(lambda: back, timeout=20, what="the listener is back")

    publisher.signal("order_paid").send(number=1)

    wait_until(lambda: received == [1], what="the event arrives")


def test_the_socket_of_a_connection_that_is_reset_before_its_handshake_is_closed() -> None:
    connection: Any = class_for(redis.SSLConnection)(socket_timeout=5.0)
    assert isinstance(connection, TimedConnection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        # So that its end is a reset.
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        select.select([ours], [], [], 10)

        with pytest.raises(OSError, match=r"not connected|reset"):
            connection._wrap_socket_with_ssl(ours)

    # A socket that is left open makes the collection warn, which fails the test.
    gc.collect()
    assert ours.fileno() == -1
