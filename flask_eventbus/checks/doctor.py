"""Run all checks of a program and its server."""

from __future__ import annotations

from ..node import Node
from .database import check_database
from .findings import Finding
from .program import check_program, check_retries
from .server import check_server

__all__ = ["Finding", "check"]


def check(node: Node, *, program: bool = True) -> list[Finding]:
    """Return the findings about a node's program, database and server.

    Nothing is published, no receiver runs, and the service does not start to listen.

    :param program: True if the node has routes and receivers to check. If False, only the server
        and the listeners of all services are checked.
    """
    service = node.config.service if program else None
    about_program = _check_program(node) if program else []
    return [*about_program, *check_server(node, service=service)]


def _check_program(node: Node) -> list[Finding]:
    return [*check_program(node), *check_retries(node), *check_database(node)]
