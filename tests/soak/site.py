"""A site of the soak, for uWSGI: each request sends an order, from a worker that was forked.

The app is loaded before the fork, and uWSGI does not run Python's hooks for forks.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from soak.cast import PAID, PLACED, SITE
from soak.publisher import Publisher

logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {SITE} %(process)d %(message)s")
publisher = Publisher(SITE, Path(os.environ["SOAK_FOLDER"]))
numbers = itertools.count(1)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Send one order; what became of it is a line in the folder."""
    n = next(numbers)
    publisher.send(PLACED if n % 2 else PAID, n)
    start_response("204 No Content", [])
    return []
