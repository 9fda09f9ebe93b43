"""Tests of analytics: its counts, and its page."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import pytest
from flask.testing import FlaskClient

from flask_eventbus.testing import Isolation

#: A moment, in seconds since the epoch, in the middle of a second.
NOW = 1_800_000_000.5


def test_calls_are_counted_by_service(client: FlaskClient, eventbus: Isolation) -> None:
    deliver(eventbus, "accounts")
    deliver(eventbus, "accounts")
    deliver(eventbus, "catalog")

    services = client.get("/counts.json").get_json()["services"]

    assert [(one["name"], one["total"]) for one in services] == [("accounts", 2), ("catalog", 1)]


def test_a_call_is_shown_in_the_second_in_which_it_was_made(
    client: FlaskClient, eventbus: Isolation
) -> None:
    made = datetime.now(UTC) - timedelta(seconds=5)
    deliver(eventbus, "accounts", time=made)

    counts = client.get("/counts.json").get_json()

    [service] = counts["services"]
    second = int(made.timestamp()) - counts["now"]
    assert service["per_second"][second] == 1
    assert sum(service["per_second"]) == 1


def test_the_current_second_is_not_shown_yet(analytics: ModuleType) -> None:
    now = NOW
    calls = analytics.Calls(clock=lambda: now)
    add(calls, at=NOW)

    assert sum(only(calls)["per_second"]) == 0

    now += 1
    assert only(calls)["per_second"] == [0] * 59 + [1]


def test_a_call_of_long_ago_counts_only_in_the_total(analytics: ModuleType) -> None:
    calls = analytics.Calls(clock=lambda: NOW)

    add(calls, at=NOW - 61)

    assert only(calls)["total"] == 1
    assert sum(only(calls)["per_second"]) == 0


def test_a_call_from_a_clock_that_is_ahead_counts_now(analytics: ModuleType) -> None:
    now = NOW
    calls = analytics.Calls(clock=lambda: now)

    add(calls, at=NOW + 3600)

    now += 1
    assert only(calls)["per_second"][-1] == 1


def test_a_minute_later_nothing_is_shown_but_the_total(analytics: ModuleType) -> None:
    now = NOW
    calls = analytics.Calls(clock=lambda: now)
    add(calls, at=NOW)

    now += 61

    assert only(calls)["total"] == 1
    assert sum(only(calls)["per_second"]) == 0
    assert only(calls)["median"] is None
    assert calls.summary()["rules"] == []


def test_median_and_95_percent_are_times_that_were_measured(analytics: ModuleType) -> None:
    calls = analytics.Calls(clock=lambda: NOW)

    for milliseconds in range(100, 0, -1):
        add(calls, milliseconds=milliseconds)

    assert only(calls)["median"] == 50
    assert only(calls)["p95"] == 95


def test_one_call_is_its_own_median(analytics: ModuleType) -> None:
    calls = analytics.Calls(clock=lambda: NOW)

    add(calls, milliseconds=0)

    assert (only(calls)["median"], only(calls)["p95"]) == (0, 0)


def test_calls_beyond_those_that_are_timed_are_counted(
    analytics: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analytics, "MOST_TIMES", 3)
    calls = analytics.Calls(clock=lambda: NOW)

    for milliseconds in (1, 2, 3, 100, 100, 100, 100):
        add(calls, milliseconds=milliseconds)

    assert sum(only(calls)["per_second"]) == 7
    assert only(calls)["p95"] == 3


def test_answers_of_500_and_above_are_failures(analytics: ModuleType) -> None:
    calls = analytics.Calls(clock=lambda: NOW)

    for status in (200, 404, 499, 500, 503):
        add(calls, status=status)

    assert only(calls)["failures"] == 2


def test_the_busiest_rules_come_first(client: FlaskClient, eventbus: Isolation) -> None:
    made = datetime.now(UTC) - timedelta(seconds=5)
    deliver(eventbus, "accounts", time=made, rule="/register", method="POST")
    deliver(eventbus, "catalog", time=made)
    deliver(eventbus, "catalog", time=made)

    assert client.get("/counts.json").get_json()["rules"] == [
        {"service": "catalog", "rule": "GET /products/<sku>", "calls": 2},
        {"service": "accounts", "rule": "POST /register", "calls": 1},
    ]


def test_services_beyond_the_colours_are_counted_together(analytics: ModuleType) -> None:
    calls = analytics.Calls(clock=lambda: NOW)

    for number in range(20):
        add(calls, service=f"service-{number}")

    totals = {one["name"]: one["total"] for one in calls.summary()["services"]}
    assert len(totals) == analytics.MOST_SERVICES + 1
    assert totals[analytics.OTHERS] == 20 - analytics.MOST_SERVICES


@pytest.mark.parametrize("milliseconds", [-1, math.nan, math.inf, "12", None])
def test_an_invalid_time_is_refused_and_not_counted(
    client: FlaskClient, eventbus: Isolation, milliseconds: Any
) -> None:
    with pytest.raises((TypeError, ValueError)):
        deliver(eventbus, "accounts", milliseconds=milliseconds)

    assert client.get("/counts.json").get_json()["services"] == []


def test_a_status_that_is_not_a_number_is_not_counted(
    client: FlaskClient, eventbus: Isolation
) -> None:
    with pytest.raises(TypeError):
        deliver(eventbus, "accounts", status="200")

    assert client.get("/counts.json").get_json()["services"] == []


def test_the_page_fetches_nothing_but_the_counts(client: FlaskClient) -> None:
    page = client.get("/").get_data(as_text=True)

    assert set(re.findall(r'fetch\("([^"]+)"', page)) == {"counts.json"}
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script[^>]+src|<link[^>]+stylesheet|@import|url\(", page)


def test_the_page_has_a_colour_for_each_service(client: FlaskClient, analytics: ModuleType) -> None:
    page = client.get("/").get_data(as_text=True)

    for number in range(analytics.MOST_SERVICES):
        # One for light mode, one for dark mode.
        assert len(re.findall(rf"--c{number}: #", page)) == 2


def test_the_page_does_not_count_itself(client: FlaskClient, eventbus: Isolation) -> None:
    client.get("/")
    client.get("/counts.json")

    eventbus.assert_not_published()
    assert client.get("/counts.json").get_json()["services"] == []


def test_a_service_with_listen_false_is_healthy(client: FlaskClient) -> None:
    answer = client.get("/health")

    assert answer.status_code == 200
    assert answer.get_json()["listening"] is False


def deliver(
    eventbus: Isolation, source: str, *, time: datetime | None = None, **payload: Any
) -> None:
    """Act as a service that answered a request."""
    call = {"method": "GET", "rule": "/products/<sku>", "status": 200, "milliseconds": 1.5}
    eventbus.deliver("api_call", source=source, time=time, payload=call | payload)


def add(calls: Any, **values: Any) -> None:
    """Count a call made a second ago."""
    call = {"service": "catalog", "rule": "GET /", "status": 200, "milliseconds": 1}
    calls.add(**call | {"at": NOW - 1} | values)


def only(calls: Any) -> Any:
    """Return the counts of the only service."""
    [service] = calls.summary()["services"]
    return service
