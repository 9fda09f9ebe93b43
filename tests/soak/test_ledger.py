"""The ledger of the soak finds what it is there to find."""

from __future__ import annotations

from typing import Any

from soak.cast import FLAKY
from soak.ledger import Column, Ledger

NOTE = "mailer.note"


def confirmed(n: int, *, what: str = "confirmed", at: float = 100.0) -> dict[str, Any]:
    """Return the line of a publisher about an order."""
    order = {"publisher": "web-7", "n": n, "signal": "order_placed"}
    return {"what": what, "who": "web", "pid": 7, "at": at, "began": at, **order}


def handled(n: int, *, receiver: str = NOTE, at: float = 101.0, pid: int = 1) -> dict[str, Any]:
    """Return the line of a worker about an order."""
    order = {"publisher": "web-7", "n": n, "receiver": receiver, "begun": at - 0.01}
    return {"what": "handled", "who": "mailer-1", "pid": pid, "at": at, **order}


def trouble(kind: str, *, at: float, victim: int = 0) -> dict[str, Any]:
    """Return the line of a trouble."""
    return {
        "what": "trouble",
        "who": "x",
        "pid": 9,
        "at": at,
        "began": at - 0.1,
        "kind": kind,
        "victim": victim,
    }


def column(
    *lines: dict[str, Any], receiver: str = NOTE, dead: list[tuple[str, int]] | None = None
) -> Column:
    """Return the column of one receiver in the ledger."""
    given_up = [(name, ("web-7", n)) for name, n in dead or []]
    columns = Ledger(sorted(lines, key=lambda line: line["at"]), given_up).columns()
    return next(found for found in columns if found.receiver == receiver)


def test_a_confirmed_order_that_was_not_handled_is_missing() -> None:
    lines = [confirmed(1), confirmed(2), handled(1)]

    assert column(*lines).missing == [("web-7", 2)]
    history = Ledger(lines, []).history(("web-7", 2))
    assert len(history) == 1
    assert "web confirmed" in history[0]


def test_an_unconfirmed_order_is_not_missing() -> None:
    assert column(confirmed(1, what="unconfirmed"), confirmed(2, what="taken")).missing == []


def test_buffered_events_count_once_the_buffer_was_flushed() -> None:
    flushed = {"what": "flushed", "who": "web", "pid": 7, "at": 110.0, "publisher": "web-7"}

    assert column(confirmed(2, what="taken"), flushed).missing == [("web-7", 2)]


def test_events_buffered_during_a_failover_are_counted_separately() -> None:
    flushed = {"what": "flushed", "who": "web", "pid": 7, "at": 110.0, "publisher": "web-7"}
    replaced = trouble("failover", at=101.0) | {"replaced": True}
    lines = [confirmed(1, what="taken"), confirmed(2), flushed]

    found = column(*lines, replaced)
    assert (found.with_master, found.missing) == ([("web-7", 1)], [("web-7", 2)])

    for other in (trouble("redis killed", at=101.0), replaced | {"began": 150.0, "at": 151.0}):
        found = column(*lines, other)
        assert (found.with_master, found.missing) == ([], [("web-7", 1), ("web-7", 2)])


def test_an_event_in_the_stream_at_the_end_was_not_lost_with_the_master() -> None:
    flushed = {"what": "flushed", "who": "web", "pid": 7, "at": 110.0, "publisher": "web-7"}
    replaced = trouble("failover", at=101.0) | {"replaced": True}
    lines = [confirmed(1, what="taken"), confirmed(2, what="taken"), replaced, flushed]

    columns = Ledger(lines, [], kept=[("web-7", 2)]).columns()

    found = next(found for found in columns if found.receiver == NOTE)
    assert (found.with_master, found.missing) == ([("web-7", 1)], [("web-7", 2)])


def test_only_an_expected_dead_letter_counts_as_handled() -> None:
    lines = [confirmed(97), confirmed(98)]

    found = column(*lines, receiver=FLAKY, dead=[(FLAKY, 97), (FLAKY, 98)])

    assert found.missing == [("web-7", 98)]
    assert found.dead == 2


def test_a_repetition_is_explained_by_a_worker_that_ended_right_after() -> None:
    lines = [confirmed(1), handled(1, at=101.0), handled(1, at=107.0, pid=2)]

    assert column(*lines).unexplained == [("web-7", 1)]
    killed = trouble("worker killed", at=101.2, victim=1)
    assert column(*lines, killed).again == [(("web-7", 1), "worker killed")]
    another = trouble("worker killed", at=101.2, victim=3)
    assert column(*lines, another).unexplained == [("web-7", 1)]
    later = trouble("worker killed", at=105.0, victim=1)
    assert column(*lines, later).unexplained == [("web-7", 1)]


def test_a_repetition_is_explained_by_an_outage_of_redis_at_that_time() -> None:
    lines = [confirmed(1), handled(1, at=101.0), handled(1, at=107.0, pid=2)]

    assert column(*lines, trouble("redis killed", at=101.0)).unexplained == []
    assert column(*lines, trouble("redis killed", at=60.0)).unexplained == [("web-7", 1)]
