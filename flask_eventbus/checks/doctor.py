"""Run all checks of a program and its server."""

from __future__ import annotations

from ..node import Node
from .findings import Finding
from .program import check_database, check_program, check_retries
from .server import check_server

__all__ = ["Finding", "check"]


def check(node: Node, *, program: bool = True) -> list[Finding]:
    """Return the findings about a node's program, database and server.

    Nothing is published, no receiver runs, and the service does not start to listen.

    :param program: True if the node has routes and receivers to check. If False, only the server
        and the listeners of all services are checked.
    """
    findings: list[Finding] = []

    if program:
        findings += [*check_program(node), *check_retries(node), *check_database(node)]

    return [*findings, *check_server(node, service=node.config.service if program else None)]
