"""The programs of the demo: where each runs, how, and with which settings of its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from _demo_options import Options
from _demo_screen import Screen
from _environment import ROOT

#: How many of them catalog has.
WORKERS = 2

#: Those of mailer, which hear of users; what serves its HTTP does not.
MAILERS = ("mailer-1", "mailer-2")

#: Seconds that the SMTP server takes for a recipient: long enough for a mail to be under way.
SMTP_PAUSE = 0.1

#: Seconds after which what a killed worker had in hand is taken over; a minute where nobody waits.
CLAIM_AFTER = 2.0

#: The last of the programs, which tries out the others. When it ends, so do they.
REPORT = "report"


#: Threads, since a browser holds connections open that it does not use.
_ONE_WORKER = ("--workers=1", "--threads=4")

#: No threads: a worker takes one connection at a time, so that the report can reach each of them.
_WORKERS = (f"--workers={WORKERS}",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One process, with those it forks."""

    name: str
    words: tuple[str, ...]
    folder: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def command(self, running: Path) -> str:
        """For a shell, which signs in to the folder and makes way for the program."""
        sign_in = f": > {shlex.quote(str(running))}/$$"
        change = f"cd {shlex.quote(str(self.folder))}" if self.folder else ":"
        return f"{sign_in} && {change} && exec {shlex.join(self.words)}"


def programs(options: Options, screen: Screen) -> Iterator[Program]:
    """Those that serve, and the one that tries them out and writes on the screen."""
    yield from _services(options)
    yield Program(
        name=REPORT,
        words=(sys.executable, str(ROOT / "scripts" / "_demo_report.py"), *sys.argv[1:]),
        settings={"PYTHONIOENCODING": "utf-8", **screen.as_settings()},
    )


def _services(options: Options) -> Iterator[Program]:
    folder = options.folder
    mails = ("--file", str(folder / "mails.jsonl"), f"--pause={SMTP_PAUSE}")
    mailing = {
        "FLASK_MAIL_HOST": "127.0.0.1",
        "FLASK_MAIL_PORT": str(options.port("smtp")),
        "FLASK_BOOK_FILE": f"{folder}/book.db",
        "FLASK_NEWSLETTER_FILE": f"{folder}/newsletter.db",
        "FLASK_EVENTBUS_CLAIM_AFTER": str(CLAIM_AFTER),
    }

    yield _script("smtp", "mailer/smtp_sink.py", "--port", str(options.port("smtp")), *mails)
    yield _script("audit", "audit/audit.py", AUDIT_FILE=f"{folder}/audit.jsonl")
    yield _flask(
        options, "accounts", FLASK_SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder}/accounts.db"
    )
    yield _flask(options, "mailer", _ONE_WORKER, **mailing)

    for name in MAILERS:
        yield _listening(name, "mailer", mailing)

    yield _flask(options, "analytics")
    yield _flask(options, "catalog", _WORKERS, FLASK_CATALOG_DATABASE=f"{folder}/catalog.db")


def _script(name: str, path: str, *words: str, **settings: str) -> Program:
    file = ROOT / "services" / path
    return Program(
        name=name,
        words=(sys.executable, file.name, *words),
        folder=file.parent,
        settings=settings,
    )


def _listening(name: str, service: str, settings: Mapping[str, str]) -> Program:
    """A process that hears events and serves nothing; killed, it is started anew."""
    again = str(ROOT / "scripts" / "_demo_worker.py")
    return Program(
        name=name,
        words=(sys.executable, again, *("-m", "flask", "--app", "app", "eventbus", "run")),
        folder=ROOT / "services" / service,
        settings=settings,
    )


def _flask(
    options: Options, name: str, words: tuple[str, ...] = _ONE_WORKER, **settings: str
) -> Program:
    return Program(
        name=name,
        words=(
            *(sys.executable, "-m", "gunicorn", f"--bind={options.address(name)}"),
            # Its place is the home directory.
            "--no-control-socket",
            *words,
            "app:create_app()",
        ),
        folder=ROOT / "services" / name,
        settings=settings,
    )
