"""The sending half of a node: from a bridge to the publisher, or to a database transaction."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .coroutines import in_thread
from .database.after_commit import AfterCommit
from .ending import notice_fork
from .errors import PublishError
from .logs import get_logger
from .publisher.message import Message
from .publisher.publisher import ClosedError, Publisher
from .routing.routes import Route
from .transport.connections import Context

if TYPE_CHECKING:
    from .node import Host

logger = get_logger(__name__)


class Sending:
    """Publishes the events of a node, at once or when a database transaction commits.

    It lives as long as its node. :meth:`open` gives it a publisher at each start of the node, and
    in each forked child.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        #: True once the warning was logged that a test publishes nothing.
        self._test_is_logged = False
        self._finalizer: weakref.finalize[..., Sending] | None = None

    def open(self, context: Context) -> None:
        """Create the parts of one process and one start; events sent from now on go to them."""
        self._context = context
        # It may outlive the node, so it must not keep the context, which refers to the registry.
        self.publisher = Publisher(context, trace=self.host.trace, resend=_resending(self))
        self.after_commit = AfterCommit(context, self)

        # The publisher writes its buffer and ends once the node is garbage collected.
        if self._finalizer is not None:
            self._finalizer.detach()

        self._finalizer = weakref.finalize(self, _orphan, self.publisher)
        self._finalizer.atexit = False
        # Last, so that another thread of a forked child does not use the parts of its parent.
        self._pid = os.getpid()

    @property
    def session(self) -> Any:
        """The database session, as given to ``register_session()``; ``None`` if there is none."""
        registered = self._context.registry.session

        if registered is None and self.host.session is not None:
            return self.host.session()

        return registered

    def emit(self, name: str, payload: Mapping[str, Any], route: Route) -> None:
        """Publish one emission of a signal, as its route says."""
        if os.getpid() != self._pid:
            notice_fork()

        if route.outbox:
            self.after_commit.store(name, payload, route)
        elif not route.after_commit or not self.after_commit.take(name, payload, route):
            self.publish(name, payload, route, confirm=route.confirm)

    async def emit_async(self, name: str, payload: Mapping[str, Any], route: Route) -> None:
        """Publish one emission as :meth:`emit` does, without blocking the event loop."""
        notice_fork()

        # A database session belongs to the thread of the event loop.
        if route.outbox:
            return self.after_commit.store(name, payload, route)

        if route.after_commit and self.after_commit.take(name, payload, route):
            return None

        if self._must_not_publish() or not self.publisher.may_wait(route):
            self.publish(name, payload, route, confirm=route.confirm)
            return None

        # Encode the payload now: other tasks may change it while this one waits.
        message = self.publisher.prepare(name, payload, route)
        return await in_thread(
            lambda: self.resend(message),
            failed=lambda error: logger.error(
                "A task that sent an event of %r was cancelled, and publishing it failed later: %s",
                name,
                error,
            ),
        )

    def publish(self, name: str, payload: Mapping[str, Any], route: Route, *, confirm: bool) -> str:
        """Publish an event and return its id.

        :param confirm: True to wait until Redis has the event.
        """
        if self.host.under_test is not None and self._must_not_publish():
            # Encode it, so that a payload that cannot be encoded still raises.
            return self.publisher.encode(name, payload, route).id

        while True:
            try:
                return self.publisher.publish(name, payload, route, confirm=confirm)
            except ClosedError:
                logger.debug("%r was sent during a stop; the next publisher takes it.", name)

    def _must_not_publish(self) -> bool:
        """Return True in a test that must not publish; log a warning the first time."""
        config, connections = self._context.config, self._context.connections

        if self.host.under_test is None or config.publish_in_tests or connections.in_memory:
            return False

        if not self.host.under_test():
            return False

        if not self._test_is_logged:
            self._test_is_logged = True
            logger.warning(
                "The app of %r is under test (TESTING): its events are not published to %s. Use "
                "the fixture 'eventbus', or set 'EVENTBUS_PUBLISH_IN_TESTS' to True.",
                config.service,
                connections.shown,
            )

        return True

    def resend(self, message: Message) -> None:
        """Publish an unconfirmed event again, with the same id and bytes.

        :raises PublishError: Redis did not confirm it this time either.
        """
        notice_fork()

        while True:
            try:
                return self.publisher.resend(message)
            except ClosedError:
                logger.debug("%r is sent again during a stop.", message.route_state.name)

    def publish_committed(self, messages: Sequence[Message]) -> list[Message]:
        """Publish events after a commit, and return those that Redis did not confirm in time."""
        notice_fork()
        deadline = time.monotonic() + self._context.config.timeout

        if self._must_not_publish():
            return []

        # If one is interrupted, for example by a time limit, the others still reach the buffer.
        with ExitStack() as stack:
            for message in reversed(messages):
                stack.callback(self._publish_pending, message, deadline)

        return self.publisher.wait_for_confirmations(messages, deadline)

    def _publish_pending(self, message: Message, deadline: float) -> None:
        while True:
            try:
                return self.publisher.publish_pending(message, deadline)
            except ClosedError:
                logger.debug(
                    "%r left during a stop; the next publisher takes it.", message.route_state.name
                )
            except PublishError as error:
                # The buffer has no room for this event, but may have room for the next.
                return message.finish(error)


def _resending(sending: Sending) -> Callable[[Message], None]:
    """Return a function that publishes an event again, and holds ``sending`` weakly."""
    reference = weakref.ref(sending)

    def resend(message: Message) -> None:
        found = reference()

        if found is None:
            raise RuntimeError(f"The bus that sent the event {message.id} no longer exists.")

        found.resend(message)

    return resend


#: Publishers of garbage collected nodes that still have buffered events.
orphaned: set[Publisher] = set()


def _orphan(publisher: Publisher) -> None:
    """Let the publisher of a garbage collected node write its buffered events."""
    publisher.leave()
    orphaned.difference_update([other for other in list(orphaned) if not other.buffered])

    if publisher.buffered:
        orphaned.add(publisher)
