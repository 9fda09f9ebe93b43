"""The kit with which users test their services: what left them, and what comes in."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import socket
import subprocess
import sys
import threading
import unittest
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import blinker
import pytest
from flask import Flask, current_app, g, request_finished
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import (
    Bus,
    ConfigError,
    EventBus,
    PayloadError,
    PublishError,
    ReceiverError,
    current_event,
)
from flask_eventbus.testing import Isolation, isolated
from flask_eventbus.testing.recorder import Recording
from flask_eventbus.transport import connection, connections
from flask_eventbus.transport.connections import Connections
from flask_eventbus.transport.pipe import Pipe

#: Where the project is installed, pytest has the plug-in by its entry point.
INSTALLED = bool(entry_points(group="pytest11", name="flask_eventbus"))
pytest_plugins = ["pytester"] if INSTALLED else ["pytester", "flask_eventbus.pytest_plugin"]

Make = Callable[..., Bus]
MakeApp = Callable[..., Flask]

#: A Redis that nobody should ever try to reach.
NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def make_app() -> Iterator[MakeApp]:
    """Make apps that have a bus of their own, or the one that is given."""

    def make(service: str = "accounts", bus: EventBus | None = None, **settings: object) -> Flask:
        app = Flask(service)
        app.config["EVENTBUS_SERVICE"] = service
        app.config["EVENTBUS_URL"] = NOWHERE
        app.config.update({f"EVENTBUS_{key.upper()}": value for key, value in settings.items()})
        (EventBus() if bus is None else bus).init_app(app)
        return app

    yield make
    gc.collect()


@pytest.fixture
def accounts(make_app: MakeApp) -> Flask:
    """A service that publishes, made before the test is isolated."""
    return make_app("accounts", publish=["user_registered", "user_left", "price_changed"])


def send(app: Flask, name: str, /, **payload: Any) -> None:
    app.signal(name).send(app, **payload)  # type: ignore[attr-defined]  # the extension's


# -- what was published -------------------------------------------------------------------


def test_events_sent_in_a_test_are_recorded(accounts: Flask, eventbus: Isolation) -> None:
    @accounts.post("/register")
    def register() -> tuple[str, int]:
        send(accounts, "user_registered", user_id=7, email="ada@example.com")
        return "", 201

    accounts.test_client().post("/register")

    eventbus.assert_published("user_registered", user_id=7)
    [event] = eventbus.published("user_registered")
    assert event.payload == {"user_id": 7, "email": "ada@example.com"}
    assert event.source == "accounts"
    assert event.time.tzinfo is UTC


def test_an_assertion_returns_the_matching_events(accounts: Flask, eventbus: Isolation) -> None:
    for number in range(3):
        send(accounts, "user_registered", user_id=number, plan="free" if number else "paid")

    found = eventbus.assert_published("user_registered", plan="free")

    assert [event.payload["user_id"] for event in found] == [1, 2]


def test_published_events_are_in_send_order(accounts: Flask, eventbus: Isolation) -> None:
    for number in range(1000):
        send(accounts, "user_registered", user_id=number)

    sent = [event.payload["user_id"] for event in eventbus.published()]
    assert sent == list(range(1000))


@pytest.mark.parametrize("value", [None, 0, "", [], {}, False, 0.0])
def test_falsy_values_are_kept(accounts: Flask, eventbus: Isolation, value: object) -> None:
    send(accounts, "user_registered", user_id=value)

    eventbus.assert_published("user_registered", user_id=value)

    with pytest.raises(AssertionError, match=r"user_id is .*, not 7"):
        eventbus.assert_published("user_registered", user_id=7)


def test_expecting_none_does_not_match_an_absent_key(accounts: Flask, eventbus: Isolation) -> None:
    send(accounts, "user_registered", user_id=7)

    with pytest.raises(AssertionError, match="it has no 'email'"):
        eventbus.assert_published("user_registered", email=None)


def test_expected_values_are_compared_and_expected_functions_are_called(
    accounts: Flask, eventbus: Isolation
) -> None:
    send(accounts, "user_registered", user_id=7, score=0.1 + 0.2, email="ada@example.com")

    eventbus.assert_published("user_registered", user_id=ANY, score=pytest.approx(0.3))
    eventbus.assert_published("user_registered", email=lambda email: email.endswith(".com"))
    eventbus.assert_published("user_registered", email=str.islower)
    eventbus.assert_not_published("user_registered", email=lambda email: "@" not in email)


def test_exact_allows_no_other_keys(accounts: Flask, eventbus: Isolation) -> None:
    send(accounts, "user_registered", user_id=7, email="ada@example.com")

    eventbus.assert_published("user_registered", exact=True, user_id=7, email=ANY)

    with pytest.raises(AssertionError, match="it has 'email' as well"):
        eventbus.assert_published("user_registered", exact=True, user_id=7)


def test_times_counts(accounts: Flask, eventbus: Isolation) -> None:
    send(accounts, "user_registered", user_id=7)
    send(accounts, "user_registered", user_id=8)

    eventbus.assert_published("user_registered", times=2)
    eventbus.assert_published("user_registered", times=1, user_id=8)
    eventbus.assert_published("user_registered", times=0, user_id=9)

    with pytest.raises(AssertionError, match=r"'user_registered' was published 2 times, not 3"):
        eventbus.assert_published("user_registered", times=3)

    with pytest.raises(AssertionError, match="was published once, not 2 times"):
        eventbus.assert_published("user_registered", times=2, user_id=8)


def test_keys_named_like_parameters_are_matched_through_payload(
    accounts: Flask, eventbus: Isolation
) -> None:
    send(accounts, "user_registered", times=3, exact="no", name="Ada", payload=None)

    eventbus.assert_published(
        "user_registered", payload={"times": 3, "exact": "no", "payload": None}, name="Ada"
    )
    eventbus.assert_not_published("user_registered", payload={"times": 4})


def test_events_can_be_named_by_a_signal_or_a_pattern(accounts: Flask, eventbus: Isolation) -> None:
    signal = blinker.NamedSignal("user_left")
    send(accounts, "user_registered", user_id=7)
    send(accounts, "user_left", user_id=7)

    assert len(eventbus.published("user_*")) == 2
    eventbus.assert_published("user_*", times=2, user_id=7)
    eventbus.assert_published(signal)
    assert [event.name for event in eventbus.published(signal)] == ["user_left"]


def test_assert_not_published_fails_if_an_event_was_published(
    accounts: Flask, eventbus: Isolation
) -> None:
    eventbus.assert_not_published()
    eventbus.assert_not_published("user_registered")

    send(accounts, "user_registered", user_id=7)

    eventbus.assert_not_published("user_left")
    eventbus.assert_not_published("user_registered", user_id=8)

    with pytest.raises(AssertionError, match=r"published once, and should not be(.|\n)*user_id=7"):
        eventbus.assert_not_published("user_registered")

    with pytest.raises(AssertionError, match=r"'\*' was published once"):
        eventbus.assert_not_published()


def test_clear_forgets_published_events(accounts: Flask, eventbus: Isolation) -> None:
    send(accounts, "user_registered", user_id=7)
    eventbus.clear()
    send(accounts, "user_registered", user_id=8)

    assert [event.payload["user_id"] for event in eventbus.published()] == [8]


def test_recorded_payloads_are_encoded_and_decoded(accounts: Flask, eventbus: Isolation) -> None:
    moment = datetime(2026, 2, 3, 4, 5, 6, 7, tzinfo=UTC)
    tags = ["new"]
    send(accounts, "user_registered", pair=(1, 2), price=Decimal("1.50"), at=moment, tags=tags)
    tags.append("changed later")

    [event] = eventbus.published()
    assert event.payload == {
        "pair": [1, 2],
        "price": Decimal("1.50"),
        "at": moment,
        "tags": ["new"],
    }


def test_an_unsupported_payload_fails_in_the_test(accounts: Flask, eventbus: Isolation) -> None:
    with pytest.raises(PayloadError, match=r"payload\.user\.address: object"):
        send(accounts, "user_registered", user={"address": object()})

    eventbus.assert_not_published()


def test_only_routed_signals_are_recorded(accounts: Flask, eventbus: Isolation) -> None:
    send(accounts, "secret", key="s3cr3t")

    eventbus.assert_not_published()


def test_foreign_signals_are_recorded_as_their_routes_say(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    def summary(sender: Flask, response: Any, **extra: Any) -> dict[str, Any]:
        return {"service": sender.name, "status": response.status_code}

    bus = EventBus()
    app = make_app("catalog", bus=bus)
    bus.publishes(request_finished, as_="api_call", payload=summary)

    app.test_client().get("/nothing")

    eventbus.assert_published("api_call", exact=True, service="catalog", status=404)


def test_events_of_every_bus_are_recorded(
    accounts: Flask, make_app: MakeApp, make_bus: Make, eventbus: Isolation
) -> None:
    catalog = make_app("catalog", publish=["price_changed"], prefix="another:prefix")
    script = make_bus(NOWHERE, "script", publish=["report_ready"])

    send(accounts, "user_registered", user_id=7)
    send(catalog, "price_changed", sku="A1")
    script.signal("report_ready").send(None, rows=3)

    sources = {event.name: event.source for event in eventbus.published()}
    assert sources == {
        "user_registered": "accounts",
        "price_changed": "catalog",
        "report_ready": "script",
    }


def test_events_of_a_script_that_ends_in_the_test_are_recorded(eventbus: Isolation) -> None:
    def main() -> None:
        with Bus(NOWHERE, service="script", publish=["report_ready"]) as bus:
            bus.signal("report_ready").send(None, rows=3)

    main()

    eventbus.assert_published("report_ready", rows=3)


class Money:
    """A type that travels only where it is registered."""

    def __init__(self, cents: int) -> None:
        self.cents = cents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.cents == self.cents

    def __hash__(self) -> int:
        return hash(self.cents)


def test_registered_types_are_decoded_after_their_bus_is_gone(eventbus: Isolation) -> None:
    def main() -> None:
        with Bus(NOWHERE, service="script", publish=["paid"]) as bus:
            bus.register_type(
                40, Money, pack=lambda m: b"%d" % m.cents, unpack=lambda raw: Money(int(raw))
            )
            bus.signal("paid").send(None, amount=Money(250))

    main()
    gc.collect()

    eventbus.assert_published("paid", amount=Money(250))


def test_events_sent_by_threads_are_recorded(accounts: Flask, eventbus: Isolation) -> None:
    def work(worker: int) -> None:
        for number in range(50):
            send(accounts, "user_registered", user_id=worker * 50 + number)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    sent = sorted(event.payload["user_id"] for event in eventbus.published())
    assert sent == list(range(200))


# -- what a failure says ------------------------------------------------------------------


def failure(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        call(*args, **kwargs)

    return str(caught.value)


def test_a_failed_assertion_lists_published_events_best_match_first(
    accounts: Flask, eventbus: Isolation
) -> None:
    send(accounts, "price_changed", sku="A1")
    send(accounts, "user_registered", user_id=8, email="bob@example.com")
    send(accounts, "user_registered", user_id=8, email="ada@example.com")

    said = failure(eventbus.assert_published, "user_registered", user_id=7, email="ada@example.com")

    assert said.splitlines() == [
        "'user_registered' with user_id=7, email='ada@example.com' was not published. "
        "Published events, nearest first:",
        "  user_registered(user_id=8, email='ada@example.com') from 'accounts': "
        "user_id is 8, not 7",
        "  user_registered(user_id=8, email='bob@example.com') from 'accounts': "
        "user_id is 8, not 7, email is 'bob@example.com', not 'ada@example.com'",
        "  price_changed(sku='A1') from 'accounts'",
    ]


def test_the_message_of_a_failed_assertion_is_bounded(accounts: Flask, eventbus: Isolation) -> None:
    for _ in range(30):
        send(accounts, "user_registered", text="x" * 10_000)

    said = failure(eventbus.assert_published, "user_left")

    assert said.splitlines()[-1] == "  and 20 more"
    assert len(said) < 2_000


def test_a_misspelt_name_gets_a_suggestion(accounts: Flask, eventbus: Isolation) -> None:
    said = failure(eventbus.assert_published, "user_registerd")

    assert said == (
        "'user_registerd' was not published. No bus here publishes 'user_registerd'. "
        "Did you mean 'user_registered'? Nothing was published."
    )


def test_a_pattern_of_routes_does_not_hide_a_misspelt_name(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    app = make_app("accounts", publish=["user_*"])
    send(app, "user_registered", user_id=7)
    eventbus.clear()

    said = failure(eventbus.assert_published, "user_registerd")

    assert "Did you mean 'user_registered'?" in said
    assert "No bus" not in failure(eventbus.assert_published, "user_*", user_id=8)


def test_a_failed_assertion_distinguishes_a_missing_route_from_a_missing_send(
    accounts: Flask, eventbus: Isolation
) -> None:
    assert "No bus here publishes 'zzz'. Known are: price_changed, user_left" in failure(
        eventbus.assert_published, "zzz"
    )
    assert failure(eventbus.assert_published, "user_left") == (
        "'user_left' was not published. Nothing was published."
    )


def test_a_failed_assertion_says_that_no_bus_publishes(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    assert "There is no bus in this process" in failure(eventbus.assert_published, "user_left")

    app = make_app("accounts")
    assert "Name it in 'EVENTBUS_PUBLISH'." in failure(eventbus.assert_published, "user_left")
    del app


def test_a_failed_assertion_says_that_a_bus_is_disabled(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    app = make_app("accounts", publish=["user_registered"], enabled=False)
    send(app, "user_registered", user_id=7)

    said = failure(eventbus.assert_published, "user_registered", user_id=7)

    assert "'EVENTBUS_ENABLED' is False for 'accounts'." in said


# -- what is delivered --------------------------------------------------------------------


def test_receivers_have_run_when_deliver_returns(make_app: MakeApp, eventbus: Isolation) -> None:
    bus = EventBus()
    app = make_app("mailer", bus=bus)
    calls: list[Any] = []

    @bus.on("user_registered")
    def welcome(sender: str, user_id: int, email: str) -> None:
        calls.append((sender, user_id, email, current_event.id, current_app.name))

    event = eventbus.deliver(
        "user_registered", user_id=7, email="ada@example.com", source="accounts"
    )

    assert calls == [("accounts", 7, "ada@example.com", event.id, app.name)]
    assert not current_event


def test_a_receiver_sees_the_whole_event(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    seen: list[Any] = []
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    @bus.on("order_paid")
    def receive(sender: str, **payload: Any) -> None:
        event = current_event
        seen.append((sender, event.time, event.id, event.source, event.correlation_id))
        seen.append((event.causation_id, event.hops, event.traceparent, dict(payload)))

    eventbus.deliver(
        "order_paid",
        source="shop",
        id="shop-77",
        time=moment,
        correlation_id="shop-1",
        causation_id="shop-2",
        hops=2,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        amount=Decimal("9.90"),
    )

    assert seen == [
        ("shop", moment, "shop-77", "shop", "shop-1"),
        (
            "shop-2",
            2,
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            {"amount": Decimal("9.90")},
        ),
    ]


def test_events_get_different_ids(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    ids = []

    @bus.on("tick")
    def receive(sender: str) -> None:
        ids.append(current_event.id)

    eventbus.deliver("tick")
    eventbus.deliver("tick")

    assert len(set(ids)) == 2


def test_payload_keys_that_are_parameters_are_delivered_by_payload(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE)
    payloads = []

    @bus.on("measured")
    def receive(sender: str, **payload: Any) -> None:
        payloads.append(payload)

    eventbus.deliver("measured", payload={"source": 1, "time": "noon", "id": 7}, name="probe")

    assert payloads == [{"source": 1, "time": "noon", "id": 7, "name": "probe"}]


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": 7},
        {"id": "seven"},
        {"time": "noon"},
        {"time": datetime(2026, 1, 1)},
        {"hops": "two"},
        {"hops": -1},
        {"correlation_id": 1.5},
        {"traceparent": 9},
        {"source": 3},
    ],
    ids=str,
)
def test_a_misplaced_event_attribute_in_deliver_is_explained(
    make_bus: Make, eventbus: Isolation, wrong: dict[str, Any]
) -> None:
    bus = make_bus(NOWHERE)
    bus.on("tick")(lambda sender, **payload: None)

    with pytest.raises(TypeError, match=r"in payload=\{\.\.\.\}"):
        eventbus.deliver("tick", **wrong)


@pytest.mark.parametrize("name", ["", "user registered", "order_*", "{x}"])
def test_deliver_accepts_only_a_signal_name(eventbus: Isolation, name: str) -> None:
    with pytest.raises(ConfigError, match="signal name"):
        eventbus.deliver(name)


def test_an_unsupported_payload_is_not_delivered(make_bus: Make, eventbus: Isolation) -> None:
    calls: list[Any] = []
    bus = make_bus(NOWHERE)
    bus.on("tick")(lambda sender, **payload: calls.append(payload))

    with pytest.raises(PayloadError, match=r"payload\.user: object"):
        eventbus.deliver("tick", user=object())

    with pytest.raises(PayloadError, match="sender"):
        eventbus.deliver("tick", sender="me")

    assert calls == []


def test_delivered_payloads_are_encoded_and_decoded(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    pairs = []
    bus.on("tick")(lambda sender, pair: pairs.append(pair))

    eventbus.deliver("tick", pair=(1, 2))

    assert pairs == [[1, 2]]


def test_a_receivers_error_is_raised_in_the_test(
    make_bus: Make, eventbus: Isolation, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(NOWHERE)
    calls = []
    failing = ValueError("no such user")

    @bus.on("user_registered")
    def fail(sender: str, user_id: int) -> None:
        raise failing

    @bus.on("user_registered")
    def work(sender: str, user_id: int) -> None:
        calls.append(user_id)

    with pytest.raises(ValueError, match="no such user") as caught:
        eventbus.deliver("user_registered", user_id=7)

    assert caught.value is failing
    assert calls == [7]


def test_the_errors_of_several_receivers_come_in_a_group(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus, other = make_bus(NOWHERE, "one"), make_bus(NOWHERE, "two")

    @bus.on("user_registered")
    def first(sender: str) -> None:
        raise ValueError("first")

    @other.on("user_registered")
    def second(sender: str) -> None:
        raise KeyError("second")

    with pytest.raises(ExceptionGroup, match="2 receivers of 'user_registered' failed") as caught:
        eventbus.deliver("user_registered")

    assert {type(error) for error in caught.value.exceptions} == {ValueError, KeyError}


def test_an_exit_in_a_receiver_is_raised_too(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)

    @bus.on("tick")
    def leave(sender: str) -> None:
        sys.exit(3)

    with pytest.raises(SystemExit, match="3"):
        eventbus.deliver("tick")


def test_a_payload_that_does_not_fit_a_receiver_is_raised(
    make_bus: Make, eventbus: Isolation
) -> None:
    bus = make_bus(NOWHERE)
    bus.on("tick")(lambda sender, number: None)

    with pytest.raises(ReceiverError, match=r"missing a required argument: 'number'.*a default\."):
        eventbus.deliver("tick", payload={})
    with pytest.raises(ReceiverError, match=r"unexpected keyword argument 'count'.*\*\*extra'"):
        eventbus.deliver("tick", number=1, count=1)


def test_each_event_gets_an_app_context_of_its_own(make_app: MakeApp, eventbus: Isolation) -> None:
    bus = EventBus()
    app = make_app("mailer", bus=bus)
    seen: list[object] = []
    ended = []

    @bus.on("tick")
    def receive(sender: str) -> None:
        seen.append(g.get("user"))
        g.user = "of the event"

    @app.teardown_appcontext
    def tear_down(error: BaseException | None) -> None:
        ended.append(g.get("user"))

    with app.app_context():
        g.user = "of the test"
        eventbus.deliver("tick")
        eventbus.deliver("tick")
        assert g.user == "of the test"
        assert seen == [None, None]
        assert ended == ["of the event", "of the event"]


def test_coroutines_are_awaited(make_app: MakeApp, eventbus: Isolation) -> None:
    bus = EventBus()
    app = make_app("mailer", bus=bus)
    seen = []

    @bus.on("tick")
    async def receive(sender: str, n: int) -> None:
        await asyncio.sleep(0)
        seen.append((n, current_app.name, current_event.source))

    eventbus.deliver("tick", n=1, source="clock")
    assert seen == [(1, app.name, "clock")]

    async def in_a_running_loop() -> None:
        eventbus.deliver("tick", n=2, source="clock")

    asyncio.run(in_a_running_loop())
    assert seen[1:] == [(2, app.name, "clock")]


def test_an_error_of_a_coroutine_is_raised(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)

    @bus.on("tick")
    async def fail(sender: str) -> None:
        await asyncio.sleep(0)
        raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        eventbus.deliver("tick")


def test_threads_may_deliver(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    seen = []

    @bus.on("tick")
    async def receive(sender: str) -> None:
        seen.append(threading.get_ident())

    thread = threading.Thread(target=eventbus.deliver, args=("tick",))
    thread.start()
    thread.join()
    gc.collect()

    assert seen == [thread.ident]


def test_each_subscribed_service_gets_its_own_event(
    make_app: MakeApp, make_bus: Make, eventbus: Isolation
) -> None:
    received = []
    bus = EventBus()
    mailer = make_app("mailer", bus=bus)
    audit = make_bus(NOWHERE, "audit")

    @bus.on("user_registered")
    def welcome(sender: str, tags: list[str]) -> None:
        tags.append(mailer.name)
        received.append(tags)

    @audit.on("user_*")
    def write(sender: str, tags: list[str]) -> None:
        tags.append("audit")
        received.append(tags)

    eventbus.deliver("user_registered", tags=["new"])

    assert sorted(received) == [["new", "audit"], ["new", "mailer"]]


def test_two_apps_of_one_bus_both_receive_a_delivery(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    bus = EventBus()
    apps = [make_app("mailer", bus=bus), make_app("mailer", bus=bus)]
    received = []
    bus.on("tick")(lambda sender: received.append(id(current_app.view_functions)))

    eventbus.deliver("tick")

    assert sorted(received) == sorted(id(app.view_functions) for app in apps)


def test_a_subscription_by_configuration_reaches_the_apps_own_receivers(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    app = make_app("mailer", subscribe={"user_registered": {"from": ["accounts"]}})
    received = []

    @app.signal("user_registered")  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
    def welcome(sender: str, username: str) -> None:
        received.append((sender, username))

    eventbus.deliver("user_registered", username="ada", source="accounts")

    assert received == [("accounts", "ada")]


def test_a_delivered_event_is_not_recorded_but_the_events_it_causes_are(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    bus = EventBus()
    app = make_app("shop", bus=bus, publish=["order_*"])

    @bus.on("order_paid")
    def ship(sender: str, order_id: int) -> None:
        bus.signal("order_shipped").send(app, order_id=order_id)

    paid = eventbus.deliver("order_paid", order_id=5, source="bank")

    eventbus.assert_not_published("order_paid")
    [shipped] = eventbus.assert_published("order_shipped", order_id=5)
    assert shipped.causation_id == paid.id
    assert shipped.correlation_id == paid.id
    assert shipped.hops == 1


# -- what nothing receives ----------------------------------------------------------------


def test_delivering_an_event_without_a_receiver_fails(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, "mailer")
    bus.on("user_registered")(lambda sender, **payload: None)
    bus.on("order_paid")(lambda sender, **payload: None)

    assert failure(eventbus.deliver, "user_registerd", source="accounts") == (
        "Nothing here receives 'user_registerd' from 'accounts'. Did you mean 'user_registered'?"
    )
    assert failure(eventbus.deliver, "tick") == (
        "Nothing here receives 'tick' from 'elsewhere'. Known are: order_paid, user_registered."
    )


def test_deliver_without_any_subscription_says_how_to_make_one(eventbus: Isolation) -> None:
    gc.collect()

    assert "Decorate a receiver with @bus.on('tick')." in failure(eventbus.deliver, "tick")


def test_deliver_reports_receivers_without_a_subscription(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    app = make_app("mailer", publish=["tick"])
    app.signal("tick").connect(lambda sender: None)  # type: ignore[attr-defined]

    said = failure(eventbus.deliver, "tick")

    assert "'mailer' has receivers for it, but does not subscribe" in said
    assert "'EVENTBUS_SUBSCRIBE'" in said


def test_deliver_reports_a_subscription_to_other_services(
    make_app: MakeApp, make_bus: Make, eventbus: Isolation
) -> None:
    app = make_app("mailer", subscribe={"tick": {"from": ["clock"]}})
    app.signal("tick").connect(lambda sender: None)  # type: ignore[attr-defined]
    bus = make_bus(NOWHERE, "audit")
    bus.on("tick", from_=["clock"])(lambda sender: None)

    said = failure(eventbus.deliver, "tick", source="accounts")

    assert "'mailer' subscribes to it only from clock: pass source=." in said
    assert "'audit' subscribes to it, but has no receiver for this source" in said
    eventbus.deliver("tick", source="clock")


def test_deliver_reports_a_disabled_bus(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE, "mailer", enabled=False)
    bus.on("tick")(lambda sender: None)

    assert "'mailer' subscribes to it, but its 'EVENTBUS_ENABLED' is False." in failure(
        eventbus.deliver, "tick"
    )


def test_a_deleted_app_receives_nothing(make_app: MakeApp, eventbus: Isolation) -> None:
    bus = EventBus()
    calls: list[str] = []
    bus.on("tick")(lambda sender: calls.append(current_app.name))

    old = make_app("old", bus=bus)
    old.config["cycle"] = old
    del old
    app = make_app("new", bus=bus)
    eventbus.deliver("tick")

    assert calls == [app.name]


def test_a_deleted_app_publishes_nothing(make_app: MakeApp, eventbus: Isolation) -> None:
    bus = EventBus()
    old = make_app("old", bus=bus, publish=["tick"])
    old.config["cycle"] = old
    del old
    app = make_app("new", bus=bus, publish=["tick"])

    bus.signal("tick").send(None)

    [event] = eventbus.published()
    assert event.source == app.name


# -- outages ------------------------------------------------------------------------------


def test_with_the_policy_raise_a_send_raises_while_redis_is_away(
    make_app: MakeApp, eventbus: Isolation
) -> None:
    app = make_app("accounts", publish=["user_registered"], on_outage="raise")

    with eventbus.redis_away():
        with pytest.raises(PublishError, match="was not confirmed by Redis"):
            send(app, "user_registered", user_id=7)

        assert eventbus.published() == []

    send(app, "user_registered", user_id=8)
    assert [event.payload["user_id"] for event in eventbus.published()] == [8]


def test_with_the_policy_buffer_events_are_published_when_redis_is_back(
    accounts: Flask, eventbus: Isolation
) -> None:
    send(accounts, "user_registered", user_id=1)

    with eventbus.redis_away():
        send(accounts, "user_registered", user_id=2)
        send(accounts, "user_registered", user_id=3)
        eventbus.assert_published("user_registered", times=1)

    send(accounts, "user_registered", user_id=4)
    assert [event.payload["user_id"] for event in eventbus.published()] == [1, 2, 3, 4]


def test_a_bus_created_while_redis_is_away_knows_it(make_bus: Make, eventbus: Isolation) -> None:
    with eventbus.redis_away():
        bus = make_bus(NOWHERE, publish=["tick"], on_outage="raise")

        with pytest.raises(PublishError):
            bus.signal("tick").send(None)

    bus.signal("tick").send(None)
    eventbus.assert_published("tick", times=1)


def test_an_exception_ends_the_simulated_outage(accounts: Flask, eventbus: Isolation) -> None:
    with pytest.raises(ZeroDivisionError), eventbus.redis_away():
        raise ZeroDivisionError

    send(accounts, "user_registered", user_id=7)
    eventbus.assert_published("user_registered", user_id=7)


def test_events_can_be_delivered_while_redis_is_away(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    received = []
    bus.on("tick")(lambda sender, n: received.append(n))

    with eventbus.redis_away():
        eventbus.deliver("tick", n=1)

    assert received == [1]


def test_a_listener_can_stop_while_redis_is_away(make_bus: Make, eventbus: Isolation) -> None:
    bus = make_bus(NOWHERE)
    bus.on("tick")(lambda sender: None)
    bus.start()
    assert bus.ready(5)

    with eventbus.redis_away():
        bus.stop()

    assert not bus.health().listening


# -- what is isolated ---------------------------------------------------------------------


@pytest.fixture
def guarded_port() -> Iterator[int]:
    """A port on which a connection fails the test."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
        server.setblocking(False)

        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_test_connects_to_the_configured_redis(guarded_port: int, make_bus: Make) -> None:
    url = f"redis://127.0.0.1:{guarded_port}/0"
    before = make_bus(url, "before", publish=["tick"])
    before.on("tock")(lambda sender: None)

    with isolated() as eventbus:
        during = make_bus(url, "during", publish=["tick"])

        for bus in (before, during):
            bus.on("tock")(lambda sender: None)
            bus.start()
            assert bus.ready(5)
            bus.signal("tick").send(None)
            assert bus.flush(5)

        eventbus.assert_published("tick", times=2)


def test_after_a_test_a_bus_returns_to_its_own_redis(make_bus: Make) -> None:
    outside = "memory://goes-back"
    received = []
    audit = make_bus(outside, "audit")
    audit.on("tick")(lambda sender, n: received.append(n))
    audit.start()
    assert audit.ready(5)
    bus = make_bus(outside, "clock", publish=["tick"])

    bus.signal("tick").send(None, n=1)
    wait_until(lambda: received == [1], what="the event before is received")
    url = bus.node.config.url

    with isolated() as eventbus:
        audit.stop()
        bus.signal("tick").send(None, n=2)
        eventbus.assert_published("tick", times=1, n=2)

    assert audit.ready(5)
    bus.signal("tick").send(None, n=3)
    wait_until(lambda: received == [1, 3], what="the event after is received")
    assert bus.node.config.url == url


def test_events_sent_before_the_isolation_go_to_the_real_redis(make_bus: Make) -> None:
    bus = make_bus("memory://before", "clock", publish=["tick"])
    outside = Recording("memory://before")
    outside.learn(bus.node)

    for n in range(500):
        bus.signal("tick").send(None, n=n)

    with isolated() as eventbus:
        eventbus.assert_not_published()

    outside.read()
    assert [event.payload["n"] for event in outside.events] == list(range(500))


def test_a_listening_bus_continues_to_listen_after_the_isolation(make_bus: Make) -> None:
    received = []
    audit = make_bus("memory://listens", "audit")
    audit.on("tick")(lambda sender, n: received.append(n))
    audit.start()
    bus = make_bus("memory://listens", "clock", publish=["tick"])

    with isolated():
        assert audit.ready(5)
        bus.signal("tick").send(None, n=1)
        wait_until(lambda: received == [1], what="it is received in memory")

    assert audit.health().listening
    assert audit.ready(5)


def test_a_bus_started_in_a_test_is_stopped_at_its_end(make_bus: Make) -> None:
    with isolated():
        bus = make_bus(NOWHERE)
        bus.on("tick")(lambda sender: None)
        bus.start()

    assert not bus.health().listening


def test_an_isolation_leaves_nothing_behind(make_bus: Make) -> None:
    threads = set(threading.enumerate())
    servers = set(connection.memory_servers)

    with isolated() as eventbus:
        bus = make_bus(NOWHERE, publish=["tick"])
        bus.on("tock")(lambda sender: None)
        bus.start()
        bus.signal("tick").send(None)
        eventbus.assert_published("tick")

    assert connections.diversion is None
    assert set(connection.memory_servers) == servers
    assert set(threading.enumerate()) <= threads


def test_nested_isolations_are_kept_apart(make_bus: Make) -> None:
    bus = make_bus(NOWHERE, publish=["tick"])

    with isolated() as outer:
        bus.signal("tick").send(None, n=1)

        with isolated() as inner:
            bus.signal("tick").send(None, n=2)
            assert [event.payload["n"] for event in inner.published()] == [2]

        bus.signal("tick").send(None, n=3)
        assert [event.payload["n"] for event in outer.published()] == [1, 3]


def test_a_failing_test_ends_its_isolation(make_bus: Make) -> None:
    with pytest.raises(ZeroDivisionError), isolated():
        raise ZeroDivisionError

    assert connections.diversion is None


def test_an_isolation_logs_nothing(accounts: Flask, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flask_eventbus"), isolated() as eventbus:
        send(accounts, "user_registered", user_id=7)
        eventbus.assert_published("user_registered")
        send(accounts, "user_registered", user_id=8)

    assert caplog.records == []


class TestWithUnittest(unittest.TestCase):
    """The kit where there are no fixtures."""

    def setUp(self) -> None:
        self.eventbus = self.enterContext(isolated())
        self.bus = Bus(NOWHERE, service="script", publish=["tick"])

    def test_the_testing_kit_works_without_pytest(self) -> None:
        self.bus.signal("tick").send(None, n=1)

        self.eventbus.assert_published("tick", n=1)


# -- the plug-in --------------------------------------------------------------------------


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run pytest in a process of its own."""
    plugin = [] if INSTALLED else ["-p", "flask_eventbus.pytest_plugin"]
    # pytest-rerunfailures keeps what fixtures made until the next garbage collection, and the
    # others take longer to load than the tests take.
    others = ("randomly", "rerunfailures", "xdist", "hypothesispytest", "timeout")
    without = [f"-pno:{name}" for name in others]
    return pytester.runpytest_subprocess(*without, *plugin, *arguments)


def test_the_pytest_plug_in_loads_no_heavy_module() -> None:
    program = "import sys, flask_eventbus.pytest_plugin as p; print(*sys.modules)"
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    loaded = outcome.stdout.split()
    ours = {name for name in loaded if name.startswith("flask_eventbus")}
    assert ours == {"flask_eventbus", "flask_eventbus.pytest_plugin"}
    assert {"redis", "flask", "msgpack", "fakeredis", "blinker"}.isdisjoint(loaded)


def test_without_fakeredis_only_the_tests_that_need_it_fail(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("import sys; sys.modules['fakeredis'] = None")
    pytester.makepyfile(
        """
        def test_with(eventbus): ...
        def test_without(): ...
        """
    )

    outcome = run(pytester)

    outcome.assert_outcomes(errors=1, passed=1)
    outcome.stdout.fnmatch_lines(
        ["*flask_eventbus.testing needs fakeredis*pip install 'flask-eventbus[[]testing]'*"]
    )


FACTORY = """
    import pytest
    from flask import Flask, current_app
    from flask_eventbus import EventBus

    bus = EventBus()
    mails = []

    @bus.on("user_registered")
    def welcome(sender, email):
        mails.append(email)

    def create_app():
        app = Flask("mailer")
        app.config.from_mapping(
            EVENTBUS_SERVICE="mailer",
            EVENTBUS_URL="redis://127.0.0.1:1/0",
            EVENTBUS_PUBLISH=["mail_sent"],
        )
        bus.init_app(app)
        return app
"""


@pytest.mark.parametrize(
    ("scope", "order"),
    [("function", "app, eventbus"), ("function", "eventbus, app"), ("session", "app, eventbus")],
)
def test_apps_of_earlier_tests_do_not_disturb_later_ones(
    pytester: pytest.Pytester, scope: str, order: str
) -> None:
    pytester.makepyfile(mailer=FACTORY)
    pytester.makepyfile(
        f"""
        import gc
        import pytest
        from mailer import bus, create_app, mails

        gc.disable()

        @pytest.fixture(scope={scope!r})
        def app():
            return create_app()

        @pytest.mark.parametrize("number", range(4))
        def test_a_mail_is_sent_once({order}, number):
            mails.clear()
            eventbus.deliver("user_registered", email=number)
            assert mails == [number]

            with app.app_context():
                bus.signal("mail_sent").send(None, number=number)

            eventbus.assert_published("mail_sent", times=1, number=number)
            assert number != 1, "as any test may fail"
        """
    )

    run(pytester).assert_outcomes(passed=3, failed=1)


def test_a_failure_points_at_the_line_of_the_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from flask_eventbus import Bus

        def test_publishing(eventbus):
            eventbus.assert_published("user_registered", user_id=7)

        def test_receiving(eventbus):
            eventbus.deliver("user_registered", user_id=7)

        def test_failing(eventbus):
            bus = Bus(service="mailer")
            bus.on("user_registered")(lambda sender, user_id: 1 / 0)
            eventbus.deliver("user_registered", user_id=7)
        """
    )

    outcome = run(pytester)

    outcome.stdout.fnmatch_lines(
        [
            ">*eventbus.assert_published(*",
            "E*AssertionError: 'user_registered' with user_id=7 was not published.*",
            "*test_a_failure_points_at_the_line_of_the_test.py:4: AssertionError",
            ">*eventbus.deliver(*",
            "E*AssertionError: Nothing here receives 'user_registered' from 'elsewhere'.*",
            "*test_a_failure_points_at_the_line_of_the_test.py:7: AssertionError",
            "*test_a_failure_points_at_the_line_of_the_test.py:11: ZeroDivisionError",
        ]
    )
    outcome.stdout.no_fnmatch_line("*testing.py*")


# -- the pages about it -------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "\n".join(
    (DOCS / f"{name}.md").read_text()
    for name in ("testing", "testing-retries", "testing-isolation")
)


def blocks(language: str) -> list[str]:
    """The fenced blocks of the pages."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def write_programs(folder: Path) -> str:
    """Write the page's programs into the files that their first lines name; return it all."""
    for block in blocks("python"):
        name = block.splitlines()[0].removeprefix("# ")

        with (folder / name).open("a") as file:
            file.write(block)

    return "".join(blocks("python"))


STREAM_AND_CHANNEL = {"paid": "stream", "price_changed": "channel"}


def stream_length(server: RedisServer, prefix: str) -> int:
    with server.client as client:
        return int(client.xlen(f"{prefix}:{{paid}}:stream"))


def clients(server: RedisServer) -> Any:
    with server.client as client:
        return client.client_list()


def test_an_app_with_testing_publishes_nothing_and_says_so_once(
    make_app: MakeApp, shared_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    url, prefix = shared_redis.url, "under-test"
    app = make_app("shop", url=url, prefix=prefix, publish=STREAM_AND_CHANNEL)
    app.testing = True
    node = app.extensions["eventbus"]
    local: list[dict[str, Any]] = []

    app.signal("paid").connect(lambda sender, **payload: local.append(payload))  # type: ignore[attr-defined]

    for name in ("paid", "price_changed", "paid"):
        send(app, name, number=1)

    assert node.health().buffered == 0
    assert node.name not in str(clients(shared_redis))
    assert stream_length(shared_redis, prefix) == 0
    assert local == [{"number": 1}, {"number": 1}]
    [line] = [record.getMessage() for record in caplog.records]
    assert "The app of 'shop' is under test (TESTING)" in line
    assert "set 'EVENTBUS_PUBLISH_IN_TESTS' to True" in line

    with pytest.raises(PayloadError):
        send(app, "paid", number=object())


def test_an_app_with_testing_publishes_if_a_setting_says_so(
    make_app: MakeApp, shared_redis: RedisServer
) -> None:
    asked, earnest = "asked-for", "no-testing"
    settings = {"url": shared_redis.url, "publish": STREAM_AND_CHANNEL}
    app = make_app("shop", prefix=asked, publish_in_tests=True, **settings)
    app.testing = True
    other = make_app("shop", prefix=earnest, **settings)

    send(app, "paid", number=1)
    send(other, "paid", number=1)

    assert (stream_length(shared_redis, asked), stream_length(shared_redis, earnest)) == (1, 1)
    app.extensions["eventbus"].stop()
    other.extensions["eventbus"].stop()


def test_an_app_with_testing_publishes_in_memory_and_with_the_fixture(
    make_app: MakeApp, shared_redis: RedisServer
) -> None:
    app = make_app("shop", url="memory://asked", publish=STREAM_AND_CHANNEL)
    other = make_app("shop", url=shared_redis.url, publish=STREAM_AND_CHANNEL)
    app.testing = other.testing = True

    send(app, "paid", number=1)
    pipe = Pipe(Connections("memory://asked", name="tests"), timeout=5)
    assert pipe.ask("XLEN", "eventbus:{paid}:stream") == 1

    with isolated() as eventbus:
        send(other, "paid", number=1)
        eventbus.assert_published("paid", number=1, times=1)

    app.extensions["eventbus"].stop()


def test_every_program_on_the_testing_page_runs(pytester: pytest.Pytester) -> None:
    text = write_programs(pytester.path)

    outcome = run(pytester, "-W", "error")

    outcome.assert_outcomes(passed=len(re.findall(r"^ *def test_", text, re.MULTILINE)))


def test_the_failure_messages_on_the_page_are_the_real_ones(pytester: pytest.Pytester) -> None:
    write_programs(pytester.path)
    pytester.makepyfile(
        test_failures="""
        def test_value(eventbus, client):
            client.post("/register", data={"email": "ada@example.com"})
            eventbus.assert_published("user_registered", user_id=8)

        def test_name(eventbus, client):
            eventbus.assert_published("user_registerd")
        """
    )

    outcome = run(pytester, "test_failures.py")

    outcome.assert_outcomes(failed=2)
    said = re.sub(r"^E +", "", outcome.stdout.str(), flags=re.MULTILINE)

    for block in blocks("text"):
        for line in block.splitlines():
            assert line.strip() in said


def test_an_event_in_the_outbox_of_a_script_is_explained_with_its_command(
    eventbus: Isolation,
) -> None:
    bus = Bus("redis://localhost:6379/0", service="shop", publish={"paid": {"outbox": True}})

    with bus, pytest.raises(AssertionError) as caught:
        eventbus.assert_published("paid")

    assert "'python -m flask_eventbus relay --database URL --once'" in str(caught.value)
