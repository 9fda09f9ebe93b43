"""A worker of one of the soak's services: ``python -m soak.worker NAME FOLDER SEED``.

``NAME`` is ``SERVICE-NUMBER``. What a receiver has done is a line in the folder.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak.cast import FLAKY, ORDERLY, PAID, PLACED, REJECTS, SCREEN, is_rejected
from soak.lines import Lines

from flask_eventbus import Bus, Reject, Retry, current_event

#: Seconds that a receiver takes at most.
MAX_WORK = 0.01

#: One of so many first attempts of the flaky receiver fails.
FAILS = 10


class Worker:
    """Connects the receivers of a service."""

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        self.bus = Bus.from_env()
        self._lines = Lines(folder, name)
        self._chance = random.Random(f"{seed} {name} {time.time()}")  # noqa: S311 - plays
        connect: Callable[[], None] = getattr(self, f"_as_{name.rpartition('-')[0]}")
        connect()

    def run(self) -> None:
        """Listen until SIGTERM."""
        self.bus.start()
        self.bus.ready()
        self._lines.note("ready")
        self.bus.run()

    def _as_mailer(self) -> None:
        self.bus.on(PLACED)(self._receiver(FLAKY, self._fail_sometimes))
        self.bus.on(PLACED)(self._receiver("mailer.note"))

    def _as_audit(self) -> None:
        self.bus.on("order_*")(self._receiver("audit.write"))

    def _as_ledger(self) -> None:
        self.bus.on(PAID)(self._receiver(ORDERLY))

    def _as_screen(self) -> None:
        self.bus.on(PAID, group=None)(self._receiver(SCREEN))

    def _receiver(
        self, name: str, fail: Callable[[int], None] = lambda n: None
    ) -> Callable[..., None]:
        def receive(sender: str, publisher: str, n: int) -> None:
            begun = time.time()
            time.sleep(self._chance.random() * MAX_WORK)
            fail(n)
            self._note(name, begun, publisher=publisher, n=n)

        # A receiver is known by its name, and a retry finds it by that in another process.
        receive.__qualname__ = name
        return receive

    def _note(self, receiver: str, begun: float, **payload: Any) -> None:
        facts = {"signal": current_event.name, "id": current_event.id}
        attempt = current_event.attempt
        self._lines.note(
            "handled", receiver=receiver, begun=begun, attempt=attempt, **facts, **payload
        )

    def _fail_sometimes(self, n: int) -> None:
        if is_rejected(n):
            raise Reject(REJECTS)

        if current_event.attempt == 1 and self._chance.random() < 1 / FAILS:
            raise Retry("not now", after=self._chance.random())


def main() -> None:
    """Listen until SIGTERM."""
    name, folder, seed = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(message)s")
    Worker(name, Path(folder), int(seed)).run()


if __name__ == "__main__":
    main()
