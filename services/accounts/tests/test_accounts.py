"""Tests of accounts: its answers, its database and its events."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import Request, urlopen

import pytest
from flask.testing import FlaskClient
from sqlalchemy.event import listens_for
from sqlalchemy.exc import OperationalError

from flask_eventbus import Bus
from flask_eventbus.testing import Isolation

ADA: dict[str, Any] = {"email": "ada@example.com", "name": "Ada Łovelace"}


def test_a_registration_is_stored_and_answered(client: FlaskClient) -> None:
    answer = client.post("/register", json=ADA)

    assert answer.status_code == 201
    assert answer.get_json().items() >= {"user_id": 1, **ADA}.items()
    assert client.get("/users/1").get_json() == answer.get_json()


def test_a_registration_is_published(client: FlaskClient, eventbus: Isolation) -> None:
    client.post("/register", json=ADA)

    eventbus.assert_published("user_registered", user_id=1, **ADA)


def test_the_time_of_registration_travels_with_its_time_zone(
    client: FlaskClient, eventbus: Isolation
) -> None:
    answer = client.post("/register", json=ADA)

    registered_at = datetime.fromisoformat(answer.get_json()["registered_at"])
    assert registered_at.utcoffset() == timedelta(0)
    assert datetime.now(UTC) - registered_at < timedelta(minutes=1)
    eventbus.assert_published("user_registered", registered_at=registered_at)


def test_a_registration_form_is_accepted_like_json(
    client: FlaskClient, eventbus: Isolation
) -> None:
    answer = client.post("/register", data={"email": " ADA@example.com ", "name": "Ada \t L."})

    assert answer.status_code == 201
    eventbus.assert_published("user_registered", email="ada@example.com", name="Ada L.")


def test_the_event_leaves_after_the_commit(
    client: FlaskClient, accounts: ModuleType, eventbus: Isolation
) -> None:
    before: list[Any] = []

    @listens_for(accounts.db.session, "before_commit")
    def look(session: object) -> None:
        before.extend(eventbus.published("user_registered"))

    client.post("/register", json=ADA)

    assert before == []
    eventbus.assert_published("user_registered", times=1)


def test_an_uncommitted_registration_is_not_published(
    client: FlaskClient, accounts: ModuleType, eventbus: Isolation
) -> None:
    @listens_for(accounts.db.session, "before_commit")
    def refuse(session: object) -> None:
        raise OperationalError("COMMIT", None, Exception("The disk is full."))

    assert client.post("/register", json=ADA).status_code == 500

    assert client.get("/users/1").status_code == 404
    eventbus.assert_not_published("user_registered")


def test_an_address_registers_once(client: FlaskClient, eventbus: Isolation) -> None:
    client.post("/register", json=ADA)

    answer = client.post("/register", json={"email": "Ada@Example.com", "name": "Another"})

    assert answer.status_code == 409
    assert answer.get_json() == {"error": "ada@example.com is registered already."}
    eventbus.assert_published("user_registered", times=1)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"name": "Ada"}, "'email' is not an address"),
        ({"email": "ada", "name": "Ada"}, "'email' is not an address"),
        ({"email": ["ada@example.com"], "name": "Ada"}, "'email' is not an address"),
        ({"email": "ada@example.com\nBcc: all@example.com", "name": "Ada"}, "not an address"),
        ({"email": f"ada@{'a' * 254}", "name": "Ada"}, "'email' is not an address"),
        ({"email": "ada@example.com"}, "'name' is missing"),
        ({"email": "ada@example.com", "name": " \n "}, "'name' is missing"),
        ({"email": "ada@example.com", "name": "A\x00da"}, "'name' is missing"),
        ({"email": "ada@example.com", "name": "\ud800"}, "'name' is missing"),
        ({"email": "ada@example.com", "name": 7}, "'name' is missing"),
        ({"email": "ada@example.com", "name": "a" * 201}, "'name' is missing"),
        (["ada@example.com"], "no JSON object"),
        ("ada@example.com", "no JSON object"),
    ],
)
def test_an_invalid_registration_is_refused_with_the_reason(
    client: FlaskClient, sent: object, words: str
) -> None:
    answer = client.post("/register", json=sent)

    assert answer.status_code == 400
    assert words in answer.get_json()["error"]


def test_a_body_that_is_not_json_is_refused(client: FlaskClient) -> None:
    answer = client.post("/register", data="{", content_type="application/json")

    assert answer.status_code == 400
    assert "no JSON object" in answer.get_json()["error"]


def test_an_unknown_user_is_not_found(client: FlaskClient) -> None:
    assert client.get("/users/1").status_code == 404
    assert client.get(f"/users/{2**64}").status_code == 404


def test_each_call_is_published_with_its_rule(client: FlaskClient, eventbus: Isolation) -> None:
    client.get("/users/7")
    client.get("/nowhere")

    rule = "/users/<int:user_id>"
    eventbus.assert_published("api_call", method="GET", rule=rule, status=404)
    eventbus.assert_published("api_call", method="GET", rule="(none)", status=404)


def test_a_health_check_is_not_published(client: FlaskClient, eventbus: Isolation) -> None:
    answer = client.get("/health")

    assert answer.status_code == 200
    eventbus.assert_not_published()


def test_users_register_while_redis_is_away(client: FlaskClient, eventbus: Isolation) -> None:
    with eventbus.redis_away():
        assert client.post("/register", json=ADA).status_code == 201

        # The user's event, and that of the call.
        health = client.get("/health")
        assert (health.status_code, health.get_json()["buffered"]) == (200, 2)

    eventbus.assert_published("user_registered", user_id=1)


def test_without_its_database_the_service_is_not_healthy(
    client: FlaskClient, accounts: ModuleType, tmp_path: Path
) -> None:
    with client.application.app_context():
        accounts.db.engine.dispose()

    (tmp_path / "accounts.db").unlink()
    (tmp_path / "accounts.db").mkdir()

    health = client.get("/health")
    assert (health.status_code, health.get_json()["database"]) == (503, False)


def test_without_its_table_the_service_is_not_healthy(
    accounts: ModuleType, database: str, eventbus: Isolation
) -> None:
    app = accounts.create_app({"SQLALCHEMY_DATABASE_URI": database})

    assert app.test_client().get("/health").status_code == 503

    with app.app_context():
        accounts.db.engine.dispose()


def test_another_process_receives_a_registration(
    address: str, redis_url: str, wait_until: Callable[..., Any]
) -> None:
    users: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []

    with Bus(redis_url, service="tests") as bus:
        bus.on("user_registered", from_="accounts")(lambda sender, **payload: users.append(payload))
        bus.on("api_call", from_="accounts")(lambda sender, **payload: calls.append(payload))
        bus.start()
        assert bus.ready(10)

        answer = post(f"{address}/register", ADA)
        wait_until(lambda: users and calls)

    registered_at = datetime.fromisoformat(answer.pop("registered_at"))
    assert users == [{**answer, "registered_at": registered_at}]
    assert calls[0].items() >= {"method": "POST", "rule": "/register", "status": 201}.items()


def post(url: str, body: object) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - the service's own

    with urlopen(request, timeout=10) as answer:  # noqa: S310 - the service's own
        content: dict[str, Any] = json.load(answer)

    return content
