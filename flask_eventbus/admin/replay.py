"""Brings events of a stream again to a service's receivers, beside its consumer group."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..codec.codec import Codec
from ..codec.entry_ids import EntryId, id_text
from ..codec.records import words_of
from ..config import Config
from ..errors import DecodeError
from ..event import Event
from ..receivers.dispatcher import Dispatcher, name_of
from ..receivers.retries import Failure
from ..routing.subscriptions import Subscription
from .streams import Entry, StreamAccess


@dataclass(frozen=True, slots=True)
class Failed:
    """An event that a receiver failed at."""

    event_id: str
    entry: str
    error: str


@dataclass(slots=True)
class Replay:
    """Which events are brought again, to whom, and what came of it.

    Nothing of it is known to the group: its position, what is pending, and what counts as a
    duplicate stay as they are.

    :param name: the signal.
    :param only: the name of the receiver that is to run alone.
    """

    config: Config
    codec: Codec
    dispatcher: Dispatcher
    subscription: Subscription
    name: str
    only: str | None = None
    read: int = 0
    handled: int = 0
    #: Entries that do not read as an event, by id, with the reason.
    unreadable: dict[str, str] = field(default_factory=dict)
    #: Events that are for none of the receivers: of services that they do not hear.
    others: int = 0
    #: By the receiver's name.
    failed: dict[str, list[Failed]] = field(default_factory=dict)
    #: The last entry that was brought, or left out.
    last: str = ""

    def run(
        self,
        access: StreamAccess,
        first: EntryId,
        last: EntryId,
        *,
        told: threading.Event,
        rate: float | None = None,
        dry: bool = False,
    ) -> None:
        """Bring the events from one id to another, one after the other, until ``told`` to end.

        :param rate: events per second at most.
        :param dry: whether to look only, and run nothing.
        :raises click.ClickException: Redis cannot be asked; what was done until then stays done.
        """
        begun = time.monotonic()

        for entry, event in self._events(access, first, last):
            if rate is not None and not dry:
                told.wait(begun + self.handled_or_failed / rate - time.monotonic())

            if told.is_set():
                return

            self._take(entry, event, dry)

    @property
    def handled_or_failed(self) -> int:
        """How many events receivers ran for."""
        return self.read - self.others - len(self.unreadable)

    @property
    def failures(self) -> int:
        """How many events were not handled."""
        return self.handled_or_failed - self.handled

    def _events(
        self, access: StreamAccess, first: EntryId, last: EntryId
    ) -> Iterator[tuple[str, Event | DecodeError]]:
        key, most = access.keys.stream(self.name), self.config.max_event_bytes

        for page in access.pages(key, first, last, most=most):
            # Receivers may take so long that an idle connection would be cut.
            access.close()

            for entry in page:
                yield id_text(entry[0]), self._decoded(entry)

    def _decoded(self, entry: Entry) -> Event | DecodeError:
        if b"event" not in entry[1]:
            return DecodeError("It has no field 'event'.", reason="missing_attribute")

        try:
            event = self.codec.decode(entry[1][b"event"], via="stream")
        except DecodeError as error:
            return error

        if event.name != self.name:
            return DecodeError(f"It says it is {event.name!r}.", reason="bad_attribute")

        return replace(event, replayed=True)

    def _take(self, entry: str, event: Event | DecodeError, dry: bool) -> None:
        self.read += 1
        self.last = entry

        if isinstance(event, DecodeError):
            self.unreadable[entry] = str(event)
        elif not self._is_for_here(event):
            self.others += 1
        else:
            failures = () if dry else self.dispatcher.dispatch_once(event, only=self.only)
            self._note(entry, event, failures)

    def _is_for_here(self, event: Event) -> bool:
        is_own = event.source == self.config.service
        heard = self.subscription.accepts(event.source) and (self.subscription.echo or not is_own)
        return heard and bool(self.dispatcher.receivers(event, only=self.only))

    def _note(self, entry: str, event: Event, failures: Sequence[Failure]) -> None:
        self.handled += not failures

        for failure in failures:
            failed = Failed(event.id, entry, words_of(failure.error))
            self.failed.setdefault(failure.name or name_of(failure.receiver), []).append(failed)
