"""What a service could not handle, for a person who looks at it and decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby

from ..codec.entry_ids import MOST, EntryId, entry_id, id_text, is_entry_id
from ..codec.records import BadRecordError, DeadLetter, RetryRecord
from ..errors import OperationError
from ..routing.options import is_pattern, matches
from .streams import PAGE, TIMEOUT, StreamAccess, as_mapping

#: Digits that are read of a number of attempts: somebody may have edited it.
_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A dead letter where it lies."""

    #: The signal.
    name: str
    #: The id of its entry among the dead letters.
    id: str
    content: DeadLetter

    @property
    def shown(self) -> str:
        """What it is called where there are several: its id, its signal, and its receiver."""
        return " ".join(part for part in (self.id, self.name, self.content.receiver) if part)

    def is_in(self, bounds: tuple[EntryId, EntryId]) -> bool:
        """Return True if its id is not before the first nor after the last one."""
        return bounds[0] <= entry_id(self.id) <= bounds[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which dead letters are meant: those that fit everything that is said."""

    #: Of dead letters or of events; none means all.
    ids: Sequence[str] = ()
    #: Signals and patterns.
    signals: Sequence[str] = ()
    #: Names of receivers, ``module.qualname`` or an end of it.
    receivers: Sequence[str] = ()
    reasons: Sequence[str] = ()
    #: How long ago they were given up at least, and at most, in milliseconds.
    older_than: int | None = None
    newer_than: int | None = None

    def __bool__(self) -> bool:
        return self != Choice()

    def fits(self, letter: Letter) -> bool:
        """Whether a letter is one of those that are meant."""
        content = letter.content
        return (
            (not self.ids or letter.id in self.ids or content.event_id in self.ids)
            and (not self.reasons or content.reason in self.reasons)
            and (not self.receivers or is_called(content.receiver, self.receivers))
        )

    def bounds(self, now: int) -> tuple[EntryId, EntryId]:
        """The first and the last id that may fit at the time ``now``, in milliseconds."""
        first = 0 if self.newer_than is None else max(0, now - self.newer_than)
        last = (MOST, MOST) if self.older_than is None else (max(0, now - self.older_than), 0)
        return (first, 0), last

    def names(self, known: Iterable[str]) -> list[str]:
        """The signals whose dead letters may fit: those of the known, and those that are named."""
        named = {name for name in self.signals if not is_pattern(name)}
        return sorted(
            named
            | {
                name
                for name in known
                if not self.signals or any(matches(pattern, name) for pattern in self.signals)
            }
        )


class DeadLetters:
    """The dead letters of a service, of all signals."""

    def __init__(self, access: StreamAccess, service: str) -> None:
        self._access = access
        self._service = service

    def find(self, choice: Choice) -> Iterator[Letter]:
        """Those that are meant, signal by signal, the oldest first.

        Dead letters that are named by their own ids are read one by one; all others are read in
        pages and looked through.

        :raises click.ClickException: Redis cannot be asked.
        """
        names = choice.names(self._access.names())
        named = self._named(names, choice.ids)

        if choice.ids and {letter.id for letter in named}.issuperset(choice.ids):
            bounds = choice.bounds(self._access.now())
            yield from (letter for letter in named if choice.fits(letter) and letter.is_in(bounds))
            return

        counts = self._access.run([("XLEN", self.key(name)) for name in names])
        first, last = choice.bounds(self._access.now())

        for name, count in zip(names, counts, strict=True):
            if count:
                yield from filter(choice.fits, self._all(name, first, last))

    def drop(self, letters: Iterable[Letter]) -> int:
        """Delete them, and return how many were still there.

        :raises click.ClickException: Redis cannot be asked, or refuses.
        """
        deleted = 0

        for name, of_name in groupby(letters, key=lambda letter: letter.name):
            ids = [letter.id for letter in of_name]
            deleted += sum(
                self._access.run(
                    [
                        ("XDEL", self.key(name), *ids[start : start + PAGE])
                        for start in range(0, len(ids), PAGE)
                    ]
                )
            )

        return deleted

    def forget_dropped(self) -> None:
        """Count anew what is dropped because there are more than ``EVENTBUS_DEAD_MAXLEN``.

        :raises click.ClickException: Redis cannot be asked, or refuses.
        """
        dropped = self._access.keys.dead_dropped
        self._access.run([("DEL", dropped(name, self._service)) for name in self._access.names()])

    def key(self, name: str) -> str:
        """Where the dead letters of a signal are."""
        return self._access.keys.dead(name, self._service)

    def _named(self, names: Sequence[str], ids: Iterable[str]) -> list[Letter]:
        """Return the dead letters with these ids of their own, signal by signal."""
        found = {id_text(entry_id(id)) for id in ids if is_entry_id(id)}
        wanted = [(name, id) for name in names for id in sorted(found, key=entry_id)]
        letters: list[Letter] = []

        for start in range(0, len(wanted), PAGE):
            page = wanted[start : start + PAGE]
            answers = self._access.run([("XRANGE", self.key(name), id, id) for name, id in page])

            for (name, id), entries in zip(page, answers, strict=True):
                letters += [
                    Letter(name=name, id=id, content=read_letter(as_mapping(fields)))
                    for _, fields in entries or []
                ]

        return letters

    def _all(self, name: str, first: EntryId, last: EntryId) -> Iterator[Letter]:
        for found, fields in self._access.entries(self.key(name), first, last):
            yield Letter(name=name, id=id_text(found), content=read_letter(fields))


def read_letter(fields: Mapping[bytes, bytes]) -> DeadLetter:
    """The dead letter that the fields of an entry are, whoever wrote them."""
    return DeadLetter.from_fields({**fields, b"attempts": fields.get(b"attempts", b"")[:_DIGITS]})


def is_called(receiver: str, names: Iterable[str]) -> bool:
    """Whether a receiver has one of the names, in full or by their end: ``send_welcome``."""
    return any(receiver == name or receiver.endswith(f".{name}") for name in names)


#: Seconds between two looks.
LOOK = 0.1

#: How often a letter is tried to be put back while others are added to the dead letters.
MOST_TRIES = 100


@dataclass(slots=True, eq=False)
class Retrial:
    """A dead letter that was put back."""

    letter: Letter
    record: RetryRecord
    #: The last dead letter of its signal at that time: what comes after it is new.
    before: str
    #: ``waiting`` for a worker, ``running``, ``failed`` and to be tried again, ``dead`` again
    #: or ``handled``.
    state: str = "waiting"
    #: What it failed at this time.
    error: str = ""
    #: Seconds until its next attempt.
    after: float = 0.0

    @property
    def is_settled(self) -> bool:
        """Whether an attempt was made, and has ended."""
        return self.state not in ("waiting", "running")

    def is_it(self, entry: str, receiver: str) -> bool:
        """Whether it is about this receiver at this entry."""
        return (entry, receiver) == (self.record.entry, self.record.receiver)


class Retrials:
    """Puts dead letters of a service back, each for the one receiver that failed."""

    def __init__(
        self, access: StreamAccess, service: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._access = access
        self._service = service
        self._clock = clock

    def put_back(self, letter: Letter) -> Retrial | None:
        """Let a letter be due now, as if nobody had tried; ``None`` if it is not there any more.

        :raises OperationError: Redis cannot be asked, or refuses.
        """
        for _ in range(MOST_TRIES):
            before = self._watched(letter)

            if before is None:
                return None

            retrial = Retrial(letter, record_of(letter.content), before)

            if self._moved(retrial):
                return retrial

        raise OperationError(
            f"{letter.shown} was not put back: the dead letters of {letter.name!r} change all the "
            "time. Try again when fewer events fail."
        )

    def settled(self, retrials: Sequence[Retrial], seconds: float) -> Iterator[Retrial]:
        """Yield each as soon as an attempt at it has ended, until ``seconds`` have passed.

        The last look takes :data:`.TIMEOUT` seconds more at most.

        :raises OperationError: Redis cannot be asked.
        """
        ends = time.monotonic() + seconds
        left = list(retrials)

        while left and time.monotonic() < ends:
            time.sleep(LOOK)

            with self._access.until(ends + TIMEOUT):
                self._look(left)

            yield from (retrial for retrial in left if retrial.is_settled)
            left = [retrial for retrial in left if not retrial.is_settled]

    def _watched(self, letter: Letter) -> str | None:
        """The last dead letter of the signal, and a watch over all of them."""
        key = self._dead(letter.name)
        _, found, last, _ = self._access.run(
            [
                ("WATCH", key),
                ("XRANGE", key, letter.id, letter.id),
                ("XREVRANGE", key, "+", "-", "COUNT", 1),
                # Redis undoes nothing: what it would refuse then is to be known now.
                ("ZSCORE", self._retry(letter.name), letter.id),
            ]
        )

        if found:
            before: str = last[0][0].decode()
            return before

        self._access.ask("UNWATCH")
        return None

    def _moved(self, retrial: Retrial) -> bool:
        name, due = retrial.letter.name, int(self._clock() * 1000)
        answers = self._access.together(
            [
                ("ZADD", self._retry(name), due, retrial.record.packed()),
                ("XDEL", self._dead(name), retrial.letter.id),
            ]
        )
        return answers is not None

    def _look(self, retrials: Sequence[Retrial]) -> None:
        """See what became of those that were put back.

        Where their records are as they were, or as a worker marks what it runs, that is all
        there is to know. Otherwise everything is read that might be about them.
        """
        forms = [
            ("ZSCORE", self._retry(retrial.letter.name), record.packed())
            for retrial in retrials
            for record in (retrial.record, replace(retrial.record, attempts=1, running=True))
        ]
        answers = iter(self._access.run(forms))
        changed = []

        for retrial, waiting, running in zip(retrials, answers, answers, strict=False):
            if waiting is None and running is None:
                changed.append(retrial)
            else:
                retrial.state = "running" if waiting is None else "waiting"

        for name in {retrial.letter.name for retrial in changed}:
            self._settle(name, [retrial for retrial in changed if retrial.letter.name == name])

    def _settle(self, name: str, retrials: Sequence[Retrial]) -> None:
        first = min((retrial.before for retrial in retrials), key=entry_id)
        # Records become dead letters, never the other way round: in this order none is missed.
        members, entries = self._access.run(
            [
                ("ZRANGE", self._retry(name), 0, -1, "WITHSCORES"),
                ("XRANGE", self._dead(name), f"({first}", "+"),
            ]
        )
        records = list(_records(members))
        letters = [(entry.decode(), read_letter(as_mapping(fields))) for entry, fields in entries]

        for retrial in retrials:
            self._take_up(retrial, records)

            if retrial.state == "handled":
                _take_up_letters(retrial, letters)

    def _take_up(self, retrial: Retrial, records: Sequence[tuple[RetryRecord, float]]) -> None:
        for record, due in records:
            if retrial.is_it(record.entry, record.receiver):
                retrial.state = "running" if record.running else "failed"
                retrial.error = record.error
                retrial.after = max(0.0, due / 1000 - self._clock())
                return

        retrial.state = "handled"

    def _dead(self, name: str) -> str:
        return self._access.keys.dead(name, self._service)

    def _retry(self, name: str) -> str:
        return self._access.keys.retry(name, self._service)


def why_not(letter: Letter) -> str:
    """Why a dead letter cannot be put back, and what to do instead; empty if it can."""
    content = letter.content

    if b"event" not in content.fields:
        if b"event.sha256" in content.fields:
            return (
                "its entry is larger than EVENTBUS_MAX_EVENT_BYTES, so only a sample was kept. "
                "Raise that setting and replay the entry while the stream has it: "
                f"flask eventbus replay {letter.name} --from {content.entry} --to {content.entry}"
            )

        return "it has no event. Drop it."

    if content.event_id and not content.receiver and content.entry:
        return (
            "its worker died before it was known which receiver was to blame. Bring it to all of "
            f"them again: flask eventbus replay {letter.name} --from {content.entry} --to "
            f"{content.entry}"
        )

    if not content.receiver or not content.entry:
        return "it was never read as an event, and no receiver failed at it. Drop it."

    return ""


def record_of(content: DeadLetter) -> RetryRecord:
    """The record that lets a dead letter's receiver be run, with all its attempts before it."""
    return RetryRecord(
        entry=content.entry,
        event=content.fields[b"event"],
        receiver=content.receiver,
        attempts=0,
        first=content.first,
        # Now: workers give a receiver up that none of them knows, an hour after this.
        last=round(time.time() * 1000),
        error=content.error,
        traceback=content.traceback,
    )


def _take_up_letters(retrial: Retrial, letters: Sequence[tuple[str, DeadLetter]]) -> None:
    for found, content in letters:
        is_new = entry_id(found) > entry_id(retrial.before)

        if is_new and retrial.is_it(content.entry, content.receiver):
            retrial.state = "dead"
            retrial.error = content.error


def _records(members: Sequence[bytes]) -> Iterator[tuple[RetryRecord, float]]:
    for member, due in zip(members[::2], members[1::2], strict=True):
        # What somebody edited is about none of those that were put back: that is the worker's.
        with suppress(BadRecordError):
            yield RetryRecord.unpacked(member), float(due)
