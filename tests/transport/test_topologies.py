"""More than one Redis: a master that Sentinel replaces, and a cluster that loses a node."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import RedisServer, free_port
from topologies import Watched, rooms_in
from waiting import wait_until

from flask_eventbus import Bus

pytestmark = [
    pytest.mark.second_look("waits for Sentinel and Cluster to elect another master"),
    pytest.mark.timing(ping_after=1.0),
]

MakeBus = Callable[..., Bus]


#: The slots of each node of a cluster of three.
SLOTS = ((0, 5460), (5461, 10922), (10923, 16383))


class Cluster:
    """Three masters, each with a third of the slots."""

    def __init__(self, folder: Path) -> None:
        self._bus_ports = [free_port() for _ in SLOTS]
        self.nodes = [
            RedisServer(
                room,
                *("--cluster-enabled", "yes", "--cluster-port", str(port)),
                *("--cluster-node-timeout", "1000"),
            )
            for room, port in zip(rooms_in(folder), self._bus_ports, strict=False)
        ]

    @property
    def url(self) -> str:
        """The URL for a service."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> None:
        """Start all, and wait until they are one cluster."""
        for number, node in enumerate(self.nodes):
            node.start()
            ask(node, "CLUSTER", "ADDSLOTSRANGE", *SLOTS[number])
            ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)

        for node, port in zip(self.nodes[1:], self._bus_ports[1:], strict=True):
            ask(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, port)

        wait_until(self._is_whole, timeout=30, what="the nodes are one cluster")

    def kill(self) -> None:
        """End all."""
        for node in self.nodes:
            node.kill()

    def node_of(self, bus: Bus) -> RedisServer:
        """The node that a connection of ``bus`` goes to."""
        living = (node for node in self.nodes if node.answers())
        return next(node for node in living if is_connected(bus, node))

    def is_broken(self) -> bool:
        """Return True if every node that runs refuses commands with keys."""
        living = [node for node in self.nodes if node.answers()]
        return all("cluster_state:fail" in str(ask(node, "CLUSTER", "INFO")) for node in living)

    def _is_whole(self) -> bool:
        return all(knows_the_cluster(node) for node in self.nodes)


def ask(server: RedisServer, *command: str | int) -> object:
    with server.client as client:
        answer: object = client.execute_command(*command)

    return answer


def is_master(server: RedisServer) -> bool:
    with server.client as client:
        return bool(client.info("replication")["role"] == "master")


def knows_the_cluster(node: RedisServer) -> bool:
    info = str(ask(node, "CLUSTER", "INFO"))
    return "cluster_state:ok" in info and "cluster_known_nodes:3" in info


def is_connected(bus: Bus, server: RedisServer) -> bool:
    """Return True if ``bus`` has a connection to this server."""
    health = bus.health()

    with server.client as client:
        names = [entry["name"] for entry in client.client_list()]

    return f"eventbus:{health.service}:{health.node}" in names


class Pair:
    """A service that publishes numbers, and one that hears them."""

    def __init__(self, make_bus: MakeBus, url: str) -> None:
        self.publisher = make_bus(url, "shop", publish=["tick"])
        self.listener = make_bus(url, "clock")
        self.listener.on("tick")(self._hear)
        self.received: list[int] = []
        self._numbers = itertools.count()
        self.listener.start()
        assert self.listener.ready(10)
        self.send()
        assert self.publisher.flush(10)

    def send(self) -> int:
        """Publish the next number."""
        number = next(self._numbers)
        self.publisher.signal("tick").send(number=number)
        return number

    def go_on(self) -> None:
        """Publish until something arrives that is sent from now on; then nothing may be lost."""
        first = self.send()
        wait_until(lambda: self.send() and self._heard_since(first), timeout=40, what="it goes on")

        numbers = [self.send() for _ in range(100)]

        wait_until(
            lambda: self.received[-100:] == numbers, what="everything sent arrives, in order"
        )

    def _hear(self, sender: str, number: int) -> None:
        self.received.append(number)

    def _heard_since(self, first: int) -> bool:
        return any(number >= first for number in self.received)


@contextmanager
def running(servers: Watched | Cluster) -> Iterator[None]:
    """Leave none of them behind, though some did not start."""
    try:
        servers.start()
        yield
    finally:
        servers.kill()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    servers = Watched(tmp_path)

    with running(servers):
        yield servers


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    servers = Cluster(tmp_path)

    with running(servers):
        yield servers


def test_after_the_death_of_a_master_both_sides_continue_with_the_new_one(
    watched: Watched, make_bus: MakeBus
) -> None:
    pair = Pair(make_bus, watched.url)

    watched.master.kill()
    pair.go_on()

    assert is_master(watched.replica)
    assert is_connected(pair.publisher, watched.replica)
    assert is_connected(pair.listener, watched.replica)


def test_when_a_master_hangs_both_sides_continue_with_the_new_one(
    watched: Watched, make_bus: MakeBus
) -> None:
    pair = Pair(make_bus, watched.url)

    watched.master.hang()
    pair.go_on()
    watched.master.resume()

    assert is_connected(pair.publisher, watched.replica)
    assert is_connected(pair.listener, watched.replica)


def test_when_a_master_becomes_a_replica_both_sides_move_to_the_new_one(
    watched: Watched, make_bus: MakeBus
) -> None:
    pair = Pair(make_bus, watched.url)

    watched.fail_over()
    wait_until(lambda: pair.send() and is_connected(pair.publisher, watched.replica), timeout=40)
    wait_until(lambda: is_connected(pair.listener, watched.replica), timeout=40)
    pair.go_on()

    wait_until(lambda: not is_master(watched.master), timeout=30, what="the old one follows")


def test_an_unreachable_sentinel_does_not_delay_the_start(
    watched: Watched, make_bus: MakeBus
) -> None:
    watched.kill_a_sentinel()

    begin = time.monotonic()
    Pair(make_bus, watched.url).go_on()

    assert time.monotonic() - begin < 10


def test_an_event_reaches_listeners_at_every_cluster_node_once(
    cluster: Cluster, make_bus: MakeBus
) -> None:
    received: list[tuple[int, int]] = []

    for number, node in enumerate(cluster.nodes):
        bus = make_bus(f"redis+cluster://127.0.0.1:{node.port}", f"listener-{number}")
        bus.on("tick")(lambda sender, value, number=number: received.append((number, value)))
        bus.start()
        assert bus.ready(10)

    publisher = make_bus(cluster.url, "shop", publish=["tick"])

    for value in range(100):
        publisher.signal("tick").send(value=value)

    wait_until(lambda: len(received) >= 300, what="every event arrives at every node")
    assert sorted(received) == [(number, value) for number in range(3) for value in range(100)]


def test_a_listener_moves_to_another_cluster_node_when_its_node_dies(
    cluster: Cluster, make_bus: MakeBus
) -> None:
    pair = Pair(make_bus, cluster.url)

    cluster.node_of(pair.listener).kill()
    pair.go_on()

    assert cluster.node_of(pair.listener)


def test_a_cluster_that_has_lost_slots_still_carries_events(
    cluster: Cluster, make_bus: MakeBus
) -> None:
    pair = Pair(make_bus, cluster.url)

    cluster.nodes[0].kill()
    wait_until(cluster.is_broken, what="the others know that slots are lost")
    pair.go_on()


def test_a_publisher_moves_to_another_cluster_node_when_its_node_dies(
    cluster: Cluster, make_bus: MakeBus
) -> None:
    pair = Pair(make_bus, cluster.url)

    cluster.node_of(pair.publisher).kill()
    pair.go_on()

    assert cluster.node_of(pair.publisher)
