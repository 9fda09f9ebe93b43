"""The transactions of SQLAlchemy sessions, and what waits for their commit.

SQLAlchemy is optional: only a route that waits for a commit loads this module.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from contextvars import ContextVar
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

from ..coroutines import run_coroutine
from ..errors import ConfigError

try:
    from sqlalchemy import Engine, Table, __version__, create_engine, event
    from sqlalchemy.exc import ArgumentError
    from sqlalchemy.orm import Session, SessionTransaction
    from sqlalchemy.util import ScopedRegistry
except ImportError as error:
    raise ConfigError(
        "Events that wait for a commit need SQLAlchemy, which cannot be imported: "
        f"{error}. Install it with: pip install 'sqlalchemy>=2.0'"
    ) from error

if int(__version__.partition(".")[0]) < 2:
    raise ConfigError(
        f"Events that wait for a commit need SQLAlchemy 2.0 or later; {__version__} is installed. "
        "Upgrade it with: pip install 'sqlalchemy>=2.0'"
    )

#: Where a session keeps what waits for its commit: a key of ``Session.info``.
KEY = "flask_eventbus.held"

#: The sessions of makers that began a transaction in this thread or task, the latest last.
_begun: ContextVar[tuple[weakref.ref[Session], ...]] = ContextVar(
    "flask_eventbus.begun", default=()
)

#: The classes of sessions whose transactions are noted. SQLAlchemy knows a class by its id, which
#: another has when it is gone.
_watched: weakref.WeakSet[type[Session]] = weakref.WeakSet()


class Owner(Protocol):
    """Whose items wait for a commit, and what becomes of them.

    Neither method raises, but for what interrupts it: a time limit, or Ctrl-C.
    """

    def committed(self, items: list[Any]) -> None:
        """Their transaction is committed, and its connection given back."""

    def discarded(self, items: list[Any], *, forgotten: bool) -> None:
        """Their transaction is over; ``forgotten`` if nobody committed or rolled it back."""


class Held:
    """What waits for the commit of one session, in the order it came."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Owner, SessionTransaction, Any]] = []
        self._committed: SessionTransaction | None = None
        self._rolled_back = False

    def add(self, item: Any, owner: Owner, transaction: SessionTransaction) -> None:
        """Let ``item`` wait for the end of ``transaction``."""
        self._waiting.append((owner, transaction, item))

    def commit(self, transaction: SessionTransaction) -> None:
        """The database has committed ``transaction``; its end follows."""
        self._committed = transaction

    def is_committed(self, transaction: SessionTransaction | None) -> bool:
        """Return True between the commit of ``transaction`` and its end."""
        return transaction is not None and transaction is self._committed

    def roll_back(self) -> None:
        """The database has rolled the outermost transaction back; its end follows."""
        self._rolled_back = True

    def end(self, transaction: SessionTransaction) -> None:
        """Let go of what waited for ``transaction``, or let it wait for the one around it."""
        if transaction is not self._committed:
            self._discard(transaction)
        elif transaction.parent is not None:
            self._hand_up(transaction, _boundary(transaction.parent))
        else:
            self._leave()

    def _discard(self, transaction: SessionTransaction) -> None:
        gone = [entry for entry in self._waiting if entry[1] is transaction]
        self._waiting = [entry for entry in self._waiting if entry[1] is not transaction]
        forgotten = transaction.parent is None and not self._rolled_back

        for owner, items in _by_owner(gone):
            owner.discarded(items, forgotten=forgotten)

    def _hand_up(self, transaction: SessionTransaction, around: SessionTransaction) -> None:
        self._waiting = [
            (owner, around if held is transaction else held, item)
            for owner, held, item in self._waiting
        ]

    def _leave(self) -> None:
        waiting, self._waiting = self._waiting, []

        # One that is interrupted, by a time limit for example, keeps no other from its items.
        with ExitStack() as stack:
            for owner, items in reversed(list(_by_owner(waiting))):
                stack.callback(owner.committed, items)


def begun(source: Any) -> Session | None:
    """The session of ``source`` that has a transaction going on here, if there is one.

    :param source: what :func:`check` accepts.
    """
    session = _current(source)
    return session if session is not None and session.in_transaction() else None


def roll_back(source: Any) -> None:
    """Roll back the transaction that goes on here in the session of ``source``, if there is one.

    :raises sqlalchemy.exc.SQLAlchemyError: the database cannot.
    """
    session = begun(source)

    if session is None:
        return

    # Who has an asynchronous session has imported this.
    extension = sys.modules.get("sqlalchemy.ext.asyncio")
    asynchronous = None if extension is None else extension.async_session(session)

    if asynchronous is None:
        session.rollback()
    else:
        run_coroutine(asynchronous.rollback())


def engine_of(source: Any, table: Table) -> Engine:
    """Where the sessions of ``source`` have ``table``, whether one of them is in use or not.

    :raises ConfigError: there is no session to tell it.
    """
    session = _any(source)

    if session is None:
        raise ConfigError(
            "The function that was given to register_session() returns no session here, so the "
            "database is not known. Give a scoped_session or a sessionmaker."
        )

    return session.get_bind(clause=table).engine


def connect(url: str) -> Engine:
    """Return the engine of a database by its URL.

    :raises ConfigError: the URL names no database, or its driver is not installed.
    """
    try:
        return create_engine(url)
    except (ArgumentError, ImportError) as error:
        raise ConfigError(
            f"--database cannot be used: {error}. Write it as in "
            "'postgresql+psycopg://user@host/name', and install its driver."
        ) from error


def hold(session: Session, item: Any, owner: Owner) -> None:
    """Keep ``item`` until the outermost transaction of ``session`` is over.

    A savepoint that is rolled back takes along what was held within it.
    """
    transaction = _innermost(session)
    assert transaction is not None  # noqa: S101 - begun() asked
    _held(session).add(item, owner, transaction)


def is_committed(session: Session) -> bool:
    """Return True if the transaction of ``session`` is committed and takes no statement any more.

    That is the state in which SQLAlchemy tells of a commit.
    """
    held: Held | None = session.info.get(KEY)
    return held is not None and held.is_committed(_innermost(session))


def check(source: Any) -> None:
    """Accept a session, a scoped session, a maker of sessions, or a function that returns one.

    Which session of a maker is meant is known by its transactions, from this call on.

    :raises ConfigError: it is something else.
    """
    if _is_maker(source):
        _watch(source)
        return

    if isinstance(_sync(source), Session) or _registry(source) is not None or callable(source):
        return

    raise ConfigError(
        f"register_session() got {source!r}, which is no session. Give it a scoped_session, a "
        "sessionmaker, a Session, or a function that returns the session in use or None."
    )


def _current(source: Any) -> Session | None:
    if source is None or isinstance(_sync(source), Session):
        return _sync(source)  # type: ignore[no-any-return]  # one of both

    if _is_maker(source):
        return _latest(source)

    registry = _registry(source)

    # To ask a scoped session for one that is not there yet would make it.
    if registry is not None and not registry.has():
        return None

    return _sync(source())  # type: ignore[no-any-return]  # check() had a look


def _any(source: Any) -> Session | None:
    """A session of ``source``; to make one does not connect."""
    registry = _registry(source)

    if isinstance(_sync(source), Session):
        return _sync(source)  # type: ignore[no-any-return]  # it is one

    # A scope keeps what is made in it: this one is not to be kept.
    make = source if registry is None or registry.has() else source.session_factory
    return _sync(make())  # type: ignore[no-any-return]  # check() had a look


def _sync(source: Any) -> Any:
    """The session itself, behind an ``AsyncSession`` as well."""
    if isinstance(source, type) or _registry(source) is not None:
        return source

    return getattr(source, "sync_session", source)


def _registry(source: Any) -> Any:
    """That of a scoped session, of an asynchronous one too."""
    registry = getattr(source, "registry", None)
    return registry if isinstance(registry, ScopedRegistry) else None


# -- makers: whichever of their sessions began last, here -----------------------------------


def _is_maker(source: Any) -> bool:
    """Whether it is a class of sessions, or a ``sessionmaker`` of either kind."""
    return isinstance(source, type) or isinstance(getattr(source, "class_", None), type)


def _class_of(maker: Any) -> type[Session]:
    """The class of its sessions, for an ``AsyncSession`` of those behind it."""
    made = maker if isinstance(maker, type) else maker.class_
    options = getattr(maker, "kw", {})
    plain: Any = options.get("sync_session_class") or getattr(made, "sync_session_class", made)
    found: type[Session] = getattr(plain, "class_", plain)
    return found


def _watch(maker: Any) -> None:
    made = _class_of(maker)

    if made not in _watched:
        _watched.add(made)
        event.listen(made, "after_transaction_create", _note_begin)


def _note_begin(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        living = [found for found in _begun.get() if _is_going_on(found())]
        _begun.set((*living, weakref.ref(session)))


def _latest(maker: Any) -> Session | None:
    made = _class_of(maker)
    found = (reference() for reference in reversed(_begun.get()))
    return next((each for each in found if isinstance(each, made) and _is_going_on(each)), None)


def _is_going_on(session: Session | None) -> bool:
    return session is not None and session.in_transaction()


# -- what SQLAlchemy tells -----------------------------------------------------------------


def _note_commit(session: Session) -> None:
    transaction = _innermost(session)

    # Something may come yet: another listener may send.
    if transaction is not None:
        _held(session).commit(transaction)


def _note_rollback(session: Session) -> None:
    held = session.info.get(KEY)

    if held is not None and session.get_nested_transaction() is None:
        held.roll_back()


def _note_end(session: Session, transaction: SessionTransaction) -> None:
    held = session.info.get(KEY)

    if held is None:
        return

    if transaction.parent is None:
        del session.info[KEY]

    held.end(transaction)


# First of all listeners: one of the program's own that raises makes no commit undone.
event.listen(Session, "after_commit", _note_commit, insert=True)
event.listen(Session, "after_rollback", _note_rollback, insert=True)
event.listen(Session, "after_transaction_end", _note_end, insert=True)


def _held(session: Session) -> Held:
    held: Held = session.info.setdefault(KEY, Held())
    return held


def _innermost(session: Session) -> SessionTransaction | None:
    """The savepoint or the transaction that what happens now belongs to."""
    return session.get_nested_transaction() or session.get_transaction()


def _boundary(transaction: SessionTransaction) -> SessionTransaction:
    """The savepoint or the transaction that a flush within it belongs to."""
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent

    return transaction


def _by_owner(
    entries: list[tuple[Owner, SessionTransaction, Any]],
) -> Iterator[tuple[Owner, list[Any]]]:
    for owner, group in groupby(entries, itemgetter(0)):
        yield owner, [item for *_, item in group]
