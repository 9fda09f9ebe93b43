"""Workers of services that read streams: real processes, and what Redis has of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from programs import Program, Service
from servers import unread
from waiting import wait_until

from flask_eventbus import Bus
from flask_eventbus.transport.keys import StreamKeys

#: What every worker begins with; receivers follow, and :data:`RUN` comes last. It looks more often
#: than others for what a worker left; a test of that time makes its bus without ``_timing``.
HEAD = """
import logging, os, signal, sys, time
from flask_eventbus import Bus, Reject, Retry, current_event
from flask_eventbus.config import Timing
from serving_app.reports import report, wait_until_released

logging.basicConfig(level=logging.INFO)
bus = Bus.from_env(_timing=Timing(check_released_every=0.5))
"""
RUN = """
bus.start()
bus.ready(20)
report("ready")
bus.run()
report("ended")
"""

#: A receiver that reports the number of its event.
COUNTING = """
@bus.on("work", echo=True)
def count(sender, n):
    report("done", n=n, attempt=current_event.attempt)
"""

#: A receiver that ends when the test releases it.
HOLDING = """
@bus.on("work")
def hold(sender, n):
    report("begun", n=n, attempt=current_event.attempt)
    wait_until_released("RELEASE")
    report("done", n=n, attempt=current_event.attempt)
"""


def once(count: int) -> Counter[int]:
    """Return the counts of ``count`` numbers that were handled once each."""
    return Counter(range(count))


class Workers(Service):
    """A service whose workers read the stream of ``work``, and a publisher beside it.

    Settings of workers are short: a claim time of one second.
    """

    def set_up(self) -> None:
        """Make what the test publishes with."""
        self.keys = StreamKeys(self.name)
        self.publisher = Bus(
            self.server.url,
            service="publisher",
            prefix=self.name,
            publish={"*": "stream"},
        )

    def work(self, receivers: str = COUNTING, **settings: str) -> Program:
        """Start a worker with these receivers."""
        short = {"EVENTBUS_CLAIM_AFTER": "1", "PYTHONFAULTHANDLER": "1"}
        number = len(list(self.folder.glob("worker*.py")))
        path = self.write(f"worker{number}.py", HEAD + receivers + RUN)
        return self.run(path.name, **{**short, **settings})

    def worker(self, receivers: str = COUNTING, **settings: str) -> Program:
        """Start a worker, and wait until it reads."""
        program = self.work(receivers, **settings)
        self.wait_for("ready", pid=program.pid)
        return program

    @property
    def stream(self) -> str:
        """The key of the stream of ``work``."""
        return self.keys.stream("work")

    def groups(self) -> dict[str, dict[str, Any]]:
        """The groups of the stream, by their names."""
        if not self.redis.exists(self.stream):
            return {}

        found: Any = self.redis.xinfo_groups(self.stream)
        return {item["name"].decode(): item for item in found}

    def group(self, service: str = "") -> dict[str, Any]:
        """The group of a service, this one unless given; empty if there is none."""
        return self.groups().get(service or self.name, {})

    def unread(self, service: str = "") -> int:
        """Count the entries that no worker of a service has been given."""
        return unread(self.redis, self.stream, service or self.name)

    def send(self, *numbers: int, name: str = "work", **payload: Any) -> None:
        """Publish events with these numbers, in order."""
        for number in numbers:
            self.publisher.node.publish(name, {"n": number, **payload}, confirm=False)

        assert self.publisher.flush(20)

    def all_handled(self, service: str = "") -> bool:
        """Return True if all entries are read and acknowledged, and no retry is left."""
        if not self.group(service):
            return False

        # In the order of an event's way: one that goes on in between is found at its next place.
        return (
            not self.unread(service)
            and self.group(service).get("pending") == 0
            and not self.redis.zcard(self.keys.retry("work", service or self.name))
        )

    def wait_until_handled(self, service: str = "", *, timeout: float = 30) -> None:
        """Wait until nothing is left to do."""
        wait_until(lambda: self.all_handled(service), timeout=timeout, what="everything is settled")

    def done(self, what: str = "done", **facts: Any) -> Counter[int]:
        """Return how often each number was reported."""
        return Counter(line["n"] for line in self.reports(what, **facts))

    def dead_letters(self, name: str = "work") -> list[dict[str, bytes]]:
        """The dead letters of the service, as ``redis-cli`` shows them."""
        found: Any = self.redis.xrange(self.keys.dead(name, self.name))
        return [{key.decode(): value for key, value in fields.items()} for _, fields in found]

    def finish(self) -> None:
        """End everything that was started."""
        self.publisher.stop(flush=0)
        self.end()
