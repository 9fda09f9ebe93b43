"""What the running numbers of other nodes tell: gaps, repetitions and forgeries."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .errors import DecodeError
from .event import Event

#: Nodes and signals remembered, and ids; the one heard of least recently is forgotten first.
REMEMBERED = 10_000

#: How far back a number still means a repetition. A batch that is sent again is far
#: smaller; a number further back means that the count was disturbed and begins anew.
REPEAT_WINDOW = 65_536


@dataclass(slots=True)
class _Lane:
    source: str
    last: int


class Sequences:
    """The last number heard from each node for each signal."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[tuple[str, str], _Lane] = OrderedDict()
        #: The ids of events without a number, with their sources.
        self._ids: OrderedDict[tuple[str, str], None] = OrderedDict()

    def observe(self, event: Event) -> int | None:
        """How many events are missing right before this one; ``None`` for a repetition.

        The first event from a node tells nothing: what came before it was sent before
        anyone listened here.

        :raises DecodeError: the node is known under another service's name.
        """
        if event.seq is None:
            return self._observe_id(event)

        key = (event.node, event.name)
        lane = self._lanes.get(key)

        if lane is None:
            self._remember(key, event)
            return 0

        self._check_source(lane, event)
        missing = event.seq - lane.last - 1

        if -REPEAT_WINDOW <= missing < 0:
            return None

        lane.last = event.seq
        self._lanes.move_to_end(key)
        return max(0, missing)

    def _observe_id(self, event: Event) -> int | None:
        """An event of a relay has no number: a repetition of it is told by its id."""
        key = (event.source, event.id)

        if key in self._ids:
            return None

        self._ids[key] = None

        if len(self._ids) > REMEMBERED:
            self._ids.popitem(last=False)

        return 0

    def _remember(self, key: tuple[str, str], event: Event) -> None:
        assert event.seq is not None  # noqa: S101 - observe() asked
        self._lanes[key] = _Lane(event.source, event.seq)

        if len(self._lanes) > REMEMBERED:
            self._lanes.popitem(last=False)

    def _check_source(self, lane: _Lane, event: Event) -> None:
        if lane.source != event.source:
            raise DecodeError(
                f"The event {event.id} says it is from {event.source!r}, but its node "
                f"{event.node!r} belongs to {lane.source!r}.",
                reason="forged_source",
            )
