"""Read and check the settings: one frozen :class:`Config` per node."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from .errors import ConfigError
from .text import did_you_mean

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
MOST_RETRIES = 10_000

#: Largest number of replicas that can confirm an event.
MOST_REPLICAS = 100

_AGE = re.compile(r"(\d{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one node; ``docs/configuration.md`` describes them."""

    service: str
    url: str = "redis://localhost:6379/0"
    prefix: str = "eventbus"
    publish: Any = ()
    subscribe: Any = ()
    receivers: tuple[str, ...] = ()
    enabled: bool = True
    listen: bool = True
    concurrency: int = 1
    #: Longest time that ``send()`` blocks, in seconds.
    timeout: float = 0.5
    on_outage: str = "buffer"
    #: Number of events kept in memory while Redis is unreachable.
    buffer_size: int = 10_000
    max_event_bytes: int = 1024 * 1024
    max_hops: int = 16
    #: Seconds that running receivers have to finish when the process ends.
    grace: float = 25.0
    #: Number of retries of a receiver that failed on a stream event.
    retries: int = 5
    #: Seconds after which another worker claims the stream events of a silent worker.
    claim_after: float = 60.0
    #: Approximate number of events that a stream keeps, or their age.
    maxlen: int | Age = 100_000
    #: Number of dead letters of each signal that a service keeps.
    dead_maxlen: int = 100_000
    #: Number of replicas that must have a stream event before it is confirmed.
    replicas: int = 0
    #: Seconds during which a second delivery of a stream event is recognized.
    duplicate_window: float = 600.0
    #: True to log each published and each handled event.
    log_events: bool = False
    #: True if an app with ``TESTING`` publishes to a real server.
    publish_in_tests: bool = False

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


def _structured(key: str, value: Any) -> Any:
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


def _name(value: Any) -> Any:
    """Return an integer as a string: JSON turns a name of digits into a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _wrong(key: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"{key!r} is {value!r}. {remedy}")


def _service(key: str, value: Any) -> str:
    name = _name(value)

    if isinstance(name, str) and SERVICE_NAME.fullmatch(name):
        return name

    raise _wrong(
        key,
        value,
        "A service's name is made of letters, digits, '_', '-' and '.', at most 64 of them, for "
        "example 'accounts'.",
    )


def _url(key: str, value: Any) -> str:
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


def _prefix(key: str, value: Any) -> str:
    prefix = _name(value)

    if isinstance(prefix, str) and _PREFIX.fullmatch(prefix):
        return prefix

    raise _wrong(
        key,
        value,
        "A prefix is made of letters, digits, '_', '-', '.', ':' and '/', for example 'eventbus'.",
    )


def _boolean(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value

    # JSON turns 0 and 1 in the environment into numbers.
    if isinstance(value, str | int) and str(value).lower() in _WORDS:
        return _WORDS[str(value).lower()]

    raise _wrong(key, value, "Set it to True or False.")


def _whole(least: int, most: int) -> Callable[[str, Any], int]:
    def read(key: str, value: Any) -> int:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value

        if isinstance(number, int) and not isinstance(number, bool) and least <= number <= most:
            return number

        raise _wrong(key, value, f"Set it to a whole number from {least:,} to {most:,}.")

    return read


def _seconds(least: float, most: float) -> Callable[[str, Any], float]:
    def read(key: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0

        if not isinstance(value, bool) and least <= number <= most:
            return number

        raise _wrong(key, value, f"Set it to a number of seconds from {least} to {most:,}.")

    return read


def _on_outage(key: str, value: Any) -> str:
    if value in ("buffer", "raise"):
        return cast(str, value)

    raise _wrong(
        key,
        value,
        "Set it to 'buffer' (keep events in memory until Redis is back) or 'raise' (send() raises "
        "PublishError).",
    )


def _receivers(key: str, value: Any) -> tuple[str, ...]:
    value = _structured(key, value)

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
    found = _AGE.fullmatch(value) if isinstance(value, str) else None

    if found and int(found[1]):
        return Age(int(found[1]) * _SECONDS[found[2]])

    number = int(value) if isinstance(value, str) and value.isdecimal() else value

    if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= 10**12:
        return number

    raise _wrong(
        key,
        value,
        "Set it to the number of events that a stream keeps, for example 100000, or to their age, "
        "for example '7d', '12h' or '30m'.",
    )


def read_whole(key: str, value: Any, least: int, most: int) -> int:
    """Read a whole number from ``least`` to ``most``.

    :raises ConfigError: ``value`` is not such a number.
    """
    return _whole(least, most)(key, value)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "service": _service,
    "url": _url,
    "prefix": _prefix,
    "publish": _structured,
    "subscribe": _structured,
    "receivers": _receivers,
    "enabled": _boolean,
    "listen": _boolean,
    "concurrency": _whole(1, 1_000),
    "timeout": _seconds(0.001, 60.0),
    "on_outage": _on_outage,
    "buffer_size": _whole(1, 10_000_000),
    "max_event_bytes": _whole(2_048, 512 * 1024 * 1024),
    "max_hops": _whole(1, 1_000),
    "grace": _seconds(0.0, 3_600.0),
    "retries": _whole(0, MOST_RETRIES),
    "claim_after": _seconds(0.1, 86_400.0),
    "maxlen": read_maxlen,
    "dead_maxlen": _whole(1, 10**12),
    "replicas": _whole(0, MOST_REPLICAS),
    "duplicate_window": _seconds(0.0, 86_400.0),
    "log_events": _boolean,
    "publish_in_tests": _boolean,
}

#: The names of all settings, in the order of :class:`Config`.
SETTINGS = tuple(f"EVENTBUS_{field.name.upper()}" for field in fields(Config))
