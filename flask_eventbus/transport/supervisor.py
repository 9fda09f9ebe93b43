"""Runs the embedded server for as long as a process uses it, and takes it along.

A program of its own, ``supervisor.py DIRECTORY EXECUTABLE``, of the standard library alone: it
is parent of the server and child of nobody, and starts in the time Python takes. Every process
that uses the server holds a shared lock on the file ``lease`` of the directory; the kernel lets
go of it when the process ends, however it ends. The supervisor waits for the exclusive lock:
when it gets it nobody is left, so it ends the server and removes the directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

#: What the supervisor writes to its standard output once the server answers.
READY = b"ready"

#: How long a server may take to answer a PING before it counts as one that hangs, in seconds.
PING_TIMEOUT = 1.0

_POLL_SECONDS = 0.01
_PR_SET_PDEATHSIG = 1


def answers(directory: Path) -> bool:
    """Whether a server lives there. One that hangs does: its clients have their own deadlines."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PING_TIMEOUT)

        try:
            client.connect(str(directory / "socket"))
            client.sendall(b"PING\r\n")
            return client.recv(64) != b""
        except (TimeoutError, BlockingIOError):
            return True
        except (FileNotFoundError, ConnectionError):
            return False


def lock(file: int, kind: int) -> bool:
    """Try to lock; never wait in the kernel, where a gevent hub would stand still."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False

    return True


def is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at the path, not removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def remove_unless_used(directory: Path, lease: int) -> None:
    """Remove the directory if this lease is its lease and nobody else holds it."""
    if not lock(lease, fcntl.LOCK_EX) or not is_at(lease, directory / "lease"):
        return

    for file in directory.iterdir():
        if file.name != "lease":
            file.unlink()

    # Last, for without it whoever joins now begins anew, perhaps before the next line.
    (directory / "lease").unlink()

    with contextlib.suppress(OSError):
        directory.rmdir()


def supervise(directory: Path, executable: str) -> None:
    """Run the server until it ends or until nobody holds the lease any more."""
    lease = os.open(directory / "lease", os.O_RDWR)
    server = _run(directory, executable)
    threading.Thread(target=_end_when_unused, args=(lease, server), daemon=True).start()

    if _comes_up(server, directory):
        _say_ready()

    server.wait()
    remove_unless_used(directory, lease)


def _run(directory: Path, executable: str) -> subprocess.Popen[bytes]:
    options = {
        "port": "0",
        "unixsocket": str(directory / "socket"),
        "unixsocketperm": "700",
        "dir": str(directory),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "loglevel": "warning",
    }
    command = [executable, *(word for key in options for word in (f"--{key}", options[key]))]

    return subprocess.Popen(  # noqa: S603 - the server that the user's PATH or wheel offers
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=_die_with_parent()
    )


def _die_with_parent() -> Callable[[], object] | None:
    """What makes a child die with this process, killed or not; Linux has it, others go without."""
    if sys.platform != "linux":
        return None

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_when_unused(lease: int, server: subprocess.Popen[bytes]) -> None:
    fcntl.flock(lease, fcntl.LOCK_EX)
    # It keeps nothing, so there is nothing for it to finish.
    server.kill()


def _comes_up(server: subprocess.Popen[bytes], directory: Path) -> bool:
    while server.poll() is None:
        if answers(directory):
            return True

        time.sleep(_POLL_SECONDS)

    return False


def _say_ready() -> None:
    # Whoever started the server may be gone by now; others may have joined.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), READY)

    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    # The child goes on, so whoever started the server has no child process to look after.
    if os.fork() == 0:
        supervise(Path(sys.argv[1]), sys.argv[2])
