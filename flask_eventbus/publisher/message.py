"""An event on its way out, and what is the same for all of its name."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from ..codec.envelope import PACKED_ID_BYTES, Seal, packed_bytes
from ..routing.routes import Route
from .way import Way


class Lane:
    """The events of one name from one node: what is the same for each, and their count."""

    __slots__ = ("is_stream", "name", "numbers", "route", "seal", "way")

    def __init__(self, *, route: Route, way: Way, seal: Seal) -> None:
        self.name = way.name
        self.route = route
        self.way = way
        self.seal = seal
        self.is_stream = way.is_stream
        #: The running numbers, from 1; an entry of a stream has none, since Redis numbers it.
        self.numbers = itertools.count(1)


class Outgoing:
    """An event that waits to be written; its envelope is made by the thread that writes it."""

    __slots__ = (
        "_bell",
        "attributes",
        "body",
        "data",
        "doubts",
        "error",
        "id",
        "is_settled",
        "lane",
        "number",
        "promised",
        "size",
        "withdrawn",
        "would_write",
    )

    def __init__(
        self, lane: Lane, data: bytes, attributes: dict[str, Any], *, confirm: bool
    ) -> None:
        self.lane = lane
        self.data = data
        self.attributes = attributes
        #: The bytes that the event has; the most that it may have as long as it has no id.
        self.size = lane.seal.most_bytes(data, attributes, numbered=not lane.is_stream)
        #: The running number of the node's events, from 1; none yet.
        self.number = 0
        self.id = ""
        self.body: bytes | None = None
        #: Whether it has left the buffer, with :attr:`error` or without.
        self.is_settled = False
        self.error: Exception | None = None
        #: Whether its sender was told that it is not published.
        self.withdrawn = False
        #: How often it was sent without an answer: Redis may have it.
        self.doubts = 0
        #: Whether its sender went on in the belief that it will be published.
        self.promised = False
        #: Whether its sender waits, and writes what waits when it is called.
        self.would_write = False
        #: Wakes its sender, if one is to wait: a lock costs a tenth of a :class:`threading.Event`.
        self._bell = threading.Lock() if confirm else None

        if self._bell is not None:
            self._bell.acquire()

    def again(self) -> Outgoing:
        """The same event for another try of its sender: with its id, and its bytes if it has."""
        confirm = self._bell is not None
        same = Outgoing(self.lane, self.data, {}, confirm=confirm)
        same.attributes, same.id, same.body = self.attributes, self.id, self.body
        same.size, same.doubts = self.size, self.doubts
        return same

    def identify(self, node: str, number: int, time_ns: int) -> None:
        """Give it the id that it keeps however often it is sent."""
        self.number = number
        self.id = self.attributes["id"] = f"{node}-{number}"
        self.size -= PACKED_ID_BYTES - packed_bytes(self.id)
        self.attributes.setdefault("time_ns", time_ns)

    def promise(self, time_ns: int) -> None:
        """Keep the time at which it was sent: it leaves later, whatever Redis does then."""
        self.attributes["time_ns"] = time_ns
        self.promised = True

    def take_its_turn(self) -> None:
        """Count it among the events of its lane, once."""
        if not self.lane.is_stream and "seq" not in self.attributes:
            self.attributes["seq"] = next(self.lane.numbers)

    def sealed(self) -> bytes:
        """The event's bytes, made once: a second try sends the same."""
        if self.body is None:
            self.body = self.lane.seal(self.data, **self.attributes)

        return self.body

    def is_done_by(self, deadline: float, *, unless: Callable[[], bool]) -> bool:
        """Wait until it is settled, if somebody wants to know, or until ``deadline``.

        :param unless: asked when its sender is called; True if it is not worth waiting.
        """
        while self._bell is not None and not self.is_settled:
            if not self.is_called_by(deadline) or unless():
                return self.is_settled

        return True

    def is_called_by(self, deadline: float) -> bool:
        """Whether its sender is called by ``deadline``: it is settled, or to be written by it."""
        return self._bell is None or self._bell.acquire(
            timeout=max(0.0, deadline - time.monotonic())
        )

    def call(self) -> None:
        """Wake its sender."""
        if self._bell is not None:
            try:
                self._bell.release()
            except RuntimeError:
                return  # it was called already, and did not come yet

    def finish(self, error: Exception | None = None) -> None:
        """Tell whoever waits for it how it ended."""
        self.error = error
        # Its sender goes on.
        self.would_write = False
        self.is_settled = True
        self.call()
