"""The command ``relay``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ..bus import stop_on_signals
from ..errors import ConfigError, PublishError
from ..logs import get_logger
from ..node import Node
from ..publisher.connection import PublishConnection
from ..publisher.message import Destination, Destinations
from ..routing.routes import Route
from ..text import counted
from ..transport.connection import OUTAGE
from ..transport.connections import Connections
from .base import Command, Program, log_to_stderr, pass_program

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from ..database.outbox import Outbox
    from ..database.relay import Relay
    from ..typing import Via

logger = get_logger(__name__)

#: Seconds that ``--once`` waits for another relay to publish the events it has locked.
PATIENCE = 10.0


@click.command(
    cls=Command,
    short_help="Publish the events in the outbox.",
    epilog="""Examples:

    \b
      flask --app accounts eventbus relay
      flask --app accounts eventbus relay --create-table
      flask --app accounts eventbus relay --once
      python -m flask_eventbus relay --database sqlite:///shop.db

    Exit codes: 0 after SIGTERM or Ctrl-C, and with --once if all events were published; 1
    if some were not, or a setting is wrong; 2 for a wrong argument. A second signal ends
    the process at once, with 128 plus the signal's number.""",
)
@click.option(
    "--once", is_flag=True, help="Publish the events that are in the outbox now, and exit."
)
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=100,
    show_default=True,
    metavar="N",
    help="Publish at most N events in one database transaction.",
)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.01, max=3_600),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between reads of an empty outbox.",
)
@click.option("--create-table", is_flag=True, help="Create the table first if it does not exist.")
@click.option(
    "--database",
    metavar="URL",
    help="SQLAlchemy URL of the database. The default is the database of the app's session; "
    "without an app, DATABASE_URL in the environment.",
)
@pass_program
def relay(
    program: Program,
    once: bool,
    batch: int,
    interval: float,
    create_table: bool,
    database: str | None,
) -> None:
    """Publish the events in the outbox, in order, until SIGTERM or Ctrl-C.

    The relay deletes an event from the table 'eventbus_outbox' after Redis has confirmed it. If
    Redis is not available, the relay retries. Several relays may run: one publishes, the others
    stand by.
    """
    node = program.enabled_node("nothing is published", "relay")

    with (
        _database_errors(),
        _engine(node, database) as engine,
        _relay(node, _outbox(engine, create_table=create_table), batch) as relay,
        stop_on_signals() as stopping,
    ):
        if once:
            _run_once(relay, stopping)
        else:
            _run(relay, stopping, interval, node.connections.shown)


def _run(relay: Relay, stopping: threading.Event, interval: float, redis: str) -> None:
    log_to_stderr()
    logger.info("Relaying the outbox in %s to %s.", relay.outbox.shown, redis)
    relay.run(stopping, interval=interval)
    logger.info("Published %d events.", relay.published)


def _run_once(relay: Relay, stopping: threading.Event) -> None:
    last = relay.outbox.last()

    try:
        relay.run_once(stopping, until=last, patience=PATIENCE)
    except OUTAGE as error:
        left = relay.outbox.count(last)
        raise PublishError(
            f"{_published(relay)} {left} left in the outbox: Redis cannot be used: {error}"
        ) from error

    if left := relay.outbox.count(last):
        raise PublishError(f"{_published(relay)} {left} left in the outbox: {_why(relay)}")

    click.echo(_published(relay))


def _published(relay: Relay) -> str:
    return f"Published {counted(relay.published, 'event')}."


def _why(relay: Relay) -> str:
    reasons = [
        f"Redis refuses {name!r}: {reason}." for name, reason in sorted(relay.refused.items())
    ]
    return " ".join(reasons) or "another relay has locked them, or this one was stopped."


def _outbox(engine: Engine, *, create_table: bool) -> Outbox:
    from ..database import outbox  # it needs SQLAlchemy, which is optional

    if create_table:
        outbox.create(engine)

    found = outbox.Outbox(engine)

    if not found.is_there():
        raise ConfigError(
            f"{found.shown} has no table {outbox.NAME!r}. Create it by a migration, from "
            "flask_eventbus.database.outbox.table(metadata), or with --create-table."
        )

    return found


@contextmanager
def _engine(node: Node, database: str | None) -> Iterator[Engine]:
    """The engine of a URL, else of the node's session, else of the environment's URL."""
    from ..database.outbox import TABLE  # it needs SQLAlchemy, which is optional
    from ..database.transactions import connect, engine_of

    session = node.session
    url = database or (os.environ.get("DATABASE_URL") if session is None else None)

    if url is None and session is None:
        raise ConfigError(
            "No database given. Pass --database URL, register a session with "
            "bus.register_session(session), or call db.init_app(app) of Flask-SQLAlchemy."
        )

    engine = engine_of(session, TABLE) if url is None else connect(url)

    try:
        if engine.dialect.is_async:
            raise ConfigError(
                f"{engine.url.drivername!r} is an asynchronous driver; the relay needs a "
                "synchronous one. Pass --database URL with such a driver."
            )

        yield engine
    finally:
        # The program's own session may still need its engine.
        if url is not None:
            engine.dispose()


@contextmanager
def _relay(node: Node, outbox: Outbox, batch: int) -> Iterator[Relay]:
    from ..database.relay import Relay  # it needs SQLAlchemy, which is optional

    config, timing = node.config, node.registry.timing
    connections = Connections(config.url, name=f"eventbus-relay:{config.service}", timing=timing)
    exchange = PublishConnection(connections, config, timeout=timing.write_timeout)

    try:
        yield Relay(outbox, exchange, _destinations(node), batch=batch, timing=timing)
    finally:
        exchange.close()


def _destinations(node: Node) -> Callable[[str, Via], Destination]:
    """Return a function that finds the destination of an event.

    The route of its signal applies, unless its transport has changed since the event was stored.
    """
    destinations = Destinations(node.config)

    def destination(name: str, via: Via) -> Destination:
        route = node.route_for(name)
        return destinations.find(name, route if route.via == via else Route(name=name, via=via))

    return destination


@contextmanager
def _database_errors() -> Iterator[None]:
    """Turn errors of the database into one line.

    :raises ConfigError: SQLAlchemy is missing, or the database cannot be used.
    """
    try:
        from ..database.relay import DATABASE_OUTAGE, reason_of
    except ImportError as error:
        raise ConfigError(
            f"The outbox needs SQLAlchemy, and importing it failed: {error}. Install it with: "
            "pip install 'sqlalchemy>=2.0'"
        ) from error

    try:
        yield
    except DATABASE_OUTAGE as error:
        raise ConfigError(
            f"The database cannot be used: {reason_of(error)}. Correct its URL, or start it."
        ) from error
