"""The outbox: a table of events, committed together with the rows that they are about.

A route with ``"outbox": True`` writes its events there, in the transaction of the sender. ``flask
eventbus relay`` publishes them after the commit. SQLAlchemy is optional: only such routes and the
relay load this module.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

from sqlalchemy import (
    BLANK_SCHEMA,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    delete,
    false,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.dialects.mysql import LONGBLOB
from sqlalchemy.exc import DBAPIError, InvalidRequestError, MissingGreenlet
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateTable

from ..errors import ConfigError
from .transactions import engine_of

try:
    from sqlalchemy.util import await_
except ImportError:
    # Its name before SQLAlchemy 2.1.
    from sqlalchemy.util import await_only as await_

#: Name of the table.
NAME = "eventbus_outbox"

#: Databases that let a relay skip the rows that another one has locked.
SKIPPING = frozenset({"postgresql", "mysql", "mariadb", "oracle"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event in the outbox."""

    #: Number of its row; ``None`` before it is written.
    number: int | None = None
    #: Id of the event, the same each time it is published.
    event_id: str
    #: The signal's name.
    name: str
    #: Its transport: ``"channel"`` or ``"stream"``.
    via: str
    #: The encoded event.
    event: bytes


def table(metadata: MetaData) -> Table:
    """Return the outbox as a table of ``metadata``, for migrations and ``create_all()``.

    It is in the default schema of the connection, even if ``metadata`` has another schema.
    """
    if NAME in metadata.tables:
        return metadata.tables[NAME]

    return Table(
        NAME,
        metadata,
        Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
        Column("event_id", String(85), nullable=False),
        Column("name", String(128), nullable=False),
        Column("via", String(16), nullable=False),
        Column("created", DateTime(timezone=True), nullable=False),
        # A BLOB of MySQL holds at most 64 KiB.
        Column("event", LargeBinary().with_variant(LONGBLOB, "mysql", "mariadb"), nullable=False),
        schema=BLANK_SCHEMA,
        # Otherwise SQLite may reuse the number of a deleted row.
        sqlite_autoincrement=True,
    )


#: The table for statements, which need only its names and not the program's metadata.
TABLE = table(MetaData())


def create(engine: Engine) -> None:
    """Create the table if it does not exist, for programs without migrations."""
    with engine.begin() as connection:
        connection.execute(CreateTable(TABLE, if_not_exists=True))


def store(session: Session, entry: Entry, relay: str) -> None:
    """Write an event to the outbox, in the current transaction of ``session``.

    :param relay: the command that can create the table, for the hint.
    :raises ConfigError: the session is asynchronous and cannot be used outside of ``run_sync()``.
    :raises sqlalchemy.exc.DBAPIError: the database refuses the row.
    """
    names = ("event_id", "name", "via", "event")
    values = {name: getattr(entry, name) for name in names} | {"created": datetime.now(UTC)}

    if session.get_bind(clause=TABLE).dialect.is_async:
        _refuse_coroutine(entry.name)

    try:
        session.execute(insert(TABLE), values)
    except DBAPIError as error:
        error.add_note(
            f"flask_eventbus writes to {NAME!r}. If the table is missing, create it by a migration "
            f"from flask_eventbus.database.outbox.table(metadata), or run '{relay} --create-table'."
        )
        raise
    except InvalidRequestError as error:
        error.add_note(
            f"flask_eventbus writes {entry.name!r} to {NAME!r}, because its route has 'outbox'. "
            "Send it while the session accepts statements, not in 'after_begin' or "
            "'after_rollback'."
        )
        raise


def store_alone(source: Any, entry: Entry, relay: str) -> None:
    """Write an event to the outbox, in a transaction of its own.

    :param source: a session in any form that ``register_session()`` takes; its database has the
        outbox.
    :param relay: see :func:`store`.
    :raises ConfigError: ``source`` returns no session here, or its driver is asynchronous.
    """
    with Session(engine_of(source, TABLE)) as session, session.begin():
        store(session, entry, relay)


class Outbox:
    """The outbox of one database, as the relay reads it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def shown(self) -> str:
        """The database's URL without its password, for logs and reports."""
        return self._engine.url.render_as_string(hide_password=True)

    def is_there(self) -> bool:
        """Return True if the table exists."""
        return inspect(self._engine).has_table(NAME)

    def count(self, until: int | None = None) -> int:
        """Return the number of events in the outbox, up to the row number ``until``."""
        return self._number(select(func.count()).where(_up_to(until))) or 0

    def last(self) -> int | None:
        """Return the row number of the newest event."""
        return self._number(select(func.max(TABLE.c.number)))

    def first(self, *, until: int | None = None, without: Collection[str] = ()) -> int | None:
        """Return the row number of the oldest event, except those of the signals ``without``."""
        wanted = _up_to(until) & ~TABLE.c.name.in_(without)
        return self._number(select(func.min(TABLE.c.number)).where(wanted))

    def _number(self, statement: Select[Any]) -> int | None:
        with self._engine.connect() as connection:
            number: int | None = connection.scalar(statement)
            return number

    @contextmanager
    def take(
        self, most: int, *, until: int | None = None, without: Collection[str] = ()
    ) -> Iterator[Batch]:
        """Lock the oldest events until the end of the ``with`` block.

        Events after the first one that another relay has locked are not taken, to keep the order.
        """
        dialect = self._engine.dialect.name
        wanted = _up_to(until) & ~TABLE.c.name.in_(without)
        connection = self._engine.connect()

        # At its default level, MySQL also locks the gaps between rows, which blocks senders.
        if dialect in SKIPPING:
            connection = connection.execution_options(isolation_level="READ COMMITTED")

        with connection, connection.begin():
            # SQLite has a single lock, which any statement that writes takes.
            if dialect == "sqlite":
                connection.execute(update(TABLE).values(name="").where(false()))

            entries = _oldest(connection, wanted, most)
            numbers = select(TABLE.c.number).where(wanted).order_by(TABLE.c.number)
            pairs = zip(entries, connection.scalars(numbers.limit(len(entries))), strict=False)
            free = takewhile(lambda pair: pair[0].number == pair[1], pairs)
            yield Batch(connection, [entry for entry, _ in free])


class Batch:
    """Events that a relay has locked, and deletes after they are published."""

    def __init__(self, connection: Connection, entries: list[Entry]) -> None:
        self._connection = connection
        #: The locked events, ordered by row number.
        self.entries = entries

    def delete(self, entries: Collection[Entry]) -> None:
        """Delete events when the block of :meth:`Outbox.take` ends without an exception."""
        if entries:
            numbers = [entry.number for entry in entries]
            self._connection.execute(delete(TABLE).where(TABLE.c.number.in_(numbers)))


class _Nothing:
    """An awaitable that is done at once."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


def _refuse_coroutine(name: str) -> None:
    """Raise :exc:`ConfigError` where SQLAlchemy cannot await its driver."""
    try:
        await_(_Nothing())
    except MissingGreenlet as error:
        raise ConfigError(
            f"{name!r} was sent where an asynchronous session cannot write it to the outbox. "
            "Send it with 'await session.run_sync(lambda session: signal.send(...))'."
        ) from error


def _oldest(connection: Connection, wanted: ColumnElement[bool], most: int) -> list[Entry]:
    columns = (TABLE.c[name] for name in Entry.__slots__)
    oldest = select(*columns).where(wanted).order_by(TABLE.c.number).limit(most)
    rows = connection.execute(oldest.with_for_update(skip_locked=True))
    return [Entry(**row) for row in rows.mappings()]


def _up_to(until: int | None) -> ColumnElement[bool]:
    return TABLE.c.number.is_not(None) if until is None else TABLE.c.number <= until
