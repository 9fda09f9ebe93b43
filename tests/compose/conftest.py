"""One stack for all tests of this folder; its logs stand below a test that fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from compose.stack import Stack

_running: list[Stack] = []


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole stack, healthy. A test leaves it so."""
    stack = Stack(tmp_path_factory.mktemp("stack"))

    try:
        stack.start()
        _running.append(stack)
        yield stack
    finally:
        _running.clear()
        stack.remove()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the containers said to the report of a failure."""
    report = yield

    if report.failed:
        report.sections += [("What the containers said", stack.report()) for stack in _running]

    return report
