"""Accounts: registers users, and tells whoever wants to know with ``user_registered``."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from flask import Flask, Response, abort, g, json, request
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable
from werkzeug.exceptions import HTTPException

from flask_eventbus import EventBus

#: What HTML's <input type="email"> takes for an address.
EMAIL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]+@[a-z0-9-]+(\.[a-z0-9-]+)*", re.ASCII)
#: Characters of control, and halves of surrogate pairs, which no file can hold.
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
#: The largest integer that SQLite takes.
MOST_ID = 2**63 - 1


class Base(DeclarativeBase):
    """The declarative base that SQLAlchemy requires."""


db = SQLAlchemy(model_class=Base)
bus = EventBus()
user_registered = bus.signal("user_registered")


class User(db.Model):  # type: ignore[name-defined, misc]  # the class is made at run time
    """A row of the table ``user``."""

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    registered_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))

    def payload(self) -> dict[str, Any]:
        """Return the payload of ``user_registered``."""
        return {
            "user_id": self.id,
            "email": self.email,
            "name": self.name,
            # SQLite keeps no time zone.
            "registered_at": self.registered_at.replace(tzinfo=UTC),
        }

    def as_json(self) -> dict[str, Any]:
        """The same for HTTP."""
        return self.payload() | {"registered_at": self.payload()["registered_at"].isoformat()}


def create_app(settings: Mapping[str, Any] | None = None) -> Flask:
    """The service; ``settings`` go before those of the environment."""
    app = Flask(__name__)
    app.config.from_mapping(
        SQLALCHEMY_DATABASE_URI="sqlite:///accounts.db",
        EVENTBUS_SERVICE="accounts",
        EVENTBUS_URL="redis://localhost:6379/0",
        EVENTBUS_PUBLISH={
            # A stream: whoever is away hears of the user when it is back.
            "user_registered": {"via": "stream", "after_commit": True},
            "api_call": {"signal": "flask:request_finished", "payload": api_call},
        },
    )
    app.config.from_prefixed_env()
    app.config.from_mapping(settings or {})
    bus.init_app(app)
    db.init_app(app)
    app.before_request(start_clock)
    app.register_error_handler(HTTPException, as_json)
    app.cli.command("init-db")(init_db)

    @app.post("/register")
    def register() -> ResponseReturnValue:
        user = User(**read_registration())
        add(user)
        # It leaves after the commit: nobody hears of a user whom the database then refuses.
        user_registered.send(app, **user.payload())
        db.session.commit()
        return user.as_json(), 201

    @app.get("/users/<int:user_id>")
    def show(user_id: int) -> ResponseReturnValue:
        user = db.session.get(User, user_id) if user_id <= MOST_ID else None
        return user.as_json() if user else abort(404, f"There is no user {user_id}.")

    @app.get("/health")
    def health() -> ResponseReturnValue:
        # Healthy with Redis away, too: users register, and their events wait in the buffer.
        node, database = bus.health(), has_database()
        return {
            "service": node.service,
            "database": database,
            "publishing": node.publishing,
            "buffered": node.buffered,
        }, 200 if database else 503

    return app


def init_db() -> None:
    """Make the table unless it is there: a step of each deployment."""
    db.session.execute(CreateTable(User.__table__, if_not_exists=True))
    db.session.commit()


def add(user: User) -> None:
    """Insert the user, or refuse the request if the address is taken; not committed yet."""
    email = user.email
    db.session.add(user)

    try:
        db.session.flush()
    except IntegrityError:
        db.session.rollback()
        abort(409, f"{email} is registered already.")


def read_registration() -> dict[str, str]:
    """The fields of a form or of a JSON object, checked."""
    sent = request.get_json(silent=True) if request.is_json else request.form

    if not isinstance(sent, Mapping):
        abort(400, "That is no JSON object. Send one with 'email' and 'name'.")

    return {"email": read_email(sent.get("email")), "name": read_name(sent.get("name"))}


def read_email(value: Any) -> str:
    email = str(value or "").strip().lower()

    if not EMAIL.fullmatch(email) or len(email) > 254:
        abort(400, "'email' is not an address. Send one like ada@example.com.")

    return email


def read_name(value: Any) -> str:
    name = " ".join(value.split()) if isinstance(value, str) else ""

    if not 0 < len(name) <= 200 or UNFIT.search(name):
        abort(400, "'name' is missing or no name. Send 1 to 200 printable characters.")

    return name


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


def has_database() -> bool:
    try:
        db.session.execute(select(User.id).limit(1))
    except OperationalError:
        return False

    return True


def as_json(error: HTTPException) -> ResponseReturnValue:
    """An error as JSON, with the headers it came with."""
    response = error.get_response()
    response.set_data(json.dumps({"error": error.description}))
    response.content_type = "application/json"
    return response
