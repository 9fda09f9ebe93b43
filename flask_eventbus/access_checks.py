"""Whether the way to a server, and its users, keep others out."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .findings import Finding, note, warning
from .server import TIMEOUT

#: What a server says to whoever reaches it and may do everything.
_ALL_RIGHTS = (
    "Whoever reaches it is let in as 'default', without a password, and may do everything: read, "
    "change and delete every stream."
)

_CLOSE = (
    "Give each service a user of its own, and close this one: 'user default off resetpass ~* &* "
    "+@all'. See docs/deploying.md."
)


def check_access(url: str) -> Iterator[Finding]:
    """Look at how a URL reaches its server, and at who else is let in there."""
    scheme = urlsplit(url).scheme

    if scheme not in ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster"):
        return

    is_here = scheme == "unix" or all(map(is_loopback, hosts_of(url)))
    yield from check_transport(url, is_here=is_here)

    if scheme in ("redis", "rediss", "unix") and is_open(url):
        # Other programs of this machine may do so, and those are usually one's own.
        yield note(_ALL_RIGHTS, _CLOSE) if is_here else warning(_ALL_RIGHTS, _CLOSE)


def check_transport(url: str, *, is_here: bool) -> Iterator[Finding]:
    """Look at what a URL says about TLS.

    :param is_here: True if the server is on this machine.
    """
    parts = urlsplit(url)

    if parts.scheme == "rediss":
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
            "Use 'rediss://', or a network in which nobody else is."
            if parts.scheme == "redis"
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


def is_open(url: str) -> bool:
    """Return True if the server lets anybody in without a password, with all rights."""
    parts = urlsplit(url)
    query = "&".join(
        option
        for option in parts.query.split("&")
        if option.partition("=")[0] not in ("username", "password")
    )
    nobody = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))
    client = redis.Redis.from_url(
        nobody,
        socket_timeout=TIMEOUT,
        socket_connect_timeout=TIMEOUT,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )

    try:
        with client:
            found: Any = client.acl_getuser("default")
    except (redis.RedisError, OSError):
        return False

    refused = [command for command in found["commands"] if command.startswith("-")]
    is_everywhere = any(key.strip("~") == "*" for key in found["keys"])
    return found["categories"] == ["+@all"] and not refused and is_everywhere
