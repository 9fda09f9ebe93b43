"""Tests that run over every server, in memory and real."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import blinker
import pytest
from flask import Flask, current_app
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus, Event, EventBus, PayloadError, signals
from flask_eventbus.event import handling
from flask_eventbus.signals import wait_until_sent
from flask_eventbus.transport.connections import Connections
from flask_eventbus.transport.keys import ChannelKeys
from flask_eventbus.transport.pipe import Pipe

Make = Callable[..., Bus]

_numbers = itertools.count()


@pytest.fixture(params=["memory", "redis", "public API"])
def url(request: pytest.FixtureRequest) -> str:
    """A server: fakeredis, or a real one, also with the public API of redis-py alone."""
    if request.param == "memory":
        return f"memory://contract-{next(_numbers)}"

    if request.param == "public API":
        request.getfixturevalue("public_api")

    server: RedisServer = request.getfixturevalue("shared_redis")
    return server.url


@pytest.fixture
def prefix() -> str:
    """A prefix of this test's own, since the real server is shared."""
    return f"contract-{next(_numbers)}"


@pytest.fixture
def make(url: str, prefix: str, make_bus: Make) -> Make:
    """Make buses of the services of one test."""

    def made(service: str = "tests", **settings: object) -> Bus:
        return make_bus(url, service, **{"prefix": prefix, **settings})

    return made


class Received:
    """Connects a receiver and remembers what it got."""

    def __init__(self, bus: Bus, name: str, **options: Any) -> None:
        self.events: list[Event] = []
        bus.on(name, **options)(self)

    def __call__(self, sender: str, **payload: Any) -> None:
        event = handling.get()
        assert event is not None
        assert event.source == sender
        assert event.payload == payload
        self.events.append(event)

    @property
    def values(self) -> list[Any]:
        """The ``n`` of each event."""
        return [event.payload["n"] for event in list(self.events)]

    def wait(self, count: int = 1) -> list[Event]:
        """The events, as soon as there are ``count``."""
        wait_until(lambda: len(self.events) >= count, what=f"{count} events are received")
        return self.events


def listen(*buses: Bus) -> None:
    for bus in buses:
        bus.start()

    for bus in buses:
        assert bus.ready(10)


def send(bus: Bus, name: str, /, **payload: Any) -> None:
    bus.signal(name).send(None, **payload)


# -- one event ----------------------------------------------------------------------------


def test_an_event_of_one_service_reaches_another(make: Make) -> None:
    shop, audit = make("shop", publish=["order_paid"]), make("audit")
    received = Received(audit, "order_paid")
    listen(audit)
    before = datetime.now(UTC)

    send(shop, "order_paid", order_id=5, total=Decimal("9.90"))

    [event] = received.wait()
    assert event.name == "order_paid"
    assert event.source == "shop"
    assert event.payload == {"order_id": 5, "total": Decimal("9.90")}
    assert event.id == f"{shop.node.name}-1"
    assert before <= event.time <= datetime.now(UTC)
    assert (event.via, event.seq, event.hops, event.attempt) == ("channel", 1, 0, 1)
    assert (event.correlation_id, event.causation_id) == (None, None)


VALUES: dict[str, Any] = {
    "nothing": None,
    "zero": 0,
    "false": False,
    "no text": "",
    "no bytes": b"",
    "no list": [],
    "no map": {},
    "no float": 0.0,
    "no set": set(),
    "large": 2**200,
    "negative": -(2**63),
    "text": "Zürich \N{SNOWMAN} \0",
    "bytes": bytes(range(256)),
    "nested": {"a": [{"b": [None, [], {}]}]},
    "aware": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    "naive": datetime(2026, 1, 2, 3, 4, 5),
    "date": date(2026, 1, 2),
    "time": time(3, 4, 5),
    "delta": timedelta(days=-1, microseconds=1),
    "decimal": Decimal("-0.10"),
    "uuid": UUID(int=7),
    "set": {1, 2},
    "frozen": frozenset({"x"}),
}


def test_values_arrive_as_they_were_sent(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    received = Received(audit, "tick")
    listen(audit)

    for value in VALUES.values():
        send(shop, "tick", n=value)

    received.wait(len(VALUES))
    arrived = dict(zip(VALUES, received.values, strict=True))
    assert arrived == VALUES
    assert [type(value) for value in received.values] == [type(value) for value in VALUES.values()]


def test_an_empty_payload_arrives(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    received = Received(audit, "tick")
    listen(audit)

    send(shop, "tick")

    assert [event.payload for event in received.wait()] == [{}]


def test_a_large_payload_arrives_and_a_larger_one_is_refused(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    received = Received(audit, "tick")
    listen(audit)
    large = "x" * 1_000_000

    send(shop, "tick", n=large)

    with pytest.raises(PayloadError, match="EVENTBUS_MAX_EVENT_BYTES"):
        send(shop, "tick", n=large * 2)

    assert [event.payload["n"] == large for event in received.wait()] == [True]


def test_the_order_of_one_sender_is_kept(make: Make) -> None:
    shop, audit = make("shop", publish=["*"]), make("audit")
    received = Received(audit, "*")
    listen(audit)

    for n in range(3000):
        send(shop, f"tick_{n % 3}", n=n)

    received.wait(3000)
    assert received.values == list(range(3000))
    assert audit.health().missed == 0


def test_several_receiving_threads_run_every_event_once(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit", concurrency=4)
    received = Received(audit, "tick")
    listen(audit)

    for n in range(1000):
        send(shop, "tick", n=n)

    received.wait(1000)
    assert sorted(received.values) == list(range(1000))


def test_registered_types_travel(make: Make) -> None:
    def pack(value: complex) -> bytes:
        return str(value).encode()

    def unpack(raw: bytes) -> complex:
        return complex(raw.decode())

    shop, audit = make("shop", publish=["tick"]), make("audit")
    received = Received(audit, "tick")

    for bus in (shop, audit):
        bus.register_type(50, complex, pack=pack, unpack=unpack)

    listen(audit)
    send(shop, "tick", n=[1 + 2j])

    received.wait()
    assert received.values == [[1 + 2j]]


# -- who hears it -------------------------------------------------------------------------


def test_a_channel_event_reaches_every_process_of_every_service(make: Make) -> None:
    shop = make("shop", publish=["tick"])
    others = [make("audit"), make("audit"), make("mailer"), make("shop")]
    received = [Received(bus, "tick") for bus in others]
    listen(*others)

    send(shop, "tick", n=1)

    for one in received:
        one.wait()

    assert [one.values for one in received] == [[1]] * 4


def test_an_event_without_a_subscription_does_not_arrive(make: Make) -> None:
    shop, audit = make("shop", publish=["*"]), make("audit")
    received = Received(audit, "tick")
    listen(audit)

    send(shop, "tock", n=1)
    send(shop, "tick", n=2)

    received.wait()
    assert received.values == [2]
    assert audit.health().counts["received"] == 1


def test_services_with_different_prefixes_are_isolated(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"], prefix="apart:1"), make("audit")
    near = make("near", publish=["tick"])
    received = Received(audit, "tick")
    listen(audit)

    send(shop, "tick", n=1)
    assert shop.flush(5)
    send(near, "tick", n=2)

    received.wait()
    assert received.values == [2]


def test_a_pattern_receives_every_matching_name(make: Make) -> None:
    shop, audit = make("shop", publish=["*"]), make("audit")
    orders, digits = Received(audit, "order_*"), Received(audit, "v?.tick/*")
    listen(audit)

    for name in ("order_paid", "order_", "orders", "v1.tick/a-b", "v22.tick/a", "border_x"):
        send(shop, name)
    send(shop, "order_last")

    orders.wait(3)
    assert [event.name for event in orders.events] == ["order_paid", "order_", "order_last"]
    assert [event.name for event in digits.events] == ["v1.tick/a-b"]


def test_receivers_of_a_name_and_of_patterns_run_once_each(make: Make) -> None:
    shop, audit = make("shop", publish=["order_paid", "order_sent"]), make("audit")
    exact, some, every = (Received(audit, name) for name in ("order_paid", "order_*", "*"))
    listen(audit)

    for n in range(100):
        send(shop, "order_paid", n=n)
    send(shop, "order_sent", n=100)

    every.wait(101)
    assert exact.values == list(range(100))
    assert some.values == every.values == list(range(101))
    assert audit.health().counts.get("duplicates", 0) == 0


def test_a_receiver_of_several_patterns_runs_once_per_event(make: Make) -> None:
    shop, audit = make("shop", publish=["*"]), make("audit")
    received = Received(audit, "order_*")
    audit.on("*")(received)
    listen(audit)

    send(shop, "order_paid", n=1)
    received.wait()
    audit.signal("order_paid")
    send(shop, "order_paid", n=2)
    send(shop, "last", n=3)

    received.wait(3)
    assert received.values == [1, 2, 3]


def test_patterns_receive_foreign_signals_of_an_adopted_namespace(make: Make) -> None:
    namespace = blinker.Namespace()
    shop, audit = make("shop", publish=["*"]), make("audit", namespace=namespace)
    received = Received(audit, "order_*")
    namespace.signal("order_paid")
    listen(audit)

    send(shop, "order_paid", n=1)

    received.wait()
    assert received.values == [1]


def test_only_events_of_the_named_services_are_received(make: Make) -> None:
    shops = [make(service, publish=["tick"]) for service in ("shop", "bank", "clock")]
    audit = make("audit")
    shop = Received(audit, "tick", from_="shop")
    both = Received(audit, "tick", from_=["shop", "bank"])
    every = Received(audit, "tick")
    listen(audit)

    for bus in shops:
        send(bus, "tick")

    every.wait(3)
    wait_until(lambda: not audit.health().lag)
    assert {event.source for event in shop.events} == {"shop"}
    assert {event.source for event in both.events} == {"shop", "bank"}
    assert {event.source for event in every.events} == {"shop", "bank", "clock"}


def test_the_configuration_can_name_services_too(make: Make) -> None:
    shop, bank = make("shop", publish=["tick"]), make("bank", publish=["tick"])
    audit = make("audit", subscribe={"tick": {"from": ["bank"]}})
    sources = []
    audit.signal("tick").connect(lambda sender: sources.append(sender), weak=False)
    listen(audit)

    send(shop, "tick")
    assert shop.flush(5)
    send(bank, "tick")

    wait_until(lambda: sources, what="the event of the bank is received")
    assert sources == ["bank"]
    assert audit.health().counts["filtered"] == 1


def test_blinkers_own_filter_by_sender_works(make: Make) -> None:
    shop, bank = make("shop", publish=["tick"]), make("bank", publish=["tick"])
    audit = make("audit")
    every = Received(audit, "tick")
    senders = []

    @audit.signal("tick").connect_via("bank")
    def receive(sender: str) -> None:
        senders.append(sender)

    listen(audit)
    send(shop, "tick")
    send(bank, "tick")

    every.wait(2)
    wait_until(lambda: senders, what="the filtered receiver has run")
    assert senders == ["bank"]


def test_a_service_receives_its_own_events_only_with_echo(make: Make) -> None:
    shop, audit = make("shop", publish=["tick", "tock"]), make("audit")
    ticks, tocks = [], []
    shop.on("tick")(lambda sender, n: ticks.append((sender, n)))
    shop.on("tock", echo=True)(lambda sender, n: tocks.append((sender, n)))
    every = Received(audit, "*")
    listen(shop, audit)

    send(shop, "tick", n=1)
    send(shop, "tock", n=2)

    every.wait(2)
    wait_until(lambda: len(tocks) == 2, what="the echo is received")
    wait_until(lambda: shop.health().counts.get("echoes") == 1, what="the echo is skipped")
    assert ticks == [(None, 1)]
    assert tocks == [(None, 2), ("shop", 2)]


def test_apps_that_share_receivers_do_not_receive_each_others_events(url: str, prefix: str) -> None:
    bus, calls = EventBus(), []
    apps = []

    for name in ("one", "two"):
        app = Flask(name)
        app.config.from_mapping(
            EVENTBUS_SERVICE="twins",
            EVENTBUS_URL=url,
            EVENTBUS_PREFIX=prefix,
            EVENTBUS_PUBLISH=["tick", "done"],
        )
        bus.init_app(app)
        apps.append(app)

    @bus.on("tick")
    def receive(sender: Any) -> None:
        calls.append(getattr(sender, "name", sender))

    for app in apps:
        bus.start(app)
        assert bus.ready(10, app=app)

    bus.signal("tick").send(apps[0])
    nodes = [bus.node(app) for app in apps]
    wait_until(lambda: all(node.counters.get("echoes") for node in nodes), what="both skip it")

    assert calls == ["one"]

    for app in apps:
        bus.stop(app)


# -- what a receiver does -----------------------------------------------------------------


def test_a_received_event_is_not_published_again(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    relay = make("relay", publish=["tick", "fence"])
    relayed, received = Received(relay, "tick"), Received(audit, "*")
    listen(relay, audit)

    send(shop, "tick")
    relayed.wait()
    send(relay, "fence")

    received.wait(2)
    assert [(event.source, event.name) for event in received.events] == [
        ("shop", "tick"),
        ("relay", "fence"),
    ]


def test_events_of_a_chain_name_their_causes(make: Make) -> None:
    shop = make("shop", publish=["order_placed"])
    bank, post = make("bank", publish=["order_paid"]), make("post", publish=["order_sent"])
    audit = make("audit")
    bank.on("order_placed")(lambda sender, n: send(bank, "order_paid", n=n))
    post.on("order_paid")(lambda sender, n: send(post, "order_sent", n=n))
    received = Received(audit, "order_*")
    listen(bank, post, audit)

    send(shop, "order_placed", n=1)

    received.wait(3)
    placed, paid, sent = sorted(received.events, key=lambda event: event.hops)
    assert [event.name for event in (placed, paid, sent)] == [
        "order_placed",
        "order_paid",
        "order_sent",
    ]
    assert (placed.causation_id, paid.causation_id, sent.causation_id) == (
        None,
        placed.id,
        paid.id,
    )
    assert (placed.correlation_id, paid.correlation_id, sent.correlation_id) == (
        None,
        placed.id,
        placed.id,
    )
    assert (placed.hops, paid.hops, sent.hops) == (0, 1, 2)


def test_a_circle_of_events_stops_at_the_hop_limit(make: Make) -> None:
    ping = make("ping", publish=["ping"], max_hops=6)
    pong = make("pong", publish=["pong"], max_hops=6)
    failures: list[str] = []
    pings, pongs = Received(pong, "ping"), Received(ping, "pong")
    pong.on("ping")(lambda sender, n: send(pong, "pong", n=n + 1))
    ping.on("pong")(lambda sender, n: send(ping, "ping", n=n + 1))

    def note(service: str, error: Exception, **rest: object) -> None:
        failures.append(f"{service}: {type(error).__name__}")

    with signals.receiver_failed.connected_to(note):
        listen(ping, pong)
        send(ping, "ping", n=0)
        wait_until(lambda: failures, what="the circle is broken")

    assert failures == ["pong: HopLimitError"]
    assert pings.values == [0, 2, 4, 6]
    assert pongs.values == [1, 3, 5]


def test_coroutine_functions_can_be_receivers(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    seen = []

    @audit.on("tick")
    async def receive(sender: str, n: int) -> None:
        await asyncio.sleep(0)
        event = handling.get()
        seen.append((sender, n, event is not None and event.seq))

    listen(audit)
    send(shop, "tick", n=7)
    send(shop, "tick", n=8)

    wait_until(lambda: len(seen) == 2, what="both are handled")
    assert seen == [("shop", 7, 1), ("shop", 8, 2)]


def test_a_receiver_that_raises_does_not_stop_the_others(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")

    @audit.on("tick")
    def fail(sender: str, n: int) -> None:
        raise SystemExit if n == 1 else ValueError(n)

    @audit.on("tick")
    def misfit(sender: str, number: int) -> None:
        pytest.fail("the payload does not fit")

    received = Received(audit, "tick")
    listen(audit)

    for n in range(3):
        send(shop, "tick", n=n)

    received.wait(3)
    wait_until(lambda: audit.health().counts.get("failed") == 6, what="six failures")
    assert received.values == [0, 1, 2]
    assert audit.health().connected


def test_an_event_without_a_receiver_is_skipped_and_counted(make: Make) -> None:
    shop = make("shop", publish=["*"])
    audit = make("audit", subscribe=["tick", "tock"])
    calls = []
    audit.signal("tock").connect(lambda sender: calls.append(sender), weak=False)
    listen(audit)

    send(shop, "tick")
    send(shop, "tock")

    wait_until(lambda: calls, what="the next event arrives")
    assert audit.health().counts["unknown"] == 1


def test_flask_receivers_run_in_an_app_context(url: str, prefix: str, make: Make) -> None:
    shop = make("shop", publish=["tick"])
    bus, app = EventBus(), Flask("mailer")
    app.config.from_mapping(EVENTBUS_SERVICE="mailer", EVENTBUS_URL=url, EVENTBUS_PREFIX=prefix)
    bus.init_app(app)
    names, ends = [], []
    app.teardown_appcontext(lambda error: ends.append(error))

    @bus.on("tick")
    def receive(sender: str) -> None:
        names.append((sender, current_app.name))

    bus.start()
    assert bus.ready(10)
    send(shop, "tick")
    wait_until(lambda: ends, what="the context is torn down")

    assert names == [("shop", "mailer")]
    assert ends == [None]
    bus.stop()


# -- what is declared late ----------------------------------------------------------------


def test_a_receiver_connected_late_receives_later_events(make: Make) -> None:
    shop, audit = make("shop", publish=["*"]), make("audit")
    early = Received(audit, "tick")
    listen(audit)
    send(shop, "tock", n=0)
    assert shop.flush(5)

    tock, patterned = Received(audit, "tock"), Received(audit, "o*")
    assert audit.ready(10)
    send(shop, "tock", n=1)
    send(shop, "other", n=2)
    send(shop, "tick", n=3)

    early.wait()
    assert tock.values == [1]
    assert patterned.values == [2]


def test_a_bus_starts_to_listen_with_its_first_subscription(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    audit.start()

    received = Received(audit, "tick")
    assert audit.ready(10)
    send(shop, "tick", n=1)

    received.wait()


def test_no_event_is_lost_when_a_name_is_subscribed_beside_its_pattern(make: Make) -> None:
    shop, audit = make("shop", publish=["*"]), make("audit")
    every = Received(audit, "*")
    listen(audit)
    count = 0

    for n in range(30):
        for _ in range(20):
            send(shop, f"tick_{n}", n=count)
            count += 1

        Received(audit, f"tick_{n}")

    every.wait(count)
    assert every.values == list(range(count))
    assert audit.health().missed == 0


def test_a_signal_is_published_as_soon_as_its_route_is_declared(make: Make) -> None:
    shop, audit = make("shop"), make("audit")
    received = Received(audit, "tick")
    listen(audit)

    send(shop, "tick", n=1)
    shop.publishes("tick")
    send(shop, "tick", n=2)

    received.wait()
    assert received.values == [2]


def test_a_route_can_rename_a_signal_and_replace_its_payload(make: Make) -> None:
    saved = blinker.Signal()
    shop, audit = make("shop"), make("audit")

    def summary(sender: Any, model: dict[str, Any]) -> dict[str, Any] | None:
        return {"n": model["id"]} if model["public"] else None

    shop.publishes(saved, as_="model_saved", payload=summary)
    shop.publishes("tick", as_="tock")
    received = Received(audit, "*")
    listen(audit)

    saved.send(object(), model={"id": 1, "public": False, "live": object()})
    saved.send(object(), model={"id": 2, "public": True, "live": object()})
    send(shop, "tick", n=3)

    received.wait(2)
    assert [(event.name, event.payload["n"]) for event in received.events] == [
        ("model_saved", 2),
        ("tock", 3),
    ]


# -- stopping and starting ----------------------------------------------------------------


def test_a_stopped_bus_can_be_started_again(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    received = Received(audit, "tick")
    listen(audit)
    send(shop, "tick", n=1)
    received.wait(1)

    audit.stop()
    send(shop, "tick", n=2)
    assert shop.flush(5)
    listen(audit)
    send(shop, "tick", n=3)

    received.wait(2)
    assert received.values == [1, 3]


def test_a_bus_can_be_stopped_while_events_arrive(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    received = Received(audit, "tick")
    enough = threading.Event()

    def pour() -> None:
        for n in itertools.count():
            send(shop, "tick", n=n)
            if enough.is_set():
                return

    pouring = threading.Thread(target=pour)
    pouring.start()

    for _ in range(10):
        listen(audit)
        received.wait(len(received.events) + 1)
        audit.stop()

    enough.set()
    pouring.join()
    assert received.values == sorted(set(received.values))


def test_nothing_is_lost_when_a_bus_is_stopped_while_others_send(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    received = Received(audit, "tick")
    listen(audit)
    enough = threading.Event()
    sent: list[int] = []

    def pour() -> None:
        # No faster than fakeredis takes them: it is the stop that is tried, not the buffer.
        while not enough.wait(0.0005):
            send(shop, "tick", n=len(sent))
            sent.append(len(sent))

    pouring = threading.Thread(target=pour)
    pouring.start()

    for _ in range(3):
        shop.stop()

    enough.set()
    pouring.join()
    assert shop.flush(5)
    received.wait(len(sent))
    assert sorted(received.values) == sent
    assert shop.health().counts.get("dropped", 0) == 0


def test_a_flush_waits_only_for_earlier_events(make: Make) -> None:
    shop = make("shop", publish=["tick"])
    enough = threading.Event()

    def pour() -> None:
        while not enough.is_set():
            send(shop, "tick")

    pouring = threading.Thread(target=pour)
    pouring.start()

    try:
        assert all(shop.flush(5) for _ in range(3))
    finally:
        enough.set()
        pouring.join()


def test_sent_events_are_published_when_a_with_block_ends(make: Make) -> None:
    audit = make("audit")
    received = Received(audit, "tick")
    listen(audit)

    with make("script", publish=["tick"]) as script:
        for n in range(500):
            send(script, "tick", n=n)

    received.wait(500)
    assert received.values == list(range(500))


def test_events_that_had_arrived_are_handled_before_stop_returns(make: Make) -> None:
    shop, audit = make("shop", publish=["tick"]), make("audit")
    received = Received(audit, "tick")
    listen(audit)

    for n in range(200):
        send(shop, "tick", n=n)
    wait_until(lambda: audit.health().counts.get("received") == 200, what="all have arrived")
    audit.stop()

    assert received.values == list(range(200))


def test_a_disabled_bus_neither_publishes_nor_listens(make: Make) -> None:
    off = make("off", publish=["tick"], enabled=False)
    shop, audit = make("shop", publish=["tick"]), make("audit")
    received, local = Received(audit, "tick"), []
    off.on("tick")(lambda sender, n: local.append((sender, n)))
    off.start()
    listen(audit)

    send(off, "tick", n=1)
    assert off.flush(5)
    send(shop, "tick", n=2)

    received.wait()
    assert received.values == [2]
    assert local == [(None, 1)]
    assert not off.health().listening


def test_a_confirmed_event_is_in_redis_when_send_returns(make: Make) -> None:
    shop = make("shop")
    shop.publishes("tick", confirm=True)

    send(shop, "tick", n=1)

    assert shop.health().counts["published"] == 1
    assert shop.health().buffered == 0


# -- what others publish ------------------------------------------------------------------


class Foreign:
    """A program that writes events by itself, byte by byte."""

    def __init__(self, url: str, prefix: str, bus: Bus) -> None:
        self._pipe = Pipe(Connections(url, name="foreign"), timeout=5.0)
        self._keys = ChannelKeys(prefix)
        self._codec = bus.node.codec
        self._numbers = itertools.count(1)

    def publish(self, name: str, seq: int | None, **payload: Any) -> bytes:
        """Publish one event and return its bytes."""
        event = Event(
            name=name,
            source="foreign",
            id=f"foreign-{seq or next(self._numbers)}",
            time=datetime.now(UTC),
            seq=seq,
            payload=payload,
        )
        return self.repeat(name, self._codec.encode(event))

    def repeat(self, name: str, body: bytes) -> bytes:
        self._pipe.ask("PUBLISH", self._keys.key(name), body)

        return body

    def close(self) -> None:
        self._pipe.close()


@pytest.fixture
def foreign(url: str, prefix: str, make: Make) -> Iterator[Foreign]:
    """A foreign program on the test's server."""
    program = Foreign(url, prefix, make("codec"))
    yield program
    program.close()


def test_a_repetition_is_dropped(make: Make, foreign: Foreign) -> None:
    audit = make("audit")
    received = Received(audit, "tick")
    listen(audit)

    first, second = (foreign.publish("tick", seq, n=seq) for seq in (1, 2))
    foreign.repeat("tick", second)
    foreign.repeat("tick", first)
    foreign.publish("tick", 3, n=3)

    received.wait(3)
    assert received.values == [1, 2, 3]
    assert audit.health().counts["duplicates"] == 2
    assert audit.health().missed == 0


def test_missed_events_are_counted_exactly(
    make: Make, foreign: Foreign, caplog: pytest.LogCaptureFixture
) -> None:
    audit = make("audit")
    received = Received(audit, "tick")
    reported: list[tuple[str, int]] = []

    def note(service: str, name: str, count: int, **rest: object) -> None:
        reported.append((name, count))

    with signals.events_missed.connected_to(note), caplog.at_level(logging.WARNING):
        listen(audit)

        for seq in (5, 6, 9, 10, 20):
            foreign.publish("tick", seq, n=seq)

        received.wait(5)
        wait_until(wait_until_sent, what="all receivers have run")

    assert received.values == [5, 6, 9, 10, 20]
    assert reported == [("tick", 2), ("tick", 9)]
    assert audit.health().missed == 11


def test_a_program_that_does_not_count_its_events_can_publish(make: Make, foreign: Foreign) -> None:
    audit = make("audit")
    received = Received(audit, "tick")
    listen(audit)

    for n in range(3):
        foreign.publish("tick", None, n=n)

    received.wait(3)
    assert received.values == [0, 1, 2]
