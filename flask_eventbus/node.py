"""One process of a service: the bridge between its signals and Redis."""

from __future__ import annotations

import atexit
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

from blinker import NamedSignal

from . import logs
from .codec.codec import Codec
from .config import Config
from .coroutines import in_thread
from .database.after_commit import AfterCommit
from .ending import after_fork, catch_sigterm, leave_sigterm, notice_fork, process_ends
from .errors import PublishError
from .event import Event
from .health import Health
from .listening import Listening, check_subscription
from .logs import Counters, get_logger
from .publisher.connection import PublishConnection
from .publisher.message import Message, check_route
from .publisher.publisher import ClosedError, Publisher
from .publisher.writer import WRITE_TIMEOUT
from .receivers.dispatcher import Dispatcher
from .routing.bridge import Bridges
from .routing.bus_signal import Receiver
from .routing.registry import Registry
from .routing.routes import Route, read_routes
from .routing.subscriptions import NEW, Subscription, read_subscriptions
from .signals import wait_until_sent
from .transport.connections import Connections
from .transport.keys import StreamKeys

logger = get_logger(__name__)

#: Seconds that the end of a process waits for Redis to take what is buffered.
FLUSH_AT_EXIT = 5.0

#: Seconds that a stop may take beyond the grace and the time to flush, whatever Redis does: to hand
#: back what was read, then to end the writing thread, and what is left for lifecycle signals.
REST = 3.0
RELEASE = 2.0
WRITER_END = 0.5

#: Seconds, of :data:`REST`, to publish what other threads sent while the process ended.
LATE = 0.2

#: Seconds that the end of a process may take beyond ``EVENTBUS_GRACE``, with all buses of the
#: process, whatever Redis does.
LONGEST_STOP = FLUSH_AT_EXIT + REST

#: What events are handled in without Flask: one serves all threads.
_NOTHING = nullcontext()


class Node:
    """Publishes and hears for one service in one process.

    Nothing connects and no thread starts before the first event or :meth:`start`. After a
    fork the child's node has a new name, and threads and connections of its own.

    :param scope: what each event is handled in.
    :param owns: whether an emission by this sender is one of this node's.
    :param trace: the W3C trace context of whatever is going on.
    :param app_exists: returns False once the app is gone; the thread then stops.
    :param under_test: return True while the program is under test.
    :param session: the database session where none is registered; ``None`` if there is none.
    """

    def __init__(
        self,
        config: Config,
        declarations: Registry,
        *,
        scope: Callable[[], AbstractContextManager[object]] = lambda: _NOTHING,
        owns: Callable[[Any], bool] = lambda sender: True,
        trace: Callable[[], str | None] = lambda: None,
        app_exists: Callable[[], bool] = lambda: True,
        under_test: Callable[[], bool] = lambda: False,
        session: Callable[[], Any] = lambda: None,
    ) -> None:
        self.config = config
        self.declarations = declarations
        self.counters = Counters()
        self._scope = scope
        self._trace = trace
        self._app_exists = app_exists
        self._under_test = under_test
        #: True once it was logged that a test publishes nothing.
        self._told_of_test = False
        self._found_session = session
        self.codec: Codec = declarations.codec.limited(config.max_event_bytes)
        self._bridges = Bridges(
            declarations,
            read_routes(config.publish),
            self._emit,
            self._emit_async,
            owns,
            check=lambda route: check_route(config, route),
        )
        self._configured = read_subscriptions(config.subscribe)
        self.listening = False
        #: Held by who starts or stops the node; a signal handler may be the second.
        self._turning = threading.RLock()
        self._abandon: weakref.finalize[..., Node] | None = None
        self._renew()
        self._subscriptions: Mapping[str, Subscription] = {}
        self._take_up_declarations()
        nodes.add(self)
        catch_sigterm(stop_all)

        for greet in list(born):
            greet(self)

    # -- what is carried ------------------------------------------------------------------

    @property
    def routes(self) -> dict[str, Route]:
        """What this service publishes; settings go before declarations in code."""
        return self._bridges.routes

    def route_for(self, name: str) -> Route:
        """The way that events called ``name`` travel."""
        return self._bridges.route_for(name) or Route(name=name)

    @property
    def name(self) -> str:
        """The unique name of this node; a forked child's node has another."""
        notice_fork()
        return self._name

    @property
    def session(self) -> Any:
        """The database session whose commits events wait for, in any form; ``None`` for none."""
        registered = self.declarations.session
        return self._found_session() if registered is None else registered

    @property
    def subscriptions(self) -> Mapping[str, Subscription]:
        """What this service hears."""
        return self._subscriptions

    def signal_created(self, signal: NamedSignal) -> None:
        """Take up a new signal of the bus's own."""
        if self.config.enabled:
            self._bridges.connect_signal(signal)

    def route_declared(self, route: Route) -> None:
        """Take up a route that was declared."""
        if self.config.enabled:
            self._bridges.connect(route.name)

    def subscription_declared(self, subscription: Subscription) -> None:
        """Take up a subscription that was declared."""
        notice_fork()
        merged = _merge(subscription, self._configured.get(subscription.name))
        check_subscription(self.config, merged)
        self._subscriptions = {**self._subscriptions, merged.name: merged}

        if self.listening:
            self._listen()

    def _take_up_declarations(self) -> None:
        with self.declarations.lock:
            self.declarations.watch(self)
            self._subscriptions = {**self._configured}

            for configured in self._configured.values():
                check_subscription(self.config, configured)

            for subscription in self.declarations.subscriptions.values():
                self.subscription_declared(subscription)

            if self.config.enabled:
                self._bridges.connect_all()

    def receivers_of(self, event: Event) -> list[Receiver]:
        """The receivers that ``event`` is for."""
        return self.declarations.receivers_of(event.name, event.source)

    # -- what a program does with it ------------------------------------------------------

    def publish(self, name: str, payload: Mapping[str, Any], *, confirm: bool = True) -> str:
        """Publish an event without a signal, and return its id.

        It goes the way of the route for ``name``, over a channel if there is none.

        :raises PayloadError: a value cannot travel.
        :raises PublishError: Redis did not take it in time, with ``EVENTBUS_ON_OUTAGE="raise"``.
        """
        notice_fork()
        return self._publish(name, payload, self.route_for(name), confirm)

    def start(self) -> None:
        """Listen from now on; returns at once, whether Redis is there or not."""
        notice_fork()
        catch_sigterm(stop_all)

        if not self.config.enabled:
            return

        # Others may have made signals in a namespace that was adopted.
        self.declarations.find_new_signals()

        with self._turning:
            self.listening = True
            self._listen()

    def ready(self, timeout: float | None = None) -> bool:
        """Wait until Redis has confirmed every subscription; whether it was in time.

        Nothing is awaited where nothing can come: without a subscription it is ``True`` at
        once, with ``EVENTBUS_ENABLED=False`` it is ``False``.
        """
        notice_fork()

        if not self.config.enabled or not self._subscriptions:
            return self.config.enabled

        return self._inbound.ready(timeout)

    def ask(self) -> None:
        """Find out whether Redis takes events, in the writing thread; :meth:`health` then tells."""
        notice_fork()
        self._publisher.probe()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything sent so far is with Redis; whether it was in time."""
        notice_fork()
        return self._publisher.flush(self.config.grace if timeout is None else timeout)

    def stop(self, *, flush: float = FLUSH_AT_EXIT) -> None:
        """Stop listening, let receivers finish, publish what waits; then as if new.

        It takes as long as ``EVENTBUS_GRACE``, the time to flush and :data:`REST` at most.

        :param flush: seconds to wait for Redis to take what is buffered.
        :raises RuntimeError: one of the node's own threads calls it, a receiver for example.
        """
        notice_fork()
        self._refuse_own_threads()
        _stop_together([self], flush)

    def _stop_listening(self) -> None:
        self.listening = False
        self._inbound.stop_reading()

    def _take_publisher(self) -> Publisher:
        """Return the publisher, and have another: what is sent from now on goes to that.

        So nothing is taken and then not written.
        """
        publisher = self._publisher
        self._renew()
        return publisher

    @property
    def may_stop_here(self) -> bool:
        """False in the threads of the node, for whose end a stop waits."""
        return not (self._inbound.is_own_thread or self._publisher.is_writing_thread)

    def _refuse_own_threads(self) -> None:
        if not self.may_stop_here:
            raise RuntimeError(
                "stop() was called by a receiver, for whose end it would wait. Call it in another "
                "thread, or end the process by a signal."
            )

    @property
    def fatal(self) -> Exception | None:
        """Why nothing will ever be heard of streams, however long Redis is waited for."""
        return self._inbound.fatal

    def health(self) -> Health:
        """How this node does."""
        notice_fork()
        heard = self._inbound.last_heard
        return Health(
            service=self.config.service,
            node=self._name,
            listening=self.listening and bool(self._subscriptions),
            connected=self._inbound.connected,
            publishing=self._publisher.connected,
            last_heard=None if heard is None else _since(heard),
            lag=self._inbound.lag,
            buffered=self._publisher.buffered,
            missed=self.counters.get("missed"),
            refused=self._inbound.refused,
            without_receiver=self._inbound.without_receiver,
            alarms=self._inbound.alarms,
            counts=self.counters.all(),
        )

    # -- one process's worth of it --------------------------------------------------------

    def _renew(self) -> None:
        """Make everything that belongs to one process and one start."""
        self._starting = threading.RLock()
        self._name = secrets.token_hex(6)
        self.declarations.siblings.add(self, self._name)
        self.connections = Connections(
            self.config.url, name=f"eventbus:{self.config.service}:{self._name}"
        )
        self._publisher = self._make_publisher()
        self._drafts = self._make_drafts()
        self.dispatcher = self._make_dispatcher()
        self._inbound = self._make_inbound()
        self._abandon_with_node()

    def _abandon_with_node(self) -> None:
        """Let the writing thread neither keep this node alive nor outlive it for long."""
        if self._abandon is not None:
            self._abandon.detach()

        self._abandon = weakref.finalize(self, _let_go, self._publisher)
        self._abandon.atexit = False

    def _make_publisher(self) -> Publisher:
        return Publisher(
            config=self.config,
            codec=self.codec,
            connection=PublishConnection(
                self.connections,
                timeout=WRITE_TIMEOUT,
                names=StreamKeys(self.config.prefix).names,
                patience=self.config.timeout,
            ),
            node=self._name,
            counters=self.counters,
            trace=self._trace,
            resend=_resending(self),
        )

    def _make_drafts(self) -> AfterCommit:
        return AfterCommit(
            session=lambda: self.session,
            scope=self._scope,
            draft=lambda *emission: self._publisher.prepare_pending(*emission),
            seal=lambda *emission: self._publisher.encode(*emission),
            publish=self._publish_drafts,
            counters=self.counters,
        )

    def _make_dispatcher(self) -> Dispatcher:
        return Dispatcher(
            service=self.config.service,
            receivers=self.declarations.receivers_of,
            scope=self._scope,
            undo=self._roll_back,
            tells=self.config.log_events,
            counters=self.counters,
            timeout=self.declarations.timeout_of,
            connected=self.declarations.connected_to,
        )

    def _roll_back(self) -> None:
        """Roll back what a receiver that failed left in the database session."""
        # It is imported where a session is known whose commits events wait for; elsewhere the end
        # of the app context is enough.
        transactions = sys.modules.get(f"{__package__}.database.transactions")

        if transactions is None:
            return

        try:
            transactions.roll_back(self.session)
        except Exception:
            logger.exception(
                "The transaction that a failed receiver of %r left could not be rolled back. Its "
                "session may fail until the program closes it.",
                self.config.service,
            )

    def _make_inbound(self) -> Listening:
        publisher = self._publisher
        return Listening(
            config=self.config,
            connections=self.connections,
            codec=self.codec,
            dispatcher=self.dispatcher,
            subscriptions=lambda: self._subscriptions,
            counters=self.counters,
            node=self._name,
            issued=lambda: publisher.issued,
            siblings=self.declarations.siblings,
            app_exists=self._app_exists,
            retries_of=self.declarations.retries_of,
        )

    def renew_unused(self) -> None:
        """Make anew what did nothing yet, with locks of the kind that threads have by now."""
        if not self.listening and not self._publisher.issued:
            self._turning = threading.RLock()
            self._renew()

    def _after_fork(self) -> None:
        """In the child: nothing of the parent's is used, and nothing is started."""
        self.listening = False
        self._turning = threading.RLock()
        self.declarations.reset_lock()
        self._inbound.disown()
        self._publisher.disown()
        self.connections.disown()
        self.counters = Counters()
        self._renew()

    def _listen(self) -> None:
        if not self._subscriptions:
            return

        with self._starting:
            self._inbound.start()

    # -- publishing -----------------------------------------------------------------------

    def _emit(self, name: str, payload: Mapping[str, Any], route: Route) -> None:
        notice_fork()

        if route.outbox:
            self._drafts.store(name, payload, route)
        elif not route.after_commit or not self._drafts.take(name, payload, route):
            self._publish(name, payload, route, route.confirm)

    async def _emit_async(self, name: str, payload: Mapping[str, Any], route: Route) -> None:
        notice_fork()

        # Database sessions belong to the thread of the loop.
        if route.outbox:
            return self._drafts.store(name, payload, route)

        if route.after_commit and self._drafts.take(name, payload, route):
            return None

        publisher = self._publisher

        if self._withholds() or not publisher.may_wait(route):
            self._publish(name, payload, route, route.confirm)
            return None

        # What the payload is now, whatever other tasks do with it meanwhile.
        outgoing = publisher.prepare(name, payload, route)
        return await in_thread(
            lambda: self.resend(outgoing),
            failed=lambda error: logger.error(
                "A task that sent an event of %r was cancelled, and then: %s", name, error
            ),
        )

    def _publish(self, name: str, payload: Mapping[str, Any], route: Route, confirm: bool) -> str:
        if self._withholds():
            # What cannot travel is an error all the same.
            return self._publisher.encode(name, payload, route).id

        while True:
            try:
                return self._publisher.publish(name, payload, route, confirm=confirm)
            except ClosedError:
                logger.debug("%r was sent during a stop; the next publisher takes it.", name)

    def _withholds(self) -> bool:
        """Return True in a test that did not ask for events to leave; log that once."""
        if self.config.publish_in_tests or self.connections.in_memory or not self._under_test():
            return False

        if not self._told_of_test:
            self._told_of_test = True
            logger.warning(
                "The app of %r is under test (TESTING): its events are not published to %s. Use "
                "the fixture 'eventbus', or set 'EVENTBUS_PUBLISH_IN_TESTS' to True.",
                self.config.service,
                self.connections.shown,
            )

        return True

    def resend(self, outgoing: Message) -> None:
        """Publish an event again that was not confirmed, with the same id and the same bytes.

        :raises PublishError: it was not confirmed this time either.
        """
        notice_fork()

        while True:
            try:
                return self._publisher.resend(outgoing)
            except ClosedError:
                logger.debug("%r is sent again during a stop.", outgoing.route_state.name)

    def _publish_drafts(self, drafts: Sequence[Message]) -> list[Message]:
        """Publish what waited for a commit, and return what Redis did not confirm in time."""
        notice_fork()
        deadline = time.monotonic() + self.config.timeout

        if self._withholds():
            return []

        # One that is interrupted, by a time limit for example, keeps no other from the buffer.
        with ExitStack() as stack:
            for draft in reversed(drafts):
                stack.callback(self._publish_draft, draft, deadline)

        return self._publisher.wait_for_confirmations(drafts, deadline)

    def _publish_draft(self, draft: Message, deadline: float) -> None:
        while True:
            try:
                return self._publisher.publish_pending(draft, deadline)
            except ClosedError:
                logger.debug(
                    "%r left during a stop; the next publisher takes it.", draft.route_state.name
                )
            except PublishError as error:
                # There is no room for it, and there may be for the next.
                return draft.finish(error)


def _resending(node: Node) -> Callable[[Message], None]:
    """A function that sends an event again, and does not keep ``node`` alive."""
    reference = weakref.ref(node)

    def resend(outgoing: Message) -> None:
        found = reference()

        if found is None:
            raise RuntimeError(f"The bus that sent the event {outgoing.id} is gone.")

        found.resend(outgoing)

    return resend


def _merge(declared: Subscription, configured: Subscription | None) -> Subscription:
    if configured is None:
        return declared

    return replace(
        configured,
        echo=configured.echo or declared.echo,
        via=configured.via or declared.via,
        start=declared.start if configured.start == NEW else configured.start,
        group=configured.group and declared.group,
    )


def _since(moment: float) -> float:
    return time.monotonic() - moment


#: The nodes of this process.
nodes: weakref.WeakSet[Node] = weakref.WeakSet()


def _only_service() -> str | None:
    """The service of this process; ``None`` where there are several."""
    services = {node.config.service for node in list(nodes)}
    return services.pop() if len(services) == 1 else None


logs.find_service = _only_service

#: Called with each new node, for the testing kit.
born: list[Callable[[Node], None]] = []


#: Publishers whose nodes are gone, and that still have something to write.
_left: set[Publisher] = set()


def _let_go(publisher: Publisher) -> None:
    """When a node is gone: let its publisher write what waits."""
    publisher.leave()
    _left.difference_update([other for other in list(_left) if not other.buffered])

    if publisher.buffered:
        _left.add(publisher)


@atexit.register
def stop_all() -> None:
    """Stop every node of this process; all of them share the time to publish what waits."""
    notice_fork()

    try:
        _stop_together(
            [node for node in list(nodes) if node.may_stop_here], FLUSH_AT_EXIT, list(_left)
        )
    except Exception:
        logger.exception("A bus of this process was not stopped.")

    # From now on threads that still run write what they send themselves.
    process_ends.set()
    flush_by = time.monotonic() + LATE

    for node in list(nodes):
        if node.may_stop_here and node._publisher.buffered:
            node._take_publisher().close(flush_by, flush_by + LATE)


def _stop_together(
    stopping: Sequence[Node], flush: float, others: Sequence[Publisher] = ()
) -> None:
    """Stop nodes at the same time: each step has one deadline for all of them.

    :param others: publishers without a node, which have the same time to flush.
    """
    begin = time.monotonic()
    grace = max((node.config.grace for node in stopping), default=0.0)

    with ExitStack() as turning:
        for node in stopping:
            turning.enter_context(node._turning)

        for node in stopping:
            node._stop_listening()

        for node in stopping:
            node._inbound.finish(begin + node.config.grace)

        release_by = time.monotonic() + RELEASE

        for node in stopping:
            node._inbound.release(release_by)

        for node in stopping:
            node._inbound.end(release_by)

        flush_by = time.monotonic() + flush

        for publisher in [*(node._take_publisher() for node in stopping), *others]:
            publisher.close(flush_by, flush_by + WRITER_END)

    wait_until_sent(begin + grace + flush + REST - 2 * LATE - time.monotonic())


@after_fork
def _renew_all() -> None:
    process_ends.clear()
    _left.clear()

    for node in list(nodes):
        # The parent's names are those of another process now: its events are to be heard.
        node.declarations.siblings.clear()

    for node in list(nodes):
        node._after_fork()

    _stop_with_pools()


def _stop_with_pools() -> None:
    """In a child of multiprocessing, billiard or Celery, which may end without atexit."""
    for name in ("multiprocessing.util", "billiard.util"):
        if util := sys.modules.get(name):
            util.register_after_fork(nodes, _finalizer(util))

    # A pool's child ends by os._exit(); Celery announces that.
    if celery := sys.modules.get("celery.signals"):
        celery.worker_process_shutdown.connect(
            _stop_with_celery, weak=False, dispatch_uid="flask_eventbus"
        )


def _finalizer(util: Any) -> Callable[[object], None]:
    def prepare_child(_: object) -> None:
        leave_sigterm()
        util.Finalize(None, stop_all, exitpriority=0)

    return prepare_child


def _stop_with_celery(**extra: Any) -> None:
    stop_all()
