"""The Redis of a soak: a master, its replica, and Sentinels that let the one follow the other."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import redis
from servers import RedisServer
from topologies import Watched, is_linked
from waiting import wait_until

#: Everything that is confirmed is on the disks of both.
_AOF = ("--appendonly", "yes", "--appendfsync", "always")

#: Seconds that a failover and the copy to the new replica may take.
REPAIR = 180.0

#: Seconds after which a failover that was asked for is taken for one that the Sentinels gave up.
ABORTED = 20.0


class Pair:
    """A master and a replica, which change places."""

    def __init__(self, folder: Path) -> None:
        self._watched = Watched(folder, *_AOF)

    @property
    def url(self) -> str:
        """The URL for a service."""
        return self._watched.url

    @property
    def master(self) -> RedisServer:
        """Whom the Sentinels call the master."""
        first, second = self._watched.master, self._watched.replica
        return first if first.port == self._watched.port_of_the_master() else second

    @property
    def client(self) -> redis.Redis:
        """A client of the master."""
        return self.master.client

    def failovers(self) -> int:
        """A number that grows with each failover."""
        return self._watched.failovers()

    def start(self) -> None:
        """Start all, and wait until they know each other."""
        self._watched.start()
        self.await_repair()

    def kill(self) -> None:
        """End all."""
        self._watched.kill()

    def fail_over(self) -> None:
        """Let the replica take over while the master lives; Sentinels on a busy machine give up."""
        before, deadline = self.master.port, time.monotonic() + ABORTED

        with contextlib.suppress(redis.ResponseError):
            self._watched.fail_over()

        while self.master.port == before and time.monotonic() < deadline:
            time.sleep(0.05)

    def await_repair(self) -> None:
        """Return once a master is there, and a replica that has all of it."""
        wait_until(self._is_whole, timeout=REPAIR, what="the replica follows the master")

    def _is_whole(self) -> bool:
        try:
            master = self.master
            other = {self._watched.master, self._watched.replica} - {master}

            with master.client as client:
                said = client.info("replication")

            online = said["role"] == "master" and said.get("slave0", {}).get("state") == "online"
            return online and is_linked(other.pop()) and self._watched.is_at_rest()
        except redis.RedisError:
            return False
