"""Base classes of all commands: the program they work on, and how errors end them."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import click

from ..errors import ConfigError, EventBusError
from ..node import Node

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

    @cached_property
    def node(self) -> Node:
        """Return the program's node, not started.

        :raises ConfigError: the program cannot be loaded.
        """
        return self.load()

    def load(self) -> Node:
        """Load the program and return its node."""
        raise NotImplementedError


def service_of(program: Program) -> str:
    """Return the name of the service that the command works on.

    :raises ConfigError: no service was named, or the program cannot be loaded.
    """
    if program.names_service:
        return program.node.config.service

    raise ConfigError(
        "No service given. Pass '--service NAME' before the command, or set 'EVENTBUS_SERVICE' in "
        "the environment."
    )


class _Orderly(click.Command):
    """A command that reports an error in one line, and ends quietly on Ctrl-C or a closed pipe."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments, and show the help or the version if they ask for it."""
        with _orderly():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of the bus is printed, and the command exits with 1."""
        with _orderly():
            return super().invoke(ctx)


class Command(_Orderly):
    """A command of the bus."""


class Group(_Orderly, click.Group):
    """A group of commands of the bus."""


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
