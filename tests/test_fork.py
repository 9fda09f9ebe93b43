"""A forked child is a node of its own, and its parent goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from programs import Service
from servers import RedisServer
from waiting import wait_until

pytestmark = pytest.mark.second_look("forks processes with running threads, and kills them")

#: What every program begins with. From Python 3.12 on, a fork beside threads is warned of.
PROGRAM = """
import ctypes
import os
import sys
import threading
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)

from flask_eventbus import Bus
from serving_app.reports import report, wait_until_released
from waiting import wait_until

bus = Bus.from_env()
called = bus.signal("called")

@bus.on("called")
def hear(sender, number):
    report("called", number=number, node=bus.node.name)

def fork_without_hooks():
    # As uWSGI does it: Python runs no hook, and does not know that it is a child. A thread that
    # waits for the interpreter at that very moment would make the child's unusable.
    seen = []
    wait_until(lambda: seen.append(switches()) or seen[-2:-1] == seen[-1:], what="threads rest")
    return ctypes.PyDLL(None).fork()

def switches():
    # How often each other thread gave up its processor.
    tasks = [path for path in Path("/proc/self/task").iterdir() if path.name != str(os.getpid())]
    return [line for task in tasks for line in (task / "status").read_text().splitlines()[-2:]]

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@pytest.fixture
def service(tmp_path: Path, redis_server: RedisServer) -> Iterator[Service]:
    """A service on a server of its own."""
    service = Service(tmp_path, redis_server)
    yield service
    redis_server.resume()
    service.end()


class Wire:
    """Everything that is published with a service's prefix, as it is."""

    def __init__(self, service: Service) -> None:
        self._pubsub = service.server.client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.psubscribe(f"{service.name}:*")
        self._seen: list[dict[str, Any]] = []
        wait_until(lambda: self._pubsub.subscribed, what="the test sees the wire")

    def events(self, count: int) -> list[dict[str, Any]]:
        """Wait until there are so many."""
        wait_until(lambda: self._read() >= count, what=f"{count} events on the wire")
        return self._seen

    def _read(self) -> int:
        while found := self._pubsub.get_message():
            unpacker = msgpack.Unpacker(timestamp=3)
            unpacker.feed(found["data"])
            self._seen += unpacker

        return len(self._seen)


def node_of(event: dict[str, Any]) -> str:
    """The node that made an event."""
    return str(event["id"]).rpartition("-")[0]


def test_a_forked_child_publishes_as_a_separate_node_and_listens_only_when_started(
    service: Service,
) -> None:
    wire = Wire(service)
    service.write(
        "program.py",
        f"""{PROGRAM}
bus.publishes(called)
bus.start()
called.send(number=1)
assert bus.ready(5) and bus.flush(5)
before = bus.node.name
child = os.fork()

if child == 0:
    assert bus.node.name != before
    assert not bus.health().listening
    assert not bus.health().counts
    called.send(number=2)
    report("forked")
    wait_until_released("START")
    bus.start()
    wait_until_released("RELEASE")
    sys.exit(0)

wait_until_released("SEND")
assert bus.node.name == before
called.send(number=4)
print("the child ended with", ended(child))
""",
    )
    start, send = service.folder / "start", service.folder / "send"
    program = service.run("program.py", START=str(start), SEND=str(send))
    service.wait_for("forked")
    child = service.reports("forked")[0]["pid"]

    service.wait_for("called", pid=program.pid, number=2)
    assert len(service.listeners(1)) == 1
    service.publish("called", number=3)
    service.wait_for("called", pid=program.pid, number=3)
    start.touch()
    service.listeners(2)
    send.touch()
    service.wait_for("called", pid=child, number=4)
    service.release.touch()

    assert program.end() == 0
    assert "the child ended with 0" in program.output
    received = {
        pid: [line["number"] for line in service.reports("called", pid=pid)]
        for pid in (program.pid, child)
    }
    assert received == {program.pid: [1, 2, 3, 4], child: [2, 4]}
    nodes = [node_of(event) for event in wire.events(4) if event["source"] == service.name]
    assert nodes[0] == nodes[2] != nodes[1]


@pytest.mark.parametrize(
    "before",
    [
        "pass",
        "called.send(number=0); assert bus.flush(5)",
        # As on a system whose kernel does not mark the memory of a child.
        "from flask_eventbus import ending; ending.page = None",
    ],
    ids=["unused", "used", "unmarked"],
)
def test_a_child_forked_without_hooks_is_a_separate_node(service: Service, before: str) -> None:
    wire = Wire(service)
    service.write(
        "program.py",
        f"""{PROGRAM}
paid = bus.publishes("paid", via="stream")
bus.publishes(called)
{before}
parent = bus.node.name
children = []

for number in (1, 2):
    child = fork_without_hooks()

    if child == 0:
        # Threads of the child find out at the same time.
        threads = [threading.Thread(target=paid.send, kwargs={{"number": number}}) for _ in "abc"]

        for thread in threads:
            thread.start()

        for thread in threads:
            thread.join()

        called.send(number=number)
        assert bus.flush(5)
        health = bus.health()
        report("forked", node=health.node, counts=health.counts)
        bus.start()
        wait_until_released("RELEASE")
        os._exit(0)

    children.append(child)

report("parent", node=bus.node.name, same=parent == bus.node.name)
bus.start()
report("ended", codes=[ended(child) for child in children])
""",
    )
    program = service.run("program.py")
    service.wait_for("forked", 2)
    (parent,) = service.wait_for("parent", same=True)
    forked = service.reports("forked")
    nodes = {line["node"] for line in forked}

    assert service.listeners(3) == nodes | {parent["node"]}
    assert {line["counts"].get("published") for line in forked} == {4}
    events = wire.events(3 if "send" in before else 2)
    assert {node_of(event) for event in events if event["data"]["number"]} == nodes
    redis: Any = service.server.client
    entries = redis.xrange(f"{service.name}:{{paid}}:stream")
    ids = [msgpack.unpackb(fields[b"event"], timestamp=3)["id"] for _, fields in entries]
    assert len(ids) == len(set(ids)) == 6

    service.release.touch()
    service.wait_for("ended", codes=[0, 0])
    assert program.end() == 0


def test_a_forked_child_does_not_publish_the_buffer_of_its_parent(service: Service) -> None:
    wire = Wire(service)
    service.write(
        "program.py",
        f"""{PROGRAM}
bus.publishes(called)
called.send(number=0)
assert bus.flush(5)
wait_until_released("HUNG")

for number in range(1, 6):
    called.send(number=number)

child = os.fork()

if child == 0:
    assert bus.health().buffered == 0
    called.send(number=100)
    report("forked", buffered=bus.health().buffered)
    sys.exit(0)

assert bus.health().buffered == 5
report("kept")
print("the child ended with", ended(child))
""",
    )
    hung = service.folder / "hung"
    program = service.run("program.py", HUNG=str(hung))
    wire.events(1)

    service.server.hang()
    hung.touch()
    service.wait_for("forked", buffered=1)
    service.wait_for("kept")
    service.server.resume()

    assert program.end() == 0
    assert "the child ended with 0" in program.output
    events = wire.events(7)
    own = [event["data"]["number"] for event in events if node_of(event) == node_of(events[0])]
    assert own == [0, 1, 2, 3, 4, 5]
    assert len(events) == 7


def test_a_lock_held_by_a_thread_at_a_fork_does_not_block_the_child(service: Service) -> None:
    service.write(
        "program.py",
        f"""{PROGRAM}
bus.publishes(called)
bus.start()
called.send(number=1)
assert bus.ready(5) and bus.flush(5)

def locks_of(thing, seen):
    if id(thing) in seen:
        return

    seen.add(id(thing))

    for name, part in vars(thing).items():
        if hasattr(part, "__dict__") and type(part).__module__.startswith("flask_eventbus"):
            yield from locks_of(part, seen)
        # The writer thread is woken by a lock that is held all the time.
        elif hasattr(part, "acquire") and name != "_wakeup":
            yield part

def hold():
    taken = []

    while len(taken) < len(locks):
        if locks[len(taken)].acquire(timeout=0.1):
            taken.append(locks[len(taken)])
        else:  # its thread waits for one of those
            while taken:
                taken.pop().release()

    held.set()
    released.wait()

    for lock in locks:
        lock.release()

locks = list(locks_of(bus.node, set()))
held, released = threading.Event(), threading.Event()
holding = threading.Thread(target=hold)
holding.start()
held.wait()
child = os.fork()

if child == 0:
    bus.start()
    assert bus.ready(5)
    called.send(number=2)
    assert bus.flush(5)
    bus.stop()
    os._exit(0)

print("the child ended with", ended(child), "in spite of", len(locks), "locks")
released.set()
holding.join()
called.send(number=3)
wait_until_released("RELEASE")
""",
    )
    program = service.run("program.py")
    for number in (1, 2, 3):
        service.wait_for("called", pid=program.pid, number=number)

    service.release.touch()
    assert program.end() == 0
    assert "the child ended with 0" in program.output
    assert int(program.output.split()[-2]) >= 6


def test_the_parent_handles_async_receivers_after_a_fork(service: Service) -> None:
    service.write(
        "program.py",
        f"""{PROGRAM}
import asyncio

@bus.on("awaited")
async def hear_awaiting(sender, number):
    # The pool wakes the loop through what a fork may have taken from it.
    await asyncio.wait_for(asyncio.to_thread(os.getpid), 5)
    report("awaited", number=number)

bus.start()
wait_until_released("FORK")
child = os.fork()

if child == 0:
    sys.exit(0)

report("forked", code=ended(child))
wait_until_released("RELEASE")
""",
    )
    fork = service.folder / "fork"
    program = service.run("program.py", FORK=str(fork))
    service.listeners(1)
    service.publish("awaited", number=1)
    service.wait_for("awaited", number=1)

    fork.touch()
    service.wait_for("forked", code=0)
    service.publish("awaited", number=2)

    service.wait_for("awaited", number=2)
    service.release.touch()
    assert program.end() == 0


def test_a_child_that_outlives_its_parent_keeps_none_of_its_connections(service: Service) -> None:
    service.write(
        "program.py",
        f"""{PROGRAM}
bus.publishes(called)
bus.start()
called.send(number=1)
assert bus.ready(5) and bus.flush(5)

# The child cannot close a socket that another thread is just opening: wait for the connections of
# the writer, the listener, the reader of streams, and the maintenance thread.
opened = bus.node.connections._opened
wait_until(lambda: sum(each._sock is not None for each in list(opened)) == 4, what="all are open")

if os.fork() == 0:
    report("forked")

wait_until_released("RELEASE")
""",
    )
    program = service.run("program.py")
    service.wait_for("forked")
    assert service.nodes("pubsub") == service.nodes("normal") != set()

    program.process.kill()

    wait_until(lambda: not service.nodes("pubsub"), what="the parent's listener is gone")
    wait_until(lambda: not service.nodes("normal"), what="the parent's writer is gone")


@pytest.mark.parametrize("ending", ["pass", "bus.flush()"])
def test_a_multiprocessing_child_publishes_until_its_end(service: Service, ending: str) -> None:
    wire = Wire(service)
    service.write(
        "program.py",
        f"""{PROGRAM}
import multiprocessing

def work(number):
    for number in range(10 * number, 10 * number + 10):
        called.send(number=number)

    {ending}

bus.publishes(called)
bus.start()
called.send(number=-1)
assert bus.ready(5) and bus.flush(5)
fork = multiprocessing.get_context("fork")
children = [fork.Process(target=work, args=(number,)) for number in range(3)]

for child in children:
    child.start()

for child in children:
    child.join()
    assert child.exitcode == 0

assert bus.health().node == bus.node.name
wait_until_released("RELEASE")
""",
    )
    program = service.run("program.py")

    events = wire.events(31)
    assert {event["data"]["number"] for event in events} == set(range(-1, 30))
    assert len({node_of(event) for event in events}) == 4
    received = service.wait_for("called", 31, pid=program.pid)
    assert sorted(line["number"] for line in received) == list(range(-1, 30))

    service.release.touch()
    assert program.end() == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_terminate_ends_a_multiprocessing_child_at_any_point(service: Service, method: str) -> None:
    service.write(
        "program.py",
        f"""
import ctypes, multiprocessing, sys
from flask_eventbus import Bus

def wait_for_ever(begun):
    if multiprocessing.get_start_method() == "spawn":
        Bus("redis://127.0.0.1:9/0", service="child")

    mutex = ctypes.create_string_buffer(128)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    begun.set()
    # As a worker of a pool in the moment before it waits: no handler of Python runs.
    lock(mutex)

if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    bus = Bus("redis://127.0.0.1:9/0", service="parent")
    begun = multiprocessing.Event()
    child = multiprocessing.Process(target=wait_for_ever, args=(begun,))
    child.start()
    assert begun.wait(30)
    child.terminate()
    child.join(10)
    code = child.exitcode
    child.kill()
    print(code, flush=True)
""",
    )

    program = service.run("program.py")

    assert program.end() == 0
    assert "-15" in program.output


def test_pools_can_be_terminated_at_any_point_of_their_children(service: Service) -> None:
    service.write(
        "program.py",
        f"""{PROGRAM}
import multiprocessing

bus.start()
assert bus.ready(5)

for number in range(100):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        # Some of the children have only begun when this one's work is done.
        pool.map(abs, [number])
""",
    )

    assert service.run("program.py").end(timeout=60) == 0


def test_greenlets_that_a_child_inherits_neither_listen_nor_publish(service: Service) -> None:
    wire = Wire(service)
    service.write(
        "program.py",
        f"""
from gevent import Greenlet, monkey

monkey.patch_all()
{PROGRAM}
import gc

def inherited():
    '''The living greenlets that listen or write under the parent's name.'''
    greenlets = [thing for thing in gc.get_objects() if isinstance(thing, Greenlet)]
    names = [greenlet._run.__self__.name for greenlet in greenlets if not greenlet.dead]
    return [name for name in names if name.endswith(parent) and "receiver" not in name]

bus.publishes(called, confirm=True)
bus.start()
called.send(number=0)
assert bus.ready(5) and bus.flush(5)
report("ready")
wait_until_released("HUNG")

for number in range(1, 6):
    called.send(number=number)

assert not bus.health().publishing
parent = bus.node.name
assert len(inherited()) == 4
child = os.fork()

if child == 0:
    report("forked")
    wait_until(lambda: not inherited(), timeout=5)
    report("freed")
    wait_until_released("RELEASE")
    os._exit(0)

print("the child ended with", ended(child))
""",
    )
    hung = service.folder / "hung"
    program = service.run("program.py", HUNG=str(hung), EVENTBUS_TIMEOUT="0.1")
    service.wait_for("ready")
    before = service.nodes("pubsub")

    service.server.hang()
    hung.touch()
    service.wait_for("forked")
    service.server.resume()
    service.wait_for("freed")
    wire.events(6)
    service.publish("called", number=6)
    service.wait_for("called", number=6, pid=program.pid)
    assert service.listeners(1) == before

    service.release.touch()
    assert program.end() == 0
    assert len(wire.events(7)) == 7
    assert len(service.reports("called", number=6)) == 1
