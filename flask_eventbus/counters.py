"""What a node counts, and how it logs what may come by the thousand."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping

from .logs import Logger

#: Lines of one kind that are logged in one minute; the rest is only counted.
LINES_PER_MINUTE = 10

#: Kinds that are told apart; some have names from the wire, which must not pile up.
KINDS = 1_000


class Counters:
    """Named numbers that only grow; one lock, taken once per batch where it matters."""

    def __init__(self) -> None:
        # Reentrant, as all locks here: a signal handler may interrupt the thread that holds it.
        self._lock = threading.RLock()
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, count: int = 1) -> None:
        """Add ``count`` to the number called ``name``."""
        with self._lock:
            self._counts[name] += count

    def get(self, name: str) -> int:
        """The number called ``name``; 0 if nothing was counted."""
        return self._counts.get(name, 0)

    def all(self) -> dict[str, int]:
        """A copy of all numbers."""
        with self._lock:
            return dict(self._counts)


class BoundedLog:
    """Logs at most :data:`LINES_PER_MINUTE` of a kind, then says how many it left out.

    A kind may be a state that lasts: :meth:`over` logs its end.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._lock = threading.RLock()
        self._windows: dict[str, tuple[float, int]] = {}
        #: Kinds that were logged since they were last over.
        self._going_on: set[str] = set()

    def info(
        self, kind: str, text: str, *args: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """Log ``text`` as information, unless enough of its kind were logged this minute."""
        self._write(logging.INFO, kind, text, *args, extra=extra)

    def warning(
        self, kind: str, text: str, *args: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """Log ``text`` as a warning, unless enough of its kind were logged this minute.

        :param extra: fields of the record, see :class:`.logs.Logger`.
        """
        self._write(logging.WARNING, kind, text, *args, extra=extra)

    def error(
        self,
        kind: str,
        text: str,
        *args: object,
        exc_info: BaseException | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Log ``text`` as an error, unless enough of its kind were logged this minute."""
        self._write(logging.ERROR, kind, text, *args, exc_info=exc_info, extra=extra)

    def once(
        self,
        kind: str,
        text: str,
        *args: object,
        level: int = logging.WARNING,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Log that a state begins that lasts: not again before it is :meth:`over`."""
        if kind not in self._going_on:
            self._write(level, kind, text, *args, extra=extra)

    def over(
        self, kind: str, text: str, *args: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """Log the end of a state as a warning, if its kind was logged since the last end."""
        if kind in self._going_on:
            self._going_on.discard(kind)
            self._write(logging.WARNING, f"end of {kind}", text, *args, extra=extra)

    def _write(
        self,
        level: int,
        kind: str,
        text: str,
        *args: object,
        exc_info: BaseException | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        left_out = self._admit(kind)

        if left_out is None:
            return

        if len(self._going_on) < KINDS:
            self._going_on.add(kind)

        if left_out:
            text += f" ({left_out} more like this were counted and not logged)"

        self._logger.log(level, text, *args, exc_info=exc_info, extra=extra, stacklevel=3)

    def _admit(self, kind: str) -> int | None:
        """How many lines were left out before this one, or ``None`` to leave it out too."""
        now = time.monotonic()

        with self._lock:
            if kind not in self._windows and len(self._windows) >= KINDS:
                kind = "others"

            start, lines = self._windows.get(kind, (now, 0))

            if now - start >= 60:
                self._windows[kind] = (now, 1)
                return max(0, lines - LINES_PER_MINUTE)

            self._windows[kind] = (start, lines + 1)
            return 0 if lines < LINES_PER_MINUTE else None
