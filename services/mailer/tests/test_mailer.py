"""Tests of mailer: the reactions to a new user."""

from __future__ import annotations

import re
import signal
import smtplib
import sqlite3
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from flask import Flask

from flask_eventbus import Bus, Reject
from flask_eventbus.testing import Isolation

ADA: dict[str, Any] = {"user_id": 7, "email": "ada@example.com", "name": "Ada Łovelace 李"}


def readers(folder: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(folder / "newsletter.db")) as file:
        return list(file.execute("SELECT email, name FROM reader"))


def test_a_new_user_gets_a_welcome_mail(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any
) -> None:
    client = make_app(MAIL_PORT=sink.port).test_client()

    eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    [mail] = sink.mails()
    assert mail["from"] == "accounts@example.com"
    assert mail["to"] == ["ada@example.com"]
    assert mail["subject"] == "Welcome, Ada Łovelace 李"
    assert mail["text"].startswith("Hello Ada Łovelace 李,")
    assert client.get("/").get_json()["mails_sent"] == 1


def test_the_mail_contains_the_id_of_the_event(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any
) -> None:
    make_app(MAIL_PORT=sink.port)

    event = eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert sink.mails()[0]["message_id"] == f"<{event.id}@accounts>"


def test_the_plug_in_puts_a_new_user_on_its_list_once(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any, tmp_path: Path
) -> None:
    make_app(MAIL_PORT=sink.port)

    eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)
    eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert readers(tmp_path) == [(ADA["email"], ADA["name"])]


def test_the_plug_in_of_the_readme_works_when_dropped_in(
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

    eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert "accounts tells of Ada Łovelace 李." in caplog.messages


def test_a_repeated_event_sends_no_second_mail(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any
) -> None:
    make_app(MAIL_PORT=sink.port)

    eventbus.deliver("user_registered", via="stream", source="accounts", id="0a1b2c3d4e5f-1", **ADA)
    eventbus.deliver("user_registered", via="stream", source="accounts", id="0a1b2c3d4e5f-1", **ADA)

    assert len(sink.mails()) == 1


def test_a_mail_that_could_not_be_recorded_is_not_sent_again(
    make_app: Callable[..., Flask],
    mailer: Any,
    eventbus: Isolation,
    sink: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_app(MAIL_PORT=sink.port)
    monkeypatch.setattr(mailer, "worker", full_disk)

    event = eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert len(sink.mails()) == 1
    assert f"The mail of the event {event.id} is sent, and not noted." in caplog.text


def full_disk() -> str:
    raise sqlite3.OperationalError("database or disk is full")


def test_a_failed_mail_asks_for_a_retry(
    make_app: Callable[..., Flask], eventbus: Isolation, sink: Any
) -> None:
    sink.stop()
    make_app(MAIL_PORT=sink.port)

    with pytest.raises(ConnectionRefusedError):
        eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)


@pytest.mark.parametrize(
    "payload",
    [{**ADA, "email": "zoë@example.com"}, {**ADA, "name": "Ada\nBcc: all@example.com"}],
    ids=["address", "name"],
)
def test_a_mail_that_cannot_be_composed_is_not_retried(
    make_app: Callable[..., Flask], eventbus: Isolation, payload: dict[str, Any]
) -> None:
    make_app()

    with pytest.raises(Reject, match="No mail can be written to 'Ada"):
        eventbus.deliver("user_registered", via="stream", source="accounts", **payload)


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (smtplib.SMTPRecipientsRefused({"ada@example.com": (550, b"no such user")}), True),
        (smtplib.SMTPRecipientsRefused({"ada@example.com": (451, b"try later")}), False),
        (smtplib.SMTPDataError(554, b"no"), True),
        (smtplib.SMTPDataError(452, b"the disk is full"), False),
        (smtplib.SMTPNotSupportedError("SMTPUTF8"), True),
        (smtplib.SMTPServerDisconnected("Connection unexpectedly closed"), False),
        (smtplib.SMTPAuthenticationError(535, b"wrong password"), False),
        (smtplib.SMTPSenderRefused(530, b"log in first", "accounts@example.com"), False),
        (smtplib.SMTPConnectError(554, b"no service today"), False),
    ],
    ids=["550", "451", "554", "452", "SMTPUTF8", "disconnected", "535", "530", "connect"],
)
def test_permanent_and_temporary_smtp_errors_are_distinguished(
    mailer: Any, error: smtplib.SMTPException, final: bool
) -> None:
    assert mailer.is_final(error) is final


def test_mails_share_a_connection_that_is_reopened_when_lost(
    make_app: Callable[..., Flask], eventbus: Isolation, smtp_server: Any
) -> None:
    make_app(MAIL_PORT=smtp_server.port)

    eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)
    eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert smtp_server.mails == [(1, None), (1, None)]

    smtp_server.hang_up()
    eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert smtp_server.mails[2:] == [(2, None)]


def test_mail_is_encrypted_and_authenticated_if_the_settings_say_so(
    make_app: Callable[..., Flask],
    eventbus: Isolation,
    secure_smtp_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    login = {"MAIL_USERNAME": "mailer", "MAIL_PASSWORD": secure_smtp_server.password}
    make_app(MAIL_PORT=secure_smtp_server.port, MAIL_STARTTLS=True, **login)
    monkeypatch.setenv("SSL_CERT_FILE", str(secure_smtp_server.certificate))

    eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert secure_smtp_server.mails == [(1, "mailer")]


def test_an_untrusted_smtp_server_gets_no_password(
    make_app: Callable[..., Flask], eventbus: Isolation, secure_smtp_server: Any
) -> None:
    login = {"MAIL_USERNAME": "mailer", "MAIL_PASSWORD": secure_smtp_server.password}
    make_app(MAIL_PORT=secure_smtp_server.port, MAIL_STARTTLS=True, **login)

    with pytest.raises(ssl.SSLCertVerificationError):
        eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert secure_smtp_server.mails == []


def test_a_server_without_encryption_is_a_configuration_error(
    make_app: Callable[..., Flask], eventbus: Isolation, smtp_server: Any
) -> None:
    make_app(MAIL_PORT=smtp_server.port, MAIL_STARTTLS=True)

    with pytest.raises(smtplib.SMTPNotSupportedError):
        eventbus.deliver("user_registered", via="stream", source="accounts", **ADA)

    assert smtp_server.mails == []


def test_a_password_is_not_sent_unencrypted(mailer: Any, eventbus: Isolation) -> None:
    with pytest.raises(RuntimeError, match="Set FLASK_MAIL_STARTTLS=true"):
        mailer.create_app({"MAIL_USERNAME": "mailer", "MAIL_PASSWORD": "secret"})


def test_the_app_creates_no_book(mailer: Any, eventbus: Isolation, tmp_path: Path) -> None:
    mailer.create_app({"BOOK_FILE": str(tmp_path / "book.db")})

    assert not (tmp_path / "book.db").exists()


def test_without_its_book_the_service_is_not_healthy(
    make_app: Callable[..., Flask], tmp_path: Path
) -> None:
    client = make_app().test_client()
    assert client.get("/health").status_code == 200

    (tmp_path / "book.db").unlink()

    health = client.get("/health")
    assert (health.status_code, health.get_json()["book"]) == (503, False)


def test_a_mail_that_waits_for_its_server_delays_no_other(
    service: Any, sink: Any, register: Callable[..., None], wait_until: Callable[..., Any]
) -> None:
    sink.stop()
    service.work(1)
    register(1)
    wait_until(lambda: "app.send_welcome failed at the event" in service.log.read_text())

    sink.start()
    register(2)

    wait_until(lambda: len(sink.mails()) == 2)
    assert sorted(mail["to"] for mail in sink.mails()) == [
        ["user1@example.com"],
        ["user2@example.com"],
    ]


def test_two_workers_send_one_mail_per_user_and_the_web_process_sends_none(
    service: Any,
    sink: Any,
    get: Callable[[str], tuple[int, dict[str, Any]]],
    register: Callable[..., None],
    wait_until: Callable[..., Any],
) -> None:
    sink.stop()
    sink.start(pause=0.02)
    address = service.serve()
    service.work(2)

    register(*range(50))

    wait_until(lambda: sum(service.sent_by().values()) == 50)
    assert len(service.sent_by()) == 2
    assert service.sent_by().keys() == service.consumers()
    assert get(f"{address}/")[1]["mails_sent"] == 50
    assert service.end() == [-signal.SIGTERM, 0, 0]
    assert len({mail["to"][0] for mail in sink.mails()}) == len(sink.mails()) == 50


def test_a_worker_killed_while_mailing_loses_and_repeats_no_mail(
    service: Any,
    sink: Any,
    register: Callable[..., None],
    redis_url: str,
    wait_until: Callable[..., Any],
) -> None:
    sink.stop()
    # Right after a mail is noted a worker is at the next, which the server takes its time for.
    sink.start(pause=0.2)
    service.work(2)
    register(*range(20))
    victim = next(iter(wait_until(service.sent_by)))
    service.kill(victim)
    sent = service.sent_by()[victim]

    wait_until(lambda: sum(service.sent_by().values()) == 20)

    assert sent == service.sent_by()[victim] < 10
    assert len({mail["to"][0] for mail in sink.mails()}) == len(sink.mails()) == 20
    wait_until(lambda: not pending(redis_url))


def pending(redis_url: str) -> int:
    """Return the number of events that are not acknowledged."""
    with redis.Redis.from_url(redis_url) as client:
        found = client.xpending("eventbus:{user_registered}:stream", "mailer")

    return int(found["pending"])


@pytest.fixture
def register(redis_url: str) -> Iterator[Callable[..., None]]:
    """Register users with these numbers, as accounts does."""
    with Bus(redis_url, service="accounts", publish={"user_registered": "stream"}) as bus:

        def register(*numbers: int) -> None:
            for number in numbers:
                email, name = f"user{number}@example.com", f"User {number}"
                bus.signal("user_registered").send(user_id=number, email=email, name=name)

        yield register
