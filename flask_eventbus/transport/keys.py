"""Redis key names of channels, streams, retries and dead letters."""

from __future__ import annotations


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

    def name(self, key: str) -> str:
        """Return the name of the signal that a stream belongs to."""
        return key[self._cut]
