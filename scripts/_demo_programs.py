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

#: The last of the programs, which tries out the others. When it ends, so do they.
REPORT = "report"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One process, with those it forks."""

    name: str
    words: tuple[str, ...]
    folder: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """For a shell, which the program then takes the place of."""
        change = f"cd {shlex.quote(str(self.folder))} && " if self.folder else ""
        return f"{change}exec {shlex.join(self.words)}"


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
    mails = ("--port", str(options.port("smtp")), "--file", str(folder / "mails.jsonl"))

    yield _script("smtp", "mailer/smtp_sink.py", *mails)
    yield _script("audit", "audit/audit.py", AUDIT_FILE=f"{folder}/audit.jsonl")
    yield _flask(
        options, "accounts", FLASK_SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder}/accounts.db"
    )
    yield _flask(
        options,
        "mailer",
        FLASK_MAIL_HOST="127.0.0.1",
        FLASK_MAIL_PORT=str(options.port("smtp")),
        FLASK_NEWSLETTER_FILE=f"{folder}/newsletter.db",
    )
    yield _flask(
        options, "catalog", f"--workers={WORKERS}", FLASK_CATALOG_DATABASE=f"{folder}/catalog.db"
    )
    # Threads, since a browser keeps connections open.
    yield _flask(options, "analytics", "--threads=4")


def _script(name: str, path: str, *words: str, **settings: str) -> Program:
    file = ROOT / "services" / path
    return Program(
        name=name,
        words=(sys.executable, file.name, *words),
        folder=file.parent,
        settings=settings,
    )


def _flask(options: Options, name: str, *words: str, **settings: str) -> Program:
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
