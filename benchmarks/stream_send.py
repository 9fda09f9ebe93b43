"""Measure the speed of confirmed events on a stream, on this machine.

Run it on demand, on a machine with nothing else to do::

    .venv/bin/python benchmarks/stream_send.py

It starts a Redis of its own, repeats each measurement, and prints medians: a confirmed
``send()`` beside an ``XADD`` on a connection of redis-py and one by its client, and
sixteen threads beside one, near Redis and at two distances from it. What sixteen threads
could gain at most, the same is done with the least Python that shares round trips.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from channel import PAYLOAD, median, microseconds
from measure import redis_server

from flask_eventbus import Bus
from flask_eventbus.publisher.message import StreamDestination

KEY = "eventbus:{tick}:stream"

#: As many bytes as an event of the payload has.
BODY = b"x" * 150

#: Seconds there and back, to a Redis that is elsewhere.
DISTANCES = (0.0003, 0.001)

THREADS = 16


# -- measurements ---------------------------------------------------------------------------


def on_a_connection(url: str, count: int) -> float:
    """Microseconds of an ``XADD``, with nothing around it."""
    connection: Any = redis.ConnectionPool.from_url(url, protocol=2).make_connection()
    connection.connect()

    def add() -> None:
        connection.send_command("XADD", KEY, "MAXLEN", "~", 100_000, "*", "event", BODY)
        connection.read_response()

    taken: float = microseconds(add, count)
    connection.disconnect()
    return taken


def by_the_client(url: str, count: int) -> float:
    """Microseconds of ``Redis.xadd()``."""
    client = redis.Redis.from_url(url)
    fields: Any = {"event": BODY}
    taken: float = microseconds(lambda: client.xadd(KEY, fields, maxlen=100_000), count)
    client.close()
    return taken


def confirmed(url: str, count: int, threads: int = 1) -> float:
    """Microseconds from one confirmed event to the next, all threads together."""
    bus = Bus(url, service="publisher", publish={"tick": "stream"}, timeout=10)
    signal = bus.signal("tick")
    signal.send("publisher", **PAYLOAD)

    def send() -> None:
        for _ in range(count // threads):
            signal.send("publisher", **PAYLOAD)

    start = time.perf_counter()
    together(send, threads)
    taken = (time.perf_counter() - start) / count * 1e6
    bus.stop()
    return taken


class LeastPython:
    """The least code for threads that share round trips: bytes that are ready, and a socket."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("redis://").partition("/")[0].split(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._command = StreamDestination("tick", KEY, maxlen=100_000).command(BODY)
        self._lock = threading.Lock()
        self._line: list[threading.Lock] = []
        self._done: set[threading.Lock] = set()
        self._is_led = False

    def send(self) -> None:
        bell = threading.Lock()
        bell.acquire()

        with self._lock:
            self._line.append(bell)
            leads, self._is_led = not self._is_led, True

        if not leads:
            bell.acquire()

        if bell in self._done:
            self._done.discard(bell)
        else:
            self._lead(bell)

    def close(self) -> None:
        self._socket.close()

    def _lead(self, own: threading.Lock) -> None:
        with self._lock:
            batch, self._line = self._line, []

        self._socket.sendall(self._command * len(batch))
        answers = 0

        # The id of an entry is a string, and begins with a dollar.
        while answers < len(batch):
            answers += self._socket.recv(65_536).count(b"$")

        with self._lock:
            following = self._line[:1]
            self._is_led = bool(following)

        batch.remove(own)
        self._done.update(batch)

        for bell in (*following, *batch):
            bell.release()


def least(url: str, count: int, threads: int) -> float:
    """Microseconds from one event to the next with the least Python, all threads together."""
    shared = LeastPython(url)

    def send() -> None:
        for _ in range(count // threads):
            shared.send()

    start = time.perf_counter()
    together(send, threads)
    taken = (time.perf_counter() - start) / count * 1e6
    shared.close()
    return taken


def together(run: Callable[[], None], threads: int) -> None:
    if threads == 1:
        return run()

    running = [threading.Thread(target=run) for _ in range(threads)]

    for thread in running:
        thread.start()

    for thread in running:
        thread.join()


# -- a Redis that is elsewhere --------------------------------------------------------------


@contextmanager
def elsewhere(url: str, seconds: float) -> Iterator[str]:
    """The same server, so many seconds there and back: bytes pass through a process that waits."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    listening = socket.create_server(("127.0.0.1", 0))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=relay, args=(listening, port, seconds / 2), daemon=True)
    process.start()
    yield f"redis://127.0.0.1:{listening.getsockname()[1]}/0"
    process.kill()
    process.join()
    listening.close()


def relay(listening: socket.socket, port: int, late: float) -> None:
    while True:
        client, _ = listening.accept()
        server = socket.create_connection(("127.0.0.1", port))

        for pair in ((client, server), (server, client)):
            for end in pair:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            threading.Thread(target=carry, args=(*pair, late), daemon=True).start()


def carry(source: socket.socket, target: socket.socket, late: float) -> None:
    """Pass on what comes, each piece ``late`` seconds later."""
    pieces: deque[tuple[float, bytes]] = deque()
    there = threading.Semaphore(0)

    def deliver() -> None:
        while True:
            there.acquire()
            due, data = pieces.popleft()
            time.sleep(max(0.0, due - time.perf_counter()))
            target.sendall(data)

    threading.Thread(target=deliver, daemon=True).start()

    while data := source.recv(65_536):
        pieces.append((time.perf_counter() + late, data))
        there.release()


# -- the report -----------------------------------------------------------------------------


def from_afar(url: str, where: str, count: int, runs: int) -> list[tuple[str, float, str]]:
    few = max(THREADS, count // 16)
    bare = median(lambda: on_a_connection(url, few), runs)
    one = median(lambda: confirmed(url, few), runs)
    many = median(lambda: confirmed(url, count, THREADS), runs)
    return [
        (f"{where}: `XADD` on a connection", bare, ""),
        (f"{where}: `send()`, confirmed", one, f"{one / bare:.2f} of it"),
        (f"{where}: {THREADS} threads", many, f"{one / many:.1f} times"),
        *at_most(url, where, few, count, runs),
    ]


def at_most(url: str, where: str, few: int, count: int, runs: int) -> list[tuple[str, float, str]]:
    one = median(lambda: least(url, few, 1), runs)
    many = median(lambda: least(url, count, THREADS), runs)
    return [
        (f"{where}: the least Python, one thread", one, ""),
        (f"{where}: the least Python, {THREADS} threads", many, f"{one / many:.1f} times"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="repetitions of each (default 5)")
    parser.add_argument("--count", type=int, default=16_000, help="events per run")
    arguments = parser.parse_args()
    runs, count = arguments.runs, arguments.count

    with redis_server() as server:
        url, version = server.url, server.version
        rows = []
        bare = median(lambda: on_a_connection(url, count), runs)
        client = median(lambda: by_the_client(url, count), runs)
        one = median(lambda: confirmed(url, count), runs)
        rows.append(("`XADD` on a connection of redis-py", bare, ""))
        rows.append(("`Redis.xadd()` of redis-py", client, f"{client / bare:.2f} of the first"))
        rows.append(
            ("`send()`, confirmed", one, f"{one / bare:.2f} of the first, {one / client:.2f} of it")
        )
        many = median(lambda: confirmed(url, count, THREADS), runs)
        rows.append((f"`send()`, confirmed, {THREADS} threads", many, f"{one / many:.1f} times"))
        rows += at_most(url, "near", count, count, runs)

        for seconds in DISTANCES:
            with elsewhere(url, seconds) as far:
                rows += from_afar(far, f"{seconds * 1000:g} ms away", count, runs)

    print(
        f"Python {platform.python_version()}, redis-py {redis.__version__}, server {version}, "
        f"{os.cpu_count()} cores, medians of {runs} runs\n"
    )
    print("| | microseconds an event | |\n|---|---:|---:|")

    for name, taken, compared in rows:
        print(f"| {name} | {taken:.1f} | {compared} |")


if __name__ == "__main__":
    main()
