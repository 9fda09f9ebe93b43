"""RQ over Redis. Source: python-rq.org, "Workers", "Performance notes": a worker without forks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import redis
import rq
from _program import Send, run

#: What the worker calls; it imports this module by its name.
receiver: Callable[..., None] = print


def tick(**payload: Any) -> None:
    receiver(**payload)


def publish(url: str) -> tuple[Send, Callable[[], None]]:
    queue = rq.Queue("benchmark", connection=redis.Redis.from_url(url))

    def send(**payload: Any) -> None:
        queue.enqueue("peer_rq.tick", kwargs=payload, result_ttl=0)

    return send, lambda: None


def receive(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    import peer_rq

    peer_rq.receiver = receive
    logging.disable(logging.ERROR)
    queue = rq.Queue("benchmark", connection=redis.Redis.from_url(url))
    worker = rq.SimpleWorker([queue], connection=queue.connection)
    ready()
    worker.work(logging_level="ERROR")


if __name__ == "__main__":
    run({"stream": publish}, {"stream": receive})
