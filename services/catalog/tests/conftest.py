"""The service as a fresh module, and a client of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from flask import Flask
from flask.testing import FlaskClient

from flask_eventbus.testing import Isolation

FOLDER = Path(__file__).parent.parent


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``app.py`` as nobody has used it before: a worker that has just started."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    return importlib.import_module("app")


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"{tmp_path}/catalog.db"


@pytest.fixture
def client(catalog: ModuleType, database: str, eventbus: Isolation) -> Iterator[FlaskClient]:
    """A client of the worker, whose bus is the testing kit's."""
    app: Flask = catalog.create_app({"CATALOG_DATABASE": database})
    assert app.test_cli_runner().invoke(args=["init-db"]).exit_code == 0

    with app.test_client() as client:
        yield client
