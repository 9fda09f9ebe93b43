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
def analytics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``app.py`` as nobody has used it before."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "app", raising=False)
    return importlib.import_module("app")


@pytest.fixture
def client(analytics: ModuleType, eventbus: Isolation) -> Iterator[FlaskClient]:
    """A client of the service, whose bus is the testing kit's."""
    app: Flask = analytics.create_app()

    with app.test_client() as client:
        yield client
