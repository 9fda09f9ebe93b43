"""The node: one process of a service. It creates and connects all parts of the bus."""

from __future__ import annotations

import atexit
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from blinker import NamedSignal

from . import logs
from .codec.codec import Codec
from .config import Config
from .database.after_commit import AfterCommit
from .ending import (
    FLUSH_AT_EXIT,
    after_fork,
    catch_sigterm,
    importing,
    notice_fork,
    process_ends,
    stop_with_pools,
)
from .event import Event
from .logs import Counters, get_logger
from .publisher.message import check_route
from .publisher.publisher import Publisher, Sending, orphaned
from .routing.options import Receiver
from .routing.registry import Bridges, Registry
from .routing.routes import Route, read_routes
from .routing.subscriptions import (
    Subscription,
    check_subscription,
    merge,
    read_subscriptions,
)
from .signals import wait_until_sent
from .transport.connections import Connections, Context

if TYPE_CHECKING:
    from .listening import Listening
    from .receivers.dispatcher import Dispatcher

logger = get_logger(__name__)

#: Longest time of a stop in seconds, beyond ``EVENTBUS_GRACE`` and the flush, even if Redis hangs.
#: :data:`RELEASE` of it is for releasing unhandled events, :data:`WRITER_END` for the writer
#: thread, and the rest for lifecycle signals.
STOP_OVERHEAD = 3.0
RELEASE = 2.0
WRITER_END = 0.5

#: Seconds, part of :data:`STOP_OVERHEAD`, to publish events that other threads sent while the
#: process ended.
LATE_FLUSH = 0.2

#: Longest time in seconds, beyond ``EVENTBUS_GRACE``, that all buses of a process take to stop
#: when it ends, even if Redis hangs.
LONGEST_STOP = FLUSH_AT_EXIT + STOP_OVERHEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Questions that a node asks its program. A script answers none of them."""

    #: Returns the context in which receivers run, for example an app context; ``None`` for none.
    scope: Callable[[], AbstractContextManager[object]] | None = None
    #: Returns True if emissions of this sender belong to the node; ``None`` if all do.
    owns: Callable[[Any], bool] | None = None
    #: Returns the current W3C trace context, or ``None``; ``None`` in a program without requests.
    trace: Callable[[], str | None] | None = None
    #: Returns False once the app is gone, which ends the listening; ``None`` in a script.
    app_exists: Callable[[], bool] | None = None
    #: Returns True while the program is under test; ``None`` if it never is.
    under_test: Callable[[], bool] | None = None
    #: Returns the database session to use if none is registered; ``None`` if there is none.
    session: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The state of a node at one moment."""

    #: The name of the service.
    service: str
    #: The unique name of this node.
    node: str
    #: True if the node was started and has a subscription.
    listening: bool
    #: True if Redis has confirmed every subscription on a live connection.
    connected: bool
    #: False while an outage is known: Redis is unreachable or refuses writes.
    publishing: bool
    #: Seconds since Redis last sent bytes; ``None`` if it never did.
    last_heard: float | None
    #: Number of events that arrived and are not handled yet.
    lag: int
    #: Number of events in the buffer, waiting to be published.
    buffered: int
    #: Number of channel events of other nodes that never arrived.
    missed: int
    #: The subscriptions that Redis refuses, each with the reason.
    refused: Mapping[str, str]
    #: Subscribed streams that this process does not read, because it has no receiver for them.
    #: Their events wait for a process that has one.
    without_receiver: frozenset[str]
    #: Faults that keep this service from the events of a stream, by name of the stream or
    #: pattern. The text says how to correct the fault.
    alarms: Mapping[str, str]
    #: All counters: ``published``, ``received``, ``handled``, ``failed``, ``rejected``, ...
    counts: Mapping[str, int]


class Node:
    """Publishes and receives events for one service in one process.

    It opens no connection and starts no thread before the first event or :meth:`start`. After a
    fork, the node of the child gets a new name, new threads and new connections.

    :param config: the settings.
    :param registry: the signals, routes, subscriptions and receivers declared in code.
    :param host: the program around it; by default a script.
    :raises ConfigError: a route or a subscription is wrong, or the server cannot serve it.
    """

    def __init__(self, config: Config, registry: Registry, *, host: Host | None = None) -> None:
        self.config = config
        self.registry = registry
        self.codec: Codec = registry.codec.limited(config.max_event_bytes)
        self.counters = Counters()
        self._host = host or Host()
        self._configured = read_subscriptions(config.subscribe)
        #: The subscriptions of this service by name.
        self.subscriptions: Mapping[str, Subscription] = {}
        self.listening = False
        self._create_locks()
        self._sending = Sending(trace=self._host.trace, under_test=self._host.under_test)
        self._bridges = Bridges(
            registry,
            read_routes(config.publish),
            self._sending.emit,
            self._sending.emit_async,
            self._host.owns,
            check=partial(check_route, config),
        )
        self._create_parts()
        self._apply_declarations()
        nodes.add(self)
        catch_sigterm(stop_all)

        for callback in list(on_new_node):
            callback(self)

    def _create_locks(self) -> None:
        #: Held while the node starts or stops. Reentrant, since a signal handler may stop it.
        self._start_stop_lock = threading.RLock()
        #: Held while the receiving half is created, changed or started.
        self._listen_lock = threading.RLock()

    def _create_parts(self) -> None:
        """Create all parts that belong to one process and one start."""
        self._name = secrets.token_hex(6)
        self.registry.siblings.add(self, self._name)
        self.connections = Connections(
            self.config.url,
            name=f"eventbus:{self.config.service}:{self._name}",
            timing=self.registry.timing,
        )
        self.context = context = Context(
            config=self.config,
            registry=self.registry,
            connections=self.connections,
            codec=self.codec,
            counters=self.counters,
            timing=self.registry.timing,
            node=self._name,
            app_exists=self._host.app_exists,
        )
        self._after_commit = AfterCommit(
            context,
            self._sending,
            find_session=self._host.session,
            scope=self._host.scope or nullcontext,
        )
        self._sending.open(context, hold=self._after_commit.hold)
        self._publisher = self._sending.publisher
        #: The receiving half: what runs receivers, and what listens; ``None`` before it is needed.
        self._dispatcher: Dispatcher | None = None
        self._listening: Listening | None = None

    @property
    def dispatcher(self) -> Dispatcher:
        """Runs the receivers of an event; it is created at the first access."""
        with self._listen_lock:
            if self._dispatcher is None:
                # Imported here, because a process that only publishes runs no receivers.
                with importing:
                    from .receivers.dispatcher import Dispatcher

                self._dispatcher = Dispatcher(
                    self.context, scope=self._host.scope, undo=self._after_commit.roll_back
                )

            return self._dispatcher

    @property
    def _inbound(self) -> Listening:
        """The listening half; it is created at the first access."""
        with self._listen_lock:
            if self._listening is None:
                # Imported here, because a process that only publishes does not listen.
                with importing:
                    from .listening import Listening

                publisher = self._publisher
                self._listening = Listening(
                    self.context,
                    dispatcher=self.dispatcher,
                    subscriptions=self.subscriptions,
                    issued=lambda: publisher.issued,
                )

            return self._listening

    @property
    def routes(self) -> dict[str, Route]:
        """The routes of this service by name; settings override declarations in code."""
        return self._bridges.routes

    def route_for(self, name: str) -> Route:
        """Return the route of events called ``name``; a channel if none is declared."""
        return self._bridges.route_for(name) or Route(name=name)

    @property
    def name(self) -> str:
        """The unique name of this node; a forked child gets a new one."""
        notice_fork()
        return self._name

    @property
    def has_app(self) -> bool:
        """True if the program is a Flask app."""
        return self._host.app_exists is not None

    @property
    def command(self) -> str:
        """What a command line for this program starts with, for hints."""
        return self.context.command

    @property
    def session(self) -> Any:
        """The database session, as given to ``register_session()``; ``None`` if there is none."""
        return self._after_commit.session

    def signal_created(self, signal: NamedSignal) -> None:
        """Connect a new signal of the bus, if a route selects it."""
        if self.config.enabled:
            self._bridges.connect_signal(signal)

    def route_declared(self, route: Route) -> None:
        """Connect the signals of a route that was declared."""
        if self.config.enabled:
            self._bridges.connect(route.name)

    def subscription_declared(self, subscription: Subscription) -> None:
        """Add a subscription that was declared.

        :raises ConfigError: the server of the settings cannot serve it.
        """
        notice_fork()
        merged = merge(subscription, self._configured.get(subscription.name))
        check_subscription(self.config, merged)
        self._set_subscriptions({**self.subscriptions, merged.name: merged})

        if self.listening:
            self._listen()

    def _set_subscriptions(self, subscriptions: Mapping[str, Subscription]) -> None:
        with self._listen_lock:
            self.subscriptions = subscriptions

            if self._listening is not None:
                self._listening.update(subscriptions)

    def _apply_declarations(self) -> None:
        with self.registry.lock:
            self.registry.watch(self)
            self._set_subscriptions({**self._configured})

            for configured in self._configured.values():
                check_subscription(self.config, configured)

            for subscription in self.registry.subscriptions.values():
                self.subscription_declared(subscription)

            if self.config.enabled:
                self._bridges.connect_all()

    def receivers_of(self, event: Event) -> list[Receiver]:
        """Return the receivers of ``event``."""
        return self.registry.receivers_of(event.name, event.source)

    def publish(self, name: str, payload: Mapping[str, Any], *, confirm: bool = True) -> str:
        """Publish an event without a signal, and return its id.

        It uses the route for ``name``, or a channel if there is none.

        :param confirm: True to wait until Redis has the event.
        :raises PayloadError: a value cannot be encoded.
        :raises PublishError: Redis did not take the event in time, and the route or
            ``EVENTBUS_ON_OUTAGE="raise"`` asks for an error.
        """
        notice_fork()
        return self._sending.publish(name, payload, self.route_for(name), confirm=confirm)

    def start(self) -> None:
        """Start listening, and return at once even if Redis is unreachable."""
        notice_fork()
        catch_sigterm(stop_all)

        if not self.config.enabled:
            return

        # Other code may have created signals in an adopted namespace.
        self.registry.find_new_signals()

        with self._start_stop_lock:
            self.listening = True
            self._listen()

    def ready(self, timeout: float | None = None) -> bool:
        """Wait until Redis has confirmed every subscription.

        Return True at once without a subscription, and False at once with
        ``EVENTBUS_ENABLED=False``.

        :param timeout: seconds to wait; without it, wait forever.
        :return: False if the time was over first.
        """
        notice_fork()

        if not self.config.enabled or not self.subscriptions:
            return self.config.enabled

        return self._inbound.ready(timeout)

    def ask(self) -> None:
        """Check in the writer thread if Redis takes events; :meth:`health` shows the result."""
        notice_fork()
        self._publisher.probe()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until Redis has all events sent so far.

        :param timeout: seconds to wait; ``EVENTBUS_GRACE`` by default.
        :return: False if the time was over first.
        """
        notice_fork()
        return self._publisher.flush(self.config.grace if timeout is None else timeout)

    def stop(self, *, flush: float = FLUSH_AT_EXIT) -> None:
        """Stop listening, let receivers finish, and publish the buffered events.

        The node can be used and started again afterwards. This takes at most ``EVENTBUS_GRACE``,
        plus ``flush``, plus :data:`STOP_OVERHEAD`.

        :param flush: seconds to wait for Redis to take the buffered events.
        :raises RuntimeError: a thread of the node calls it, for example a receiver.
        """
        notice_fork()

        if not self.may_stop_here:
            raise RuntimeError(
                "stop() was called from a thread of the bus, for example by a receiver. It would "
                "deadlock. Call it from another thread, or end the process by a signal."
            )

        _stop_together([self], flush)

    def _take_publisher(self) -> Publisher:
        """Replace the publisher, and return the old one for closing.

        Events sent from now on go to the new publisher, so the old one gets none that it would not
        write.
        """
        with self._listen_lock:
            publisher = self._publisher
            self._create_parts()

        return publisher

    @property
    def may_stop_here(self) -> bool:
        """False in threads of the node: a stop waits for their end, so it would deadlock."""
        listening = self._listening
        listens_here = listening is not None and listening.is_own_thread
        return not (listens_here or self._publisher.is_writing_thread)

    @property
    def fatal(self) -> Exception | None:
        """The error if this Redis cannot serve streams at all; ``None`` otherwise."""
        return None if self._listening is None else self._listening.consumer.fatal

    def health(self) -> Health:
        """Return the state of this node."""
        notice_fork()
        listening = self._listening
        heard = None if listening is None else listening.last_heard
        return Health(
            service=self.config.service,
            node=self._name,
            listening=self.listening and bool(self.subscriptions),
            connected=not self.subscriptions if listening is None else listening.connected,
            publishing=self._publisher.connected,
            last_heard=None if heard is None else time.monotonic() - heard,
            lag=0 if listening is None else len(listening.pool),
            buffered=self._publisher.buffered,
            missed=self.counters.get("missed"),
            refused={} if listening is None else listening.refused,
            without_receiver=(
                frozenset() if listening is None else listening.consumer.without_receiver
            ),
            alarms={} if listening is None else listening.consumer.alarms,
            counts=self.counters.all(),
        )

    def recreate_unused(self) -> None:
        """Create all parts again if they are unused, with the locks of patched threads (gevent)."""
        if not self.listening and not self._publisher.issued:
            self._create_locks()
            self._create_parts()

    def _after_fork(self) -> None:
        """Reset the node in a forked child: use nothing of the parent, start nothing."""
        self.listening = False
        self._create_locks()
        self.registry.reset_lock()

        if self._listening is not None:
            self._listening.disown()

        self._publisher.disown()
        self.connections.disown()
        self.counters = Counters()
        self._create_parts()

    def _listen(self) -> None:
        if not self.subscriptions:
            return

        with self._listen_lock:
            inbound = self._inbound

            # A signal handler may have stopped the node during the import.
            if self.listening:
                inbound.start()


#: The nodes of this process.
nodes: weakref.WeakSet[Node] = weakref.WeakSet()


def _only_service() -> str | None:
    """Return the service of this process; ``None`` if there are several."""
    services = {node.config.service for node in list(nodes)}
    return services.pop() if len(services) == 1 else None


logs.find_service = _only_service

#: Functions called with each new node; used by the testing kit.
on_new_node: list[Callable[[Node], None]] = []


@atexit.register
def stop_all() -> None:
    """Stop all nodes of this process; they share the time to publish buffered events."""
    notice_fork()

    try:
        _stop_together(
            [node for node in list(nodes) if node.may_stop_here], FLUSH_AT_EXIT, list(orphaned)
        )
    except Exception:
        logger.exception("Stopping the buses of this process failed. Buffered events may be lost.")

    # From now on, threads that still run write their events themselves.
    process_ends.set()
    flush_by = time.monotonic() + LATE_FLUSH

    for node in list(nodes):
        if node.may_stop_here and node._publisher.buffered:
            node._take_publisher().close(flush_by, flush_by + LATE_FLUSH)


def _stop_together(
    stopping: Sequence[Node], flush: float, others: Sequence[Publisher] = ()
) -> None:
    """Stop nodes together: each step has one deadline for all of them.

    :param flush: seconds to wait for Redis to take the buffered events.
    :param others: publishers without a node, which have the same deadline to flush.
    """
    started = time.monotonic()
    grace = max((node.config.grace for node in stopping), default=0.0)

    with ExitStack() as locks:
        for node in stopping:
            locks.enter_context(node._start_stop_lock)

        for node in stopping:
            node.listening = False

        halves = [
            (node._listening, started + node.config.grace)
            for node in stopping
            if node._listening is not None
        ]

        for half, _ in halves:
            half.stop_reading()

        for half, finish_by in halves:
            half.finish(finish_by)

        release_by = time.monotonic() + RELEASE

        for half, _ in halves:
            half.release(release_by)

        for half, _ in halves:
            half.consumer.end(release_by)

        flush_by = time.monotonic() + flush

        for publisher in [*(node._take_publisher() for node in stopping), *others]:
            publisher.close(flush_by, flush_by + WRITER_END)

    wait_until_sent(started + grace + flush + STOP_OVERHEAD - 2 * LATE_FLUSH - time.monotonic())


@after_fork
def _reset_nodes_after_fork() -> None:
    process_ends.clear()
    orphaned.clear()

    for node in list(nodes):
        # The parent is another process now, so its events must be received.
        node.registry.siblings.clear()

    for node in list(nodes):
        node._after_fork()

    stop_with_pools(stop_all, nodes)
