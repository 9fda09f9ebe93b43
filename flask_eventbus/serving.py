"""Finds out whether and when a process serves, so that exactly those listen.

werkzeug's development server is served by ``flask run`` and ``app.run()`` alike, and begins in
``serve_forever()``: in the process that serves, not in the one that watches files for it.
gunicorn has hooks for the begin and the end of each worker. Any other server is known by the
first request it brings.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from flask import Flask, request
from werkzeug.serving import BaseWSGIServer

from .ending import after_fork
from .node import nodes, stop_all

#: Of these, every server's request has one, and a request context made by hand has none.
_OF_SERVERS = ("SERVER_SOFTWARE", "REMOTE_ADDR", "HTTP_USER_AGENT")


def call_when_serving(app: Flask, start: Callable[[], None]) -> None:
    """Call ``start`` in each process that serves ``app``, when all of the app is loaded.

    Not for an app under test, neither for ``TESTING`` nor for requests of a test client.
    ``start`` has to bear being called twice, by two first requests at once.
    """
    serving = _Serving(app, start)
    app.before_request(serving.begin_at_request)
    _servings.add(serving)
    _hook_werkzeug()
    _hook_gunicorn()


class _Serving:
    """Whether this process serves an app; a forked child begins by itself."""

    def __init__(self, app: Flask, start: Callable[[], None]) -> None:
        #: Weakly: the app holds this object, and is freed with its last reference.
        self._app = weakref.ref(app)
        self._start = start
        self._process: int | None = None

    def begin(self) -> None:
        """Start, unless this process has or the app is under test."""
        app = self._app()

        if self._process == os.getpid() or app is None or app.testing:
            return

        self._process = os.getpid()
        self._start()

    def begin_at_request(self) -> None:
        """Start at a request, if it is one that a server brings."""
        if self._process != os.getpid() and not _is_made_up():
            self.begin()


#: Those of the apps that live; each app holds its own.
_servings: weakref.WeakSet[_Serving] = weakref.WeakSet()


def _begin_all() -> None:
    for serving in list(_servings):
        serving.begin()


def _is_made_up() -> bool:
    """Whether a test client makes the request, or code that wanted a request context."""
    if all(key not in request.environ for key in _OF_SERVERS):
        return True

    test = sys.modules.get("werkzeug.test")
    return test is not None and any(
        frame.f_code is test.run_wsgi_app.__code__ for frame in _frames()
    )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)

    while frame is not None:
        yield frame
        frame = frame.f_back


# -- werkzeug -----------------------------------------------------------------------------


@functools.cache
def _hook_werkzeug() -> None:
    serve = BaseWSGIServer.serve_forever

    def serve_forever(self: BaseWSGIServer, poll_interval: float = 0.5) -> None:
        if not _serves_an_error(self):
            _begin_all()

        serve(self, poll_interval)

    BaseWSGIServer.serve_forever = serve_forever  # type: ignore[method-assign]  # has no hook


def _serves_an_error(server: BaseWSGIServer) -> bool:
    """Whether ``flask run`` shows why the app cannot be loaded, until somebody mends it."""
    application = getattr(server.app, "app", server.app)
    return getattr(application, "__module__", None) == "flask.cli"


# -- gunicorn -----------------------------------------------------------------------------


class _WorkerBegins:
    """gunicorn's ``post_worker_init``: the app is loaded, and threads are what they will be."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, worker: Any) -> None:
        self._before(worker)

        for node in list(nodes):
            node.recreate_unused()

        _begin_all()


class _WorkerEnds:
    """gunicorn's ``worker_exit``: requests are done; the interpreter still has all its means."""

    def __init__(self, before: Callable[[Any, Any], Any]) -> None:
        self._before = before

    def __call__(self, arbiter: Any, worker: Any) -> None:
        # The master calls it as well, for a worker that it finds gone.
        if worker.pid == os.getpid():
            stop_all()

        self._before(arbiter, worker)


def _hook_gunicorn() -> None:
    """In gunicorn, begin and end with each worker, after what its configuration asks for."""
    config = _gunicorn_config()

    if config is not None:
        _wrap(config, "post_worker_init", _WorkerBegins)
        _wrap(config, "worker_exit", _WorkerEnds)


def _wrap(config: Any, name: str, hook: type[_WorkerBegins] | type[_WorkerEnds]) -> None:
    before = getattr(config, name)

    if not isinstance(before, hook):
        config.set(name, hook(before))


def _gunicorn_config() -> Any:
    """The configuration of the gunicorn that loads the app or forks a worker right now."""
    base = sys.modules.get("gunicorn.app.base")
    arbiter = sys.modules.get("gunicorn.arbiter")

    if base is None or arbiter is None:
        return None

    for frame in _frames():
        owner: Any = frame.f_locals.get("self")

        if issubclass(type(owner), base.BaseApplication | arbiter.Arbiter):
            return owner.cfg

    return None


# An app that was loaded before its worker was forked meets settings that may have been read
# anew since; one that gunicorn did not load itself meets them here for the first time.
after_fork(_hook_gunicorn)
