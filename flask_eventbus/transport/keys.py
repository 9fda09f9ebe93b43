"""Redis key names of channels, streams, retries and dead letters."""

from __future__ import annotations


class ChannelKeys:
    """The names of channels: ``PREFIX:{NAME}:channel``."""

    def __init__(self, prefix: str) -> None:
        self._start = f"{prefix}:{{"
        self._end = "}:channel"
        self._cut = slice(len(self._start.encode()), -len(self._end))

    def key(self, name: str) -> str:
        """The channel of the signal ``name``, or the glob of a pattern of names."""
        return f"{self._start}{name}{self._end}"

    def name(self, key: bytes) -> str:
        """The signal whose channel is ``key``."""
        return key[self._cut].decode(errors="replace")


class StreamKeys:
    """The Redis keys of a prefix: all that belongs to a signal has its name as the hash tag."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._start = f"{prefix}:{{"
        self._cut = slice(len(self._start), -len("}:stream"))

    @property
    def names(self) -> str:
        """A set: the signals that have a stream."""
        return f"{self._prefix}:streams"

    def since(self, service: str) -> str:
        """A hash: since when, in milliseconds, a service has subscribed to each of its patterns."""
        return f"{self._prefix}:since:{service}"

    def stream(self, name: str) -> str:
        """A stream: the events of a signal, each an entry with one field, ``event``."""
        return f"{self._start}{name}}}:stream"

    def dead(self, name: str, service: str) -> str:
        """A stream: what a service could not handle."""
        return f"{self._start}{name}}}:dead:{service}"

    def dead_dropped(self, name: str, service: str) -> str:
        """A number: dead letters that were dropped since somebody last deleted all of them."""
        return f"{self.dead(name, service)}:dropped"

    def retry(self, name: str, service: str) -> str:
        """A sorted set: what a service is to try again, by when it is due."""
        return f"{self._start}{name}}}:retry:{service}"

    def seen(self, name: str, service: str, window: int) -> str:
        """A set: the ids of the events that a service got, of one window of time."""
        return f"{self._start}{name}}}:seen:{service}:{window}"

    def trimmed(self, name: str, service: str) -> str:
        """A hash: the last loss that a worker reported, and where its group stood."""
        return f"{self._start}{name}}}:seen:{service}:trimmed"

    def tampered(self, name: str, service: str) -> str:
        """A hash: what somebody else last did to the entries of a service, as an alarm."""
        return f"{self._start}{name}}}:seen:{service}:tampered"

    def name(self, key: str) -> str:
        """The signal whose stream is ``key``."""
        return key[self._cut]
