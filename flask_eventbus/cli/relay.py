"""The command ``relay``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..bus import stop_on_signals
from ..errors import ConfigError, PublishError
from ..logs import get_logger
from ..node import Node
from ..publisher.connection import PublishConnection
from ..publisher.message import Destinations
from ..publisher.writer import WRITE_TIMEOUT
from ..routing.routes import Route
from ..transport.connections import OUTAGE, Connections
from ..transport.keys import StreamKeys
from .base import Command, Program, log_to_stderr, pass_program

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from ..database.outbox import Outbox
    from ..database.relay import Relay
    from ..typing import Via
from ..publisher.message import Destination

logger = get_logger(__name__)

#: Seconds that ``--once`` leaves another relay to publish what it has in hand.
PATIENCE = 10.0


@click.command(
    cls=Command,
    short_help="Publish what waits in the outbox.",
    epilog="""Examples:

    \b
      flask --app accounts eventbus relay
      flask --app accounts eventbus relay --create-table
      flask --app accounts eventbus relay --once
      python -m flask_eventbus relay --database sqlite:///shop.db

    Exit codes: 0 after SIGTERM or Ctrl-C, and with --once when nothing waits any more; 1
    if something still waits, or a setting is wrong; 2 for a mistake in the command. A
    second signal ends at once, with 128 and the signal's number.""",
)
@click.option("--once", is_flag=True, help="Publish what waits now, and end.")
@click.option(
    "--batch",
    type=click.IntRange(1, 10_000),
    default=100,
    show_default=True,
    metavar="N",
    help="How many events are taken in hand at once.",
)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.01, max=3_600),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between looks at an empty outbox.",
)
@click.option(
    "--create-table", is_flag=True, help="Create the table first, unless it is there already."
)
@click.option(
    "--database",
    metavar="URL",
    help="SQLAlchemy's URL of the database; unless given, that of the app's session, and without "
    "an app DATABASE_URL in the environment.",
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
    """Publish what waits in the outbox, in order, until SIGTERM or Ctrl-C.

    An event is deleted from the table 'eventbus_outbox' after Redis has confirmed it. Redis may
    be away at the start and later. Several relays may run: one publishes, the others
    stand by.
    """
    node = program.node

    if not node.config.enabled:
        raise ConfigError(
            "'EVENTBUS_ENABLED' is False: nothing is published. Set it to True to relay."
        )

    with (
        _database_errors(),
        _engine(node, database) as engine,
        _relay(node, _outbox(engine, create_table=create_table), batch) as relay,
        stop_on_signals() as told,
    ):
        if once:
            _run_once(relay, told)
        else:
            _run(relay, told, interval, node.connections.shown)


def _run(relay: Relay, told: threading.Event, interval: float, redis: str) -> None:
    log_to_stderr()
    logger.info("Relaying the outbox in %s to %s.", relay.outbox.shown, redis)
    relay.run(told, interval=interval)
    logger.info("Published %d events.", relay.published)


def _run_once(relay: Relay, told: threading.Event) -> None:
    last = relay.outbox.last()

    try:
        relay.run_once(told, until=last, patience=PATIENCE)
    except OUTAGE as error:
        left = relay.outbox.count(last)
        raise PublishError(
            f"{_published(relay)} {left} wait: Redis cannot be used: {error}"
        ) from error

    if left := relay.outbox.count(last):
        raise PublishError(f"{_published(relay)} {left} wait: {_why(relay)}")

    click.echo(_published(relay))


def _published(relay: Relay) -> str:
    return f"Published {relay.published} event{'' if relay.published == 1 else 's'}."


def _why(relay: Relay) -> str:
    reasons = [f"{name!r} is refused: {reason}." for name, reason in sorted(relay.refused.items())]
    return " ".join(reasons) or "another relay has them in hand, or this one was told to end."


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
    session = node.session
    url = database or (os.environ.get("DATABASE_URL") if session is None else None)

    if url is not None:
        from ..database.transactions import connect  # it needs SQLAlchemy, which is optional

        engine = connect(url)

        try:
            yield _refuse_async(engine)
        finally:
            engine.dispose()
    elif session is not None:
        yield _refuse_async(_engine_of(session))
    else:
        raise ConfigError(
            "There is no database. Name it with --database URL, or its session with "
            "bus.register_session(session); db.init_app(app) of Flask-SQLAlchemy does, too."
        )


def _engine_of(session: Any) -> Engine:
    from ..database.outbox import TABLE  # it needs SQLAlchemy, which is optional
    from ..database.transactions import engine_of

    return engine_of(session, TABLE)


def _refuse_async(engine: Engine) -> Engine:
    if engine.dialect.is_async:
        raise ConfigError(
            f"{engine.url.drivername!r} is an asynchronous driver, and the relay is not. Name the "
            "database with --database URL and another driver."
        )

    return engine


@contextmanager
def _relay(node: Node, outbox: Outbox, batch: int) -> Iterator[Relay]:
    from ..database.relay import Relay  # it needs SQLAlchemy, which is optional

    config = node.config
    connections = Connections(config.url, name=f"eventbus-relay:{config.service}")
    exchange = PublishConnection(
        connections,
        timeout=WRITE_TIMEOUT,
        names=StreamKeys(config.prefix).names,
        patience=config.timeout,
    )

    try:
        yield Relay(outbox, exchange, _ways(node), batch=batch)
    finally:
        exchange.close()


def _ways(node: Node) -> Callable[[str, Via], Destination]:
    """How events travel: as their route says, if it has not changed since they were stored."""
    ways = Destinations(node.config)

    def way(name: str, via: Via) -> Destination:
        route = node.route_for(name)
        return ways.find(name, route if route.via == via else Route(name=name, via=via))

    return way


@contextmanager
def _database_errors() -> Iterator[None]:
    """Say in one line what a database has to say."""
    try:
        from ..database.relay import DATABASE_OUTAGE, reason_of
    except ImportError as error:
        raise ConfigError(
            f"The outbox needs SQLAlchemy, which cannot be imported: {error}. Install it with: "
            "pip install 'sqlalchemy>=2.0'"
        ) from error

    try:
        yield
    except DATABASE_OUTAGE as error:
        raise ConfigError(
            f"The database cannot be used: {reason_of(error)}. Correct its URL, or start it."
        ) from error
