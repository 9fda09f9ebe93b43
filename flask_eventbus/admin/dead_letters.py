"""Find, delete and retry the dead letters of a service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ..codec.codec import Codec
from ..codec.records import (
    EARLIEST,
    MAX_PART,
    BadRecordError,
    DeadLetter,
    EntryId,
    RetryRecord,
    entry_id,
    id_text,
    is_entry_id,
)
from ..errors import DecodeError, OperationError
from ..logs import get_logger
from ..routing.options import is_pattern, matches
from ..streams.alarms import Alarm
from ..text import iso, plain, printable
from .streams import PAGE, TIMEOUT, StreamAccess, as_mapping

logger = get_logger(__name__)

#: Most digits read of a number of attempts, which another program may have written.
_DIGITS = 9

#: Seconds between reads of the outcomes.
LOOK = 0.1

#: Most tries to put a dead letter back while others are added meanwhile.
MAX_TRIES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A dead letter, with its signal and its id."""

    #: The signal.
    name: str
    #: The id of its entry among the dead letters.
    id: str
    content: DeadLetter

    @property
    def shown(self) -> str:
        """The dead letter as shown in a list: its id, signal and receiver."""
        return " ".join(part for part in (self.id, self.name, self.content.receiver) if part)

    def as_json(self, service: str, codec: Codec) -> dict[str, Any]:
        """Return the dead letter of a service by the names of its JSON; the fields are bytes.

        :param codec: decodes the event of a payload that was stored truncated.
        """
        content = self.content
        payload, cut = _payload(content, codec)
        return {
            "id": self.id,
            "signal": self.name,
            "service": service,
            "reason": content.reason,
            "receiver": content.receiver or None,
            "attempts": content.attempts,
            "first_failed": iso(content.first),
            "last_failed": iso(content.last),
            "given_up": iso(entry_id(self.id)[0]),
            "event_id": content.event_id or None,
            "source": content.source or None,
            "entry": content.entry or None,
            "error": content.error,
            "traceback": content.traceback,
            "payload": payload,
            "payload_cut": cut,
            "fields": {
                field.decode(errors="backslashreplace"): value
                for field, value in content.fields.items()
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A filter of dead letters: those that match all of its fields."""

    #: Ids of dead letters or of events; empty for all.
    ids: Sequence[str] = ()
    #: Signals and patterns.
    signals: Sequence[str] = ()
    #: Names of receivers: ``module.qualname`` or its last parts.
    receivers: Sequence[str] = ()
    reasons: Sequence[str] = ()
    #: Least and greatest age in milliseconds.
    older_than: int | None = None
    newer_than: int | None = None

    def __bool__(self) -> bool:
        return self != Choice()

    def fits(self, letter: Letter) -> bool:
        """Return True if a dead letter matches; signals and ages are checked elsewhere."""
        content = letter.content
        return (
            (not self.ids or letter.id in self.ids or content.event_id in self.ids)
            and (not self.reasons or content.reason in self.reasons)
            and (not self.receivers or is_called(content.receiver, self.receivers))
        )

    def bounds(self, now: int) -> tuple[EntryId, EntryId]:
        """Return the first and last id that match the ages at ``now``, in milliseconds."""
        first = 0 if self.newer_than is None else max(0, now - self.newer_than)
        last = (
            (MAX_PART, MAX_PART) if self.older_than is None else (max(0, now - self.older_than), 0)
        )
        return (first, 0), last

    def names(self, known: Iterable[str]) -> list[str]:
        """Return the signals whose dead letters may match: known ones, and those given by name."""
        named = {name for name in self.signals if not is_pattern(name)}
        return sorted(
            named
            | {
                name
                for name in known
                if not self.signals or any(matches(pattern, name) for pattern in self.signals)
            }
        )


@dataclass(slots=True, eq=False)
class Retrial:
    """A dead letter that was put back."""

    letter: Letter
    record: RetryRecord
    #: Id of the signal's last dead letter at that time; later ones are new.
    before: str
    #: ``waiting`` for a worker, ``running``, ``failed`` (with a retry), ``dead`` again, or
    #: ``handled``.
    state: str = "waiting"
    #: Error of the last attempt.
    error: str = ""
    #: Seconds until its next attempt.
    after: float = 0.0

    @property
    def is_settled(self) -> bool:
        """True if an attempt has ended."""
        return self.state not in ("waiting", "running")


class DeadLetters:
    """The dead letters of a service, of all signals; it can put each back for its receiver.

    :param command: what the command line starts with, for hints: ``flask eventbus``.
    """

    def __init__(
        self, access: StreamAccess, service: str, *, command: str = "flask eventbus"
    ) -> None:
        self.access = access
        self.service = service
        self.command = command

    def find(self, choice: Choice) -> Iterator[Letter]:
        """Yield the dead letters that match, signal by signal, the oldest first.

        If all ids are ids of dead letters, only those are read; otherwise all are, page by page.

        :raises OperationError: Redis is not available.
        """
        names = self._filled(choice.names(self.access.names()))
        named = self._named(names, choice.ids)
        first, last = choice.bounds(self.access.now())

        if choice.ids and {letter.id for letter in named}.issuperset(choice.ids):
            found = filter(choice.fits, named)
            yield from (letter for letter in found if first <= entry_id(letter.id) <= last)
            return

        for name in names:
            for page in self.access.pages(self.key(name), first, last):
                letters = (_letter(name, id_text(id), fields) for id, fields in page)
                yield from filter(choice.fits, letters)

    def select(self, choice: Choice) -> list[Letter]:
        """Return the dead letters that match, if each id belongs to exactly one.

        :raises OperationError: there is no such id, or several have it; or Redis is not available.
        """
        found = list(self.find(choice))

        for name in choice.ids:
            signals = sorted(letter.name for letter in found if letter.id == name)

            if len(signals) > 1:
                raise OperationError(
                    f"{name} is the id of several dead letters: of {', '.join(signals)}. Select "
                    "one with --signal."
                )

        known = {name for letter in found for name in (letter.id, letter.content.event_id)}
        missing = [printable(name) for name in choice.ids if name not in known]

        if missing:
            sentences = [f"{self.service!r} has no such dead letter: {id!r}." for id in missing]
            advice = f"Nothing was done. To list the dead letters: {self.command} dead list"
            raise OperationError("\n".join([*sentences, advice]))

        return found

    def drop(self, letters: Iterable[Letter]) -> int:
        """Delete dead letters, and return how many existed.

        :raises OperationError: Redis is not available, or refuses.
        """
        deleted = 0

        for name, of_name in groupby(letters, key=lambda letter: letter.name):
            ids = [letter.id for letter in of_name]
            deleted += sum(
                self.access.run(
                    [
                        ("XDEL", self.key(name), *ids[start : start + PAGE])
                        for start in range(0, len(ids), PAGE)
                    ]
                )
            )

        return deleted

    def forget_dropped(self) -> None:
        """Reset the count of dead letters that exceeded ``EVENTBUS_DEAD_MAXLEN``.

        :raises OperationError: Redis is not available, or refuses.
        """
        dropped = self.access.keys.dead_dropped
        self.access.run([("DEL", dropped(name, self.service)) for name in self.access.names()])

    def key(self, name: str) -> str:
        """Return the key of a signal's dead letters."""
        return self.access.keys.dead(name, self.service)

    def put_back(self, letter: Letter) -> Retrial | None:
        """Schedule a dead letter as a retry due now, with all attempts; ``None`` if it is gone.

        :raises OperationError: Redis cannot be asked, or refuses.
        """
        dead, retry = self.key(letter.name), self._retry_key(letter.name)

        for _ in range(MAX_TRIES):
            _, found, last, _ = self.access.run(
                [
                    ("WATCH", dead),
                    ("XRANGE", dead, letter.id, letter.id),
                    ("XREVRANGE", dead, "+", "-", "COUNT", 1),
                    # Redis does not roll back: a refusal of this key must show before the
                    # transaction.
                    ("ZSCORE", retry, letter.id),
                ]
            )

            if not found:
                self.access.ask("UNWATCH")
                return None

            record, due = record_of(letter.content), int(time.time() * 1000)
            move = [("ZADD", retry, due, record.packed()), ("XDEL", dead, letter.id)]

            if self.access.together(move) is not None:
                return Retrial(letter, record, last[0][0].decode())

        raise OperationError(
            f"{letter.shown} was not put back: dead letters of {letter.name!r} are added too fast. "
            "Try again when fewer events fail."
        )

    def settled(self, retrials: Sequence[Retrial], seconds: float) -> Iterator[Retrial]:
        """Yield each as soon as an attempt at it has ended, until ``seconds`` have passed.

        The last read may take :data:`.TIMEOUT` seconds longer.

        :raises OperationError: Redis cannot be asked.
        """
        ends = time.monotonic() + seconds
        left = list(retrials)

        while left and time.monotonic() < ends:
            time.sleep(LOOK)

            with self.access.until(ends + TIMEOUT):
                self._look(left)

            yield from (retrial for retrial in left if retrial.is_settled)
            left = [retrial for retrial in left if not retrial.is_settled]

    def _filled(self, names: Sequence[str]) -> list[str]:
        """Return the signals that have dead letters; log a warning of a key of another type."""
        foreign: dict[str, Alarm] = {}
        counts = self.access.run([("XLEN", self.key(name)) for name in names], foreign=foreign)

        for alarm in foreign.values():
            logger.warning("%s", alarm)

        return [name for name, count in zip(names, counts, strict=True) if count]

    def _named(self, names: Sequence[str], ids: Iterable[str]) -> list[Letter]:
        """Return the dead letters with these ids of their own, signal by signal."""
        found = {id_text(entry_id(id)) for id in ids if is_entry_id(id)}
        wanted = [(name, id) for name in names for id in sorted(found, key=entry_id)]
        letters: list[Letter] = []

        for start in range(0, len(wanted), PAGE):
            page = wanted[start : start + PAGE]
            answers = self.access.run([("XRANGE", self.key(name), id, id) for name, id in page])

            for (name, id), entries in zip(page, answers, strict=True):
                letters += [_letter(name, id, as_mapping(fields)) for _, fields in entries]

        return letters

    def _look(self, retrials: Sequence[Retrial]) -> None:
        """Update the states of retrials.

        An unchanged record is waiting, and a record with the mark of a worker is running. For all
        others, the retries and new dead letters of the signal are read.
        """
        forms = [
            ("ZSCORE", self._retry_key(retrial.letter.name), record.packed())
            for retrial in retrials
            for record in (retrial.record, replace(retrial.record, attempts=1, running=True))
        ]
        answers = iter(self.access.run(forms))
        changed: dict[str, list[Retrial]] = {}

        for retrial, waiting, running in zip(retrials, answers, answers, strict=False):
            if waiting is None and running is None:
                changed.setdefault(retrial.letter.name, []).append(retrial)
            else:
                retrial.state = "running" if waiting is None else "waiting"

        for name, of_name in changed.items():
            self._settle(name, of_name)

    def _settle(self, name: str, retrials: Sequence[Retrial]) -> None:
        """Update the states of a signal's retrials from its retries and new dead letters."""
        first = min((retrial.before for retrial in retrials), key=entry_id)
        # Records become dead letters, never the other way round: in this order none is missed.
        members, entries = self.access.run(
            [
                ("ZRANGE", self._retry_key(name), 0, -1, "WITHSCORES"),
                ("XRANGE", self.key(name), f"({first}", "+"),
            ]
        )
        records = {(each.entry, each.receiver): (each, due) for each, due in _records(members)}
        letters = {
            (content.entry, content.receiver): (entry_id(entry), content)
            for entry, content in ((each[0], read_letter(as_mapping(each[1]))) for each in entries)
        }

        for retrial in retrials:
            key = retrial.record.entry, retrial.record.receiver
            record, due = records.get(key, (None, 0.0))
            added, content = letters.get(key, (EARLIEST, None))

            if record is not None:
                retrial.state = "running" if record.running else "failed"
                retrial.error = record.error
                retrial.after = max(0.0, due / 1000 - time.time())
            elif content is not None and added > entry_id(retrial.before):
                retrial.state = "dead"
                retrial.error = content.error
            else:
                retrial.state = "handled"

    def _retry_key(self, name: str) -> str:
        return self.access.keys.retry(name, self.service)


def _letter(name: str, id: str, fields: Mapping[bytes, bytes]) -> Letter:
    return Letter(name=name, id=id, content=read_letter(fields))


def _payload(content: DeadLetter, codec: Codec) -> tuple[object, str | None]:
    """Return the payload, or the text of a truncated one that cannot be decoded."""
    if not content.payload:
        return None, None

    with suppress(ValueError, RecursionError):
        return read_payload(content.payload), None

    try:
        event = codec.decode(content.fields.get(b"event", b""), via="stream")
    except DecodeError:
        return None, content.payload

    return plain(dict(event.payload)), None


def read_payload(text: str) -> object:
    """Parse the payload of a dead letter.

    :raises ValueError: it was stored truncated.
    """
    # NaN and Infinity, which older versions wrote, become text.
    return plain(json.loads(text, parse_constant=lambda name: str(float(name))))


def read_letter(fields: Mapping[bytes, bytes]) -> DeadLetter:
    """Return the dead letter in the fields of an entry, which another program may have written."""
    return DeadLetter.from_fields({**fields, b"attempts": fields.get(b"attempts", b"")[:_DIGITS]})


def is_called(receiver: str, names: Iterable[str]) -> bool:
    """Return True if a name is the receiver's full name or its last parts: ``send_welcome``."""
    return any(receiver == name or receiver.endswith(f".{name}") for name in names)


def why_not(letter: Letter, command: str) -> str:
    """Return why a dead letter cannot be put back, with the remedy; empty if it can.

    :param command: what the command line starts with, as in :class:`DeadLetters`.
    """
    content = letter.content
    replay = f"{command} replay {letter.name} --from {content.entry} --to {content.entry}"

    if b"event" not in content.fields:
        if b"event.sha256" in content.fields:
            return (
                "its entry is larger than EVENTBUS_MAX_EVENT_BYTES, so only a sample was kept. "
                f"Raise that setting and replay the entry while the stream has it: {replay}"
            )

        return "it has no event. Drop it."

    if content.event_id and not content.receiver and content.entry:
        return (
            "its worker died, and it is not known in which receiver. Replay it for all "
            f"receivers: {replay}"
        )

    if not content.receiver or not content.entry:
        return "it could not be decoded, and no receiver ran for it. Drop it."

    return ""


def record_of(content: DeadLetter) -> RetryRecord:
    """Return the retry record of a dead letter, with all attempts left."""
    return RetryRecord(
        entry=content.entry,
        event=content.fields[b"event"],
        receiver=content.receiver,
        attempts=0,
        first=content.first,
        # Now, since workers give up an unknown receiver one hour after this time.
        last=round(time.time() * 1000),
        error=content.error,
        traceback=content.traceback,
    )


def _records(members: Sequence[bytes]) -> Iterator[tuple[RetryRecord, float]]:
    for member, due in zip(members[::2], members[1::2], strict=True):
        # Another program has written it; the worker handles it.
        with suppress(BadRecordError):
            yield RetryRecord.unpacked(member), float(due)
