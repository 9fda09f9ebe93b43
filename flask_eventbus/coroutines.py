"""Runs ``async def`` receivers from threads that have no event loop of their own."""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from .ending import after_fork, notice_fork

_threads = threading.local()


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run ``coroutine`` to its end and return its result, in the caller's context.

    Inside of :func:`kept_loop` one loop serves all coroutines of the thread; elsewhere
    each has its own. Where a loop runs already, in an async view for example, the
    coroutine gets a thread of its own, since loops cannot nest.
    """
    context = contextvars.copy_context()
    gevent = _gevent()

    if gevent is not None:
        return _run_in_real_thread(gevent, coroutine, context)

    if not _is_in_loop():
        return _run_here(coroutine, context)

    with ThreadPoolExecutor(1, thread_name_prefix="eventbus-async") as pool:
        return pool.submit(context.run, asyncio.run, coroutine).result()


async def in_thread(call: Callable[[], None], *, failed: Callable[[BaseException], None]) -> None:
    """Run ``call`` in a thread of the event loop's pool, in a copy of the context, and wait for it.

    It runs to its end although the waiting task is cancelled. Where there is no loop of asyncio, or
    its pool has ended, it runs here.

    :param failed: called with what ``call`` raised once nobody waits for it any more.
    """
    context = contextvars.copy_context()

    try:
        running = asyncio.get_running_loop().run_in_executor(None, context.run, call)
    except RuntimeError:
        return call()

    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:

        def report(ended: asyncio.Future[None]) -> None:
            if not ended.cancelled() and (error := ended.exception()) is not None:
                failed(error)

        running.add_done_callback(report)
        raise


@contextmanager
def kept_loop() -> Iterator[None]:
    """Keep one event loop for this thread, so that a client made in one event serves the next."""
    # The runner makes its loop when it is first used.
    runner = _threads.runner = asyncio.Runner(loop_factory=_make_loop)

    try:
        yield
    finally:
        _forget_runner()
        runner.close()


def _is_in_loop() -> bool:
    # By itself, so that its error is not the context of what a coroutine raises.
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False

    return True


def _run_here(coroutine: Coroutine[Any, Any, Any], context: contextvars.Context) -> Any:
    notice_fork()
    kept: asyncio.Runner | None = getattr(_threads, "runner", None)

    if kept is not None:
        return kept.run(coroutine, context=context)

    with asyncio.Runner(loop_factory=_make_loop) as runner:
        return runner.run(coroutine, context=context)


def _make_loop() -> asyncio.AbstractEventLoop:
    """A loop that a forked child can let go of; an ``epoll`` would be one with the parent's."""
    return asyncio.SelectorEventLoop(selectors.PollSelector())


def _gevent() -> Any:
    """gevent, where it has made greenlets of all threads."""
    monkey = sys.modules.get("gevent.monkey")

    if monkey is not None and monkey.is_module_patched("threading"):
        return sys.modules["gevent"]

    return None


def _run_in_real_thread(
    gevent: Any, coroutine: Coroutine[Any, Any, Any], context: contextvars.Context
) -> Any:
    """Greenlets share one place for a running loop; a thread beside them has its own.

    The loop ends with its coroutine: threads that it starts are greenlets, too, and nothing
    runs those between two coroutines.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=_make_loop) as runner:
                future.set_result(runner.run(coroutine, context=context))
        except BaseException as error:
            future.set_exception(error)

    gevent.get_hub().threadpool.apply(run)
    return future.result()


@after_fork
def _forget_runner() -> None:
    """In a forked child: the loop of the thread that forked is the parent's."""
    _threads.__dict__.pop("runner", None)
