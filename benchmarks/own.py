"""Figures that only the bus has: growth, threads, retries, contexts, requests, imports."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from contenders import BUS, Contender
from flask import Flask
from measure import PATIENCE, Program, Result, Server, exchange

from flask_eventbus import Bus, EventBus

#: Ways of ``programs/bus.py``: what a consumer subscribes to, besides the signal that is sent.
GROWTH = ("among-1", "among-1000", "among-5000", "patterns-1000")

#: Events a second.
RATE = 50

#: What ``programs/bus.py`` has in Redis.
STREAM, RETRIES = "eventbus:{tick}:stream", "eventbus:{tick}:retry:consumer"


def growth(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """CPU of the consumer and of Redis for an event, among more and more streams."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in GROWTH}
    count = round(RATE * options.seconds)

    for _ in range(options.rounds):
        for way in GROWTH:
            contender = Contender(way, "bus.py", way)
            one = exchange(server, contender, count, rate=RATE, warm=10)
            found[way].append((one.receive, one.redis))

    first = found[GROWTH[0]]
    return {
        way: {
            name: {
                "median": statistics.median(pair[index] for pair in pairs),
                "of_one": statistics.median(
                    pair[index] / one[index] for pair, one in zip(pairs, first, strict=True)
                ),
            }
            for index, name in enumerate(("receive", "redis"))
        }
        for way, pairs in found.items()
    }


#: Threads that send at the same time.
THREADS = (1, 4, 8)


def threads(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Microseconds of CPU of a channel event, in the sending threads and the writer thread."""
    found: dict[int, list[float]] = {count: [] for count in THREADS}
    bus = Bus(server.url, service="threads", publish=["tick"], buffer_size=1_000_000)
    signal = bus.signal("tick")

    for _ in range(options.rounds):
        for count, each in found.items():
            events = max(100, options.count // 2) // count

            def send(events: int = events) -> None:
                for number in range(events):
                    signal.send("threads", user_id=number, email="ada@example.com")

            senders = [threading.Thread(target=send) for _ in range(count)]
            cpu = time.process_time()

            for sender in senders:
                sender.start()
            for sender in senders:
                sender.join()

            bus.flush(120)
            each.append((time.process_time() - cpu) / (events * count) * 1e6)

    bus.stop()
    return {
        f"{count} threads": {
            "publish": {
                "median": statistics.median(each),
                "of_one": statistics.median(a / b for a, b in zip(each, found[1], strict=True)),
            }
        }
        for count, each in found.items()
    }


def services(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """CPU of a consumer for a stream event, with one service and with 32 that get it as well."""
    contender = Contender("services", "bus.py", "services")
    count = max(100, options.count // 20)
    found: dict[int, list[Result]] = {1: [], 32: []}

    for _ in range(options.rounds):
        for receivers, each in found.items():
            each.append(exchange(server, contender, count, receivers=receivers, warm=100))

    return {
        f"{receivers} services": {
            name: {
                "median": statistics.median(getattr(one, name) for one in each),
                "of_one": statistics.median(
                    getattr(a, name) / getattr(b, name) for a, b in zip(each, found[1], strict=True)
                ),
            }
            for name in ("receive", "redis")
        }
        for receivers, each in found.items()
    }


def retries(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """CPU of all workers of a service, and of Redis, for an event that fails once."""
    found: dict[int, list[tuple[float, float]]] = {1: [], 8: []}
    count = max(800, options.count // 20)

    for _ in range(options.rounds):
        for workers, each in found.items():
            each.append(retry(server, workers, count))

    return {
        f"{workers} workers": {
            name: {
                "median": statistics.median(pair[index] for pair in each),
                "of_one": statistics.median(
                    a[index] / b[index] for a, b in zip(each, found[1], strict=True)
                ),
            }
            for index, name in enumerate(("receive", "redis"))
        }
        for workers, each in found.items()
    }


def retry(server: Server, workers: int, count: int) -> tuple[float, float]:
    """Microseconds of CPU of the workers and of Redis for an event that fails once."""
    server.client.flushall()
    contender = Contender("retries", "bus.py", "retries")
    route: Any = {"via": "stream", "confirm": False}

    with ExitStack() as stack:
        publisher = stack.enter_context(
            Bus(server.url, service="publisher", publish={"tick": route}, buffer_size=1_000_000)
        )
        listening = [Program(contender, "receive", server.url, "0") for _ in range(workers)]

        for program in listening:
            stack.callback(program.end)
            stack.callback(program.end_after(PATIENCE).cancel)
            program.read()

        before, work = cpu_of(listening), server.cpu()

        for number in range(count):
            publisher.signal("tick").send("publisher", n=number)

        publisher.flush(120)

        while server.client.xpending(STREAM, "consumer")["pending"] or server.client.zcard(RETRIES):
            time.sleep(0.05)

        return (cpu_of(listening) - before) / count * 1e6, (server.cpu() - work) / count * 1e6


def cpu_of(programs: Sequence[Program]) -> float:
    """Seconds of CPU that programs have used."""
    for program in programs:
        program.go()

    return sum(float(program.read()["cpu"]) for program in programs)


def backlog(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds from the start of a consumer to its first event, of those that wait."""
    names = [f"signal{number}" for number in range(1_000)]
    taken = []

    for _ in range(options.rounds):
        server.client.flushall()
        publish: Any = {name: {"via": "stream", "confirm": False} for name in names}

        with Bus(server.url, service="publisher", publish=publish) as full:
            for number in range(max(1_000, options.count // 5)):
                full.signal(names[number % len(names)]).send("publisher", n=number)

            full.flush(120)

        first = threading.Event()
        bus = Bus(server.url, service="consumer")

        for name in names:
            bus.on(name, start="earliest", via="stream")(lambda sender, n, first=first: first.set())

        start = time.perf_counter()
        bus.start()
        first.wait(60)
        taken.append((time.perf_counter() - start) * 1e3)
        bus.stop()

    return {"1,000 streams": {"first": {"median": statistics.median(taken)}}}


def requests(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Microseconds of a request that sends a channel event, and of one that does not."""
    bus = EventBus()
    signal = bus.signal("tick")
    app = Flask("requests")
    app.config.from_mapping(
        EVENTBUS_SERVICE="requests",
        EVENTBUS_URL=server.url,
        EVENTBUS_PUBLISH=["tick"],
        EVENTBUS_LISTEN=False,
    )
    bus.init_app(app)

    @app.get("/plain")
    def plain() -> str:
        return ""

    @app.get("/event")
    def event() -> str:
        signal.send(app, user_id=7, email="ada@example.com")
        return ""

    client = app.test_client()
    client.get("/event")
    taken: dict[str, list[float]] = {"/plain": [], "/event": []}

    for _ in range(max(100, options.count // 50)):
        for path, each in taken.items():
            start = time.perf_counter()
            client.get(path)
            each.append(time.perf_counter() - start)

    bus.stop(app=app)
    medians = {path: statistics.median(each) * 1e6 for path, each in taken.items()}
    return {
        path: {"request": {"median": value, "of_plain": value / medians["/plain"]}}
        for path, value in medians.items()
    }


def contexts(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Microseconds of CPU of an empty app context of Flask, as a receiver in Flask gets one."""
    app = Flask("contexts")
    taken = []

    for _ in range(options.rounds):
        cpu = time.thread_time()

        for _ in range(options.count):
            with app.app_context():
                pass

        taken.append((time.thread_time() - cpu) / options.count * 1e6)

    return {"app context": {"context": {"median": statistics.median(taken)}}}


IMPORTS = {
    "Flask, redis, msgpack": "import flask, redis, msgpack",
    BUS.name: "import flask, redis, msgpack, flask_eventbus; flask_eventbus.EventBus",
}


def imports(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds of CPU to start Python and import the package, and without it."""
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    # The first run compiles the modules and stores their bytecode.
    for code in IMPORTS.values():
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    for _ in range(max(3, options.rounds * 2)):
        for name, code in IMPORTS.items():
            process = subprocess.Popen([sys.executable, "-c", code], env=environment)
            _, _, used = os.wait4(process.pid, 0)
            taken[name].append((used.ru_utime + used.ru_stime) * 1e3)

    medians = {name: statistics.median(each) for name, each in taken.items()}
    least = medians[next(iter(IMPORTS))]
    return {
        name: {"import": {"median": value, "of_plain": value / least}}
        for name, value in medians.items()
    }
