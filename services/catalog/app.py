"""A catalog whose workers cache prices, and drop a price the moment any of them changes it."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from flask import Flask, Response, abort, current_app, g, json, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from flask_eventbus import EventBus
from flask_eventbus.signals import (
    events_dropped,
    events_missed,
    listener_connected,
    listener_lost,
)

#: Seconds a cached price is served at most: the net below the events. A worker that dies between
#: its commit and its event tells nobody.
MAX_AGE = 30.0

TABLE = """\
CREATE TABLE IF NOT EXISTS products
(sku TEXT PRIMARY KEY, price TEXT NOT NULL, changed_at TEXT)
"""

#: What a new store begins with.
PRODUCTS = {"A1": "12.50", "B2": "8.00", "C3": "149.90"}

#: "12.50", "8", "0.5".
PRICE = re.compile(r"[0-9]{1,7}(\.[0-9]{1,2})?")

bus = EventBus()
price_changed = bus.signal("price_changed")


class PriceCache:
    """One worker's prices, kept only while it hears of every change."""

    def __init__(self, *, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, tuple[Decimal, float]] = {}
        self._changes = 0
        self._open = False

    def get(self, sku: str, load: Callable[[str], Decimal | None]) -> tuple[Decimal | None, bool]:
        """The price, and whether it was cached; ``load`` reads the store where it was not."""
        now = self._clock()

        with self._lock:
            changes = self._changes
            price, until = self._entries.get(sku, (None, now))

        if now < until:
            return price, True

        price = load(sku)

        if price is not None:
            self._keep(sku, price, until=now + MAX_AGE, changes=changes)

        return price, False

    def forget(self, sku: str) -> None:
        """Drop one price, which has changed."""
        with self._lock:
            self._changes += 1
            self._entries.pop(sku, None)

    def empty(self) -> None:
        """Drop every price: some change may have passed unheard."""
        with self._lock:
            self._changes += 1
            self._entries.clear()

    def open(self) -> None:
        """Begin to keep prices: changes are heard from now on."""
        with self._lock:
            # What is being read from the store now may have changed before.
            self._changes += 1
            self._open = True

    def close(self) -> None:
        """Keep nothing until changes are heard again."""
        with self._lock:
            self._open = False
            self._entries.clear()

    def _keep(self, sku: str, price: Decimal, *, until: float, changes: int) -> None:
        with self._lock:
            # A change that was heard while the store was read may not be in what was read.
            if self._open and changes == self._changes:
                self._entries[sku] = (price, until)


cache = PriceCache()


@bus.on("price_changed", via="channel")
def forget_price(sender: object, sku: str, **extra: object) -> None:
    """Drop a price from the cache, after a change by this worker or another one."""
    cache.forget(sku)


@listener_connected.connect
def hears_again(sender: object, **extra: object) -> None:
    cache.open()


@listener_lost.connect
def hears_nothing(sender: object, **extra: object) -> None:
    cache.close()


@events_missed.connect
@events_dropped.connect
def has_missed_events(sender: object, **extra: object) -> None:
    cache.empty()


def create_app(settings: Mapping[str, Any] | None = None) -> Flask:
    """The service; ``settings`` go before those of the environment."""
    app = Flask(__name__)
    app.config.from_mapping(
        CATALOG_DATABASE=str(Path(app.instance_path) / "catalog.db"),
        EVENTBUS_SERVICE="catalog",
        EVENTBUS_URL="redis://localhost:6379/0",
        EVENTBUS_PUBLISH={
            # Confirmed: when a PUT is answered, Redis has told the other workers.
            "price_changed": {"via": "channel", "confirm": True},
            "api_call": {"signal": "flask:request_finished", "payload": api_call},
        },
    )
    app.config.from_prefixed_env()
    app.config.from_mapping(settings or {})
    app.before_request(start_clock)
    app.register_error_handler(HTTPException, as_json)
    bus.init_app(app)
    app.cli.command("init-db")(init_db)

    @app.get("/products/<sku>")
    def show(sku: str) -> ResponseReturnValue:
        price, cached = cache.get(sku, read_price)

        if price is None:
            abort(404, f"There is no product {sku!r}.")

        return {"sku": sku, "price": str(price), "cached": cached, "worker": os.getpid()}

    @app.put("/products/<sku>/price")
    def change_price(sku: str) -> ResponseReturnValue:
        price, now = requested_price(), datetime.now(UTC)

        if not write_price(sku, price, now):
            abort(404, f"There is no product {sku!r}.")

        # After the commit: whoever hears of it and reads the store must find the new price.
        price_changed.send(app, sku=sku, price=price, changed_at=now)
        return {"sku": sku, "price": str(price), "worker": os.getpid()}

    @app.get("/health")
    def health() -> ResponseReturnValue:
        # Healthy with Redis away, too: every price then comes from the store.
        node = bus.health()
        return {
            "service": node.service,
            "listening": node.listening,
            "connected": node.connected,
            "missed": node.missed,
            "publishing": node.publishing,
            "buffered": node.buffered,
        }

    return app


def requested_price() -> Decimal:
    body = request.get_json(silent=True)
    price = body.get("price") if isinstance(body, dict) else None

    # Text, since a number in JSON becomes a float, which is no exact amount.
    if not isinstance(price, str) or not PRICE.fullmatch(price):
        abort(400, 'Send a price as text, with at most two decimals: {"price": "12.50"}.')

    return Decimal(price).quantize(Decimal("0.01"))


def as_json(error: HTTPException) -> ResponseReturnValue:
    """An error as JSON, with the headers it came with."""
    response = error.get_response()
    response.set_data(json.dumps({"error": error.description}))
    response.content_type = "application/json"
    return response


def open_store() -> closing[sqlite3.Connection]:
    """The file that all workers share."""
    return closing(sqlite3.connect(current_app.config["CATALOG_DATABASE"]))


def init_db() -> None:
    """Make the store unless it is there: a step of each deployment."""
    Path(current_app.config["CATALOG_DATABASE"]).parent.mkdir(parents=True, exist_ok=True)

    with open_store() as store, store:
        store.execute("PRAGMA journal_mode = WAL")
        store.execute(TABLE)
        store.executemany("INSERT OR IGNORE INTO products VALUES (?, ?, NULL)", PRODUCTS.items())


def read_price(sku: str) -> Decimal | None:
    with open_store() as store:
        row = store.execute("SELECT price FROM products WHERE sku = ?", (sku,)).fetchone()

    return Decimal(row[0]) if row else None


def write_price(sku: str, price: Decimal, changed_at: datetime) -> bool:
    """Commit the price; return False if there is no such product."""
    update = "UPDATE products SET price = ?, changed_at = ? WHERE sku = ?"

    with open_store() as store, store:
        return store.execute(update, (str(price), changed_at.isoformat(), sku)).rowcount == 1


def start_clock() -> None:
    g.started = perf_counter()


def api_call(sender: Flask, response: Response, **extra: object) -> dict[str, Any] | None:
    """Return the payload for a finished request; ``None`` for a health check."""
    if request.endpoint == "health":
        return None

    return {
        "method": request.method,
        "rule": request.url_rule.rule if request.url_rule else "(none)",
        "status": response.status_code,
        "milliseconds": round((perf_counter() - g.started) * 1000, 3),
    }
