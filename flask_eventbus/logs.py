"""Loggers that cannot disturb what they tell of, and that nobody can forge records with."""

from __future__ import annotations

import logging
import sys
import traceback
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
