"""The keys in Redis, the rights in its ACL that the bus needs on them, and remedies.

Logs, commands and ``check`` name the rights from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import redis


class ChannelKeys:
    """Builds and parses channel names of the form ``PREFIX:{NAME}:channel``."""

    def __init__(self, prefix: str) -> None:
        self._start = f"{prefix}:{{"
        self._end = "}:channel"
        self._cut = slice(len(self._start.encode()), -len(self._end))

    def key(self, name: str) -> str:
        """Return the channel of a signal, or the glob for a pattern of signal names."""
        return f"{self._start}{name}{self._end}"

    def name(self, key: bytes) -> str:
        """Return the name of the signal that a channel belongs to."""
        return key[self._cut].decode(errors="replace")


class StreamKeys:
    """Builds the Redis keys of a prefix.

    All keys of one signal have its name as hash tag, so a cluster keeps them on one node.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._start = f"{prefix}:{{"
        self._cut = slice(len(self._start), -len("}:stream"))

    @property
    def names(self) -> str:
        """Key of a set: the names of the signals that have a stream."""
        return f"{self._prefix}:streams"

    def since(self, service: str) -> str:
        """Key of a hash: pattern -> time in milliseconds at which the service subscribed to it."""
        return f"{self._prefix}:since:{service}"

    def stream(self, name: str) -> str:
        """Key of a stream: the events of a signal, each an entry with one field, ``event``."""
        return f"{self._start}{name}}}:stream"

    def dead(self, name: str, service: str) -> str:
        """Key of a stream: the dead letters of a signal and a service."""
        return f"{self._start}{name}}}:dead:{service}"

    def dead_dropped(self, name: str, service: str) -> str:
        """Key of a counter: dead letters dropped since all dead letters were last deleted."""
        return f"{self.dead(name, service)}:dropped"

    def retry(self, name: str, service: str) -> str:
        """Key of a sorted set: the retries of a signal and a service, scored by their due time."""
        return f"{self._start}{name}}}:retry:{service}"

    def seen(self, name: str, service: str, window: int) -> str:
        """Key of a set: ids of the events that a service received in one time window."""
        return f"{self._start}{name}}}:seen:{service}:{window}"

    def trimmed(self, name: str, service: str) -> str:
        """Key of a hash: the last reported loss of entries, and the group's position then."""
        return f"{self._start}{name}}}:seen:{service}:trimmed"

    def tampered(self, name: str, service: str) -> str:
        """Key of a hash: the last foreign change to the entries of a service, as an alarm."""
        return f"{self._start}{name}}}:seen:{service}:tampered"

    def name(self, key: bytes) -> str:
        """Return the name of the signal that a stream belongs to."""
        return key.decode()[self._cut]


#: To publish to a channel, and to listen to one by name or by pattern.
PUBLISH = "+publish"
LISTEN = "+subscribe"
LISTEN_PATTERN = "+psubscribe"

#: To add events to a stream, and to wait for replicas.
ADD = "+xadd"
WAIT = "+wait"

#: On the set with the names of all streams: to add a name, and to find the streams of a pattern.
REGISTER = "+sadd"
SEARCH = "+smembers"

#: On the hash of times at which a service subscribed to patterns.
SINCE = "+hsetnx +hget"

#: To read a stream as a consumer group.
GROUP = (
    "+xgroup|create +xgroup|createconsumer +xgroup|delconsumer +xreadgroup +xack +xclaim +xpending "
    "+xrange +xinfo|stream +xinfo|groups +xinfo|consumers"
)

#: To read a stream without a group: as ``tail`` does, and as a service does in each process.
READ = "+xread +xrevrange"
FOLLOW = f"{READ} +xinfo|stream"

#: On the other keys of a group: retries, dead letters, their counter, known ids.
RETRIES = "+zrangebyscore +zscore +zadd +zrem"
DEAD = "+xadd +xtrim"
DROPPED = "+incrby"
SEEN = "+hmget +hset +expire"

#: Without a key.
TRANSACTION = "+multi +exec"
TIME = "+time"

#: Commands whose rights name their subcommand as well.
_CONTAINERS = ("XINFO", "XGROUP")


def right_of(command: Sequence[object]) -> str:
    """Return the right to a command as the ACL writes it: ``+xadd``, ``+xinfo|stream``."""
    words = command[: 1 + (command[0] in _CONTAINERS)]
    return "+" + "|".join(map(str, words)).lower()


def rule(keys: str, rights: str) -> str:
    """Return an ACL rule for a pattern of keys or channels; an empty one stands for no key."""
    sigil = "&" if keys.endswith("}:channel") else "~"
    return f"{rights} {sigil}{keys}" if keys else rights


def grant_its_user(rights: Mapping[str, str]) -> str:
    """Return the sentence with which the log names missing rights, by the keys they are for."""
    return f"Grant its user {' '.join(f'({rule(*each)})' for each in rights.items())} in the ACL."


def grant_the_user(rights: Mapping[str, str]) -> str:
    """Return the sentence with which a command names missing rights, by the keys they are for."""
    return f"Grant the user in the ACL: {', '.join(repr(rule(*each)) for each in rights.items())}."


def is_missing_right(reason: object) -> bool:
    """Return True if Redis refused a command because the user has no right to it."""
    if isinstance(reason, redis.exceptions.NoPermissionError):
        return True

    # EXEC mentions NOPERM as the reason why the transaction was discarded.
    return "NOPERM" in str(reason) or "no permissions" in str(reason).lower()


def remedy(
    reason: object,
    rights: Mapping[str, str],
    grant: Callable[[Mapping[str, str]], str] = grant_its_user,
) -> str:
    """Return one sentence that tells what to do about an error of Redis.

    :param rights: the ACL rights that the user needs, by key.
    :param grant: makes the sentence if one of them is missing.
    """
    return grant(rights) if is_missing_right(reason) else repair(reason, rights)


def repair(reason: object, keys: Iterable[str]) -> str:
    """Return one sentence that tells what to do about an error that is not a missing right."""
    text = str(reason)

    if "unknown command" in text:
        return (
            "Remove the command from 'rename-command' in the server's configuration, or use Redis "
            "6.2 or later."
        )

    if "WRONGTYPE" in text:
        return (
            f"Another program stores a different type under {' or '.join(map(repr, keys))}. Delete "
            "the key, or set 'EVENTBUS_PREFIX' to another prefix."
        )

    if text.startswith(("OOM", "command not allowed when used memory")):
        return "Raise 'maxmemory' of the server, or free memory."

    if text.startswith("NOREPLICAS"):
        return "Start the replicas, or lower 'min-replicas-to-write' of the server."

    if text.startswith("MISCONF"):
        return "Read in the server's log why it cannot save, and repair that."

    return "Read the server's log, and look up this error in the documentation of Redis."
