"""What a service could not handle, for a person who looks at it and decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..codec.entry_ids import MOST, EntryId, entry_id, id_text, is_entry_id
from ..codec.records import DeadLetter
from ..routing.options import is_pattern, matches
from .streams import PAGE, StreamAccess, as_mapping

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
