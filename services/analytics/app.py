"""Analytics: counts the API calls of all services, and shows the last minute of them, live."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flask import Flask, render_template
from flask.typing import ResponseReturnValue

from flask_eventbus import EventBus, current_event

#: Seconds that the page shows.
SPAN = 60
#: Services shown one by one, as many as there are colours; those heard of later count together.
MOST_SERVICES = 6
OTHERS = "(others)"
#: Rules shown.
MOST_RULES = 8
#: Times kept of one service in one second; calls beyond them are counted, but not timed.
MOST_TIMES = 500

bus = EventBus()


class Second:
    """The calls of one second."""

    def __init__(self) -> None:
        #: How often, by service and rule.
        self.calls: Counter[tuple[str, str]] = Counter()
        #: How long, by service.
        self.milliseconds: defaultdict[str, list[float]] = defaultdict(list)


class Calls:
    """The calls of all services: totals since the start, and the last minute by the second."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._totals: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._seconds: defaultdict[int, Second] = defaultdict(Second)

    def add(self, service: str, rule: str, status: int, milliseconds: float, at: float) -> None:
        """Count one call, made ``at`` that time, in seconds since the epoch."""
        if not 0 <= milliseconds < math.inf:
            raise ValueError(f"A call cannot take {milliseconds} ms.")

        failed = status >= 500

        with self._lock:
            if service not in self._totals and len(self._totals) >= MOST_SERVICES:
                service = OTHERS

            self._totals[service] += 1
            self._failures[service] += failed
            self._put(service, rule, milliseconds, at)

    def summary(self) -> dict[str, Any]:
        """Return the data of the page, for complete seconds."""
        with self._lock:
            now = int(self._clock())
            seconds = [self._seconds.get(at, Second()) for at in range(now - SPAN, now)]
            return {
                "now": now,
                "since": self._since,
                "services": [self._service(name, seconds) for name in self._totals],
                "rules": hottest(seconds),
            }

    def _put(self, service: str, rule: str, milliseconds: float, at: float) -> None:
        now = self._clock()

        # A call that waited in a buffer while Redis was away belongs where it was made.
        if at >= now - SPAN:
            second = self._seconds[int(min(at, now))]
            second.calls[service, rule] += 1

            if len(second.milliseconds[service]) < MOST_TIMES:
                second.milliseconds[service].append(milliseconds)

        for past in [past for past in self._seconds if past < now - SPAN - 1]:
            del self._seconds[past]

    def _service(self, name: str, seconds: Sequence[Second]) -> dict[str, Any]:
        times = sorted(taken for second in seconds for taken in second.milliseconds[name])
        return {
            "name": name,
            "total": self._totals[name],
            "failures": self._failures[name],
            "per_second": [calls_of(name, second) for second in seconds],
            "median": percentile(times, 50),
            "p95": percentile(times, 95),
        }


def calls_of(service: str, second: Second) -> int:
    return sum(count for (name, _), count in second.calls.items() if name == service)


def hottest(seconds: Sequence[Second]) -> list[dict[str, Any]]:
    calls: Counter[tuple[str, str]] = sum((second.calls for second in seconds), Counter())
    return [
        {"service": service, "rule": rule, "calls": count}
        for (service, rule), count in calls.most_common(MOST_RULES)
    ]


def percentile(times: Sequence[float], percent: int) -> float | None:
    """The nearest rank: a time that was measured, and none in between."""
    return times[math.ceil(len(times) * percent / 100) - 1] if times else None


calls = Calls()


@bus.on("api_call", via="channel")
def count(
    sender: str, method: str, rule: str, status: int, milliseconds: float, **extra: object
) -> None:
    # What comes from outside is not kept at any length.
    rule = f"{method} {rule}"[:120]
    calls.add(sender, rule, status, milliseconds, at=current_event.time.timestamp())


def create_app(settings: Mapping[str, Any] | None = None) -> Flask:
    """The service; ``settings`` go before those of the environment."""
    app = Flask(__name__)
    app.config.from_mapping(
        EVENTBUS_SERVICE="analytics",
        EVENTBUS_URL="redis://localhost:6379/0",
    )
    app.config.from_prefixed_env()
    app.config.from_mapping(settings or {})
    bus.init_app(app)

    @app.get("/")
    def page() -> ResponseReturnValue:
        return render_template("page.html", span=SPAN, others=OTHERS)

    @app.get("/counts.json")
    def counts() -> ResponseReturnValue:
        node = bus.health()
        return calls.summary() | {"connected": node.connected, "missed": node.missed}

    @app.get("/health")
    def health() -> ResponseReturnValue:
        # Hearing is this service's work: while it hears nothing, it does none.
        node = bus.health()
        return {
            "service": node.service,
            "listening": node.listening,
            "connected": node.connected,
            "missed": node.missed,
        }, 200 if node.connected or not node.listening else 503

    return app
