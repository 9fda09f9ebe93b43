"""Redis in more than one process: a master with its replica and Sentinels."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

from servers import RedisServer, server_executable
from waiting import wait_until

MASTER = "mymaster"


class Sentinel(RedisServer):
    """Watches a master, and has a replica take its place when it is gone for a second."""

    def __init__(self, folder: Path, master: RedisServer) -> None:
        super().__init__(folder)
        # A Sentinel writes what it learns into its own configuration file.
        self._file = folder / "sentinel.conf"
        self._file.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 2\n"
            f"sentinel down-after-milliseconds {MASTER} 1000\n"
            f"sentinel failover-timeout {MASTER} 3000\n"
        )

    def start(self) -> None:
        command = [str(server_executable()), str(self._file), "--sentinel"]

        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

        wait_until(self.answers, what="the Sentinel answers")

    def knows_all(self) -> bool:
        """Return True if it has found the replica and the other Sentinels."""
        with self.client as client:
            found = client.sentinel_master(MASTER)

        return bool(found["num-other-sentinels"] == 2 and found["num-slaves"] == 1)


class Watched:
    """A master, its replica, and three Sentinels."""

    def __init__(self, folder: Path, *options: str) -> None:
        rooms = rooms_in(folder)
        # Without the delay, in which a master waits for more replicas.
        options = ("--repl-diskless-sync-delay", "0", *options)
        self.master = RedisServer(next(rooms), *options)
        self.replica = RedisServer(next(rooms), *options)
        self._sentinels = [Sentinel(next(rooms), self.master) for _ in range(3)]

    @property
    def url(self) -> str:
        """The URL for a service."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self._sentinels)
        return f"redis+sentinel://{hosts}/{MASTER}/0"

    def start(self) -> None:
        """Start all, and wait until they know each other."""
        for server in (self.master, self.replica):
            server.start()

        # No option of its start: one that was promoted and starts again must not follow the other.
        with self.replica.client as client:
            client.replicaof("127.0.0.1", self.master.port)

        for sentinel in self._sentinels:
            sentinel.start()

        wait_until(lambda: is_linked(self.replica), timeout=20, what="the replica replicates")

        for sentinel in self._sentinels:
            wait_until(sentinel.knows_all, timeout=20, what="the Sentinels know each other")

    def kill(self) -> None:
        """End all."""
        for server in (self.master, self.replica, *self._sentinels):
            server.kill()

    def kill_a_sentinel(self) -> None:
        """End the one that is named first."""
        self._sentinels[0].kill()

    def port_of_the_master(self) -> int:
        """The port of the server that the Sentinels call the master."""
        with self._sentinels[0].client as client:
            return int(client.sentinel_get_master_addr_by_name(MASTER)[1])

    def failovers(self) -> int:
        """A number that grows with each failover, also where the first master is back."""
        epochs = []

        for sentinel in self._sentinels:
            with sentinel.client as client:
                epochs.append(int(client.sentinel_master(MASTER)["config-epoch"]))

        return max(epochs)

    def is_at_rest(self) -> bool:
        """Return True if the master is there and no failover is going on."""
        for sentinel in self._sentinels:
            with sentinel.client as client:
                found = client.sentinel_master(MASTER)

            # "s_down" and "failover_in_progress" would stand there, too.
            if found["flags"] != "master":
                return False

        return True

    def fail_over(self) -> None:
        """Have the replica take over while the master lives."""
        with self._sentinels[0].client as client:
            client.execute_command("SENTINEL", "FAILOVER", MASTER)


def rooms_in(folder: Path) -> Iterator[Path]:
    """New folders, one for each server."""
    for number in itertools.count():
        room = folder / str(number)
        room.mkdir()
        yield room


def is_linked(replica: RedisServer) -> bool:
    with replica.client as client:
        return bool(client.info("replication").get("master_link_status") == "up")
