"""The settings, each a field of :class:`Config`, and the times that users do not set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any

from .errors import ConfigError
from .text import did_you_mean, seconds_of

Reader = Callable[[str, Any], Any]
"""Returns the checked value of a setting; it gets the name of the setting, for the error."""

#: A valid name of a service, which receivers get as ``sender``.
SERVICE_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)

#: A valid name of a signal.
SIGNAL_NAME = re.compile(r"\w[\w./-]{0,127}", re.ASCII)

_PREFIX = re.compile(r"[\w.:/-]{1,128}", re.ASCII)

_SCHEMES = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "embedded",
    "memory",
)

#: Largest number of retries of a receiver; with the longest backoff they take a month.
MAX_RETRIES = 10_000

#: Largest number of replicas that can confirm an event.
MAX_REPLICAS = 100

#: Settings of features that this version does not have. They are refused, not ignored.
_NOT_YET = {
    "EVENTBUS_SIGNING_KEY": "signed events",
    "EVENTBUS_SIGNING_KEY_FALLBACKS": "signed events",
}

#: Environment variables that Kubernetes sets for a Service whose name begins with ``eventbus``. If
#: the name could also be a setting, the value decides.
_SERVICE_LINK = re.compile(
    r"EVENTBUS(_\w+?)??_(SERVICE_HOST|SERVICE_PORT(_\w+)?|(?P<address>PORT(_\d+_(TCP|UDP|SCTP))?)"
    r"|PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR))"
)

#: The words for True and False in the environment.
_WORDS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


@dataclass(frozen=True, slots=True)
class Age:
    """The age of the oldest event that a stream keeps."""

    seconds: int


def _read_structure(key: str, value: Any) -> Any:
    """Return lists and mappings unchanged; parse a string as one of them."""
    if not isinstance(value, str):
        return value

    if not value.lstrip().startswith(("[", "{", '"')):
        return [part.strip() for part in value.split(",") if part.strip()]

    try:
        return json.loads(value)
    except ValueError as error:
        raise ConfigError(
            f"{key!r} is {value!r}, which is not JSON: {error}. Write a JSON list or object, or "
            "names separated by commas."
        ) from error


def _wrong(key: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"{key!r} is {value!r}. {remedy}")


def _read_name(key: str, value: Any, pattern: re.Pattern[str], remedy: str) -> str:
    # JSON turns a name of digits into a number.
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    if isinstance(name, str) and pattern.fullmatch(name):
        return name

    raise _wrong(key, value, remedy)


_read_service = partial(
    _read_name,
    pattern=SERVICE_NAME,
    remedy="A service's name is made of letters, digits, '_', '-' and '.', at most 64 of them, for "
    "example 'accounts'.",
)

_read_prefix = partial(
    _read_name,
    pattern=_PREFIX,
    remedy="A prefix is made of letters, digits, '_', '-', '.', ':' and '/', for example "
    "'eventbus'.",
)


def _read_url(key: str, value: Any) -> str:
    scheme, separator, _ = str(value).partition("://")

    if isinstance(value, str) and separator and scheme in _SCHEMES:
        return value

    # The value may hold a password: only its scheme is shown.
    what = f"begins with {scheme!r}" if separator else "has no '://'"
    raise ConfigError(
        f"{key!r} {what}, so it is not a URL of Redis. Begin it with one of "
        + ", ".join(f"'{known}://'" for known in _SCHEMES)
        + ", for example 'redis://localhost:6379/0'."
    )


def _read_flag(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value

    # JSON turns 0 and 1 in the environment into numbers.
    if isinstance(value, str | int) and str(value).lower() in _WORDS:
        return _WORDS[str(value).lower()]

    raise _wrong(key, value, "Set it to True or False.")


def read_whole(key: str, value: Any, least: int, most: int) -> int:
    """Read a whole number from ``least`` to ``most``.

    :raises ConfigError: ``value`` is not such a number.
    """
    number = int(value) if isinstance(value, str) and value.isdecimal() else value

    if isinstance(number, int) and not isinstance(number, bool) and least <= number <= most:
        return number

    raise _wrong(key, value, f"Set it to a whole number from {least:,} to {most:,}.")


def _read_seconds(key: str, value: Any, least: float, most: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0

    if not isinstance(value, bool) and least <= number <= most:
        return number

    raise _wrong(key, value, f"Set it to a number of seconds from {least} to {most:,}.")


def _read_on_outage(key: str, value: Any) -> str:
    if value in ("buffer", "raise"):
        return str(value)

    raise _wrong(
        key,
        value,
        "Set it to 'buffer' (keep events in memory until Redis is back) or 'raise' (send() raises "
        "PublishError).",
    )


def _read_receivers(key: str, value: Any) -> tuple[str, ...]:
    value = _read_structure(key, value)

    if isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value):
        return tuple(value)

    raise _wrong(
        key,
        value,
        "Set it to a list of module names, for example ['mailer.receivers'], or of folders, for "
        "example ['plugins/'].",
    )


def read_maxlen(key: str, value: Any) -> int | Age:
    """Read how much a stream keeps: a number of events, or an age such as ``"7d"`` or ``"12h"``.

    :param key: the name of the setting, for the error.
    :raises ConfigError: ``value`` is neither.
    """
    if isinstance(value, str) and (seconds := seconds_of(value)):
        return Age(seconds)

    try:
        return read_whole(key, value, 1, 10**12)
    except ConfigError:
        raise _wrong(
            key,
            value,
            "Set it to the number of events that a stream keeps, for example 100000, or to their "
            "age, for example '7d', '12h' or '30m'.",
        ) from None


def _setting(default: Any, type: str, read: Reader, meaning: str) -> Any:
    return field(default=default, metadata={"type": type, "read": read, "meaning": meaning})


def _number(default: int, least: int, most: int, meaning: str, type: str = "number") -> Any:
    return _setting(default, type, partial(read_whole, least=least, most=most), meaning)


def _seconds(default: float, least: float, most: float, meaning: str) -> Any:
    return _setting(default, "seconds", partial(_read_seconds, least=least, most=most), meaning)


def _flag(default: bool, meaning: str) -> Any:
    return _setting(default, "true or false", _read_flag, meaning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one node.

    The table of ``docs/configuration.md`` shows the types, defaults and meanings of these fields.
    """

    service: str = _setting(MISSING, "text", _read_service, "the stable name of this service")
    url: str = _setting("redis://localhost:6379/0", "text", _read_url, "the URL of Redis")
    prefix: str = _setting("eventbus", "text", _read_prefix, "the prefix of all channels and keys")
    publish: Any = _setting(
        (), "list or mapping", _read_structure, "the signals that this service publishes"
    )
    subscribe: Any = _setting(
        (), "list or mapping", _read_structure, "signals to subscribe to, besides those of `bus.on`"
    )
    receivers: tuple[str, ...] = _setting(
        (), "list", _read_receivers, "modules and folders of receivers"
    )
    enabled: bool = _flag(True, "whether the bus works at all")
    listen: bool = _flag(True, "whether a process that serves the app listens")
    concurrency: int = _number(1, 1, 1_000, "receivers that run at the same time")
    timeout: float = _seconds(0.5, 0.001, 60.0, "the longest time that `send()` blocks")
    on_outage: str = _setting(
        "buffer",
        '`"buffer"` or `"raise"`',
        _read_on_outage,
        "what `send()` does while Redis is away",
    )
    buffer_size: int = _number(10_000, 1, 10_000_000, "events kept in memory while Redis is away")
    max_event_bytes: int = _number(
        1024 * 1024, 2_048, 512 * 1024 * 1024, "the largest event", type="bytes"
    )
    max_hops: int = _number(16, 1, 1_000, "the longest chain of events")
    grace: float = _seconds(
        25.0, 0.0, 3_600.0, "the time to finish receivers when the process ends"
    )
    retries: int = _number(5, 0, MAX_RETRIES, "retries of a receiver that failed")
    claim_after: float = _seconds(
        60.0, 0.1, 86_400.0, "silence after which a worker counts as dead"
    )
    maxlen: int | Age = _setting(100_000, "number or age", read_maxlen, "how much a stream keeps")
    dead_maxlen: int = _number(100_000, 1, 10**12, "dead letters kept, for each signal")
    replicas: int = _number(0, 0, MAX_REPLICAS, "replicas that confirm a stream event")
    duplicate_window: float = _seconds(
        600.0, 0.0, 86_400.0, "the time in which duplicates are recognized"
    )
    log_events: bool = _flag(False, "whether each event is logged")
    publish_in_tests: bool = _flag(False, "whether an app with `TESTING` publishes")

    @property
    def has_streams(self) -> bool:
        """False if the server is a cluster, which has no streams yet."""
        return not self.url.startswith("redis+cluster://")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Config:
        """Read the keys of ``mapping``, such as a Flask config, that begin with ``EVENTBUS_``.

        :raises ConfigError: a key is unknown or a value is wrong.
        """
        found = {
            key: value
            for key, value in mapping.items()
            if isinstance(key, str) and key.startswith("EVENTBUS_")
        }
        return cls._read(found)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Config:
        """Read environment variables as Flask does: as JSON if they are JSON, else as text.

        :raises ConfigError: a key is unknown or a value is wrong.
        """
        found = {
            key: _from_text(value) for key, value in environ.items() if key.startswith("EVENTBUS_")
        }
        return cls._read(found)

    @classmethod
    def _read(cls, found: Mapping[str, Any]) -> Config:
        values = {}

        for key, value in found.items():
            if _is_service_link(key, value):
                continue

            _check_known(key)

            if value is not None:
                name = key.removeprefix("EVENTBUS_").lower()
                values[name] = _READERS[name](key, value)

        if "service" not in values:
            raise ConfigError(
                "'EVENTBUS_SERVICE' is not set. Set it to this service's name, for example "
                "'accounts'."
            )

        return cls(**values)


def _is_service_link(key: str, value: object) -> bool:
    """Return True for a variable that Kubernetes sets for a Service called ``eventbus``.

    Each pod gets for example ``EVENTBUS_PORT=tcp://10.0.0.1:6379`` and ``EVENTBUS_SERVICE_HOST``.
    """
    match = _SERVICE_LINK.fullmatch(key)

    if match is None:
        return False

    return match["address"] is None or str(value).startswith(("tcp://", "udp://", "sctp://"))


def _check_known(key: str) -> None:
    if key in _NOT_YET:
        raise ConfigError(
            f"{key!r} belongs to {_NOT_YET[key]}, which this version of flask-eventbus does not "
            "have yet. Remove the setting."
        )

    if key.removeprefix("EVENTBUS_").lower() not in _READERS or key != key.upper():
        known = [f"EVENTBUS_{name.upper()}" for name in _READERS]
        hint = did_you_mean(key, known, prefix="EVENTBUS_")
        raise ConfigError(f"{key!r} is not a setting. {hint}")


def _from_text(text: str) -> Any:
    """Parse a variable as Flask's ``app.config.from_prefixed_env()`` does."""
    try:
        return json.loads(text)
    except ValueError:
        return text


_READERS: dict[str, Reader] = {found.name: found.metadata["read"] for found in fields(Config)}

#: The names of all settings, in the order of :class:`Config`.
SETTINGS = tuple(f"EVENTBUS_{name.upper()}" for name in _READERS)


# Nothing compares or shows it; for so many fields, the methods would be slow to generate.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Timing:
    """Waits, intervals and limits of the parts of a node, which users do not set.

    Users do not set these times and sizes. Tests hand in smaller ones.
    """

    # -- streams

    #: Delay of the first retry in seconds. It doubles with each attempt.
    first_retry: float = 1.0

    #: Maximum random increase of a retry's delay, as a fraction of it, so that retries spread out.
    retry_jitter: float = 0.25

    #: Seconds between two checks for released entries and due retries. One round trip checks all
    #: streams.
    check_released_every: float = 5.0

    #: Seconds without a sign of life after which a consumer without pending entries is removed.
    idle_consumer_after: float = 600.0

    #: Pause reading if no receiver has started for this many seconds while deliveries are queued.
    pause_reading_after: float = 1.0

    #: Release queued deliveries to other workers if no receiver has started for this many seconds.
    #: By then a read that was running at the pause has ended.
    release_after: float = 2.5

    #: Seconds ahead for which due times of retries are kept. A later retry is found by the check
    #: that runs every :attr:`check_released_every` seconds.
    expect_within: float = 60.0

    #: Longest time in seconds that a worker without the receiver leaves a retry to other workers.
    max_postpone: float = 10.0

    #: Seconds between two searches for orphaned retries. They are kept for an hour, so this may be
    #: long.
    search_orphans_every: float = 300.0

    #: Seconds after which outcomes that Redis refused are written again.
    resend_after: float = 5.0

    #: Seconds without a refusal after which the log says that Redis allows the maintenance again.
    granted_after: float = 60.0

    #: Seconds between two searches for streams that match patterns.
    list_streams_every: float = 2.0

    #: Seconds between two searches while there are more streams than patterns may match.
    list_many_streams_every: float = 30.0

    #: Maximum number of streams that the patterns of a service match, and that a command reads.
    max_names: int = 1_000

    #: Seconds before a refused stream is read again.
    ask_stream_again_after: float = 5.0

    #: Seconds before a command that Redis refused, and that is not essential, is sent again.
    ask_command_again_after: float = 60.0

    #: Seconds between two checks for entries that were trimmed, once a group has read them all.
    check_trimmed_every: float = 30.0

    #: Seconds between two checks for a stream that was deleted and created again.
    check_flushed_every: float = 5.0

    #: Seconds that Redis may take to answer a read of streams, including the wait for an entry.
    answer_timeout: float = 5.0

    #: Maximum number of entries that are counted after the start of a new group.
    max_counted: int = 1_000

    #: Maximum number of entries that one command lists.
    page: int = 100

    # -- connections and channels

    #: Seconds without traffic after which a server gets a PING. It detects an outage before the
    #: next event, and keeps firewalls from closing an idle connection.
    ping_after: float = 5.0

    #: Seconds that a server has to answer a PING. A server that hangs is noticed after the sum of
    #: both.
    ping_timeout: float = 5.0

    #: Seconds between two ROLE commands on a connection that writes.
    ask_role_every: float = 1.0

    #: Seconds that one read of channels waits for bytes. After each, the reading thread checks
    #: whether to stop.
    tick: float = 1.0

    #: Longest wait of a reading thread between two attempts to connect, in seconds. Channel events
    #: sent meanwhile are missed.
    max_listener_backoff: float = 1.0

    #: Seconds to wait for the listener to end, before its last events must be finished.
    listener_end: float = 2.0

    #: Maximum number of ids, routes and nodes that are remembered; the oldest is dropped first.
    max_remembered: int = 10_000

    #: Maximum number of hashes of all routes. Each takes 40 bytes of memory.
    max_hashes: int = 262_144

    #: Number of former node names that a process remembers, because their events may still arrive.
    max_former: int = 1_000

    #: Maximum number of queued deliveries.
    max_ahead: int = 1_000

    # -- publishing

    #: Seconds that a round trip of the publisher may take before Redis counts as away.
    write_timeout: float = 2.0

    #: Longest wait of the publisher between two attempts in seconds; short, so that events leave
    #: soon after an outage.
    max_writer_backoff: float = 2.0

    #: Seconds to wait after an outage before buffered channel events are sent: a little more than
    #: the longest wait of a listener before it reconnects.
    listeners_return: float = 1.5

    #: Largest number of events in one round trip of the publisher.
    batch_events: int = 512

    #: Seconds after which the relay publishes events again that Redis refused.
    refused_again_after: float = 5.0


#: The times and sizes of a service.
TIMING = Timing()
