"""Subscriptions: which signals of other services a service receives, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

from blinker import NamedSignal

from ..codec.records import EARLIEST, EntryId, before_moment, entry_id, id_text
from ..config import MAX_RETRIES, SERVICE_NAME, Config, Reader, read_whole
from ..errors import ConfigError
from ..typing import Via
from .options import (
    entries_of,
    matches,
    read_flag,
    read_name,
    read_options,
    shown,
)

#: Default start of a new consumer group: after the last entry of the stream.
NEW = "$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A signal, or a pattern of signals, that a service receives from other services."""

    name: str
    #: The services whose events are received; ``None`` for all.
    sources: frozenset[str] | None = None
    #: True to receive one's own events too: on a channel those of this node, on a stream those
    #: of this service.
    echo: bool = False
    #: ``"channel"`` or ``"stream"``; ``None`` for both.
    via: Via | None = None
    #: Number of retries of a receiver that failed; ``None`` for ``EVENTBUS_RETRIES``.
    retries: int | None = None
    #: Start of a new consumer group: ``"$"`` for later entries only, or an entry id.
    start: str = NEW
    #: True if the workers of the service share the events of a stream; False if each gets all.
    group: bool = True

    def accepts(self, source: str) -> bool:
        """Return True if events of the service ``source`` are received."""
        return self.sources is None or source in self.sources


def check_subscription(config: Config, subscription: Subscription) -> None:
    """Check that the server of the settings can serve a subscription.

    :raises ConfigError: the subscription needs a stream, and the server is a cluster.
    """
    needs_stream = subscription.via == "stream" or not subscription.group

    if needs_stream and not config.has_streams:
        raise ConfigError(
            f"The subscription to {subscription.name!r} needs a stream, and 'EVENTBUS_URL' is a "
            "cluster, for which there are no streams yet. Subscribe with 'via': 'channel', or use "
            "one Redis: 'redis://' or 'redis+sentinel://'."
        )


def subscription_for(name: str, subscriptions: Mapping[str, Subscription]) -> Subscription | None:
    """Return the subscription that handles ``name``: its own, else the first matching pattern.

    Redis delivers a channel message once per matching subscription; only this one is used.
    """
    if name in subscriptions:
        return subscriptions[name]

    return next((found for found in subscriptions.values() if matches(found.name, name)), None)


def read_subscriptions(value: Any, where: str = "EVENTBUS_SUBSCRIBE") -> dict[str, Subscription]:
    """Read the subscriptions of a setting: a name, a list, or a mapping of names to options.

    :raises ConfigError: an entry is wrong; the message names it.
    """
    subscriptions = {}

    for entry, options in entries_of(value, where):
        name = entry.name if isinstance(entry, NamedSignal) else entry
        subscription = read_subscription(name, options, f"{where}[{shown(entry)!r}]")
        subscriptions[subscription.name] = subscription

    return subscriptions


def read_subscription(name: Any, options: Any, where: str) -> Subscription:
    """Read one subscription.

    :raises ConfigError: the name or an option is wrong.
    """
    found = read_options(options, _READERS, where)

    # The only option for which None is a value.
    if isinstance(options, Mapping) and options.get("group", True) is None:
        found["group"] = False

    _check_together(found, where)
    sources = found.pop("from", None)
    return Subscription(name=read_name(name, where, pattern=True), sources=sources, **found)


def _check_together(options: Mapping[str, Any], where: str) -> None:
    """Check that the options of a subscription do not contradict each other."""
    for option in ("retries", "start", "group"):
        if options.get("via") == "channel" and options.get(option, True) is not True:
            raise ConfigError(
                f"{where}[{option!r}] belongs to streams, and this subscription has 'via': "
                "'channel'. Remove 'via', or remove the option."
            )

    if options.get("group") is False and "retries" in options:
        raise ConfigError(
            f"{where} has both 'group': None and 'retries'. Remove one: without a group, events "
            "are not stored for a retry."
        )


def merge(declared: Subscription, configured: Subscription | None) -> Subscription:
    """Return a subscription declared in code, with what the settings say of the same name."""
    if configured is None:
        return declared

    return replace(
        configured,
        echo=configured.echo or declared.echo,
        via=configured.via or declared.via,
        start=declared.start if configured.start == NEW else configured.start,
        group=configured.group and declared.group,
    )


def allowed(subscription: int | None, receiver: int | None, default: int) -> int:
    """Return the number of retries of a receiver.

    The subscription's number takes precedence over the receiver's, and that over the default.
    """
    asked = receiver if subscription is None else subscription
    return default if asked is None else asked


def unite(first: Subscription, second: Subscription, where: str) -> Subscription:
    """Merge two subscriptions of a service to the same name.

    :raises ConfigError: only one of them has ``group=None``.
    """
    if first.group is not second.group:
        raise ConfigError(
            f"{where}: one receiver has 'group': None and another has not. A process reads a "
            "stream either with its group or without: give both receivers the same 'group'."
        )

    return replace(
        second,
        echo=first.echo or second.echo,
        via=first.via if first.via == second.via else None,
        start=first.start if second.start == NEW else second.start,
        retries=first.retries if second.retries is None else second.retries,
    )


def _read_start(where: str, value: Any) -> str:
    words = {"new": NEW, "earliest": "0"}

    if isinstance(value, datetime) and value.tzinfo is not None:
        return _place(before_moment(int(value.timestamp() * 1000)))

    if isinstance(value, str):
        if value in words:
            return words[value]

        with suppress(ValueError):
            # Without its second part, an id is a moment: the group starts with its first entry.
            found = entry_id(value)
            return _place(found if "-" in value else before_moment(found[0]))

    raise ConfigError(
        f"{where} is {value!r}. Set it to 'new', 'earliest', the id of an entry such as "
        "'1700000000000-0', or an aware datetime. It is used only when the service subscribes for "
        "the first time."
    )


def _place(found: EntryId) -> str:
    return "0" if found == EARLIEST else id_text(found)


def _read_group(where: str, value: Any) -> bool:
    if value is True:
        return True

    raise ConfigError(
        f"{where} is {value!r}. The group is the service, so leave it out; or set it to None, so "
        "that every process of the service gets every event."
    )


def _read_sources(where: str, value: Any) -> frozenset[str]:
    names = [value] if isinstance(value, str) else value

    if isinstance(names, Iterable) and not isinstance(names, bytes | Mapping):
        names = list(names)

        if names and all(isinstance(name, str) and SERVICE_NAME.fullmatch(name) for name in names):
            return frozenset(names)

    raise ConfigError(
        f"{where} is {value!r}. Set it to a list of service names, for example ['accounts']."
    )


#: The options of a subscription, besides ``via``, each with the function that checks its value.
_READERS: dict[str, Reader] = {
    "from": _read_sources,
    "echo": read_flag,
    "retries": partial(read_whole, least=0, most=MAX_RETRIES),
    "start": _read_start,
    "group": _read_group,
}
