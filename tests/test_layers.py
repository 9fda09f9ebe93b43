"""Import downhill, never sideways; and the two halves know nothing of each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import flask_eventbus

PACKAGE = Path(flask_eventbus.__file__).parent

#: A module imports only modules of lower layers. ``__init__`` stands for all it collects.
LAYERS = {
    -1: ("forks", "text"),
    0: (
        "forms",
        "errors",
        "signals",
        "typing",
        "names",
        "logs",
        "ending",
        "backoff",
        "coroutines",
        "supervisor",
        "findings",
        "records",
        "streams",
        "entry_ids",
    ),
    1: (
        "alarms",
        "config",
        "event",
        "embedded",
        "namespace",
        "seal",
        "values",
        "lifecycle",
        "counters",
        "transactions",
        "health",
        "role",
        "flask_signals",
    ),
    2: (
        "options",
        "urls",
        "faults",
        "outage",
        "way",
        "inbox",
        "sequences",
        "outbox",
        "rendering",
        "retries",
    ),
    3: ("connections", "routes", "subscriptions"),
    4: (
        "allowances",
        "failures",
        "deliveries",
        "codec",
        "channels",
        "conflicts",
        "reading",
        "pipe",
        "bridge",
        "outgoing",
        "places",
        "tables",
    ),
    5: (
        "arguments",
        "catalogue",
        "clock",
        "group",
        "lineup",
        "buffer",
        "drafts",
        "exchange",
        "lanes",
        "settlement",
        "dispatcher",
        "intake",
        "hearing",
        "server",
        "reports",
        "spectating",
        "stream_access",
    ),
    6: (
        "channel_tail",
        "stream_tail",
        "declarations",
        "stream_intake",
        "trims",
        "duplicates",
        "dead_limit",
        "emissions",
        "overflow",
        "turn",
        "pool",
        "stream_status",
        "dead_letters",
        "seek",
    ),
    7: (
        "tailing",
        "application",
        "loading",
        "bridges",
        "outcomes",
        "retry_counts",
        "follower",
        "listener",
        "leader",
        "status_report",
        "services",
        "dead_retry",
        "stream_checks",
        "access_checks",
    ),
    8: ("dead_report", "retry_line", "settler", "writer"),
    9: ("attempts", "claims", "orphans", "publisher"),
    10: ("keeper", "memberships"),
    11: ("stream_reader",),
    12: ("consumer",),
    13: ("inbound",),
    14: ("node",),
    15: (
        "running",
        "serving",
        "recording",
        "expectation",
        "diversion",
        "overview",
        "program",
        "receipt",
        "relay",
        "census",
    ),
    16: (
        "rehearsal",
        "wishes",
        "bus",
        "extension",
        "program_checks",
        "database_checks",
        "relay_command",
        "retry_checks",
        "stream_rights",
        "own_streams",
        "replay",
    ),
    17: (
        "__init__",
        "server_checks",
        "status_command",
        "dead_command",
        "replay_command",
        "seek_command",
        "services_command",
    ),
    18: ("doctor", "testing"),
    19: ("commands",),
    20: ("cli", "__main__", "pytest_plugin"),
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}

#: Neighbours in a layer that may be imported all the same: (importer, imported).
SIDEWAYS: set[tuple[str, str]] = set()

OUTBOUND = {
    "bridge",
    "bridges",
    "buffer",
    "drafts",
    "emissions",
    "exchange",
    "lanes",
    "leader",
    "outage",
    "outbox",
    "outgoing",
    "overflow",
    "publisher",
    "relay",
    "settlement",
    "transactions",
    "turn",
    "way",
    "writer",
}
INBOUND = {
    "attempts",
    "claims",
    "clock",
    "conflicts",
    "consumer",
    "dead_limit",
    "dispatcher",
    "duplicates",
    "follower",
    "group",
    "hearing",
    "inbound",
    "inbox",
    "intake",
    "keeper",
    "lineup",
    "listener",
    "memberships",
    "orphans",
    "pool",
    "retry_counts",
    "retry_line",
    "sequences",
    "outcomes",
    "settler",
    "stream_intake",
    "stream_reader",
}


def name_of(path: Path) -> str:
    """The module in the table; a folder stands there as one."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """The dotted names that the file imports, wherever in it."""
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def first_party(names: Iterator[str]) -> Iterator[str]:
    """The modules in the table among dotted names."""
    for name in names:
        package, module, *_ = f"{name}..".split(".")

        if package == PACKAGE.name:
            yield module if module in MODULES else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {name_of(path) for path in FILES}
IMPORTS: dict[str, set[str]] = {module: set() for module in MODULES}

for file in FILES:
    IMPORTS[name_of(file)] |= set(first_party(imports_of(file))) - {name_of(file)}


def reached_from(module: str) -> set[str]:
    """All that is imported with ``module``, near and far."""
    found: set[str] = set()
    ahead = {module}

    while ahead:
        found |= ahead
        ahead = {imported for name in ahead for imported in IMPORTS.get(name, ())} - found

    return found


def test_every_module_has_its_layer() -> None:
    assert MODULES - LAYER_OF.keys() == set(), "Give them a layer in tests/test_layers.py."


@pytest.mark.parametrize("module", sorted(MODULES & LAYER_OF.keys()))
def test_imports_run_downhill(module: str) -> None:
    uphill = {
        imported
        for imported in IMPORTS[module]
        if LAYER_OF[imported] >= LAYER_OF[module] and (module, imported) not in SIDEWAYS
    }

    assert uphill == set()


@pytest.mark.parametrize("module", sorted(OUTBOUND | INBOUND))
def test_the_two_halves_know_nothing_of_each_other(module: str) -> None:
    other_half = INBOUND if module in OUTBOUND else OUTBOUND

    assert reached_from(module) & other_half == set()


def test_the_bus_without_flask_loads_no_flask() -> None:
    program = "import sys, flask_eventbus; flask_eventbus.Bus; print(*sorted(sys.modules))"

    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    loaded = {name.partition(".")[0] for name in outcome.stdout.split()}
    assert "flask_eventbus" in loaded
    assert loaded.isdisjoint({"flask", "werkzeug"})
