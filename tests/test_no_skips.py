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


@pytest.mark.parametrize("body", SKIPS.values(), ids=SKIPS)
def test_a_skip_is_a_failure_that_tells_its_reason(tmp_path: Path, body: str) -> None:
    (tmp_path / "test_skipping.py").write_text(f"import pytest\n{body}\n")

    outcome = run_pytest(tmp_path)

    assert outcome.returncode != 0
    assert "may not be skipped here: Skipped: no server" in outcome.stdout


def test_what_passes_or_is_expected_to_fail_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "test_passing.py").write_text(
        "import pytest\ndef test_it(): pass\n@pytest.mark.xfail\ndef test_other(): assert 0\n"
    )

    outcome = run_pytest(tmp_path)

    assert outcome.returncode == 0
    assert "1 passed, 1 xfailed" in outcome.stdout


def run_pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    options = ["-p", "no_skips", "-p", "no:cacheprovider"]

    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
