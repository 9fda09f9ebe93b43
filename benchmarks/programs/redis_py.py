"""The same job by hand, on redis-py and JSON, as its documentation shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import redis
from _program import Send, run

KEY = "benchmark"
GROUP = "consumer"


def publish_channel(url: str) -> tuple[Send, Callable[[], None]]:
    client = redis.Redis.from_url(url)
    return lambda **payload: client.publish(KEY, json.dumps(payload)), lambda: None


def publish_stream(url: str) -> tuple[Send, Callable[[], None]]:
    client = redis.Redis.from_url(url)

    def send(**payload: Any) -> None:
        client.xadd(KEY, {"event": json.dumps(payload)}, maxlen=100_000)

    return send, lambda: None


def receive_channel(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    pubsub = redis.Redis.from_url(url).pubsub()
    pubsub.subscribe(KEY)
    ready()

    for message in pubsub.listen():
        if message["type"] == "message":
            receive(**json.loads(message["data"]))


def receive_stream(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    client = redis.Redis.from_url(url)
    client.xgroup_create(KEY, GROUP, "0", mkstream=True)
    ready()

    while True:
        # A list of pairs with RESP2, a map with RESP3.
        found: Any = client.xreadgroup(GROUP, "one", {KEY: ">"}, count=100, block=2_000)

        for entries in found.values() if isinstance(found, dict) else (pair[1] for pair in found):
            for entry, fields in entries[0] if isinstance(found, dict) else entries:
                receive(**json.loads(fields[b"event"]))
                client.xack(KEY, GROUP, entry)


if __name__ == "__main__":
    run(
        {"channel": publish_channel, "stream": publish_stream},
        {"channel": receive_channel, "stream": receive_stream},
    )
