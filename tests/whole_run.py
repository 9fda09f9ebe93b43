"""A pytest plugin, ``-p whole_run``: hold a run of the suite to its claim that everything passed.

- A skipped test is a failure.
- A test that was collected and did not run fails the run, however pytest ended.
- A test with the mark ``second_look("reason")``, which starts, hangs or kills servers and processes
  and can miss a deadline on a busy machine, runs again if it fails. The summary shows its first
  failure.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

import pytest

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_configure(config: pytest.Config) -> None:
    """Show the first failure of tests that ran again; look for missing ones in the main process."""
    config.addinivalue_line("markers", "second_look(reason): may run a second time in CI.")
    config.option.rerun_show_tracebacks = True

    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Missing(), "whole_run_missing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give marked tests one more run.

    :raises pytest.UsageError: for a mark without a reason.
    """
    for item in items:
        mark = item.get_closest_marker("second_look")

        if mark is None:
            continue

        if not mark.args:
            raise pytest.UsageError(f"{item.nodeid}: second_look needs a reason, as its argument.")

        item.add_marker(pytest.mark.flaky(reruns=1))


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
    """Return why the test said it was skipped."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


class Missing:
    """The tests that were collected and have not come to an end."""

    def __init__(self) -> None:
        self._tests: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what is to run in this process."""
        self._add(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Iterable[str]) -> None:
        """Note what is to run in the worker processes."""
        self._add(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Strike off a test that passed or failed; one that will run again has done neither."""
        ended = report.failed or (report.passed and report.when == "call")

        if ended or hasattr(report, "wasxfail"):
            self._tests.discard(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that left tests out."""
        if self._tests and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the tests that did not run."""
        if not self._tests:
            return

        terminalreporter.section("collected, but not run")

        for test in sorted(self._tests):
            terminalreporter.line(test)

    def _add(self, ids: Iterable[str]) -> None:
        self._tests.update(ids)
