"""Takes emissions down: what a node sends, as events that can travel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any

from ..codec.codec import Codec
from ..config import Config
from ..errors import HopLimitError, PayloadError
from ..event import Event, handling
from ..routing.routes import Route
from .lanes import Lanes
from .message import Lane, Outgoing


class Emissions:
    """Makes an :class:`.Outgoing` of each emission, in the thread that sends.

    :param trace: the W3C trace context that came with whatever goes on, a request for example. The
        span of OpenTelemetry that is current goes before it, and so does the event being handled.
    """

    def __init__(
        self, *, config: Config, codec: Codec, lanes: Lanes, trace: Callable[[], str | None]
    ) -> None:
        self._config = config
        self._codec = codec
        self._lanes = lanes
        self._trace = trace

    def take_down(
        self, name: str, payload: Mapping[str, Any], route: Route, *, confirm: bool
    ) -> Outgoing:
        """An emission as it is now.

        :raises PayloadError: a value cannot travel, the key is missing, or the event is too large.
        :raises HopLimitError: the chain of causes is too long.
        """
        lane = self._lanes.lane(name, route)
        attributes = self._causes(name)
        data = self._codec.pack_payload(payload)

        if route.key is not None:
            attributes["key"] = _partition(lane, route.key, payload)

        outgoing = Outgoing(lane, data, attributes, confirm=confirm)
        self._check_size(outgoing)
        return outgoing

    def _causes(self, name: str) -> dict[str, Any]:
        cause = handling.get()

        if cause is None:
            return {"traceparent": _current_span() or self._trace()}

        hops = cause.hops + 1

        if hops > self._config.max_hops:
            raise HopLimitError(_chain(name, cause, self._config.max_hops))

        return {
            "hops": hops,
            "causation_id": cause.id,
            "correlation_id": cause.correlation_id or cause.id,
            "traceparent": _current_span() or cause.traceparent or self._trace(),
        }

    def _check_size(self, outgoing: Outgoing) -> None:
        if outgoing.size > self._config.max_event_bytes:
            raise PayloadError(
                f"An event of {outgoing.lane.name!r} would have up to {outgoing.size:,} bytes, "
                f"more than the {self._config.max_event_bytes:,} of 'EVENTBUS_MAX_EVENT_BYTES'. "
                "Send less, for example a reference to where the data is, or raise the limit in "
                "every service."
            )


def _partition(lane: Lane, name: str, payload: Mapping[str, Any]) -> str:
    """The value of the payload's key that keeps events in order among each other, as text."""
    if name not in payload:
        raise PayloadError(
            f"payload.{name}: the route of {lane.name!r} keeps events in order by this key, and "
            f"it is missing. Send it, or take 'key' off the route."
        )

    value = payload[name]
    key = "" if value is None else str(value)

    if not key:
        raise PayloadError(
            f"payload.{name}: the route of {lane.name!r} keeps events in order by this key, and "
            f"{short(value)} is no value to order by. Send another, or take 'key' off the route."
        )

    # What cannot travel is to be known now, and not by the thread that writes.
    lane.seal(b"", id="", time_ns=0, key=key)
    return key


def _current_span() -> str | None:
    """The trace context of OpenTelemetry's current span; ``None`` where there is none.

    It is not imported: a program that has a span has loaded it.
    """
    trace = sys.modules.get("opentelemetry.trace")
    find_span = getattr(trace, "get_current_span", None)

    if find_span is None:
        return None

    context = find_span().get_span_context()

    if not context.is_valid:
        return None

    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _chain(name: str, cause: Event, limit: int) -> str:
    return (
        f"An event of {name!r} would be number {cause.hops + 2} of a chain: "
        f"{cause.correlation_id or cause.id} began it, ... -> {cause.name!r} from "
        f"{cause.source!r} ({cause.id}) -> {name!r}. 'EVENTBUS_MAX_HOPS' allows {limit} hops. "
        "Find the receivers that answer each other's signals and break the circle."
    )
