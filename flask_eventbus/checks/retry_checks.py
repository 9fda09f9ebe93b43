"""What may surprise at retries and claims: receivers' names, and times that do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..admin.overview import Connected, Overview
from ..node import Node
from ..routing.subscriptions import Subscription
from .findings import Finding, note, warning


def check_retries(node: Node) -> Iterator[Finding]:
    """Look at the receivers of streams that are tried again, and at how long they have."""
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
                f"apart by the order of their connection ('{name}#2'). Where that is another one "
                "in another worker, the wrong one is tried again.",
                "Give each a name of its own.",
            )
        elif " at 0x" in name:
            yield warning(
                f"{name}, which receives {signal!r}, has no name that another process knows it "
                "by: its retries become dead letters there ('gone').",
                "Connect a function with a name of its own that calls it.",
            )
        elif name.endswith("<lambda>"):
            yield note(
                f"{name}, which receives {signal!r}, is a lambda: a retry finds it by this name, "
                "which another one that is connected before it would take away.",
                "Make it a function with a name of its own.",
            )


def _check_timeouts(
    node: Node, overview: Overview, subscription: Subscription
) -> Iterator[Finding]:
    claim_after = node.config.claim_after

    for each in overview.receivers_of(subscription):
        timeout = overview.timeout_of(subscription, each.receiver)

        if timeout is not None and timeout > claim_after:
            yield warning(
                f"{each.name} may take {timeout:g} s, longer than 'EVENTBUS_CLAIM_AFTER' "
                f"({claim_after:g} s). {_WHY}",
                f"Set 'EVENTBUS_CLAIM_AFTER' to more than {timeout:g}, or give it less time.",
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


#: What happens to a receiver that runs for longer than that.
_WHY = (
    "It keeps its event by saying so in Redis: where Redis is away for so long meanwhile, another "
    "worker takes the event over, and the receiver runs twice."
)
