"""Loggers that never raise, escape untrusted text, and limit repeated lines; and counters."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .text import printable

#: Number of characters logged of an error's text, and of any other text.
MAX_ERROR_CHARS = 500
MAX_TEXT_CHARS = 2_000

#: Number of characters logged of a traceback, counted from its end.
MAX_TRACEBACK_CHARS = 4_000


#: Returns the service of this process, for records without one.
find_service: Callable[[], str | None] = lambda: None  # noqa: E731 - it is replaced


class Whole(str):
    """A text that the bus made, such as a list of ids, which is logged in full."""

    __slots__ = ()


class Logger(logging.LoggerAdapter[logging.Logger]):
    """A logger that catches errors of the program's filters and handlers, and escapes arguments.

    A filter that needs a request, for example, raises in the bus's threads and would end them.
    Texts from outside are escaped and cut, also in tracebacks. Otherwise a sender could forge log
    records with a newline.
    """

    def log(
        self,
        level: int,
        msg: object,
        *args: object,
        exc_info: Any = None,
        extra: Mapping[str, object] | None = None,
        stacklevel: int = 1,
        **kwargs: Any,
    ) -> None:
        """Log a record; errors of filters and handlers go to :meth:`logging.Handler.handleError`.

        :param extra: fields of the record: ``event_id``, ``signal``, ``service``, ``receiver`` and
            ``attempt``, if known.
        """
        if not self.isEnabledFor(level):
            return

        try:
            # The record shows the line of the caller, not of this method.
            record = self._record(level, msg, args, exc_info, extra, stacklevel + 2)
            self.logger.handle(record)
        except Exception:
            record = logging.makeLogRecord({"msg": msg, "args": args})
            logging.Handler().handleError(record)

    def _record(
        self,
        level: int,
        msg: object,
        args: tuple[object, ...],
        exc_info: Any,
        extra: Mapping[str, object] | None,
        stacklevel: int,
    ) -> logging.LogRecord:
        path, line, function, _ = self.logger.findCaller(False, stacklevel)
        error = sys.exc_info()[1] if exc_info is True else exc_info
        info = (type(error), error, error.__traceback__) if error else None
        fields = {"service": find_service(), **(extra or {})}
        known = {name: value for name, value in fields.items() if value not in (None, "")}
        shown = tuple(_shown(arg) for arg in args)
        record = self.logger.makeRecord(
            self.logger.name, level, path, line, msg, shown, info, function, known
        )

        if error:
            # Formatters use this text instead of formatting the traceback.
            record.exc_text = traceback_of(error)

        return record


def get_logger(name: str) -> Logger:
    """Return the logger called ``name``."""
    return Logger(logging.getLogger(name), None)


def text_of(error: BaseException) -> str:
    """Return the text of an error, escaped and cut."""
    try:
        return printable(str(error), MAX_ERROR_CHARS)
    except Exception as second:
        return f"(str() of the error raised {type(second).__name__})"


def traceback_of(error: BaseException) -> str:
    """Return the end of an error's traceback, with the texts of errors escaped and cut."""
    try:
        found = traceback.TracebackException.from_exception(error)
        _mark_notes(found)
        parts = list(found.format())
    except Exception as second:
        parts = [f"(formatting the traceback raised {type(second).__name__})"]

    text = "\n".join(_shown_part(part) for part in parts)
    return text if len(text) <= MAX_TRACEBACK_CHARS else f"...{text[3 - MAX_TRACEBACK_CHARS :]}"


def _mark_notes(found: traceback.TracebackException) -> None:
    """Prefix and escape the notes of an error, so that they cannot look like other lines."""
    notes = getattr(found, "__notes__", None)

    if notes:
        texts = notes if isinstance(notes, Iterable) else [notes]
        marked = [f"note: {printable(str(text), MAX_ERROR_CHARS)}" for text in texts]
        vars(found)["__notes__"] = marked

    for inner in (found.__cause__, found.__context__, *(found.exceptions or ())):
        if inner is not None:
            _mark_notes(inner)


def _shown_part(part: str) -> str:
    """Escape a part of a traceback: a frame of several lines, or the text of an error."""
    # In an exception group, each part has a margin.
    if part.lstrip(" |+-").startswith('File "'):
        lines = part.rstrip("\n").split("\n")
        # A line that is not indented can only come from a newline in a file name.
        indented = (line if line.startswith(" ") else f"  {line}" for line in lines)
        return "\n".join(printable(line, MAX_TEXT_CHARS) for line in indented)

    return printable(part.strip("\n"), MAX_ERROR_CHARS)


def _shown(arg: object) -> object:
    """Return an argument of a log line, escaped and cut."""
    if arg is None or isinstance(arg, int | float):
        return arg

    if isinstance(arg, BaseException):
        return text_of(arg)

    if isinstance(arg, bytes):
        return arg[:MAX_TEXT_CHARS]

    return printable(str(arg), sys.maxsize if isinstance(arg, Whole) else MAX_TEXT_CHARS)


#: Number of lines of one kind logged per minute; further lines are only counted.
LINES_PER_MINUTE = 10

#: Largest number of kinds. Some contain names from Redis, so the number is bounded.
KINDS = 1_000


class Tally:
    """A part of a counter that one thread adds to, without a lock."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Counters:
    """Named counters that only grow."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may interrupt the thread that holds the lock.
        self._lock = threading.RLock()
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._tallies: list[tuple[str, Tally]] = []

    def tally(self, name: str) -> Tally:
        """Return a part of the counter ``name``, for the calling thread alone to add to."""
        tally = Tally()

        with self._lock:
            self._tallies.append((name, tally))

        return tally

    def add(self, name: str, count: int = 1) -> None:
        """Add ``count`` to the counter ``name``."""
        with self._lock:
            self._counts[name] += count

    def get(self, name: str) -> int:
        """Return the counter ``name``; 0 if nothing was counted."""
        return self.all().get(name, 0)

    def all(self) -> dict[str, int]:
        """Return a copy of all counters."""
        with self._lock:
            counts = self._counts.copy()

            for name, tally in self._tallies:
                # A counter appears once something was counted.
                if tally.count:
                    counts[name] += tally.count

        return dict(counts)


class BoundedLog:
    """Logs at most :data:`LINES_PER_MINUTE` lines of a kind, and then the number left out.

    For a state that lasts, :meth:`once` logs its start and :meth:`over` its end.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._lock = threading.RLock()
        self._windows: dict[str, tuple[float, int]] = {}
        #: Kinds of states that were logged and have not ended.
        self._open_states: set[str] = set()

    def info(self, kind: str, text: str, *args: object, **fields: Any) -> None:
        """Log ``text`` at level INFO, unless the limit of its kind is reached.

        :param fields: ``exc_info`` and ``extra`` of :meth:`.Logger.log`.
        """
        self._write(logging.INFO, kind, text, *args, **fields)

    def warning(self, kind: str, text: str, *args: object, **fields: Any) -> None:
        """Log ``text`` as a warning, unless the limit of its kind is reached."""
        self._write(logging.WARNING, kind, text, *args, **fields)

    def error(self, kind: str, text: str, *args: object, **fields: Any) -> None:
        """Log ``text`` as an error, unless the limit of its kind is reached."""
        self._write(logging.ERROR, kind, text, *args, **fields)

    def once(
        self, kind: str, text: str, *args: object, level: int = logging.WARNING, **fields: Any
    ) -> None:
        """Log the start of a state, and not again before :meth:`over` was called."""
        self._write(level, kind, text, *args, is_state=True, **fields)

    def over(self, kind: str, text: str, *args: object, **fields: Any) -> None:
        """Log the end of a state as a warning, if its start was logged."""
        if kind in self._open_states:
            self._open_states.discard(kind)
            self._write(logging.WARNING, f"end of {kind}", text, *args, **fields)

    def _write(
        self,
        level: int,
        kind: str,
        text: str,
        *args: object,
        is_state: bool = False,
        **fields: Any,
    ) -> None:
        left_out = self._admit(kind, is_state)

        if left_out:
            text += f" ({left_out} more like this were counted and not logged)"

        if left_out is not None:
            self._logger.log(level, text, *args, stacklevel=3, **fields)

    def _admit(self, kind: str, is_state: bool) -> int | None:
        """Return the number of lines left out before this one, or ``None`` to leave it out too.

        :param is_state: True to leave it out if the state is open already.
        """
        now = time.monotonic()

        with self._lock:
            if is_state and kind in self._open_states:
                return None

            key = kind if kind in self._windows or len(self._windows) < KINDS else "others"
            start, lines = self._windows.get(key, (now, 0))
            is_new = now - start >= 60
            self._windows[key] = (now, 1) if is_new else (start, lines + 1)

            if lines >= LINES_PER_MINUTE and not is_new:
                return None

            if len(self._open_states) < KINDS:
                self._open_states.add(kind)

            return max(0, lines - LINES_PER_MINUTE) if is_new else 0
