"""Figures that only the bus has: growth with the number of streams, requests, imports."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from contenders import BUS, Contender
from flask import Flask
from measure import Server, exchange

from flask_eventbus import EventBus

#: Ways of ``programs/bus.py``: what a consumer subscribes to, besides the signal that is sent.
GROWTH = ("among-1", "among-1000", "among-5000", "patterns-1000")

#: Events a second.
RATE = 50


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


IMPORTS = {
    "Flask, redis, msgpack": "import flask, redis, msgpack",
    BUS.name: "import flask, redis, msgpack, flask_eventbus; flask_eventbus.EventBus",
}


def imports(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds of CPU to start Python and import the package, and without it."""
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}

    for _ in range(max(3, options.rounds * 2)):
        for name, code in IMPORTS.items():
            process = subprocess.Popen([sys.executable, "-c", code])
            _, _, used = os.wait4(process.pid, 0)
            taken[name].append((used.ru_utime + used.ru_stime) * 1e3)

    medians = {name: statistics.median(each) for name, each in taken.items()}
    least = medians[next(iter(IMPORTS))]
    return {
        name: {"import": {"median": value, "of_plain": value / least}}
        for name, value in medians.items()
    }
