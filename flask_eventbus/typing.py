"""The types of options and settings, for programs that a type checker reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import datetime
from typing import Any, Literal, TypedDict

from blinker import NamedSignal, Signal

Via = Literal["channel", "stream"]
"""How an event travels: whoever listens now hears it, or each service hears it once."""

OnOutage = Literal["buffer", "raise"]
"""What ``send()`` does while Redis is away: keep the event in memory, or raise."""

Extractor = Callable[..., Mapping[str, Any] | None]
"""Makes plain values of a live emission: called as a receiver is.

It returns the payload, or ``None`` if this emission is not published.
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


# 'from' is no name that a class could give.
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

# Not Iterable: a mapping is one, of its keys, so its values would not be checked. A mapping's keys
# may be names, signals or both: Mapping is invariant in them, so their type is Any.
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
    """The settings of ``Bus(...)``, beside its URL and its service."""

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
