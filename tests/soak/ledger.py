"""Compares what was confirmed with what each service handled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from soak.cast import CLAIM_AFTER, FLAKY, HEARS, SCREEN, SCREENS, is_rejected

Line = dict[str, Any]

#: An order: the life of its publisher, and its number.
Order = tuple[str, int]

#: Seconds that it may take until Redis knows what a receiver has done, if nothing is in the way.
SETTLED = 1.0

#: What happens to Redis, and so to everybody.
_EVERYBODYS = ("redis killed", "redis hung", "failover", "clients cut", "client cut")

#: Seconds that an order may be in a buffer, or with a master alone, before the master is lost.
BUFFERED = 10.0


@dataclass(frozen=True, slots=True)
class Column:
    """The events that one receiver had to handle, and those that it handled."""

    receiver: str
    confirmed: int
    handled: int
    dead: int
    missing: Sequence[Order]
    #: Orders that a publisher took into its buffer, and that went with a master.
    with_master: Sequence[Order]
    #: Orders that were handled again, by what explains it; "" for nothing.
    again: Sequence[tuple[Order, str]]

    @property
    def unexplained(self) -> list[Order]:
        """Orders that were handled again for no reason."""
        return [order for order, reason in self.again if not reason]


class Ledger:
    """All lines of a run, put in order.

    :param dead: receivers and orders of the dead letters.
    :param kept: the orders in the streams at the end: no master took them along.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        dead: Iterable[tuple[str, Order]],
        kept: Iterable[Order] = (),
    ) -> None:
        self._lines = lines
        self._dead = set(dead)
        self._kept = set(kept)
        self._troubles = [line for line in lines if line["what"] == "trouble"]
        self._confirmed = self._confirm()
        #: When an order was sent that waited in a buffer, or may have.
        self._taken = {_order(line): line["began"] for line in lines if line["what"] == "taken"}
        self._handled: dict[tuple[str, str], dict[Order, list[Line]]] = defaultdict(
            lambda: defaultdict(list)
        )

        for line in lines:
            if line["what"] == "handled":
                self._handled[self._column(line)][_order(line)].append(line)

    def columns(self) -> Iterator[Column]:
        """One for each receiver, and for each process that hears all."""
        for receiver, signals in HEARS.items():
            yield self._compare(receiver, (receiver, ""), signals)

        for screen in SCREENS:
            yield self._compare(f"{SCREEN} ({screen})", (SCREEN, screen), ("order_paid",))

    def history(self, order: Order) -> list[str]:
        """Everything that is known of an order, and the troubles of that time."""
        about = [line for line in self._lines if _is_about(line, order)]
        begin = min(float(line.get("began") or line["at"]) for line in about) - 5
        end = max(line["at"] for line in about) + CLAIM_AFTER * 2
        troubles = [line for line in self._troubles if begin <= line["at"] <= end]
        return [_shown(line) for line in sorted([*about, *troubles], key=lambda line: line["at"])]

    def _confirm(self) -> dict[Order, str]:
        """The signal of each order that Redis confirmed, or that left a buffer at its end."""
        flushed = {line["publisher"] for line in self._lines if line["what"] == "flushed"}
        return {
            _order(line): line["signal"]
            for line in self._lines
            if line["what"] == "confirmed"
            or (line["what"] == "taken" and line["publisher"] in flushed)
        }

    def _compare(self, title: str, column: tuple[str, str], signals: Sequence[str]) -> Column:
        expected = {order for order, name in self._confirmed.items() if name in signals}
        handled = self._handled[column]
        dead = {order for receiver, order in self._dead if receiver == column[0]}
        done = handled.keys() | {order for order in dead if self._may_be_dead(column[0], order)}
        with_master = {order for order in expected - done if self._was_with_master(order)}
        return Column(
            title,
            confirmed=len(expected),
            handled=len(handled),
            dead=len(dead),
            missing=sorted(expected - done - with_master),
            with_master=sorted(with_master),
            again=[found for order in sorted(handled) for found in self._again(handled[order])],
        )

    def _may_be_dead(self, receiver: str, order: Order) -> bool:
        return receiver == FLAKY and is_rejected(order[1])

    def _was_with_master(self, order: Order) -> bool:
        """Return True if no replica is known to have had it when a master was replaced.

        A confirmed order is on a replica. An order that stayed in the buffer may not be: ``send()``
        reports an order that failed while it waited, but not one that left later.
        """
        began = self._taken.get(order)

        if began is None or order in self._kept:
            return False

        return any(
            trouble.get("replaced") and trouble["began"] - BUFFERED <= began <= trouble["at"]
            for trouble in self._troubles
        )

    def _again(self, lines: Sequence[Line]) -> Iterator[tuple[Order, str]]:
        for first, second in pairwise(lines):
            yield _order(first), self._reason(first, second)

    def _reason(self, first: Line, second: Line) -> str:
        """Return the trouble that kept the first acknowledgement from Redis."""
        for trouble in self._troubles:
            if self._concerns(trouble, first, second):
                return str(trouble["kind"])

        return ""

    def _concerns(self, trouble: Line, first: Line, second: Line) -> bool:
        if trouble["kind"] in _EVERYBODYS:
            return bool(
                trouble["began"] - SETTLED <= first["at"]
                and first["begun"] <= trouble["at"] + SETTLED
            )

        # A worker that was stopped goes on with what it had, which is another's by then.
        later = second["at"] if trouble["kind"] == "worker paused" else first["at"] + SETTLED
        pids = (first["pid"], second["pid"])
        return (
            trouble.get("victim") in pids
            and first["begun"] <= trouble["at"]
            and (trouble["began"] <= later)
        )

    def _column(self, line: Line) -> tuple[str, str]:
        return line["receiver"], line["who"] if line["receiver"] == SCREEN else ""


def _order(line: Line) -> Order:
    return line["publisher"], line["n"]


def _is_about(line: Line, order: Order) -> bool:
    return (line.get("publisher"), line.get("n")) == order


def _shown(line: Line) -> str:
    facts = {name: value for name, value in line.items() if name not in ("what", "at", "who")}
    words = " ".join(f"{name}={value}" for name, value in facts.items())
    return f"{line['at']:.3f} {line['who']} {line['what']} {words}"
