"""A pytest plugin, ``-p no_skips``: a skipped test is a failure where everything should run."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import pytest

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Look at a test that skips, or is marked so."""
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Look at a whole module that skips."""
    return refuse_skip((yield))


def refuse_skip(report: Report) -> Report:
    """Turn ``report`` into a failure if it is a skip; what is expected to fail may do so."""
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} may not be skipped here: {reason(report)}"

    return report


def reason(report: Report) -> str:
    """Why the test said it was skipped."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
