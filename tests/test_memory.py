"""What waits in a process has the bound that ``docs/deploying.md`` gives it, in a real process."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
from programs import Program
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus.codec import Codec

pytestmark = pytest.mark.second_look

#: Megabytes that a process may need above its start: 64 MiB that wait, and what one event of
#: the largest size takes while it is read. Without a bound it would be 300 and more.
MOST = 180

HEARER = """
import sys, threading
from flask_eventbus import Bus

bus = Bus(sys.argv[1], service="hearer", prefix=sys.argv[2])
hold = threading.Event()
handled = 0

def memory(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind)) // 1024

@bus.on("tick", via=sys.argv[3], **({"start": "earliest"} if sys.argv[3] == "stream" else {}))
def receive(sender, **payload):
    global handled
    handled += 1

    if "large" in payload:
        hold.wait()

before = memory("VmRSS")
bus.start()
assert bus.ready(30)
print("ready", flush=True)

for line in sys.stdin:
    counts = bus.health().counts
    print(line.strip(), memory("VmHWM") - before, handled, counts.get("received", 0), flush=True)
"""


@pytest.fixture
def hearer(shared_redis: RedisServer, tmp_path: Path) -> Iterator[Callable[[str, str], Hearer]]:
    """Start a process that hears ``tick`` and whose receiver holds large events for ever."""
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc tells the memory of a process")

    started: list[Program] = []

    def start(prefix: str, via: str) -> Hearer:
        command = ("-c", HEARER, shared_redis.url, prefix, via)
        started.append(Program(command, tmp_path, {}))
        wait_until(lambda: "ready" in started[-1].said, timeout=30, what="it hears")
        return Hearer(started[-1])

    yield start

    for program in started:
        program.kill()


class Hearer:
    """The process, and what it says of itself."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._asked = 0

    def facts(self) -> tuple[int, int, int]:
        """The most memory it ever had, in MiB above its start; events handled, and received."""
        self._asked += 1
        mark = f"facts-{self._asked}"
        stdin = self._program.process.stdin
        assert stdin is not None
        stdin.write(f"{mark}\n".encode())
        stdin.flush()
        found = wait_until(
            lambda: re.search(rf"^{mark} (\d+) (\d+) (\d+)\n", self._program.said, re.MULTILINE),
            timeout=30,
            what="it answers",
        )
        assert found is not None
        return int(found[1]), int(found[2]), int(found[3])

    def settles(self) -> bool:
        """Return True if it receives nothing more for a while."""
        before = self.facts()[2]
        time.sleep(0.5)
        return self.facts()[2] == before


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
def test_events_that_decode_to_far_more_than_their_bytes_wait_as_bytes(
    store: StreamStore, hearer: Callable[[str, str], Hearer], via: str
) -> None:
    process = hearer(store.prefix, via)

    for number in range(1, 11):
        if via == "stream":
            store.client.xadd(store.keys.stream("tick"), {"event": bomb(number)})
        else:
            store.client.publish(f"{store.prefix}:{{tick}}:channel", bomb(number))

    wait_until(lambda: process.facts()[2] == 10, timeout=60, what="all have arrived")
    memory, handled, _ = process.facts()

    assert handled == 1
    assert memory < MOST


def test_large_stream_events_after_small_ones_are_read_as_far_as_they_fit(
    store: StreamStore, hearer: Callable[[str, str], Hearer]
) -> None:
    stream = store.keys.stream("tick")
    process = hearer(store.prefix, "stream")

    for number in range(400):
        store.add("tick", n=number)

    wait_until(lambda: process.facts()[1] == 400, timeout=60, what="the small ones are handled")
    large = Codec().encode(store.event("tick", large="x" * 1_000_000))
    prefix, _, rest = large.partition(b"-401")

    # At once, so that one answer may hold all of them.
    with store.client.pipeline(transaction=True) as both:
        for number in range(200):
            both.xadd(stream, {"event": prefix + b"-%d" % (401 + number) + rest})

        both.execute()

    wait_until(lambda: process.facts()[1] == 401, timeout=60, what="a large one is handled")
    wait_until(process.settles, timeout=60, what="it reads no more")
    memory, _, received = process.facts()

    assert received < 500
    assert memory < MOST
