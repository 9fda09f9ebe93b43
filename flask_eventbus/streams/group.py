"""Bytes over streams: one service's consumer group, command by command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from ..codec.entry_ids import EntryId, entry_id, id_text
from ..logs import get_logger
from ..transport.connections import takes_no_writes
from ..transport.keys import StreamKeys
from ..transport.pipe import SAMPLE, Command, Large, Pipe

logger = get_logger(__name__)

#: The consumer that entries are handed back to by a process that ends: nobody's, for everybody.
RELEASED = "released"

#: Milliseconds that entries which are handed back count as idle: claimable at once, and by one
#: worker only, since no other entry was idle for so long.
LONG_IDLE = 2**31 - 1

#: What a user needs to be allowed of the stream of a group.
RIGHTS = (
    "+xgroup|create +xgroup|createconsumer +xgroup|delconsumer +xreadgroup +xack +xclaim +xpending "
    "+xrange +xinfo|stream +xinfo|groups +xinfo|consumers"
)

#: What it needs of the retries of its service, and for the transactions that note them.
RETRY_RIGHTS = "+zrangebyscore +zscore +zadd +zrem +watch +multi +exec"

#: The last id that an entry can have but one: the last of all means ``>`` to Redis.
LAST_ID = f"{2**64 - 1}-{2**64 - 2}"

#: Entries that are looked at in one command.
PAGE = 100

#: Entries that are asked for in one round trip, whatever their size: Redis keeps all answers to it.
LOOK_UP = 16

#: Entries that are listed at most when a consumer is removed.
MOST_PENDING = 10_000

#: Seconds for which it is known in Redis what a worker reported.
REPORT_KEPT = 24 * 60 * 60

#: Entries that are counted at most behind the place where a new group begins.
MOST_COUNTED = 1_000


#: What an entry consists of; what is too large to be read whole is :class:`.Large`.
Fields = Mapping[bytes | Large, bytes | Large]


class GroupGoneError(Exception):
    """A stream or its group was deleted: Redis was flushed, or restarted without its data."""


class Entry(NamedTuple):
    """An entry of a stream as it came; ``fields`` is ``None`` if it was trimmed meanwhile."""

    name: str
    id: str
    fields: Fields | None

    def size(self) -> int:
        """Return the bytes of its fields."""
        fields = self.fields or {}
        return sum(map(len, fields)) + sum(map(len, fields.values()))


@dataclass(frozen=True, slots=True)
class Pending:
    """An entry that was delivered and is not acknowledged."""

    id: str
    consumer: str
    #: Milliseconds since it was delivered, or claimed, or its claim renewed.
    idle: int
    #: How often it was delivered.
    times: int


@dataclass(frozen=True, slots=True)
class Position:
    """How far a group has come in its stream."""

    #: The last entry that was delivered.
    delivered: str
    #: The first and the last entry that the stream has, or had.
    first: str
    last: str
    #: Entries that were trimmed before they were delivered; ``None`` where Redis has no count.
    trimmed: int | None
    #: True if the stream begins after the last delivered entry.
    is_behind: bool
    #: Entries that Redis does not count as read although the group has passed them: Redis 7.0
    #: leaves out what was trimmed unread. 0 while the group is behind.
    miscounted: int = 0


class Group:
    """The consumer group of a service on each of its streams, as one consumer sees it.

    :param pipe: its connection; one thread at a time.
    :param consumer: this process, as ``XINFO CONSUMERS`` shows it.
    :param unlisted: the streams whose pending entries Redis does not list, where several objects
        share what they know of it.
    :param max_bytes: the size of the largest event.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        keys: StreamKeys,
        service: str,
        consumer: str,
        max_bytes: int,
        unlisted: set[str] | None = None,
    ) -> None:
        self.pipe = pipe
        self.unlisted = set() if unlisted is None else unlisted
        self._keys = keys
        self._service = service
        self._consumer = consumer
        self._max_bytes = max_bytes
        #: Entries that are looked up in one round trip: one, after an answer that was lost.
        self._page = LOOK_UP

    def join(self, starts: Mapping[str, str]) -> dict[str, Exception | None]:
        """Make the group on each stream where there is none; what refused it, by name.

        :param starts: where a new group begins, by the stream's signal. A group that is there
            is left where it is.
        :return: ``None`` where the group was made or was there.
        :raises redis.ConnectionError: Redis is away.
        """
        if not starts:
            return {}

        places = self._places(starts)
        refusals = self._make(places)
        # Redis 6.2 does not know ENTRIESREAD.
        again = {name: places[name][:1] for name in refusals if len(places[name]) > 1}
        refusals.update(self._make(again) if any(refusals[name] for name in again) else {})
        return refusals

    def _make(self, places: Mapping[str, Command]) -> dict[str, Exception | None]:
        """Make the group on each stream, at an id and with the options that follow it."""
        commands: list[Command] = []

        for name, (id, *options) in places.items():
            key = self._keys.stream(name)
            create: Command = ("XGROUP", "CREATE", key, self._service, id, "MKSTREAM", *options)
            commands.append(create)
            commands.append(("SADD", self._keys.names, name))
            # For those who look: before Redis 7.2 its first entry would make it.
            commands.append(("XGROUP", "CREATECONSUMER", key, self._service, self._consumer))

        answers = self.pipe.run(commands)
        return {
            name: answer if _is_refusal(answer) else None
            for name, answer in zip(places, answers[::3], strict=True)
        }

    def _places(self, starts: Mapping[str, str]) -> dict[str, Command]:
        """Return the id at which each group begins, with ``ENTRIESREAD`` for one that is new.

        With that number Redis counts what is trimmed before the group reads for the first time.
        """
        asked = self.pipe.run([("XINFO", "GROUPS", self._keys.stream(name)) for name in starts])
        new = [
            name
            for name, groups in zip(starts, asked, strict=True)
            if _is_missing(groups) or not self._is_among(groups)
        ]
        infos = (
            self.pipe.run(
                [("XINFO", "STREAM", self._keys.stream(name)) for name in new], most=SAMPLE
            )
            if new
            else []
        )
        places: dict[str, Command] = {name: (start,) for name, start in starts.items()}
        places.update(
            {
                name: self._place(name, starts[name], info)
                for name, info in zip(new, infos, strict=True)
            }
        )
        return places

    def _is_among(self, groups: Any) -> bool:
        """Return True if this group is one of ``groups``, or Redis refuses to list them."""
        if isinstance(groups, Exception):
            return True

        return any(_as_dict(found)["name"] == self._service.encode() for found in groups)

    def _place(self, name: str, start: str, info: Any) -> Command:
        if _is_missing(info):
            return ("0-0", "ENTRIESREAD", 0)

        if isinstance(info, Exception):
            return (start,)

        stream = _as_dict(info)
        last = entry_id(stream.get("last-generated-id", b"0-0"))
        # An id, and not "$": what is added meanwhile is new to the group.
        place = last if start == "$" else entry_id(start)
        read = self._count_before(name, stream, place, last)
        return (id_text(place), *(() if read is None else ("ENTRIESREAD", read)))

    def _count_before(
        self, name: str, stream: Mapping[str, Any], place: EntryId, last: EntryId
    ) -> int | None:
        """Return how many entries were ever added up to ``place``; ``None`` if that is unknown."""
        added: int | None = stream.get("entries-added")
        first = stream.get("first-entry")

        if added is None or place > last:
            return None

        if place == last:
            return added

        if first is None or place < entry_id(first[0]):
            return max(0, added - int(stream["length"]))

        after = self._count_after(name, place)
        return None if after is None else max(0, added - after)

    def _count_after(self, name: str, place: EntryId) -> int | None:
        """Return how many entries lie behind ``place``; ``None`` if they are too many to count."""
        count, start = 0, place

        while count <= MOST_COUNTED:
            head: Command = ("XRANGE", self._keys.stream(name), f"({id_text(start)}", "+")
            (page,) = self._run([(*head, "COUNT", PAGE)], most=SAMPLE)
            count += len(page)

            if len(page) < PAGE:
                return count

            start = entry_id(page[-1][0])

        return None

    def read(self, names: Sequence[str], *, count: int, block: float) -> list[Entry]:
        """New entries of streams, up to ``count`` of each; often none.

        :param block: seconds to wait for one.
        :raises GroupGoneError: a stream or its group is not there any more.
        :raises redis.ResponseError: Redis refuses.
        """
        keys = [self._keys.stream(name) for name in names]
        head: Command = ("XREADGROUP", "GROUP", self._service, self._consumer, "COUNT", count)
        wait = ("BLOCK", int(block * 1000)) if block else ()
        return self._entries(self._asked(*head, *wait, "STREAMS", *keys, *(">" for _ in keys)))

    def try_to_read(self, name: str) -> None:
        """Find out whether a stream may be read, and read nothing.

        :raises GroupGoneError: the stream or its group is not there.
        :raises redis.ResponseError: Redis refuses.
        """
        # What this consumer has pending behind all of it.
        head: Command = ("XREADGROUP", "GROUP", self._service, self._consumer, "COUNT", 1)
        self._asked(*head, "STREAMS", self._keys.stream(name), LAST_ID)

    def pending(
        self, name: str, *, idle: float = 0.0, consumer: str = "", most: int | None = None
    ) -> list[Pending]:
        """What was delivered and is not acknowledged, oldest first, all of it.

        Nothing where Redis does not list it, which is logged: a worker does its work without.

        :param idle: seconds that it is idle at least.
        :param consumer: whose; everybody's by default.
        :param most: after how many there is no more looking.
        :raises GroupGoneError: the stream or its group is not there any more.
        """
        try:
            found = self._pending(name, idle, consumer, most)
        except redis.ResponseError as error:
            if not lacks_command(error):
                raise

            self._note_unlisted(name, error)
            return []

        if name in self.unlisted:
            self.unlisted.discard(name)
            logger.warning(
                "Redis shows %r again which events of %r are pending.",
                self._service,
                name,
                extra={"signal": name, "service": self._service},
            )

        return found

    def _note_unlisted(self, name: str, error: Exception) -> None:
        if name in self.unlisted:
            return

        self.unlisted.add(name)
        logger.warning(
            "Redis does not show %r which events of %r are pending: %s. What a worker leaves, "
            "because it ends, dies or loses its connection, waits until Redis does. %s",
            self._service,
            name,
            error,
            remedy(error, {self._keys.stream(name): "+xpending"}),
            extra={"signal": name, "service": self._service},
        )

    def _pending(self, name: str, idle: float, consumer: str, most: int | None) -> list[Pending]:
        found: list[Pending] = []
        start = "-"

        while True:
            head: Command = ("XPENDING", self._keys.stream(name), self._service)
            page = self._asked(
                *(*head, "IDLE", int(idle * 1000), start, "+", PAGE),
                *([consumer] if consumer else []),
            )
            found += [
                Pending(id.decode(), owner.decode(errors="replace"), idle_ms, times)
                for id, owner, idle_ms, times in page
            ]

            if len(page) < PAGE or (most is not None and len(found) >= most):
                return found

            start = f"({found[-1].id}"

    def own_pending(self, name: str) -> list[Pending]:
        """What this consumer has not acknowledged."""
        return self.pending(name, consumer=self._consumer)

    def remedy(self, name: str, reason: Exception) -> str:
        """What to do about a refusal of its stream: a sentence."""
        if takes_no_writes(reason):
            return (
                "Redis takes no writes now, and to read for a group is a write: events wait in the "
                "stream, and are read within seconds once Redis takes writes again."
            )

        return remedy(reason, {self._keys.stream(name): RIGHTS})

    def worker_remedy(self, name: str, reason: Exception) -> str:
        """What to do about a refusal of what a worker does after it has read: a sentence."""
        keys, service = self._keys, self._service
        return remedy(
            reason,
            {
                keys.stream(name): RIGHTS,
                keys.retry(name, service): RETRY_RIGHTS,
                keys.dead(name, service): "+xadd +xtrim",
            },
        )

    def look_up(self, name: str, ids: Sequence[str]) -> list[Entry]:
        """The entries with these ids, without fields where they are trimmed.

        What is larger than the largest event is not kept: a worker that ends for want of memory
        would leave it to the next one, which would end as well.
        """
        key = self._keys.stream(name)
        answers: list[Any] = []
        # Redis cuts a client off whose answers take too much: then one by one, the next time.
        count, self._page = self._page, 1

        for start in range(0, len(ids), count):
            commands: list[Command] = [("XRANGE", key, id, id) for id in ids[start : start + count]]
            answers += self._run(commands, most=self._max_bytes)

        self._page = LOOK_UP
        return [
            Entry(name, id, _fields(answer[0][1]) if answer else None)
            for id, answer in zip(ids, answers, strict=True)
        ]

    def claim(self, name: str, pending: Sequence[Pending], *, idle: float) -> set[str]:
        """Take over what is still idle, and return the ids of what is this consumer's now.

        It counts as delivered as often as before: nobody has begun with it yet.
        """
        return self._claim(name, pending, idle=idle, times=lambda found: found.times)

    def record_start(self, name: str, id: str, *, times: int) -> bool:
        """Note in Redis that the receivers of an entry begin, if it is still this consumer's.

        :param times: how often it was delivered then.
        """
        head: Command = ("XPENDING", self._keys.stream(name), self._service)

        if not self._asked(*head, id, id, 1, self._consumer):
            return False

        mine = [Pending(id, self._consumer, 0, times)]
        return bool(self._claim(name, mine, idle=0.0, times=lambda found: times))

    def renew(self, name: str, ids: Sequence[str]) -> set[str]:
        """Keep entries that are this consumer's, and return their ids."""
        owned = {found.id: found for found in self.own_pending(name)}

        if name in self.unlisted:
            # Nobody can tell whether another worker has them; the counts stay as they are.
            head = ("XCLAIM", self._keys.stream(name), self._service, self._consumer)
            return {id.decode() for id in self._asked(*head, 0, *ids, "JUSTID") if id}

        mine = [owned[id] for id in ids if id in owned]
        self._claim(name, mine, idle=0.0, times=lambda found: found.times)
        return {found.id for found in mine}

    def release(self, name: str, begun: Mapping[str, int], *options: str) -> None:
        """Hand back entries of this consumer, for others to claim at once.

        :param begun: how often each was begun by workers that did not end it, by its id.
        :param options: ``"FORCE"`` for entries that are pending for nobody.
        """
        head: Command = ("XCLAIM", self._keys.stream(name), self._service, RELEASED, 0)

        for times in set(begun.values()):
            ids = [id for id, count in begun.items() if count == times]
            tail: Command = ("IDLE", LONG_IDLE, "RETRYCOUNT", times, *options, "JUSTID")

            for start in range(0, len(ids), PAGE):
                self._asked(*head, *ids[start : start + PAGE], *tail)

    def leave(self, name: str) -> None:
        """Take this consumer out of the group, if nothing is pending for it."""
        if not self.own_pending(name):
            self.remove(name, self._consumer)

    def remove(self, name: str, consumer: str) -> int:
        """Take a consumer out of the group; return how many entries it had after all.

        Redis forgets them with the consumer. It may have read them since somebody looked, so they
        are listed in the same transaction, and handed back. Where they cannot be, it stays.
        """
        if name in self.unlisted:
            return 0

        key = self._keys.stream(name)
        answers = self._run(
            [
                ("MULTI",),
                ("XPENDING", key, self._service, "-", "+", MOST_PENDING, consumer),
                ("XGROUP", "DELCONSUMER", key, self._service, consumer),
                ("EXEC",),
            ]
        )[-1]

        for answer in answers:
            if isinstance(answer, Exception):
                raise _meaning(answer) from answer

        lost = {id.decode(): times if times > 1 else 0 for id, _, _, times in answers[0]}
        self.release(name, lost, "FORCE")
        return len(lost)

    def report_alive(self, name: str) -> None:
        """Let Redis note that this consumer lives: before Redis 7.2, waiting is not noted."""
        self.try_to_read(name)

    def consumers(self, name: str) -> list[tuple[str, int, float]]:
        """The consumers of the group, with how much they have pending and the seconds they idle."""
        answer = self._asked("XINFO", "CONSUMERS", self._keys.stream(name), self._service)
        found = [_as_dict(item) for item in answer]
        return [
            (item["name"].decode(errors="replace"), item["pending"], item["idle"] / 1000)
            for item in found
        ]

    def position(self, name: str) -> Position | None:
        """How far the group has come; ``None`` if there is no stream, or no group.

        :raises redis.ResponseError: its user may not ask, or Redis lacks the command.
        """
        key = self._keys.stream(name)
        # XINFO STREAM tells the first entry and the last one, whole.
        commands: list[Command] = [("XINFO", "STREAM", key), ("XINFO", "GROUPS", key)]
        stream, groups = self.pipe.run(commands, most=self._max_bytes)

        for answer in (stream, groups):
            if isinstance(answer, Exception):
                if lacks_command(answer):
                    raise answer

                return None

        for group in map(_as_dict, groups):
            if bytes(group["name"]) == self._service.encode():
                return _position(_as_dict(stream), group)

        return None

    def counts_trimmed_as_read(self, name: str) -> bool:
        """Return True if Redis counts as read what was trimmed unread: 7.2 and later, and Valkey.

        Known by what came with it, the time since a consumer last got an entry.
        """
        key = self._keys.stream(name)
        consumers = self.pipe.run([("XINFO", "CONSUMERS", key, self._service)])[0]
        return isinstance(consumers, list) and any(b"inactive" in found for found in consumers)

    def record_trimmed(self, name: str, place: str, count: int, *, anywhere: bool) -> int | None:
        """Note that entries were trimmed before the group got them, for its other workers.

        :param place: where the group stands, before the entries that are lost.
        :param anywhere: whether what was noted at other places counts as well.
        :return: how many entries a worker had noted; ``None`` if none had, or Redis refuses.
        """
        key = self._keys.trimmed(name, self._service)
        done = self.pipe.run(
            [
                ("MULTI",),
                ("HMGET", key, "place", "count"),
                ("HSET", key, "place", place, "count", count),
                ("EXPIRE", key, REPORT_KEPT),
                ("EXEC",),
            ]
        )[-1]

        if not isinstance(done, list) or not isinstance(done[0], list) or done[0][1] is None:
            return None

        where, noted = done[0]
        return int(noted) if anywhere or where.decode() == place else None

    def record_alarm(self, name: str, text: str) -> None:
        """Note what somebody did to entries of the group, for ``status`` and ``check``."""
        key = self._keys.tampered(name, self._service)
        self._run([("HSET", key, "alarm", text), ("EXPIRE", key, REPORT_KEPT)])

    def pending_command(self, name: str, id: str) -> Command:
        """The command whose answer is empty if an entry is pending for nobody."""
        return ("XPENDING", self._keys.stream(name), self._service, id, id, 1)

    def released_command(self, name: str) -> Command:
        """The command whose answer is empty if no entry was handed back."""
        return ("XPENDING", self._keys.stream(name), self._service, "-", "+", 1, RELEASED)

    def acknowledge_command(self, name: str, ids: Iterable[str]) -> Command:
        """The command that tells that entries are handled."""
        return ("XACK", self._keys.stream(name), self._service, *ids)

    def restore_command(self, name: str, id: str, *, times: int) -> Command:
        """The command that makes an entry pending for this consumer that was acknowledged.

        :param times: how often it was delivered.
        """
        head: Command = ("XCLAIM", self._keys.stream(name), self._service, self._consumer)
        return (*head, 0, id, "RETRYCOUNT", times, "FORCE", "JUSTID")

    def _claim(
        self,
        name: str,
        pending: Sequence[Pending],
        *,
        idle: float,
        times: Callable[[Pending], int],
    ) -> set[str]:
        """One command for all that are to have the same count."""
        counts: dict[int, list[str]] = {}

        for found in pending:
            counts.setdefault(times(found), []).append(found.id)

        head = ("XCLAIM", self._keys.stream(name), self._service, self._consumer)
        commands: list[Command] = [
            (*head, int(idle * 1000), *ids, "RETRYCOUNT", count, "JUSTID")
            for count, ids in counts.items()
        ]
        return {id.decode() for answer in self._run(commands) for id in answer if id}

    def _run(self, commands: Sequence[Command], *, most: int | None = None) -> list[Any]:
        answers = self.pipe.run(commands, most=most) if commands else []

        for answer in answers:
            if isinstance(answer, Exception):
                raise _meaning(answer) from answer

        return answers

    def _asked(self, *command: str | bytes | int | float) -> Any:
        return self._run([command])[0]

    def _entries(self, answer: Any) -> list[Entry]:
        found: list[Entry] = []

        for key, entries in answer or ():
            name = self._keys.name(key.decode())
            found += [Entry(name, id.decode(), _fields(fields)) for id, fields in entries]

        return found


def last_id(info: Any) -> str | None:
    """The id that a stream gave last, of an answer of ``XINFO STREAM``; ``None`` if none tells."""
    if isinstance(info, Exception):
        return "0-0" if "no such key" in str(info) else None

    return str(_as_dict(info)["last-generated-id"].decode())


def lacks_command(reason: Exception) -> bool:
    """Return True if a user may not use a command, or the server does not have it."""
    return isinstance(reason, redis.exceptions.NoPermissionError) or str(reason).startswith(
        ("unknown command", "unknown subcommand")
    )


def passed(info: Any, position: str) -> int | None:
    """Return how many entries were added up to the next one that a reader at ``position`` gets.

    ``None`` where it is in the middle of the stream, and where the server does not count.
    """
    stream = _as_dict(info)
    added: int | None = stream.get("entries-added")
    first = stream["first-entry"]

    if added is None or position == stream["last-generated-id"].decode():
        return added

    if first is None or behind(position, first[0].decode()):
        return added - int(stream["length"])

    return None


def remedy(reason: object, rights: Mapping[str, str]) -> str:
    """What to do about a refusal: a sentence.

    :param rights: what a user needs, by the key that it needs it for.
    """
    if isinstance(reason, redis.exceptions.NoPermissionError) or "NOPERM" in str(reason):
        selectors = " ".join(f"({needed} ~{key})" for key, needed in rights.items())
        return f"Grant its user {selectors} in the ACL."

    if str(reason).startswith("unknown command"):
        return (
            "Take it out of 'rename-command' in the server's configuration, or use Redis 6.2 or "
            "later."
        )

    if "WRONGTYPE" in str(reason):
        keys = " or ".join(map(repr, rights))
        return (
            f"Another program keeps something else under {keys}: remove it there, or choose "
            "another 'EVENTBUS_PREFIX'."
        )

    if str(reason).startswith(("OOM", "command not allowed when used memory")):
        return "Raise its 'maxmemory', or free memory."

    if str(reason).startswith("NOREPLICAS"):
        return "Start its replicas, or lower its 'min-replicas-to-write'."

    if str(reason).startswith("MISCONF"):
        return "Its log says why it cannot save."

    return "Correct what it complains of."


def fields_of(flat: Any) -> Fields:
    """The fields of an entry as Redis answers them: names and values, one after the other."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _is_refusal(answer: Any) -> bool:
    # A group that is there already is what was wanted.
    return isinstance(answer, Exception) and not str(answer).startswith("BUSYGROUP")


def _is_missing(answer: Any) -> bool:
    return isinstance(answer, Exception) and "no such key" in str(answer)


def _meaning(error: Exception) -> Exception:
    # redis-py takes "ERR" off.
    gone = ("NOGROUP", "UNBLOCKED", "no such key", "The XGROUP subcommand requires the key")
    return GroupGoneError(str(error)) if str(error).startswith(gone) else error


def _fields(flat: Any) -> Fields | None:
    if flat and len(flat) == 2:
        return {flat[0]: flat[1]}

    return None if flat is None else fields_of(flat)


def _as_dict(flat: Any) -> dict[str, Any]:
    return {key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)}


def _position(stream: Mapping[str, Any], group: Mapping[str, Any]) -> Position:
    entry = stream.get("first-entry")
    # fakeredis leaves it out of a stream that is empty.
    last = stream.get("last-generated-id", b"0-0").decode()
    first = entry[0].decode() if entry else last
    delivered = group["last-delivered-id"].decode()
    is_behind = behind(delivered, first)
    return Position(
        delivered,
        first,
        last,
        _trimmed(stream, group, is_behind),
        is_behind,
        0 if is_behind else _miscounted(stream, group, is_at_end=delivered == last),
    )


def _miscounted(stream: Mapping[str, Any], group: Mapping[str, Any], *, is_at_end: bool) -> int:
    added: int | None = stream.get("entries-added")
    read: int | None = group.get("entries-read")

    if added is None or read is None:
        return 0

    passed = added if is_at_end else added - int(stream["length"])
    return max(0, passed - read)


def _trimmed(stream: Mapping[str, Any], group: Mapping[str, Any], is_behind: bool) -> int | None:
    """Entries that were taken out of the stream before the group had them."""
    if not is_behind:
        return 0

    added: int | None = stream.get("entries-added")
    read: int | None = group.get("entries-read")

    # Redis 6.2 counts neither; a group that was made at the very beginning has lost nothing yet.
    if added is None or (read is None and group["last-delivered-id"] == b"0-0"):
        return 0

    gone = added - int(stream["length"])

    if read is None:
        return None if gone else 0

    return max(0, gone - read)


def behind(id: str, other: str) -> bool:
    """Return True if the entry ``id`` comes before the entry ``other``."""
    return entry_id(id) < entry_id(other)
