"""Tests of audit: the lines it writes, and the failures it survives."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

import msgpack
import redis

from flask_eventbus import Bus
from flask_eventbus.signals import events_trimmed
from flask_eventbus.testing import Isolation
from flask_eventbus.typing import Publish

FOLDER = Path(__file__).parent.parent


#: Who is to hear of a user whatever happens; of a price, who listens.
ROUTES: Publish = {"user_registered": "stream", "price_changed": "channel"}


def test_each_event_of_any_name_is_a_line(
    audit: ModuleType, eventbus: Isolation, trail: Any
) -> None:
    event = eventbus.deliver("user_registered", source="accounts", user_id=7, name="Łukasz")
    eventbus.deliver("price_changed", source="catalog", sku="A-1")

    first, second = trail.lines("event")
    assert first.pop("written") >= event.time.isoformat()
    assert first == {
        "what": "event",
        "id": event.id,
        "name": "user_registered",
        "source": "accounts",
        "via": "channel",
        "time": event.time.isoformat(),
        "payload": {"user_id": 7, "name": "Łukasz"},
    }
    assert second["name"] == "price_changed"


def test_values_that_json_lacks_become_text(
    audit: ModuleType, eventbus: Isolation, trail: Any
) -> None:
    eventbus.deliver(
        "order_placed",
        source="shop",
        total=Decimal("12.50"),
        at=datetime(2026, 11, 22, 17, 30, tzinfo=UTC),
        due=date(2026, 12, 1),
        within=timedelta(minutes=1.5),
        order=UUID(int=7),
        seal=b"\x00\xff",
        tags={"b", "a"},
        lines=[{"price": Decimal("0.1")}, None, True, 2**70],
        ratio=float("nan"),
    )

    assert trail.lines("event")[0]["payload"] == {
        "total": "12.50",
        "at": "2026-11-22T17:30:00+00:00",
        "due": "2026-12-01",
        "within": 90.0,
        "order": "00000000-0000-0000-0000-000000000007",
        "seal": "AP8=",
        "tags": ["a", "b"],
        "lines": [{"price": "0.1"}, None, True, 2**70],
        "ratio": "nan",
    }


def test_the_audit_service_imports_no_flask() -> None:
    words = "import sys, audit; sys.exit('flask' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", words], cwd=FOLDER).returncode == 0


def test_the_audit_log_continues_after_redis_was_killed_and_restarted(
    redis_server: Any, process: object, trail: Any, wait_until: Callable[..., Any]
) -> None:
    with Bus(redis_server.url, service="accounts", publish=["user_registered"]) as bus:
        bus.signal("user_registered").send(user_id=1)
        wait_until(lambda: trail.lines("event"))

        redis_server.kill()
        wait_until(lambda: trail.lines("lost"))
        redis_server.start()
        wait_until(lambda: trail.lines("reconnected"))

        bus.signal("user_registered").send(user_id=2)
        wait_until(lambda: len(trail.lines("event")) == 2)

    whats = [line["what"] for line in trail.lines()]
    assert whats == ["started", "connected", "event", "lost", "reconnected", "event"]
    assert trail.lines("reconnected")[0]["seconds_away"] > 0


def test_events_that_never_came_are_written_as_missed(
    redis_server: Any, process: object, trail: Any, wait_until: Callable[..., Any]
) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        for number in (1, 4):
            client.publish("eventbus:{user_left}:channel", wire_event(number))

    wait_until(lambda: len(trail.lines("event")) == 2)

    [missed] = wait_until(lambda: trail.lines("missed"))
    del missed["written"]
    assert missed == {
        "what": "missed",
        "name": "user_left",
        "source": "accounts",
        "node": "0a1b2c3d4e5f",
        "count": 2,
    }


def test_undecodable_bytes_are_written_as_rejected(
    redis_server: Any, process: object, trail: Any, wait_until: Callable[..., Any]
) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.publish("eventbus:{user_left}:channel", b"\xc1")

    [rejected] = wait_until(lambda: trail.lines("rejected"))
    assert (rejected["name"], rejected["reason"]) == ("user_left", "not_msgpack")


def test_after_a_pause_only_stream_events_are_written(
    redis_server: Any,
    run: Callable[[], subprocess.Popen[bytes]],
    trail: Any,
    wait_until: Callable[..., Any],
) -> None:
    first = run()

    with Bus(redis_server.url, service="accounts", publish=ROUTES) as bus:
        registered, changed = bus.signal("user_registered"), bus.signal("price_changed")
        registered.send(user_id=1)
        changed.send(sku="A1")
        wait_until(lambda: len(trail.lines("event")) == 2)

        first.terminate()
        assert first.wait(timeout=30) == 0
        registered.send(user_id=2)
        changed.send(sku="B2")
        assert bus.flush(5)

        run()
        changed.send(sku="C3")
        wait_until(lambda: len(trail.lines("event")) == 4)

    assert sorted((line["via"], *line["payload"].values()) for line in trail.lines("event")) == [
        ("channel", "A1"),
        ("channel", "C3"),
        ("stream", 1),
        ("stream", 2),
    ]


def test_events_trimmed_before_they_were_read_are_written_as_trimmed(
    audit: ModuleType, trail: Any
) -> None:
    events_trimmed.send("audit", name="user_registered", count=None)

    [trimmed] = trail.lines("trimmed")
    assert (trimmed["name"], trimmed["count"]) == ("user_registered", None)


def test_sigterm_ends_the_service_with_code_0_and_a_last_line(
    process: subprocess.Popen[bytes], trail: Any
) -> None:
    process.terminate()

    assert process.wait(timeout=30) == 0
    assert trail.lines()[-1]["what"] == "stopped"


def wire_event(number: int) -> bytes:
    """An event as a program in another language would publish it."""
    event = {
        "specversion": "1.0",
        "id": f"0a1b2c3d4e5f-{number}",
        "source": "accounts",
        "type": "user_left",
        "time": msgpack.Timestamp.from_unix_nano(time.time_ns()),
        "data": {"user_id": number},
        "seq": number,
    }
    packed: bytes = msgpack.packb(event)
    return packed
