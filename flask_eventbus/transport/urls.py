"""Parse ``EVENTBUS_URL``, remove its secrets, and explain why a connection failed."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import ssl
from collections.abc import Iterator
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import redis

from ..errors import ConfigError
from ..text import reason_of

#: Options used for Sentinels only. TLS options are used for Sentinels and the master, all other
#: options for the master only.
SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")

#: Arguments of redis-py that take an object, so a URL cannot set them.
_OBJECTS = re.compile(
    r"(kw)?args|retry|parser_class|command_packer|driver_info|socket_keepalive_options"
    r"|connection_class|ssl_ocsp_context|.*_(func|provider|dispatcher|handler|factory|registry)"
    r"|maint.*|orig_.*"
)

#: The TLS variant of each scheme, or its variant without TLS.
_OTHERS = {
    "redis": "rediss",
    "rediss": "redis",
    "redis+sentinel": "rediss+sentinel",
    "rediss+sentinel": "redis+sentinel",
}

_CLASSES: dict[str, type] = {
    "unix": redis.UnixDomainSocketConnection,
    "rediss": redis.SSLConnection,
}

#: OpenSSL error codes for a valid certificate that was issued for another host.
_OTHER_HOST = (62, 64)


class AdvisedError(redis.ConnectionError):
    """A connection error with a remedy.

    :param reason: the cause, without a full stop.
    :param advice: the remedy, as full sentences.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}. {advice}".rstrip("."))
        self.reason = reason
        self.advice = advice


def without_secrets(url: str) -> str:
    """Return scheme, user, host and path of a URL; replace the password by ``***``.

    Options are removed, because some hold passwords. If an ``@`` follows the host, the URL may
    have an unquoted password; then only the scheme is returned.
    """
    scheme, separator, rest = url.partition("://")
    netloc = re.split("[/?#]", rest, maxsplit=1)[0]

    if not separator or "@" in rest[len(netloc) :]:
        return f"{scheme}://***" if separator else "***"

    userinfo, at, hosts = netloc.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    path = re.split("[?#]", rest[len(netloc) :], maxsplit=1)[0]
    return f"{scheme}://{user}{':***' if colon else ''}{at}{hosts}{path}"


def hosts_of(parts: SplitResult, default_port: int) -> list[tuple[str, int]]:
    """Return the hosts and ports of a URL with several hosts.

    :raises ConfigError: a host is empty, or a port is not a number.
    """
    hosts = []

    for item in parts.netloc.rpartition("@")[2].split(","):
        host, colon, port = item.rpartition(":")
        host, port = (host, port) if colon and not item.endswith("]") else (item, "")

        if not host or (port and not port.isdecimal()):
            raise ConfigError(
                f"'EVENTBUS_URL' names the host {item!r}. Write hosts as 'host:port', separated "
                "by commas."
            )

        hosts.append((host.strip("[]"), int(port or default_port)))

    return hosts


def node_url(parts: SplitResult, host: str, port: int, path: str = "") -> str:
    """Return the URL of one host of a URL with several hosts; keep its user and options."""
    user, at, _ = parts.netloc.rpartition("@")
    options = [
        option
        for option in parts.query.split("&")
        if unquote(option.partition("=")[0]) not in SENTINEL_OPTIONS
    ]
    query = "&".join(filter(None, options))
    address = f"[{host}]" if ":" in host else host
    scheme = parts.scheme.partition("+")[0]
    return f"{scheme}://{user}{at}{address}:{port}{path}" + (f"?{query}" if query else "")


def sentinel_url(parts: SplitResult, host: str, port: int) -> str:
    """Return the URL of one Sentinel, with its own user and password and the TLS options."""
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    user, password = (quote(given.get(name, ""), safe="") for name in SENTINEL_OPTIONS)
    userinfo = f"{user}:{password}@" if user or password else ""
    query = "&".join(option for option in parts.query.split("&") if option.startswith("ssl_"))
    return node_url(parts._replace(netloc=userinfo, query=query), host, port)


def check_database(url: str) -> None:
    """Check the database number of a URL; redis-py silently uses 0 for an invalid one.

    :raises ConfigError: the database is not a number, or not 0 in a cluster.
    """
    parts = urlsplit(url)
    database = parts.path.strip("/")

    if parts.scheme.endswith("+sentinel"):
        database = database.partition("/")[2]

    if not database or parts.scheme == "unix":
        return

    if not database.isdecimal():
        raise ConfigError(
            f"'EVENTBUS_URL' is {without_secrets(url)!r}, and its database is not a number. End "
            "the URL with a number, as in '/0', and write '/' in a password as '%2F'."
        )

    if parts.scheme == "redis+cluster" and int(database):
        raise ConfigError(
            f"'EVENTBUS_URL' is {without_secrets(url)!r}: a cluster has only the database 0. "
            f"Remove '/{database}'."
        )


def without_options(url: str) -> str:
    """Return a URL without its options."""
    return re.split("[?#]", url, maxsplit=1)[0]


def options_of(url: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each option of a URL.

    :raises ConfigError: an option does not exist, or belongs to another form of URL.
    """
    parts = urlsplit(url)
    shown = without_secrets(url)
    # After an unquoted password, the name of an option may be a part of the password.
    is_sure = not shown.endswith("://***")

    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        problem = _problem_with(name, parts.scheme)

        if problem and not is_sure:
            problem = (
                "one of its options does not exist. Write '&' and '@' in a password as '%26' and "
                "'%40', and see docs/configuration.md for the options."
            )

        if problem:
            raise ConfigError(f"'EVENTBUS_URL' is {shown!r}: {problem}")

        is_sure = is_sure and "password" not in name
        yield name, text


def _problem_with(name: str, scheme: str) -> str | None:
    known = _known(scheme)

    if name in known:
        return None

    if name in SENTINEL_OPTIONS:
        return f"its option {name!r} belongs to 'redis+sentinel://'. Remove it."

    if name in _known("rediss"):
        other = _OTHERS.get(scheme)
        remedy = f"Start the URL with '{other}://'" if other else "Remove it"
        return f"its option {name!r} belongs to TLS, which '{scheme}://' does not use. {remedy}."

    close = difflib.get_close_matches(name.lower().replace("-", "_"), sorted(known), n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Remove it, or see docs/configuration.md."
    return f"it has no option {name!r}. {hint}"


def _known(scheme: str) -> set[str]:
    """Return the option names that a URL scheme accepts with this release of redis-py."""
    chosen = _CLASSES.get(scheme.partition("+")[0], redis.Connection)
    makers = [redis.ConnectionPool, *chosen.__mro__[:-1]]
    names = {name for maker in makers for name in inspect.signature(maker).parameters}
    extra = SENTINEL_OPTIONS if scheme.endswith("+sentinel") else ()
    return {name for name in names if not _OBJECTS.fullmatch(name)} | set(extra)


def explain(error: Exception, url: str, *, is_first: bool) -> Exception:
    """Return an :class:`AdvisedError` for a failed connection, or ``error`` if no advice is known.

    :param url: the value of ``EVENTBUS_URL``.
    :param is_first: True if no connection has succeeded yet; the scheme may be wrong then.
    """
    cause = error.__cause__ or error.__context__
    advice = _advice(error, cause, url, is_first)

    if advice is None:
        return error

    explained = AdvisedError(str(error).rstrip("."), advice)
    explained.__cause__ = cause or error
    return explained


def _advice(error: Exception, cause: BaseException | None, url: str, is_first: bool) -> str | None:
    is_tls = url.startswith("rediss")
    other = _OTHERS.get(urlsplit(url).scheme)

    if isinstance(cause, ssl.SSLCertVerificationError):
        return _about_certificate(cause, url)

    if is_tls and isinstance(cause, FileNotFoundError):
        return _about_files(url)

    if not is_first:
        return None

    timed_out = isinstance(cause, TimeoutError) and "handshake" in str(cause)

    if is_tls and (getattr(cause, "reason", "") == "WRONG_VERSION_NUMBER" or timed_out):
        return f"If the port does not speak TLS, start 'EVENTBUS_URL' with '{other}://'."

    is_closed = isinstance(cause, ConnectionResetError) or "closed by server" in str(error)

    if is_tls and (is_closed or isinstance(cause, ssl.SSLError)) and "ssl_certfile=" not in url:
        return (
            "If the server requires a client certificate, add 'ssl_certfile=FILE' and "
            "'ssl_keyfile=FILE' to 'EVENTBUS_URL'."
        )

    if is_closed and not is_tls and other:
        return f"If the port speaks TLS, start 'EVENTBUS_URL' with '{other}://'."

    return None


def explain_sentinel(error: Exception, address: str) -> AdvisedError:
    """Return the error of a Sentinel together with its address and the remedy.

    :param address: address of the Sentinel, as ``host:port``.
    """
    text = str(error).rstrip(".")

    if isinstance(error, AdvisedError):
        return AdvisedError(f"The Sentinel at {address}: {error.reason}", error.advice)

    if isinstance(error, redis.AuthenticationError) or "WRONGPASS" in text:
        return AdvisedError(
            f"The Sentinel at {address} does not let this user in: {text}",
            "Sentinels have a password of their own: add 'sentinel_password=...' to the options of "
            "'EVENTBUS_URL', and 'sentinel_username=...' if they have users.",
        )

    if "unknown command" in text:
        return AdvisedError(
            f"The server at {address} is not a Sentinel",
            "Write the ports of the Sentinels in 'EVENTBUS_URL', or start it with 'redis://'.",
        )

    return AdvisedError(
        f"The Sentinel at {address} cannot be reached: {text}",
        "Start the Sentinel, or correct its address in 'EVENTBUS_URL'.",
    )


def unknown_master(name: str, address: str) -> AdvisedError:
    """Return the error for a Sentinel that monitors no master of that name."""
    return AdvisedError(
        f"The Sentinel at {address} knows no master {name!r}",
        "Write the name in 'EVENTBUS_URL' as in 'sentinel monitor NAME' of its configuration.",
    )


def trouble_of(error: Exception) -> str:
    """Return why a server cannot be used, and the remedy, as sentences."""
    reason, remedy = reason_and_remedy(error)
    return f"{reason}. {remedy}"


def reason_and_remedy(error: Exception) -> tuple[str, str]:
    """Return why a server cannot be used, without a full stop, and the remedy."""
    if isinstance(error, AdvisedError):
        return reason_of(error.reason), error.advice

    if isinstance(error, redis.AuthenticationError):
        return reason_of(error), "Correct the user and the password in 'EVENTBUS_URL'."

    if isinstance(error, redis.TimeoutError | TimeoutError):
        remedy = "Check that the server is not blocked and no firewall drops packets."
        return reason_of(error), remedy

    return reason_of(error), "Start it there, or correct 'EVENTBUS_URL'."


def _about_certificate(error: ssl.SSLCertVerificationError, url: str) -> str:
    if error.verify_code in _OTHER_HOST and "+sentinel://" in url:
        return (
            "Write the hosts of the Sentinels in 'EVENTBUS_URL' as in their certificates. For the "
            "master, set 'sentinel announce-hostnames yes', or add its address to its certificate."
        )

    if error.verify_code in _OTHER_HOST:
        return "Write the host in 'EVENTBUS_URL' as in the server's certificate."

    if "expired" in error.verify_message:
        return "Renew the certificate of the server, or correct the clock of this machine."

    return (
        "Add 'ssl_ca_certs=FILE' to 'EVENTBUS_URL', with the certificate of the authority that "
        "signed the server's certificate."
    )


def _about_files(url: str) -> str | None:
    for name, text in parse_qsl(urlsplit(url).query):
        if name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") and not os.path.exists(text):
            return f"Correct the path of {name!r} in 'EVENTBUS_URL': {text!r} does not exist."

    return None
