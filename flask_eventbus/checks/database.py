"""Check the database session and the outbox table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ConfigError
from ..node import Node
from ..routing.routes import Route
from ..text import counted
from .findings import Finding, error, note, ok


def check_database(node: Node) -> Iterator[Finding]:
    """Check what routes with ``after_commit`` or ``outbox`` need."""
    waiting = [route for route in node.routes.values() if route.after_commit or route.outbox]

    if not waiting:
        return

    session = node.session

    if session is None:
        yield _no_session(waiting)
    elif any(route.outbox for route in waiting):
        yield from _check_outbox(session)


def _no_session(routes: Sequence[Route]) -> Finding:
    names = ", ".join(sorted(repr(route.name) for route in routes))
    return error(
        f"{names} {'waits' if len(routes) == 1 else 'wait'} for a database commit, and there is no "
        "database session: sending fails.",
        "Call db.init_app(app) of Flask-SQLAlchemy, register the session with "
        "bus.register_session(session), or remove 'after_commit' and 'outbox' from the route.",
    )


def _check_outbox(session: Any) -> Iterator[Finding]:
    from ..database.outbox import NAME, TABLE, Outbox  # they need SQLAlchemy, which is optional
    from ..database.relay import DATABASE_OUTAGE, reason_of
    from ..database.transactions import engine_of

    try:
        engine = engine_of(session, TABLE)
    except ConfigError as unknown:
        yield note(f"The outbox was not checked. {unknown}")
        return

    outbox = Outbox(engine)

    if engine.dialect.is_async:
        yield note(
            f"The outbox in {outbox.shown} was not checked: {engine.url.drivername!r} is an "
            "asynchronous driver."
        )
        return

    try:
        if outbox.is_there():
            yield from _check_waiting(outbox)
        else:
            yield error(
                f"{outbox.shown} has no table {NAME!r}: sending events of the outbox fails.",
                "Create it by a migration, from flask_eventbus.database.outbox.table(metadata), or "
                "with 'flask eventbus relay --create-table'.",
            )
    except DATABASE_OUTAGE as failure:
        yield error(
            f"The database {outbox.shown} cannot be used: {reason_of(failure)}.",
            "Correct its URL, or start it.",
        )


def _check_waiting(outbox: Any) -> Iterator[Finding]:
    yield ok(f"The outbox is in {outbox.shown}.")

    if count := outbox.count():
        yield note(
            f"There {'is' if count == 1 else 'are'} {counted(count, 'event')} in the outbox.",
            "Run a relay to publish them: flask eventbus relay",
        )
