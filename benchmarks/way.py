"""Count the calls and modules of one event, from ``send()`` to a receiver.

::

    .venv/bin/python benchmarks/way.py

It starts a Redis of its own. A publisher and a consumer share one process here; each event is sent
alone, when all else is at rest, after some that warm the path up. Printed are medians: calls of
Python functions in the package, the modules they are in, and the threads that make them. A stream
event ends when Redis has its acknowledgement.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from channel import PAYLOAD
from measure import redis_server

import flask_eventbus
from flask_eventbus import Bus
from flask_eventbus.typing import Via

PACKAGE = str(Path(flask_eventbus.__file__).parent)

#: Seconds without a call after which an event has gone all its way.
QUIET = 0.05

WARM_UP = 20


class Calls:
    """Counts the calls of the package's functions in all threads that start after it does."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, int]] = []
        self._counts = False

    def install(self) -> None:
        """Count in this thread and in those to come."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def of(self, action: Callable[[], Any]) -> list[tuple[str, str, int]]:
        """Return module, function and thread of each call from an action until all is quiet."""
        self.found = []
        self._counts = True
        action()
        seen = -1

        while seen != len(self.found):
            seen = len(self.found)
            time.sleep(QUIET)

        self._counts = False
        return self.found

    def _see(self, frame: FrameType, event: str, arg: object) -> None:
        if self._counts and event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            code = frame.f_code
            module = code.co_filename.removeprefix(PACKAGE).strip("/").removesuffix(".py")
            self.found.append((module, code.co_qualname, threading.get_ident()))


def measure(url: str, via: Via, events: int) -> list[list[tuple[str, str, int]]]:
    """Return the calls of each event of a signal that goes by ``via``."""
    calls = Calls()
    calls.install()
    heard = threading.Semaphore(0)
    consumer = Bus(url, service="consumer", subscribe=["tick"])
    publisher = Bus(url, service="publisher", publish={"tick": via})
    tick = publisher.signal("tick")

    @consumer.on("tick")
    def hear(sender: str, **payload: object) -> None:
        heard.release()

    def one() -> None:
        tick.send("publisher", **PAYLOAD)
        heard.acquire()

    consumer.start()
    # An event of a channel reaches only those that listen already.
    consumer.ready(30)

    for _ in range(WARM_UP):
        one()

    found = [calls.of(one) for _ in range(events)]
    sys.setprofile(None)
    consumer.stop()
    publisher.stop()
    return found


def show(via: Via, found: list[list[tuple[str, str, int]]], functions: int) -> None:
    """Print the medians of a way, and its functions by the number of their calls."""
    calls = median(len(event) for event in found)
    modules = Counter(module for event in found for module in {call[0] for call in event})
    passed = sorted(module for module, times in modules.items() if 2 * times > len(found))
    threads = median(len({thread for *_, thread in event}) for event in found)
    print(f"{via}: {calls:.0f} calls in {len(passed)} modules and {threads:.0f} threads")
    print(f"  {', '.join(passed)}")
    each = Counter((module, name) for event in found for module, name, _ in event)

    for (module, name), times in each.most_common(functions):
        print(f"  {times / len(found):5.1f}  {module}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=50, help="events of each way")
    parser.add_argument("--functions", type=int, default=0, help="functions to list")
    options = parser.parse_args()

    ways: tuple[Via, ...] = ("channel", "stream")

    with redis_server() as server:
        for via in ways:
            show(via, measure(server.url, via, options.events), options.functions)


if __name__ == "__main__":
    main()
