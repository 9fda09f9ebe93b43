"""Tests of imports: what loads with the package, and that each module can be imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flask_eventbus

PACKAGE = Path(flask_eventbus.__file__).parent

#: Modules that only Flask, SQLAlchemy, pytest or the end of a program may load.
NOT_BY_ITSELF = {"__main__"}


def modules() -> list[str]:
    """The dotted names of all modules below the package."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {".".join(path.parts).removesuffix("__init__").rstrip(".") for path in paths}
    return sorted(names - NOT_BY_ITSELF - {""})


def loaded_by(program: str) -> set[str]:
    """The top-level packages that a fresh process has loaded after a program."""
    outcome = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    return {name.partition(".")[0] for name in outcome.stdout.split()}


def test_importing_the_bus_loads_neither_flask_nor_sqlalchemy_nor_click() -> None:
    loaded = loaded_by("import flask_eventbus; flask_eventbus.Bus")

    assert "flask_eventbus" in loaded
    assert loaded.isdisjoint({"flask", "werkzeug", "sqlalchemy", "click"})


def test_importing_admin_loads_neither_flask_nor_click() -> None:
    folders = ("admin", "checks")
    names = [name for name in modules() if name.partition(".")[0] in folders]

    loaded = loaded_by("\n".join(f"import flask_eventbus.{name}" for name in names))

    assert loaded.isdisjoint({"flask", "werkzeug", "click"})


def test_each_module_can_be_imported_first() -> None:
    program = f"""
import importlib, sys
for name in {modules()!r}:
    for loaded in [each for each in sys.modules if each.startswith("flask_eventbus")]:
        del sys.modules[loaded]
    try:
        importlib.import_module(f"flask_eventbus.{{name}}")
    except ImportError as error:
        raise SystemExit(f"{{name}}: {{error}}") from error
"""

    assert "flask_eventbus" in loaded_by(program)
