"""Hold items until the transaction of a SQLAlchemy session commits.

SQLAlchemy is optional: only routes with ``after_commit`` or ``outbox`` load this module.
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

#: Key of ``Session.info`` under which a session keeps its :class:`Held`.
KEY = "flask_eventbus.held"

#: Sessions of session factories that began a transaction in this thread or task, newest last.
_begun: ContextVar[tuple[weakref.ref[Session], ...]] = ContextVar(
    "flask_eventbus.begun", default=()
)

#: Session classes that :func:`_watch` has hooked. ``event.contains()`` cannot replace this set:
#: SQLAlchemy identifies a class by its ``id()``, which a later class may reuse.
_watched: weakref.WeakSet[type[Session]] = weakref.WeakSet()


class Owner(Protocol):
    """Adds items to a transaction, and is called with them when the transaction ends.

    Its methods raise nothing except interruptions, such as a time limit or Ctrl-C.
    """

    def committed(self, items: list[Any]) -> None:
        """Handle items of a committed transaction, after its connection was released."""

    def discarded(self, items: list[Any], *, forgotten: bool) -> None:
        """Handle items of a transaction that ended without a commit.

        :param forgotten: True if the session was closed without a commit or a rollback.
        """


class Held:
    """Items that wait for the commit of one session, in the order in which they were added."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Owner, SessionTransaction, Any]] = []
        #: The transaction that the database committed last; :meth:`end` is called next.
        self.committed: SessionTransaction | None = None
        #: True once the database rolled back the outermost transaction.
        self.rolled_back = False

    def add(self, item: Any, owner: Owner, transaction: SessionTransaction) -> None:
        """Hold ``item`` until ``transaction`` ends."""
        self._waiting.append((owner, transaction, item))

    def end(self, transaction: SessionTransaction) -> None:
        """Release the items of ``transaction`` to their owners.

        Items of a committed savepoint move to the transaction around it.
        """
        if transaction is not self.committed:
            self._discard(transaction)
        elif transaction.parent is None:
            self._release()
        else:
            around = _boundary(transaction.parent)
            self._waiting = [
                (owner, around if held is transaction else held, item)
                for owner, held, item in self._waiting
            ]

    def _discard(self, transaction: SessionTransaction) -> None:
        gone = [entry for entry in self._waiting if entry[1] is transaction]
        self._waiting = [entry for entry in self._waiting if entry[1] is not transaction]
        forgotten = transaction.parent is None and not self.rolled_back

        for owner, items in _by_owner(gone):
            owner.discarded(items, forgotten=forgotten)

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []

        # All owners get their items, even if one is interrupted, for example by a time limit.
        with ExitStack() as stack:
            for owner, items in reversed(list(_by_owner(waiting))):
                stack.callback(owner.committed, items)


def begun(source: Any) -> Session | None:
    """Return the session of ``source`` that is in a transaction here; ``None`` if none is.

    :param source: a session in any form that :func:`check` accepts.
    """
    session = _current(source)
    return session if _is_going_on(session) else None


def roll_back(source: Any) -> None:
    """Roll back the current transaction of the session of ``source``, if there is one.

    :raises sqlalchemy.exc.SQLAlchemyError: the rollback failed.
    """
    session = begun(source)

    if session is None:
        return

    # A program with an AsyncSession has imported this module already.
    extension = sys.modules.get("sqlalchemy.ext.asyncio")
    asynchronous = None if extension is None else extension.async_session(session)

    if asynchronous is None:
        session.rollback()
    else:
        run_coroutine(asynchronous.rollback())


def engine_of(source: Any, table: Table) -> Engine:
    """Return the engine that the sessions of ``source`` use for ``table``.

    No session has to be in use.

    :raises ConfigError: ``source`` is a function that returns no session here.
    """
    session = _any(source)

    if session is None:
        raise ConfigError(
            "The function passed to register_session() returns no session here, so the database "
            "is not known. Pass a scoped_session or a sessionmaker."
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
    """Hold ``item`` until the outermost transaction of ``session`` ends.

    If a savepoint is rolled back, the items that were added in it are discarded.
    """
    transaction = _innermost(session)
    assert transaction is not None  # noqa: S101 - begun() checked it
    _held(session).add(item, owner, transaction)


def is_committed(session: Session) -> bool:
    """Return True if the transaction of ``session`` is committed and accepts no more statements.

    This is so while SQLAlchemy calls the ``after_commit`` listeners.
    """
    held: Held | None = session.info.get(KEY)
    transaction = _innermost(session)
    return held is not None and transaction is not None and held.committed is transaction


def check(source: Any) -> None:
    """Check that ``source`` is a session, a scoped session, a session factory or a function.

    A session factory is a ``sessionmaker``, an ``async_sessionmaker`` or a session class. Its
    transactions are recorded from this call on, which tells the session in use.

    :raises ConfigError: it is something else.
    """
    if _is_maker(source):
        _watch(source)
        return

    if isinstance(_sync(source), Session) or _registry(source) is not None or callable(source):
        return

    raise ConfigError(
        f"register_session() got {source!r}, which is not a session. Pass a scoped_session, a "
        "sessionmaker, a Session, or a function that returns the session in use or None."
    )


def _current(source: Any) -> Session | None:
    if source is None or isinstance(_sync(source), Session):
        return _sync(source)  # type: ignore[no-any-return]  # a session or None

    if _is_maker(source):
        return _latest(source)

    registry = _registry(source)

    # Calling a scoped session creates a session if the scope has none.
    if registry is not None and not registry.has():
        return None

    return _sync(source())  # type: ignore[no-any-return]  # check() accepted it


def _any(source: Any) -> Session | None:
    """Return a session of ``source``; create one if necessary, which does not connect."""
    registry = _registry(source)

    if isinstance(_sync(source), Session):
        return _sync(source)  # type: ignore[no-any-return]  # a session

    # A scope would keep the session that is created here; its factory does not.
    make = source if registry is None or registry.has() else source.session_factory
    return _sync(make())  # type: ignore[no-any-return]  # check() accepted it


def _sync(source: Any) -> Any:
    """Return the session inside an ``AsyncSession``; return anything else unchanged."""
    if isinstance(source, type) or _registry(source) is not None:
        return source

    return getattr(source, "sync_session", source)


def _registry(source: Any) -> Any:
    """Return the registry of a scoped session, also an asynchronous one; ``None`` without."""
    registry = getattr(source, "registry", None)
    return registry if isinstance(registry, ScopedRegistry) else None


def _is_maker(source: Any) -> bool:
    """Return True for a session class, a ``sessionmaker`` or an ``async_sessionmaker``."""
    return isinstance(source, type) or isinstance(getattr(source, "class_", None), type)


def _class_of(maker: Any) -> type[Session]:
    """Return the class of the sessions; for an ``AsyncSession``, that of the session inside."""
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


def _note_commit(session: Session) -> None:
    transaction = _innermost(session)

    # Even without items: another after_commit listener may still send an event.
    if transaction is not None:
        _held(session).committed = transaction


def _note_rollback(session: Session) -> None:
    held = session.info.get(KEY)

    if held is not None and session.get_nested_transaction() is None:
        held.rolled_back = True


def _note_end(session: Session, transaction: SessionTransaction) -> None:
    held = session.info.get(KEY)

    if held is None:
        return

    if transaction.parent is None:
        del session.info[KEY]

    held.end(transaction)


# Before the program's own listeners: if one of them raises, the commit is still recorded.
event.listen(Session, "after_commit", _note_commit, insert=True)
event.listen(Session, "after_rollback", _note_rollback, insert=True)
event.listen(Session, "after_transaction_end", _note_end, insert=True)


def _held(session: Session) -> Held:
    held: Held = session.info.setdefault(KEY, Held())
    return held


def _innermost(session: Session) -> SessionTransaction | None:
    """Return the current savepoint, or else the current transaction."""
    return session.get_nested_transaction() or session.get_transaction()


def _boundary(transaction: SessionTransaction) -> SessionTransaction:
    """Return the savepoint or transaction around a transaction that a flush began."""
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent

    return transaction


def _by_owner(
    entries: list[tuple[Owner, SessionTransaction, Any]],
) -> Iterator[tuple[Owner, list[Any]]]:
    for owner, group in groupby(entries, itemgetter(0)):
        yield owner, [item for *_, item in group]
