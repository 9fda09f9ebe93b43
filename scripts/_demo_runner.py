"""Runs the demo's programs until one of them ends, and leaves none behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TextIO

from _demo_options import Options, read_options, shown
from _demo_programs import REPORT, Program, programs
from _demo_screen import Screen
from honcho.manager import Manager
from honcho.printer import Message, Printer

from flask_eventbus.embedded import directory_of

#: How long the embedded server may take to end after its last user, in seconds.
SERVER_END = 3.0

#: Honcho's exit codes after SIGINT and SIGTERM.
_TOLD = {128 + signal.SIGINT, 128 + signal.SIGTERM}

#: What honcho says of its programs.
_STARTED = re.compile(r"(\S+) started \(pid=")
_STOPPED = re.compile(r"(\S+) stopped \(rc=(-?\d+)\)")


class Leash:
    """A process that ends the programs when this one has ended, even by ``kill -9``."""

    def __init__(self, running: Path) -> None:
        leash = Path(__file__).with_name("_demo_leash.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", leash, running],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        # What honcho forks would keep it open.
        os.register_at_fork(after_in_child=self._input.close)

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        return self._process.stdin

    def end(self) -> None:
        """Let it end what is left, which is nothing if all went well."""
        self._input.close()
        self._process.wait()


class Output:
    """Honcho's printer: the report goes to the screen, what the others say to a log each.

    :param note: told what honcho says itself.
    """

    def __init__(self, options: Options, note: Callable[[str], None]) -> None:
        #: Honcho widens it to the longest name.
        self.width = 0
        self._options = options
        self._note = note
        self._logs: dict[str, TextIO] = {}
        self._stream = Printer(sys.stdout)

    def write(self, message: Message) -> None:
        if message.name == REPORT:
            _print(_text(message))
            return

        if message.name == "system":
            self._note(message.data)

        self._log(message.name).write(_text(message))

        if self._options.verbose:
            self._stream.width = self.width
            self._stream.write(message)

    def _log(self, name: str) -> TextIO:
        if name not in self._logs:
            self._logs[name] = self._options.log(name).open("a", encoding="utf-8", buffering=1)

        return self._logs[name]


class Runner(Manager):  # type: ignore[misc]  # honcho has no types
    """Honcho: runs programs until one of them ends, or this one is told to, and ends the rest."""

    def __init__(self, options: Options) -> None:
        super().__init__(printer=Output(options, self._note))
        #: The first that ended, and its exit code.
        self.ended: tuple[str, int] | None = None
        #: Whether it ended because this program was told to.
        self.told = False
        self._options = options
        self._missing: set[str] = set()
        self._postponed = False

    def add(self, program: Program, settings: dict[str, str]) -> None:
        environment = {**os.environ, **settings, **program.settings}
        command = program.command(self._options.running)
        self.add_process(program.name, command, env=environment)
        self._missing.add(program.name)

    def terminate(self) -> None:
        """End every program once all have started: before, honcho does not know them."""
        if self._missing:
            self._postponed = True
        else:
            super().terminate()

    def _note(self, words: str) -> None:
        if started := _STARTED.match(words):
            self._missing.discard(started[1])

        if (stopped := _STOPPED.match(words)) and self.ended is None:
            self.ended = stopped[1], int(stopped[2])
            self.told = self.returncode in _TOLD
            self._say_if_told()

        if self._postponed:
            self.terminate()

    def _say_if_told(self) -> None:
        """At the first end, since the last may take some seconds."""
        if self.told:
            _print("\nEnding everything.\n")


def main() -> int:
    # As long as there is nothing to end, Ctrl-C ends this program alone.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The programs are forked before there is a second thread.
    multiprocessing.set_start_method("fork")
    options = read_options(__doc__)
    clear(options)

    try:
        return run(options)
    except BrokenPipeError:
        # Nobody reads any more; the interpreter would find that out once again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def clear(options: Options) -> None:
    """A new folder for this run; what an earlier one left goes."""
    if options.folder.exists():
        shutil.rmtree(options.folder)

    options.running.mkdir(parents=True)
    options.log(REPORT).parent.mkdir()


def run(options: Options) -> int:
    """Run everything; the exit code."""
    screen = Screen.on(sys.stdout)
    leash = Leash(options.running)

    try:
        runner = Runner(options)

        for program in programs(options, screen):
            runner.add(program, common_settings(options))

        runner.loop()
    finally:
        leash.end()
        await_server_end(options)

    return outcome(runner, options, screen)


def common_settings(options: Options) -> dict[str, str]:
    return {
        "EVENTBUS_URL": options.url,
        "FLASK_EVENTBUS_URL": options.url,
        "PYTHONUNBUFFERED": "1",
        # Options of the user's own gunicorn.
        "GUNICORN_CMD_ARGS": "",
    }


def await_server_end(options: Options) -> None:
    """Return once the embedded server is gone, or when somebody else goes on using it."""
    deadline = time.monotonic() + SERVER_END

    while directory_of(options.server).exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def outcome(runner: Runner, options: Options, screen: Screen) -> int:
    """The exit code, with a word about it."""
    if runner.told:
        return int(runner.returncode) if options.once else 0

    name, code = runner.ended or (REPORT, 1)

    if name == REPORT:
        return int(code != 0)

    screen.failed(name, f"ended with code {code}. The end of {shown(options.log(name))}:")
    screen.end_of(options.log(name))
    return 1


def _text(message: Message) -> str:
    data = message.data
    return data.decode("utf-8", "replace") if isinstance(data, bytes) else str(data)


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
