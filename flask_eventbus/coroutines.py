"""Run coroutines from threads without an event loop, and blocking calls from event loops."""

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
    """Run ``coroutine`` in the caller's context, and return its result.

    Within :func:`kept_loop` all coroutines of the thread share a loop; otherwise each gets its
    own. If a loop is running in this thread, for example in an async view, the coroutine runs in
    a new thread, since event loops cannot be nested.
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

    If the waiting task is cancelled, ``call`` still runs to its end. Without an asyncio loop, or
    once its pool has ended, it runs in this thread.

    :param failed: called with the exception of ``call`` if the task was cancelled before.
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
    """Keep one event loop for this thread, so that receivers can keep clients across events."""
    # The runner creates its loop on first use.
    runner = _threads.runner = asyncio.Runner(loop_factory=_make_loop)

    try:
        yield
    finally:
        _forget_runner()
        runner.close()


def _is_in_loop() -> bool:
    # A separate function, so that this error is not the context of a coroutine's exception.
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
    """Return a loop that a forked child can discard, since it would share an ``epoll``."""
    return asyncio.SelectorEventLoop(selectors.PollSelector())


def _gevent() -> Any:
    """Return gevent if it has replaced threads by greenlets, else ``None``."""
    monkey = sys.modules.get("gevent.monkey")

    if monkey is not None and monkey.is_module_patched("threading"):
        return sys.modules["gevent"]

    return None


def _run_in_real_thread(
    gevent: Any, coroutine: Coroutine[Any, Any, Any], context: contextvars.Context
) -> Any:
    """Run a coroutine in a real thread, since all greenlets share one running loop.

    The loop ends with its coroutine: its threads are greenlets too, and nothing would run them
    between two coroutines.
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
    """Discard the loop of the parent in a forked child."""
    _threads.__dict__.pop("runner", None)
