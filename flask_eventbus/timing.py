"""The times and sizes that users do not set. Tests hand in smaller ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long the parts of a node wait, how often they look, and how much they keep."""

    #: Delay of the first retry in seconds. It doubles with each attempt.
    first_retry: float = 1.0

    #: Seconds between two checks for released entries and due retries. One round trip checks all
    #: streams.
    check_released_every: float = 5.0


#: The times and sizes of a service.
TIMING = Timing()
