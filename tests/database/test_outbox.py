"""Events that are committed with their rows, and the relay that publishes them.

The database is SQLite in a file, or what ``TEST_DATABASE_URL`` names.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from programs import Program
from proxies import Proxy
from servers import RedisServer
from sqlalchemy import Engine, MetaData, String, create_engine, event, inspect, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.pool import NullPool
from waiting import wait_until

from flask_eventbus import Bus, ConfigError, EventBus, PayloadError
from flask_eventbus.__main__ import main
from flask_eventbus.cli.app import flask_commands
from flask_eventbus.codec.codec import Codec, split_message
from flask_eventbus.config import TIMING, Config, Timing
from flask_eventbus.database import outbox
from flask_eventbus.database.outbox import Entry, Outbox, store
from flask_eventbus.database.relay import BatchResult, Relay
from flask_eventbus.event import Event, handling
from flask_eventbus.publisher.connection import PublishConnection
from flask_eventbus.publisher.message import Destination, Destinations
from flask_eventbus.routing.routes import Route
from flask_eventbus.testing import Isolation
from flask_eventbus.transport.connections import Connections
from flask_eventbus.typing import Via

pytestmark = pytest.mark.second_look("starts and kills relays and Redis servers")

Make = Callable[..., Bus]


class Base(DeclarativeBase):
    """The tables of these tests."""


class User(Base):
    """A row of the table ``users``."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(80), unique=True)


outbox.table(Base.metadata)


@pytest.fixture
def database(tmp_path: Path) -> str:
    """The URL of a real database."""
    return os.environ.get("TEST_DATABASE_URL", f"sqlite:///{tmp_path}/shop.db")


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    """It, with the tables of these tests and nothing in them."""
    engine = create_engine(database)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@pytest.fixture
def waiting(engine: Engine) -> Outbox:
    """The outbox as another connection sees it."""
    return Outbox(engine)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own, on a server that others use too."""
    return f"outbox-{abs(hash(request.node.name))}"


@pytest.fixture
def bus(shared_redis: RedisServer, session: Session, prefix: str, make_bus: Make) -> Bus:
    """A bus that writes into the outbox by ``session``."""
    bus = make_bus(shared_redis.url, "shop", prefix=prefix, publish={"user_*": {"outbox": True}})
    bus.register_session(session)
    return bus


class ChannelListener:
    """Receives what is published, byte by byte, without a bus."""

    def __init__(self, server: RedisServer, prefix: str) -> None:
        self._prefix = prefix
        self._codec = Codec()
        self._events: list[Event] = []
        self._client = server.client
        self._channel = self._client.pubsub()
        self._channel.psubscribe(f"{prefix}:*")
        self._channel.get_message(timeout=5)

    @property
    def events(self) -> list[Event]:
        """All that was published so far."""
        while (message := self._channel.get_message(timeout=0.02)) is not None:
            self._events += map(self._codec.decode, split_message(message["data"]))

        return list(self._events)

    @property
    def ids(self) -> list[int]:
        """The ids in their payloads, in order."""
        return [found.payload["id"] for found in self.events]

    def close(self) -> None:
        self._channel.close()
        self._client.close()


@pytest.fixture
def listener(shared_redis: RedisServer, prefix: str) -> Iterator[ChannelListener]:
    listener = ChannelListener(shared_redis, prefix)
    yield listener
    listener.close()


@contextmanager
def relaying(
    server: RedisServer, engine: Engine, prefix: str, batch: int = 100, timing: Timing = TIMING
) -> Iterator[Relay]:
    """A relay in this process."""
    exchange = exchange_with(server.url, prefix, timing)

    try:
        yield Relay(Outbox(engine), exchange, way(prefix), batch=batch)
    finally:
        exchange.close()


def exchange_with(url: str, prefix: str, timing: Timing = TIMING) -> PublishConnection:
    """Return the connection with which a relay publishes."""
    connections = Connections(url, name="relay", timing=timing)
    return PublishConnection(connections, Config(service="relay", prefix=prefix), timeout=2)


def way(prefix: str) -> Callable[[str, Via], Destination]:
    """Return a function: the destination of an event by name and ``via``, without routes."""
    ways = Destinations(Config(service="relay", prefix=prefix))
    return lambda name, via: ways.find(name, Route(name=name, via=via))


@pytest.fixture
def relay(shared_redis: RedisServer, engine: Engine, prefix: str) -> Iterator[Relay]:
    with relaying(shared_redis, engine, prefix) as relay:
        yield relay


def empty(relay: Relay) -> None:
    """Let a relay publish what waits."""
    never = threading.Event()

    while relay.publish_batch(never) is not BatchResult.EMPTY:
        pass


def fill(
    engine: Engine, count: int, name: str = "user_added", size: int = 0, via: str = "channel"
) -> None:
    """Write events into the outbox as a service would."""
    codec = Codec()
    seal = codec.envelope("shop", name)

    with Session(engine) as session, session.begin():
        for number in range(count):
            body = codec.pack_payload({"id": number, "filling": b"." * size})
            made = {"id": f"origin-{number + 1}", "time_ns": 1}
            entry = Entry(
                event_id=made["id"],  # type: ignore[arg-type]  # of two types
                name=name,
                via=via,
                event=seal(body, **made),  # type: ignore[arg-type]  # the same
            )
            store(session, entry, "relay")


# -- into the outbox --------------------------------------------------------------------------


def test_an_event_is_committed_with_the_rows_it_is_about(
    bus: Bus, session: Session, waiting: Outbox, listener: ChannelListener
) -> None:
    session.add(User(id=1, email="ada"))
    bus.signal("user_added").send(id=1)
    session.commit()

    assert waiting.count() == 1
    assert bus.flush(5)
    assert listener.events == []


def test_a_rollback_discards_the_event(bus: Bus, session: Session, waiting: Outbox) -> None:
    session.add(User(id=1, email="ada"))
    bus.signal("user_added").send(id=1)
    session.rollback()

    assert waiting.count() == 0


def test_rolling_back_a_savepoint_discards_only_its_own_events(
    bus: Bus, session: Session, relay: Relay, listener: ChannelListener
) -> None:
    for number, email in enumerate(["ada", "bob", "ada", "eve"]):
        with suppress(IntegrityError), session.begin_nested():
            bus.signal("user_added").send(id=number)
            session.add(User(id=number + 1, email=email))

    session.commit()
    empty(relay)

    assert listener.ids == [0, 1, 3]


def test_an_event_sent_outside_a_transaction_is_stored_in_one_of_its_own(
    bus: Bus, session: Session, waiting: Outbox
) -> None:
    bus.signal("user_added").send(id=1)

    assert waiting.count() == 1
    assert not session.in_transaction()


def test_an_event_sent_by_an_after_commit_listener_is_stored_and_the_commit_stands(
    engine: Engine,
    bus: Bus,
    session: Session,
    waiting: Outbox,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @partial(event.listen, session, "after_commit")
    def tell(session: Session) -> None:
        bus.signal("user_added").send(id=1)

    session.add(User(id=1, email="ada"))
    session.commit()
    session.add(User(id=2, email="bob"))
    session.commit()

    assert waiting.count() == 2
    with Session(engine) as other:
        assert other.query(User).count() == 2
    assert caplog.text.count("'user_added' is sent after the commit, but its route has") == 1
    assert bus.health().counts["stored"] == 2


def test_an_event_sent_after_a_savepoint_is_discarded_with_the_outer_transaction(
    bus: Bus, session: Session, waiting: Outbox
) -> None:
    @partial(event.listen, session, "after_commit")
    def tell(session: Session) -> None:
        bus.signal("user_added").send(id=1)

    with session.begin_nested():
        session.add(User(id=1, email="ada"))
    session.rollback()

    assert waiting.count() == 0
    assert bus.health().counts["discarded"] == 1


def test_a_commit_stands_when_an_event_sent_after_it_cannot_be_stored(
    engine: Engine,
    bus: Bus,
    session: Session,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @partial(event.listen, session, "after_commit")
    def tell(session: Session) -> None:
        bus.signal("user_added").send(id=1)

    outbox.TABLE.drop(engine)
    session.add(User(id=1, email="ada"))
    session.commit()

    with Session(engine) as other:
        assert other.query(User).count() == 1
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert "of 'user_added' was sent after a commit" in record.getMessage()
    assert vars(record)["signal"] == "user_added"
    assert vars(record)["event_id"] in record.getMessage()


def test_the_error_for_a_send_in_an_after_rollback_listener_names_the_event(
    bus: Bus, session: Session
) -> None:
    @partial(event.listen, session, "after_rollback")
    def tell(session: Session) -> None:
        bus.signal("user_added").send(id=1)

    session.add(User(id=1, email="ada"))
    session.flush()

    with pytest.raises(InvalidRequestError) as error:
        session.rollback()
    assert "writes 'user_added' to 'eventbus_outbox'" in error.value.__notes__[0]


def test_models_committed_of_flask_sqlalchemy_can_go_into_the_outbox(
    tmp_path: Path, eventbus: Isolation
) -> None:
    def changes(sender: Any, changes: Any, **extra: Any) -> dict[str, Any]:
        return {"changes": [(model.name, operation) for model, operation in changes]}

    db = SQLAlchemy()
    app = Flask("shop")
    route = {
        "signal": "flask_sqlalchemy.track_modifications:models_committed",
        "payload": changes,
        "outbox": True,
    }
    app.config.from_mapping(
        EVENTBUS_SERVICE="shop",
        EVENTBUS_URL="memory://models",
        EVENTBUS_PUBLISH={"models_changed": route},
        SQLALCHEMY_TRACK_MODIFICATIONS=True,
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/models.db",
    )
    db.init_app(app)
    EventBus(app)
    outbox.table(db.metadata)

    class Item(db.Model):  # type: ignore[name-defined, misc]  # Flask-SQLAlchemy's own way
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String(80))

    with app.app_context():
        db.create_all()
        db.session.add(Item(name="tea"))
        db.session.commit()
        assert db.session.query(Item).count() == 1
    app.test_cli_runner().invoke(flask_commands, ["relay", "--once"])

    with app.app_context():
        db.engine.dispose()

    eventbus.assert_published("models_changed", changes=[["tea", "insert"]])


def test_an_event_stored_in_its_own_transaction_leaves_no_session_behind(
    engine: Engine, bus: Bus, waiting: Outbox
) -> None:
    scoped = scoped_session(sessionmaker(engine))
    bus.register_session(scoped)
    bus.signal("user_added").send(id=1)
    bus.register_session(sessionmaker(engine))
    bus.signal("user_added").send(id=2)

    assert waiting.count() == 2
    assert not scoped.registry.has()


def test_a_session_function_that_returns_none_is_a_config_error(bus: Bus) -> None:
    bus.register_session(lambda: None)

    with pytest.raises(ConfigError, match="returns no session here"):
        bus.signal("user_added").send(id=1)


def test_an_unsupported_payload_fails_at_send_and_leaves_the_transaction_intact(
    bus: Bus, session: Session, waiting: Outbox
) -> None:
    session.add(User(id=1, email="ada"))

    with pytest.raises(PayloadError, match=r"payload\.user: object"):
        bus.signal("user_added").send(user=object())

    session.commit()
    assert waiting.count() == 0


def test_a_flush_listener_may_send(
    bus: Bus, session: Session, relay: Relay, listener: ChannelListener
) -> None:
    def tell(mapper: object, connection: object, user: User) -> None:
        bus.signal("user_added").send(id=user.id)

    event.listen(User, "after_insert", tell)

    try:
        session.add(User(id=7, email="ada"))
        session.commit()
    finally:
        event.remove(User, "after_insert", tell)

    empty(relay)
    assert listener.ids == [7]


def test_local_receivers_run_at_send_and_not_after_the_commit(bus: Bus, session: Session) -> None:
    received = []
    bus.signal("user_added").connect(lambda sender, id: received.append(id), weak=False)

    session.begin()
    bus.signal("user_added").send(id=1)

    assert received == [1]


def test_a_missing_outbox_table_fails_at_send_with_the_remedy(
    bus: Bus, session: Session, engine: Engine
) -> None:
    outbox.TABLE.drop(engine)

    with pytest.raises(DBAPIError) as caught:
        bus.signal("user_added").send(id=1)

    [note] = caught.value.__notes__
    assert "'python -m flask_eventbus relay --database URL --create-table'" in note


def test_sending_into_the_outbox_works_while_redis_is_away(
    session: Session, waiting: Outbox, make_bus: Make
) -> None:
    bus = make_bus(
        "redis://127.0.0.1:1/0", publish={"user_added": {"outbox": True}}, on_outage="raise"
    )
    bus.register_session(session)
    bus.node.ask()
    wait_until(lambda: not bus.health().publishing)

    session.begin()
    bus.signal("user_added").send(id=1)
    session.commit()

    assert waiting.count() == 1
    assert bus.health().counts == {"stored": 1}


def test_a_coroutine_writes_through_its_async_session(tmp_path: Path, make_bus: Make) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/async.db")
    outbox.create(engine)
    bus = make_bus("redis://127.0.0.1:1/0", publish={"user_added": {"outbox": True}})

    async def main() -> None:
        async_engine = create_async_engine(engine.url.set(drivername="sqlite+aiosqlite"))
        maker = async_sessionmaker(async_engine)
        bus.register_session(maker)

        async with maker() as session:
            await session.run_sync(lambda _: bus.signal("user_added").send(id=1))
            await session.connection()
            await session.run_sync(lambda _: bus.signal("user_added").send(id=2))
            await session.commit()

        async with maker() as session:
            await session.connection()

            with pytest.raises(ConfigError, match=r"await session\.run_sync\("):
                bus.signal("user_added").send(id=3)

        with pytest.raises(ConfigError, match=r"await session\.run_sync\("):
            bus.signal("user_added").send(id=4)

        await async_engine.dispose()

    asyncio.run(main())

    assert Outbox(engine).count() == 2
    engine.dispose()


def test_the_confirm_option_is_refused_for_the_outbox(make_bus: Make) -> None:
    with pytest.raises(ConfigError, match=r"both 'outbox' and 'confirm'\. Remove 'confirm'"):
        make_bus("memory://", publish={"user_added": {"outbox": True, "confirm": True}})


def test_a_route_in_code_takes_the_option_too(bus: Bus, session: Session, waiting: Outbox) -> None:
    order_paid = bus.publishes("order_paid", outbox=True)

    session.begin()
    order_paid.send(number=7)
    session.commit()

    assert waiting.count() == 1


def test_the_table_is_added_to_the_given_metadata() -> None:
    metadata = MetaData(schema="shop")

    made = outbox.table(metadata)

    assert made is outbox.table(metadata)
    assert metadata.tables == {"eventbus_outbox": made}


def test_the_table_is_created_once(engine: Engine) -> None:
    outbox.TABLE.drop(engine)
    outbox.create(engine)
    outbox.create(engine)

    assert inspect(engine).has_table("eventbus_outbox")


# -- out of the outbox ------------------------------------------------------------------------


def test_a_relay_publishes_in_order_and_deletes_the_rows(
    bus: Bus, session: Session, relay: Relay, waiting: Outbox, listener: ChannelListener
) -> None:
    for number in range(250):
        session.begin()
        bus.signal("user_added" if number % 3 else "user_changed").send(id=number)
        session.commit()

    empty(relay)

    assert listener.ids == list(range(250))
    assert (relay.published, waiting.count()) == (250, 0)


def test_a_relay_publishes_an_event_unchanged(
    bus: Bus, session: Session, relay: Relay, listener: ChannelListener
) -> None:
    node = bus.health().node
    cause = Event(
        name="ordered", source="mailer", id="mailer-7", time=datetime.now(UTC), payload={}
    )
    token = handling.set(cause)
    session.begin()
    bus.signal("user_added").send(id=1)
    handling.reset(token)
    sent_by = datetime.now(UTC)
    session.commit()
    empty(relay)

    [found] = listener.events
    assert (found.id, found.source, found.name) == (f"{node}-1", "shop", "user_added")
    assert (found.causation_id, found.correlation_id, found.hops) == (cause.id, cause.id, 1)
    assert cause.time < found.time < sent_by
    assert found.seq is None


def test_the_sending_process_skips_its_relayed_event_and_others_receive_it(
    shared_redis: RedisServer, bus: Bus, session: Session, relay: Relay, prefix: str, make_bus: Make
) -> None:
    received: list[str] = []
    another = make_bus(shared_redis.url, "mailer", prefix=prefix)

    for each, who in ((bus, "sender"), (another, "other")):
        each.on("user_added")(lambda sender, id, who=who: received.append(f"{who} {id}"))
        each.start()
        assert each.ready(10)

    session.begin()
    bus.signal("user_added").send(id=1)
    session.commit()
    empty(relay)
    wait_until(lambda: bus.health().counts.get("echoes") == 1)
    wait_until(lambda: len(received) == 2)

    assert received == ["sender 1", "other 1"]
    assert bus.health().counts.get("rejected", 0) == 0


def test_small_batches_keep_the_order(
    shared_redis: RedisServer,
    engine: Engine,
    prefix: str,
    waiting: Outbox,
    listener: ChannelListener,
) -> None:
    fill(engine, 25)

    with relaying(shared_redis, engine, prefix, batch=4) as relay:
        empty(relay)

    assert listener.ids == list(range(25))
    assert waiting.count() == 0


def test_large_events_are_published_in_several_round_trips(
    relay: Relay, engine: Engine, waiting: Outbox, listener: ChannelListener
) -> None:
    fill(engine, 12, size=300_000)

    empty(relay)

    assert listener.ids == list(range(12))
    assert waiting.count() == 0


def test_an_empty_outbox_is_not_locked_and_redis_is_not_called(engine: Engine) -> None:
    relay = lonely(engine)
    statements = executed(engine)

    assert relay.publish_batch(threading.Event()) is BatchResult.EMPTY
    assert len(statements) == 1
    assert "FOR UPDATE" not in statements[0]


def test_no_row_is_locked_while_redis_is_away(engine: Engine) -> None:
    relay = lonely(engine)
    fill(engine, 1)
    statements = executed(engine)

    with pytest.raises(redis.ConnectionError):
        relay.publish_batch(threading.Event())

    assert len(statements) == 1
    assert "FOR UPDATE" not in statements[0]


def lonely(engine: Engine) -> Relay:
    """A relay without a Redis."""
    exchange = exchange_with("redis://127.0.0.1:1/0", "none")
    return Relay(Outbox(engine), exchange, way("none"), batch=10)


def executed(engine: Engine) -> list[str]:
    """The statements that are executed from now on."""
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    return statements


def test_an_outage_in_the_middle_of_a_batch_keeps_confirmed_events(
    shared_redis: RedisServer,
    relay: Relay,
    engine: Engine,
    waiting: Outbox,
    listener: ChannelListener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(engine, 8, size=300_000)
    publish, batches = PublishConnection.publish, []

    def break_down(self: PublishConnection, batch: Any) -> Any:
        batches.append(batch)

        if len(batches) == 2:
            raise redis.ConnectionError("It is gone.")

        return publish(self, batch)

    monkeypatch.setattr(PublishConnection, "publish", break_down)

    with pytest.raises(redis.ConnectionError):
        relay.publish_batch(threading.Event())

    left = waiting.count()
    empty(relay)

    assert left == 4
    assert listener.ids == list(range(8))


def test_an_event_that_redis_refuses_stays_and_other_signals_continue(
    shared_redis: RedisServer,
    engine: Engine,
    prefix: str,
    waiting: Outbox,
    listener: ChannelListener,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with shared_redis.client as client:
        client.execute_command(
            "ACL", "SETUSER", "relay", "reset", "on", ">secret", "+@all", f"&{prefix}:*added*"
        )

    for _ in range(3):
        fill(engine, 2, "user_added")
        fill(engine, 2, "user_changed")

    url = shared_redis.url.replace("redis://", "redis://relay:secret@")
    exchange = exchange_with(url, prefix)
    timing = Timing(refused_again_after=0.3)
    relay = Relay(Outbox(engine), exchange, way(prefix), batch=3, timing=timing)
    never = threading.Event()

    wait_until(lambda: relay.publish_batch(never) and relay.published == 6)
    assert waiting.count() == 6
    assert {found.name for found in listener.events} == {"user_added"}
    assert "'user_changed' is refused: this user has no permissions" in caplog.text

    with shared_redis.client as client:
        client.execute_command("ACL", "SETUSER", "relay", "allchannels")

    wait_until(lambda: relay.publish_batch(never) and not waiting.count())
    exchange.close()
    assert listener.ids[6:] == [0, 1] * 3


def test_an_event_of_a_newer_version_is_left_to_a_newer_relay(
    relay: Relay,
    session: Session,
    waiting: Outbox,
    listener: ChannelListener,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store(session, Entry(event_id="a-1", name="order_paid", via="pigeon", event=b""), "relay")
    session.commit()

    assert relay.publish_batch(threading.Event()) is BatchResult.PUBLISHED
    assert relay.publish_batch(threading.Event()) is BatchResult.EMPTY
    assert (waiting.count(), listener.events) == (1, [])
    assert "too old to publish via 'pigeon'" in caplog.text


def test_an_event_that_is_published_twice_is_handled_once(
    shared_redis: RedisServer, relay: Relay, engine: Engine, prefix: str, make_bus: Make
) -> None:
    received: list[int] = []
    bus = make_bus(shared_redis.url, "mailer", prefix=prefix)
    bus.on("user_added")(lambda sender, id, **extra: received.append(id))
    bus.start()
    assert bus.ready(10)

    for _ in range(2):
        fill(engine, 3)
        empty(relay)

    wait_until(lambda: bus.health().counts.get("duplicates") == 3)
    assert received == [0, 1, 2]


# -- several relays ---------------------------------------------------------------------------


def test_several_relays_publish_each_event_once_and_in_order(
    shared_redis: RedisServer,
    engine: Engine,
    prefix: str,
    waiting: Outbox,
    listener: ChannelListener,
) -> None:
    stopping = threading.Event()
    published = []

    def work() -> None:
        with relaying(shared_redis, engine, prefix, batch=7) as relay:
            relay.run(stopping, interval=0.01)
            published.append(relay.published)

    threads = [threading.Thread(target=work) for _ in range(4)]

    for thread in threads:
        thread.start()

    for start in range(0, 400, 100):
        fill(engine, 100, f"user_added{start}")

    wait_until(lambda: not waiting.count(), timeout=60)
    stopping.set()

    for thread in threads:
        thread.join()

    assert listener.ids == list(range(100)) * 4
    assert sum(published) == 400


def test_a_relay_takes_nothing_while_another_holds_older_events(
    engine: Engine, database: str, waiting: Outbox
) -> None:
    if database.startswith("sqlite"):
        engine = create_engine(database + "?timeout=0")

    fill(engine, 5)
    another = Outbox(engine)

    with waiting.take(2) as batch:
        assert [entry.event_id for entry in batch.entries] == ["origin-1", "origin-2"]

        if database.startswith("sqlite"):
            with pytest.raises(DBAPIError, match="locked"), another.take(2):
                pass
        else:
            with another.take(2) as none:
                assert none.entries == []

    with another.take(2) as batch:
        assert [entry.event_id for entry in batch.entries] == ["origin-1", "origin-2"]

    engine.dispose()


def test_a_relay_takes_no_events_behind_those_that_another_holds(
    engine: Engine, waiting: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest = outbox._oldest

    def without_the_third(*args: Any) -> list[Entry]:
        return [entry for entry in oldest(*args) if entry.event_id != "origin-3"]

    fill(engine, 5)
    monkeypatch.setattr(outbox, "_oldest", without_the_third)

    with waiting.take(10) as batch:
        assert [entry.event_id for entry in batch.entries] == ["origin-1", "origin-2"]


def test_a_writer_is_not_blocked_by_a_relay_at_work(
    engine: Engine, waiting: Outbox, database: str
) -> None:
    fill(engine, 5)

    with waiting.take(10) as batch:
        writer = threading.Thread(target=fill, args=[engine, 5], daemon=True)
        writer.start()

        # SQLite has one lock for all, so there it is done when the relay is.
        if not database.startswith("sqlite"):
            wait_until(lambda: not writer.is_alive(), what="the rows are written")

        batch.delete(batch.entries)

    writer.join()
    assert waiting.count() == 5


if "TEST_DATABASE_URL" in os.environ:
    # SQLite lets no relay look at rows to lock them while another does: it waits for its turn.

    def test_a_relay_waits_while_another_holds_the_oldest_events(
        shared_redis: RedisServer,
        engine: Engine,
        prefix: str,
        waiting: Outbox,
        listener: ChannelListener,
    ) -> None:
        fill(engine, 5)

        with relaying(shared_redis, engine, prefix) as relay:
            with waiting.take(2):
                assert relay.publish_batch(threading.Event()) is BatchResult.SKIPPED
                assert relay.published == 0

            assert relay.publish_batch(threading.Event()) is BatchResult.PUBLISHED

        assert listener.ids == list(range(5))

    def test_a_relay_reads_committed_rows_whatever_the_default_isolation_level(
        engine: Engine, database: str
    ) -> None:
        fill(engine, 1)
        # The default of MySQL and MariaDB, which locks the gaps between rows as well.
        other = create_engine(database, isolation_level="REPEATABLE READ")

        with Outbox(other).take(1) as batch:
            assert batch._connection.get_isolation_level() == "READ COMMITTED"

        other.dispose()


def test_a_relay_publishes_nothing_into_a_replica(
    redis_server: RedisServer,
    engine: Engine,
    prefix: str,
    waiting: Outbox,
    own_listener: ChannelListener,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopping = threading.Event()
    fill(engine, 2)

    with relaying(redis_server, engine, prefix, timing=Timing(ask_role_every=0.0)) as relay:
        assert relay.publish_batch(stopping) is BatchResult.PUBLISHED
        # It keeps its connection, and replicas take PUBLISH.
        redis_server.client.replicaof("127.0.0.1", 1)
        fill(engine, 2, "user_left")
        thread = threading.Thread(
            target=relay.run, args=[stopping], kwargs={"interval": 0.01}, daemon=True
        )
        thread.start()

        wait_until(lambda: "Redis cannot be used: The server is a replica" in caplog.text)
        assert waiting.count() == 2

        redis_server.client.replicaof("NO", "ONE")
        wait_until(lambda: not waiting.count(), what="the others are published")
        stopping.set()
        thread.join()

    assert own_listener.ids == [0, 1, 0, 1]


# -- the command ------------------------------------------------------------------------------

SHOP = """
import os, signal
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import DeclarativeBase
from flask_eventbus import EventBus
from flask_eventbus.database import outbox

class Base(DeclarativeBase):
    pass

db = SQLAlchemy(model_class=Base)
bus = EventBus()
app = Flask("shop")
app.config.from_mapping(
    EVENTBUS_SERVICE="shop", EVENTBUS_PUBLISH={"user_added": {"outbox": True}}
)
app.config.from_prefixed_env()
bus.init_app(app)
db.init_app(app)

@event.listens_for(Engine, "before_cursor_execute")
def die(connection, cursor, statement, *rest):
    if "DIE" in os.environ and statement.startswith("DELETE FROM eventbus_outbox"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


class Shop:
    """A service in a folder of its own, whose relays are real processes."""

    def __init__(self, folder: Path, url: str, prefix: str, database: str) -> None:
        self._folder = folder / "programs"
        self._folder.mkdir()
        (self._folder / "shop.py").write_text(SHOP)
        self._settings = {
            "FLASK_APP": "shop",
            "FLASK_EVENTBUS_URL": url,
            "FLASK_EVENTBUS_PREFIX": prefix,
            "FLASK_SQLALCHEMY_DATABASE_URI": database,
        }
        self._programs: list[Program] = []

    def relay(self, *options: str, **settings: str) -> Program:
        """Start a relay."""
        command = ("-m", "flask", "eventbus", "relay", *options)
        program = Program(command, self._folder, {**self._settings, **settings})
        self._programs.append(program)
        return program

    def end(self) -> None:
        for program in self._programs:
            program.kill()


@pytest.fixture
def shop(tmp_path: Path, redis_server: RedisServer, prefix: str, database: str) -> Iterator[Shop]:
    shop = Shop(tmp_path, redis_server.url, prefix, database)
    yield shop
    shop.end()


def has_printed(program: Program, word: str) -> bool:
    return word in program.output


def falls_to(waiting: Outbox, count: int) -> bool:
    return waiting.count() <= count


@pytest.fixture
def own_listener(redis_server: RedisServer, prefix: str) -> Iterator[ChannelListener]:
    """Hears what is published on this test's own server."""
    listener = ChannelListener(redis_server, prefix)
    yield listener
    listener.close()


def test_a_relay_runs_until_a_signal_stops_it(
    shop: Shop, engine: Engine, waiting: Outbox, own_listener: ChannelListener
) -> None:
    fill(engine, 3)
    relay = shop.relay("--interval", "0.05")
    wait_until(lambda: not waiting.count(), what="what was there is published")
    fill(engine, 2)
    wait_until(lambda: not waiting.count(), what="what comes is published")

    relay.send_signal(signal.SIGTERM)

    assert relay.end() == 0
    assert own_listener.ids == [0, 1, 2, 0, 1]
    assert "Published 5 events." in relay.output


def test_a_relay_killed_between_publishing_and_deleting_loses_nothing(
    shop: Shop, engine: Engine, waiting: Outbox, own_listener: ChannelListener
) -> None:
    fill(engine, 3)

    killed = shop.relay(DIE="1")
    assert killed.end() == -signal.SIGKILL
    assert waiting.count() == 3

    assert shop.relay("--once").end() == 0
    assert waiting.count() == 0
    first, again = own_listener.events[:3], own_listener.events[3:]
    assert first == again
    assert [found.payload["id"] for found in first] == [0, 1, 2]


def test_relays_killed_at_any_moment_lose_nothing_and_events_are_handled_once(
    shop: Shop,
    redis_server: RedisServer,
    engine: Engine,
    waiting: Outbox,
    prefix: str,
    make_bus: Make,
) -> None:
    received: list[int] = []
    bus = make_bus(redis_server.url, "mailer", prefix=prefix)
    bus.on("user_added")(lambda sender, id, **extra: received.append(id))
    bus.start()
    assert bus.ready(10)
    fill(engine, 3_000)

    for goal in (2_900, 1_500, 500):
        relay = shop.relay("--batch", "20")
        wait_until(partial(falls_to, waiting, goal), timeout=60)
        relay.kill()

    assert shop.relay("--once").end() == 0
    wait_until(lambda: len(received) >= 3_000)

    assert received == list(range(3_000))


def test_concurrent_relays_publish_each_event_once(
    shop: Shop, engine: Engine, waiting: Outbox, own_listener: ChannelListener
) -> None:
    relays = [shop.relay("--batch", "10", "--interval", "0.01") for _ in range(3)]

    for relay in relays:
        wait_until(partial(has_printed, relay, "Relaying"))

    fill(engine, 500)
    wait_until(lambda: not waiting.count(), timeout=60)

    for relay in relays:
        relay.send_signal(signal.SIGTERM)

    assert [relay.end() for relay in relays] == [0, 0, 0]
    assert own_listener.ids == list(range(500))


def test_while_redis_is_away_events_wait_in_the_outbox(
    shop: Shop, redis_server: RedisServer, engine: Engine, waiting: Outbox, prefix: str
) -> None:
    redis_server.kill()
    fill(engine, 3)
    relay = shop.relay("--interval", "0.05")
    wait_until(lambda: "Redis cannot be used" in relay.output)

    assert waiting.count() == 3

    redis_server.start()
    listener = ChannelListener(redis_server, prefix)
    wait_until(lambda: not waiting.count())
    assert listener.ids == [0, 1, 2]
    listener.close()
    assert "Redis can be used again" in relay.output
    assert relay.output.count("cannot be used") == 1


def test_while_redis_takes_no_writes_a_relay_publishes_over_channels(
    tmp_path: Path, redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/outbox.db")
    outbox.create(engine)
    fill(engine, 10, name="paid", via="stream")
    fill(engine, 3)
    listener = ChannelListener(redis_server, prefix)
    client: Any = redis_server.client
    client.config_set("maxmemory", 1)
    stopping = threading.Event()

    # A batch is smaller than what waits for the stream.
    with relaying(redis_server, engine, prefix, batch=2) as relay:
        thread = threading.Thread(target=relay.run, args=[stopping], kwargs={"interval": 0.01})
        thread.start()
        wait_until(lambda: listener.ids == [0, 1, 2], what="the channel events are published")
        assert client.xlen(f"{prefix}:{{paid}}:stream") == 0
        client.config_set("maxmemory", 0)
        wait_until(lambda: relay.published == 13, what="the rest is published")
        stopping.set()
        thread.join()

    engine.dispose()
    listener.close()
    assert client.xlen(f"{prefix}:{{paid}}:stream") == 10
    assert caplog.text.count("takes no writes") == 1
    assert caplog.text.count("takes writes again after") == 1


def test_a_locked_database_is_logged_once_and_so_is_its_recovery(
    tmp_path: Path,
    redis_server: RedisServer,
    prefix: str,
    own_listener: ChannelListener,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/locked.db?timeout=0.01")
    outbox.create(engine)
    fill(engine, 2)
    stopping = threading.Event()

    with relaying(redis_server, engine, prefix) as relay:
        thread = threading.Thread(
            target=relay.run, args=[stopping], kwargs={"interval": 0.01}, daemon=True
        )

        with engine.connect() as another, another.begin():
            another.exec_driver_sql("UPDATE eventbus_outbox SET name = name")
            tries = tries_of(relay, monkeypatch)
            thread.start()
            wait_until(lambda: len(tries) > 2 and "database is locked" in caplog.text)

        wait_until(lambda: relay.published == 2)
        stopping.set()
        thread.join()

    engine.dispose()
    assert own_listener.ids == [0, 1]
    assert [record.getMessage().partition(" used")[0] for record in caplog.records] == [
        "The database cannot be",
        "The database can be",
    ]


def test_an_unreachable_database_is_logged_once_and_so_is_its_recovery(
    tmp_path: Path,
    redis_server: RedisServer,
    database: str,
    engine: Engine,
    prefix: str,
    own_listener: ChannelListener,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(engine, 2)
    away = Departure(database, tmp_path)
    stopping = threading.Event()

    with relaying(redis_server, away.engine, prefix) as relay:
        assert relay.publish_batch(stopping) is BatchResult.PUBLISHED
        thread = threading.Thread(
            target=relay.run, args=[stopping], kwargs={"interval": 0.01}, daemon=True
        )

        with away:
            tries = tries_of(relay, monkeypatch)
            thread.start()
            wait_until(lambda: len(tries) > 2 and "The database cannot be used" in caplog.text)

        fill(engine, 2)
        wait_until(lambda: relay.published == 4)
        stopping.set()
        thread.join()

    away.engine.dispose()
    assert own_listener.ids == [0, 1, 0, 1]
    assert [record.getMessage().partition(" used")[0] for record in caplog.records] == [
        "The database cannot be",
        "The database can be",
    ]


def tries_of(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows with each look of the relay at its outbox."""
    tries: list[None] = []
    publish_batch = relay.publish_batch

    def note(stopping: threading.Event) -> BatchResult:
        tries.append(None)
        return publish_batch(stopping)

    monkeypatch.setattr(relay, "publish_batch", note)

    return tries


class Departure:
    """Makes a database unreachable for a while: its file moves, or its connections are cut."""

    def __init__(self, database: str, folder: Path) -> None:
        url = make_url(database)
        self._file = Path(url.database or "") if url.drivername == "sqlite" else None
        self._elsewhere = folder / "elsewhere"
        self._proxy: Proxy | None = None

        if self._file is None:
            self._proxy = Proxy(url.port or 0)
            url = url.set(port=self._proxy.port)

        self.engine = create_engine(url, poolclass=NullPool)

    def __enter__(self) -> None:
        if self._proxy is None:
            assert self._file is not None
            self._file.rename(self._elsewhere)
            # What would be made in its place is no database.
            self._file.mkdir()
        else:
            self._proxy.answer = lambda: lambda data: None
            self._proxy.cut()

    def __exit__(self, *error: object) -> None:
        if self._proxy is None:
            assert self._file is not None
            self._file.rmdir()
            self._elsewhere.rename(self._file)
        else:
            self._proxy.answer = lambda: lambda data: data


def test_a_redis_that_hangs_locks_nothing_in_the_database(
    shop: Shop,
    redis_server: RedisServer,
    engine: Engine,
    waiting: Outbox,
    own_listener: ChannelListener,
) -> None:
    redis_server.hang()
    fill(engine, 3)
    relay = shop.relay("--interval", "0.05")
    wait_until(lambda: "Redis cannot be used" in relay.output)

    fill(engine, 3)

    redis_server.resume()
    wait_until(lambda: not waiting.count())
    assert own_listener.ids == [0, 1, 2] * 2


def test_relay_once_exits_with_0_only_if_everything_was_published(
    shop: Shop, redis_server: RedisServer, engine: Engine
) -> None:
    done = shop.relay("--once")
    assert (done.end(), done.output) == (0, "Published 0 events.\n")

    fill(engine, 2)
    redis_server.kill()
    failed = shop.relay("--once")
    assert failed.end() == 1
    assert "Published 0 events. 2 left in the outbox: Redis cannot be used: " in failed.output

    redis_server.start()
    done = shop.relay("--once")
    assert (done.end(), done.output) == (0, "Published 2 events.\n")


def test_relay_once_names_refused_events(shop: Shop, engine: Engine, session: Session) -> None:
    store(session, Entry(event_id="a-1", name="order_paid", via="pigeon", event=b""), "relay")
    session.commit()
    fill(engine, 2)

    relay = shop.relay("--once")

    assert relay.end() == 1
    assert "Published 2 events. 1 left in the outbox: Redis refuses 'order_paid': " in relay.output


def test_relay_create_table_creates_a_missing_table(
    shop: Shop, engine: Engine, waiting: Outbox
) -> None:
    outbox.TABLE.drop(engine)

    missing = shop.relay("--once")
    assert missing.end() == 1
    assert "has no table 'eventbus_outbox'. Create it by a migration" in missing.output

    assert shop.relay("--once", "--create-table").end() == 0
    assert waiting.is_there()


def test_a_relay_needs_no_app(
    shop: Shop,
    redis_server: RedisServer,
    prefix: str,
    engine: Engine,
    database: str,
    waiting: Outbox,
    own_listener: ChannelListener,
) -> None:
    program = """
import sys
from flask_eventbus.__main__ import main
main(standalone_mode=False)
print("flask" in sys.modules)
"""
    url = engine.url.render_as_string(hide_password=False)
    fill(engine, 2)

    options = ["--url", redis_server.url, "--prefix", prefix]
    outcome = subprocess.run(
        [sys.executable, "-c", program, *options, "relay", "--once", "--database", url],
        capture_output=True,
        text=True,
        check=True,
    )

    assert outcome.stdout == "Published 2 events.\nFalse\n"
    assert own_listener.ids == [0, 1]
    assert "secret" not in outcome.stderr


def test_without_an_app_the_environment_may_name_the_database(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", url)

    done = CliRunner().invoke(main, ["--url", "memory://relay", "relay", "--once"])

    assert (done.exit_code, done.output) == (0, "Published 0 events.\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "No database given. Pass --database URL"),
        (["--database", "shop"], "--database cannot be used: Could not parse"),
        (["--database", "nosuch://shop"], "install its driver"),
        (["--database", "sqlite+aiosqlite:///shop.db"], "is an asynchronous driver"),
        (["--database", "sqlite:////nowhere/shop.db"], "unable to open database file"),
    ],
)
def test_an_unusable_database_is_reported_in_one_line(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)

    failed = CliRunner().invoke(main, ["--url", "memory://relay", "relay", *options])

    assert failed.exit_code == 1
    assert failed.output.startswith("Error: ")
    assert words in failed.output
    assert "Traceback" not in failed.output


def test_a_disabled_bus_relays_nothing() -> None:
    failed = CliRunner(env={"EVENTBUS_ENABLED": "no"}).invoke(main, ["relay", "--once"])

    assert failed.exit_code == 1
    assert "'EVENTBUS_ENABLED' is False" in failed.output


# -- in Flask ---------------------------------------------------------------------------------


def test_the_testing_kit_records_relayed_events(tmp_path: Path, eventbus: Isolation) -> None:
    db = SQLAlchemy(model_class=type("Base", (DeclarativeBase,), {}))
    bus = EventBus()
    app = Flask("shop")
    app.config.from_mapping(
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/shop.db",
        EVENTBUS_SERVICE="shop",
        EVENTBUS_PUBLISH={"user_added": {"outbox": True}},
    )
    bus.init_app(app)
    outbox.table(db.metadata)
    db.init_app(app)

    with app.app_context():
        db.create_all()
        db.session.connection()
        bus.signal("user_added").send(app, id=1)
        db.session.commit()

    # No app context: there is no session in use, and the database is found all the same.
    bus.signal("user_added").send(app, id=2)
    eventbus.assert_not_published()

    stored = "'user_added' is stored in the outbox: run 'flask eventbus relay --once' first."

    with pytest.raises(AssertionError, match=stored):
        eventbus.assert_published("user_added")

    done = app.test_cli_runner().invoke(flask_commands, ["relay", "--once"])

    assert (done.exit_code, done.output) == (0, "Published 2 events.\n")
    assert [found.payload["id"] for found in eventbus.published()] == [1, 2]

    with app.app_context():
        db.engine.dispose()


# -- the pages --------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "\n".join((DOCS / f"{name}.md").read_text() for name in ("transactions", "outbox"))
SERVICE, AFTER_COMMIT, OTHER_SESSION, OUTBOX, TEST = re.findall(
    r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Run blocks of the page after its service; returns the names that they define."""
    names: dict[str, Any] = {"__name__": "accounts"}

    def run(text: str) -> dict[str, Any]:
        program = (SERVICE + text).replace("sqlite:///", f"sqlite:///{tmp_path}/")
        # Without the future that this module imports.
        exec(compile(program, "accounts.py", "exec", dont_inherit=True), names)  # noqa: S102

        with names["app"].app_context():
            names["db"].create_all()

        return names

    yield run

    with names["app"].app_context():
        names["db"].engine.dispose()


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("app = create_app()", ["grace@example.org", "ada@example.com"]),
        (AFTER_COMMIT, ["ada@example.com"]),
        (OUTBOX, ["ada@example.com"]),
    ],
    ids=["by default", "after_commit", "outbox"],
)
def test_the_service_on_the_page_publishes_the_events_that_the_page_names(
    page: Callable[[str], dict[str, Any]], eventbus: Isolation, text: str, known: list[str]
) -> None:
    app = page(text)["app"]

    for email in ("grace@example.org", "ada@example.com"):
        app.test_client().post("/register", data={"email": email})

    if text is OUTBOX:
        eventbus.assert_not_published()
        app.test_cli_runner().invoke(flask_commands, ["relay", "--once"])

    assert [found.payload["email"] for found in eventbus.published()] == known


def test_the_sessions_on_the_page_publish_at_the_end_of_the_block(
    page: Callable[[str], dict[str, Any]], eventbus: Isolation
) -> None:
    names = page(AFTER_COMMIT + OTHER_SESSION)

    eventbus.assert_published("order_paid", number=7)
    names["orders"].stop()
    names["Session"].kw["bind"].dispose()


def test_the_test_on_the_page_passes(
    page: Callable[[str], dict[str, Any]], eventbus: Isolation
) -> None:
    names = page(OUTBOX + TEST)

    names["test_registering_publishes_an_event"](eventbus, names["app"])


def test_the_page_has_every_column_of_the_table() -> None:
    columns = PAGE.partition("| Column | |\n")[2].partition("\n\n")[0]

    assert re.findall(r"^\| `(\w+)` \|", columns, re.MULTILINE) == outbox.TABLE.columns.keys()
