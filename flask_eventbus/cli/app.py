"""The group ``flask eventbus``: its commands work on the app that ``flask`` loads."""

from __future__ import annotations

import click
from flask import Flask, current_app
from flask.cli import AppGroup, ScriptInfo

from ..errors import ConfigError
from ..node import Node
from .base import Group, Program
from .commands import COMMANDS


class AppProgram(Program):
    """The app that ``flask`` loads; the command runs in its app context."""

    def __init__(self, context: click.Context, info: ScriptInfo) -> None:
        self._context = context
        self._info = info

    def load(self) -> Node:
        """Load the app, push its context and return its node.

        :raises ConfigError: the app's settings are wrong, or it has no event bus.
        """
        if not current_app:
            self._context.with_resource(self._info.load_app().app_context())

        return _node_of(current_app)


class _FlaskGroup(Group, AppGroup):
    """A group whose commands run in the app context."""


@click.group(
    "eventbus",
    cls=_FlaskGroup,
    short_help="Inspect, check and run the event bus.",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="'flask eventbus COMMAND --help' has examples and exit codes.",
)
@click.pass_context
def flask_commands(context: click.Context) -> None:
    """Inspect, check and run the event bus of this app."""
    context.obj = AppProgram(context, context.ensure_object(ScriptInfo))


for command in COMMANDS:
    flask_commands.add_command(command)


def _node_of(app: Flask) -> Node:
    node = app.extensions.get("eventbus")

    if isinstance(node, Node):
        return node

    raise ConfigError(
        f"The app {app.name!r} has no event bus. Call bus.init_app(app) where the app is created."
    )
