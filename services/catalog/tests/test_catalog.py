"""Tests of one worker of catalog: its answers, its store, its cache and its events."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flask.testing import FlaskClient

from flask_eventbus.signals import (
    events_dropped,
    events_missed,
    listener_connected,
    listener_lost,
)
from flask_eventbus.testing import Isolation


def test_a_price_is_cached_once_the_subscription_is_ready(client: FlaskClient) -> None:
    connect()

    assert get(client) == ("12.50", False)
    assert get(client) == ("12.50", True)


def test_a_price_comes_from_the_store_until_the_subscription_is_ready(client: FlaskClient) -> None:
    assert get(client) == ("12.50", False)
    assert get(client) == ("12.50", False)


def test_a_change_is_stored_and_published(client: FlaskClient, eventbus: Isolation) -> None:
    answer = put(client, "13.5")

    assert answer.status_code == 200
    assert get(client) == ("13.50", False)
    [event] = eventbus.assert_published("price_changed", sku="A1", price=Decimal("13.50"))
    assert datetime.now(UTC) - event.payload["changed_at"] < timedelta(minutes=1)


def test_the_event_leaves_after_the_commit(
    client: FlaskClient, catalog: ModuleType, database: str
) -> None:
    stored = []

    def look(sender: object, **payload: object) -> None:
        stored.append(price_in(database))

    with catalog.price_changed.connected_to(look):
        put(client, "13.00")

    assert stored == ["13.00"]


def test_the_worker_that_changes_a_price_serves_the_new_one(client: FlaskClient) -> None:
    connect()
    get(client)

    put(client, "13.00")

    assert get(client) == ("13.00", False)
    assert get(client) == ("13.00", True)


def test_a_change_by_another_worker_drops_the_price(
    client: FlaskClient, eventbus: Isolation, database: str
) -> None:
    connect()
    get(client)
    store(database, "14.00")

    eventbus.deliver(
        "price_changed",
        source="catalog",
        sku="A1",
        price=Decimal("14.00"),
        changed_at=datetime.now(UTC),
    )

    assert get(client) == ("14.00", False)


def test_a_change_leaves_other_prices_in_the_cache(client: FlaskClient) -> None:
    connect()
    get(client, "B2")

    put(client, "13.00")

    assert get(client, "B2") == ("8.00", True)


def test_a_lost_connection_empties_the_cache(client: FlaskClient, database: str) -> None:
    connect()
    get(client)

    listener_lost.send("catalog", error=ConnectionError("gone"))
    store(database, "14.00")

    assert get(client) == ("14.00", False)
    assert get(client) == ("14.00", False)


def test_the_cache_begins_empty_after_a_lost_connection(client: FlaskClient, database: str) -> None:
    connect()
    get(client)

    # Lost and regained before anyone asked.
    listener_lost.send("catalog", error=ConnectionError("gone"))
    store(database, "14.00")
    connect(reconnected=True)

    assert get(client) == ("14.00", False)
    assert get(client) == ("14.00", True)


@pytest.mark.parametrize(
    "lose",
    [
        lambda: events_missed.send(
            "catalog", name="price_changed", source="catalog", node="n", count=1
        ),
        lambda: events_dropped.send("catalog", where="inbox", count=1),
    ],
    ids=["missed", "dropped"],
)
def test_events_that_never_arrived_empty_the_cache(
    client: FlaskClient, database: str, lose: Callable[[], object]
) -> None:
    connect()
    get(client)
    store(database, "14.00")

    lose()

    assert get(client) == ("14.00", False)


def test_a_change_while_the_store_is_read_leaves_no_old_price_behind(catalog: ModuleType) -> None:
    cache = catalog.PriceCache()
    cache.open()

    def load(sku: str) -> Decimal:
        cache.forget(sku)
        return Decimal("12.50")

    assert cache.get("A1", load) == (Decimal("12.50"), False)
    assert cache.get("A1", lambda sku: Decimal("13.00")) == (Decimal("13.00"), False)


def test_a_connection_lost_while_the_store_is_read_leaves_no_old_price_behind(
    catalog: ModuleType,
) -> None:
    cache = catalog.PriceCache()
    cache.open()

    def load(sku: str) -> Decimal:
        cache.close()
        cache.open()
        return Decimal("12.50")

    cache.get("A1", load)

    assert cache.get("A1", lambda sku: Decimal("13.00")) == (Decimal("13.00"), False)


def test_prices_read_before_the_subscription_was_ready_are_not_cached(catalog: ModuleType) -> None:
    cache = catalog.PriceCache()

    def load(sku: str) -> Decimal:
        cache.open()
        return Decimal("12.50")

    cache.get("A1", load)

    assert cache.get("A1", lambda sku: Decimal("13.00")) == (Decimal("13.00"), False)


def test_no_price_is_served_from_the_cache_beyond_its_age(catalog: ModuleType) -> None:
    now = 100.0
    cache = catalog.PriceCache(clock=lambda: now)
    cache.open()
    cache.get("A1", lambda sku: Decimal("12.50"))

    now += catalog.MAX_AGE - 1
    assert cache.get("A1", lambda sku: Decimal("13.00")) == (Decimal("12.50"), True)

    now += 1
    assert cache.get("A1", lambda sku: Decimal("13.00")) == (Decimal("13.00"), False)


def test_a_free_product_is_cached_as_well(client: FlaskClient) -> None:
    connect()
    put(client, "0")

    assert get(client) == ("0.00", False)
    assert get(client) == ("0.00", True)


@pytest.mark.parametrize(
    "price", [12.5, 12, None, "", "-1", "12.505", "1e3", "NaN", "12,50", "١٢", "12.50\n", ["1"]]
)
def test_an_invalid_price_is_refused(client: FlaskClient, eventbus: Isolation, price: Any) -> None:
    answer = put(client, price)

    assert answer.status_code == 400
    assert "at most two decimals" in answer.get_json()["error"]
    assert get(client) == ("12.50", False)
    eventbus.assert_not_published("price_changed")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"12.50"'])
def test_a_body_that_is_not_a_json_object_is_refused(client: FlaskClient, body: bytes) -> None:
    answer = client.put("/products/A1/price", data=body, content_type="application/json")

    assert answer.status_code == 400


def test_an_unknown_product_is_not_found(client: FlaskClient, eventbus: Isolation) -> None:
    asked = client.get("/products/Z9")
    changed = put(client, "1.00", "Z9")

    assert (asked.status_code, changed.status_code) == (404, 404)
    assert changed.get_json() == {"error": "There is no product 'Z9'."}
    eventbus.assert_not_published("price_changed")


def test_a_price_changes_while_redis_is_away(client: FlaskClient, eventbus: Isolation) -> None:
    with eventbus.redis_away():
        assert put(client, "13.00").status_code == 200
        assert get(client) == ("13.00", False)
        assert client.get("/health").status_code == 200

    eventbus.assert_published("price_changed", sku="A1", price=Decimal("13.00"))


def test_a_call_is_published_with_its_rule(client: FlaskClient, eventbus: Isolation) -> None:
    client.get("/products/A1")
    client.get("/products/Z9")
    client.get("/nowhere")

    rule = "/products/<sku>"
    eventbus.assert_published("api_call", times=1, method="GET", rule=rule, status=200)
    eventbus.assert_published("api_call", times=1, method="GET", rule=rule, status=404)
    [event] = eventbus.assert_published("api_call", rule="(none)", status=404)
    assert 0 < event.payload["milliseconds"] < 10_000


def test_a_health_check_is_not_published_as_a_call(
    client: FlaskClient, eventbus: Isolation
) -> None:
    answer = client.get("/health")

    assert answer.status_code == 200
    assert answer.get_json()["connected"] is False
    eventbus.assert_not_published()


def test_the_app_creates_no_store(catalog: ModuleType, database: str, eventbus: Isolation) -> None:
    catalog.create_app({"CATALOG_DATABASE": database})

    assert not Path(database).exists()


def test_an_existing_store_keeps_its_prices(client: FlaskClient, database: str) -> None:
    put(client, "13.00")

    client.application.test_cli_runner().invoke(args=["init-db"])

    assert price_in(database) == "13.00"


def connect(*, reconnected: bool = False) -> None:
    """Emit the signal of the bus that every subscription is confirmed."""
    listener_connected.send("catalog", reconnected=reconnected, seconds=0.0)


def get(client: FlaskClient, sku: str = "A1") -> tuple[str, bool]:
    answer = client.get(f"/products/{sku}").get_json()
    return answer["price"], answer["cached"]


def put(client: FlaskClient, price: Any, sku: str = "A1") -> Any:
    return client.put(f"/products/{sku}/price", json={"price": price})


def store(database: str, price: str) -> None:
    """Change a price as another worker does."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE products SET price = ? WHERE sku = 'A1'", (price,))


def price_in(database: str) -> str:
    with closing(sqlite3.connect(database)) as connection:
        [price] = connection.execute("SELECT price FROM products WHERE sku = 'A1'").fetchone()

    return str(price)
