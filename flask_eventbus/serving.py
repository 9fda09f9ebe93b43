"""Detect when a process serves an app, so that only serving processes listen.

Werkzeug's development server, used by ``flask run`` and ``app.run()``, calls ``serve_forever()``
in the process that serves, not in the one that watches files. gunicorn has hooks for the start
and the end of each worker. Under any other server, the first request starts listening.
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

#: Requests of every server have at least one of these; a request context made by hand has none.
_OF_SERVERS = ("SERVER_SOFTWARE", "REMOTE_ADDR", "HTTP_USER_AGENT")


def call_when_serving(app: Flask, start: Callable[[], None]) -> None:
    """Call ``start`` in each process that serves ``app``, once the app is loaded.

    It is not called with ``TESTING``, or for requests of a test client. Two first requests at
    once may call ``start`` twice.
    """
    serving = _Serving(app, start)
    app.before_request(serving.start_at_request)
    _servings.add(serving)
    _hook_werkzeug()
    _hook_gunicorn()


class _Serving:
    """Starts an app's node once in each process that serves the app."""

    def __init__(self, app: Flask, start: Callable[[], None]) -> None:
        #: A weak reference, because the app holds this object.
        self._app = weakref.ref(app)
        self._start = start
        self._process: int | None = None

    def start(self) -> None:
        """Start the node, unless it was started in this process or the app is under test."""
        app = self._app()

        if self._process == os.getpid() or app is None or app.testing:
            return

        self._process = os.getpid()
        self._start()

    def start_at_request(self) -> None:
        """Start the node at the first request that comes from a server."""
        if self._process != os.getpid() and not _is_artificial():
            self.start()


#: One for each live app, which holds it.
_servings: weakref.WeakSet[_Serving] = weakref.WeakSet()


def _start_all() -> None:
    for serving in list(_servings):
        serving.start()


def _is_artificial() -> bool:
    """Return True if the request is from a test client, or from a context made by hand."""
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


@functools.cache
def _hook_werkzeug() -> None:
    serve = BaseWSGIServer.serve_forever

    def serve_forever(self: BaseWSGIServer, poll_interval: float = 0.5) -> None:
        if not _serves_an_error(self):
            _start_all()

        serve(self, poll_interval)

    BaseWSGIServer.serve_forever = serve_forever  # type: ignore[method-assign]  # has no hook


def _serves_an_error(server: BaseWSGIServer) -> bool:
    """Return True if ``flask run`` only shows the error that prevents loading the app."""
    application = getattr(server.app, "app", server.app)
    return getattr(application, "__module__", None) == "flask.cli"


class _WorkerStart:
    """gunicorn's ``post_worker_init`` hook: the app is loaded, and threads are patched."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, worker: Any) -> None:
        self._before(worker)

        for node in list(nodes):
            node.recreate_unused()

        _start_all()


class _WorkerEnd:
    """gunicorn's ``worker_exit`` hook: requests are done, and threads can still be started."""

    def __init__(self, before: Callable[[Any, Any], Any]) -> None:
        self._before = before

    def __call__(self, arbiter: Any, worker: Any) -> None:
        # The master calls this hook too, for a worker that died.
        if worker.pid == os.getpid():
            stop_all()

        self._before(arbiter, worker)


def _hook_gunicorn() -> None:
    """Start and stop listening with each gunicorn worker, along with hooks of its settings."""
    config = _gunicorn_config()

    if config is not None:
        _wrap(config, "post_worker_init", _WorkerStart)
        _wrap(config, "worker_exit", _WorkerEnd)


def _wrap(config: Any, name: str, hook: type[_WorkerStart] | type[_WorkerEnd]) -> None:
    before = getattr(config, name)

    if not isinstance(before, hook):
        config.set(name, hook(before))


def _gunicorn_config() -> Any:
    """Return the settings of the gunicorn that is loading the app or forking a worker."""
    base = sys.modules.get("gunicorn.app.base")
    arbiter = sys.modules.get("gunicorn.arbiter")

    if base is None or arbiter is None:
        return None

    for frame in _frames():
        owner: Any = frame.f_locals.get("self")

        if issubclass(type(owner), base.BaseApplication | arbiter.Arbiter):
            return owner.cfg

    return None


# After the fork of a worker: gunicorn may have reloaded its settings since a preloaded app was
# loaded, and an app that gunicorn did not load itself was not hooked before.
after_fork(_hook_gunicorn)
