"""Celery over Redis. Source: docs.celeryq.dev, "Optimizing": short tasks, no results kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _program import Send, run
from celery import Celery, signals


def application(url: str) -> Celery:
    app = Celery("benchmark", broker=url)
    app.conf.update(
        task_ignore_result=True,
        worker_prefetch_multiplier=128,
        worker_redirect_stdouts=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )
    return app


def publish(url: str) -> tuple[Send, Callable[[], None]]:
    app = application(url)

    @app.task(name="tick")
    def tick(**payload: Any) -> None: ...

    return lambda **payload: tick.delay(**payload), lambda: None


def receive(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    app = application(url)

    @app.task(name="tick")
    def tick(**payload: Any) -> None:
        receive(**payload)

    signals.worker_ready.connect(lambda **_: ready(), weak=False)
    options = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", "-P", "solo", "--loglevel", "ERROR", *options])


if __name__ == "__main__":
    run({"stream": publish}, {"stream": receive})
