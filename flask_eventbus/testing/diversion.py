"""Leads every connection of the process to a server in memory for a while, and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..lifecycle import wait_until_told
from ..node import Node, nodes
from ..transport import connections

#: Seconds that events sent before get to reach the server they were sent to.
LEAVE = 1.0

#: Seconds that nodes may take to find out what takes them a millisecond.
PATIENCE = 5.0


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


def find_out(found: Sequence[Node], *, there: bool) -> None:
    """Let nodes find out whether Redis is there, and wait until they have."""
    for node in found:
        node.ask()

    _wait_until(lambda: all(node.health().publishing is there for node in found))
    wait_until_told()


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE

    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"The buses did not take note of Redis within {PATIENCE:g} s.")

        time.sleep(0.001)
