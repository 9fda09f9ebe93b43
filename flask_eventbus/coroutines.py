"""Runs ``async def`` receivers from threads, on one event loop per thread."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_threads = threading.local()


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run ``coroutine`` to its end and return its result, in the caller's context.

    The loop of a thread is kept for its next coroutine, so that a client made in one
    event serves the next. Where a loop runs already, in an async view for example, the
    coroutine gets a thread of its own, since loops cannot nest.
    """
    context = contextvars.copy_context()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _runner().run(coroutine, context=context)

    with ThreadPoolExecutor(1, thread_name_prefix="eventbus-async") as pool:
        return pool.submit(context.run, asyncio.run, coroutine).result()


def close_runner() -> None:
    """Close the calling thread's event loop, if it has one."""
    runner = _threads.__dict__.pop("runner", None)

    if runner is not None:
        runner.close()


def _runner() -> asyncio.Runner:
    runner: asyncio.Runner | None = getattr(_threads, "runner", None)

    if runner is None:
        runner = _threads.runner = asyncio.Runner()

    return runner
