"""The ``eventbus`` fixture, for pytest to find; it imports the rest when a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .testing import Isolation


@pytest.fixture
def eventbus() -> Iterator[Isolation]:
    """Every bus of this process on a Redis in memory: what was published, and deliver()."""
    from .testing import isolated

    with isolated() as isolation:
        yield isolation
