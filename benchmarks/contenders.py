"""The programs that are compared, and the environments they run in."""

from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: The payload that every program sends. They run by themselves, in environments of their own.
PAYLOAD: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks/programs/_program.py"))["PAYLOAD"]

#: Virtual environments of the peers; each has its own.
CACHE = ROOT / ".cache" / "benchmarks"


@dataclass(frozen=True)
class Contender:
    """A program that carries events in one way.

    :param program: file in ``programs/``.
    :param way: what the program calls it.
    :param peer: name of its file in ``requirements/peers/``; ``""`` for the environment of the
        project.
    :param share: share of the events of a run that it sends, because it is slower.
    """

    name: str
    program: str
    way: str
    peer: str = ""
    share: float = 1.0

    @property
    def python(self) -> str:
        """Return the interpreter of its environment."""
        return str(CACHE / self.peer / "bin" / "python") if self.peer else sys.executable


FLOOR = Contender("floor", "floor.py", "channel")
BUS = Contender("flask-eventbus", "bus.py", "channel")
BY_HAND = Contender("redis-py by hand", "redis_py.py", "channel", share=0.2)

CHANNELS = [FLOOR, BUS, Contender("flask-eventbus, in Flask", "bus.py", "flask"), BY_HAND]
STREAMS = [
    FLOOR,
    Contender("floor, stream", "floor.py", "stream"),
    Contender("flask-eventbus, stream", "bus.py", "stream"),
    Contender("redis-py by hand, stream", "redis_py.py", "stream", share=0.05),
]
PEERS = [
    Contender("python-socketio", "peer_socketio.py", "channel", "python-socketio", 0.1),
    Contender("FastStream, channel", "peer_faststream.py", "channel", "faststream", 0.1),
    Contender("FastStream, stream", "peer_faststream.py", "stream", "faststream", 0.1),
    Contender("Huey", "peer_huey.py", "stream", "huey", 0.05),
    Contender("kombu, fanout", "peer_kombu.py", "channel", "kombu", 0.05),
    Contender("dramatiq", "peer_dramatiq.py", "stream", "dramatiq", 0.05),
    Contender("edx-event-bus-redis", "peer_edx.py", "stream", "edx-event-bus-redis", 0.03),
    Contender("Celery", "peer_celery.py", "stream", "celery", 0.02),
    Contender("RQ", "peer_rq.py", "stream", "rq", 0.01),
]


def prepare(peer: str) -> str:
    """Make the environment of a peer unless it is there; return its versions.

    :raises subprocess.CalledProcessError: it cannot be installed.
    """
    folder = CACHE / peer
    requirements = ROOT / "requirements" / "peers" / f"{peer}.txt"
    stamp = folder / "installed"

    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        print(f"Installing {peer} into {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [str(folder / "bin" / "pip"), "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--requirement", requirements], check=True)
        stamp.write_text(requirements.read_text())

    return next(
        line.partition("==")[2]
        for line in requirements.read_text().splitlines()
        if line.lower().replace("_", "-").startswith(f"{peer}==")
    )
