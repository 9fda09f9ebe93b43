"""Asks and changes what streams are made of, for commands; what keeps them from it is told."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import redis

from ..codec.entry_ids import EntryId, entry_id, id_text
from ..config import SIGNAL_NAME, Config
from ..errors import ConfigError, OperationError
from ..logs import get_logger
from ..text import printable
from ..transport.connections import OUTAGE, Connections
from ..transport.keys import StreamKeys
from ..transport.pipe import SAMPLE, Command, Pipe
from ..transport.urls import trouble_of

logger = get_logger(__name__)

#: Seconds a server has to answer each question.
TIMEOUT = 3.0

#: Entries that are read in one round trip; each may be as large as an event.
PAGE = 100

#: An entry of a stream: its id and its fields.
Entry = tuple[EntryId, dict[bytes, bytes]]

#: Commands whose rights are given by their second word.
_CONTAINERS = ("XINFO", "XGROUP")


class StreamAccess:
    """One connection to the streams of a prefix, open while it is used in a ``with`` block.

    :param name: what ``CLIENT LIST`` shows.
    :param deadline: when all waits for Redis end, by the monotonic clock.
    :raises ConfigError: there are no streams behind such a URL.
    """

    def __init__(self, config: Config, *, name: str, deadline: float = math.inf) -> None:
        if urlsplit(config.url).scheme == "redis+cluster":
            raise ConfigError(
                "'EVENTBUS_URL' names a Redis Cluster, where this version has no streams. Name a "
                "single server, or one behind Sentinel."
            )

        self.keys = StreamKeys(config.prefix)
        self._prefix = config.prefix
        self._connections = Connections(config.url, name=name, deadline=deadline)
        self._pipe = Pipe(self._connections, timeout=TIMEOUT)

    def ask(self, *command: str | bytes | int | float, most: int | None = None) -> Any:
        """The answer to one command.

        :raises OperationError: Redis is away, or refuses it.
        """
        return self.run([command], most=most)[0]

    def run(self, commands: Sequence[Command], *, most: int | None = None) -> list[Any]:
        """The answers to commands, in one round trip; ``None`` where there is no such key or group.

        :param most: as :meth:`.Pipe.run` takes it.
        :raises OperationError: Redis is away, or refuses one of them.
        """
        if not commands:
            return []

        with self._told():
            answers = self._pipe.run(commands, most=most)

        return [
            self._checked(command, answer)
            for command, answer in zip(commands, answers, strict=True)
        ]

    def try_to_run(self, commands: Sequence[Command]) -> list[Any]:
        """The same; ``None`` for what Redis refuses as well.

        :raises OperationError: Redis is away.
        """
        with self._told():
            answers = self._pipe.run(commands) if commands else []

        return [None if isinstance(answer, Exception) else answer for answer in answers]

    def together(self, commands: Sequence[Command]) -> list[Any] | None:
        """The answers to commands that are done together; ``None`` if what was watched changed.

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
        """Redis's time in milliseconds; this machine's where the user may not ask for it.

        :raises OperationError: Redis is away.
        """
        with self._told():
            (answer,) = self._pipe.run([("TIME",)])

        if isinstance(answer, Exception):
            return int(time.time() * 1000)

        return int(answer[0]) * 1000 + int(answer[1]) // 1000

    @contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Let all waits for Redis in a block end by a deadline."""
        before, self._pipe.deadline = self._pipe.deadline, deadline

        try:
            yield
        finally:
            self._pipe.deadline = before

    def names(self) -> list[str]:
        """The signals that have a stream.

        :raises OperationError: Redis cannot be asked.
        """
        found = [name.decode(errors="replace") for name in self.ask("SMEMBERS", self.keys.names)]

        for name in found:
            if not SIGNAL_NAME.fullmatch(name):
                logger.warning(
                    "%r has a name that no signal can have; it is left out: '%s'.",
                    self.keys.names,
                    printable(name[:128]),
                )

        return sorted(name for name in found if SIGNAL_NAME.fullmatch(name))

    def pages(
        self, key: str, first: EntryId, last: EntryId, *, most: int | None = None
    ) -> Iterator[list[Entry]]:
        """The entries of a stream from one id to another, both included, some at a time.

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

    def entries(self, key: str, first: EntryId, last: EntryId) -> Iterator[Entry]:
        """The same, one by one.

        :raises OperationError: Redis cannot be asked.
        """
        for page in self.pages(key, first, last):
            yield from page

    def ids(self, key: str, first: EntryId, last: EntryId) -> Iterator[EntryId]:
        """The ids of the same.

        :raises OperationError: Redis cannot be asked.
        """
        for page in self.pages(key, first, last, most=SAMPLE):
            yield from (found for found, _ in page)

    def stream_of(self, name: str) -> dict[str, Any]:
        """What ``XINFO STREAM`` says of a signal's stream; nothing if there is none.

        :raises OperationError: Redis cannot be asked.
        """
        found = self.ask("XINFO", "STREAM", self.keys.stream(name), most=SAMPLE)
        return {} if found is None else as_texts(found)

    def groups_of(self, name: str) -> dict[str, dict[str, Any]]:
        """What ``XINFO GROUPS`` says of each group of a signal's stream, by its name.

        :raises OperationError: Redis cannot be asked.
        """
        return by_name(self.ask("XINFO", "GROUPS", self.keys.stream(name)))

    def close(self) -> None:
        """Close the connection."""
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError as error:
            raise OperationError(
                f"Redis at {self._connections.shown} does not let this user in: "
                f"{_reason(error)}. Correct the user and the password in 'EVENTBUS_URL'."
            ) from error
        except OUTAGE as error:
            if "no permissions" in str(error):
                raise OperationError(
                    f"Redis at {self._connections.shown} does not let this user connect: "
                    f"{_reason(error)}. Grant it that in the ACL."
                ) from error

            raise OperationError(
                f"Redis at {self._connections.shown} cannot be used: {printable(trouble_of(error))}"
            ) from error

    def _checked(self, command: Command, answer: Any) -> Any:
        if not isinstance(answer, Exception):
            return answer

        # A stream, or a group of it, that is not there, or not any more.
        if "no such key" in str(answer).lower() or str(answer).startswith("NOGROUP"):
            return None

        raise OperationError(self._refused(command, answer)) from answer

    def _refused(self, command: Command, refusal: Exception) -> str:
        words = [_as_text(word) for word in command[:3]]
        is_container = words[0] in _CONTAINERS
        name = "|".join(words[: 1 + is_container]).lower()
        key = " ".join(words[1 + is_container : 2 + is_container])
        told = f"Redis refuses {' '.join(words[: 1 + is_container])} of '{printable(key)}'"

        if isinstance(refusal, redis.exceptions.NoPermissionError):
            return (
                f"{told} to this user: {_reason(refusal)}. Grant it '+{name}' and "
                f"'~{self._prefix}:*' in the ACL, or name another user in 'EVENTBUS_URL'."
            )

        if "WRONGTYPE" in str(refusal):
            return (
                f"{told}: another program keeps something else under this key. Choose another "
                "'EVENTBUS_PREFIX', or remove that key."
            )

        remedy = ""

        if str(refusal).startswith("unknown command"):
            remedy = " Take it out of 'rename-command' in the server's configuration."

        return f"{told}: {_reason(refusal)}.{remedy}"


def by_name(found: Any) -> dict[str, dict[str, Any]]:
    """A list of ``XINFO`` as a mapping by the names in it; nothing for ``None``."""
    return {_as_text(each["name"]): each for each in map(as_texts, found or [])}


def as_texts(pairs: Sequence[Any]) -> dict[str, Any]:
    """Names and values, one after the other, as a mapping of texts to values."""
    return {_as_text(name): value for name, value in zip(pairs[::2], pairs[1::2], strict=True)}


def as_mapping(pairs: Sequence[bytes] | None) -> dict[bytes, bytes]:
    """The fields of an entry."""
    return {} if not pairs else dict(zip(pairs[::2], pairs[1::2], strict=True))


def _as_text(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split()).rstrip("."))
