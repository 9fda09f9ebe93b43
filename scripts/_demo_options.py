"""What the demo is told on its command line, and the places that follow from it."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from _environment import ROOT

#: Who takes which port, counted from the first one.
PORTS = ("accounts", "mailer", "catalog", "analytics", "smtp")

_FIRST_PORT = 8001
_LOWEST_PORT, _HIGHEST_PORT = 1024, 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run of the demo. Runs with ports of their own do not meet."""

    port_base: int
    #: How long to wait for each step, in seconds.
    patience: float
    #: Whether to end once everything has reacted.
    once: bool
    #: Whether to show what the services log.
    verbose: bool

    def port(self, name: str) -> int:
        return self.port_base + PORTS.index(name)

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.port(name)}"

    @property
    def server(self) -> str:
        """The embedded server's name: no two runs have the same ports at the same time."""
        return f"demo-{self.port_base}"

    @property
    def url(self) -> str:
        return f"embedded://{self.server}"

    @property
    def folder(self) -> Path:
        """Where everything is that the demo writes."""
        return ROOT / ".demo" / str(self.port_base)

    @property
    def running(self) -> Path:
        """A folder with a file for each program that was started, named after its process."""
        return self.folder / "running"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


def read_options(about: str | None) -> Options:
    """What the command line says; ends the program if it makes no sense.

    :param about: for ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description=about,
        epilog=f"What its services write is in {shown(ROOT / '.demo')}/N, made anew at each start.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--once", action="store_true", help="end with code 0 once everything has reacted, else 1"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the services' logs")
    parser.add_argument(
        "--port-base",
        type=_port_base,
        default=_FIRST_PORT,
        metavar="N",
        help=f"the first of {len(PORTS)} ports in a row (default: {_FIRST_PORT})",
    )
    parser.add_argument(
        "--patience",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for each step (default: 30)",
    )
    return Options(**vars(parser.parse_args()))


def shown(path: Path) -> str:
    """The path as one would type it here, whichever way is shorter."""
    return shlex.quote(min(os.path.relpath(path), str(path), key=len))


def _port_base(said: str) -> int:
    last = _HIGHEST_PORT - len(PORTS) + 1

    if not said.isdecimal() or not _LOWEST_PORT <= int(said) <= last:
        raise argparse.ArgumentTypeError(
            f"{said!r} is no port that {len(PORTS)} in a row can begin with. "
            f"Write a number from {_LOWEST_PORT} to {last}, for example {_FIRST_PORT}."
        )

    return int(said)


def _seconds(said: str) -> float:
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0

    if not 0 < seconds < 3600:
        raise argparse.ArgumentTypeError(
            f"{said!r} is no time to wait. Write seconds, more than 0 and less than 3600."
        )

    return seconds
