"""What mailer does when it hears of a user."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_eventbus import Bus
from flask_eventbus.testing import Isolation

ADA: dict[str, Any] = {"user_id": 7, "email": "ada@example.com", "name": "Ada Łovelace 李"}


def readers(folder: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(folder / "newsletter.db")) as file:
        return list(file.execute("SELECT email, name FROM reader"))


def test_a_new_user_gets_a_welcome_mail(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any
) -> None:
    client = make_app(MAIL_PORT=sink.port).test_client()

    eventbus.deliver("user_registered", source="accounts", **ADA)

    [mail] = sink.mails()
    assert mail["from"] == "accounts@example.com"
    assert mail["to"] == ["ada@example.com"]
    assert mail["subject"] == "Welcome, Ada Łovelace 李"
    assert mail["text"].startswith("Hello Ada Łovelace 李,")
    assert client.get("/").get_json()["mails_sent"] == 1


def test_the_mail_bears_the_id_of_the_event(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any
) -> None:
    make_app(MAIL_PORT=sink.port)

    event = eventbus.deliver("user_registered", source="accounts", **ADA)

    assert sink.mails()[0]["message_id"] == f"<{event.id}@accounts>"


def test_the_plug_in_puts_a_new_user_on_its_list_once(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any, tmp_path: Path
) -> None:
    make_app(MAIL_PORT=sink.port)

    eventbus.deliver("user_registered", source="accounts", **ADA)
    eventbus.deliver("user_registered", source="accounts", **ADA)

    assert readers(tmp_path) == [(ADA["email"], ADA["name"])]


def test_the_plug_in_of_the_readme_reacts_once_it_is_dropped_in(
    make_app: Callable[..., Flask],
    eventbus: Isolation,
    sink: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    readme = Path(__file__).parent.parent / "README.md"
    [code] = re.findall(r"```python\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)
    (tmp_path / "greet.py").write_text(code)
    make_app(EVENTBUS_RECEIVERS=[f"{tmp_path}/"], MAIL_PORT=sink.port)

    eventbus.deliver("user_registered", source="accounts", **ADA)

    assert "accounts tells of Ada Łovelace 李." in caplog.messages


def test_a_mail_that_fails_is_an_error_of_its_receiver(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any
) -> None:
    sink.stop()
    make_app(MAIL_PORT=sink.port)

    with pytest.raises(ConnectionRefusedError):
        eventbus.deliver("user_registered", source="accounts", **ADA)


def test_it_is_not_healthy_while_it_hears_nothing(
    make_app: Callable[..., Flask], mailer: Any, eventbus: Isolation
) -> None:
    app = make_app()

    with eventbus.redis_away():
        mailer.bus.start(app)
        health = app.test_client().get("/health")

    assert (health.status_code, health.get_json()["connected"]) == (503, False)


def test_a_mail_that_fails_is_counted_and_the_next_one_goes_out(
    service: Any, sink: Any, redis_url: str, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    sink.stop()

    with Bus(redis_url, service="accounts", publish=["user_registered"]) as bus:
        bus.signal("user_registered").send(**ADA)
        wait_until(lambda: service.get("/")[1] == {"mails_sent": 0, "receivers_failed": 1})

        sink.start()
        bus.signal("user_registered").send(user_id=8, email="zoë@example.com", name="Zoë")
        bus.signal("user_registered").send(user_id=9, email="bob@example.com", name="Bob")
        wait_until(lambda: service.get("/")[1]["mails_sent"] == 1)

    assert [mail["subject"] for mail in sink.mails()] == ["Welcome, Bob"]
    assert len(readers(tmp_path)) == 3
    assert "The receiver app.send_welcome failed at the event" in service.log.read_text()
