"""Types of options and settings, for type checkers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import datetime
from typing import Any, Literal, TypedDict

from blinker import NamedSignal, Signal

Via = Literal["channel", "stream"]
"""The transport of an event: a channel reaches current listeners, a stream each service."""

OnOutage = Literal["buffer", "raise"]
"""What ``send()`` does while Redis is unreachable: keep the event in memory, or raise."""

Extractor = Callable[..., Mapping[str, Any] | None]
"""A function that is called like a receiver and returns the payload.

It returns ``None`` if this emission must not be published.
"""


class PublishOptions(TypedDict, total=False):
    """The options of one signal in ``EVENTBUS_PUBLISH``."""

    via: Via
    signal: Signal | str | None
    payload: Extractor | str | None
    confirm: bool | None
    after_commit: bool
    outbox: bool
    key: str | None
    maxlen: int | str | None
    replicas: int | None


# 'from' is a keyword, so the class syntax cannot define it.
SubscribeOptions = TypedDict(
    "SubscribeOptions",
    {
        "via": Via | None,
        "from": str | Iterable[str] | None,
        "echo": bool,
        "retries": int | None,
        "start": str | datetime | None,
        "group": Literal[True] | None,
    },
    total=False,
)
"""The options of one signal in ``EVENTBUS_SUBSCRIBE``."""

# Not Iterable: a mapping is an Iterable of its keys, so its values would not be checked. Mapping is
# invariant in its keys, which may be names, signals or both, so their type is Any.
Publish = (
    str
    | Signal
    | Sequence[str | Signal]
    | Set[str | Signal]
    | Mapping[Any, Via | PublishOptions | None]
)
"""The value of ``EVENTBUS_PUBLISH``."""

Subscribe = (
    str
    | NamedSignal
    | Sequence[str | NamedSignal]
    | Set[str | NamedSignal]
    | Mapping[Any, Via | SubscribeOptions | None]
)
"""The value of ``EVENTBUS_SUBSCRIBE``."""


class Settings(TypedDict, total=False):
    """The settings of ``Bus(...)``, except its URL and its service."""

    prefix: str
    publish: Publish
    subscribe: Subscribe
    receivers: list[str] | tuple[str, ...] | str
    enabled: bool
    listen: bool
    concurrency: int
    timeout: float
    on_outage: OnOutage
    buffer_size: int
    max_event_bytes: int
    max_hops: int
    grace: float
    retries: int
    claim_after: float
    maxlen: int | str
    dead_maxlen: int
    replicas: int
    duplicate_window: float
    log_events: bool
    publish_in_tests: bool
