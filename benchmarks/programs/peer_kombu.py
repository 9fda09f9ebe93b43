"""kombu's fanout exchange over Redis. Source: docs.celeryq.dev/projects/kombu, "Consumers"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _program import Send, run
from kombu import Connection, Consumer, Exchange, Queue

EXCHANGE = Exchange("benchmark", type="fanout", durable=False)


def publish(url: str) -> tuple[Send, Callable[[], None]]:
    producer = Connection(url).Producer(exchange=EXCHANGE, serializer="json")
    return lambda **payload: producer.publish(payload), lambda: None


def receive(url: str, receive: Callable[..., None], ready: Callable[[], None]) -> None:
    connection = Connection(url)
    queue = Queue("one", EXCHANGE, exclusive=True, auto_delete=True)

    def take(body: dict[str, Any], message: Any) -> None:
        receive(**body)
        message.ack()

    with Consumer(connection, queue, callbacks=[take], accept=["json"], no_ack=True):
        ready()

        while True:
            try:
                connection.drain_events(timeout=1)
            except TimeoutError:
                continue


if __name__ == "__main__":
    run({"channel": publish}, {"channel": receive})
