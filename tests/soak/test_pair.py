"""The Redis of a soak: what is known of a master that was replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak.pair import Pair

pytestmark = pytest.mark.second_look


def test_each_failover_is_counted_whoever_is_the_master_in_the_end(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.start()

    try:
        masters, counts = [pair.master.port], [pair.failovers()]

        while len(set(masters)) < 2 or masters[-1] != masters[0]:
            # Sentinels on a busy machine give up now and then: then nothing is counted either.
            pair.fail_over()
            pair.await_repair()
            masters.append(pair.master.port)
            counts.append(pair.failovers())

        assert counts[-1] >= counts[0] + 2
        assert counts == sorted(counts)
    finally:
        pair.kill()
