"""The Redis of a soak: what is known of a master that was replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak.pair import Pair

pytestmark = pytest.mark.second_look


def test_a_master_that_comes_back_was_replaced_all_the_same(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.start()

    try:
        before, first = pair.failovers(), pair.master.port
        pair.fail_over()
        pair.await_repair()
        pair.fail_over()
        pair.await_repair()

        assert pair.master.port == first
        assert pair.failovers() == before + 2
    finally:
        pair.kill()
