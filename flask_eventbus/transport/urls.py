"""URLs of Redis: what their parts mean, what of them is shown, and why a connection fails."""

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

#: Options that are for Sentinels alone; those of TLS are for both, all others for the master.
SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")

#: Arguments of redis-py that are objects, which no text stands for.
_OBJECTS = re.compile(
    r"(kw)?args|retry|parser_class|command_packer|driver_info|socket_keepalive_options"
    r"|connection_class|ssl_ocsp_context|.*_(func|provider|dispatcher|handler|factory|registry)"
    r"|maint.*|orig_.*"
)

_CLASSES: dict[str, type] = {
    "unix": redis.UnixDomainSocketConnection,
    "rediss": redis.SSLConnection,
}

#: Codes of OpenSSL: the certificate is right, and of another host.
_OTHER_HOST = (62, 64)


class AdvisedError(redis.ConnectionError):
    """A connection that failed for a reason that tells what to correct.

    :param reason: what happened, without a full stop.
    :param advice: what to do, in sentences.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}. {advice}".rstrip("."))
        self.reason = reason
        self.advice = advice


def without_secrets(url: str) -> str:
    """Return scheme, user, host and path of a URL.

    Options are left out: which of them hold a secret depends on their names. A password that was
    not quoted may hold any character, so where an ``@`` stands after the host nothing is sure.
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
    """Return the hosts and ports of a URL that names several.

    :raises ConfigError: one of them has no name, or a port that is none.
    """
    hosts = []

    for item in parts.netloc.rpartition("@")[2].split(","):
        host, colon, port = item.rpartition(":")
        host, port = (host, port) if colon and not item.endswith("]") else (item, "")

        if not host or (port and not port.isdecimal()):
            raise ConfigError(
                f"'EVENTBUS_URL' names the host {item!r}. Write hosts as 'host:port' with commas "
                "between them."
            )

        hosts.append((host.strip("[]"), int(port or default_port)))

    return hosts


def node_url(parts: SplitResult, host: str, port: int, path: str = "") -> str:
    """Return the URL of one server, with the user and the options of a URL that names several."""
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
    """Return the URL of one Sentinel, with the user that its options name, and those of TLS."""
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    user, password = (quote(given.get(name, ""), safe="") for name in SENTINEL_OPTIONS)
    userinfo = f"{user}:{password}@" if user or password else ""
    query = "&".join(option for option in parts.query.split("&") if option.startswith("ssl_"))
    return node_url(parts._replace(netloc=userinfo, query=query), host, port)


def check_database(url: str) -> None:
    """Refuse a path that is no number of a database, which redis-py takes for database 0.

    :raises ConfigError: it is none, or a cluster does not have it.
    """
    parts = urlsplit(url)
    database = parts.path.strip("/")

    if parts.scheme.endswith("+sentinel"):
        database = database.partition("/")[2]

    if not database or parts.scheme == "unix":
        return

    if not database.isdecimal():
        raise ConfigError(
            f"'EVENTBUS_URL' is {without_secrets(url)!r}, whose database is no number. End it with "
            "the number, as in '/0', and write '/' of a password as '%2F'."
        )

    if parts.scheme == "redis+cluster" and int(database):
        raise ConfigError(
            f"'EVENTBUS_URL' is {without_secrets(url)!r}: a cluster has the database 0 alone. "
            f"Remove '/{database}'."
        )


def without_options(url: str) -> str:
    """Return a URL up to its options."""
    return re.split("[?#]", url, maxsplit=1)[0]


def options_of(url: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each option of a URL.

    :raises ConfigError: an option does not exist, or belongs to another form of URL.
    """
    parts = urlsplit(url)
    shown = without_secrets(url)
    # What comes after a password that was not quoted may be a part of it.
    is_sure = not shown.endswith("://***")

    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        problem = _problem_with(name, parts.scheme) if is_sure else _unsure_about(name, parts)

        if problem:
            raise ConfigError(f"'EVENTBUS_URL' is {shown!r}: {problem}")

        is_sure = is_sure and "password" not in name
        yield name, text


def _unsure_about(name: str, parts: SplitResult) -> str | None:
    if _problem_with(name, parts.scheme) is None:
        return None

    return (
        "one of its options does not exist. Write '&' and '@' of a password as '%26' and '%40', "
        "and see docs/configuration.md for the options."
    )


def _problem_with(name: str, scheme: str) -> str | None:
    known = _known(scheme)

    if name in known:
        return None

    if name in SENTINEL_OPTIONS:
        return f"its option {name!r} belongs to 'redis+sentinel://'. Remove it."

    if name in _known("rediss"):
        remedy = f"Begin the URL with '{_other(scheme)}://'" if _other(scheme) else "Remove it"
        return f"its option {name!r} belongs to TLS, which '{scheme}://' does not use. {remedy}."

    close = difflib.get_close_matches(name.lower().replace("-", "_"), sorted(known), n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Remove it, or see docs/configuration.md."
    return f"it has no option {name!r}. {hint}"


def _known(scheme: str) -> set[str]:
    """Return the names of options that a form of URL takes, with this release of redis-py."""
    chosen = _CLASSES.get(scheme.partition("+")[0], redis.Connection)
    makers = [redis.ConnectionPool, *chosen.__mro__[:-1]]
    names = {name for maker in makers for name in inspect.signature(maker).parameters}
    extra = SENTINEL_OPTIONS if scheme.endswith("+sentinel") else ()
    return {name for name in names if not _OBJECTS.fullmatch(name)} | set(extra)


def _other(scheme: str) -> str | None:
    """Return the form of URL with TLS for one without it, and the reverse, if there is one."""
    pairs = {"redis": "rediss", "redis+sentinel": "rediss+sentinel"}
    return (pairs | {tls: plain for plain, tls in pairs.items()}).get(scheme)


def explain(error: Exception, url: str, *, is_first: bool) -> Exception:
    """Return what tells more about a connection that failed; ``error`` itself if there is nothing.

    :param url: as the setting has it.
    :param is_first: True if no connection to it ever succeeded: the port may speak otherwise.
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
    other = _other(urlsplit(url).scheme)

    if isinstance(cause, ssl.SSLCertVerificationError):
        return _about_certificate(cause, url)

    if is_tls and isinstance(cause, FileNotFoundError):
        return _about_files(url)

    if not is_first:
        return None

    if is_tls and (getattr(cause, "reason", "") == "WRONG_VERSION_NUMBER" or _timed_out(cause)):
        return f"If the port does not speak TLS, begin 'EVENTBUS_URL' with '{other}://'."

    is_closed = isinstance(cause, ConnectionResetError) or "closed by server" in str(error)

    if is_tls and (is_closed or isinstance(cause, ssl.SSLError)) and "ssl_certfile=" not in url:
        return (
            "If the server asks for a client's certificate, add 'ssl_certfile=FILE' and "
            "'ssl_keyfile=FILE' to 'EVENTBUS_URL'."
        )

    if is_closed and not is_tls and other:
        return f"If the port speaks TLS, begin 'EVENTBUS_URL' with '{other}://'."

    return None


def explain_sentinel(error: Exception, address: str) -> AdvisedError:
    """Return what an error of a Sentinel tells.

    :param address: the Sentinel's, as ``host:port``.
    """
    text = str(error).rstrip(".")

    if isinstance(error, AdvisedError):
        return AdvisedError(f"The Sentinel at {address}: {error.reason}", error.advice)

    if isinstance(error, redis.AuthenticationError) or "WRONGPASS" in text:
        return AdvisedError(
            f"The Sentinel at {address} does not let this user in: {text}",
            "The password of the Sentinels is not the master's: add 'sentinel_password=...', and "
            "'sentinel_username=...' if they have users, to the options of 'EVENTBUS_URL'.",
        )

    if "unknown command" in text:
        return AdvisedError(
            f"What answers at {address} is no Sentinel",
            "Name the ports of the Sentinels in 'EVENTBUS_URL', or begin it with 'redis://'.",
        )

    return AdvisedError(
        f"The Sentinel at {address} cannot be asked: {text}",
        "Start the Sentinels there, or correct 'EVENTBUS_URL'.",
    )


def unknown_master(name: str, address: str) -> AdvisedError:
    """Return what to say where a Sentinel knows no master of that name."""
    return AdvisedError(
        f"The Sentinel at {address} knows no master {name!r}",
        "Write the name in 'EVENTBUS_URL' as 'sentinel monitor NAME' has it.",
    )


def trouble_of(error: Exception) -> str:
    """Return why a server cannot be used, and what to do about it, in sentences."""
    reason = " ".join(str(error).split()).rstrip(".")

    if isinstance(error, AdvisedError):
        return f"{reason}."

    if isinstance(error, redis.TimeoutError | TimeoutError):
        return f"{reason}. See whether it hangs, or whether a firewall keeps it from answering."

    return f"{reason}. Start it there, or correct 'EVENTBUS_URL'."


def _about_certificate(error: ssl.SSLCertVerificationError, url: str) -> str:
    if error.verify_code in _OTHER_HOST and "+sentinel://" in url:
        return (
            "Write the Sentinels in 'EVENTBUS_URL' as their certificates name them. For the "
            "master, set 'sentinel announce-hostnames yes', or name its address in its certificate."
        )

    if error.verify_code in _OTHER_HOST:
        return "Write the host in 'EVENTBUS_URL' as the server's certificate names it."

    if "expired" in error.verify_message:
        return "Renew the certificate of the server, or correct the clock of this machine."

    return (
        "Name the file of the authority that signed the server's certificate: "
        "'ssl_ca_certs=FILE' in 'EVENTBUS_URL'."
    )


def _about_files(url: str) -> str | None:
    for name, text in parse_qsl(urlsplit(url).query):
        if name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") and not os.path.exists(text):
            return f"Correct the path of {name!r} in 'EVENTBUS_URL': {text!r} is not there."

    return None


def _timed_out(cause: BaseException | None) -> bool:
    return isinstance(cause, TimeoutError) and "handshake" in str(cause)
