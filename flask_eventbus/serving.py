"""Finds out whether and when a process serves, so that exactly those listen.

Three ways, each by what the server itself offers: gunicorn calls ``post_worker_init`` in
each worker once the app is loaded; under ``flask run`` the click command tells which process
serves; any other server is known by its first request.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click
from flask import Flask, request
from flask.cli import ScriptInfo
from flask.helpers import get_debug_flag
from werkzeug.serving import is_running_from_reloader

#: Seconds between looks at whether ``flask run`` has loaded the app.
LOOK = 0.02


def call_when_serving(app: Flask, start: Callable[[], None]) -> None:
    """Call ``start`` in each process that serves ``app``, once it is about to; perhaps again.

    ``start`` has to bear being called more than once.
    """
    _at_first_request(app, start)

    if not _in_gunicorn(start):
        _in_flask_run(start)


# -- any server ---------------------------------------------------------------------------


def _at_first_request(app: Flask, start: Callable[[], None]) -> None:
    served: set[int] = set()

    @app.before_request
    def begin() -> None:
        process = os.getpid()

        if process not in served and not _is_test_request(app):
            served.add(process)
            start()


def _is_test_request(app: Flask) -> bool:
    """Whether a test client made the request: servers name themselves, it names werkzeug."""
    agent = request.environ.get("HTTP_USER_AGENT", "")
    by_client = "SERVER_SOFTWARE" not in request.environ and agent.startswith("Werkzeug/")
    return app.testing or by_client


# -- gunicorn -----------------------------------------------------------------------------

_gunicorn_starts: list[Callable[[], None]] = []


def _in_gunicorn(start: Callable[[], None]) -> bool:
    """Arrange the start in gunicorn's workers; whether this is gunicorn."""
    if _hook_gunicorn():
        _gunicorn_starts.append(start)
        return True

    return False


def _hook_gunicorn() -> bool:
    config = _gunicorn_config()

    if config is None:
        return False

    before = config.post_worker_init

    if getattr(before, "of_eventbus", False):
        return True

    def post_worker_init(worker: Any) -> None:
        before(worker)

        for start in list(_gunicorn_starts):
            start()

    post_worker_init.of_eventbus = True  # type: ignore[attr-defined]  # known by it above
    config.set("post_worker_init", post_worker_init)
    return True


def _gunicorn_config() -> Any:
    """The configuration of the gunicorn that loads the app or forks a worker right now."""
    base = sys.modules.get("gunicorn.app.base")
    arbiter = sys.modules.get("gunicorn.arbiter")

    if base is None or arbiter is None:
        return None

    owners = (base.BaseApplication, arbiter.Arbiter)

    for frame in _frames(sys._getframe()):
        owner = frame.f_locals.get("self")

        if isinstance(owner, owners):
            return owner.cfg

    return None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _after_fork() -> None:
    """In a forked worker: with a preloaded app, gunicorn may have read its settings anew."""
    if _gunicorn_starts:
        _hook_gunicorn()


os.register_at_fork(after_in_child=_after_fork)


# -- flask run ----------------------------------------------------------------------------


def _in_flask_run(start: Callable[[], None]) -> None:
    context = click.get_current_context(silent=True)

    if context is None or context.command.name != "run" or "reload" not in context.params:
        return

    info = context.find_object(ScriptInfo)

    if info is not None and _serves(context.params["reload"]):
        _start_after_loading(start)


def _serves(reload: bool | None) -> bool:
    """Whether this process serves, and is not the one that only watches files."""
    reloads = get_debug_flag() if reload is None else reload
    return not reloads or is_running_from_reloader()


def _start_after_loading(start: Callable[[], None]) -> None:
    """Start once the app is loaded: receivers are still being connected now."""
    loader = threading.get_ident()

    def wait() -> None:
        while _is_loading(loader):
            time.sleep(LOOK)

        start()

    threading.Thread(target=wait, name="eventbus-start", daemon=True).start()


def _is_loading(thread: int) -> bool:
    frames = _frames(sys._current_frames().get(thread))
    return any(frame.f_code is ScriptInfo.load_app.__code__ for frame in frames)
