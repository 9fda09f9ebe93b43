"""Looks a program and its server over, and says what is wrong and what to do."""

from __future__ import annotations

from ..node import Node
from .database import check_database
from .findings import Finding
from .program import check_program, check_retries
from .server import check_server

__all__ = ["Finding", "check"]


def check(node: Node, *, program: bool = True) -> list[Finding]:
    """Everything that can be known of a node before an event passes.

    Nothing is published, no receiver runs, and the service does not begin to listen.

    :param program: whether the node has a program whose routes and receivers count;
        without one only the server is looked at, and the listeners of all services.
    """
    service = node.config.service if program else None
    about_program = _check_program(node) if program else []
    return [*about_program, *check_server(node, service=service)]


def _check_program(node: Node) -> list[Finding]:
    return [*check_program(node), *check_retries(node), *check_database(node)]
