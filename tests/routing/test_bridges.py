"""Tests that a published signal behaves like any other for the program that sends it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import blinker
import pytest

from flask_eventbus import Bus, PayloadError

Make = Callable[..., Bus]


# -- the bus's own signals ----------------------------------------------------------------


def test_send_returns_only_the_results_of_the_programs_own_receivers(
    make_bus: Make,
) -> None:
    bus = make_bus("memory://bridges", publish=["order_checked"])

    def accept(sender: Any, **payload: Any) -> bool:
        return True

    bus.signal("order_checked").connect(accept)

    assert bus.signal("order_checked").send("shop", n=1) == [(accept, True)]
    assert all(accepted for _, accepted in bus.signal("order_checked").send("shop", n=1))
    assert bus.flush(5)
    assert bus.health().counts["published"] == 2


def test_a_route_is_not_listed_among_the_receivers_of_a_signal(make_bus: Make) -> None:
    bus = make_bus("memory://bridges")
    signal = bus.signal("order_checked")
    connected: list[Any] = []
    signal.receiver_connected.connect(lambda _, **values: connected.append(values), weak=False)

    bus.publishes("order_checked")

    assert not signal.receivers
    assert not signal.has_receivers_for("shop")
    assert not list(signal.receivers_for("shop"))
    assert connected == []
    assert signal.send("shop", n=1) == []
    assert bus.flush(5)
    assert bus.health().counts["published"] == 1


def test_a_muted_signal_is_not_published(make_bus: Make) -> None:
    bus = make_bus("memory://bridges", publish=["order_checked"])

    with bus.signal("order_checked").muted():
        assert bus.signal("order_checked").send("shop") == []
        assert asyncio.run(bus.signal("order_checked").send_async("shop")) == []

    assert bus.flush(5)
    assert "published" not in bus.health().counts


def test_disconnecting_all_receivers_of_a_signal_keeps_its_route(make_bus: Make) -> None:
    bus = make_bus("memory://bridges", publish=["order_checked"])
    signal = bus.signal("order_checked")
    bus.on("order_checked")(lambda sender: None)

    for receiver in list(signal.receivers_for("shop")):
        signal.disconnect(receiver)
    signal.send("shop")

    assert bus.flush(5)
    assert bus.health().counts["published"] == 1


@pytest.mark.parametrize("key", ["_async_wrapper", "_sync_wrapper"])
def test_a_payload_key_that_blinker_reserves_is_refused_before_any_receiver_runs(
    make_bus: Make, key: str
) -> None:
    bus = make_bus("memory://bridges", publish=["order_checked"])
    received: list[Any] = []
    bus.on("order_checked")(lambda sender, **payload: received.append(payload))
    signal = bus.signal("order_checked")

    payload: dict[str, Any] = {key: "a value", "n": 1}

    with pytest.raises(PayloadError, match="use these names"):
        signal.send("shop", **payload)
    with pytest.raises(PayloadError, match="use these names"):
        asyncio.run(signal.send_async("shop", **payload))

    assert received == []
    assert signal.send("shop", _async_wrapper=lambda receiver: receiver, n=1)
    assert received == [{"n": 1}]


# -- signals of others --------------------------------------------------------------------


def test_publishing_a_foreign_signal_does_not_change_what_send_returns(make_bus: Make) -> None:
    bus = make_bus("memory://bridges")
    signal = blinker.NamedSignal("order_paid")

    @signal.connect
    def receive(sender: Any, **payload: Any) -> bool:
        return True

    bus.publishes(signal)

    assert signal.send("shop", n=1) == [(receive, True)]
    assert bus.flush(5)
    assert bus.health().counts["published"] == 1


def test_a_foreign_signal_sent_only_if_it_has_receivers_is_still_published(
    make_bus: Make,
) -> None:
    bus = make_bus("memory://bridges")
    signal = blinker.NamedSignal("order_paid")

    bus.publishes(signal)

    assert signal.receivers
    assert signal.has_receivers_for("shop")


def test_receivers_of_a_foreign_signal_run_before_it_is_published(make_bus: Make) -> None:
    bus = make_bus("memory://bridges")
    signal = blinker.NamedSignal("order_paid")
    ran: list[int] = []

    def note(number: int) -> Callable[..., None]:
        return lambda sender, **payload: ran.append(number)

    bus.publishes(signal)
    for number in range(10):
        signal.connect(note(number), weak=False)

    with pytest.raises(PayloadError):
        signal.send("shop", value=object())

    assert sorted(ran) == list(range(10))


def test_send_async_publishes_a_foreign_signal_with_coroutine_receivers(
    make_bus: Make,
) -> None:
    bus = make_bus("memory://bridges")
    signal = blinker.NamedSignal("order_paid")

    @signal.connect
    async def receive(sender: Any, **payload: Any) -> int:
        return 1

    bus.publishes(signal)

    assert asyncio.run(signal.send_async("shop", n=1)) == [(receive, 1)]
    assert bus.flush(5)
    assert bus.health().counts["published"] == 1


def test_an_anonymous_signal_is_published_like_any_other(make_bus: Make) -> None:
    bus = make_bus("memory://bridges")
    signal = blinker.Signal()
    bus.publishes(signal, as_="order_paid")

    assert signal.send("shop", n=1) == []
    assert asyncio.run(signal.send_async("shop", n=1)) == []
    assert bus.flush(5)
    assert bus.health().counts["published"] == 2


def test_two_routes_can_publish_one_foreign_signal(make_bus: Make) -> None:
    signal = blinker.NamedSignal("order_paid")
    one, two = (make_bus("memory://bridges", name) for name in ("one", "two"))
    one.publishes(signal)
    two.publishes(signal, as_="paid")

    assert signal.send("shop", n=1) == []

    for bus in (one, two):
        assert bus.flush(5)
        assert bus.health().counts["published"] == 1


def test_a_foreign_signal_class_keeps_its_own_send(make_bus: Make) -> None:
    sent: list[Any] = []

    class Traced(blinker.NamedSignal):
        def send(self, *args: Any, **kwargs: Any) -> list[tuple[Callable[..., Any], Any]]:
            sent.append(args)
            return super().send(*args, **kwargs)

    bus = make_bus("memory://bridges")
    signal = Traced("order_paid")
    bus.publishes(signal)

    assert signal.send("shop", n=1) == []
    assert sent == [("shop",)]
    assert isinstance(signal, Traced)
    assert bus.flush(5)
    assert bus.health().counts["published"] == 1


# -- an adopted namespace -----------------------------------------------------------------


@pytest.fixture
def namespace() -> blinker.Namespace:
    return blinker.Namespace()


def test_a_coroutine_function_receives_signals_of_an_adopted_namespace(
    make_bus: Make, namespace: blinker.Namespace
) -> None:
    bus = make_bus("memory://bridges", namespace=namespace)

    @bus.on("ping")
    async def receive(sender: Any, **payload: Any) -> str:
        return "ran"

    assert namespace.signal("ping").send("shop") == [(receive, "ran")]
    assert asyncio.run(namespace.signal("ping").send_async("shop")) == [(receive, "ran")]


def test_a_pattern_connects_coroutine_functions_to_later_signals(
    make_bus: Make, namespace: blinker.Namespace
) -> None:
    bus = make_bus("memory://bridges", namespace=namespace, publish=["order_*"])

    @bus.on("order_*")
    async def receive(sender: Any, **payload: Any) -> str:
        return "ran"

    signal = namespace.signal("order_paid")
    bus.start()

    assert signal.send("shop") == [(receive, "ran")]
    assert bus.flush(5)
    assert bus.health().counts["published"] == 1


# -- an event loop ------------------------------------------------------------------------


def test_send_async_publishes_from_the_thread_of_the_event_loop_in_order(make_bus: Make) -> None:
    received: list[int] = []
    done = threading.Event()
    consumer = make_bus("memory://bridges-order", "consumer")

    @consumer.on("tick")
    def receive(sender: str, n: int) -> None:
        received.append(n)
        if n == 99:
            done.set()

    consumer.start()
    assert consumer.ready(5)
    bus = make_bus("memory://bridges-order", publish=["tick"])

    async def send_all() -> None:
        for n in range(100):
            await bus.signal("tick").send_async("shop", n=n)

    asyncio.run(send_all())

    assert done.wait(5)
    assert received == list(range(100))
