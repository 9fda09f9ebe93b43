"""edx-event-bus-redis. Source: its README, "Testing locally"; events of openedx-events."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import attr
from _program import Send, run
from django.conf import settings

TOPIC = "benchmark"


def configure(url: str) -> Any:
    settings.configure(
        EVENT_BUS_REDIS_CONNECTION_URL=url,
        EVENT_BUS_TOPIC_PREFIX="",
        SERVICE_VARIANT="benchmark",
        INSTALLED_APPS=[],
        CACHES={"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}},
        DATABASES={},
    )
    import django

    django.setup()
    from openedx_events.tooling import OpenEdxPublicSignal

    # The library reads the types themselves, which are text where annotations are postponed.
    tick = attr.make_class(
        "Tick",
        {
            "at": attr.ib(type=float),
            "user_id": attr.ib(type=int),
            **{name: attr.ib(type=str) for name in ("email", "name", "plan", "source")},
        },
        frozen=True,
    )
    return tick, OpenEdxPublicSignal("org.benchmark.tick.v1", {"tick": tick})


def publish(url: str) -> tuple[Send, Callable[[], None]]:
    tick, signal = configure(url)
    from edx_event_bus_redis import create_producer

    producer = create_producer()

    def send(**payload: Any) -> None:
        producer.send(
            signal=signal,
            topic=TOPIC,
            event_key_field="tick.user_id",
            event_data={"tick": tick(**payload)},
            event_metadata=signal.generate_signal_metadata(time=datetime.now(UTC)),
        )

    return send, lambda: None


def receive(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    _, signal = configure(url)
    from edx_event_bus_redis import RedisEventConsumer

    def take(sender: Any = None, *, tick: Any, **rest: Any) -> None:
        receive(**attr.asdict(tick))

    signal.connect(take)
    consumer = RedisEventConsumer(TOPIC, "g", "c1")
    ready()
    consumer.consume_indefinitely()


if __name__ == "__main__":
    run({"stream": publish}, {"stream": receive})
