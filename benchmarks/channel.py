"""Measure the speed of channel events from one process to another, on this machine.

Run it on demand, on a machine with nothing else to do::

    .venv/bin/python benchmarks/channel.py

It starts a Redis of its own, repeats each measurement, and prints medians: the bus beside
the same job written directly on redis-py with JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import redis
from blinker import Namespace
from measure import redis_server

from flask_eventbus import Bus

#: A small event, such as most are.
PAYLOAD: dict[str, Any] = {"user_id": 7, "email": "ada@example.com", "name": "Ada Lovelace"}

CHANNEL = "benchmark"
Report = Callable[[Any], None]


# -- the bus --------------------------------------------------------------------------------


def bus_publisher(url: str) -> tuple[Callable[..., Any], Callable[[], Any]]:
    bus = Bus(url, service="publisher", publish=["tick"], buffer_size=1_000_000)
    signal = bus.signal("tick")
    return lambda **payload: signal.send("publisher", **payload), lambda: bus.flush(120)


def bus_consumer(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    bus = Bus(url, service="consumer")
    bus.on("tick")(lambda sender, **payload: receive(**payload))
    bus.start()
    bus.ready(10)
    ready()
    time.sleep(600)


# -- the same by hand -----------------------------------------------------------------------


def hand_publisher(url: str) -> tuple[Callable[..., Any], Callable[[], Any]]:
    client = redis.Redis.from_url(url)
    return lambda **payload: client.publish(CHANNEL, json.dumps(payload)), lambda: None


def hand_consumer(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    pubsub = redis.Redis.from_url(url).pubsub()
    pubsub.subscribe(CHANNEL)
    ready()

    for message in pubsub.listen():
        if message["type"] == "message":
            receive(**json.loads(message["data"]))


JOBS = {
    "flask-eventbus": (bus_publisher, bus_consumer),
    "redis-py": (hand_publisher, hand_consumer),
}


# -- measurements ---------------------------------------------------------------------------


def microseconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()

    for _ in range(count):
        call()

    return (time.perf_counter() - start) / count * 1e6


def send_without_bridge(count: int) -> float:
    signal = Namespace().signal("tick")
    signal.connect(_nothing)
    return microseconds(lambda: signal.send("publisher", **PAYLOAD), count)


def send_with_bridge(url: str, count: int) -> float:
    bus = Bus(url, service="publisher", publish=["tick"], buffer_size=1_000_000)
    signal = bus.signal("tick")
    signal.connect(_nothing)
    signal.send("publisher", **PAYLOAD)
    bus.flush(10)
    taken = microseconds(lambda: signal.send("publisher", **PAYLOAD), count)
    bus.stop(flush=120)
    return taken


def send_paced(url: str, count: int) -> float:
    """As a web service sends: now and then, with the writer at rest in between."""
    bus = Bus(url, service="publisher", publish=["tick"])
    signal = bus.signal("tick")
    signal.connect(_nothing)
    taken = []

    for _ in range(count):
        start = time.perf_counter()
        signal.send("publisher", **PAYLOAD)
        taken.append(time.perf_counter() - start)
        time.sleep(0.001)

    bus.stop()
    return statistics.median(taken) * 1e6


def publish_by_hand(url: str, count: int) -> float:
    publish, _ = hand_publisher(url)
    return microseconds(lambda: publish(**PAYLOAD), count)


def _nothing(sender: Any, **payload: Any) -> None: ...


def throughput(job: str, url: str, count: int) -> float:
    """Events per second from the first ``send()`` in one process to the last receiver call."""

    def consume(told: Connection) -> None:
        left = count

        def receive(**payload: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                told.send(time.monotonic())

        JOBS[job][1](url, receive, lambda: told.send("ready"))

    with consumer(consume) as told:
        publish, flush = JOBS[job][0](url)
        start = time.monotonic()

        for _ in range(count):
            publish(**PAYLOAD)

        flush()
        end: float = told.recv()
        return count / (end - start)


def latency(job: str, url: str, rate: int, seconds: float) -> tuple[float, float]:
    """Median and 99th percentile, in milliseconds, from ``send()`` to the receiver."""
    count = round(rate * seconds)

    def consume(told: Connection) -> None:
        taken: list[float] = []

        def receive(sent: float, **payload: Any) -> None:
            taken.append(time.monotonic() - sent)
            if len(taken) == count:
                told.send(taken)

        JOBS[job][1](url, receive, lambda: told.send("ready"))

    with consumer(consume) as told:
        publish, _ = JOBS[job][0](url)
        start = time.monotonic()

        for number in range(count):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            publish(sent=time.monotonic(), **PAYLOAD)

        taken = sorted(told.recv())
        return statistics.median(taken) * 1e3, taken[int(len(taken) * 0.99)] * 1e3


@contextmanager
def consumer(consume: Callable[[Connection], None]) -> Any:
    """A second process that consumes, and the pipe it reports on."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=consume, args=(there,), daemon=True
    )
    process.start()

    if here.recv() != "ready":
        raise RuntimeError("The consumer did not get ready.")

    yield here
    process.kill()
    process.join()


# -- the report -----------------------------------------------------------------------------


def median(measure: Callable[[], float], runs: int) -> float:
    return statistics.median(measure() for _ in range(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="repetitions of each (default 5)")
    parser.add_argument("--count", type=int, default=50_000, help="events per throughput run")
    parser.add_argument("--seconds", type=float, default=3.0, help="time of a run for the latency")
    arguments = parser.parse_args()
    runs, count = arguments.runs, arguments.count

    with redis_server() as server:
        url, version = server.url, server.version
        rows: list[tuple[str, ...]] = []
        plain = median(lambda: send_without_bridge(count), runs)
        bridged = median(lambda: send_with_bridge(url, count), runs)
        paced = median(lambda: send_paced(url, min(count, 1_000)), runs)
        by_hand = median(lambda: publish_by_hand(url, count // 10), runs)
        rows.append(("`send()` to one local receiver, no bridge", f"{plain:.1f} us", ""))
        rows.append(
            ("`send()` with the bridge, in a tight loop", f"{bridged:.1f} us", f"{by_hand:.1f} us")
        )
        rows.append(("`send()` with the bridge, 1 ms apart", f"{paced:.1f} us", ""))
        speeds = {job: median(partial(throughput, job, url, count), runs) for job in JOBS}
        rows.append(
            ("events per second, process to process", *(f"{s:,.0f}" for s in speeds.values()))
        )
        delays = {
            job: [latency(job, url, 1_000, arguments.seconds) for _ in range(runs)] for job in JOBS
        }

        for index, name in enumerate(("median", "99th percentile")):
            medians = [statistics.median(d[index] for d in delays[job]) for job in JOBS]
            rows.append((f"latency at 1,000/s, {name}", *(f"{m:.2f} ms" for m in medians)))

    print(
        f"Python {platform.python_version()}, redis-py {redis.__version__}, server {version}, "
        f"{os.cpu_count()} cores, medians of {runs} runs\n"
    )
    print("| | flask-eventbus | redis-py and JSON by hand |\n|---|---:|---:|")

    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
