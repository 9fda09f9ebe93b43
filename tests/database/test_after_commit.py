"""Events leave after the commit of the transaction they were sent in, and vanish with it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from servers import RedisServer
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from waiting import wait_until

from flask_eventbus import Bus, ConfigError, EventBus, PayloadError, PublishError, current_event
from flask_eventbus.publisher.message import Message
from flask_eventbus.publisher.publisher import Publisher
from flask_eventbus.testing import Isolation

Make = Callable[..., Bus]


class Base(DeclarativeBase):
    """The tables of these tests."""


class User(Base):
    """A row of the table ``users``."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A real database in a file."""
    engine = create_engine(f"sqlite:///{tmp_path}/users.db")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@pytest.fixture
def bare_bus(eventbus: Isolation, make_bus: Make) -> Bus:
    """A bus whose events wait for a commit, without a session."""
    return make_bus("memory://", publish={"user_*": {"after_commit": True}, "plain": None})


@pytest.fixture
def bus(bare_bus: Bus, session: Session) -> Bus:
    """A bus whose events wait for the commits of ``session``."""
    bare_bus.register_session(session)
    return bare_bus


def ids(eventbus: Isolation, name: str = "*") -> list[int]:
    """The ids in the payloads of what was published, in order."""
    return [event.payload["id"] for event in eventbus.published(name)]


def test_an_event_leaves_after_the_commit(bus: Bus, session: Session, eventbus: Isolation) -> None:
    session.add(User(id=1, email="ada"))
    bus.signal("user_added").send(id=1)
    before = ids(eventbus)
    session.commit()

    assert (before, ids(eventbus)) == ([], [1])


def test_an_event_leaves_when_another_connection_can_read_the_row(
    bus: Bus, session: Session, engine: Engine, shared_redis: RedisServer, make_bus: Make
) -> None:
    seen: list[Any] = []
    consumer = make_bus("memory://", "consumer")

    @consumer.on("user_added")
    def look(sender: str, id: int) -> None:
        with Session(engine) as another:
            user = another.get(User, id)
            seen.append(user and user.email)

    consumer.start()
    assert consumer.ready(10)

    session.add(User(id=1, email="ada"))
    session.flush()
    bus.signal("user_added").send(id=1)
    session.commit()

    assert wait_until(lambda: seen) == ["ada"]


def test_the_testing_kit_says_why_it_sees_nothing_before_the_commit(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.begin()
    bus.signal("user_added").send(id=1)

    with pytest.raises(AssertionError, match="after the commit of its transaction: commit first"):
        eventbus.assert_published("user_added")


def test_a_rollback_discards_events(bus: Bus, session: Session, eventbus: Isolation) -> None:
    session.add(User(id=1, email="ada"))
    bus.signal("user_added").send(id=1)
    session.rollback()
    session.add(User(id=2, email="bob"))
    bus.signal("user_added").send(id=2)
    session.commit()

    assert ids(eventbus) == [2]
    assert bus.health().counts["discarded"] == 1


def test_outside_a_transaction_an_event_leaves_at_once(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    bus.signal("user_added").send(id=1)

    assert ids(eventbus) == [1]
    assert not session.in_transaction()


def test_a_route_without_after_commit_does_not_wait(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.add(User(id=1, email="ada"))
    bus.signal("plain").send(id=1)
    session.rollback()

    assert ids(eventbus) == [1]


def test_local_receivers_run_at_send_and_not_after_the_commit(bus: Bus, session: Session) -> None:
    received = []
    bus.signal("user_added").connect(lambda sender, id: received.append(id), weak=False)

    session.begin()
    bus.signal("user_added").send(id=1)

    assert received == [1]


def test_a_payload_is_encoded_at_send(bus: Bus, session: Session, eventbus: Isolation) -> None:
    tags = ["new"]

    session.begin()
    bus.signal("user_added").send(id=1, tags=tags)
    tags.append("changed")
    session.commit()

    eventbus.assert_published("user_added", tags=["new"])


def test_an_unsupported_payload_fails_at_send(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    user = User(id=1, email="ada")
    session.add(user)

    with pytest.raises(PayloadError, match=r"payload\.user: .*\.User cannot be encoded"):
        bus.signal("user_added").send(user=user)

    session.commit()
    eventbus.assert_not_published()


def test_events_leave_in_the_order_in_which_they_were_sent(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.begin()
    bus.signal("user_added").send(id=1)

    with session.begin_nested():
        bus.signal("user_changed").send(id=2)

    bus.signal("user_added").send(id=3)
    session.commit()
    bus.signal("user_changed").send(id=4)

    assert ids(eventbus) == [1, 2, 3, 4]


# -- savepoints ---------------------------------------------------------------------------


def test_rolling_back_a_savepoint_discards_only_its_own_events(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.begin()
    bus.signal("user_added").send(id=1)
    savepoint = session.begin_nested()
    bus.signal("user_added").send(id=2)
    savepoint.rollback()
    bus.signal("user_added").send(id=3)
    session.commit()

    assert ids(eventbus) == [1, 3]


def test_events_of_a_released_savepoint_wait_for_the_commit(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.begin()

    with session.begin_nested():
        bus.signal("user_added").send(id=1)

    before = ids(eventbus)
    session.commit()

    assert (before, ids(eventbus)) == ([], [1])


def test_events_of_a_released_savepoint_are_discarded_with_the_outer_savepoint(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.begin()
    outer = session.begin_nested()
    bus.signal("user_added").send(id=1)

    with session.begin_nested():
        bus.signal("user_added").send(id=2)

    outer.rollback()
    bus.signal("user_added").send(id=3)
    session.commit()

    assert ids(eventbus) == [3]


def test_a_rollback_discards_events_of_released_savepoints(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.begin()

    with session.begin_nested():
        bus.signal("user_added").send(id=1)

    session.begin_nested()
    bus.signal("user_added").send(id=2)
    session.rollback()
    session.commit()

    eventbus.assert_not_published()


def test_a_failed_insert_discards_the_event_of_its_savepoint(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    for number, email in enumerate(["ada", "bob", "ada", "eve"]):
        with suppress(IntegrityError), session.begin_nested():
            bus.signal("user_added").send(id=number)
            session.add(User(email=email))

    session.commit()

    assert ids(eventbus) == [0, 1, 3]


def test_a_commit_with_open_savepoints_publishes_all_events(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.begin()
    session.begin_nested()
    bus.signal("user_added").send(id=1)
    session.begin_nested()
    bus.signal("user_added").send(id=2)
    session.commit()

    assert ids(eventbus) == [1, 2]


# -- ends of other kinds --------------------------------------------------------------------


def test_closing_a_session_without_a_commit_publishes_nothing_and_logs_a_warning(
    bus: Bus, session: Session, eventbus: Isolation, caplog: pytest.LogCaptureFixture
) -> None:
    session.add(User(id=1, email="ada"))
    bus.signal("user_added").send(id=1)
    session.close()

    eventbus.assert_not_published()
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("A session was closed without a commit: 1 events")
    assert "user_added" in line


def test_a_rollback_logs_no_warning(
    bus: Bus, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    with suppress(ZeroDivisionError), session.begin(), session.begin_nested():
        bus.signal("user_added").send(id=1 // 0)

    with suppress(ZeroDivisionError), session.begin():
        bus.signal("user_added").send(id=1)
        raise ZeroDivisionError

    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_commit_that_fails_publishes_nothing(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.add_all([User(email="ada"), User(email="ada")])
    bus.signal("user_added").send(id=1)

    with pytest.raises(IntegrityError):
        session.commit()

    session.rollback()
    eventbus.assert_not_published()


def test_a_session_can_be_used_after_each_commit_and_rollback(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    for number in range(4):
        session.begin()
        bus.signal("user_added").send(id=number)
        (session.rollback if number % 2 else session.commit)()

    assert ids(eventbus) == [0, 2]


def test_events_sent_during_the_flush_of_a_commit_leave_with_it(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    def tell(mapper: object, connection: object, user: User) -> None:
        bus.signal("user_added").send(id=user.id)

    event.listen(User, "after_insert", tell)

    try:
        session.add(User(email="ada"))
        session.commit()
        session.add(User(email="ada"))

        with pytest.raises(IntegrityError):
            session.commit()
    finally:
        event.remove(User, "after_insert", tell)

    assert ids(eventbus) == [1]


def test_events_sent_by_an_after_commit_listener_leave_with_the_commit(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    event.listen(session, "after_commit", lambda session: bus.signal("user_added").send(id=1))

    session.begin()
    session.commit()

    assert ids(eventbus) == [1]


def test_an_after_commit_listener_that_raises_loses_no_event(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    event.listen(session, "after_commit", lambda session: 1 // 0)
    session.add(User(id=1, email="ada"))
    bus.signal("user_added").send(id=1)

    with pytest.raises(ZeroDivisionError):
        session.commit()

    session.close()
    assert session.get(User, 1) is not None
    assert ids(eventbus) == [1]


def test_bulk_operations_publish_after_their_commit(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    session.bulk_insert_mappings(User.__mapper__, [{"id": 1, "email": "ada"}])
    bus.signal("user_added").send(id=1)
    before = ids(eventbus)
    session.commit()

    assert (before, ids(eventbus)) == ([], [1])


def test_a_session_within_a_connections_own_transaction_publishes_at_its_own_commit(
    engine: Engine, bus: Bus, eventbus: Isolation
) -> None:
    with engine.connect() as connection:
        outer = connection.begin()

        with Session(connection, join_transaction_mode="create_savepoint") as session:
            bus.register_session(session)
            session.add(User(id=1, email="ada"))
            bus.signal("user_added").send(id=1)
            session.commit()

        outer.rollback()

    assert ids(eventbus) == [1]


# -- causes, and the time -------------------------------------------------------------------


def test_the_causes_and_time_of_an_event_are_those_of_its_send(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    sent_at = []

    @bus.on("ordered")
    def react(sender: str) -> None:
        session.begin()
        bus.signal("user_added").send(id=1)
        sent_at.append(current_event.time)

    cause = eventbus.deliver("ordered")
    bus.signal("plain").send(id=2)
    session.commit()

    last, first = eventbus.published()
    assert (first.causation_id, first.correlation_id, first.hops) == (cause.id, cause.id, 1)
    assert first.time < last.time


# -- which session --------------------------------------------------------------------------


def test_a_scoped_session_belongs_to_its_thread(
    engine: Engine, eventbus: Isolation, bare_bus: Bus
) -> None:
    scoped = scoped_session(sessionmaker(engine))
    bare_bus.register_session(scoped)
    scoped.add(User(id=1, email="ada"))

    def elsewhere() -> None:
        bare_bus.signal("user_added").send(id=2)
        assert not scoped.registry.has(), "A session was made only to ask for its transaction."

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    bare_bus.signal("user_added").send(id=1)
    before = ids(eventbus)
    scoped.commit()
    scoped.remove()

    assert (before, ids(eventbus)) == ([2], [2, 1])


def test_removing_a_scoped_session_without_a_commit_publishes_nothing(
    engine: Engine, eventbus: Isolation, bare_bus: Bus
) -> None:
    scoped = scoped_session(sessionmaker(engine))
    bare_bus.register_session(scoped)
    scoped.add(User(id=1, email="ada"))
    bare_bus.signal("user_added").send(id=1)
    scoped.remove()

    eventbus.assert_not_published()


def test_an_event_joins_the_session_of_a_maker_that_began_last_in_this_thread(
    engine: Engine, eventbus: Isolation, bare_bus: Bus
) -> None:
    maker, stranger = sessionmaker(engine), sessionmaker(engine)
    bare_bus.register_session(maker)

    with maker() as outer, maker() as inner, stranger() as other:
        outer.begin()
        bare_bus.signal("user_added").send(id=1)
        inner.begin()
        other.begin()
        bare_bus.signal("user_added").send(id=2)
        inner.commit()
        assert ids(eventbus) == [2]
        bare_bus.signal("user_added").send(id=3)
        outer.commit()
        bare_bus.signal("user_added").send(id=4)

    assert ids(eventbus) == [2, 1, 3, 4]


def test_a_registered_session_class_covers_all_its_sessions(
    engine: Engine, eventbus: Isolation, bare_bus: Bus
) -> None:
    class Own(Session):
        pass

    bare_bus.register_session(Own)

    with Own(engine) as own, own.begin():
        bare_bus.signal("user_added").send(id=1)
        assert ids(eventbus) == []

    with Session(engine) as session, session.begin():
        bare_bus.signal("user_added").send(id=2)
        assert ids(eventbus) == [1, 2]


def test_a_new_session_class_is_not_mistaken_for_a_deleted_one(
    engine: Engine, eventbus: Isolation, bare_bus: Bus
) -> None:
    for n in range(20):
        own = type("Own", (Session,), {})
        bare_bus.register_session(own)

        with own(engine) as session, session.begin():
            bare_bus.signal("user_added").send(id=n)
            assert ids(eventbus) == list(range(n))

        del own, session
        # Its id is free for the next one then.
        bare_bus.register_session(lambda: None)
        gc.collect()

    assert ids(eventbus) == list(range(20))


def test_a_session_of_another_thread_is_ignored(
    engine: Engine, eventbus: Isolation, bare_bus: Bus
) -> None:
    maker = sessionmaker(engine)
    bare_bus.register_session(maker)

    with maker() as session, session.begin():
        thread = threading.Thread(target=lambda: bare_bus.signal("user_added").send(id=1))
        thread.start()
        thread.join()
        assert ids(eventbus) == [1]


def test_a_function_can_name_the_current_session(
    session: Session, eventbus: Isolation, bare_bus: Bus
) -> None:
    in_use: list[Session] = []
    bare_bus.register_session(lambda: in_use[0] if in_use else None)

    session.begin()
    bare_bus.signal("user_added").send(id=1)
    in_use.append(session)
    bare_bus.signal("user_added").send(id=2)
    session.rollback()

    assert ids(eventbus) == [1]


def test_events_of_two_sessions_are_kept_apart(
    engine: Engine, eventbus: Isolation, bare_bus: Bus
) -> None:
    with Session(engine) as one, Session(engine) as two:
        for number, session in enumerate([one, two, one, two]):
            bare_bus.register_session(session)
            session.connection()
            bare_bus.signal("user_added").send(id=number)

        two.commit()
        assert ids(eventbus) == [1, 3]
        one.rollback()

    assert ids(eventbus) == [1, 3]


def test_threads_with_own_sessions_publish_their_committed_events(
    engine: Engine, eventbus: Isolation, bare_bus: Bus
) -> None:
    scoped = scoped_session(sessionmaker(engine))
    bare_bus.register_session(scoped)

    def work(start: int) -> None:
        for number in range(start, start + 50):
            scoped.begin()
            bare_bus.signal("user_added").send(id=number)
            (scoped.rollback if number % 2 else scoped.commit)()
            scoped.remove()

    threads = [threading.Thread(target=work, args=[start]) for start in range(0, 400, 50)]

    for thread in threads:
        thread.start()

    for thread in threads:
        thread.join()

    assert sorted(ids(eventbus)) == list(range(0, 400, 2))


def test_registering_something_that_is_not_a_session_is_refused(make_bus: Make) -> None:
    db = SQLAlchemy(model_class=Base)

    for wrong in (db, "session", None, 7):
        with pytest.raises(
            ConfigError, match=r"register_session\(\) got .* which is not a session"
        ):
            make_bus("memory://").register_session(wrong)


def test_a_bus_without_a_session_fails_at_send(eventbus: Isolation, bare_bus: Bus) -> None:
    with pytest.raises(ConfigError, match=r"'user_added' .* bus\.register_session\(session\)"):
        bare_bus.signal("user_added").send(id=1)

    eventbus.assert_not_published()


def test_after_commit_must_be_true_or_false(make_bus: Make) -> None:
    with pytest.raises(ConfigError, match=r"\['after_commit'\] is 'yes'\. Set it to True or False"):
        make_bus("memory://", publish={"user_added": {"after_commit": "yes"}})


def test_a_route_in_code_takes_the_option_too(
    session: Session, eventbus: Isolation, make_bus: Make
) -> None:
    bus = make_bus("memory://")
    bus.register_session(session)
    user_added = bus.publishes("user_added", after_commit=True)

    session.begin()
    user_added.send(id=1)
    session.rollback()

    eventbus.assert_not_published()


@pytest.mark.parametrize("prevented", ["sqlalchemy", "sqlalchemy.orm"])
def test_without_sqlalchemy_the_option_is_refused_and_everything_else_works(prevented: str) -> None:
    program = f"""
import sys
from importlib.machinery import PathFinder

class Nothing(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == {prevented!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Nothing)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {prevented!r} else found(name)

from flask_eventbus import Bus, ConfigError

bus = Bus("memory://", service="tests", publish=["plain"])
bus.signal("plain").send(id=1)
assert bus.flush(5)

try:
    bus.publishes("user_added", after_commit=True).send(id=1)
    bus.register_session(object())
except ConfigError as error:
    print(error)
"""

    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert "pip install 'sqlalchemy>=2.0'" in outcome.stdout


# -- Flask-SQLAlchemy -------------------------------------------------------------------------


class Shop:
    """A Flask app with a database and a bus, made in either order."""

    def __init__(self, folder: Path, *, bus_first: bool = True, **options: Any) -> None:
        self.db = SQLAlchemy(model_class=type("Base", (DeclarativeBase,), {}))
        self.bus = EventBus()
        self.app = Flask("shop")
        self.app.config.from_mapping(
            SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder}/shop.db",
            EVENTBUS_SERVICE="shop",
            EVENTBUS_PUBLISH={"user_added": {"after_commit": True, **options}},
        )

        for extension in (self.bus, self.db) if bus_first else (self.db, self.bus):
            extension.init_app(self.app)

        self.app.add_url_rule("/<int:number>/<end>", view_func=self.view, methods=["POST"])

    def view(self, number: int, end: str) -> str:
        self.db.session.connection()
        self.bus.signal("user_added").send(self.app, id=number)

        if end == "commit":
            self.db.session.commit()
        elif end == "raise":
            raise ZeroDivisionError

        return ""

    def close(self) -> None:
        with self.app.app_context():
            self.db.engine.dispose()


@pytest.fixture
def shop(tmp_path: Path, eventbus: Isolation) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.close()


@pytest.mark.parametrize("bus_first", [True, False])
def test_flask_sqlalchemy_is_found_in_either_order(
    tmp_path: Path, eventbus: Isolation, bus_first: bool
) -> None:
    shop = Shop(tmp_path, bus_first=bus_first)
    client = shop.app.test_client()

    for path in ("/1/commit", "/2/return", "/3/raise", "/4/commit"):
        client.post(path)

    shop.close()
    assert ids(eventbus) == [1, 4]


def test_a_view_that_forgets_to_commit_logs_a_warning(
    shop: Shop, eventbus: Isolation, caplog: pytest.LogCaptureFixture
) -> None:
    shop.app.test_client().post("/1/return")

    assert "A session was closed without a commit" in caplog.text
    assert shop.bus.health().counts["discarded"] == 1


def test_outside_an_app_context_an_event_leaves_at_once(shop: Shop, eventbus: Isolation) -> None:
    shop.bus.signal("user_added").send(shop.app, id=1)

    assert ids(eventbus) == [1]


def test_a_registered_session_takes_precedence_over_flask_sqlalchemy(
    shop: Shop, session: Session, eventbus: Isolation
) -> None:
    shop.bus.register_session(session)
    session.begin()

    shop.app.test_client().post("/1/commit")
    before = ids(eventbus)
    session.commit()

    assert (before, ids(eventbus)) == ([], [1])


def test_an_app_without_a_session_fails_at_send(eventbus: Isolation) -> None:
    bus = EventBus()
    app = Flask("shop")
    app.config.from_mapping(
        EVENTBUS_SERVICE="shop", EVENTBUS_PUBLISH={"user_added": {"after_commit": True}}
    )
    bus.init_app(app)

    with pytest.raises(ConfigError, match=r"db\.init_app\(app\) of Flask-SQLAlchemy"):
        bus.signal("user_added").send(app, id=1)


# -- Redis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("via", ["channel", "stream"])
def test_a_commit_succeeds_while_redis_is_away(
    redis_server: RedisServer, session: Session, make_bus: Make, via: str
) -> None:
    bus = make_bus(
        redis_server.url, publish={"user_added": {"via": via, "after_commit": True}}, timeout=0.1
    )
    bus.register_session(session)
    redis_server.kill()

    for number in range(2):
        session.add(User(id=number, email=f"{number}"))
        bus.signal("user_added").send(id=number)
        session.commit()

    assert session.query(User).count() == 2
    assert bus.health().buffered == 2
    redis_server.start()
    assert bus.flush(10)
    assert bus.health().counts["published"] == 2


def test_the_testing_kit_lets_a_commit_succeed_while_redis_is_away(
    shop: Shop, eventbus: Isolation
) -> None:
    with eventbus.redis_away():
        assert shop.app.test_client().post("/1/commit").status_code == 200

    assert ids(eventbus) == [1]


@pytest.mark.parametrize("policy", ["buffer", "raise"])
def test_a_commit_waits_for_confirmation_and_succeeds_without_it(
    redis_server: RedisServer,
    session: Session,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
    policy: str,
) -> None:
    bus = make_bus(
        redis_server.url,
        publish={"user_added": {"after_commit": True, "confirm": True}},
        on_outage=policy,
        timeout=1.0,
    )
    bus.register_session(session)
    bus.signal("user_added").send(id=0)

    redis_server.hang()
    session.add(User(id=1, email="ada"))
    bus.signal("user_added").send(id=1)
    bus.signal("user_added").send(id=2)
    session.commit()
    redis_server.resume()

    assert bus.flush(10)
    assert session.get(User, 1) is not None
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "Redis did not confirm 2 of the events" in line
    assert f"user_added {bus.health().node}-2, user_added {bus.health().node}-3" in line
    assert bus.health().counts["published"] == 3


class TimeLimitError(Exception):
    """An error that the signal handler of a task queue raises at any point of the program."""


def test_a_time_limit_raised_in_a_waiting_commit_is_passed_on_and_no_event_is_lost(
    redis_server: RedisServer, session: Session, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strike(number: int, frame: object) -> None:
        raise TimeLimitError

    monkeypatch.setattr(Publisher, "wait_for_confirmations", _alarmed)
    bus = make_bus(
        redis_server.url,
        publish={"user_added": {"after_commit": True, "confirm": True}},
        timeout=60,
    )
    bus.register_session(session)
    redis_server.hang()
    before = signal.signal(signal.SIGALRM, strike)

    try:
        session.add(User(id=1, email="ada"))
        bus.signal("user_added").send(id=1)
        bus.signal("user_added").send(id=2)
        with pytest.raises(TimeLimitError):
            session.commit()
    finally:
        signal.signal(signal.SIGALRM, before)

    redis_server.resume()
    assert session.get(User, 1) is not None
    assert bus.flush(20)
    assert bus.health().counts["published"] == 2
    monkeypatch.setattr(Publisher, "wait_for_confirmations", _wait_for_confirmations)
    bus.signal("user_added").send(id=3)
    session.commit()


def _alarmed(publisher: Publisher, sent: Sequence[Message], deadline: float) -> list[Message]:
    """Wait for confirmations that do not come, and get an alarm meanwhile."""
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    return _wait_for_confirmations(publisher, sent, deadline)


_wait_for_confirmations = Publisher.wait_for_confirmations


def test_a_time_limit_raised_at_one_event_of_a_commit_lets_the_others_leave(
    shared_redis: RedisServer, session: Session, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_pending = Publisher.publish_pending

    def limited(publisher: Publisher, draft: Message, deadline: float) -> None:
        if not taken:
            taken.append(draft)
            raise TimeLimitError
        publish_pending(publisher, draft, deadline)

    taken: list[Message] = []
    monkeypatch.setattr(Publisher, "publish_pending", limited)
    bus = make_bus(shared_redis.url, publish={"user_*": {"after_commit": True}})
    bus.register_session(session)

    session.begin()
    for number in range(3):
        bus.signal("user_added").send(id=number)
    with pytest.raises(TimeLimitError):
        session.commit()

    assert bus.flush(10)
    assert bus.health().counts["published"] == 2


def test_a_confirmed_commit_waits_until_redis_has_the_events(
    shared_redis: RedisServer, session: Session, make_bus: Make
) -> None:
    bus = make_bus(
        shared_redis.url,
        publish={"user_added": {"after_commit": True, "confirm": True}},
        timeout=10,
    )
    bus.register_session(session)

    session.begin()
    bus.signal("user_added").send(id=1)
    session.commit()

    assert bus.health().counts["published"] == 1


def test_with_raise_a_known_outage_fails_the_send_and_the_transaction(
    redis_server: RedisServer, session: Session, make_bus: Make
) -> None:
    bus = make_bus(
        redis_server.url, publish={"user_added": {"after_commit": True}}, on_outage="raise"
    )
    bus.register_session(session)
    redis_server.kill()
    bus.node.ask()
    wait_until(lambda: not bus.health().publishing)

    session.add(User(id=1, email="ada"))

    with pytest.raises(PublishError), session:
        bus.signal("user_added").send(id=1)

    assert session.get(User, 1) is None


def test_with_raise_an_outage_that_begins_before_the_commit_does_not_fail_it(
    redis_server: RedisServer, session: Session, make_bus: Make
) -> None:
    bus = make_bus(
        redis_server.url, publish={"user_added": {"after_commit": True}}, on_outage="raise"
    )
    bus.register_session(session)
    session.add(User(id=1, email="ada"))
    bus.signal("user_added").send(id=1)
    redis_server.kill()
    bus.node.ask()
    wait_until(lambda: not bus.health().publishing)

    session.commit()
    redis_server.start()

    assert bus.flush(10)
    assert bus.health().counts["published"] == 1


def test_an_event_waiting_for_a_commit_leaves_after_the_bus_was_stopped(
    bus: Bus, session: Session, eventbus: Isolation
) -> None:
    bus.signal("user_added").send(id=1)
    session.begin()
    bus.signal("user_added").send(id=2)
    bus.stop()
    session.commit()

    first, second = eventbus.published()
    assert (first.payload["id"], second.payload["id"]) == (1, 2)
    assert (first.seq, second.seq) == (1, 1)
    assert first.node != second.node


# -- asynchronous sessions ------------------------------------------------------------------


@pytest.fixture
def async_url(engine: Engine) -> str:
    """The database by an asynchronous driver."""
    return str(engine.url.set(drivername="sqlite+aiosqlite"))


@pytest.mark.parametrize("scoped", [False, True])
def test_tasks_with_async_sessions_publish_their_committed_events(
    async_url: str, eventbus: Isolation, bare_bus: Bus, scoped: bool
) -> None:
    async def work(source: Any, number: int) -> None:
        async with source() as session:
            # The transaction begins where SQLAlchemy waits for its driver.
            assert await session.get(User, number) is None
            bare_bus.signal("user_added").send(id=number)

            with suppress(ZeroDivisionError):
                async with session.begin_nested():
                    bare_bus.signal("user_added").send(id=number + 100)
                    number % 3 or 1 // 0

            await (session.rollback if number % 2 else session.commit)()

    async def main() -> None:
        engine = create_async_engine(async_url)
        maker = async_sessionmaker(engine)
        source = async_scoped_session(maker, asyncio.current_task) if scoped else maker
        bare_bus.register_session(source)
        await asyncio.gather(*(work(source, number) for number in range(8)))
        await engine.dispose()

    asyncio.run(main())

    assert sorted(ids(eventbus)) == [0, 2, 4, 6, 102, 104]


def test_async_sessions_of_two_makers_are_distinguished_by_their_classes(
    eventbus: Isolation, bare_bus: Bus
) -> None:
    maker = async_sessionmaker(sync_session_class=sessionmaker())
    stranger = async_sessionmaker()
    bare_bus.register_session(maker)

    async def work(end: str) -> None:
        async with maker() as session, stranger() as other:
            # No statement runs, so no driver is needed.
            session.sync_session.begin()
            other.sync_session.begin()
            bare_bus.signal("user_added").send(id=len(end))
            await getattr(session, end)()

    for end in ("commit", "rollback", "close"):
        asyncio.run(work(end))

    assert ids(eventbus) == [len("commit")]


def test_one_async_session_can_be_registered(eventbus: Isolation, bare_bus: Bus) -> None:
    async def main() -> None:
        async with AsyncSession() as session:
            bare_bus.register_session(session)
            session.sync_session.begin()
            bare_bus.signal("user_added").send(id=1)
            await session.commit()

    asyncio.run(main())

    assert ids(eventbus) == [1]
