"""How long to wait before the next try."""

from __future__ import annotations

import random

#: Seconds before the first retry.
FIRST = 0.1


class Backoff:
    """Doubles from 0.1 s up to ``most`` seconds, with jitter so that workers do not return as one.

    Jitter takes up to half of each wait away, as in "equal jitter" of the AWS Architecture
    Blog's article on exponential backoff.
    """

    def __init__(self, *, most: float) -> None:
        self._most = most
        self._tries = 0

    def next(self) -> float:
        """Seconds to wait now."""
        wait: float = min(self._most, FIRST * 2 ** min(self._tries, 30))
        self._tries += 1
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing

    def reset(self) -> None:
        """Begin again, after a success."""
        self._tries = 0
