"""Read and change streams for commands, with errors that name the remedy; parse places in them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from reprlib import repr as short
from typing import Any, Self

import redis

from ..codec.records import EARLIEST, MAX_PART, EntryId, before_moment, entry_id, id_text
from ..config import SIGNAL_NAME, Config
from ..errors import ConfigError, OperationError
from ..logs import get_logger
from ..streams.alarms import Alarm
from ..text import printable, reason_of, seconds_of
from ..transport.connection import OUTAGE, milliseconds_of
from ..transport.connections import Connections
from ..transport.keys import StreamKeys, grant_the_user, is_missing_right, repair, right_of
from ..transport.pipe import SAMPLE, Command, Pipe
from ..transport.urls import trouble_of

logger = get_logger(__name__)

#: Seconds a server has to answer each question.
TIMEOUT = 3.0

#: Entries read in one round trip; each may be as large as an event.
PAGE = 100

#: An entry of a stream: its id and its fields.
Entry = tuple[EntryId, dict[bytes, bytes]]


_ID = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?", re.ASCII)

#: Least digits of milliseconds since 1970; a shorter number such as 20261122 is a date.
_DIGITS = 12

_EXAMPLES = (
    "Write an entry's id such as '1700000000000-0', a time such as '2026-11-22T14:00', or an age "
    "such as '2h'."
)


class StreamAccess:
    """One connection to the streams of a prefix, open while it is used in a ``with`` block.

    :param name: the name of the connection in ``CLIENT LIST``.
    :param deadline: monotonic time at which all waiting for Redis ends.
    :raises ConfigError: the URL is that of a Redis Cluster, which has no streams.
    """

    def __init__(self, config: Config, *, name: str, deadline: float = math.inf) -> None:
        if not config.has_streams:
            raise ConfigError(
                "'EVENTBUS_URL' names a Redis Cluster, and this version has no streams there. "
                "Set it to a single server, or to one behind Sentinel."
            )

        self.keys = StreamKeys(config.prefix)
        self._prefix = config.prefix
        self._connections = Connections(config.url, name=name, deadline=deadline)
        self._pipe = Pipe(self._connections, timeout=TIMEOUT)

    def ask(self, *command: str | bytes | int | float, most: int | None = None) -> Any:
        """Return the answer to one command.

        :raises OperationError: Redis is not available, or refuses the command.
        """
        return self.run([command], most=most)[0]

    def run(
        self,
        commands: Sequence[Command],
        *,
        most: int | None = None,
        foreign: dict[str, Alarm] | None = None,
    ) -> list[Any]:
        """Return the answers to commands, in one round trip; ``None`` if a key or group is missing.

        :param most: as :meth:`.Pipe.run` takes it.
        :param foreign: gets each key whose value is of another type, and what to do about it; the
            answers for these keys are ``None``. Without it, such a key is an error.
        :raises OperationError: Redis is away, or refuses one of them.
        """
        answers = self._answers(commands, most)
        return [
            self._checked(command, answer, foreign)
            for command, answer in zip(commands, answers, strict=True)
        ]

    def try_to_run(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands; ``None`` for each that Redis refuses.

        :raises OperationError: Redis is away.
        """
        answers = self._answers(commands)
        return [None if isinstance(answer, Exception) else answer for answer in answers]

    def together(self, commands: Sequence[Command]) -> list[Any] | None:
        """Run commands in a transaction; return ``None`` if a watched key has changed.

        :raises OperationError: Redis is away, or refuses one of them.
        """
        answers = self.run([("MULTI",), *commands, ("EXEC",)])[-1]

        if answers is None:
            return None

        return [
            self._checked(command, answer)
            for command, answer in zip(commands, answers, strict=True)
        ]

    def now(self) -> int:
        """Return Redis's time in milliseconds; this machine's if the ACL forbids ``TIME``.

        :raises OperationError: Redis is away.
        """
        (answer,) = self.try_to_run([("TIME",)])
        return int(time.time() * 1000) if answer is None else milliseconds_of(answer)

    @contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Set the monotonic time at which waiting for Redis ends, for a ``with`` block."""
        before, self._pipe.deadline = self._pipe.deadline, deadline

        try:
            yield
        finally:
            self._pipe.deadline = before

    def names(self) -> list[str]:
        """Return the signals that have a stream.

        :raises OperationError: Redis cannot be asked.
        """
        found = [name.decode(errors="replace") for name in self.ask("SMEMBERS", self.keys.names)]

        for name in found:
            if not SIGNAL_NAME.fullmatch(name):
                logger.warning(
                    "%r has an entry that is not a valid name of a signal; skipping it: '%s'.",
                    self.keys.names,
                    printable(name[:128]),
                )

        return sorted(name for name in found if SIGNAL_NAME.fullmatch(name))

    def pages(
        self, key: str, first: EntryId, last: EntryId, *, most: int | None = None
    ) -> Iterator[list[Entry]]:
        """Yield the entries of a stream from one id to another, both included, page by page.

        :param most: as :meth:`.Pipe.run` takes it.
        :raises OperationError: Redis cannot be asked.
        """
        start = id_text(first)

        while True:
            found = self.ask("XRANGE", key, start, id_text(last), "COUNT", PAGE, most=most)
            yield [(entry_id(name), as_mapping(fields)) for name, fields in found]

            if len(found) < PAGE:
                return

            start = f"({found[-1][0].decode()}"

    def stream_of(self, name: str) -> dict[str, Any]:
        """Return ``XINFO STREAM`` of a signal's stream; an empty mapping if there is none.

        :raises OperationError: Redis cannot be asked.
        """
        found = self.ask("XINFO", "STREAM", self.keys.stream(name), most=SAMPLE)
        return {} if found is None else as_texts(found)

    def groups_of(
        self, name: str, *, foreign: dict[str, Alarm] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return ``XINFO GROUPS`` of a signal's stream, by the name of the group.

        :param foreign: as :meth:`run` takes it.
        :raises OperationError: Redis cannot be asked.
        """
        command = ("XINFO", "GROUPS", self.keys.stream(name))
        return by_name(self.run([command], foreign=foreign)[0])

    def close(self) -> None:
        """Close the connection."""
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answers(self, commands: Sequence[Command], most: int | None = None) -> list[Any]:
        """Return the answers of Redis, errors among them.

        :raises OperationError: Redis is away.
        """
        try:
            return self._pipe.run(commands, most=most) if commands else []
        except redis.AuthenticationError as error:
            raise OperationError(
                f"Redis at {self._connections.shown} does not let this user in: "
                f"{reason_of(error)}. Correct the user and the password in 'EVENTBUS_URL'."
            ) from error
        except OUTAGE as error:
            if "no permissions" in str(error):
                raise OperationError(
                    f"Redis at {self._connections.shown} does not let this user connect: "
                    f"{reason_of(error)}. Grant it the right to connect in the ACL."
                ) from error

            raise OperationError(
                f"Redis at {self._connections.shown} cannot be used: {printable(trouble_of(error))}"
            ) from error

    def _checked(
        self, command: Command, answer: Any, foreign: dict[str, Alarm] | None = None
    ) -> Any:
        if not isinstance(answer, Exception):
            return answer

        # The stream or its group does not exist.
        if "no such key" in str(answer).lower() or str(answer).startswith("NOGROUP"):
            return None

        right = right_of(command)
        name = right[1:].replace("|", " ").upper()
        key = " ".join(_as_text(word) for word in command[len(name.split()) :][:1])
        problem = f"Redis refuses {name} of '{printable(key)}'"

        if is_missing_right(answer):
            raise OperationError(
                f"{problem} to this user: {reason_of(answer)}. "
                f"{grant_the_user({f'{self._prefix}:*': right})} Or name another user in "
                "'EVENTBUS_URL'."
            ) from answer

        alarm = Alarm(f"{problem}: {reason_of(answer)}.", repair(answer, [key]))

        if foreign is None or "WRONGTYPE" not in str(answer):
            raise OperationError(str(alarm)) from answer

        foreign.setdefault(key, alarm)
        return None


def by_name(found: Any) -> dict[str, dict[str, Any]]:
    """Return the items of an ``XINFO`` list by their names; an empty mapping for ``None``."""
    return {_as_text(each["name"]): each for each in map(as_texts, found or [])}


def as_texts(pairs: Sequence[Any]) -> dict[str, Any]:
    """Return a flat list of names and values as a mapping with text keys."""
    return {_as_text(name): value for name, value in zip(pairs[::2], pairs[1::2], strict=True)}


def as_mapping(pairs: Sequence[bytes] | None) -> dict[bytes, bytes]:
    """Return the fields of an entry, from a flat list, as a mapping."""
    return {} if not pairs else dict(zip(pairs[::2], pairs[1::2], strict=True))


def _as_text(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a stream: an entry, or a moment with all the entries of its millisecond."""

    first: EntryId
    last: EntryId
    #: True for a time; False for the id of an entry.
    is_moment: bool = False
    #: The age in milliseconds, for :meth:`at`; ``None`` if the place is not an age.
    age: int | None = None

    def at(self, now: int) -> Place:
        """Return the place; an age is counted back from ``now``, in milliseconds since 1970.

        ``now`` must be Redis's time, as the ids of entries are.
        """
        return self if self.age is None else _moment(now - self.age)

    @property
    def position(self) -> EntryId:
        """Last delivered id of a group at this place: after an entry, before a time."""
        return before_moment(self.first[0]) if self.is_moment else self.first


def read_place(text: str) -> Place:
    """Read a place; ``earliest`` is before the first entry.

    :raises ValueError: the text names no place.
    """
    if text == "earliest":
        return Place(EARLIEST, EARLIEST)

    if seconds_of(text) is not None:
        return Place(EARLIEST, EARLIEST, is_moment=True, age=read_age(text))

    if (found := _ID.fullmatch(text)) and (found[2] or text == "0" or len(text) >= _DIGITS):
        first = int(found[1]), int(found[2] or 0)

        if max(first) > MAX_PART:
            raise ValueError(f"{text!r} is too large for an entry's id. {_EXAMPLES}")

        return Place(first, first) if found[2] else _moment(first[0])

    try:
        moment = datetime.fromisoformat(text)
        # A time without an offset is local time.
        return _moment(int(moment.timestamp() * 1000))
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{short(text)} is not a place in a stream. {_EXAMPLES}") from error


def read_age(text: str) -> int:
    """Return an age such as ``7d`` in milliseconds.

    :raises ValueError: the text is not an age.
    """
    seconds = seconds_of(text)

    if seconds is None:
        raise ValueError(
            f"{short(text)} is not an age. Write a number and a unit: '30s', '15m', '12h' or '7d'."
        )

    return seconds * 1000


def _moment(milliseconds: int) -> Place:
    milliseconds = max(0, milliseconds)
    return Place((milliseconds, 0), (milliseconds, MAX_PART), is_moment=True)
