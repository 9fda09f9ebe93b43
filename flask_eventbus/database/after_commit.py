"""Hold events until the database transaction in which they were sent commits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from ..ending import notice_fork
from ..errors import ConfigError
from ..logs import BoundedLog, Whole, get_logger
from ..publisher.message import Message
from ..publisher.publisher import Sending
from ..routing.routes import Route
from ..transport.connections import Context

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from .outbox import Entry

logger = get_logger(__name__)

#: How to give the program a database session, or to do without.
NO_SESSION = (
    "Call db.init_app(app) of Flask-SQLAlchemy, register the session with "
    "bus.register_session(session), or remove 'after_commit' and 'outbox' from the route."
)

#: Most ids to log of one transaction, which may have many events.
SHOWN = 100


class AfterCommit:
    """Holds or stores the events that a node sends in database transactions.

    :param sending: prepares and publishes the events.
    :param find_session: returns the database session if the program registered none; may be
        ``None``.
    :param scope: returns the context in which an event without a transaction is stored.
    """

    def __init__(
        self,
        context: Context,
        sending: Sending,
        *,
        find_session: Callable[[], Any] | None,
        scope: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._context = context
        self._counters = context.counters
        self._sending = sending
        self._find_session = find_session
        self._scope = scope
        self._log = BoundedLog(logger)
        self._late_owner = LateEntries(context, self._store_alone)

    @property
    def session(self) -> Any:
        """The database session, as given to ``register_session()``; ``None`` if there is none."""
        registered = self._context.registry.session

        if registered is None and self._find_session is not None:
            return self._find_session()

        return registered

    def hold(self, name: str, payload: Mapping[str, Any], route: Route) -> bool:
        """Store an event, or hold it until the commit, as its route says.

        Return False if it must be published at once, because there is no transaction.

        :raises ConfigError: there is no session, or it is an asynchronous one that cannot be
            used from here.
        :raises PayloadError: a value cannot be encoded.
        :raises PublishError: Redis is known to be away and the policy is ``"raise"``.
        :raises sqlalchemy.exc.DBAPIError: the database refuses the row of the outbox.
        """
        from .transactions import begun, hold  # they need SQLAlchemy, which is optional

        session = begun(self._source(name))

        if route.outbox:
            self._store(session, name, payload, route)
        elif session is None:
            return False
        else:
            hold(session, self._sending.publisher.prepare_pending(name, payload, route), self)

        return True

    def _store(
        self, session: Session | None, name: str, payload: Mapping[str, Any], route: Route
    ) -> None:
        """Write an event to the outbox, in the current transaction or in one of its own.

        It gets one of its own if there is no transaction, and if it is sent after the commit,
        since a session accepts no statement in ``after_commit``.
        """
        from .outbox import Entry, store  # they need SQLAlchemy, which is optional
        from .transactions import hold, is_committed

        message = self._sending.publisher.encode(name, payload, route)
        entry = Entry(event_id=message.id, name=name, via=route.via, event=message.encoded())

        if session is not None and is_committed(session):
            hold(session, entry, self._late_owner)
            return

        if session is not None:
            store(session, entry, self._context.relay)
        else:
            self._store_alone(entry)

        self._counters.add("stored")

    def _store_alone(self, entry: Entry) -> None:
        from .outbox import store_alone  # it needs SQLAlchemy, which is optional

        with self._scope():
            store_alone(self._source(entry.name), entry, self._context.relay)

    def committed(self, items: list[Message]) -> None:
        """Publish the events of a committed transaction; log those that Redis did not confirm.

        An interruption, such as a time limit that a signal handler raises, is raised again.
        """
        try:
            unconfirmed = self.publish(items)
        except BaseException:
            logger.exception(
                "Publishing the %d events of a committed transaction was interrupted: %s. Events "
                "that are already in the buffer are still published.",
                len(items),
                _names(items),
            )
            raise

        if unconfirmed:
            logger.error(
                "Redis did not confirm %d of the events of a committed transaction: %s. Those that "
                "it did not refuse stay in the buffer.",
                len(unconfirmed),
                Whole(", ".join(f"{out.route_state.name} {out.id}" for out in unconfirmed[:SHOWN])),
            )

    def publish(self, messages: Sequence[Message]) -> list[Message]:
        """Publish events after a commit, and return those that Redis did not confirm in time."""
        notice_fork()
        deadline = time.monotonic() + self._context.config.timeout

        if self._sending.must_not_publish():
            return []

        # If one is interrupted, for example by a time limit, the others still reach the buffer.
        with ExitStack() as stack:
            for message in reversed(messages):
                stack.callback(self._sending.publish_pending, message, deadline)

        return self._sending.publisher.wait_for_confirmations(messages, deadline)

    def discarded(self, items: list[Message], *, forgotten: bool) -> None:
        """Drop the events of a transaction that was rolled back or closed."""
        self._counters.add("discarded", len(items))

        if not forgotten:
            logger.debug("Dropped %d events of a rollback: %s", len(items), _names(items))
            return

        self._log.warning(
            "forgotten",
            "A session was closed without a commit: %d events that were sent in its transaction "
            "are not published: %s. Commit it, or remove 'after_commit' from the route.",
            len(items),
            _names(items),
        )

    def roll_back(self) -> None:
        """Roll back the transaction that a failed receiver left in the database session."""
        # The module is loaded only if events wait for commits. Otherwise the end of the app
        # context rolls back.
        transactions = sys.modules.get(f"{__package__}.transactions")

        if transactions is None:
            return

        try:
            transactions.roll_back(self.session)
        except Exception:
            # The database may be away. The failure of the receiver is still counted and retried.
            logger.exception(
                "The transaction of a failed receiver of %r could not be rolled back. Its session "
                "may fail until the program closes it.",
                self._context.config.service,
            )

    def _source(self, name: str) -> Any:
        source = self.session

        if source is not None:
            return source

        raise ConfigError(
            f"Events of {name!r} wait for a commit, but there is no database session. {NO_SESSION}"
        )


class LateEntries:
    """Stores outbox entries that were sent after a commit, when that commit has ended."""

    def __init__(self, context: Context, store: Callable[[Entry], None]) -> None:
        self._counters = context.counters
        self._store = store
        self._warned: set[str] = set()

    def committed(self, items: list[Entry]) -> None:
        """Store each entry in a transaction of its own; log errors, since the commit is done."""
        for entry in items:
            self._warn_once(entry.name)

            try:
                self._store(entry)
            except Exception:
                logger.exception(
                    "The event %s of %r was sent after a commit, and could not be written to the "
                    "outbox. It is lost. Send it inside the transaction, before the commit.",
                    entry.event_id,
                    entry.name,
                    extra={"event_id": entry.event_id, "signal": entry.name},
                )
            else:
                self._counters.add("stored")

    def discarded(self, items: list[Entry], *, forgotten: bool) -> None:
        """Drop entries sent after a savepoint whose transaction was rolled back."""
        self._counters.add("discarded", len(items))

    def _warn_once(self, name: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "%r is sent after the commit, but its route has 'outbox'. Its events are stored in "
                "transactions of their own, and a crash before that loses them. Publish a signal "
                "that is sent before the commit ('before_models_committed' of Flask-SQLAlchemy), "
                "or replace 'outbox' by 'after_commit'.",
                name,
            )


def _names(messages: Sequence[Message]) -> str:
    return ", ".join(sorted({message.route_state.name for message in messages}))
