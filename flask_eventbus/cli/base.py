"""Shared parts of all commands: their program, their options, and their errors."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import click

from ..admin.streams import StreamAccess
from ..errors import ConfigError, EventBusError
from ..node import Node
from ..routing.options import check_signal_name
from ..routing.subscriptions import read_subscription

#: Errors of a write to stdout when the disk is full or broken; a closed pipe is not among them.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

#: Error handlers with which a text stream raises on characters its encoding lacks.
_FAILING = ("strict", "surrogateescape")


class Program:
    """The program that a command works on, loaded on first use: ``--help`` does not load it."""

    #: True if the program has routes and receivers; False if there is only a server.
    declares = True
    #: True if the service was named; False if the name is the default for publishing.
    names_service = True
    #: What the command line starts with, for hints.
    command = "flask eventbus"

    @cached_property
    def node(self) -> Node:
        """Return the program's node, not started.

        :raises ConfigError: the program cannot be loaded.
        """
        return self.load()

    @property
    def service(self) -> str:
        """The name of the service that the command works on.

        :raises ConfigError: no service was named, or the program cannot be loaded.
        """
        if self.names_service:
            return self.node.config.service

        raise ConfigError(
            "No service given. Pass '--service NAME' before the command, or set 'EVENTBUS_SERVICE' "
            "in the environment."
        )

    def load(self) -> Node:
        """Load the program and return its node."""
        raise NotImplementedError

    def enabled_node(self, effect: str, verb: str) -> Node:
        """Return the node of a bus that is not switched off.

        :param effect: what happens if it is, as half a sentence.
        :raises ConfigError: ``EVENTBUS_ENABLED`` is False, or the program cannot be loaded.
        """
        if self.node.config.enabled:
            return self.node

        raise ConfigError(f"'EVENTBUS_ENABLED' is False, so {effect}. Set it to True to {verb}.")

    def streams(self, name: str, deadline: float = math.inf) -> StreamAccess:
        """Return a connection to the streams, which ``CLIENT LIST`` shows as the command's.

        :raises ConfigError: the URL is that of a Redis Cluster, or the program cannot be loaded.
        """
        return StreamAccess(self.node.config, name=f"eventbus-{name}", deadline=deadline)


class AppProgram(Program):
    """The app that ``flask`` loads; the command runs in its app context."""

    def __init__(self, context: click.Context) -> None:
        # The commands without an app do not load Flask.
        from flask.cli import ScriptInfo

        self._context = context
        self._info = context.ensure_object(ScriptInfo)

    def load(self) -> Node:
        """Load the app, push its context and return its node.

        :raises ConfigError: the app's settings are wrong, or it has no event bus.
        """
        from flask import current_app

        if not current_app:
            self._context.with_resource(self._info.load_app().app_context())

        node = current_app.extensions.get("eventbus")

        if isinstance(node, Node):
            return node

        raise ConfigError(
            f"The app {current_app.name!r} has no event bus. Call bus.init_app(app) where the app "
            "is created."
        )


class Command(click.Command):
    """A command that reports an error in one line, and ends quietly on Ctrl-C or a closed pipe."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments, and show the help or the version if they ask for it."""
        with _orderly():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of the bus is printed, and the command exits with 1."""
        with _orderly():
            return super().invoke(ctx)


class Group(Command, click.Group):
    """A group of commands of the bus."""

    command_class = Command


@contextmanager
def _orderly() -> Iterator[None]:
    _write_anything()

    try:
        yield
    except EventBusError as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:
        _forget_output()
        raise click.exceptions.Exit(0) from None
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise

        _forget_output()
        raise click.ClickException(
            f"Could not write the output: {error.strerror}. Free disk space, or write to another "
            "place."
        ) from error
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None


pass_program = click.make_pass_decorator(Program)


def log_to_stderr() -> None:
    """Log to stderr at level INFO, unless the program configured logging itself."""
    logger = logging.getLogger("flask_eventbus")

    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)

        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def reader_is_gone() -> bool:
    """Return True if stdout is a pipe whose reader has exited, as after ``| head``."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
    except (AttributeError, OSError):
        # The system has no poll(), or stdout is not a file.
        return False

    return bool(poll.poll(0))


def _write_anything() -> None:
    """Print characters that stdout's encoding lacks as escape sequences, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in _FAILING:
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Discard output that is still buffered for a closed pipe or a full disk."""
    with open(os.devnull, "w") as nowhere, suppress(OSError):
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def parsed(read: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that parses what was given for an option or an argument with ``read``.

    A ``ValueError`` or a :exc:`.ConfigError` of ``read`` is reported as an error in the argument.
    """

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            return None if value is None else read(value)
        except (ConfigError, ValueError) as error:
            raise click.BadParameter(str(error).removeprefix("NAME: ")) from error

    return callback


def read_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names and patterns of signals, without duplicates.

    :raises ConfigError: a name is not valid.
    """
    for name in names:
        read_subscription(name, None, "NAME")

    return tuple(dict.fromkeys(names))


name_argument = click.argument(
    "name", metavar="NAME", callback=parsed(lambda name: check_signal_name(name, "NAME"))
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def json_option(help: str) -> Callable[[Any], Any]:
    """Return the option ``--json`` of a command."""
    return click.option("--json", "in_json", is_flag=True, help=help)


def confirm(question: str, yes: bool) -> None:
    """Ask a question unless ``--yes`` was given; the command ends if the answer is no."""
    if not yes:
        click.confirm(question, abort=True)
