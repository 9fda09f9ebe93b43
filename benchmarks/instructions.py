"""Count the instructions of the processor for an event, with valgrind.

Run it on demand; the count is the same whatever else the machine does::

    .venv/bin/python benchmarks/instructions.py

It encodes events, and decodes and dispatches them, in processes of their own: with few events and
with more, so that the difference is what an event takes. valgrind is a package of Debian.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from contenders import PAYLOAD

#: Events of the two runs of a job, and of a message.
FEW, MORE, SHARED = 1_000, 5_000, 100


def encode(count: int) -> None:
    """Encode events as a publisher does: the payload, and the envelope around it."""
    from flask_eventbus.codec.codec import Codec

    codec = Codec()
    envelope = codec.envelope("publisher", "tick")

    for number in range(count):
        data = codec.pack_payload(PAYLOAD)
        envelope(data, id=f"9f3ac2d1b07e-{number}", time_ns=time.time_ns(), seq=number + 1)


def decode(count: int) -> None:
    """Decode the events of shared messages as a listener does, and run a receiver for each."""
    from flask_eventbus import Bus, DecodeError
    from flask_eventbus.codec.codec import Codec

    bus = Bus("redis://localhost", service="consumer")
    bus.on("tick")(lambda sender, **payload: None)
    dispatcher, handled = bus.node.dispatcher, bus.node.counters.tally("handled")
    codec = Codec()
    envelope = codec.envelope("publisher", "tick")
    data = codec.pack_payload(PAYLOAD)
    message = b"".join(
        envelope(data, id=f"9f3ac2d1b07e-{number}", time_ns=1, seq=number)
        for number in range(1, SHARED + 1)
    )

    for _ in range(count // SHARED):
        found = [event for _, event, _, _ in codec.decode_message(message)]
        dispatcher.dispatch_all(
            (event for event in found if not isinstance(event, DecodeError)), handled
        )

    assert handled.count == count


JOBS = {"encode": encode, "decode and dispatch": decode}


def main() -> None:
    valgrind = shutil.which("valgrind")

    if valgrind is None:
        sys.exit("There is no valgrind on PATH. Install it and run this again.")

    for name in JOBS:
        # The first run may compile modules.
        instructions(valgrind, name, SHARED)
        taken = (instructions(valgrind, name, MORE) - instructions(valgrind, name, FEW)) / (
            MORE - FEW
        )
        print(f"{name}: {taken:,.0f} instructions an event", flush=True)


def instructions(valgrind: str, name: str, count: int) -> int:
    """Return the instructions of a process that does a job ``count`` times."""
    tool = [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    command = [*tool, sys.executable, str(Path(__file__)), name, str(count)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "0"}
    )
    found = re.search(r"Collected : (\d+)", done.stderr)

    if found is None:
        sys.exit(f"valgrind printed no count: {done.stderr[-500:]}")

    return int(found[1])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        JOBS[sys.argv[1]](int(sys.argv[2]))
    else:
        main()
