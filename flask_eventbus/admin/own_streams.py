"""Which streams a program has a part in, and as which service."""

from __future__ import annotations

from collections.abc import Iterable

from ..node import Node
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import subscription_for


def heard(node: Node, names: Iterable[str]) -> set[str]:
    """The signals that a service may hear over streams, those of ``names`` its patterns fit too."""
    by_stream = {
        name: found for name, found in node.subscriptions.items() if found.via != "channel"
    }
    plain = {name for name in by_stream if not is_pattern(name)}
    return plain | {name for name in names if subscription_for(name, by_stream)}


def published(node: Node, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that a service publishes over streams."""
    patterns = [route.name for route in node.routes.values() if route.via == "stream"]
    return {name for name in names if any(matches(pattern, name) for pattern in patterns)}
