"""Check settings, routes, subscriptions, receivers and the database session, without Redis."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from blinker import NamedSignal

from ..admin.overview import Connected, Overview, connected_to
from ..database.after_commit import NO_SESSION
from ..errors import ConfigError
from ..node import Node
from ..receivers.dispatcher import signature_of, unfit_signature
from ..routing.options import Receiver, is_pattern, name_of
from ..routing.routes import is_built_in
from ..routing.subscriptions import Subscription
from ..text import counted
from .findings import Finding, error, listed, note, ok, warning

#: Names of a first parameter that expect the sender; names with a leading underscore do, too.
_SENDERS = frozenset({"sender", "source", "service", "origin", "app", "publisher"})

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_program(node: Node) -> Iterator[Finding]:
    """Check what a node's program declares; no connection is opened."""
    overview = Overview(node)
    yield from _check_settings(node, overview)
    yield from _check_routes(overview)

    yield from _check_subscriptions(overview)
    yield from _check_receivers(node, overview)


def _check_settings(node: Node, overview: Overview) -> Iterator[Finding]:
    config = node.config
    publishes, subscribes = len(overview.routes), len(overview.subscriptions)

    if publishes or subscribes:
        names = counted(publishes, "name")
        yield ok(
            f"The service {config.service!r} publishes {names} and subscribes to {subscribes}."
        )
    else:
        yield warning(
            f"The service {config.service!r} publishes nothing and subscribes to nothing.",
            "Name signals in 'EVENTBUS_PUBLISH' or 'EVENTBUS_SUBSCRIBE', or use bus.publishes() "
            "and @bus.on().",
        )

    if not config.enabled:
        yield warning(
            "'EVENTBUS_ENABLED' is False: nothing is published and nothing is received.",
            "Set it to True, unless this is intended.",
        )

    if subscribes and not config.listen:
        yield note(
            "'EVENTBUS_LISTEN' is False: processes that serve the app do not listen.",
            f"Run '{node.command} run' as well.",
        )


def _check_routes(overview: Overview) -> Iterator[Finding]:
    for found in overview.strangers():
        yield error(*found)

    for route in overview.routes:
        if is_pattern(route.name) and not overview.covered_by(route):
            yield warning(
                f"The route {route.name!r} covers no signal: nothing is published by it.",
                "Create the signals with bus.signal(name) when the program starts, or correct the "
                "pattern.",
            )
        elif route.signal is None or route.signal in overview.signals:
            continue
        elif is_built_in(route.payload):
            yield ok(f"The route {route.name!r} publishes plain values of a signal of Flask's.")
        elif route.payload is None:
            yield note(
                f"The route {route.name!r} publishes a signal of another package unchanged: its "
                "send() fails if the signal has an argument that cannot be encoded.",
                "Give the route a payload= function that returns plain values.",
            )


def _check_subscriptions(overview: Overview) -> Iterator[Finding]:
    for subscription in overview.subscriptions:
        if overview.receivers_of(subscription):
            continue

        name, is_read = subscription.name, overview.reads_stream(subscription)
        what = "its stream is not read" if is_read else "its events are skipped"
        yield error(
            f"Nothing here receives {name!r}, which is subscribed: {what}.",
            f"Connect a receiver with @bus.on({name!r}), name its module in "
            "'EVENTBUS_RECEIVERS', or remove the name from 'EVENTBUS_SUBSCRIBE'. A receiver that "
            "was connected weakly inside a function may be deleted already.",
        )


def _check_receivers(node: Node, overview: Overview) -> Iterator[Finding]:
    for signal in overview.signals:
        connected = connected_to(signal)

        for each in connected:
            if each.weak and not _is_in_a_module(each.receiver):
                yield warning(
                    f"{each.name} is connected to {signal.name!r} weakly: Python deletes it as "
                    "soon as nothing else refers to it.",
                    f"Connect it with @bus.on({signal.name!r}), or with "
                    "connect(receiver, weak=False).",
                )

        declared = node.registry.parameters.get(signal.name)
        yield from _check_signatures(signal, connected, declared)


def _is_in_a_module(receiver: Any) -> bool:
    """Return True if the receiver's module refers to it, as it does to top-level functions."""
    found: Any = sys.modules.get(getattr(receiver, "__module__", None) or "")

    for part in getattr(receiver, "__qualname__", "<none>").split("."):
        found = getattr(found, part, None)

    return found is receiver


@dataclass(frozen=True, slots=True)
class _Needs:
    """The keys that a receiver needs and accepts in a payload."""

    receiver: Receiver
    required: frozenset[str]
    accepted: frozenset[str]
    #: True if the receiver accepts any key, by ``**extra``.
    is_open: bool

    @property
    def name(self) -> str:
        return name_of(self.receiver)

    def lacks(self, keys: frozenset[str]) -> list[str]:
        """Return the required keys that are not among ``keys``."""
        return sorted(self.required - keys)

    def refuses(self, keys: frozenset[str]) -> list[str]:
        """Return those of ``keys`` that the receiver does not accept."""
        return [] if self.is_open else sorted(keys - self.accepted)


def _check_signatures(
    signal: NamedSignal, connected: list[Connected], declared: inspect.Signature | None
) -> Iterator[Finding]:
    needs = []

    for each in connected:
        unfit = unfit_signature(each.receiver, () if declared is None else declared.parameters)
        signature = signature_of(each.receiver)

        if unfit is not None:
            reason, remedy = unfit
            yield error(f"{each.name} fails at every event: {reason}.", f"{remedy}.")
        elif signature is not None:
            yield from _check_sender(each.name, signature)
            needs.append(_needs_of(each.receiver, signature))

    if declared is None:
        yield from _check_together(signal, needs)
    else:
        yield from _check_declared(signal, needs, declared)


def _check_sender(name: str, signature: inspect.Signature) -> Iterator[Finding]:
    """Check that the first parameter of a receiver has the name of a sender."""
    first = next(iter(signature.parameters.values()))

    if (
        first.kind is first.POSITIONAL_OR_KEYWORD
        and first.name not in _SENDERS
        and not first.name.startswith("_")
    ):
        yield note(
            f"The first parameter of {name} is {first.name!r}, and it gets the sender. Events "
            "whose payload has that key fail.",
            "Rename the parameter to 'sender', or add 'sender' before it.",
        )


def _needs_of(receiver: Receiver, signature: inspect.Signature) -> _Needs:
    parameters = list(signature.parameters.values())
    takes_all = parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    without_sender = parameters if takes_all else parameters[1:]
    named = [parameter for parameter in without_sender if parameter.kind in _NAMED]
    return _Needs(
        receiver,
        frozenset(each.name for each in named if each.default is each.empty),
        frozenset(each.name for each in named),
        any(each.kind is each.VAR_KEYWORD for each in parameters),
    )


def _check_declared(
    signal: NamedSignal, needs: list[_Needs], declared: inspect.Signature
) -> Iterator[Finding]:
    parameters = declared.parameters.values()
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters)
    keys = frozenset(each.name for each in parameters if each.kind in _NAMED)

    for need in needs:
        missing = [] if is_open else need.lacks(keys)

        if missing:
            yield error(
                f"{need.name} needs {listed(missing)}, and {signal.name!r} is declared with "
                f"{declared}: every event fails in it.",
                "Give the parameter a default, or declare the signal with it.",
            )

        if need.refuses(keys):
            yield error(
                f"{need.name} does not take {listed(need.refuses(keys))}, and {signal.name!r} is "
                f"declared with {declared}: every event fails in it.",
                "Add these parameters, or **extra, to the receiver.",
            )


def _check_together(signal: NamedSignal, needs: list[_Needs]) -> Iterator[Finding]:
    """Check that one payload can fit all receivers that accept every sender."""
    for_all = {id(found) for found in signal.receivers_for(object())}

    for one, other in combinations([need for need in needs if id(need.receiver) in for_all], 2):
        for closed, needy in ((one, other), (other, one)):
            clash = closed.refuses(needy.required)

            if clash:
                yield error(
                    f"No payload of {signal.name!r} fits both {closed.name} and {needy.name}: "
                    f"the second needs {listed(clash)}, which the first does not take.",
                    f"Add **extra to the parameters of {closed.name}.",
                )


def check_retries(node: Node) -> Iterator[Finding]:
    """Check names, time limits and the grace period of receivers that are retried."""
    overview = Overview(node)
    shared = [
        found for found in overview.subscriptions if overview.reads_stream(found) and found.group
    ]
    found: dict[Finding, None] = {}

    for subscription in shared:
        for name, receivers in overview.audiences_of(subscription):
            found.update(dict.fromkeys(_check_names(overview, subscription, name, receivers)))

        found.update(dict.fromkeys(_check_timeouts(node, overview, subscription)))

    yield from found

    if shared:
        yield from _check_grace(node)


def _check_names(
    overview: Overview, subscription: Subscription, signal: str, receivers: Sequence[Connected]
) -> Iterator[Finding]:
    retried = [each for each in receivers if overview.retries_of(subscription, each.receiver)]
    counts = Counter(each.name for each in receivers)

    for name in sorted({each.name for each in retried}):
        if counts[name] > 1:
            yield warning(
                f"{counts[name]} receivers of {signal!r} are called {name}: a retry tells them "
                f"apart by the order in which they were connected ('{name}#2'). If another worker "
                "connects them in another order, the wrong receiver is retried.",
                "Give each receiver a name of its own.",
            )
        elif " at 0x" in name:
            yield warning(
                f"{name}, which receives {signal!r}, has no name that another process could "
                "find it by: its retries become dead letters there ('gone').",
                "Connect a named function that calls it.",
            )
        elif name.endswith("<lambda>"):
            yield note(
                f"{name}, which receives {signal!r}, is a lambda: a retry finds it by this name, "
                "and another lambda that is connected before it gets the same name.",
                "Replace it with a named function.",
            )


def _check_timeouts(
    node: Node, overview: Overview, subscription: Subscription
) -> Iterator[Finding]:
    claim_after = node.config.claim_after

    for each in overview.receivers_of(subscription):
        timeout = node.registry.timeout_of(subscription.name, each.receiver)

        if timeout is not None and timeout > claim_after:
            yield warning(
                f"{each.name} may take {timeout:g} s, longer than 'EVENTBUS_CLAIM_AFTER' "
                f"({claim_after:g} s). {_WHY}",
                f"Set 'EVENTBUS_CLAIM_AFTER' to more than {timeout:g}, or lower its timeout.",
            )


def _check_grace(node: Node) -> Iterator[Finding]:
    grace, claim_after = node.config.grace, node.config.claim_after

    if claim_after < grace:
        yield warning(
            f"'EVENTBUS_CLAIM_AFTER' ({claim_after:g} s) is shorter than 'EVENTBUS_GRACE' "
            f"({grace:g} s), in which receivers finish when a process ends. {_WHY}",
            f"Set 'EVENTBUS_CLAIM_AFTER' to more than {grace:g}, or 'EVENTBUS_GRACE' to less than "
            f"{claim_after:g}.",
        )


#: Why a receiver should not run for longer than ``EVENTBUS_CLAIM_AFTER``.
_WHY = (
    "The worker renews its claim on the event in Redis. If Redis is away for so long, another "
    "worker takes the event over, and the receiver runs twice."
)


def check_database(node: Node) -> Iterator[Finding]:
    """Check what routes with ``after_commit`` or ``outbox`` need."""
    waiting = [route for route in node.routes.values() if route.after_commit or route.outbox]

    if not waiting:
        return

    session = node.session

    if session is None:
        names = listed(sorted(route.name for route in waiting))
        yield error(
            f"{names} {'waits' if len(waiting) == 1 else 'wait'} for a database commit, and there "
            "is no database session: sending fails.",
            NO_SESSION,
        )
    elif any(route.outbox for route in waiting):
        yield from _check_outbox(session, node.context.relay)


def _check_outbox(session: Any, relay: str) -> Iterator[Finding]:
    from ..database.outbox import NAME, TABLE, Outbox  # they need SQLAlchemy, which is optional
    from ..database.relay import DATABASE_OUTAGE, reason_of
    from ..database.transactions import engine_of

    try:
        engine = engine_of(session, TABLE)
    except ConfigError as unknown:
        yield note(f"The outbox was not checked. {unknown}")
        return

    outbox = Outbox(engine)

    if engine.dialect.is_async:
        yield note(
            f"The outbox in {outbox.shown} was not checked: {engine.url.drivername!r} is an "
            "asynchronous driver."
        )
        return

    try:
        if outbox.is_there():
            yield ok(f"The outbox is in {outbox.shown}.")

            if count := outbox.count():
                yield note(
                    f"There {'is' if count == 1 else 'are'} {counted(count, 'event')} in the "
                    "outbox.",
                    f"Run a relay to publish them: {relay}",
                )
        else:
            yield error(
                f"{outbox.shown} has no table {NAME!r}: sending events of the outbox fails.",
                "Create it by a migration, from flask_eventbus.database.outbox.table(metadata), or "
                f"with '{relay} --create-table'.",
            )
    except DATABASE_OUTAGE as failure:
        yield error(
            f"The database {outbox.shown} cannot be used: {reason_of(failure)}.",
            "Correct its URL, or start it.",
        )
