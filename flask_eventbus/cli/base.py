"""What every command has in common: a program to work on, and an end in order."""

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

#: What a write to stdout fails with, unless nobody reads it any more.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

#: Handlers of characters with which a stream refuses to write some of them.
_FAILING = ("strict", "surrogateescape")


class Program:
    """What the commands work on; loaded when a command first asks, since ``--help`` need not."""

    #: Whether there is a program with routes and receivers, and not only a server.
    declares = True
    #: Whether it is said which service this is, and not only taken for one that publishes.
    names_service = True

    @cached_property
    def node(self) -> Node:
        """The program's node, not started.

        :raises ConfigError: the program cannot be loaded as it is set.
        """
        return self.load()

    def load(self) -> Node:
        """Load the program and return its node."""
        raise NotImplementedError


def service_of(program: Program) -> str:
    """The service that is worked on.

    :raises ConfigError: it is not said which; or the program cannot be loaded.
    """
    if program.names_service:
        return program.node.config.service

    raise ConfigError(
        "It is not said whose they are. Name the service: '--service mailer' before the command, "
        "or 'EVENTBUS_SERVICE' in the environment."
    )


class _Orderly(click.Command):
    """A command that says in one line what went wrong, and ends quietly when told to."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments, and show the help or the version if they ask for it."""
        with _orderly():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of the bus becomes its message and the exit code 1."""
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
            f"The output cannot be written: {error.strerror}. Make room for it, or write it "
            "elsewhere."
        ) from error
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None


pass_program = click.make_pass_decorator(Program)


def log_to_stderr() -> None:
    """Log what the bus does to stderr, unless the program has a log of its own."""
    logger = logging.getLogger("flask_eventbus")

    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)

        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as after ``| head``."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
    except (AttributeError, OSError):
        # A system without poll(), or a stdout that is no file.
        return False

    return bool(poll.poll(0))


def _write_anything() -> None:
    """Let stdout show characters that its encoding lacks as escape sequences, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in _FAILING:
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Let what is still buffered for a closed pipe or a full disk go nowhere."""
    with open(os.devnull, "w") as nowhere, suppress(OSError):
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
