"""Events that Celery's tasks send, however its processes end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from programs import Service
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus

pytestmark = pytest.mark.second_look("starts a Celery worker")

TASKS = """
import os
from celery import Celery
from flask_eventbus import Bus

bus = Bus.from_env()
done = bus.signal("done")
bus.publishes(done)
app = Celery("tasks", broker=os.environ["EVENTBUS_URL"])
app.conf.task_default_queue = os.environ["EVENTBUS_SERVICE"]
app.conf.broker_connection_retry_on_startup = True

@app.task(ignore_result=True)
def work(number):
    # The last thing that the process does.
    done.send(number=number)
"""

SEND = "from tasks import work\nfor number in range({count}): work.delay(number)\n"


@pytest.fixture
def service(tmp_path: Path, shared_redis: RedisServer) -> Iterator[Service]:
    """A service on the server that tests share, which is Celery's broker too."""
    service = Service(tmp_path, shared_redis)
    service.write("tasks.py", TASKS)
    yield service
    service.end()


if tuple(map(int, version("redis").split(".")[:2])) >= (6, 1):
    # Celery takes no older redis-py.

    def test_an_event_of_a_celery_task_is_published_although_its_process_ends_at_once(
        service: Service, shared_redis: RedisServer
    ) -> None:
        received: list[int] = []

        with Bus(shared_redis.url, service="hearer", prefix=service.name) as hearer:
            hearer.on("done")(lambda sender, number: received.append(number))
            hearer.start()
            assert hearer.ready(10)
            service.write("send.py", SEND.format(count=4))
            assert service.run("send.py").end() == 0

            celery = ["-m", "celery", "-A", "tasks", "worker", "--max-tasks-per-child=1"]
            program = service.run(
                *celery, "--concurrency=2", "--without-gossip", "--without-mingle"
            )

            wait_until(lambda: len(received) >= 4, timeout=30, what="every task's event arrives")
            program.send_signal(signal.SIGTERM)
            assert program.end() == 0

        assert sorted(received) == list(range(4))
