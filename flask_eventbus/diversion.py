"""Leads every connection of the process to a server in memory for a while, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from . import connections
from .node import Node, nodes

#: Seconds that events sent before get to reach the server they were sent to.
LEAVE = 1.0


@contextmanager
def diverted(url: str) -> Iterator[None]:
    """Let all nodes, present and future, use the server at ``url`` until the end of the block.

    Nodes that listen go on listening there, and afterwards on their own server again.
    """
    before = connections.diversion
    listening = [node for node in nodes if node.listening]
    _divert(url, listening)

    try:
        yield
    finally:
        _divert(before, listening)
        connections.memory_servers.pop(url, None)


def _divert(url: str | None, listening: Iterable[Node]) -> None:
    # What was sent so far goes where it was meant to go.
    _stop_all()
    connections.diversion = url
    # What another thread began between the two begins anew.
    _stop_all()

    for node in listening:
        node.start()


def _stop_all() -> None:
    for node in list(nodes):
        node.stop(flush=LEAVE)
