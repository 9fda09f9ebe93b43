"""Troubles of a soak: processes and Redis are killed, hung and cut off at random."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from soak.cast import CLAIM_AFTER
from soak.crew import Crew, Member
from soak.lines import Lines
from soak.pair import Pair
from waiting import wait_until

#: Seconds between two troubles.
CALM = (0.5, 3.0)

#: Seconds that Redis hangs, or is away.
OUTAGE = (0.2, 3.0)


class Troubles:
    """Throws the dice, and notes what it did and when."""

    def __init__(self, crew: Crew, redis: Pair, lines: Lines, dice: random.Random) -> None:
        self._crew = crew
        self._redis = redis
        self._lines = lines
        self._dice = dice
        self.counts: Counter[str] = Counter()
        self._kinds: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
            "worker killed": (6, self._kill_worker),
            "worker ended": (2, self._end_worker),
            "worker paused": (1, self._pause_worker),
            "publisher killed": (1, self._kill_publisher),
            "redis killed": (2, self._kill_redis),
            "redis hung": (2, self._hang_redis),
            "failover": (2, self._fail_over),
            "uwsgi worker killed": (2, self._kill_site_worker),
            "clients cut": (2, self._cut_clients),
            "client cut": (4, self._cut_client),
        }

    def go_on(self, seconds: float) -> None:
        """Make trouble for a while."""
        deadline = time.monotonic() + seconds

        while time.monotonic() < deadline:
            time.sleep(self._dice.uniform(*CALM))
            self._one()

    def _one(self) -> None:
        kinds = list(self._kinds)
        weights = [self._kinds[kind][0] for kind in kinds]
        kind = self._dice.choices(kinds, weights)[0]
        began = time.time()
        facts = self._kinds[kind][1]()
        self.counts[kind] += 1
        self._lines.note("trouble", kind=kind, began=began, **facts)

    def _kill_worker(self) -> dict[str, Any]:
        return self._replace(self._worker(), Member.kill)

    def _kill_publisher(self) -> dict[str, Any]:
        # The other one keeps in memory what Redis does not take: it may be ended, not killed.
        return self._replace(self._crew.publishers[0], Member.kill)

    def _end_worker(self) -> dict[str, Any]:
        worker = self._worker()
        pid, code = worker.pid, worker.end()
        worker.start()
        return {"who": worker.name, "victim": pid, "code": code}

    def _pause_worker(self) -> dict[str, Any]:
        worker = self._worker()
        worker.send_signal(signal.SIGSTOP)
        time.sleep(CLAIM_AFTER * 1.5)
        worker.send_signal(signal.SIGCONT)
        return {"who": worker.name, "victim": worker.pid}

    def _kill_redis(self) -> dict[str, Any]:
        before, server = self._redis.failovers(), self._redis.master
        server.kill()
        time.sleep(self._dice.uniform(*OUTAGE))
        server.start()
        return self._repaired(before)

    def _hang_redis(self) -> dict[str, Any]:
        before, server = self._redis.failovers(), self._redis.master
        server.hang()
        time.sleep(self._dice.uniform(*OUTAGE))
        server.resume()
        return self._repaired(before)

    def _fail_over(self) -> dict[str, Any]:
        before = self._redis.failovers()
        self._redis.fail_over()
        return self._repaired(before)

    def _repaired(self, failovers: int) -> dict[str, Any]:
        """Wait until there are two that can take each other's place.

        A master may be replaced and come back within one trouble, without what the other one took
        meanwhile: that is told by the number of failovers, and not by who is the master at the end.
        """
        self._redis.await_repair()
        replaced = self._redis.failovers() > failovers
        self.counts["master replaced"] += replaced
        return {"replaced": replaced}

    def _kill_site_worker(self) -> dict[str, Any]:
        # It may be about to start others in place of those that had enough requests.
        workers = wait_until(lambda: self._crew.sites[0].children, what="the site has workers")
        victim = self._dice.choice(workers)
        os.kill(victim, signal.SIGKILL)
        return {"victim": victim}

    def _cut_clients(self) -> dict[str, Any]:
        with self._redis.client as client:
            return {"cut": client.client_kill_filter(_type="normal")}

    def _cut_client(self) -> dict[str, Any]:
        with self._redis.client as client:
            victim = self._dice.choice(client.client_list(_type="normal"))
            client.client_kill_filter(_id=victim["id"])
            return {"cut": victim["name"]}

    def _worker(self) -> Member:
        return self._dice.choice(self._crew.workers)

    def _replace(self, member: Member, end: Callable[[Member], int]) -> dict[str, Any]:
        victim = end(member)
        member.start()
        return {"who": member.name, "victim": victim}
