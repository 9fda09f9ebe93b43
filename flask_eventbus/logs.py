"""Loggers that cannot disturb what they tell of, and that nobody can forge records with."""

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

#: Characters that are logged of an error's text, and of any other text.
MOST_ERROR = 500
MOST_TEXT = 2_000

#: Characters that are logged of a traceback: its end.
MOST_TRACEBACK = 4_000


def _no_service() -> str | None:
    return None


#: Finds the service of this process, for records whose writer does not know it.
find_service: Callable[[], str | None] = _no_service


class Whole(str):
    """A text that the bus itself has made, such as a list of ids: it is logged in full."""

    __slots__ = ()


class Logger(logging.LoggerAdapter[logging.Logger]):
    """Logs, whatever the program's filters and handlers do, and whatever is in the texts.

    A filter that looks for a request where there is none would otherwise end the thread
    that had something to say. Texts from outside are made printable and cut, those of tracebacks
    too: a newline in one would let its sender write records of its own.
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
        """Log; what raises on the way is shown where :mod:`logging` shows such errors.

        :param extra: fields of the record: ``event_id``, ``signal``, ``service``, ``receiver`` and
            ``attempt``, as far as they are known.
        """
        if not self.isEnabledFor(level):
            return

        try:
            # The line is that of the caller, not of this method.
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
            # What formatters show in the place of the traceback that they would make.
            record.exc_text = traceback_of(error)

        return record


def get_logger(name: str) -> Logger:
    """The logger called ``name``."""
    return Logger(logging.getLogger(name), None)


def text_of(error: BaseException) -> str:
    """What an error says, printable and cut."""
    try:
        return printable(str(error), MOST_ERROR)
    except Exception as second:
        return f"(its text cannot be had: {type(second).__name__})"


def traceback_of(error: BaseException) -> str:
    """The end of an error's traceback; the texts of errors in it are printable and cut."""
    try:
        found = traceback.TracebackException.from_exception(error)
        _mark_notes(found)
        parts = list(found.format())
    except Exception as second:
        parts = [f"(the traceback cannot be had: {type(second).__name__})"]

    text = "\n".join(_shown_part(part) for part in parts)
    return text if len(text) <= MOST_TRACEBACK else f"...{text[3 - MOST_TRACEBACK :]}"


def _mark_notes(found: traceback.TracebackException) -> None:
    """Let no note of an error begin a line as it likes."""
    notes = getattr(found, "__notes__", None)

    if notes:
        texts = notes if isinstance(notes, Iterable) else [notes]
        marked = [f"note: {printable(str(text), MOST_ERROR)}" for text in texts]
        vars(found)["__notes__"] = marked

    for inner in (found.__cause__, found.__context__, *(found.exceptions or ())):
        if inner is not None:
            _mark_notes(inner)


def _shown_part(part: str) -> str:
    """A part of a traceback: a frame of several lines, or what an error says, on one."""
    # Within a group of exceptions parts stand behind a margin.
    if part.lstrip(" |+-").startswith('File "'):
        lines = part.rstrip("\n").split("\n")
        # Only the name of a file makes a line that is not indented.
        indented = (line if line.startswith(" ") else f"  {line}" for line in lines)
        return "\n".join(printable(line, MOST_TEXT) for line in indented)

    return printable(part.strip("\n"), MOST_ERROR)


def _shown(arg: object) -> object:
    """An argument of a log line as it may be shown."""
    if arg is None or isinstance(arg, int | float):
        return arg

    if isinstance(arg, BaseException):
        return text_of(arg)

    if isinstance(arg, bytes):
        return arg[:MOST_TEXT]

    return printable(str(arg), sys.maxsize if isinstance(arg, Whole) else MOST_TEXT)


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
