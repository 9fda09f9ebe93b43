"""dramatiq over Redis. Source: dramatiq.io, "User Guide": a worker with eight threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import dramatiq
from _program import Send, run
from dramatiq.brokers.redis import RedisBroker


def publish(url: str) -> tuple[Send, Callable[[], None]]:
    dramatiq.set_broker(RedisBroker(url=url))

    @dramatiq.actor(actor_name="tick")
    def tick(**payload: Any) -> None: ...

    return lambda **payload: tick.send(**payload), lambda: None


def receive(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    broker = RedisBroker(url=url)
    dramatiq.set_broker(broker)
    lock = threading.Lock()

    @dramatiq.actor(actor_name="tick")
    def tick(**payload: Any) -> None:
        with lock:
            receive(**payload)

    dramatiq.Worker(broker, worker_threads=8).start()
    ready()
    threading.Event().wait()


if __name__ == "__main__":
    run({"stream": publish}, {"stream": receive})
