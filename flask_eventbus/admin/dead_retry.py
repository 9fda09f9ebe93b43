"""Dead letters that are put back to be run, and what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ..codec.entry_ids import entry_id
from ..codec.records import BadRecordError, DeadLetter, RetryRecord
from ..errors import OperationError
from .dead_letters import Letter, read_letter
from .streams import TIMEOUT, StreamAccess, as_mapping

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
