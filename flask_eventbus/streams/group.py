"""The Redis commands of a service's consumer group, one method for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import redis

from ..codec.records import EntryId, entry_id, id_text
from ..config import TIMING, Timing
from ..logs import get_logger
from ..transport.connection import takes_no_writes
from ..transport.keys import DEAD, GROUP, RETRIES, TRANSACTION, StreamKeys, remedy
from ..transport.pipe import SAMPLE, Command, Large, Pipe
from .alarms import Position, as_dict, position_of

logger = get_logger(__name__)

#: Consumer that owns released entries. No worker has this name; every worker may claim them.
RELEASED = "released"

#: Idle time of a released entry, in milliseconds. No other entry is idle for so long, so a claim
#: with this minimum takes released entries only, and only one worker gets each.
LONG_IDLE = 2**31 - 1

#: The second largest entry id. Redis reads the largest one as ``>``.
LAST_ID = f"{2**64 - 1}-{2**64 - 2}"

#: Maximum number of entries that one round trip looks up. Redis buffers all its answers.
LOOK_UP = 16

#: Maximum number of pending entries that are listed when a consumer is removed.
MAX_PENDING = 10_000

#: Seconds for which Redis keeps the reports of workers.
REPORT_KEPT = 24 * 60 * 60


#: Names and values of an entry's fields in turn, as Redis returns them. A name or value that is too
#: large to read is a :class:`.Large`.
Fields = Sequence[bytes | Large]


class GroupGoneError(Exception):
    """The stream or its group does not exist: Redis was flushed, or lost its data."""


class Entry(NamedTuple):
    """A stream entry as Redis returned it; ``fields`` is ``None`` if it was trimmed."""

    name: str
    id: str
    fields: Fields | None

    def size(self) -> int:
        """Return the size of the fields in bytes."""
        fields = self.fields or ()
        # Almost every entry has one field.
        return len(fields[0]) + len(fields[1]) if len(fields) == 2 else sum(map(len, fields))

    def by_name(self) -> dict[bytes | Large, bytes | Large]:
        """Return the value of each field by its name."""
        fields = self.fields or ()
        return dict(zip(fields[::2], fields[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Pending:
    """An entry that was delivered and not acknowledged, as ``XPENDING`` lists it."""

    id: str
    consumer: str
    #: Milliseconds since the entry was delivered or claimed, or the claim was renewed.
    idle: int
    #: Number of deliveries.
    times: int


class Group:
    """The consumer group of a service on each of its streams, used as one consumer.

    :param pipe: the connection. Only one thread may use it at a time.
    :param consumer: the consumer name of this process, as ``XINFO CONSUMERS`` shows it.
    :param unlisted: names of the streams whose pending entries this user may not list. Groups on
        different connections share this set.
    :param max_bytes: maximum size of an event in bytes.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        keys: StreamKeys,
        service: str,
        consumer: str,
        max_bytes: int,
        timing: Timing = TIMING,
        unlisted: set[str] | None = None,
    ) -> None:
        self.pipe = pipe
        self.unlisted = set() if unlisted is None else unlisted
        self._keys = keys
        #: The key of a stream by its name, and the name by its key. Each is worked out once.
        self._key = cache(keys.stream)
        self._name_of = cache(keys.name)
        self._service = service
        self._consumer = consumer
        self._max_bytes = max_bytes
        self._timing = timing
        #: Number of entries to look up in the next round trip; 1 after an answer was lost.
        self._page = LOOK_UP

    def join(self, starts: Mapping[str, str]) -> dict[str, Exception | None]:
        """Create the group on each stream that has none.

        :param starts: the id at which a new group starts, by signal; not empty. An existing group
            keeps its position.
        :return: by signal, the error if Redis refused, or ``None`` if the group exists now.
        :raises redis.ConnectionError: Redis is unreachable.
        """
        places = self._start_arguments(starts)
        refusals = self._create(places)
        # Redis 6.2 does not support ENTRIESREAD.
        again = {name: places[name][:1] for name in starts if refusals[name] and places[name][1:]}
        return {**refusals, **self._create(again)} if again else refusals

    def _create(self, places: Mapping[str, Command]) -> dict[str, Exception | None]:
        """Create the group on each stream, at an id and with the options after it."""
        commands: list[Command] = []

        for name, (id, *options) in places.items():
            key = self._key(name)
            commands += [
                ("XGROUP", "CREATE", key, self._service, id, "MKSTREAM", *options),
                ("SADD", self._keys.names, name),
                # Before Redis 7.2, only reading an entry would create the consumer, and `status`
                # would not show it.
                ("XGROUP", "CREATECONSUMER", key, self._service, self._consumer),
            ]

        answers = self.pipe.run(commands)
        return {
            name: answer if _is_refusal(answer) else None
            for name, answer in zip(places, answers[::3], strict=True)
        }

    def _start_arguments(self, starts: Mapping[str, str]) -> dict[str, Command]:
        """Return the id at which each group starts, with ``ENTRIESREAD`` for a new group.

        From that number Redis counts the entries trimmed before the group first reads.
        """
        places: dict[str, Command] = {name: (start,) for name, start in starts.items()}
        asked = self.pipe.run([("XINFO", "GROUPS", self._key(name)) for name in starts])
        new = [name for name, groups in zip(starts, asked, strict=True) if self._is_new(groups)]

        if new:
            commands: list[Command] = [("XINFO", "STREAM", self._key(name)) for name in new]
            infos = self.pipe.run(commands, most=SAMPLE)

            for name, info in zip(new, infos, strict=True):
                places[name] = self._start_argument(name, starts[name], info)

        return places

    def _is_new(self, groups: Any) -> bool:
        """Return True if a stream has no such group; False if Redis refused to list its groups."""
        if isinstance(groups, Exception):
            return _is_missing(groups)

        return all(as_dict(found)["name"] != self._service.encode() for found in groups)

    def _start_argument(self, name: str, start: str, info: Any) -> Command:
        if _is_missing(info):
            return ("0-0", "ENTRIESREAD", 0)

        if isinstance(info, Exception):
            return (start,)

        stream = as_dict(info)
        last = entry_id(stream.get("last-generated-id", b"0-0"))
        # An id instead of "$", so that the group gets entries added in the meantime.
        place = last if start == "$" else entry_id(start)
        read = self._count_before(name, stream, place, last)
        return (id_text(place), *(() if read is None else ("ENTRIESREAD", read)))

    def _count_before(
        self, name: str, stream: Mapping[str, Any], place: EntryId, last: EntryId
    ) -> int | None:
        """Return the number of entries ever added up to ``place``; ``None`` if unknown."""
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
        """Return the number of entries after ``place``; ``None`` above the limit."""
        count, start = 0, place

        while count <= self._timing.max_counted:
            head: Command = ("XRANGE", self._key(name), f"({id_text(start)}", "+")
            (page,) = self._run([(*head, "COUNT", self._timing.page)], most=SAMPLE)
            count += len(page)

            if len(page) < self._timing.page:
                return count

            start = entry_id(page[-1][0])

        return None

    def read(self, names: Sequence[str], *, count: int, block: float) -> list[Entry]:
        """Return new entries of streams, up to ``count`` from each, or an empty list.

        :param block: maximum time to wait for an entry, in seconds.
        :raises GroupGoneError: if a stream or its group does not exist.
        :raises redis.ResponseError: if Redis refuses the command.
        """
        answer = self._ask(*self._read_command(names, count, block))
        return entries_of(answer, self._name_of)

    def send_read(self, names: Sequence[str], *, count: int, block: float) -> None:
        """Send the command of :meth:`read`; :meth:`receive_read` returns its result."""
        self.pipe.send(self._read_command(names, count, block))

    def receive_read(self) -> list[Entry]:
        """Return the result of :meth:`read` after :meth:`send_read`."""
        (answer,) = _checked([self.pipe.receive()])
        return entries_of(answer, self._name_of)

    def _read_command(self, names: Sequence[str], count: int, block: float) -> Command:
        head: Command = ("XREADGROUP", "GROUP", self._service, self._consumer, "COUNT", count)
        wait = ("BLOCK", int(block * 1000)) if block else ()
        return (*head, *wait, "STREAMS", *map(self._key, names), *[">"] * len(names))

    def try_to_read(self, name: str) -> None:
        """Check that this consumer may read a stream, without reading an entry.

        :raises GroupGoneError: if the stream or its group does not exist.
        :raises redis.ResponseError: if Redis refuses the command.
        """
        self._run([self._empty_read(name)])

    def _empty_read(self, name: str) -> Command:
        # Reads this consumer's pending entries after the last possible id: there are none.
        head: Command = ("XREADGROUP", "GROUP", self._service, self._consumer, "COUNT", 1)
        return (*head, "STREAMS", self._key(name), LAST_ID)

    def to_recover(self, names: Sequence[str]) -> set[str]:
        """Return the streams with entries to take when this consumer joins their groups.

        These are its own pending entries, of a lost answer, and the released ones. One round trip
        asks for all streams.
        """
        commands: list[Command] = []

        for name in names:
            own = ("XPENDING", self._key(name), self._service, "-", "+", 1, self._consumer)
            commands += [self._empty_read(name), own, self.released_command(name)]

        answers = self.pipe.run(commands) if commands else []
        # A refusal counts as found: the call that takes the entries reports it, and its end.
        found = {
            name
            for name, read, own, released in zip(
                names, answers[::3], answers[1::3], answers[2::3], strict=True
            )
            if isinstance(read, Exception) or own or released
        }
        return found | self.unlisted.intersection(names)

    def pending(
        self, name: str, *, idle: float = 0.0, consumer: str = "", most: int | None = None
    ) -> list[Pending]:
        """Return the pending entries of a stream, oldest first.

        If this user may not list them, log a warning and return an empty list. A worker can run
        without the list.

        :param idle: minimum idle time in seconds.
        :param consumer: return only the entries of this consumer; of all consumers if empty.
        :param most: stop once this many entries are found.
        :raises GroupGoneError: if the stream or its group does not exist.
        """
        extra = {"signal": name, "service": self._service}

        try:
            found = self._pending(name, idle, consumer, most)
        except redis.ResponseError as error:
            if not lacks_command(error):
                raise

            if name not in self.unlisted:
                self.unlisted.add(name)
                text = (
                    "Redis does not let %r list the pending events of %r: %s. Events of a worker "
                    "that stopped, died or lost its connection wait until the list is available. %s"
                )
                advice = remedy(error, {self._key(name): "+xpending"})
                logger.warning(text, self._service, name, error, advice, extra=extra)

            return []

        if name in self.unlisted:
            self.unlisted.discard(name)
            text = "Redis lets %r list the pending events of %r again."
            logger.warning(text, self._service, name, extra=extra)

        return found

    def _pending(self, name: str, idle: float, consumer: str, most: int | None) -> list[Pending]:
        found: list[Pending] = []
        start = "-"

        while True:
            head: Command = ("XPENDING", self._key(name), self._service, "IDLE", int(idle * 1000))
            page = self._ask(*head, start, "+", self._timing.page, *filter(None, [consumer]))
            found += [
                Pending(id.decode(), owner.decode(errors="replace"), idle_ms, times)
                for id, owner, idle_ms, times in page
            ]

            if len(page) < self._timing.page or (most is not None and len(found) >= most):
                return found

            start = f"({found[-1].id}"

    def own_pending(self, name: str) -> list[Pending]:
        """Return the pending entries of this consumer."""
        return self.pending(name, consumer=self._consumer)

    def remedy(self, name: str, reason: Exception) -> str:
        """Return one sentence that tells what to do if Redis refuses to read a stream."""
        if takes_no_writes(reason):
            return (
                "Redis accepts no writes now, and reading for a group is a write. The events stay "
                "in the stream and are read within seconds once Redis accepts writes again."
            )

        return remedy(reason, {self._key(name): GROUP})

    def worker_remedy(self, name: str, reason: Exception) -> str:
        """Return one sentence that tells what to do if Redis refuses a worker after a read."""
        keys, service = self._keys, self._service
        return remedy(
            reason,
            {
                keys.stream(name): GROUP,
                keys.retry(name, service): f"{RETRIES} {TRANSACTION}",
                keys.dead(name, service): DEAD,
            },
        )

    def look_up(self, name: str, ids: Sequence[str]) -> list[Entry]:
        """Return the entries with these ids; a trimmed entry has no fields.

        Values above the maximum event size are not kept in memory. An entry that is too large would
        kill this worker, and then each worker that takes the entry over.
        """
        key = self._key(name)
        answers: list[Any] = []
        # Redis disconnects a client whose answers exceed its output buffer. The next call after a
        # lost answer looks up one entry at a time.
        count, self._page = self._page, 1

        for start in range(0, len(ids), count):
            commands: list[Command] = [("XRANGE", key, id, id) for id in ids[start : start + count]]
            answers += self._run(commands, most=self._max_bytes)

        self._page = LOOK_UP
        return [
            Entry(name, id, answer[0][1] if answer else None)
            for id, answer in zip(ids, answers, strict=True)
        ]

    def claim(self, name: str, pending: Sequence[Pending], *, idle: float) -> set[str]:
        """Claim entries that are still idle, and return the ids of those that were claimed.

        :param pending: the entries, each with its new delivery count in ``times``. The count of an
            entry stays as it is until a receiver starts.
        :param idle: minimum idle time in seconds.
        """
        counts: dict[int, list[str]] = {}

        for found in pending:
            counts.setdefault(found.times, []).append(found.id)

        head = ("XCLAIM", self._key(name), self._service, self._consumer)
        commands: list[Command] = [
            (*head, int(idle * 1000), *ids, "RETRYCOUNT", count, "JUSTID")
            for count, ids in counts.items()
        ]
        return {id.decode() for answer in self._run(commands) for id in answer if id}

    def claim_each(self, name: str, pending: Sequence[Pending]) -> set[str]:
        """Claim entries that no one has claimed since they were listed; return their ids."""
        head = ("XCLAIM", self._key(name), self._service, self._consumer)
        answers = self._run(
            [
                (*head, found.idle, found.id, "RETRYCOUNT", found.times, "JUSTID")
                for found in pending
            ]
        )
        return {id.decode() for answer in answers for id in answer if id}

    def record_start(self, name: str, id: str, *, times: int) -> bool:
        """Record in Redis that the receivers of an entry start.

        Return False if the entry is no longer pending for this consumer.

        :param times: the new delivery count.
        """
        head: Command = ("XPENDING", self._key(name), self._service)

        if not self._ask(*head, id, id, 1, self._consumer):
            return False

        return bool(self.claim(name, [Pending(id, self._consumer, 0, times)], idle=0.0))

    def renew(self, name: str, ids: Sequence[str]) -> set[str]:
        """Renew the claim on this consumer's entries, and return the ids it still owns."""
        owned = {found.id: found for found in self.own_pending(name)}

        if name in self.unlisted:
            # Without the list, the owners and the counts are unknown; JUSTID keeps the counts.
            head = ("XCLAIM", self._key(name), self._service, self._consumer)
            return {id.decode() for id in self._ask(*head, 0, *ids, "JUSTID") if id}

        mine = [owned[id] for id in ids if id in owned]
        self.claim(name, mine, idle=0.0)
        return {found.id for found in mine}

    def release(self, name: str, crashes: Mapping[str, int], *options: str) -> None:
        """Release entries, so that other workers can claim them at once.

        :param crashes: by entry id, the number of workers that started the entry and died.
        :param options: ``"FORCE"`` for entries that are not pending for any consumer.
        """
        head: Command = ("XCLAIM", self._key(name), self._service, RELEASED, 0)

        for times in set(crashes.values()):
            ids = [id for id, count in crashes.items() if count == times]
            tail: Command = ("IDLE", LONG_IDLE, "RETRYCOUNT", times, *options, "JUSTID")

            for start in range(0, len(ids), self._timing.page):
                self._ask(*head, *ids[start : start + self._timing.page], *tail)

    def release_own(self, name: str, crashes: Mapping[str, int]) -> None:
        """Release those entries that are still pending for this consumer, see :meth:`release`."""
        own = {found.id for found in self.own_pending(name)}
        self.release(name, {id: times for id, times in crashes.items() if id in own})

    def leave(self, name: str) -> None:
        """Remove this consumer from the group, unless it has pending entries."""
        if not self.own_pending(name):
            self.remove(name, self._consumer)

    def remove(self, name: str, consumer: str) -> int:
        """Remove a consumer from the group; return the number of entries it still had.

        Redis deletes the pending entries of a consumer with it. The consumer may have read since
        the caller looked, so one transaction lists its entries and removes it; then the entries are
        released. If this user may not list them, the consumer stays.
        """
        if name in self.unlisted:
            return 0

        key = self._key(name)
        answers = self._run(
            [
                ("MULTI",),
                ("XPENDING", key, self._service, "-", "+", MAX_PENDING, consumer),
                ("XGROUP", "DELCONSUMER", key, self._service, consumer),
                ("EXEC",),
            ]
        )[-1]

        pending, _ = _checked(answers)
        lost = {id.decode(): times if times > 1 else 0 for id, _, _, times in pending}
        self.release(name, lost, "FORCE")
        return len(lost)

    def report_alive(
        self, names: Sequence[str]
    ) -> dict[str, list[tuple[str, int, float]] | Exception]:
        """Reset the idle time of this consumer, and return the consumers of each group.

        Before Redis 7.2, a read that finds no entry does not reset the idle time.

        :return: name, number of pending entries and idle time in seconds of each consumer, or an
            error, by signal.
        """
        commands = [
            command
            for name in names
            for command in (
                self._empty_read(name),
                ("XINFO", "CONSUMERS", self._key(name), self._service),
            )
        ]
        answers = self.pipe.run(commands)
        found: dict[str, list[tuple[str, int, float]] | Exception] = {}

        for name, *pair in zip(names, answers[::2], answers[1::2], strict=True):
            errors = [_group_error(answer) for answer in pair if isinstance(answer, Exception)]
            found[name] = errors[0] if errors else list(map(_consumer_in, pair[1]))

        return found

    def position(self, name: str) -> Position | None:
        """Return the position of the group; ``None`` if the stream or the group does not exist.

        :raises redis.ResponseError: if the user may not use ``XINFO``, or Redis does not have it.
        """
        position = self.positions([name])[name]

        if isinstance(position, Exception):
            raise position

        return position

    def positions(self, names: Sequence[str]) -> dict[str, Position | Exception | None]:
        """Return the result of :meth:`position` for each stream, or its error."""
        found: dict[str, Position | Exception | None] = {}

        # XINFO STREAM returns the first and the last entry with all fields.
        for start in range(0, len(names), LOOK_UP):
            page = names[start : start + LOOK_UP]
            commands: list[Command] = [
                ("XINFO", part, self._key(name)) for name in page for part in ("STREAM", "GROUPS")
            ]
            answers = self.pipe.run(commands, most=self._max_bytes)
            pairs = zip(answers[::2], answers[1::2], strict=True)
            found.update(
                {name: self._position_in(*pair) for name, pair in zip(page, pairs, strict=True)}
            )

        return found

    def _position_in(self, stream: Any, groups: Any) -> Position | Exception | None:
        for answer in (stream, groups):
            if isinstance(answer, Exception):
                return answer if lacks_command(answer) else None

        for group in map(as_dict, groups):
            if bytes(group["name"]) == self._service.encode():
                return position_of(as_dict(stream), group)

        return None

    def counts_trimmed_as_read(self, name: str) -> bool:
        """Return True if Redis counts trimmed entries as read: 7.2 and later, and Valkey.

        These versions also report the ``inactive`` time of a consumer.
        """
        key = self._key(name)
        consumers = self.pipe.run([("XINFO", "CONSUMERS", key, self._service)])[0]
        return isinstance(consumers, list) and any(b"inactive" in found for found in consumers)

    def record_trimmed(self, name: str, place: str, count: int, *, anywhere: bool) -> int | None:
        """Record in Redis, for all workers, how many entries were trimmed before delivery.

        :param place: position of the group, before the lost entries.
        :param anywhere: if true, a record for another position counts as well.
        :return: the count recorded before; ``None`` if there was none, or Redis refuses.
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
        """Store an alarm about entries of the group, for ``status`` and ``check``."""
        key = self._keys.tampered(name, self._service)
        self._run([("HSET", key, "alarm", text), ("EXPIRE", key, REPORT_KEPT)])

    def pending_command(self, name: str, id: str) -> Command:
        """Return the command whose answer is empty if an entry is not pending."""
        return ("XPENDING", self._key(name), self._service, id, id, 1)

    def idle_command(self, name: str, idle: float) -> Command:
        """Return the command whose answer is empty if no entry is idle for ``idle`` seconds."""
        head: Command = ("XPENDING", self._key(name), self._service)
        return (*head, "IDLE", int(idle * 1000), "-", "+", 1)

    def released_command(self, name: str) -> Command:
        """Return the command whose answer is empty if the group has no released entry."""
        return ("XPENDING", self._key(name), self._service, "-", "+", 1, RELEASED)

    def acknowledge_command(self, name: str, ids: Iterable[str]) -> Command:
        """Return the command that acknowledges entries."""
        return ("XACK", self._key(name), self._service, *ids)

    def restore_command(self, name: str, id: str, *, times: int) -> Command:
        """Return the command that makes an acknowledged entry pending for this consumer again.

        :param times: the delivery count to set.
        """
        head: Command = ("XCLAIM", self._key(name), self._service, self._consumer)
        return (*head, 0, id, "RETRYCOUNT", times, "FORCE", "JUSTID")

    def _run(self, commands: Sequence[Command], *, most: int | None = None) -> list[Any]:
        return _checked(self.pipe.run(commands, most=most)) if commands else []

    def _ask(self, *command: str | bytes | int | float) -> Any:
        return self._run([command])[0]


def _checked(answers: list[Any]) -> list[Any]:
    """Return the answers; raise the first error among them."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise _group_error(answer) from answer

    return answers


def _consumer_in(answer: Any) -> tuple[str, int, float]:
    item = as_dict(answer)
    return item["name"].decode(errors="replace"), item["pending"], item["idle"] / 1000


def entries_of(answer: Any, name_of: Callable[[bytes], str]) -> list[Entry]:
    """Return the entries in an answer to ``XREAD`` or ``XREADGROUP``.

    :param name_of: returns the name of the stream with a key.
    """
    found: list[Entry] = []

    for key, entries in answer or ():
        name = name_of(key)
        found += [Entry(name, id.decode(), fields) for id, fields in entries]

    return found


def read_each(
    names: Sequence[str], read: Callable[..., list[Entry]], *, block: float
) -> tuple[list[Entry], dict[str, Exception]]:
    """Read streams together, or one by one if Redis refuses one of them.

    :param read: reads the streams with these names, and waits up to ``block`` seconds.
    :return: the entries, and by name the errors of the streams that Redis refuses.
    """
    try:
        return read(names, block=block), {}
    except redis.ResponseError as error:
        logger.debug("Redis refuses to read one of the streams: %s", error)

    return read_one_by_one(names, read)


def read_one_by_one(
    names: Sequence[str], read: Callable[..., list[Entry]]
) -> tuple[list[Entry], dict[str, Exception]]:
    """Read each stream by itself without waiting; see :func:`read_each`."""
    entries: list[Entry] = []
    refusals: dict[str, Exception] = {}

    for name in names:
        try:
            entries += read([name], block=0)
        except redis.ResponseError as error:
            refusals[name] = error

    return entries, refusals


def lacks_command(reason: Exception) -> bool:
    """Return True if the user may not use a command, or the server does not have it."""
    return isinstance(reason, redis.exceptions.NoPermissionError) or str(reason).startswith(
        ("unknown command", "unknown subcommand")
    )


def _is_refusal(answer: Any) -> bool:
    # BUSYGROUP: the group exists already.
    return isinstance(answer, Exception) and not str(answer).startswith("BUSYGROUP")


def _is_missing(answer: Any) -> bool:
    return isinstance(answer, Exception) and "no such key" in str(answer)


def _group_error(error: Exception) -> Exception:
    # redis-py removes "ERR" from the text.
    gone = ("NOGROUP", "UNBLOCKED", "no such key", "The XGROUP subcommand requires the key")
    return GroupGoneError(str(error)) if str(error).startswith(gone) else error
