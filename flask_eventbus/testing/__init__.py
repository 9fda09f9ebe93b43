"""Test services without Redis: assert what they publish, and deliver events to them.

::

    def test_registering_tells_the_others(eventbus, client):
        client.post("/register", data={"email": "ada@example.com"})

        eventbus.assert_published("user_registered", email="ada@example.com")

    def test_a_new_user_gets_a_mail(eventbus, app):
        eventbus.deliver("user_registered", user_id=7, email="ada@example.com", source="accounts")

    def test_a_mail_that_cannot_be_sent_is_a_dead_letter(eventbus, app, no_mail_server):
        eventbus.deliver("user_registered", email="ada@example.com", retry=True)
        eventbus.run_retries()

        [letter] = eventbus.dead_letters

The package has the pytest fixture ``eventbus``; without pytest, use ``with isolated() as
eventbus:``. Events take the same path as in production, down to their bytes; only the server is
fakeredis.

A published event passes ``recorder``, which reads what the services write to the server in
memory, and compares it with the assertion of the test. A delivered event runs the receivers in
the thread of the test; ``retries`` plays their retries and dead letters.
"""

from __future__ import annotations

import gc
import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from time import monotonic, sleep
from typing import Any
from weakref import WeakKeyDictionary

from blinker import NamedSignal

from ..codec.codec import Codec
from ..coroutines import kept_loop
from ..errors import ConfigError, DecodeError
from ..event import Event
from ..node import Node, nodes, on_new_node
from ..receivers.dispatcher import Failure
from ..signals import wait_until_sent
from ..transport import connection, connections
from ..typing import Via
from .recorder import (
    Expectation,
    GivenUp,
    Recording,
    receives,
    why_not_received,
    why_unpublished,
)
from .retries import FailedAttempt, RetryRehearsal, raise_all

#: Seconds to wait for events sent earlier, which go to the node's own server.
LEAVE = 1.0

#: Seconds to wait for the threads of nodes, which usually take a millisecond.
PATIENCE = 5.0


def check_attributes(event: Event) -> None:
    """Raise :exc:`TypeError` if an attribute is invalid: it is probably meant for the payload."""
    try:
        plain = Codec()
        plain.decode(plain.encode(replace(event, payload={})))
    except (AttributeError, TypeError, DecodeError) as error:
        raise TypeError(
            f"deliver() cannot create this event: {error} 'id', 'time', 'hops' and the like are "
            "attributes of the event. Pass payload keys of these names in payload={...}."
        ) from error


def check_via(via: str | None, method: str) -> None:
    """Raise :exc:`TypeError` if ``via`` is neither the name of a transport nor ``None``."""
    __tracebackhide__ = True

    if via not in (None, "channel", "stream"):
        raise TypeError(
            f"{method}() got via={via!r}: pass 'channel' or 'stream'. Pass a payload key of this "
            "name in payload={...}."
        )


def check_retry(retry: bool, via: str | None) -> None:
    """Raise :exc:`TypeError` if ``retry`` is not a bool, or does not fit ``via``."""
    __tracebackhide__ = True

    if not isinstance(retry, bool):
        raise TypeError(
            f"deliver(retry={retry!r}) is neither True nor False. Pass a payload key of this name "
            "in payload={...}."
        )

    if retry and via not in (None, "stream"):
        raise TypeError(
            f"deliver(via={via!r}, retry=True) is not possible: only events of a stream are "
            "retried. Remove one of the two."
        )


def name_of(signal: str | NamedSignal) -> str:
    """Return the name of a signal."""
    return signal.name if isinstance(signal, NamedSignal) else signal


@contextmanager
def isolated() -> Iterator[Isolation]:
    """Give every bus of this process a Redis in memory until the end of the block.

    Afterwards, buses that existed before use their own Redis again, and listen again if they
    did. Use one block at a time: it isolates the process, not the thread.

    :raises ConfigError: fakeredis is not installed.
    """
    if find_spec("fakeredis") is None:
        raise ConfigError(
            "flask_eventbus.testing needs fakeredis, which is not installed. Install it with: "
            "pip install 'flask-eventbus[testing]'"
        )

    url = f"memory://isolated-{secrets.token_hex(6)}"

    with diverted(url), kept_loop():
        isolation = Isolation(url)
        on_new_node.append(isolation.add_node)

        try:
            yield isolation
        finally:
            on_new_node.remove(isolation.add_node)
            isolation.close()


@contextmanager
def diverted(url: str) -> Iterator[None]:
    """Connect all nodes, present and future, to the server at ``url`` until the block ends.

    Nodes that listen continue to listen there, and on their own server after the block.
    """
    before = connections.diversion
    listening = [node for node in nodes if node.listening]
    _divert(url, listening)

    try:
        yield
    finally:
        _divert(before, listening)
        connection.memory_servers.pop(url, None)


def _divert(url: str | None, listening: Iterable[Node]) -> None:
    # Events sent so far still go to the earlier server.
    _stop_all()
    connections.diversion = url
    # Another thread may have started a node with the earlier URL in between.
    _stop_all()

    for node in listening:
        node.start()


def _stop_all() -> None:
    for node in list(nodes):
        node.stop(flush=LEAVE)


def await_health(watched: Iterable[Node], *, available: bool) -> None:
    """Make nodes probe Redis, and wait until their health shows whether it is available."""
    for node in watched:
        node.ask()

    deadline = monotonic() + PATIENCE

    while any(node.health().publishing is not available for node in watched):
        if monotonic() > deadline:
            raise RuntimeError(
                f"The buses did not notice the state of Redis within {PATIENCE:g} s."
            )

        sleep(0.001)

    wait_until_sent()


class Isolation:
    """The fixture ``eventbus``: returns published events, and delivers events to receivers."""

    def __init__(self, url: str) -> None:
        self._server = connection.memory_server(url)
        self._recording = Recording(url)
        self._rehearsal = RetryRehearsal(self._under_test)
        self._event_numbers = itertools.count(1)
        #: Known nodes, in the order in which they were found.
        self._nodes: WeakKeyDictionary[Node, None] = WeakKeyDictionary()
        #: Number of nodes after the last garbage collection; collect again if there are more.
        self._collect_above = 1

        for node in list(nodes):
            self.add_node(node)

    def published(self, name: str | NamedSignal = "*", *, via: Via | None = None) -> list[Event]:
        """Return the events published so far, in order, as other services would read them.

        :param name: the signal, its name, or a pattern such as ``"order_*"``.
        :param via: ``"channel"`` or ``"stream"``; both by default.
        """
        check_via(via, "published")
        expected = Expectation(name=name_of(name), payload={}, via=via)
        return [event for event in self._read() if expected.is_met_by(event)]

    def assert_published(
        self,
        name: str | NamedSignal,
        /,
        *,
        times: int | None = None,
        exact: bool = False,
        via: Via | None = None,
        payload: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> list[Event]:
        """Assert that such an event was published, and return all of them.

        The payload may have more keys than are given. Values are compared by ``==``, so
        ``unittest.mock.ANY`` and ``pytest.approx`` work; a function is called with the value.

        :param times: exactly how often; at least once by default.
        :param exact: True if the payload must have these keys and no others.
        :param via: ``"channel"`` or ``"stream"``; either by default.
        :param payload: keys with the name of a parameter, for example ``times``.
        """
        __tracebackhide__ = True
        check_via(via, "assert_published")
        values = {**(payload or {}), **keys}
        expected = Expectation(name=name_of(name), payload=values, exact=exact, via=via)
        events = self._read()
        found = [event for event in events if expected.is_met_by(event)]

        if len(found) == times or (times is None and found):
            return found

        raise AssertionError(why_unpublished(expected, times, events, _living()))

    def assert_not_published(
        self,
        name: str | NamedSignal = "*",
        /,
        *,
        via: Via | None = None,
        payload: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        """Assert that no such event was published; without a name, that no event was."""
        __tracebackhide__ = True
        self.assert_published(name, times=0, via=via, payload={**(payload or {}), **keys})

    @property
    def failures(self) -> list[FailedAttempt]:
        """Failed attempts of receivers at events of ``deliver(..., retry=True)``, in order."""
        return list(self._rehearsal.failures)

    @property
    def dead_letters(self) -> list[GivenUp]:
        """Dead letters of all services, including those that listen to the server in memory."""
        self._read()
        return self._rehearsal.given_up + self._recording.given_up

    def clear(self) -> None:
        """Forget all published events, failed attempts and dead letters so far."""
        self._read()
        self._recording.clear()
        self._rehearsal.clear()

    def deliver(
        self,
        name: str | NamedSignal,
        /,
        *,
        via: Via | None = None,
        retry: bool = False,
        source: str = "elsewhere",
        id: str | None = None,
        time: datetime | None = None,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        hops: int = 0,
        traceparent: str | None = None,
        payload: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> Event:
        """Deliver an event as if another service had published it, and return the event.

        The receivers of every bus under test run before this returns, as they do for an event
        from Redis. The error of a receiver is raised here.

        :param via: ``"channel"`` delivers to all nodes, ``"stream"`` to one node of each service.
            The default is a channel, or a stream if only streams are subscribed to.
        :param retry: deliver over a stream, and handle errors of receivers as a worker does:
            none is raised here. See :attr:`failures` and :attr:`dead_letters`, and run retries
            with :meth:`advance` or :meth:`run_retries`.
        :param source: the service that publishes the event.
        :param payload: keys with the name of a parameter, for example ``source`` or ``time``.
        :raises AssertionError: no receiver gets the event.
        :raises PayloadError: a value cannot be encoded.
        :raises ExceptionGroup: several receivers failed.
        """
        __tracebackhide__ = True
        check_retry(retry, via)
        event = Event(
            name=name_of(name),
            source=source,
            id=f"{source}-{next(self._event_numbers)}" if id is None else id,
            time=datetime.now(UTC) if time is None else time,
            payload={**(payload or {}), **keys},
            correlation_id=correlation_id,
            causation_id=causation_id,
            hops=hops,
            traceparent=traceparent,
        )
        check_attributes(event)
        event = self._routed(event, "stream" if retry else via)
        raise_all(event, self._dispatch(event, retry=retry))
        return event

    def advance(self, seconds: float) -> int:
        """Move the clock of retries, and run those that become due, without waiting.

        The delays are those of a worker, without their random part: 1, 2, 4, ... seconds.

        :return: the number of attempts.
        """
        __tracebackhide__ = True

        if seconds < 0:
            raise ValueError(f"advance({seconds!r}) goes back in time. Pass 0 or more seconds.")

        return self._rehearsal.advance(seconds)

    def run_retries(self) -> int:
        """Run retries until none is left: each has succeeded or is a dead letter.

        :return: the number of attempts.
        """
        __tracebackhide__ = True
        attempts = 0

        while (seconds := self._rehearsal.next_due) is not None:
            attempts += self._rehearsal.advance(seconds)

        return attempts

    @contextmanager
    def redis_away(self) -> Iterator[None]:
        """Simulate an outage of Redis until the end of the block.

        Every bus knows of the outage when the block starts. Events that are buffered in the block
        are published after it.
        """
        self._read()
        self._server.connected = False

        try:
            await_health(list(nodes), available=False)
            yield
        finally:
            self._server.connected = True
            await_health(list(nodes), available=True)

    def add_node(self, node: Node) -> None:
        """Add a node: read its events, and deliver events to it."""
        self._nodes[node] = None
        self._recording.learn(node)

        if not self._server.connected:
            await_health([node], available=False)

    def close(self) -> None:
        """Stop recording."""
        self._recording.close()

    def _read(self) -> list[Event]:
        if self._server.connected:
            for node in list(nodes):
                if not node.flush(PATIENCE):
                    raise RuntimeError(
                        f"Events of {node.config.service!r} still wait after {PATIENCE:g} s: its "
                        "writer thread is stuck."
                    )

            self._recording.read()

        return list(self._recording.events)

    def _routed(self, event: Event, via: Via | None) -> Event:
        """Return the event with its transport: ``via``, or one that a node listens to."""
        __tracebackhide__ = True

        check_via(via, "deliver")

        if via is not None:
            return replace(event, via=via)

        choices = [replace(event, via=transport) for transport in ("channel", "stream")]
        subscribed = [choice for choice in choices if any(receives(node, choice) for node in nodes)]
        return (subscribed or choices)[0]

    def _dispatch(self, event: Event, *, retry: bool) -> list[Failure]:
        """Run receivers, and return the failures that are raised in the test."""
        __tracebackhide__ = True
        raised: list[Failure] = []
        on_stream = self._rehearsal.deliveries(event) if event.via == "stream" else []
        on_channel = [
            node for node in self._under_test() if event.via == "channel" and receives(node, event)
        ]

        if not on_stream and not on_channel:
            raise AssertionError(why_not_received(event, _living()))

        for node, delivery in on_stream:
            failures = self._rehearsal.run(node, delivery)
            raised += self._rehearsal.record(node, delivery, failures) if retry else failures

        for node in on_channel:
            received = node.codec.decode(node.codec.encode(event))
            raised += node.dispatcher.dispatch_once(received)

        return raised

    def _under_test(self) -> list[Node]:
        """Return the nodes in the order in which they were found."""
        if len(nodes) > self._collect_above:
            self._collect_above = len(_living())

        return [node for node in self._nodes if node in nodes]


def _living() -> list[Node]:
    """Return the nodes in use, after a garbage collection of those of earlier tests."""
    gc.collect()
    return list(nodes)
