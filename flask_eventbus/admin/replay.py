"""Run a service's receivers again for past events of a stream, without its consumer group."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..codec.records import MAX_PART, EntryId, entry_id, id_text, words_of
from ..errors import ConfigError, DecodeError, OperationError
from ..event import Event
from ..node import Node
from ..routing.options import name_of
from ..routing.subscriptions import Subscription, subscription_for
from ..text import printable
from .dead_letters import is_called
from .overview import Overview
from .streams import Entry, Place, StreamAccess


@dataclass(frozen=True, slots=True)
class Failed:
    """An event for which a receiver failed."""

    event_id: str
    entry: str
    error: str


@dataclass(slots=True)
class Replay:
    """A replay of one signal's events, and its results.

    The group is not affected: its position, pending events and known duplicates stay.

    :param name: the signal.
    :param receivers: the names of the receivers to run.
    :param only: the name of the only receiver to run; ``None`` for all.
    """

    node: Node
    subscription: Subscription
    name: str
    receivers: Sequence[str]
    only: str | None = None
    read: int = 0
    handled: int = 0
    #: The reason why each undecodable entry could not be decoded, by its id.
    unreadable: dict[str, str] = field(default_factory=dict)
    #: Number of events from services that no receiver listens to.
    others: int = 0
    #: Failed events by the name of the receiver.
    failed: dict[str, list[Failed]] = field(default_factory=dict)
    #: Id of the last entry that was replayed or skipped.
    last: str = ""

    def bounds(
        self, access: StreamAccess, first: Place, last: Place | None
    ) -> tuple[EntryId, EntryId]:
        """Return the ids of the first and last entry to replay: none that is added from now on.

        :raises ValueError: ``last`` is before ``first``.
        :raises OperationError: the signal has no stream, or Redis is not available.
        """
        now = access.now()
        first, last = first.at(now), None if last is None else last.at(now)

        if last is not None and last.last < first.first:
            raise ValueError("The last entry is before the first one.")

        stream = access.stream_of(self.name)

        if not stream:
            raise OperationError(
                f"There is no stream of {self.name!r} under this prefix: nothing was published to "
                "it yet, or Redis lost it."
            )

        newest = entry_id(stream["last-generated-id"])
        return first.first, newest if last is None else min(newest, last.last)

    def run(
        self,
        access: StreamAccess,
        first: EntryId,
        last: EntryId,
        *,
        stopping: threading.Event,
        rate: float | None = None,
        dry: bool = False,
    ) -> None:
        """Replay the events from ``first`` to ``last``, until ``stopping`` is set.

        :param rate: events per second at most.
        :param dry: True to count events and run no receiver.
        :raises OperationError: Redis is not available; receivers may have run before.
        """
        started = time.monotonic()

        for entry, event in self._events(access, first, last):
            if rate is not None and not dry:
                stopping.wait(started + self.handled_or_failed / rate - time.monotonic())

            if stopping.is_set():
                return

            self._take(entry, event, dry)

    @property
    def next(self) -> str:
        """Id after the last entry that was replayed or skipped; empty if there was none."""
        if not self.last:
            return ""

        milliseconds, number = entry_id(self.last)
        return id_text((milliseconds, number + 1) if number < MAX_PART else (milliseconds + 1, 0))

    @property
    def handled_or_failed(self) -> int:
        """Number of events for which receivers ran."""
        return self.read - self.others - len(self.unreadable)

    @property
    def failures(self) -> int:
        """Number of events for which a receiver failed."""
        return self.handled_or_failed - self.handled

    def _events(
        self, access: StreamAccess, first: EntryId, last: EntryId
    ) -> Iterator[tuple[str, Event | DecodeError]]:
        key, most = access.keys.stream(self.name), self.node.config.max_event_bytes

        for page in access.pages(key, first, last, most=most):
            # Receivers may run for so long that the server would close an idle connection.
            access.close()

            for entry in page:
                yield id_text(entry[0]), self._decoded(entry)

    def _decoded(self, entry: Entry) -> Event | DecodeError:
        if b"event" not in entry[1]:
            return DecodeError("It has no field 'event'.", reason="missing_attribute")

        try:
            event = self.node.codec.decode(entry[1][b"event"], via="stream")
        except DecodeError as error:
            return error

        if event.name != self.name:
            return DecodeError(f"The event is of signal {event.name!r}.", reason="bad_attribute")

        return replace(event, replayed=True)

    def _take(self, entry: str, event: Event | DecodeError, dry: bool) -> None:
        self.read += 1
        self.last = entry

        if isinstance(event, DecodeError):
            self.unreadable[entry] = str(event)
        elif not self._is_for_here(event):
            self.others += 1
        else:
            failures = () if dry else self.node.dispatcher.dispatch_once(event, only=self.only)
            self.handled += not failures

            for failure in failures:
                failed = Failed(event.id, entry, words_of(failure.error))
                self.failed.setdefault(failure.name or name_of(failure.receiver), []).append(failed)

    def _is_for_here(self, event: Event) -> bool:
        is_own = event.source == self.node.config.service
        is_taken = self.subscription.accepts(event.source) and (
            self.subscription.echo or not is_own
        )
        return is_taken and bool(self.node.dispatcher.receivers(event, only=self.only))


def prepare(node: Node, name: str, receiver: str | None) -> Replay:
    """Return a replay of a signal for the receivers of a node.

    :param receiver: the name of the only receiver to run; ``None`` for all.
    :raises ConfigError: no receiver has that name, or several, or the node does not subscribe.
    """
    known = sorted({found.name for found in Overview(node).receivers_of(Subscription(name=name))})

    if not known:
        raise ConfigError(
            f"Nothing here receives {name!r}. Connect a receiver with @bus.on({name!r}), or "
            "name its module in 'EVENTBUS_RECEIVERS'."
        )

    found = [each for each in known if receiver is None or is_called(each, [receiver])]

    if receiver is not None and len(found) != 1:
        raise ConfigError(
            f"{printable(receiver)!r} is the name of "
            f"{'several receivers' if found else 'no receiver'} of {name!r}. Write one of: "
            f"{', '.join(found or known)}."
        )

    subscription = subscription_for(name, node.subscriptions)

    if subscription is None:
        raise ConfigError(
            f"{node.config.service!r} does not subscribe to {name!r}, so its receivers never get "
            f"an event of it. Subscribe with @bus.on({name!r}), or in 'EVENTBUS_SUBSCRIBE'."
        )

    return Replay(
        node=node,
        subscription=subscription,
        name=name,
        receivers=found,
        only=None if receiver is None else found[0],
    )
