"""A soak: services, workers and publishers for minutes, in trouble all the time, and a ledger.

``SOAK_MINUTES=10 scripts/soak``; two minutes by default. ``SOAK_SEED=N`` throws the same dice
again.

Seven workers of three services and two processes that each hear everything take what two
publishers and the workers of a uWSGI site send. Meanwhile workers, a publisher and workers of the
site are killed, workers ended and paused. A master of Redis is killed and started again (with AOF,
``appendfsync always``: what it confirms is on disk), hung, replaced by its replica, and cuts its
clients off; Sentinels let the replica follow where it is away for a second.

``EVENTBUS_REPLICAS=1``: what is confirmed is with the replica as well, and none may be missing.
What a publisher took into its buffer has no such promise: the ledger counts apart what of it went
with a master that was replaced. At the end it compares what was confirmed with what each service
handled. The exit code is 1 if anything is missing, or was handled again for no reason; then the
history of each such order is printed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from soak.cast import PAID, PLACED, PUBLISHERS, SCREENS, SERVICES
from soak.crew import Crew
from soak.ledger import Column, Ledger, Order
from soak.lines import Lines, read_lines
from soak.pair import Pair
from soak.troubles import Troubles
from waiting import wait_until

from flask_eventbus.codec.codec import Codec

#: Events that each publisher sends in a second.
RATE = 60

#: Seconds that the services get for what is left when the troubles are over.
REST = 120.0

#: Orders whose history is printed; all lines stay in the folder.
SHOWN = 5


class Soak:
    """One run."""

    def __init__(self, folder: Path, *, minutes: float, seed: int) -> None:
        self._folder = folder
        self._minutes = minutes
        self._redis = Pair(folder)
        self._crew = Crew(folder, self._redis.url, seed=seed)
        self._lines = Lines(folder, "soak")
        self._troubles = Troubles(
            self._crew,
            self._redis,
            self._lines,
            random.Random(seed),  # noqa: S311 - dice
        )
        self._faults: list[str] = []
        #: Set once nobody visits the site any more.
        self._visits = threading.Event()

    def run(self) -> bool:
        """Play it all; whether nothing was found wrong."""
        try:
            self._redis.start()
            self._hire()
            self._troubles.go_on(self._minutes * 60)
            self._wind_up()
            return self._report()
        finally:
            self._visits.set()
            self._crew.kill_all()
            self._redis.kill()

    def _hire(self) -> None:
        crew = self._crew
        names = [f"{name}-{n}" for name, count in SERVICES.items() for n in range(1, count + 1)]
        crew.workers = [crew.hire_worker(name) for name in names]
        crew.screens = [crew.hire_worker(name) for name in SCREENS]
        wait_until(self._is_awaited, timeout=60, what="everybody listens")
        crew.publishers = [crew.hire_publisher(name, rate=RATE) for name in PUBLISHERS]
        crew.sites = [crew.hire_site()]
        threading.Thread(target=self._visit, daemon=True).start()

    def _visit(self) -> None:
        """Send requests to the site; some meet the end of a worker."""
        while not self._visits.wait(1 / RATE):
            with contextlib.suppress(OSError, http.client.HTTPException):
                visit(self._crew.site_port)

    def _is_awaited(self) -> bool:
        ready = [line for line in read_lines(self._folder) if line["what"] == "ready"]
        return len(ready) == len(self._crew.all)

    def _wind_up(self) -> None:
        self._visits.set()

        for publisher in (*self._crew.sites, *self._crew.publishers):
            self._expect_exit(publisher.name, publisher.end())

        began = time.monotonic()

        while self._left() and time.monotonic() - began < REST:
            time.sleep(0.2)

        if left := self._left():
            self._faults.append(f"After {REST:g} s this was left: {left}")

        for member in (*self._crew.workers, *self._crew.screens):
            self._expect_exit(member.name, member.end())

    def _expect_exit(self, name: str, code: int) -> None:
        if code:
            self._faults.append(f"{name} ended with the exit code {code}")

    def _left(self) -> dict[str, Any]:
        with self._redis.client as client:
            return {name: found for name in (PLACED, PAID) if (found := _left_of(client, name))}

    def _report(self) -> bool:
        ledger = Ledger(read_lines(self._folder), self._dead(), self._kept())
        columns = list(ledger.columns())
        print_table(columns)
        print("Troubles: " + ", ".join(f"{n} {kind}" for kind, n in self._counts()))

        for fault in self._faults:
            print(f"FAULT: {fault}")

        wrong = [order for column in columns for order in (*column.missing, *column.unexplained)]

        for order in list(dict.fromkeys(wrong))[:SHOWN]:
            print(f"\n{order[0]} {order[1]}:")
            print("\n".join(f"  {line}" for line in ledger.history(order)))

        return not wrong and not self._faults

    def _counts(self) -> list[tuple[str, int]]:
        return self._troubles.counts.most_common()

    def _dead(self) -> Iterator[tuple[str, Order]]:
        with self._redis.client as client:
            for key in client.scan_iter("soak:{*}:dead:*"):
                for _, fields in client.xrange(key):
                    yield _dead_letter(fields)

    def _kept(self) -> Iterator[Order]:
        """The orders in the streams of the last master."""
        codec = Codec()

        with self._redis.client as client:
            for name in (PLACED, PAID):
                for _, fields in client.xrange(f"soak:{{{name}}}:stream"):
                    payload = codec.decode(fields[b"event"], via="stream").payload
                    yield payload["publisher"], payload["n"]


def visit(port: int) -> None:
    """One request to the site."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    try:
        connection.request("POST", "/")
        connection.getresponse().read()
    finally:
        connection.close()


def _left_of(client: redis.Redis, name: str) -> dict[str, Any]:
    stream: Any = client.xinfo_stream(f"soak:{{{name}}}:stream")
    left = {}

    for group in client.xinfo_groups(f"soak:{{{name}}}:stream"):
        service = group["name"].decode()
        retries = client.zcard(f"soak:{{{name}}}:retry:{service}")
        behind = group["last-delivered-id"] != stream["last-generated-id"]

        if group["pending"] or retries or behind:
            left[service] = {"pending": group["pending"], "retries": retries, "behind": behind}

    return left


def _dead_letter(fields: dict[bytes, bytes]) -> tuple[str, Order]:
    payload = json.loads(fields[b"payload"])
    receiver = fields[b"receiver"].decode().removeprefix("__main__.")
    return receiver, (payload["publisher"], payload["n"])


def print_table(columns: list[Column]) -> None:
    """Print the expected and the actual work of each receiver."""
    print(
        f"{'receiver':24}{'confirmed':>10}{'handled':>9}{'dead':>6}{'missing':>9}"
        f"{'with master':>13}{'again':>7}{'unexplained':>13}"
    )

    for column in columns:
        print(
            f"{column.receiver:24}{column.confirmed:>10}{column.handled:>9}{column.dead:>6}"
            f"{len(column.missing):>9}{len(column.with_master):>13}"
            f"{len(column.again):>7}{len(column.unexplained):>13}"
        )


def main() -> int:
    """Run for as long as the environment says."""
    minutes = float(os.environ.get("SOAK_MINUTES", "2"))
    seed = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))
    print(f"A soak of {minutes:g} minutes; SOAK_SEED={seed} repeats its dice.", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    # Nothing is left either when it is told to end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    good = Soak(folder, minutes=minutes, seed=seed).run()
    print("Nothing is missing." if good else f"Logs and lines are in {folder}.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
