"""flask-eventbus, as its pages say: a bus without Flask, and a Flask application."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from _program import Send, report, run

from flask_eventbus import Bus, Retry, current_event

#: More than a run sends, so that a publisher which is faster than Redis loses nothing.
BUFFER = 1_000_000


def publish(url: str, route: Any) -> tuple[Send, Callable[[], Any]]:
    bus = Bus(url, service="publisher", publish={"tick": route}, buffer_size=BUFFER)
    signal = bus.signal("tick")
    return lambda **payload: signal.send("publisher", **payload), lambda: bus.flush(120)


def publish_channel(url: str) -> tuple[Send, Callable[[], Any]]:
    return publish(url, "channel")


def publish_stream(url: str) -> tuple[Send, Callable[[], Any]]:
    return publish(url, {"via": "stream", "confirm": False})


def publish_confirmed(url: str) -> tuple[Send, Callable[[], Any]]:
    return publish(url, "stream")


def receive(
    url: str,
    receive: Callable[..., None],
    ready: Callable[[], None],
    service: str = "consumer",
) -> None:
    bus = Bus(url, service=service)

    @bus.on("tick")
    def tick(sender: str, **payload: Any) -> None:
        receive(**payload)

    bus.start()
    bus.ready(30)
    ready()
    threading.Event().wait()


def receive_among(
    names: int, patterns: int, url: str, receive: Callable[..., None], ready: Callable[[], None]
) -> None:
    """Receive one signal in a service that subscribes to many, all of which have a stream."""
    others = [f"group{number % 100}/{number}" for number in range(names - 1)]
    full = Bus(url, service="others", publish=dict.fromkeys(others, "stream"))

    for name in others:
        full.signal(name).send("others", n=1)

    full.stop()
    bus = Bus(url, service="consumer")

    for name in [f"group{number}/*" for number in range(patterns)] or others:
        bus.on(name, via="stream")(lambda sender, **payload: None)

    @bus.on("tick")
    def tick(sender: str, **payload: Any) -> None:
        receive(**payload)

    bus.start()
    bus.ready(60)
    ready()
    threading.Event().wait()


def receive_in_flask(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    from flask import Flask

    from flask_eventbus import EventBus

    bus = EventBus()

    @bus.on("tick")
    def tick(sender: str, **payload: Any) -> None:
        receive(**payload)

    app = Flask("consumer")
    app.config.from_mapping(EVENTBUS_SERVICE="consumer", EVENTBUS_URL=url)
    bus.init_app(app)
    bus.start(app)
    bus.ready(30, app=app)
    ready()
    threading.Event().wait()


def receive_retries(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    """Fail at the first attempt of each event; report the CPU so far for each line of input."""
    bus = Bus(url, service="consumer")

    @bus.on("tick", via="stream")
    def tick(sender: str, **payload: Any) -> None:
        if current_event.attempt == 1:
            raise Retry(after=0)

    bus.start()
    bus.ready(30)
    ready()

    while sys.stdin.readline():
        report(cpu=time.process_time())


AMONG = {"among-1": (1, 0), "among-1000": (1000, 0), "among-5000": (5000, 0)}
AMONG["patterns-1000"] = (1000, 100)

if __name__ == "__main__":
    run(
        {
            "channel": publish_channel,
            "flask": publish_channel,
            "stream": publish_stream,
            "confirmed": publish_confirmed,
            "retries": publish_stream,
            "services": publish_stream,
            **dict.fromkeys(AMONG, publish_stream),
        },
        {
            "channel": receive,
            "flask": receive_in_flask,
            "stream": receive,
            "confirmed": receive,
            "retries": receive_retries,
            "services": partial(receive, service=f"consumer-{os.getpid()}"),
            **{way: partial(receive_among, *sizes) for way, sizes in AMONG.items()},
        },
    )
