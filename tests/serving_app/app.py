"""The app: made by a factory, with receivers that are connected after ``init_app``."""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
from typing import Any

import click
from flask import Flask

from flask_eventbus import EventBus, current_event

from .reports import report, until_released, wait_until_released

bus = EventBus()
shouted = bus.signal("shouted")


@bus.on("called")
def hear(sender: str, number: int, **extra: Any) -> None:
    """Report an event."""
    report("called", number=number, node=bus.node().name)


@bus.on("shouted")
def hear_shout(sender: Any, number: int, **extra: Any) -> None:
    """Report a signal: where it was sent, and where it arrived as an event."""
    report("shouted", number=number, arrived=bool(current_event))


@bus.on("held")
def hold(sender: str, **extra: Any) -> None:
    """Take until the test says so."""
    report("held")
    wait_until_released("RELEASE")
    report("held to the end")


@bus.on("awaited")
async def hold_awaiting(sender: str, **extra: Any) -> None:
    """Take until the test says so, without holding the thread; end in a thread of a pool."""
    report("awaited")

    for _ in until_released("RELEASE"):
        await asyncio.sleep(0.01)

    await asyncio.to_thread(report, "awaited to the end")


def create_app() -> Flask:
    """The app, configured by ``FLASK_EVENTBUS_...`` in the environment."""
    app = Flask(__name__)
    app.config.from_mapping(EVENTBUS_PUBLISH=["shouted"])
    app.config.from_prefixed_env()
    bus.init_app(app)
    _add_views(app)
    _add_commands(app)

    if "GATE" in os.environ:
        report("loading")
        wait_until_released("GATE")

    importlib.import_module("serving_app.late")
    return app


def _add_views(app: Flask) -> None:
    @app.get("/")
    def index() -> str:
        return str(os.getpid())

    @app.post("/shout/<int:count>")
    def shout(count: int) -> str:
        for number in range(count):
            shouted.send(app, number=number)

        return str(os.getpid())

    @app.post("/shout/<int:count>/threads/<int:threads>")
    def shout_side_by_side(count: int, threads: int) -> str:
        shouting = [threading.Thread(target=shout, args=(count,)) for _ in range(threads)]

        for thread in shouting:
            thread.start()

        for thread in shouting:
            thread.join()

        return str(os.getpid())


def _add_commands(app: Flask) -> None:
    @app.cli.command("look")
    def look() -> None:
        click.echo(f"listening: {bus.health().listening}")
