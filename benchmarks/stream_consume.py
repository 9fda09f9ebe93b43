"""Measure how fast a service handles a backlog, and the load of an idle service.

Run it on demand, on a machine with nothing else to do::

    .venv/bin/python benchmarks/stream_consume.py
    .venv/bin/python benchmarks/stream_consume.py --memory 1000000

It starts a Redis of its own, repeats each measurement, and prints medians: the bus with all
its guarantees beside a bare loop of ``XREADGROUP COUNT 200`` and ``XACK`` on redis-py with the
same decoding and an empty receiver. ``--memory`` lets one consumer handle so many events and
prints how much memory it has at every tenth of them.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import threading
import time
from typing import Any

import redis
from channel import PAYLOAD
from measure import redis_server

from flask_eventbus import Bus
from flask_eventbus.codec.codec import Codec

STREAM = "eventbus:{tick}:stream"

#: Entries that the bare loop reads and acknowledges at once.
COUNT = 200


def fill(client: redis.Redis, count: int) -> None:
    """Write events as the bus does, in batches of a thousand."""
    codec = Codec()
    encode, data = codec.envelope("publisher", "tick"), codec.pack_payload(PAYLOAD)
    node = os.urandom(6).hex()

    for start in range(0, count, 1_000):
        with client.pipeline(transaction=False) as pipe:
            for number in range(start, min(start + 1_000, count)):
                body = encode(data, id=f"{node}-{number + 1}", time_ns=time.time_ns())
                pipe.xadd(STREAM, {"event": body})

            pipe.execute()


def bare(url: str, count: int) -> float:
    """Events per second of the loop by hand."""
    # What redis-py says of the types of answers is too wide for a loop over them.
    client: Any = redis.Redis.from_url(url, protocol=2)
    client.flushall()
    client.xgroup_create(STREAM, "consumer", "0", mkstream=True)
    fill(client, count)
    codec = Codec()
    left = count
    start = time.perf_counter()

    while left:
        entries = client.xreadgroup("consumer", "one", {STREAM: ">"}, count=COUNT)[0][1]

        for _, fields in entries:
            event = codec.decode(fields[b"event"])
            _nothing(event.source, **event.payload)

        client.xack(STREAM, "consumer", *(id for id, _ in entries))
        left -= len(entries)

    return count / (time.perf_counter() - start)


def with_bus(url: str, count: int) -> float:
    """Events per second of a consumer, from its start."""
    client = redis.Redis.from_url(url)
    client.flushall()
    fill(client, count)
    bus, done = consumer(url, count)
    start = time.perf_counter()
    bus.start()
    done.wait(120)
    taken = time.perf_counter() - start
    bus.stop()
    return count / taken


def consumer(url: str, count: int) -> tuple[Bus, threading.Event]:
    """A consumer that tells when it has handled so many events."""
    bus = Bus(url, service="consumer")
    done = threading.Event()
    left = count

    @bus.on("tick", start="earliest", via="stream")
    def receive(sender: str, **payload: Any) -> None:
        nonlocal left
        left -= 1

        if not left:
            done.set()

    return bus, done


def idle(url: str, seconds: float) -> tuple[float, float]:
    """Commands per second of a consumer that has nothing to do, and its share of a core."""
    client = redis.Redis.from_url(url)
    client.flushall()
    bus = Bus(url, service="consumer")
    bus.on("tick")(_nothing)
    bus.start()
    bus.ready(10)
    time.sleep(2)
    before, work = commands(client), time.process_time()
    time.sleep(seconds)
    # One command of the two questions is this program's own.
    rate = (commands(client) - before - 1) / seconds
    share = (time.process_time() - work) / seconds
    bus.stop()
    return rate, share


def commands(client: redis.Redis) -> int:
    """Return the number of commands that Redis has run."""
    return int(client.info("stats")["total_commands_processed"])


def memory(url: str, count: int) -> None:
    """Print the memory of a consumer while it handles events."""
    client = redis.Redis.from_url(url)
    client.flushall()
    bus = Bus(url, service="consumer", duplicate_window=0)
    handled = 0

    @bus.on("tick", start="earliest", via="stream")
    def receive(sender: str, **payload: Any) -> None:
        nonlocal handled
        handled += 1

    bus.start()

    for tenth in range(1, 11):
        fill(client, count // 10)

        while handled < count // 10 * tenth:
            time.sleep(0.01)

        client.xtrim(STREAM, maxlen=0, approximate=False)
        print(f"{handled:>10,} events: {resident():,.1f} MiB")

    bus.stop()


def resident() -> float:
    """The memory that this process has now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def _nothing(sender: str, **payload: Any) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="events in the backlog")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions")
    parser.add_argument("--idle", type=float, default=10.0, help="seconds without an event")
    parser.add_argument(
        "--memory", type=int, metavar="EVENTS", help="measure the memory of a backlog instead"
    )
    options = parser.parse_args()

    with redis_server() as server:
        url = server.url

        if options.memory:
            memory(url, options.memory)
            return

        pairs = [
            (bare(url, options.count), with_bus(url, options.count)) for _ in range(options.rounds)
        ]
        rate, share = idle(url, options.idle)

    by_hand = statistics.median(pair[0] for pair in pairs)
    by_bus = statistics.median(pair[1] for pair in pairs)
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
    print(f"bare XREADGROUP and XACK: {by_hand:>10,.0f} events/s")
    print(f"flask-eventbus:           {by_bus:>10,.0f} events/s, {ratio:.2f} of it")
    print(f"idle: {rate:.2f} commands/s, {share:.2%} of a core")


if __name__ == "__main__":
    main()
