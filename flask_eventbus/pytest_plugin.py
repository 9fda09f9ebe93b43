"""The ``eventbus`` fixture. It imports the testing kit only when a test uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .testing import Isolation


@pytest.fixture
def eventbus() -> Iterator[Isolation]:
    """Run all buses of this process on a Redis in memory; record and deliver events."""
    from .testing import isolated

    with isolated() as isolation:
        yield isolation
