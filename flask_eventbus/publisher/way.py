"""How the events of one name go to Redis: the command around their bytes."""

from __future__ import annotations

from typing import Protocol


class TooFewReplicasError(Exception):
    """Redis has an event, and not enough of its replicas do."""


class NoWritesError(Exception):
    """Redis is there, and takes no writes now: it is full, lacks replicas, or cannot save."""


class Way(Protocol):
    """Makes commands of events, for a connection to send as they are."""

    #: The signal's name.
    name: str
    #: The Redis key: a channel or a stream.
    key: str
    #: Whether Redis keeps the events: nothing of it is dropped unseen.
    is_stream: bool
    #: How many replicas are to have an event before it counts as confirmed.
    replicas: int
    #: True if the stream keeps events by their age.
    by_age: bool

    def command(self, body: bytes) -> bytes:
        """The command that publishes an event's bytes, as Redis reads it."""


class ChannelWay:
    """Over a channel: whoever listens now hears it."""

    is_stream = False
    by_age = False
    replicas = 0

    def __init__(self, name: str, key: str) -> None:
        self.name = name
        self.key = key
        self._head = head(3, "PUBLISH", key)

    def command(self, body: bytes) -> bytes:
        """``PUBLISH key body``."""
        return b"%b$%d\r\n%b\r\n" % (self._head, len(body), body)


class StreamWay:
    """Into a stream: kept for those who read it later.

    :param maxlen: about how many entries the stream keeps.
    """

    is_stream = True
    by_age = False

    def __init__(self, name: str, key: str, *, maxlen: int, replicas: int = 0) -> None:
        self.name = name
        self.key = key
        self.replicas = replicas
        self._head = head(8, "XADD", key, "MAXLEN", "~", str(maxlen)) + _FIELD

    def command(self, body: bytes) -> bytes:
        """``XADD key MAXLEN ~ n * event body``."""
        return b"%b$%d\r\n%b\r\n" % (self._head, len(body), body)


class AgingStreamWay:
    """Into a stream that keeps what is younger than an age, by Redis's clock.

    The clock of this machine may be wrong, and would remove what others have yet to read.

    :param age: seconds.
    """

    is_stream = True
    by_age = True

    def __init__(self, name: str, key: str, *, age: int, replicas: int = 0) -> None:
        self.name = name
        self.key = key
        self.replicas = replicas
        self._age_ms = age * 1_000
        #: The time of Redis, in milliseconds since 1970, or of the last id that it gave;
        #: ``None`` until something is known, and nothing is trimmed.
        self.newest: int | None = None
        self._head = head(8, "XADD", key, "MINID", "~")

    def command(self, body: bytes) -> bytes:
        """``XADD key MINID ~ ms * event body``."""
        oldest = b"%d" % max(0, (self.newest or 0) - self._age_ms)
        start = b"%b$%d\r\n%b\r\n" % (self._head, len(oldest), oldest)
        return b"%b%b$%d\r\n%b\r\n" % (start, _FIELD, len(body), body)


def head(count: int, *words: str) -> bytes:
    """The first words of a command of ``count`` words."""
    return b"*%d\r\n" % count + b"".join(map(_word, words))


def whole(*words: str) -> bytes:
    """A command."""
    return head(len(words), *words)


def _word(word: str) -> bytes:
    raw = word.encode()
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


#: The id is Redis's to give, and what follows is the value of the only field.
_FIELD = _word("*") + _word("event")
