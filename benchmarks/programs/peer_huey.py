"""Huey over Redis. Source: huey.readthedocs.io, "Consuming tasks": threads, no results kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from _program import Send, run
from huey import RedisHuey


def publish(url: str) -> tuple[Send, Callable[[], None]]:
    huey = RedisHuey("benchmark", url=url, results=False)

    @huey.task(name="tick")
    def tick(**payload: Any) -> None: ...

    return lambda **payload: tick(**payload), lambda: None


def receive(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    huey = RedisHuey("benchmark", url=url, results=False)
    lock = threading.Lock()

    @huey.task(name="tick")
    def tick(**payload: Any) -> None:
        with lock:
            receive(**payload)

    consumer = huey.create_consumer(workers=1, worker_type="thread", periodic=False)
    consumer.start()
    ready()
    threading.Event().wait()


if __name__ == "__main__":
    run({"stream": publish}, {"stream": receive})
