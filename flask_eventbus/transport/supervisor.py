"""Run the embedded server for as long as a process uses it.

This file is a program, ``supervisor.py DIRECTORY EXECUTABLE``. It imports the standard library
only, so that it starts fast. It is the parent of the server, and runs in the background.

Every process that uses the server holds a shared lock on the file ``lease`` of the directory. The
kernel releases the lock when the process ends, even if it is killed. The supervisor waits for the
exclusive lock. Once it has the lock, the server has no users left: the supervisor ends the server
and removes the directory.
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

#: Written to the standard output of the supervisor once the server answers.
READY = b"ready"

#: Seconds to wait for the answer to a PING before the server counts as hanging.
PING_TIMEOUT = 1.0

_POLL_SECONDS = 0.01
_PR_SET_PDEATHSIG = 1


def answers(directory: Path) -> bool:
    """Return True if a server runs in the directory.

    A server that hangs counts as running, because its clients have deadlines of their own.
    """
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
    """Lock a file and return True, or return False if it is locked.

    It never waits in the kernel, which would block all greenlets of gevent.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False

    return True


def is_at(file: int, path: Path) -> bool:
    """Return True if the open file is still at the path, neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def remove_unless_used(directory: Path, lease: int) -> None:
    """Remove the directory if no other process holds its lease.

    :param lease: open lease file of the directory.
    """
    if not lock(lease, fcntl.LOCK_EX) or not is_at(lease, directory / "lease"):
        return

    for file in directory.iterdir():
        if file.name != "lease":
            file.unlink()

    # Last: once the lease is gone, another process may start a new server in the directory.
    (directory / "lease").unlink()

    with contextlib.suppress(OSError):
        directory.rmdir()


def supervise(directory: Path, executable: str) -> None:
    """Run the server until it ends, or until no process holds the lease."""
    lease = os.open(directory / "lease", os.O_RDWR)
    server = _run(directory, executable)
    threading.Thread(target=_end_when_unused, args=(lease, server), daemon=True).start()

    if _wait_until_answering(server, directory):
        _report_ready()

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
    """Return a function that makes a child process die with this one; ``None`` except on Linux."""
    if sys.platform != "linux":
        return None

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_when_unused(lease: int, server: subprocess.Popen[bytes]) -> None:
    fcntl.flock(lease, fcntl.LOCK_EX)
    # The server saves nothing to disk, so it can be killed.
    server.kill()


def _wait_until_answering(server: subprocess.Popen[bytes], directory: Path) -> bool:
    while server.poll() is None:
        if answers(directory):
            return True

        time.sleep(_POLL_SECONDS)

    return False


def _report_ready() -> None:
    # The process that started the supervisor may be gone, while others use the server.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), READY)

    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    # Continue in the child, so that the process that started the server need not wait for it.
    if os.fork() == 0:
        supervise(Path(sys.argv[1]), sys.argv[2])
