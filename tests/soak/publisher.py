"""A publisher of the soak: ``python -m soak.publisher NAME FOLDER RATE``, until SIGTERM.

What Redis confirmed is a line in the folder; so is what was sent and not confirmed, of which
Redis may have any part. One that buffers confirms at its end, all at once.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from pathlib import Path

from soak.cast import PAID, PLACED
from soak.lines import Lines

from flask_eventbus import Bus, PublishError
from flask_eventbus.bus import stop_on_signals

#: Seconds that the end of a publisher waits for Redis.
FLUSH = 60


class Publisher:
    """Sends orders, one after the other."""

    def __init__(self, name: str, folder: Path) -> None:
        self.bus = Bus.from_env({**os.environ})
        self.bus.publishes(PLACED, via="stream")
        self.bus.publishes(PAID, via="stream", key="n")
        self._name = name
        self._raises = os.environ["EVENTBUS_ON_OUTAGE"] == "raise"
        self._lines = Lines(folder, name)

    @property
    def _life(self) -> str:
        """A second life of a publisher, or a worker of one, has numbers of its own."""
        return f"{self._name}-{os.getpid()}"

    def send(self, signal: str, n: int) -> None:
        """Send one order, and note what became of it."""
        began = time.time()
        facts = {"publisher": self._life, "signal": signal, "n": n, "began": began}

        try:
            self.bus.signal(signal).send(self._name, publisher=self._life, n=n)
        except PublishError as error:
            self._lines.note("unconfirmed", id=error.event_id, **facts)
        else:
            self._lines.note("confirmed" if self._raises else "taken", **facts)

    def end(self) -> None:
        """Wait until Redis has all that was taken."""
        if self.bus.flush(FLUSH):
            self._lines.note("flushed", publisher=self._life)


def main() -> None:
    """Publish at the rate until told to end."""
    name, folder, rate = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(message)s")
    publisher = Publisher(name, Path(folder))

    with stop_on_signals() as reported:
        for n in itertools.count(1):
            publisher.send(PLACED if n % 2 else PAID, n)

            if reported.wait(1 / float(rate)):
                break

    publisher.end()


if __name__ == "__main__":
    main()
