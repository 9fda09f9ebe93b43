"""Tests services without a Redis: tells what they published, and plays the other services.

::

    def test_registering_tells_the_others(eventbus, client):
        client.post("/register", data={"email": "ada@example.com"})

        eventbus.assert_published("user_registered", email="ada@example.com")

    def test_a_new_user_gets_a_mail(eventbus, app):
        eventbus.deliver("user_registered", user_id=7, email="ada@example.com", source="accounts")

The ``eventbus`` fixture comes with the package; elsewhere ``with isolated() as eventbus:`` does
the same. Events go through everything they go through in earnest, down to their bytes; only
the server is fakeredis.
"""

from __future__ import annotations

import gc
import secrets
import time as clock
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any

from blinker import NamedSignal

from . import connections
from .codec import Codec
from .coroutines import kept_loop
from .dispatcher import Failure
from .diversion import diverted
from .errors import ConfigError, DecodeError
from .event import Event
from .expectation import Expectation, local_receivers, why_unheard, why_unpublished
from .node import Node, born, nodes
from .recording import Recording
from .routes import matches, subscription_for

#: Seconds that a writing thread may take for what takes it a millisecond.
PATIENCE = 5.0


@contextmanager
def isolated() -> Iterator[Isolation]:
    """Give every bus of this process a Redis in memory until the end of the block.

    Buses made before go back to their own Redis afterwards, and those that listened listen
    again. One block at a time: it is the process that is isolated, not the thread.

    :raises ConfigError: fakeredis is not installed.
    """
    _require_fakeredis()
    url = f"memory://isolated-{secrets.token_hex(6)}"

    with diverted(url), kept_loop():
        isolation = Isolation(url)
        born.append(isolation.meet)

        try:
            yield isolation
        finally:
            born.remove(isolation.meet)
            isolation.close()


class Isolation:
    """What a test sees of the buses under test: events that left, and a way to bring some in."""

    def __init__(self, url: str) -> None:
        self._server = connections.memory_server(url)
        self._recording = Recording(url)
        self._delivered = 0
        #: Nodes that need no second look whether they are still there: one cannot be too many.
        self._alive = 1

        for node in list(nodes):
            self.meet(node)

    def published(self, name: str | NamedSignal = "*") -> list[Event]:
        """The events published so far, in order, as other services would read them.

        :param name: the signal, its name, or a pattern such as ``"order_*"``.
        """
        wanted = _name_of(name)
        return [event for event in self._read() if matches(wanted, event.name)]

    def assert_published(
        self,
        name: str | NamedSignal,
        /,
        *,
        times: int | None = None,
        exact: bool = False,
        payload: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> list[Event]:
        """Assert that such an event was published, and return all of them.

        The payload may have more keys than are asked for. Values are compared by ``==``, so
        ``unittest.mock.ANY`` and ``pytest.approx`` do; a function is asked.

        :param times: exactly how often; at least once by default.
        :param exact: whether the payload has these keys and no others.
        :param payload: keys that are parameters here, ``times`` for example.
        """
        __tracebackhide__ = True
        wanted = Expectation(name=_name_of(name), payload=_merge(payload, keys), exact=exact)
        events = self._read()
        found = [event for event in events if wanted.is_met_by(event)]

        if len(found) == times or (times is None and found):
            return found

        raise AssertionError(why_unpublished(wanted, times, events, _living()))

    def assert_not_published(
        self,
        name: str | NamedSignal = "*",
        /,
        *,
        payload: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        """Assert that no such event was published; without a name, none at all."""
        __tracebackhide__ = True
        self.assert_published(name, times=0, payload=_merge(payload, keys))

    def clear(self) -> None:
        """Forget what was published so far."""
        self._read()
        self._recording.events.clear()

    def deliver(
        self,
        name: str | NamedSignal,
        /,
        *,
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
        """Act as another service that emits an event, and return the event.

        The receivers of every bus under test run before this returns, each as it would for
        an event from Redis, and what one raises is raised here.

        :param source: the service that emits it.
        :param payload: keys that are parameters here, ``source`` or ``time`` for example.
        :raises AssertionError: nothing receives it.
        :raises PayloadError: a value cannot travel.
        :raises ExceptionGroup: several receivers failed.
        """
        __tracebackhide__ = True
        event = Event(
            name=_name_of(name),
            source=source,
            id=self._next_id(source) if id is None else id,
            time=datetime.now(UTC) if time is None else time,
            payload=_merge(payload, keys),
            correlation_id=correlation_id,
            causation_id=causation_id,
            hops=hops,
            traceparent=traceparent,
        )
        _check(event)
        _raise(event, self._dispatch(event))
        return event

    @contextmanager
    def redis_away(self) -> Iterator[None]:
        """Let Redis be away until the end of the block; every bus knows it from the start.

        What is buffered meanwhile is published when it is back.
        """
        self._read()
        self._server.connected = False

        try:
            _find_out(list(nodes), there=False)
            yield
        finally:
            self._server.connected = True
            _find_out(list(nodes), there=True)

    def meet(self, node: Node) -> None:
        """Take a new node into account."""
        self._recording.learn(node)

        if not self._server.connected:
            _find_out([node], there=False)

    def close(self) -> None:
        """Stop recording."""
        self._recording.close()

    def _read(self) -> list[Event]:
        if self._server.connected:
            _flush()
            self._recording.read()

        return list(self._recording.events)

    def _next_id(self, source: str) -> str:
        self._delivered += 1
        return f"{source}-{self._delivered}"

    def _dispatch(self, event: Event) -> list[Failure]:
        __tracebackhide__ = True
        hearing = [node for node in self._under_test() if _hears(node, event)]

        if not hearing:
            raise AssertionError(why_unheard(event, _living()))

        return [failure for node in hearing for failure in _handle(node, event)]

    def _under_test(self) -> list[Node]:
        if len(nodes) > self._alive:
            self._alive = len(_living())

        return list(nodes)


def _living() -> list[Node]:
    """The nodes that are in use, without those of earlier tests that wait to be collected."""
    gc.collect()
    return list(nodes)


def _flush() -> None:
    for node in list(nodes):
        if not node.flush(PATIENCE):
            raise RuntimeError(
                f"Events of {node.config.service!r} still wait after {PATIENCE:g} s: its writing "
                "thread is stuck."
            )


def _find_out(found: list[Node], *, there: bool) -> None:
    """Let nodes find out whether Redis is there, and wait until they have."""
    for node in found:
        node.ask()

    _wait_until(lambda: all(node.health().publishing is there for node in found))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = clock.monotonic() + PATIENCE

    while not condition():
        if clock.monotonic() > deadline:
            raise RuntimeError(f"The buses did not take note of Redis within {PATIENCE:g} s.")

        clock.sleep(0.001)


def _hears(node: Node, event: Event) -> bool:
    subscription = subscription_for(event.name, node.subscriptions)
    subscribed = subscription is not None and subscription.hears(event.source)
    return node.config.enabled and subscribed and bool(local_receivers(node, event))


def _handle(node: Node, event: Event) -> list[Failure]:
    return node.dispatcher.dispatch(node.codec.decode(node.codec.encode(event)))


def _raise(event: Event, failures: list[Failure]) -> None:
    __tracebackhide__ = True

    if len(failures) == 1:
        raise failures[0].error

    if failures:
        errors = [failure.error for failure in failures]
        raise BaseExceptionGroup(f"{len(errors)} receivers of {event.name!r} failed", errors)


def _check(event: Event) -> None:
    """Refuse attributes that cannot travel: most likely they are meant for the payload."""
    try:
        plain = Codec()
        plain.decode(plain.encode(replace(event, payload={})))
    except (AttributeError, TypeError, DecodeError) as error:
        raise TypeError(
            f"deliver() cannot make an event of this: {error} 'id', 'time', 'hops' and the like "
            "are the event's own. Payload keys of these names go into payload={...}."
        ) from error


def _name_of(signal: str | NamedSignal) -> str:
    return signal.name if isinstance(signal, NamedSignal) else signal


def _merge(payload: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> dict[str, Any]:
    return {**(payload or {}), **keys}


def _require_fakeredis() -> None:
    if find_spec("fakeredis") is None:
        raise ConfigError(
            "flask_eventbus.testing needs fakeredis, which is not installed. Install it with: "
            "pip install 'flask-eventbus[testing]'"
        )
