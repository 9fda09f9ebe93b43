"""Tests of the Compose stack that need no container engine."""

from __future__ import annotations

import re
import runpy
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import Program
from servers import RedisServer
from waiting import wait_until

import flask_eventbus
from flask_eventbus.config import Config
from flask_eventbus.node import LONGEST_STOP

pytestmark = pytest.mark.second_look("starts the processes of the pages and kills their Redis")

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = (ROOT / "docker-compose.yml").read_text()
PAGE = "".join(
    (ROOT / "docs" / f"{page}.md").read_text()
    for page in ("deploying", "compose", "redis", "monitoring")
)


@pytest.fixture
def health_file(tmp_path: Path) -> Path:
    return tmp_path / "healthy"


@pytest.fixture
def audit(tmp_path: Path, redis_server: RedisServer, health_file: Path) -> Iterator[Program]:
    """The script of the stack, with the plug-in that the stack gives it."""
    settings = {
        "EVENTBUS_URL": redis_server.url,
        "EVENTBUS_RECEIVERS": f"{DEPLOY}/receivers/",
        "HEALTH_FILE": str(health_file),
    }
    program = Program([str(ROOT / "services" / "audit" / "audit.py")], tmp_path, settings)
    yield program
    program.kill()


def test_the_health_file_exists_while_a_script_listens(
    audit: Program, redis_server: RedisServer, health_file: Path
) -> None:
    wait_until(health_file.exists, what="the script listens")

    redis_server.kill()
    wait_until(lambda: not health_file.exists(), what="the script knows that it hears nothing")

    redis_server.start()
    wait_until(health_file.exists, timeout=20, what="the script hears again")

    audit.send_signal(signal.SIGTERM)
    assert audit.process.wait(10) == 0


def test_a_health_file_of_an_earlier_process_does_not_count(
    tmp_path: Path, health_file: Path
) -> None:
    health_file.touch()
    settings = {
        "EVENTBUS_URL": "redis://127.0.0.1:1/0",
        "EVENTBUS_RECEIVERS": f"{DEPLOY}/receivers/",
        "HEALTH_FILE": str(health_file),
    }

    program = Program([str(ROOT / "services" / "audit" / "audit.py")], tmp_path, settings)

    wait_until(lambda: not health_file.exists(), what="the file is gone")
    program.kill()


def test_the_stop_grace_period_of_the_stack_exceeds_the_shutdown_time() -> None:
    # What test_processes_end_within_the_documented_time_while_redis_hangs measures.
    drain = Config(service="any").grace + LONGEST_STOP
    gunicorn = runpy.run_path(str(DEPLOY / "gunicorn.conf.py"))
    graces = [int(seconds) for seconds in re.findall(r"stop_grace_period: (\d+)s", COMPOSE)]

    assert drain < gunicorn["graceful_timeout"] < max(graces)
    assert gunicorn["timeout"] > drain
    assert f"more than {drain:g}, and {gunicorn['graceful_timeout']} here" in PAGE
    assert f"{LONGEST_STOP:g} s more, at most" in PAGE


def test_every_service_with_tables_creates_them_before_it_starts() -> None:
    stack = dict(re.findall(r"^  ([a-z-]+):\n((?:    .*\n|\n)+)", COMPOSE, re.MULTILINE))
    apps = {path.parent.name: path.read_text() for path in ROOT.glob("services/*/app.py")}
    with_tables = {name for name, code in apps.items() if "init-db" in code}
    commands = re.findall(r"python -m flask --app app init-db && exec (\S+)", COMPOSE)

    assert with_tables == {"accounts", "catalog", "mailer"}
    assert commands == ["gunicorn", "python"]
    assert {name for name, lines in stack.items() if "command: *serve" in lines} == {
        "accounts",
        "catalog",
        "mailer-web",
    }
    assert {name for name, lines in stack.items() if "command: *work" in lines} == {"mailer"}


def test_make_secrets_writes_a_password_for_each_user_and_keeps_those_there(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    users = (DEPLOY / "redis" / "users.acl").read_text()
    file = tmp_path / ".env"
    file.write_text("MINE=1\nOPS_PASSWORD=chosen\n")

    for _ in range(2):
        subprocess.run([tmp_path / "deploy" / "make-secrets"], check=True, capture_output=True)

    lines = dict(line.split("=", 1) for line in file.read_text().splitlines())
    assert set(lines) == {"MINE", *re.findall(r"#(\w+_PASSWORD)", users)}
    assert (lines["MINE"], lines["OPS_PASSWORD"]) == ("1", "chosen")
    assert len(lines["AUDIT_PASSWORD"]) == 48
    assert lines["AUDIT_PASSWORD"] != lines["MAILER_PASSWORD"]
    assert file.stat().st_mode & 0o777 == 0o600


def blocks(language: str) -> list[str]:
    """The fenced blocks of the pages on deploying."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_redis_accepts_every_user_of_the_page(redis_server: RedisServer) -> None:
    users = [line for block in blocks("acl") for line in block.splitlines()]

    with redis_server.client as client:
        for user in users:
            client.execute_command("ACL", "SETUSER", *rules_of(user.removeprefix("user ")))

        loaded = client.acl_users()

    assert set(loaded) == {"default", "accounts", "mailer", "audit"}


def rules_of(line: str) -> list[str]:
    """The words of a line, a selector in parentheses being one."""
    return re.findall(r"\([^)]*\)|\S+", line)


def test_the_health_check_on_the_page_follows_redis(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_EVENTBUS_URL", redis_server.url)
    names: dict[str, Any] = {"__name__": "mailer"}
    exec(blocks("python")[0], names)  # noqa: S102 - our own page
    app = names["create_app"]()
    client = app.test_client()

    assert client.get("/health").status_code == 503
    names["bus"].start(app)
    wait_until(lambda: client.get("/health").status_code == 200, what="it listens")
    redis_server.kill()
    wait_until(lambda: client.get("/health").status_code == 503, what="it hears nothing")
    assert client.get("/live").status_code == 204
    names["bus"].stop(app, flush=0)


def test_the_log_lines_of_the_page_are_those_of_the_package() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (?:warning|error) \|", PAGE, re.MULTILINE)
    sources = "".join(
        path.read_text() for path in Path(flask_eventbus.__file__).parent.rglob("*.py")
    )
    said = re.sub(r'"\s+f?"', "", sources)

    assert len(rows) > 10
    assert [row for row in rows if row not in said] == []


def test_the_ports_and_passwords_of_the_page_are_those_of_the_stack() -> None:
    for name in re.findall(r"`([A-Z]+_(?:PORT|PASSWORD|IMAGE))`", PAGE):
        assert f"${{{name}:" in COMPOSE

    published = re.findall(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-(\d+)\}:8000", COMPOSE)
    assert published == re.findall(r"`http://127\.0\.0\.1:(\d+)`", PAGE)
