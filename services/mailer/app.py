"""Mailer: welcomes new users by mail. It hears of them; it does not know who registers them."""

from __future__ import annotations

import smtplib
import time
from collections import Counter
from collections.abc import Mapping
from email.headerregistry import Address
from email.message import EmailMessage
from typing import Any

from flask import Flask, Response, current_app, g, request
from flask.typing import ResponseReturnValue

from flask_eventbus import EventBus, current_event

WELCOME = """\
Hello {name},

your account is ready. It is good to have you here.
"""

bus = EventBus()
#: What this process did. The one thread that runs the receivers is the only one that counts.
done: Counter[str] = Counter()


@bus.on("user_registered")
def send_welcome(sender: str, email: str, name: str, **extra: Any) -> None:
    post(welcome(email, name))
    done["mails"] += 1


def welcome(email: str, name: str) -> EmailMessage:
    """The mail for one user; an event that comes again makes the same Message-ID again."""
    mail = EmailMessage()
    mail["From"] = current_app.config["MAIL_SENDER"]
    mail["To"] = Address(display_name=name, addr_spec=email)
    mail["Subject"] = f"Welcome, {name}"
    mail["Date"] = current_event.time
    mail["Message-ID"] = f"<{current_event.id}@{current_event.source}>"
    mail.set_content(WELCOME.format(name=name))
    return mail


def post(mail: EmailMessage) -> None:
    """Hand the mail to the SMTP server; what that raises is logged and counted by the bus."""
    config = current_app.config

    with smtplib.SMTP(config["MAIL_HOST"], config["MAIL_PORT"], timeout=10) as server:
        server.send_message(mail)


def create_app(settings: Mapping[str, Any] | None = None) -> Flask:
    """The service; ``settings`` go before those of the environment."""
    app = Flask(__name__)
    app.config.from_mapping(
        MAIL_HOST="localhost",
        MAIL_PORT=1025,
        MAIL_SENDER="Accounts <accounts@example.com>",
        EVENTBUS_SERVICE="mailer",
        EVENTBUS_URL="redis://localhost:6379/0",
        EVENTBUS_PUBLISH={"api_call": {"signal": "flask:request_finished", "payload": api_call}},
        EVENTBUS_RECEIVERS=["plugins/"],
    )
    app.config.from_prefixed_env()
    app.config.from_mapping(settings or {})
    bus.init_app(app)
    app.before_request(start_clock)

    @app.get("/")
    def count() -> ResponseReturnValue:
        return {"mails_sent": done["mails"], "receivers_failed": failures()}

    @app.get("/health")
    def health() -> ResponseReturnValue:
        # Hearing is this service's work: while it hears nothing, it does none.
        node = bus.health()
        return {
            "service": node.service,
            "listening": node.listening,
            "connected": node.connected,
            "missed": node.missed,
        }, 200 if node.connected or not node.listening else 503

    return app


def failures() -> int:
    """How often a receiver raised, those of the plug-ins included."""
    return bus.health().counts.get("failed", 0)


def start_clock() -> None:
    g.started = time.perf_counter()


def api_call(sender: Flask, response: Response, **extra: Any) -> dict[str, Any] | None:
    """What other services learn of a finished request; calls of one rule count together."""
    if request.endpoint == "health":
        return None

    return {
        "method": request.method,
        "rule": request.url_rule.rule if request.url_rule else "(none)",
        "status": response.status_code,
        "milliseconds": round((time.perf_counter() - g.started) * 1000, 3),
    }
