"""Finds out whether the demo's ports are free, and which program has those that are not."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from _demo_options import PORTS, Options

#: /proc/net/tcp: the local address and its port, the remote one, the state "listens", the inode.
_LISTENS = re.compile(r"\d+: [0-9A-F]+:([0-9A-F]{4}) \S+ 0A +(?:\S+ +){5}(\d+)")


def require_free(options: Options) -> None:
    """End the program with a message if a port is taken."""
    taken = [name for name in PORTS if not is_free(options.port(name))]

    if not taken:
        return

    for name in taken:
        port = options.port(name)
        print(f"Port {port}, which {name} needs, is in use{_by(port)}.", file=sys.stderr)

    sys.exit(f"End what uses it, or take other ports: scripts/demo --port-base {_another(options)}")


def is_free(port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        # As servers do: a port that a connection has left a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise

            return False

    return True


def _another(options: Options) -> int:
    """Where as many ports in a row are free."""
    bases = range(options.port_base + 1000, 65000, 1000)
    free = (base for base in bases if all(is_free(base + n) for n in range(len(PORTS))))
    return next(free, 20001)


def _by(port: int) -> str:
    """The program that listens there, where the system tells."""
    for inode in _listening(port):
        for process in _holding(f"socket:[{inode}]"):
            return f" by {_command(process)} (process {process.name})"

    return ""


def _listening(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text() if table.exists() else ""
        yield from (inode for at, inode in _LISTENS.findall(lines) if int(at, 16) == port)


def _holding(link: str) -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        if link in _open_files(process):
            yield process


def _open_files(process: Path) -> list[str]:
    """What another user's process has open nobody else may see; nor that of one that has gone."""
    links = []

    try:
        for file in (process / "fd").iterdir():
            links.append(os.readlink(file))
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return links

    return links


def _command(process: Path) -> str:
    try:
        program, *words = (process / "cmdline").read_text(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return "a program that has just ended"

    return " ".join([Path(program).name, *words]).strip()[:60]
