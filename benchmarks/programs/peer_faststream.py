"""FastStream over Redis. Source: faststream.ag2.ai, "Redis", pages on channels and streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from _program import Send, run
from faststream import FastStream
from faststream.redis import RedisBroker, StreamSub

KEY = "benchmark"


def publish(url: str, **where: str) -> tuple[Send, Callable[[], None]]:
    loop = asyncio.new_event_loop()
    broker = RedisBroker(url, logger=None)
    loop.run_until_complete(broker.start())

    def send(**payload: Any) -> None:
        loop.run_until_complete(broker.publish(payload, **where))

    return send, lambda: None


def receive(
    url: str, receive: Callable[..., None], ready: Callable[[], None], **where: Any
) -> None:
    broker = RedisBroker(url, logger=None)
    app = FastStream(broker, logger=None)

    @broker.subscriber(**where)
    async def tick(message: dict) -> None:  # type: ignore[type-arg]
        receive(**message)

    @app.after_startup
    async def started() -> None:
        await asyncio.sleep(0.3)
        ready()

    asyncio.run(app.run())


def receive_stream(url: str, take: Callable[..., None], ready: Callable[[], None]) -> None:
    receive(url, take, ready, stream=StreamSub(KEY, group="g", consumer="c1", max_records=100))


if __name__ == "__main__":
    run(
        {
            "channel": lambda url: publish(url, channel=KEY),
            "stream": lambda url: publish(url, stream=KEY),
        },
        {
            "channel": lambda url, take, ready: receive(url, take, ready, channel=KEY),
            "stream": receive_stream,
        },
    )
