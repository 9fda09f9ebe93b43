"""Finds gaps, repetitions and contradictions in the channel events of other nodes."""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum, auto

from ..event import Event

#: Lanes remembered, and ids of events without a number; the oldest is forgotten first.
REMEMBERED = 10_000

#: Events of one lane whose bytes are remembered. A publisher sends at most one batch of 512
#: events again, when it does not know whether Redis took them.
REPEATABLE = 1_024

#: Events whose bytes are remembered over all lanes: 40 bytes of memory each.
MOST_REMEMBERED = 262_144

#: Goes in front of a body before it is hashed, so that nobody can make bytes with the same hash.
_SECRET = secrets.token_bytes(16)


class Finding(Enum):
    """What is wrong with an event beside those heard before it."""

    #: The same bytes came before.
    REPEATED = auto()
    #: Its id, its node or its number contradicts another event: one of the two is forged.
    CONFLICT = auto()


@dataclass(slots=True)
class _Lane:
    """The events of one signal from one node, as one source."""

    last: int
    #: A number that was not above :attr:`last`; the count goes on from there if the next follows.
    stray: int = -1
    #: Hashes of the latest bodies.
    bodies: deque[int] = field(default_factory=lambda: deque(maxlen=REPEATABLE))


class Sequences:
    """The last number heard from each node for each signal.

    An event only says what its node, its source and its number are. So only the same bytes make
    a repetition; an event that contradicts another one is reported, never dropped.
    """

    def __init__(self) -> None:
        self._lanes: OrderedDict[tuple[str, str, str], _Lane] = OrderedDict()
        #: How many hashes all lanes hold.
        self._held = 0
        #: The source that each node named first.
        self._sources: OrderedDict[str, str] = OrderedDict()
        #: The ids of events without a number, and the hashes of their bytes.
        self._ids: OrderedDict[str, int] = OrderedDict()

    def observe(self, event: Event, body: bytes) -> int | Finding:
        """Return how many events are missing right before this one, or what is wrong with it.

        Before the first event of a node nothing is missing: this process did not listen then.
        """
        digest = hash(_SECRET + body)

        if event.seq is None:
            return self._observe_id(event.id, digest)

        key = (event.node, event.name, event.source)
        lane = self._lanes.get(key)

        if lane is None:
            lane = self._lanes[key] = _Lane(event.seq)
            self._remember(lane, digest)
            return self._check_source(event)

        missing = event.seq - lane.last - 1

        if missing >= 0:
            lane.last = event.seq
            self._lanes.move_to_end(key)
            self._remember(lane, digest)
            return missing

        if digest in lane.bodies:
            return Finding.REPEATED

        self._remember(lane, digest)
        return _step_back(lane, event.seq)

    def _observe_id(self, id: str, digest: int) -> int | Finding:
        """Compare an event of a relay, which has no number, by its id."""
        known = self._ids.get(id)

        if known == digest:
            return Finding.REPEATED

        self._ids[id] = digest
        _forget_oldest(self._ids)
        return 0 if known is None else Finding.CONFLICT

    def _remember(self, lane: _Lane, digest: int) -> None:
        self._held += len(lane.bodies) < REPEATABLE
        lane.bodies.append(digest)

        if self._held > MOST_REMEMBERED or len(self._lanes) > REMEMBERED:
            _, forgotten = self._lanes.popitem(last=False)
            self._held -= len(forgotten.bodies)

    def _check_source(self, event: Event) -> int | Finding:
        """A node belongs to one service; a second source for it is a conflict."""
        known = self._sources.setdefault(event.node, event.source)
        _forget_oldest(self._sources)
        return 0 if known == event.source else Finding.CONFLICT


def _step_back(lane: _Lane, seq: int) -> int | Finding:
    """An event with a number that was heard already, or passed, and with bytes that were not.

    One such number changes nothing, so that an old or forged one causes no false gap. Two in
    a row show that the higher number was forged: the count goes on from them.
    """
    if seq == lane.stray + 1:
        lane.last, lane.stray = seq, -1
        return 0

    lane.stray = seq
    return Finding.CONFLICT


def _forget_oldest(found: OrderedDict[str, int] | OrderedDict[str, str]) -> None:
    if len(found) > REMEMBERED:
        found.popitem(last=False)
