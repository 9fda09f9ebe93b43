from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = {
    "by a call": "def test_it(): pytest.skip('no server')",
    "by a mark": "@pytest.mark.skip(reason='no server')\ndef test_it(): pass",
    "by a fixture": (
        "@pytest.fixture\ndef server(): pytest.skip('no server')\ndef test_it(server): pass"
    ),
    "as a module": "pytest.skip('no server', allow_module_level=True)",
}

#: Fails at its first run and passes at its second.
FLAKY = """
import pathlib

import pytest

def test_of_real_servers():
    first = pathlib.Path("ran")
    if not first.exists():
        first.touch()
        raise AssertionError("the server was slow")
"""

MARK = "\npytestmark = pytest.mark.second_look('starts a server')\n"


@pytest.mark.parametrize("body", SKIPS.values(), ids=SKIPS)
def test_a_skip_is_a_failure_with_its_reason(tmp_path: Path, body: str) -> None:
    (tmp_path / "test_skipping.py").write_text(f"import pytest\n{body}\n")

    outcome = run_pytest(tmp_path)

    assert outcome.returncode != 0
    assert "may not be skipped here: Skipped: no server" in outcome.stdout


def test_passing_and_expected_failures_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "test_passing.py").write_text(
        "import pytest\ndef test_it(): pass\n@pytest.mark.xfail\ndef test_other(): assert 0\n"
    )

    outcome = run_pytest(tmp_path)

    assert outcome.returncode == 0
    assert "1 passed, 1 xfailed" in outcome.stdout


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_marked_test_runs_again_and_its_first_failure_is_shown(
    tmp_path: Path, processes: str
) -> None:
    (tmp_path / "test_flaky.py").write_text(FLAKY + MARK)

    outcome = run_pytest(tmp_path, "-n", processes)

    assert outcome.returncode == 0, outcome.stdout
    assert "RERUN test_flaky.py::test_of_real_servers" in outcome.stdout
    assert "AssertionError: the server was slow" in outcome.stdout
    assert "1 passed, 1 rerun" in outcome.stdout


def test_a_test_without_the_mark_does_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "test_flaky.py").write_text(FLAKY)

    outcome = run_pytest(tmp_path)

    assert outcome.returncode == 1
    assert "1 failed" in outcome.stdout


def test_a_mark_without_a_reason_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_flaky.py").write_text(FLAKY + MARK.replace("'starts a server'", ""))

    outcome = run_pytest(tmp_path)

    assert outcome.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_of_real_servers: second_look needs a reason" in outcome.stdout + outcome.stderr


def test_a_failure_of_one_test_does_not_hide_files_that_were_never_run(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(FLAKY + MARK)
    (tmp_path / "test_b.py").write_text(
        "import pytest\ndef test_it(): pytest.exit('the end', returncode=0)\n"
    )
    (tmp_path / "test_c.py").write_text("def test_broken(): assert 0\n")

    outcome = run_pytest(tmp_path)

    assert outcome.returncode == 1, outcome.stdout
    assert "collected, but not run" in outcome.stdout
    assert "test_c.py::test_broken" in outcome.stdout


def test_a_worker_process_that_dies_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import os\ndef test_dies(): os._exit(0)\n")
    (tmp_path / "test_b.py").write_text("def test_it(): pass\n")

    outcome = run_pytest(tmp_path, "-n", "2", "--dist", "loadfile")

    assert outcome.returncode != 0
    assert "test_a.py::test_dies" in outcome.stdout


def test_an_internal_error_stays_one(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(FLAKY + MARK)
    (tmp_path / "conftest.py").write_text(
        "def pytest_runtest_teardown(item): raise MemoryError('broken hook')\n"
        "def pytest_runtest_logfinish(nodeid): raise RuntimeError('broken hook')\n"
    )

    outcome = run_pytest(tmp_path)

    assert outcome.returncode == pytest.ExitCode.INTERNAL_ERROR


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The other plug-ins that are installed would take longer to load than the tests take.
    settings = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(Path(__file__).parent)}
    plugins = ["-p", "whole_run", "-p", "xdist", "-p", "pytest_rerunfailures"]
    command = [sys.executable, "-m", "pytest", *plugins, "-p", "no:cacheprovider"]

    return subprocess.run(
        [*command, *arguments, str(folder)],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
