"""The signals, services, workers and publishers of a soak."""

from __future__ import annotations

from pathlib import Path

PLACED = "order_placed"
PAID = "order_paid"

#: Receivers, as lines and dead letters name them.
FLAKY = "mailer.send"
ORDERLY = "ledger.book"
SCREEN = "screen.show"

#: What each receiver is to have handled once per service.
HEARS = {
    FLAKY: (PLACED,),
    "mailer.note": (PLACED,),
    "audit.write": (PLACED, PAID),
    ORDERLY: (PAID,),
}

#: The services and how many workers each has.
SERVICES = {"mailer": 3, "audit": 2, "ledger": 2}

#: Processes of which each hears every event, from its start to its end.
SCREENS = ("screen-1", "screen-2")

#: Publishers, with what each does in an outage.
PUBLISHERS = {"web": "raise", "till": "buffer"}

#: What uWSGI serves, with so many workers; each ends after so many requests.
SITE = "site"
SITE_WORKERS = 2
SITE_REQUESTS = 200

#: Seconds after which the entries of a silent worker are taken over.
CLAIM_AFTER = 5

#: Why the flaky receiver gives up.
REJECTS = "nobody wants this one"

_REJECTED = 97


def is_rejected(n: int) -> bool:
    """Return True if the flaky receiver rejects this event, which then becomes a dead letter."""
    return n % _REJECTED == 0


def settings(service: str, url: str, folder: Path) -> dict[str, str]:
    """The environment of a process of a service."""
    concurrency = 4 if service == "audit" else 1
    return {
        "EVENTBUS_SERVICE": service,
        "EVENTBUS_URL": url,
        "EVENTBUS_PREFIX": "soak",
        "EVENTBUS_CLAIM_AFTER": str(CLAIM_AFTER),
        "EVENTBUS_CONCURRENCY": str(concurrency),
        "EVENTBUS_ON_OUTAGE": {**PUBLISHERS, SITE: "raise"}.get(service, "buffer"),
        # A master that is lost takes along what no replica has: that is not confirmed.
        "EVENTBUS_REPLICAS": "1",
        "SOAK_FOLDER": str(folder),
        "EVENTBUS_MAXLEN": "10000000",
    }
