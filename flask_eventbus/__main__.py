"""``eventbus`` or ``python -m flask_eventbus``: the commands without an app and without Flask."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from typing import Any

import click

from . import __version__
from .bus import Bus
from .cli.app import COMMANDS
from .cli.base import Group, Program
from .config import Config
from .node import Node
from .routing.registry import Registry

#: The service that publishes if none is given.
DEFAULT_SERVICE = "cli"


class BareProgram(Program):
    """A program from options and the environment; it loads receivers only if they are named."""

    command = "python -m flask_eventbus"

    def __init__(self, settings: dict[str, str]) -> None:
        self._environ = {**os.environ, **settings}
        self.declares = False
        self.names_service = "EVENTBUS_SERVICE" in self._environ

    def add_receivers(self, names: tuple[str, ...]) -> None:
        """Load receivers from modules, as ``EVENTBUS_RECEIVERS`` does."""
        self.declares = True

        if names:
            self._environ["EVENTBUS_RECEIVERS"] = json.dumps(names)

    def load(self) -> Node:
        """Return a node with these settings.

        :raises ConfigError: a setting is wrong, or receivers cannot be loaded.
        """
        if self.declares:
            return Bus.from_env(self._environ).node

        environ = {"EVENTBUS_SERVICE": DEFAULT_SERVICE, **self._environ}
        # The settings of routes and subscriptions may name modules, which must not be loaded.
        config = replace(Config.from_environ(environ), publish=(), subscribe=())
        return Node(config, Registry())


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""The other settings are read from the environment as well, for example
    EVENTBUS_MAX_EVENT_BYTES. A password is better there than in --url, where other users of
    this machine can see it.

    Examples:

    \b
      python -m flask_eventbus --url redis://localhost:6379/0 tail
      python -m flask_eventbus publish price_changed sku=A-1 price=9.5
      python -m flask_eventbus --service audit run --receivers audit.receivers
      python -m flask_eventbus check""",
)
@click.version_option(__version__, message="flask-eventbus %(version)s")
@click.option("--url", envvar="EVENTBUS_URL", show_envvar=True, help="URL of Redis.")
@click.option(
    "--service",
    metavar="NAME",
    envvar="EVENTBUS_SERVICE",
    show_envvar=True,
    help=f"Name of the service that publishes or runs; {DEFAULT_SERVICE!r} unless given.",
)
@click.option(
    "--prefix",
    envvar="EVENTBUS_PREFIX",
    show_envvar=True,
    help="Prefix of the keys in Redis; 'eventbus' unless given.",
)
@click.pass_context
def main(context: click.Context, /, **options: str | None) -> None:
    """See and check what the event bus carries, without an app."""
    context.obj = BareProgram(
        {f"EVENTBUS_{key.upper()}": value for key, value in options.items() if value is not None}
    )


def _add_receivers(
    context: click.Context, parameter: click.Parameter, names: tuple[str, ...]
) -> None:
    program = context.find_object(BareProgram)

    if program is not None and (names or context.command.name == "run"):
        program.add_receivers(names)


def _with_receivers(command: click.Command) -> click.Command:
    """Return a copy of the command with the option ``--receivers``."""
    option: Any = click.Option(
        ["--receivers"],
        multiple=True,
        metavar="MODULE",
        expose_value=False,
        callback=_add_receivers,
        help="A module of receivers to load; its register(bus) is called.",
    )
    command = copy.copy(command)
    command.params = [*command.params, option]
    return command


for command in COMMANDS:
    loads = command.name in ("run", "routes", "check", "replay")
    main.add_command(_with_receivers(command) if loads else command)


if __name__ == "__main__":
    main(prog_name="python -m flask_eventbus")
