"""Tests of the testing kit with streams: sent events, delivered events and failures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from flask import Flask, current_app, g
from waiting import wait_until

from flask_eventbus import Bus, EventBus, PublishError, Reject, Retry, current_event, signals
from flask_eventbus.testing import Isolation, isolated
from flask_eventbus.typing import Via

Make = Callable[..., Bus]

#: A Redis that nobody should ever try to reach.
NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def eventbus() -> Iterator[Isolation]:
    """The fixture of the plug-in, wherever the project is not installed."""
    with isolated() as isolation:
        yield isolation


def failure(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        call(*args, **kwargs)

    return str(caught.value)


# -- what was published -------------------------------------------------------------------


def test_events_of_streams_are_published_like_those_of_channels(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, "accounts", publish={"user_registered": "stream"})

    bus.signal("user_registered").send(None, user_id=7, tags=("new",))

    [event] = eventbus.assert_published("user_registered", user_id=7)
    assert event.payload == {"user_id": 7, "tags": ["new"]}
    assert (event.source, event.via, event.attempt) == ("accounts", "stream", 1)


def test_assertions_can_require_channel_or_stream(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, publish={"order_paid": "stream", "price_changed": "channel"})
    bus.signal("order_paid").send(None, n=1)
    bus.signal("price_changed").send(None, n=2)

    eventbus.assert_published("order_paid", via="stream", n=1)
    eventbus.assert_published("price_changed", via="channel")
    eventbus.assert_not_published("price_changed", via="stream")
    eventbus.assert_not_published(via="channel", n=1)
    assert [event.name for event in eventbus.published(via="stream")] == ["order_paid"]
    assert [event.name for event in eventbus.published(via="channel")] == ["price_changed"]


def test_a_failed_assertion_says_that_an_event_used_the_other_transport(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, "shop", publish={"order_paid": "channel"})
    bus.signal("order_paid").send(None, n=1)

    assert failure(eventbus.assert_published, "order_paid", via="stream", n=1).splitlines() == [
        "'order_paid' via 'stream' with n=1 was not published. Published events, nearest first:",
        "  order_paid(n=1) from 'shop': it went via 'channel'",
    ]


def test_channel_and_stream_events_are_recorded_in_send_order(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, publish={"a_*": "stream", "b": "stream", "c": "channel"})

    for n in range(100):
        for name in ("a_1", "c", "b", "a_2"):
            bus.signal(name).send(None, n=n)

    sent = [(event.payload["n"], event.name) for event in eventbus.published()]
    assert sent == [(n, name) for n in range(100) for name in ("a_1", "c", "b", "a_2")]


def test_stream_events_of_every_prefix_and_service_are_recorded(
    make_bus: Make, eventbus: Isolation
) -> None:
    one = make_bus(NOWHERE, "one", prefix="p:q", publish={"tick": "stream"})
    two = make_bus(NOWHERE, "two", publish={"tick": "stream"})

    one.signal("tick").send(None)
    two.signal("tick").send(None)

    assert [event.source for event in eventbus.published("tick")] == ["one", "two"]


def test_each_event_is_recorded_once(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, publish={"tick": "stream"})

    for n in range(3):
        bus.signal("tick").send(None, n=n)
        assert [event.payload["n"] for event in eventbus.published()] == list(range(n + 1))

    eventbus.clear()
    assert eventbus.published() == []


def test_required_replicas_are_simulated(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, replicas=2, on_outage="raise", publish={"tick": "stream"})

    bus.signal("tick").send(None)

    eventbus.assert_published("tick", via="stream")


def test_a_stream_with_the_policy_raise_raises_while_redis_is_away(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, on_outage="raise", publish={"tick": "stream"})

    with eventbus.redis_away(), pytest.raises(PublishError):
        bus.signal("tick").send(None, n=1)

    bus.signal("tick").send(None, n=2)
    assert [event.payload["n"] for event in eventbus.published()] == [2]


def test_a_stream_that_is_buffered_is_published_when_redis_is_back(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, publish={"tick": "stream"})

    with eventbus.redis_away():
        bus.signal("tick").send(None, n=1)
        eventbus.assert_not_published()

    eventbus.assert_published("tick", times=1, via="stream", n=1)


# -- what is delivered --------------------------------------------------------------------


def test_a_delivered_stream_event_has_via_stream(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, "mailer")
    seen: list[Any] = []
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    @bus.on("user_registered")
    def welcome(sender: str, **payload: Any) -> None:
        event = current_event
        seen.append((sender, event.via, event.attempt, event.id, event.time, payload))

    event = eventbus.deliver(
        "user_registered", via="stream", source="accounts", id="x-7", time=moment, pair=(1, 2)
    )

    assert seen == [("accounts", "stream", 1, "x-7", moment, {"pair": [1, 2]})]
    assert event.via == "stream"
    eventbus.assert_not_published()


def test_an_error_of_a_stream_receiver_is_raised_in_the_test(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE)
    calls = []
    failing = ValueError("no such user")

    @bus.on("tick")
    def fail(sender: str) -> None:
        raise failing

    bus.on("tick")(lambda sender: calls.append(current_event.attempt))

    with pytest.raises(ValueError, match="no such user") as caught:
        eventbus.deliver("tick", via="stream")

    assert caught.value is failing
    assert calls == [1]
    assert eventbus.run_retries() == 0
    assert (eventbus.failures, eventbus.dead_letters) == ([], [])


@pytest.mark.parametrize("error", [Reject("no"), Retry(after=60)], ids=["Reject", "Retry"])
def test_retry_and_reject_of_a_receiver_are_raised_in_the_test(
    make_bus: Make, eventbus: Isolation, error: Exception
) -> None:
    bus = make_bus(NOWHERE)

    @bus.on("tick")
    def wish(sender: str) -> None:
        raise error

    with pytest.raises(type(error)):
        eventbus.deliver("tick", via="stream")


def test_one_process_of_a_service_gets_a_stream_event(make_bus: Make, eventbus: Isolation) -> None:
    received = []

    for service in ("mailer", "mailer", "audit"):
        bus = make_bus(NOWHERE, service)
        bus.on("tick")(lambda sender, service=service: received.append(service))

    eventbus.deliver("tick", via="stream")
    assert sorted(received) == ["audit", "mailer"]

    received.clear()
    eventbus.deliver("tick", via="channel")
    assert sorted(received) == ["audit", "mailer", "mailer"]


def test_the_newest_of_two_apps_of_a_service_gets_a_stream_event(eventbus: Isolation) -> None:
    received = []
    bus = EventBus()
    bus.on("tick")(lambda sender: received.append(current_app.name))
    apps = [Flask(f"app{n}") for n in range(5)]

    for app in apps:
        app.config.from_mapping(EVENTBUS_SERVICE="mailer", EVENTBUS_URL=NOWHERE)
        bus.init_app(app)

    eventbus.deliver("tick", via="stream")

    assert received == ["app4"]


def test_without_a_group_every_process_gets_a_stream_event(
    make_bus: Make, eventbus: Isolation
) -> None:
    received = []

    for number in range(3):
        bus = make_bus(NOWHERE, "cache", subscribe={"tick": {"group": None}})
        bus.on("tick")(lambda sender, number=number: received.append(number))

    eventbus.deliver("tick", via="stream")

    assert sorted(received) == [0, 1, 2]


def test_a_pattern_receives_stream_events_too(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    received = []
    bus.on("order_*")(lambda sender: received.append(current_event.name))

    eventbus.deliver("order_paid", via="stream")

    assert received == ["order_paid"]


@pytest.mark.parametrize(("asked", "other"), [("stream", "channel"), ("channel", "stream")])
def test_a_subscription_to_one_transport_receives_nothing_of_the_other(
    make_bus: Make, eventbus: Isolation, asked: Via, other: Via
) -> None:
    bus = make_bus(NOWHERE, "mailer", subscribe={"tick": {"via": asked}})
    received = []
    bus.on("tick")(lambda sender: received.append(current_event.via))

    assert failure(eventbus.deliver, "tick", via=other) == (
        "Nothing here receives 'tick' from 'elsewhere'. 'mailer' subscribes to it only via "
        f"'{asked}': pass via='{asked}'."
    )
    eventbus.deliver("tick", via=asked)
    assert received == [asked]


@pytest.mark.parametrize(
    ("subscription", "expected"),
    [({}, "channel"), ({"via": "channel"}, "channel"), ({"via": "stream"}, "stream")],
    ids=["both", "channel", "stream"],
)
def test_by_default_an_event_is_delivered_over_the_subscribed_transport(
    make_bus: Make, eventbus: Isolation, subscription: dict[str, Any], expected: str
) -> None:
    bus = make_bus(NOWHERE, subscribe={"tick": subscription})
    received = []
    bus.on("tick")(lambda sender: received.append(current_event.via))

    event = eventbus.deliver("tick")

    assert received == [expected]
    assert event.via == expected


def test_a_delivery_with_retry_comes_over_a_stream_by_default(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE)
    seen = []
    bus.on("tick")(lambda sender: seen.append(current_event.via))

    eventbus.deliver("tick", retry=True)

    assert seen == ["stream"]


def test_a_service_does_not_get_its_own_events_from_a_stream(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, "mailer", subscribe={"tock": {"echo": True}})
    received = []
    bus.on("tick")(lambda sender: received.append("tick"))
    bus.on("tock")(lambda sender: received.append("tock"))

    said = failure(eventbus.deliver, "tick", via="stream", source="mailer")
    eventbus.deliver("tock", via="stream", source="mailer")

    assert "'mailer' ignores its own events" in said
    assert received == ["tock"]


def test_a_service_in_a_cluster_gets_nothing_from_streams(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus("redis+cluster://127.0.0.1:1", "mailer")
    bus.on("tick")(lambda sender: None)

    assert "'mailer' reads no streams" in failure(eventbus.deliver, "tick", via="stream")


def test_an_id_that_comes_twice_is_delivered_twice(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    seen = []
    bus.on("tick")(lambda sender: seen.append((current_event.id, current_event.attempt)))

    for _ in range(2):
        eventbus.deliver("tick", via="stream", id="clock-1")

    assert seen == [("clock-1", 1), ("clock-1", 1)]


def test_streams_can_be_delivered_while_redis_is_away(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    attempts = []

    @bus.on("tick", retries=1)
    def fail(sender: str) -> None:
        attempts.append(current_event.attempt)
        raise ValueError

    with eventbus.redis_away():
        eventbus.deliver("tick", via="stream", retry=True)
        eventbus.run_retries()
        assert [letter.reason for letter in eventbus.dead_letters] == ["retries"]

    assert attempts == [1, 2]


# -- what is tried again ------------------------------------------------------------------


def test_only_the_failed_receiver_is_retried(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, "mailer")
    calls: list[tuple[str, int]] = []

    @bus.on("user_registered")
    def welcome(sender: str, user_id: int) -> None:
        calls.append(("welcome", current_event.attempt))

        if current_event.attempt < 3:
            raise ConnectionError("the mail server is away")

    @bus.on("user_registered")
    def count(sender: str, user_id: int) -> None:
        calls.append(("count", current_event.attempt))

    eventbus.deliver("user_registered", via="stream", retry=True, user_id=7)
    assert sorted(calls) == [("count", 1), ("welcome", 1)]

    assert eventbus.run_retries() == 2
    assert sorted(calls) == [("count", 1), ("welcome", 1), ("welcome", 2), ("welcome", 3)]
    assert eventbus.dead_letters == []


def test_failures_list_the_error_and_the_next_attempt(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, "mailer")
    failing = ConnectionError("the mail server is away")

    @bus.on("user_registered", retries=1)
    def welcome(sender: str, user_id: int) -> None:
        raise failing

    event = eventbus.deliver("user_registered", via="stream", retry=True, user_id=7)

    [failed] = eventbus.failures
    assert (failed.service, failed.attempt, failed.after) == ("mailer", 1, 1.0)
    assert failed.receiver.endswith(".welcome")
    assert failed.error is failing
    assert failed.event == event

    eventbus.run_retries()
    assert [(found.attempt, found.after) for found in eventbus.failures] == [(1, 1.0), (2, None)]


def test_dead_letters_list_the_events_that_were_given_up(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, "mailer", retries=2)

    @bus.on("user_registered")
    def welcome(sender: str, user_id: int) -> None:
        raise ValueError("no such user")

    event = eventbus.deliver("user_registered", via="stream", retry=True, user_id=7)
    assert eventbus.dead_letters == []
    assert eventbus.run_retries() == 2

    [letter] = eventbus.dead_letters
    assert (letter.service, letter.reason, letter.attempts) == ("mailer", "retries", 3)
    assert letter.receiver.endswith(".welcome")
    assert letter.error == "ValueError: no such user"
    assert letter.event is not None
    assert (letter.event.id, letter.event.payload, letter.event.attempt) == (
        event.id,
        {"user_id": 7},
        3,
    )


def test_time_passes_only_through_advance(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    attempts = []

    @bus.on("tick")
    def fail(sender: str) -> None:
        attempts.append(current_event.attempt)
        raise ValueError

    began = time.monotonic()
    eventbus.deliver("tick", via="stream", retry=True)
    assert eventbus.advance(0) == 0
    assert eventbus.advance(0.999) == 0
    assert eventbus.advance(0.001) == 1
    assert eventbus.advance(1.9) == 0
    assert eventbus.advance(0.1) == 1
    # After 4 and 8 seconds, at once.
    assert eventbus.advance(12) == 2
    assert eventbus.advance(16) == 1
    assert eventbus.advance(1_000_000) == 0

    assert attempts == [1, 2, 3, 4, 5, 6]
    assert [found.after for found in eventbus.failures] == [1, 2, 4, 8, 16, None]
    assert time.monotonic() - began < 16


def test_a_retry_is_due_when_the_parts_of_its_delay_have_passed(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE)

    @bus.on("tick")
    def fail(sender: str) -> None:
        if current_event.attempt == 1:
            raise Retry(after=1.0)

    eventbus.deliver("tick", via="stream", retry=True)

    # Floats that count from 1970 add up to less than a second.
    assert [eventbus.advance(0.05) for _ in range(20)] == [0] * 19 + [1]
    assert eventbus.failures[0].after == 1.0


def test_the_delay_between_attempts_is_bounded(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, retries=20)

    @bus.on("tick")
    def fail(sender: str) -> None:
        raise ValueError

    eventbus.deliver("tick", via="stream", retry=True)
    assert eventbus.run_retries() == 20

    waits = [found.after for found in eventbus.failures][:-1]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256] + [300] * 11


def test_the_earliest_due_retry_runs_first(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    order = []

    @bus.on("tick")
    def late(sender: str, n: int, after: float) -> None:
        order.append(n)

        if current_event.attempt == 1:
            raise Retry(after=after)

    for n, after in enumerate((30, 10, 20, 10)):
        eventbus.deliver("tick", via="stream", retry=True, n=n, after=after)

    eventbus.advance(60)

    assert order == [0, 1, 2, 3, 1, 3, 2, 0]


def test_a_requested_retry_sets_its_delay(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    attempts = []

    @bus.on("tick")
    def busy(sender: str) -> None:
        attempts.append(current_event.attempt)

        if current_event.attempt == 1:
            raise Retry("not before tomorrow", after=86_400)

    eventbus.deliver("tick", via="stream", retry=True)

    assert eventbus.advance(86_399) == 0
    assert eventbus.advance(1) == 1
    assert attempts == [1, 2]
    assert [found.after for found in eventbus.failures] == [86_400]


def test_a_rejected_event_is_a_dead_letter_at_once(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)

    @bus.on("tick")
    def refuse(sender: str) -> None:
        raise Reject("no such user")

    eventbus.deliver("tick", via="stream", retry=True)

    [letter] = eventbus.dead_letters
    assert (letter.reason, letter.attempts) == ("rejected", 1)
    assert letter.error == "Reject: no such user"
    assert [found.after for found in eventbus.failures] == [None]
    assert eventbus.run_retries() == 0


@pytest.mark.parametrize(
    ("setting", "subscription", "receiver", "expected"),
    [
        (3, None, None, 3),
        (3, None, 1, 1),
        (3, 2, 1, 2),
        (3, 0, 1, 0),
        (3, None, 0, 0),
    ],
    ids=["setting", "receiver", "subscription", "subscription-zero", "receiver-zero"],
)
def test_retries_are_those_that_a_worker_would_make(
    make_bus: Make,
    eventbus: Isolation,
    setting: int,
    subscription: int | None,
    receiver: int | None,
    expected: int,
) -> None:
    options = {} if subscription is None else {"retries": subscription}
    bus = make_bus(NOWHERE, retries=setting, subscribe={"tick": options})

    @bus.on("tick", retries=receiver)
    def fail(sender: str) -> None:
        raise ValueError

    eventbus.deliver("tick", via="stream", retry=True)

    assert eventbus.run_retries() == expected
    assert [letter.attempts for letter in eventbus.dead_letters] == [expected + 1]


def test_receivers_of_a_pattern_have_their_own_number_of_retries(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE)

    @bus.on("order_*", retries=1)
    def fail(sender: str) -> None:
        raise ValueError

    eventbus.deliver("order_paid", via="stream", retry=True)

    assert eventbus.run_retries() == 1


def test_each_attempt_gets_the_original_payload(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    seen = []

    @bus.on("tick", retries=2)
    def spoil(sender: str, tags: list[str]) -> None:
        seen.append(list(tags))
        tags.append("spoilt")
        raise ValueError

    eventbus.deliver("tick", via="stream", retry=True, tags=("new",))
    eventbus.run_retries()

    assert seen == [["new"]] * 3


def test_each_attempt_runs_in_a_new_app_context(eventbus: Isolation) -> None:
    bus = EventBus()
    app = Flask("mailer")
    app.config.from_mapping(EVENTBUS_SERVICE="mailer", EVENTBUS_URL=NOWHERE)
    bus.init_app(app)
    seen: list[Any] = []

    @bus.on("tick")
    async def receive(sender: str) -> None:
        await asyncio.sleep(0)
        seen.append((current_app.name, g.get("attempt"), current_event.attempt))
        g.attempt = current_event.attempt

        if current_event.attempt < 3:
            raise ValueError

    eventbus.deliver("tick", via="stream", retry=True)
    eventbus.run_retries()

    assert seen == [("mailer", None, 1), ("mailer", None, 2), ("mailer", None, 3)]


def test_each_service_retries_its_own_receivers(make_bus: Make, eventbus: Isolation) -> None:
    calls = []

    def fail(sender: str) -> None:
        calls.append(current_event.attempt)
        raise ValueError

    for service, retries_of in (("one", 1), ("two", 2)):
        bus = make_bus(NOWHERE, service, retries=retries_of)
        bus.on("tick")(fail)

    eventbus.deliver("tick", via="stream", retry=True)
    eventbus.run_retries()

    assert sorted(calls) == [1, 1, 2, 2, 3]
    given_up = {letter.service: letter.attempts for letter in eventbus.dead_letters}
    assert given_up == {"one": 2, "two": 3}


def test_without_a_group_nothing_is_retried(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, subscribe={"tick": {"group": None}})

    @bus.on("tick")
    def fail(sender: str) -> None:
        raise ValueError

    eventbus.deliver("tick", via="stream", retry=True)

    assert [found.after for found in eventbus.failures] == [None]
    assert eventbus.run_retries() == 0
    assert eventbus.dead_letters == []


def test_a_dead_letter_is_signalled(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, "mailer")
    reported: list[Any] = []

    @bus.on("tick")
    def refuse(sender: str) -> None:
        raise Reject("no")

    def alert(sender: str, **facts: Any) -> None:
        reported.append((sender, facts))

    with signals.event_dead_lettered.connected_to(alert):
        event = eventbus.deliver("tick", via="stream", retry=True)

    [(sender, facts)] = reported
    assert sender == "mailer"
    assert facts["name"] == "tick"
    assert facts["reason"] == "rejected"
    assert facts["event_id"] == event.id
    assert facts["error"] == "Reject: no"


def test_events_sent_by_a_retry_are_recorded(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, "shop", publish={"order_shipped": "stream"})

    @bus.on("order_paid")
    def ship(sender: str) -> None:
        if current_event.attempt == 1:
            raise ValueError

        bus.signal("order_shipped").send(None, attempt=current_event.attempt)

    paid = eventbus.deliver("order_paid", via="stream", retry=True)
    eventbus.assert_not_published()
    eventbus.advance(1)

    [shipped] = eventbus.assert_published("order_shipped", via="stream", attempt=2)
    assert shipped.causation_id == paid.id


def test_a_retry_of_a_deleted_receiver_becomes_a_dead_letter_after_an_hour(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE)
    signal = bus.signal("tick")

    @bus.on("tick")
    def fail(sender: str) -> None:
        raise ValueError

    eventbus.deliver("tick", via="stream", retry=True)
    signal.disconnect(fail)

    assert eventbus.advance(3_600) == 0
    assert eventbus.dead_letters == []
    assert eventbus.run_retries() == 0
    [letter] = eventbus.dead_letters
    assert (letter.reason, letter.attempts) == ("gone", 1)


def test_a_retry_waits_for_a_process_that_has_its_receiver(
    make_bus: Make, eventbus: Isolation
) -> None:
    calls = []

    def fail(sender: str) -> None:
        calls.append(current_event.attempt)

        if current_event.attempt == 1:
            raise ValueError

    before = make_bus(NOWHERE, "mailer")
    before.on("tick")(fail)
    eventbus.deliver("tick", via="stream", retry=True)
    before.signal("tick").disconnect(fail)

    assert eventbus.advance(1) == 0
    after = make_bus(NOWHERE, "mailer")
    after.on("tick")(fail)
    assert eventbus.run_retries() == 1
    assert calls == [1, 2]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("Ctrl-C"), pytest.fail.Exception("here")], ids=["ctrl-c", "fail"]
)
def test_an_interrupt_or_a_failed_assertion_in_a_retry_reaches_the_test(
    make_bus: Make, eventbus: Isolation, error: BaseException
) -> None:
    bus = make_bus(NOWHERE)

    @bus.on("tick")
    def interrupt(sender: str) -> None:
        raise ValueError if current_event.attempt == 1 else error

    eventbus.deliver("tick", via="stream", retry=True)

    with pytest.raises(type(error)):
        eventbus.advance(1)

    assert len(eventbus.failures) == 1


def test_an_exit_in_a_receiver_counts_as_a_failure(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)

    @bus.on("tick", retries=0)
    def leave(sender: str) -> None:
        raise SystemExit(3)

    eventbus.deliver("tick", via="stream", retry=True)

    assert [letter.error for letter in eventbus.dead_letters] == ["SystemExit: 3"]


def test_an_error_that_ends_the_context_is_raised(eventbus: Isolation) -> None:
    bus = EventBus()
    app = Flask("mailer")
    app.config.from_mapping(EVENTBUS_SERVICE="mailer", EVENTBUS_URL=NOWHERE)
    bus.init_app(app)
    bus.on("tick")(lambda sender: None)

    @app.teardown_appcontext
    def tear_down(error: BaseException | None) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        eventbus.deliver("tick", via="stream", retry=True)

    assert eventbus.run_retries() == 0


def test_clear_forgets_failures_but_not_pending_retries(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, retries=1)

    @bus.on("tick")
    def fail(sender: str, n: int) -> None:
        raise ValueError(n)

    eventbus.deliver("tick", via="stream", retry=True, n=1)
    eventbus.run_retries()
    eventbus.deliver("tick", via="stream", retry=True, n=2)
    eventbus.clear()

    assert (eventbus.failures, eventbus.dead_letters) == ([], [])
    assert eventbus.run_retries() == 1
    assert [letter.error for letter in eventbus.dead_letters] == ["ValueError: 2"]


# -- what is asked for wrongly ------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"via": "email"}, r"deliver\(\) got via='email'"),
        ({"via": "email"}, r"in payload=\{\.\.\.\}"),
        ({"via": "channel", "retry": True}, "only events of a stream are retried"),
        ({"via": "stream", "retry": 3}, r"retry=3\) is neither True nor False"),
    ],
    ids=["via", "via-payload", "retry-channel", "retry-number"],
)
def test_an_impossible_delivery_is_refused(
    make_bus: Make, eventbus: Isolation, wrong: dict[str, Any], words: str
) -> None:
    bus = make_bus(NOWHERE)
    bus.on("tick")(lambda sender, **payload: None)

    with pytest.raises(TypeError, match=words):
        eventbus.deliver("tick", **wrong)


def test_an_unknown_via_is_refused_in_assertions(eventbus: Isolation) -> None:
    with pytest.raises(TypeError, match=r"assert_published\(\) got via='email'"):
        eventbus.assert_published("tick", via="email")  # type: ignore[arg-type]  # which is the point

    with pytest.raises(TypeError, match=r"published\(\) got via='streams'"):
        eventbus.published(via="streams")  # type: ignore[arg-type]  # which is the point


def test_payload_keys_named_like_parameters_go_through_payload(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, publish={"tock": "stream"})
    payloads = []
    bus.on("tick")(lambda sender, **payload: payloads.append(payload))

    eventbus.deliver("tick", via="stream", payload={"via": "email", "retry": 3})
    bus.signal("tock").send(None, via="email")

    assert payloads == [{"via": "email", "retry": 3}]
    eventbus.assert_published("tock", via="stream", payload={"via": "email"})


def test_advance_refuses_a_negative_time(eventbus: Isolation) -> None:
    with pytest.raises(ValueError, match="goes back in time"):
        eventbus.advance(-1)


# -- buses that listen --------------------------------------------------------------------


def test_buses_talk_over_a_stream_in_memory(make_bus: Make, eventbus: Isolation) -> None:
    received: list[Any] = []
    mailer = make_bus(NOWHERE, "mailer")
    mailer.on("tick")(lambda sender, n: received.append((sender, n, current_event.via)))
    mailer.start()
    assert mailer.ready(5)
    clock = make_bus(NOWHERE, "clock", publish={"tick": "stream"})

    clock.signal("tick").send(None, n=1)

    wait_until(lambda: received, what="it is received")
    assert received == [("clock", 1, "stream")]
    eventbus.assert_published("tick", via="stream", times=1, n=1)


def test_a_service_that_was_down_gets_missed_events(make_bus: Make, eventbus: Isolation) -> None:
    received: list[int] = []
    mailer = make_bus(NOWHERE, "mailer")
    mailer.on("tick")(lambda sender, n: received.append(n))
    mailer.start()
    assert mailer.ready(5)
    mailer.stop()
    clock = make_bus(NOWHERE, "clock", publish={"tick": "stream"})
    clock.signal("tick").send(None, n=1)

    mailer.start()

    wait_until(lambda: received == [1], what="it is received after all")


@pytest.mark.parametrize(
    "subscription", [{}, {"via": "stream"}, {"group": None}], ids=["both", "stream", "no-group"]
)
def test_a_bus_that_reads_streams_stops_at_once(
    make_bus: Make, subscription: dict[str, Any]
) -> None:
    with isolated():
        bus = make_bus(NOWHERE, subscribe={"tick": subscription})
        bus.on("tick")(lambda sender: None)

        took = []

        for _ in range(3):
            bus.start()
            assert bus.ready(5)
            began = time.monotonic()
            bus.stop()
            took.append(time.monotonic() - began)

        # Of three, so that a machine that is busy for a moment is not taken for the bus.
        assert min(took) < 0.5


def test_streams_leave_nothing_behind(make_bus: Make) -> None:
    threads = set(threading.enumerate())

    with isolated() as eventbus:
        mailer = make_bus(NOWHERE, "mailer", subscribe={"tock": {"group": None}})
        mailer.on("tick")(lambda sender: None)
        mailer.on("tock")(lambda sender: None)
        mailer.start()
        assert mailer.ready(5)
        clock = make_bus(NOWHERE, "clock", publish={"t*": "stream"})
        clock.signal("tick").send(None)
        clock.signal("tock").send(None)
        eventbus.assert_published("t*", times=2)

    assert set(threading.enumerate()) <= threads


def test_dead_letters_of_a_listening_bus_are_recorded_too(
    make_bus: Make, eventbus: Isolation
) -> None:
    mailer = make_bus(NOWHERE, "mailer")

    @mailer.on("tick", retries=0)
    def fail(sender: str, n: int) -> None:
        raise ValueError(n)

    mailer.start()
    assert mailer.ready(5)
    clock = make_bus(NOWHERE, "clock", publish={"tick": "stream"})
    clock.signal("tick").send(None, n=7)

    [letter] = wait_until(lambda: eventbus.dead_letters, what="it is given up")
    assert (letter.service, letter.reason, letter.attempts) == ("mailer", "retries", 1)
    assert letter.error == "ValueError: 7"
    assert letter.event is not None
    assert letter.event.payload == {"n": 7}
    assert len(eventbus.dead_letters) == 1

    eventbus.clear()
    assert eventbus.dead_letters == []


@pytest.mark.timing(first_retry=0.01)
def test_the_testing_kit_and_a_worker_treat_failures_alike(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE, "mailer", retries=3, subscribe={"tock": {"retries": 1}})
    seen: list[Any] = []

    def note(receiver: str) -> None:
        seen.append((receiver, current_event.name, current_event.attempt))

    @bus.on("t?ck")
    def fail(sender: str, why: str) -> None:
        note("fail")
        raise ValueError(why)

    @bus.on("tick", retries=2)
    def wait(sender: str, why: str) -> None:
        note("wait")
        raise Retry(why, after=0.01)

    @bus.on("tick")
    def refuse(sender: str, why: str) -> None:
        note("refuse")
        raise Reject(why)

    @bus.on("tick")
    def recover(sender: str, why: str) -> None:
        note("recover")

        if current_event.attempt == 1:
            raise KeyError(why)

    def outcome() -> tuple[list[Any], list[Any]]:
        letters = [
            (found.service, found.receiver, found.reason, found.attempts, found.error)
            for found in eventbus.dead_letters
        ]
        return sorted(letters), sorted(seen)

    eventbus.deliver("tick", via="stream", retry=True, why="tick")
    eventbus.deliver("tock", via="stream", retry=True, why="tock")
    eventbus.run_retries()
    of_the_kit = outcome()
    eventbus.clear()
    seen.clear()
    bus.start()
    assert bus.ready(5)
    clock = make_bus(NOWHERE, "clock", publish={"t*": "stream"})
    clock.signal("tick").send(None, why="tick")
    clock.signal("tock").send(None, why="tock")

    wait_until(lambda: outcome() == of_the_kit, what="the worker did the same")
    assert len(of_the_kit[0]) == 4
