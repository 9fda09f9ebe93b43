"""Events that wait for the commit of the database transaction they were sent in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..logs import BoundedLog, Counters, Whole, get_logger
from ..publisher.message import Message
from ..routing.routes import Route

if TYPE_CHECKING:
    from .outbox import Entry

logger = get_logger(__name__)

#: Ids that are logged of one transaction; a bulk job may send many events.
SHOWN = 100


class AfterCommit:
    """What a node sends inside database transactions, and what becomes of it at their end.

    :param session: finds the session, in any form that ``register_session()`` takes; ``None``
        if there is none to be found.
    :param scope: where a session is found that is not in use: an app context.
    :param draft: takes an emission down: :meth:`.Publisher.prepare_pending`.
    :param seal: makes an event of it that another process publishes: :meth:`.Publisher.encode`.
    :param publish: publishes what was taken down, and returns what Redis did not confirm.
    """

    def __init__(
        self,
        *,
        session: Callable[[], Any],
        scope: Callable[[], AbstractContextManager[object]],
        draft: Callable[[str, Mapping[str, Any], Route], Message],
        seal: Callable[[str, Mapping[str, Any], Route], Message],
        publish: Callable[[Sequence[Message]], list[Message]],
        counters: Counters,
    ) -> None:
        self._session = session
        self._scope = scope
        self._draft = draft
        self._seal = seal
        self._publish = publish
        self._counters = counters
        self._log = BoundedLog(logger)
        self._late_owner = LateEntries(session=session, scope=scope, counters=counters)

    def take(self, name: str, payload: Mapping[str, Any], route: Route) -> bool:
        """Hold an emission until the commit of what goes on; whether anything does.

        :raises ConfigError: no session is to be found.
        :raises PayloadError: a value cannot travel.
        :raises PublishError: Redis is known to be away and the policy is ``"raise"``.
        """
        from .transactions import begun, hold  # they need SQLAlchemy, which is optional

        session = begun(self._source(name))

        if session is None:
            return False

        hold(session, self._draft(name, payload, route), self)
        return True

    def store(self, name: str, payload: Mapping[str, Any], route: Route) -> None:
        """Write an emission into the outbox: in the transaction that goes on, or in its own.

        It gets its own where none goes on, and where it is sent after the commit: in
        ``after_commit`` a session takes no statement.

        :raises ConfigError: no session is to be found, or it is an asynchronous one that
            cannot be used from here.
        :raises PayloadError: a value cannot travel.
        :raises sqlalchemy.exc.DBAPIError: the database does not take it.
        """
        from .outbox import Entry, store, store_alone  # they need SQLAlchemy, which is optional
        from .transactions import begun, hold, is_committed

        session = begun(self._source(name))
        sealed = self._seal(name, payload, route)
        entry = Entry(event_id=sealed.id, name=name, via=route.via, event=sealed.encoded())

        if session is not None and is_committed(session):
            hold(session, entry, self._late_owner)
            return

        if session is not None:
            store(session, entry)
        else:
            with self._scope():
                store_alone(self._source(name), entry)

        self._counters.add("stored")

    def committed(self, items: list[Message]) -> None:
        """Publish them. What Redis does is logged: the commit is done, and did not fail.

        What interrupts it, such as a time limit that a signal handler raises, is passed on.
        """
        try:
            unconfirmed = self._publish(items)
        except BaseException:
            logger.exception(
                "A transaction is committed, and publishing the %d events that were sent in it was "
                "interrupted: %s. Those that are in the buffer are published.",
                len(items),
                _names(items),
            )
            raise

        self._report(unconfirmed)

    def discarded(self, items: list[Message], *, forgotten: bool) -> None:
        """Let them vanish with their transaction."""
        self._counters.add("discarded", len(items))

        if not forgotten:
            logger.debug("%d events vanish with their transaction: %s", len(items), _names(items))
            return

        self._log.warning(
            "forgotten",
            "A session was closed without a commit: %d events that were sent in its transaction "
            "are not published: %s. Commit it, or take 'after_commit' off the route.",
            len(items),
            _names(items),
        )

    def _source(self, name: str) -> Any:
        source = self._session()

        if source is not None:
            return source

        raise ConfigError(
            f"Events of {name!r} are to wait for a commit, but there is no database session. Call "
            "db.init_app(app) of Flask-SQLAlchemy, name the session with "
            "bus.register_session(session), or take 'after_commit' and 'outbox' off the route."
        )

    def _report(self, unconfirmed: Sequence[Message]) -> None:
        if unconfirmed:
            logger.error(
                "A transaction is committed, but Redis did not confirm %d of the events that were "
                "sent in it: %s. What it did not refuse goes on waiting in the buffer.",
                len(unconfirmed),
                Whole(", ".join(f"{out.route_state.name} {out.id}" for out in unconfirmed[:SHOWN])),
            )


class LateEntries:
    """Outbox entries that were sent after their commit, and are stored when it has ended.

    :param session: finds the session, as for :class:`AfterCommit`.
    :param scope: where a session is found that is not in use.
    """

    def __init__(
        self,
        *,
        session: Callable[[], Any],
        scope: Callable[[], AbstractContextManager[object]],
        counters: Counters,
    ) -> None:
        self._session = session
        self._scope = scope
        self._counters = counters
        self._warned: set[str] = set()

    def committed(self, items: list[Entry]) -> None:
        """Store each in a transaction of its own. Whatever happens is logged: the commit stands."""
        for entry in items:
            self._warn(entry.name)

            try:
                self._store(entry)
            except Exception:
                logger.exception(
                    "The event %s of %r was sent after a commit, and could not be written into the "
                    "outbox: it is lost. Send it inside the transaction, before the commit.",
                    entry.event_id,
                    entry.name,
                    extra={"event_id": entry.event_id, "signal": entry.name},
                )
            else:
                self._counters.add("stored")

    def discarded(self, items: list[Entry], *, forgotten: bool) -> None:
        """Let them vanish: they were sent after a savepoint, and its transaction is gone."""
        self._counters.add("discarded", len(items))

    def _store(self, entry: Entry) -> None:
        from .outbox import store_alone  # it needs SQLAlchemy, which is optional

        with self._scope():
            store_alone(self._session(), entry)

    def _warn(self, name: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "%r has 'outbox' on its route and is sent after the commit: its row gets a "
                "transaction of its own, and a crash in between loses the event. Publish a signal "
                "that is sent before the commit ('before_models_committed' of Flask-SQLAlchemy), "
                "or set 'after_commit' in the place of 'outbox'.",
                name,
            )


def _names(drafts: Sequence[Message]) -> str:
    return ", ".join(sorted({draft.route_state.name for draft in drafts}))
