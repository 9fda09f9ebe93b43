"""Tests that the benchmarks run, with few events. Their figures are not checked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


# They start many processes, which take a minute and more on a busy machine.
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("command", "figure"),
    [
        ("channel.py --runs 1 --count 100 --seconds 0.1", r"\d ms"),
        ("stream_send.py --runs 1 --count 10", r"16 threads \| [\d.]+ \|"),
        ("stream_consume.py --count 100 --rounds 1 --idle 0.1", r"bus: +[\d,]+ events/s"),
        (
            "bench.py channel stream 100/s threads steps requests imports --rounds 1 --count 200",
            r"flask-eventbus",
        ),
        ("way.py --events 1", r"stream: \d+ calls in \d+ modules"),
    ],
)
def test_a_benchmark_prints_its_figures(command: str, figure: str) -> None:
    name, *options = command.split()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *options], capture_output=True, text=True, timeout=280
    )

    assert done.returncode == 0, done.stderr
    assert re.search(figure, done.stdout), done.stdout
