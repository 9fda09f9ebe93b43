"""Loggers that cannot disturb what they tell of."""

from __future__ import annotations

import logging
from typing import Any


class Logger(logging.LoggerAdapter[logging.Logger]):
    """Logs, whatever the program's filters and handlers do.

    A filter that looks for a request where there is none would otherwise end the thread
    that had something to say.
    """

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log; what raises on the way is shown where :mod:`logging` shows such errors."""
        # The line is that of the caller, not of this method.
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1

        try:
            super().log(level, msg, *args, **kwargs)
        except Exception:
            record = logging.makeLogRecord({"msg": msg, "args": args})
            logging.Handler().handleError(record)


def get_logger(name: str) -> Logger:
    """The logger called ``name``."""
    return Logger(logging.getLogger(name), None)
