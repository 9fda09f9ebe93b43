"""What every program of the comparison does around its own library: pace, count, and report.

A program is run as ``PROGRAM publish|receive WAY URL COUNT ...`` by ``scripts/bench``, in an
environment of its own. It writes one JSON object a line to standard output. All times are
seconds of the monotonic clock, which the processes of one machine share.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

#: About 100 bytes as msgpack, as most events have.
PAYLOAD = {
    "user_id": 7,
    "email": "ada.lovelace@example.com",
    "name": "Ada Lovelace",
    "plan": "yearly",
    "source": "newsletter",
}

Send = Callable[..., Any]
#: Opens a publisher on a URL; returns a function that sends a payload, and one that waits
#: until everything was sent.
Publish = Callable[[str], tuple[Send, Callable[[], Any]]]
#: Receives from a URL for ever: calls its second argument with each payload, and its third once
#: it is subscribed.
Receive = Callable[[str, Callable[..., None], Callable[[], None]], None]


def run(publishers: dict[str, Publish], receivers: dict[str, Receive]) -> None:
    """Do what the command line asks for.

    :param publishers: by way, such as ``"channel"``.
    :param receivers: by way.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["publish", "receive"])
    parser.add_argument("way", choices=sorted({*publishers, *receivers}))
    parser.add_argument("url")
    parser.add_argument("count", type=int)
    parser.add_argument("--warm", type=int, default=0, help="events before those that count")
    parser.add_argument(
        "--rate", type=float, help="events a second; as fast as it can unless given"
    )
    options = parser.parse_args()

    if options.role == "publish":
        publish(publishers[options.way], options)
    else:
        receive(receivers[options.way], options)


def publish(open_publisher: Publish, options: argparse.Namespace) -> None:
    send, flush = open_publisher(options.url)

    for _ in range(options.warm):
        send(at=0.0, **PAYLOAD)

    flush()
    report(ready=True)
    sys.stdin.readline()
    started, cpu = time.monotonic(), time.process_time()
    taken = paced(send, options) if options.rate else at_once(send, options.count)
    flush()
    report(
        start=started,
        end=time.monotonic(),
        cpu=time.process_time() - cpu,
        taken=taken,
    )


def at_once(send: Send, count: int) -> list[float]:
    for _ in range(count):
        send(at=0.0, **PAYLOAD)

    return []


def paced(send: Send, options: argparse.Namespace) -> list[float]:
    """Send at a rate, as a web service does; return the seconds of each call."""
    taken = []
    first = time.monotonic()

    for number in range(options.count):
        time.sleep(max(0.0, first + number / options.rate - time.monotonic()))
        start = time.monotonic()
        send(at=start, **PAYLOAD)
        taken.append(time.monotonic() - start)

    return taken


def receive(receive_from: Receive, options: argparse.Namespace) -> None:
    left = options.warm + options.count
    delays: list[float] = []
    cpu = 0.0
    done = threading.Event()
    end = 0.0

    def receive_one(at: float = 0.0, **payload: Any) -> None:
        nonlocal left, cpu, end
        left -= 1

        if at:
            delays.append(time.monotonic() - at)
        if left == options.count:
            cpu = time.process_time()
            report(warm=True)
        elif not left:
            end = time.monotonic()
            cpu = time.process_time() - cpu
            done.set()

    def tell() -> None:
        done.wait()
        report(end=end, cpu=cpu, delays=delays)

    threading.Thread(target=tell, daemon=True).start()

    if not options.warm:
        cpu = time.process_time()

    receive_from(options.url, receive_one, lambda: report(ready=True))


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)
