"""Mailer: welcomes new users by mail. It hears of them; it does not know who registers them."""

from __future__ import annotations

import os
import smtplib
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from flask import Flask, Response, current_app, g, request
from flask.typing import ResponseReturnValue

from flask_eventbus import EventBus, Reject, current_event

WELCOME = """\
Hello {name},

your account is ready. It is good to have you here.
"""

#: The events whose mail the SMTP server has taken, and which worker gave it to the server.
BOOK = """\
CREATE TABLE IF NOT EXISTS mail
(event_id TEXT PRIMARY KEY, worker TEXT NOT NULL, sent_at TEXT NOT NULL)
"""

#: How often a mail is tried again, over about an hour: mail servers are away that long at times.
RETRIES = 20

#: How long the SMTP server may take for each answer, in seconds.
SMTP_TIMEOUT = 10.0


class Mailbox:
    """One connection to the SMTP server, kept between mails and opened again when it was lost."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._server: smtplib.SMTP | None = None

    def post(self, mail: EmailMessage) -> None:
        """Hand the mail to the SMTP server, for one thread at a time.

        :raises Reject: the server will never take this mail. Any other error is tried again.
        """
        with self._turn:
            server = self._connection()

            try:
                server.send_message(mail)
            except BaseException as error:
                self.close()

                if is_final(error):
                    raise Reject(f"The SMTP server refuses the mail: {error}") from error

                raise

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _connection(self) -> smtplib.SMTP:
        """The one that is there, or a new one, encrypted and logged in as the settings say."""
        # Servers close those that wait for long.
        with suppress(OSError):
            if self._server is not None and self._server.noop()[0] == 250:
                return self._server

        self.close()
        config = current_app.config
        server = smtplib.SMTP(config["MAIL_HOST"], config["MAIL_PORT"], timeout=SMTP_TIMEOUT)

        try:
            if config["MAIL_STARTTLS"]:
                server.starttls(context=ssl.create_default_context())

            if config["MAIL_USERNAME"]:
                # Flask takes a password of digits for a number.
                server.login(str(config["MAIL_USERNAME"]), str(config["MAIL_PASSWORD"]))
        except OSError:
            server.close()
            raise

        self._server = server
        return server


def is_final(error: BaseException) -> bool:
    """Return True if the server refuses this mail for good, by a code from 500 on.

    A login or a sender that is refused is a wrong setting, and no fault of the mail.
    """
    match error:
        case smtplib.SMTPRecipientsRefused():
            return all(code >= 500 for code, _ in error.recipients.values())
        case smtplib.SMTPDataError():
            return error.smtp_code >= 500
        case _:
            return isinstance(error, smtplib.SMTPNotSupportedError)


bus = EventBus()
mailbox = Mailbox()


@bus.on("user_registered", retries=RETRIES)
def send_welcome(sender: str, email: str, name: str, **extra: Any) -> None:
    """Send one mail for each event, though an event may come more than once."""
    if book("SELECT 1 FROM mail WHERE event_id = ?", current_event.id):
        return

    mailbox.post(welcome(email, name))
    # A worker that is killed between the server's answer and this line has sent a mail that nobody
    # knows of: the worker that takes over sends it again, with the same Message-ID.
    note_sent(current_event.id)


def welcome(email: str, name: str) -> EmailMessage:
    """The mail for one user; an event that comes again makes the same Message-ID again.

    :raises Reject: it cannot be written to such an address, or such a name.
    """
    mail = EmailMessage()
    mail["From"] = current_app.config["MAIL_SENDER"]

    try:
        mail["To"] = Address(display_name=name, addr_spec=email)
        mail["Subject"] = f"Welcome, {name}"
    except ValueError as error:
        raise Reject(f"No mail can be written to {name!r} at {email!r}: {error}") from error

    mail["Date"] = current_event.time
    mail["Message-ID"] = f"<{current_event.id}@{current_event.source}>"
    mail.set_content(WELCOME.format(name=name))
    return mail


def book(statement: str, *values: str) -> list[Any]:
    """Run a statement in the book, the file that all processes of this service share."""
    with closing(sqlite3.connect(current_app.config["BOOK_FILE"], timeout=10)) as file, file:
        return file.execute(statement, values).fetchall()


def note_sent(event_id: str) -> None:
    try:
        sent_at = datetime.now(UTC).isoformat()
        book("INSERT OR IGNORE INTO mail VALUES (?, ?, ?)", event_id, worker(), sent_at)
    except sqlite3.Error:
        # The mail is out: to fail here would be to send it again.
        current_app.logger.exception("The mail of the event %s is sent, and not noted.", event_id)


def worker() -> str:
    """This process, as the names of the bus's consumers begin."""
    return f"{socket.gethostname()}-{os.getpid()}"


def init_db() -> None:
    """Make the table unless it is there: a step of each deployment."""
    Path(current_app.config["BOOK_FILE"]).parent.mkdir(parents=True, exist_ok=True)
    book(BOOK)


def create_app(settings: Mapping[str, Any] | None = None) -> Flask:
    """The service; ``settings`` go before those of the environment."""
    app = Flask(__name__)
    app.config.from_mapping(
        MAIL_HOST="localhost",
        MAIL_PORT=1025,
        MAIL_STARTTLS=False,
        MAIL_USERNAME=None,
        MAIL_PASSWORD=None,
        MAIL_SENDER="Accounts <accounts@example.com>",
        BOOK_FILE=str(Path(app.instance_path) / "book.db"),
        EVENTBUS_SERVICE="mailer",
        EVENTBUS_URL="redis://localhost:6379/0",
        # What serves HTTP does not listen: the workers do, 'flask eventbus run'.
        EVENTBUS_LISTEN=False,
        # An event of a channel would reach every worker, and each would send a mail.
        EVENTBUS_SUBSCRIBE={"user_registered": {"via": "stream"}},
        EVENTBUS_PUBLISH={"api_call": {"signal": "flask:request_finished", "payload": api_call}},
        EVENTBUS_RECEIVERS=["plugins/"],
    )
    app.config.from_prefixed_env()
    app.config.from_mapping(settings or {})

    if app.config["MAIL_USERNAME"] and not app.config["MAIL_STARTTLS"]:
        raise RuntimeError(
            "'MAIL_USERNAME' is set and 'MAIL_STARTTLS' is not: the password would travel in the "
            "clear. Set FLASK_MAIL_STARTTLS=true, or leave the user out."
        )

    bus.init_app(app)
    app.before_request(start_clock)
    app.cli.command("init-db")(init_db)

    @app.get("/")
    def count() -> ResponseReturnValue:
        workers = dict(book("SELECT worker, count(*) FROM mail GROUP BY worker"))
        return {"mails_sent": sum(workers.values()), "workers": workers}

    @app.get("/health")
    def health() -> ResponseReturnValue:
        # Healthy with Redis away, too: this process reads the book, and Redis is the workers'.
        publishing = bus.health().publishing

        try:
            book("SELECT 1 FROM mail LIMIT 1")
        except sqlite3.Error:
            return {"service": "mailer", "book": False, "publishing": publishing}, 503

        return {"service": "mailer", "book": True, "publishing": publishing}

    return app


def start_clock() -> None:
    g.started = time.perf_counter()


def api_call(sender: Flask, response: Response, **extra: Any) -> dict[str, Any] | None:
    """Return the payload for a finished request; calls of one rule are counted together."""
    if request.endpoint == "health":
        return None

    return {
        "method": request.method,
        "rule": request.url_rule.rule if request.url_rule else "(none)",
        "status": response.status_code,
        "milliseconds": round((time.perf_counter() - g.started) * 1000, 3),
    }
