"""Tests of the memory limits in ``docs/sizing.md``, in real processes."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import msgpack
import pytest
from programs import Program
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.records import RetryRecord

pytestmark = pytest.mark.second_look("measures the memory of processes under load")

#: Megabytes that a process may need above its start: 64 MiB that wait, and what one event of
#: the largest size takes while it is read. Without a bound it would be 300 and more.
MOST = 180

#: The same where few are read at once: retries, and what is read while others wait for Redis.
MAX_RETRIES_MIB = 150

#: An entry larger than all limits, and the megabytes that a worker which reads it may need.
HUGE = b"x" * 100_000_000
LITTLE = 60

#: What is counted is what the process holds, not what its allocator keeps for later.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072"}

HEARER = """
import resource, sys, threading
from flask_eventbus import Bus
from flask_eventbus.config import Timing
from flask_eventbus.receivers import workers

# Memory alone limits what is read ahead, however slow the machine is.
workers.AHEAD = 1_000_000
timing = Timing(pause_reading_after=600.0, release_after=600.0)

bus = Bus(sys.argv[1], service="listener", prefix=sys.argv[2], _timing=timing)
hold = threading.Event()
handled = 0

def memory(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind)) // 1024

HOW = {
    "channel": {"via": "channel"},
    "stream": {"via": "stream", "start": "earliest"},
    "each process": {"via": "stream", "group": None},
}

@bus.on("tick", **HOW[sys.argv[3]])
def receive(sender, **payload):
    global handled
    handled += 1

    if "large" in payload:
        hold.wait()

    if "bad" in payload:
        raise OSError("no paper")

before = memory("VmRSS")
bus.start()
assert bus.ready(30)

if len(sys.argv) > 4:
    resource.setrlimit(resource.RLIMIT_AS, ((memory("VmSize") + int(sys.argv[4])) * 2**20,) * 2)

print("ready", flush=True)

for line in sys.stdin:
    counts = bus.health().counts
    print(line.strip(), memory("VmHWM") - before, handled, counts.get("received", 0), flush=True)
"""


@pytest.fixture
def listener(shared_redis: RedisServer, tmp_path: Path) -> Iterator[Callable[..., Listener]]:
    """Start a process that hears ``tick`` and whose receiver holds large events for ever."""
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc tells the memory of a process")

    started: list[Program] = []

    def start(prefix: str, via: str, *limit: str, user: str = "") -> Listener:
        url = shared_redis.url.replace("://", f"://{user}:any@") if user else shared_redis.url
        command = ("-c", HEARER, url, prefix, via, *limit)
        started.append(Program(command, tmp_path, ALLOCATOR))
        wait_until(lambda: "ready" in started[-1].output, timeout=30, what="it listens")
        return Listener(started[-1])

    yield start

    for program in started:
        program.kill()


class Listener:
    """The process, and what it says of itself."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._asked = 0

    def measures(self) -> tuple[int, int, int]:
        """The most memory it ever had, in MiB above its start; events handled, and received."""
        self._asked += 1
        mark = f"facts-{self._asked}"
        stdin = self._program.process.stdin
        assert stdin is not None
        stdin.write(f"{mark}\n".encode())
        stdin.flush()
        found = wait_until(
            lambda: re.search(rf"^{mark} (\d+) (\d+) (\d+)\n", self._program.output, re.MULTILINE),
            timeout=30,
            what="it answers",
        )
        assert found is not None
        return int(found[1]), int(found[2]), int(found[3])

    def settles(self) -> bool:
        """Return True if it receives nothing more for a while."""
        before = self.measures()[2]
        time.sleep(0.5)
        return self.measures()[2] == before


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams under a prefix of this test's own."""
    return StreamStore(shared_redis)


def bomb(number: int) -> bytes:
    """An event of less than 1 MiB, of which 100,000 small decimals are made in each of 3 lists."""
    values = b"\xdd" + (100_000).to_bytes(4, "big") + b"\xd4\x05\x31" * 100_000
    head = {"specversion": "1.0", "id": f"n-{number}", "source": "shop", "type": "tick"}
    head["time"] = msgpack.Timestamp.from_unix_nano(time.time_ns())
    packed: bytes = msgpack.packb(head)
    data = b"\x83\xa5large" + values + b"\xa1b" + values + b"\xa1c" + values
    return bytes([packed[0] + 1]) + packed[1:] + b"\xa4data" + data


@pytest.mark.parametrize("via", ["channel", "stream"])
def test_queued_events_that_decode_to_far_more_memory_stay_encoded(
    store: StreamStore, listener: Callable[..., Listener], via: str
) -> None:
    process = listener(store.prefix, via)

    for number in range(1, 11):
        if via == "stream":
            store.client.xadd(store.keys.stream("tick"), {"event": bomb(number)})
        else:
            store.client.publish(f"{store.prefix}:{{tick}}:channel", bomb(number))

    wait_until(lambda: process.measures()[2] == 10, timeout=60, what="all have arrived")
    memory, handled, _ = process.measures()

    assert handled == 1
    assert memory < MOST


def test_large_stream_events_after_small_ones_are_read_within_the_memory_limit(
    store: StreamStore, listener: Callable[..., Listener]
) -> None:
    stream = store.keys.stream("tick")
    process = listener(store.prefix, "stream")

    for number in range(400):
        store.add("tick", n=number)

    wait_until(lambda: process.measures()[1] == 400, timeout=60, what="the small ones are handled")
    large = Codec().encode(store.event("tick", large="x" * 1_000_000))
    prefix, _, rest = large.partition(b"-401")

    # At once, so that one answer may hold all of them.
    with store.client.pipeline(transaction=True) as both:
        for number in range(200):
            both.xadd(stream, {"event": prefix + b"-%d" % (401 + number) + rest})

        both.execute()

    wait_until(lambda: process.measures()[1] == 401, timeout=60, what="a large one is handled")
    wait_until(process.settles, timeout=60, what="it reads no more")
    memory, _, received = process.measures()

    assert received < 500
    assert memory < MOST


@pytest.mark.timeout(300)
def test_large_retries_are_read_within_the_memory_limit_and_kept_once(
    store: StreamStore, listener: Callable[..., Listener]
) -> None:
    process = listener(store.prefix, "stream")

    store.add_together("tick", *({"n": number} for number in range(1_000)))
    wait_until(lambda: process.measures()[1] == 1_000, timeout=60, what="the small ones are run")
    body = Codec().encode(store.event("tick", large="x" * 1_000_000))
    record = RetryRecord(
        entry="",
        event=body,
        receiver="__main__.receive",
        attempts=1,
        first=1,
        last=round(time.time() * 1000),
        error="",
    )
    key = store.keys.retry("tick", "listener")

    with store.client.pipeline(transaction=True) as all_of_them:
        for number in range(120):
            member = replace(record, entry=f"1-{number}").packed()
            all_of_them.zadd(key, {member: time.time() * 1000})

        all_of_them.execute()

    counts: list[int] = [0]

    def is_settled() -> bool:
        time.sleep(0.5)
        counts.append(store.client.zcount(key, time.time() * 1000 + 1, "+inf"))
        return counts[-1] == counts[-2] > 60

    # A lease sends a megabyte to Redis several times.
    wait_until(is_settled, timeout=180, what="no more are leased")

    # 64 MiB of them, and those of a few answers that a busy machine may lose: 120 without a limit.
    assert counts[-1] < 100
    assert process.measures()[0] < MAX_RETRIES_MIB


def test_unwritten_outcomes_of_large_events_are_bounded_in_memory(
    store: StreamStore, listener: Callable[..., Listener]
) -> None:
    """Each of them waits with its retry, which has the event once more."""
    user = f"listener-{store.prefix}"
    store.client.acl_setuser(
        user, True, nopass=True, categories=["+@all"], commands=["-zadd"], keys=["*"]
    )
    store.client.execute_command("ACL", "SETUSER", user, "allchannels")
    process = listener(store.prefix, "stream", user=user)

    for number in range(400):
        store.add("tick", n=number)

    wait_until(lambda: process.measures()[1] == 400, timeout=60, what="the small ones are handled")

    for _ in range(200):
        store.add("tick", bad="x" * 1_000_000)

    wait_until(lambda: process.measures()[2] > 430, timeout=60, what="large ones are read")
    wait_until(process.settles, timeout=60, what="it reads no more")
    memory, _, received = process.measures()

    assert received < 470
    # 64 MiB that are read at once, then each of them twice. Without a bound it would be 500.
    assert memory < 200


def huge_letters(store: StreamStore) -> list[tuple[bytes, bytes]]:
    """The lengths and the hashes that dead letters of entries above the limit keep."""
    found = store.client.xrange(store.keys.dead("tick", "listener"))
    return [(fields[b"entry.event.length"], fields[b"entry.event.sha256"]) for _, fields in found]


def test_oversized_entries_of_a_dead_worker_are_reclaimed_in_little_memory(
    store: StreamStore, listener: Callable[..., Listener]
) -> None:
    stream = store.keys.stream("tick")
    store.group("tick", "listener")
    ids = [store.add_fields("tick", {b"event": HUGE}) for _ in range(3)]
    store.read("tick", 3, "listener")
    # Handed back, which are taken over at once.
    store.client.xclaim(stream, "listener", "released", 0, ids, idle=2**31 - 1, justid=True)

    process = listener(store.prefix, "stream")
    wait_until(lambda: len(huge_letters(store)) == 3, timeout=60, what="all are dead letters")
    store.add("tick", n=1)
    wait_until(lambda: process.measures()[1] == 1, timeout=30, what="the next event is handled")

    assert huge_letters(store) == [(b"100000000", sha256(HUGE).hexdigest().encode())] * 3
    assert process.measures()[0] < LITTLE


def test_an_entry_that_does_not_fit_into_memory_becomes_a_dead_letter(
    store: StreamStore, listener: Callable[..., Listener]
) -> None:
    process = listener(store.prefix, "stream", "150")
    store.add_fields("tick", {b"event": HUGE})
    store.add("tick", n=1)

    wait_until(lambda: process.measures()[1] == 1, timeout=60, what="the next event is handled")

    assert huge_letters(store) == [(b"100000000", sha256(HUGE).hexdigest().encode())]


def test_an_entry_that_does_not_fit_into_memory_stops_no_other(
    store: StreamStore, listener: Callable[..., Listener]
) -> None:
    process = listener(store.prefix, "each process", "150")
    store.add_fields("tick", {b"event": HUGE})
    store.add("tick", n=1)

    wait_until(lambda: process.measures()[1] == 1, timeout=60, what="the next event is handled")


def test_an_entry_of_very_many_fields_is_reclaimed_in_little_memory(
    store: StreamStore, listener: Callable[..., Listener]
) -> None:
    stream = store.keys.stream("tick")
    store.group("tick", "listener")
    id = store.add_fields("tick", {b"f%d" % number: b"x" for number in range(1_000_000)})
    store.read("tick", 1, "listener")
    store.client.xclaim(stream, "listener", "released", 0, [id], idle=2**31 - 1, justid=True)

    process = listener(store.prefix, "stream")
    dead = store.keys.dead("tick", "listener")
    wait_until(lambda: store.client.xlen(dead), timeout=60, what="it is a dead letter")

    assert process.measures()[0] < LITTLE
