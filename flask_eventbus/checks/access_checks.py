"""Whether the way to a server, and its users, keep others out."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit, urlunsplit

import redis

from ..admin.server import TIMEOUT
from ..transport.connections import set_deadline, timed_connection
from .findings import Finding, note, warning

#: What a server says to whoever reaches it and may do everything.
_ALL_RIGHTS = (
    "Whoever reaches it is let in as 'default', without a password, and may do everything: read, "
    "change and delete every stream."
)

_CLOSE = (
    "Give each service a user of its own, and close this one: 'user default off resetpass ~* &* "
    "+@all'. See docs/deploying.md."
)


def check_access(url: str, deadline: float = math.inf) -> Iterator[Finding]:
    """Look at how a URL reaches its server, and at who else is let in there, by a deadline."""
    scheme = urlsplit(url).scheme

    if scheme in ("embedded", "memory"):
        return

    is_here = scheme == "unix" or all(map(is_loopback, hosts_of(url)))
    yield from check_transport(url, is_here=is_here)

    if scheme in ("redis", "rediss", "unix") and is_open(url, deadline):
        # Other programs of this machine may do so, and those are usually one's own.
        yield note(_ALL_RIGHTS, _CLOSE) if is_here else warning(_ALL_RIGHTS, _CLOSE)


def check_transport(url: str, *, is_here: bool) -> Iterator[Finding]:
    """Look at what a URL says about TLS.

    :param is_here: True if the server is on this machine.
    """
    parts = urlsplit(url)

    if parts.scheme.startswith("rediss"):
        options = {name: values[-1].lower() for name, values in parse_qs(parts.query).items()}

        if options.get("ssl_cert_reqs", "required") not in ("required", "2", "cert_required"):
            yield warning(
                "The server's certificate is not verified ('ssl_cert_reqs' in 'EVENTBUS_URL'): "
                "whoever is between may pass for the server, and learns the password.",
                "Take 'ssl_cert_reqs' out, and name the authority: "
                "'ssl_ca_certs=/etc/eventbus/ca.crt'.",
            )
        elif options.get("ssl_check_hostname", "true") in ("false", "0", "no", "off"):
            yield warning(
                "The name in the server's certificate is not compared with the host "
                "('ssl_check_hostname' in 'EVENTBUS_URL'): any certificate of the authority will "
                "do.",
                "Set 'ssl_check_hostname=true'.",
            )
    elif not is_here:
        yield warning(
            f"'EVENTBUS_URL' begins with '{parts.scheme}://', and its server is not on this "
            "machine: passwords and events travel unencrypted.",
            f"Use '{parts.scheme.replace('redis', 'rediss')}://', or a network in which nobody "
            "else is."
            if parts.scheme != "redis+cluster"
            else "It does not speak TLS in this version: use a network in which nobody else is.",
        )


def hosts_of(url: str) -> list[str]:
    """Return the hosts that a URL names, one or several."""
    _, _, hosts = urlsplit(url).netloc.rpartition("@")
    return [urlsplit(f"//{host}").hostname or "localhost" for host in hosts.split(",")]


def is_loopback(host: str) -> bool:
    """Return True if a host is this machine itself; a name is one only as 'localhost'."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_open(url: str, deadline: float) -> bool:
    """Return True if the server lets anybody in without a password, with all rights."""
    parts = urlsplit(url)
    query = "&".join(
        option
        for option in parts.query.split("&")
        if option.partition("=")[0] not in ("username", "password")
    )
    nobody = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))
    connection = timed_connection(nobody, TIMEOUT)
    set_deadline(connection, min(deadline, time.monotonic() + TIMEOUT))

    try:
        connection.connect()
        connection.send_command("ACL", "GETUSER", "default")
        answer = connection.read_response()
    except (redis.RedisError, OSError):
        return False
    finally:
        connection.disconnect()

    facts = dict(zip(answer[::2], answer[1::2], strict=True))
    keys = facts[b"keys"]
    # A list before Redis 7.
    is_everywhere = b"*" in (key.strip(b"~") for key in getattr(keys, "split", lambda: keys)())
    return facts[b"commands"].split() == [b"+@all"] and is_everywhere
