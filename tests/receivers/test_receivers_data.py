"""Receivers and databases: what one receiver leaves undone is never another's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from flask_eventbus import Bus, EventBus
from flask_eventbus.testing import Isolation

Make = Callable[..., Bus]

#: Receivers of each kind: the order in which receivers run is not promised.
SEVERAL = 4


class Base(DeclarativeBase):
    """The tables of these tests."""


class Note(Base):
    """A row of the table ``notes``."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Shop:
    """A Flask app with a database and a bus."""

    def __init__(self, folder: Path) -> None:
        self.db = SQLAlchemy(model_class=Base)
        self.bus = EventBus()
        self.app = Flask("shop")
        self.app.config.from_mapping(
            SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder}/shop.db",
            EVENTBUS_SERVICE="shop",
            EVENTBUS_PUBLISH={"note_added": {"after_commit": True}},
        )
        self.bus.init_app(self.app)
        self.db.init_app(self.app)

        with self.app.app_context():
            self.db.create_all()

    def texts(self) -> list[str]:
        """The notes that are committed."""
        with self.app.app_context():
            return sorted(self.db.session.scalars(select(Note.text)))

    def close(self) -> None:
        with self.app.app_context():
            self.db.engine.dispose()


@pytest.fixture
def shop(tmp_path: Path, eventbus: Isolation) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path}/notes.db")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def connect_several(bus: Bus | EventBus, make: Callable[[int], Callable[..., Any]]) -> None:
    for number in range(SEVERAL):
        bus.on("paid")(make(number))


def deliver_to_failing(eventbus: Isolation) -> None:
    """Deliver an event at which several receivers fail."""
    with pytest.raises(ExceptionGroup) as caught:
        eventbus.deliver("paid")

    assert len(caught.value.exceptions) == SEVERAL


# -- in an app ------------------------------------------------------------------------------


def test_changes_of_a_failed_receiver_are_not_committed_by_the_next(
    shop: Shop, eventbus: Isolation
) -> None:
    def failing(number: int) -> Callable[..., None]:
        def fail(sender: str) -> None:
            shop.db.session.add(Note(text="half done"))
            shop.db.session.flush()
            raise ConnectionError("the bank is away")

        return fail

    def good(number: int) -> Callable[..., None]:
        def add(sender: str) -> None:
            shop.db.session.add(Note(text=f"note {number}"))
            shop.db.session.commit()

        return add

    connect_several(shop.bus, failing)
    connect_several(shop.bus, good)

    deliver_to_failing(eventbus)

    assert shop.texts() == [f"note {number}" for number in range(SEVERAL)]


def test_a_broken_session_of_one_receiver_does_not_fail_another(
    shop: Shop, eventbus: Isolation
) -> None:
    def breaking(number: int) -> Callable[..., None]:
        def fail(sender: str) -> None:
            shop.db.session.add(Note(text=None))
            shop.db.session.commit()

        return fail

    def good(number: int) -> Callable[..., Any]:
        async def add(sender: str) -> None:
            shop.db.session.add(Note(text=f"note {number}"))
            shop.db.session.commit()

        return add

    connect_several(shop.bus, breaking)
    connect_several(shop.bus, good)

    deliver_to_failing(eventbus)

    assert shop.texts() == [f"note {number}" for number in range(SEVERAL)]


def test_events_of_a_failed_receiver_are_discarded_without_a_warning(
    shop: Shop, eventbus: Isolation, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(number: int) -> Callable[..., None]:
        def fail(sender: str) -> None:
            shop.db.session.add(Note(text="half done"))
            shop.bus.signal("note_added").send(shop.app, number=number)
            raise ConnectionError("the bank is away")

        return fail

    def good(number: int) -> Callable[..., None]:
        def add(sender: str) -> None:
            shop.db.session.add(Note(text=f"note {number}"))
            shop.bus.signal("note_added").send(shop.app, number=10 + number)
            shop.db.session.commit()

        return add

    connect_several(shop.bus, failing)
    connect_several(shop.bus, good)

    deliver_to_failing(eventbus)

    numbers = sorted(event.payload["number"] for event in eventbus.published("note_added"))
    assert numbers == [10 + number for number in range(SEVERAL)]
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_each_receiver_has_an_app_context_whose_teardown_gets_its_error(
    shop: Shop, eventbus: Isolation
) -> None:
    torn: list[tuple[str, str | None]] = []

    @shop.app.teardown_appcontext
    def tear_down(error: BaseException | None) -> None:
        torn.append((flask.g.get("name", ""), str(error) if error else None))

    @shop.bus.on("paid")
    def good(sender: str) -> None:
        assert "name" not in flask.g
        flask.g.name = "good"

    @shop.bus.on("paid")
    def bad(sender: str) -> None:
        assert "name" not in flask.g
        flask.g.name = "bad"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        eventbus.deliver("paid")

    assert sorted(torn) == [("bad", "no"), ("good", None)]


def test_an_app_context_that_cannot_be_made_fails_each_receiver(
    shop: Shop, eventbus: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    @shop.bus.on("paid")
    def first(sender: str) -> None: ...

    @shop.bus.on("paid")
    def second(sender: str) -> None: ...

    def refuse() -> None:
        raise RuntimeError("no context")

    monkeypatch.setattr(shop.app, "app_context", refuse)
    eventbus.deliver("paid", retry=True)

    failed = sorted(failure.receiver.rpartition(".")[2] for failure in eventbus.failures)
    assert failed == ["first", "second"]


# -- without Flask --------------------------------------------------------------------------


def sources(engine: Engine) -> dict[str, Any]:
    """The arguments of ``register_session()``, each with a session that receivers share."""
    shared = Session(engine)
    return {
        "a session": shared,
        "a scoped session": scoped_session(sessionmaker(engine)),
        "a function": lambda: shared,
    }


@pytest.mark.parametrize("kind", ["a session", "a scoped session", "a function"])
def test_without_an_app_a_failed_receiver_is_rolled_back_in_the_registered_session(
    engine: Engine, eventbus: Isolation, make_bus: Make, kind: str
) -> None:
    bus = make_bus("memory://")
    source = sources(engine)[kind]
    bus.register_session(source)

    def session() -> Session:
        found: Session = source if isinstance(source, Session) else source()
        return found

    def failing(number: int) -> Callable[..., None]:
        def fail(sender: str) -> None:
            session().add(Note(text="half done" if number % 2 else None))
            session().flush()
            raise ConnectionError("the bank is away")

        return fail

    def good(number: int) -> Callable[..., None]:
        def add(sender: str) -> None:
            session().add(Note(text=f"note {number}"))
            session().commit()

        return add

    connect_several(bus, failing)
    connect_several(bus, good)

    deliver_to_failing(eventbus)

    texts = sorted(session().scalars(select(Note.text)))
    session().close()
    assert texts == [f"note {number}" for number in range(SEVERAL)]


def test_a_failed_receiver_is_rolled_back_in_an_asynchronous_session(
    tmp_path: Path, engine: Engine, eventbus: Isolation, make_bus: Make
) -> None:
    bus = make_bus("memory://")
    asynchronous = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/notes.db")
    session = async_scoped_session(async_sessionmaker(asynchronous), scopefunc=lambda: 1)
    bus.register_session(session)

    @bus.on("paid")
    async def fail(sender: str, n: int) -> None:
        session.add(Note(text=f"note {n}"))
        await session.flush()
        if n == 1:
            raise ConnectionError("the bank is away")
        await session.commit()

    with pytest.raises(ConnectionError):
        eventbus.deliver("paid", n=1)
    eventbus.deliver("paid", n=2)

    async def finish() -> None:
        await session.remove()
        await asynchronous.dispose()

    asyncio.run(finish())
    with Session(engine) as reading:
        assert list(reading.scalars(select(Note.text))) == ["note 2"]


def test_a_rollback_that_fails_is_logged_and_the_receivers_error_stays(
    eventbus: Isolation, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Session):
        def in_transaction(self) -> bool:
            return True

        def rollback(self) -> None:
            raise OSError("the database is away")

    bus = make_bus("memory://")
    bus.register_session(Broken())

    @bus.on("paid")
    def fail(sender: str) -> None:
        raise ConnectionError("the bank is away")

    with pytest.raises(ConnectionError, match="the bank is away"):
        eventbus.deliver("paid")

    assert "could not be rolled back" in caplog.text
    assert "the database is away" in caplog.text
