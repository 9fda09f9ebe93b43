"""What the README and the documentation say is true: every block runs, every name exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import RedisServer, free_port
from waiting import wait_until

from flask_eventbus import routes
from flask_eventbus.config import SETTINGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
FAILURES = (ROOT / "docs" / "what-happens-when.md").read_text()


def blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def block(text: str, word: str) -> str:
    """The first block that has ``word`` in it."""
    return next(found for found in blocks(text) if word in found)


@pytest.fixture
def run(tmp_path: Path, redis_server: RedisServer) -> Iterator[Callable[..., list[str]]]:
    """Start a program of the README against a real server, and collect its lines."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> Path:
        log = tmp_path / f"log{len(processes)}"
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(tmp_path)}
        with log.open("wb") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command], cwd=tmp_path, stdout=out, stderr=out, env=environ
                )
            )
        return log

    yield start  # type: ignore[misc]  # the paths of logs

    for process in processes:
        process.terminate()
        process.wait(20)


def test_the_three_programs_of_the_readme_work_together(
    tmp_path: Path, redis_server: RedisServer, run: Callable[..., Path]
) -> None:
    for name, word in (
        ("accounts/app.py", 'EVENTBUS_SERVICE="accounts"'),
        ("mailer/app.py", 'EVENTBUS_SERVICE="mailer"'),
        ("audit.py", 'service="audit"'),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = block(README, word).replace("redis://localhost:6379/0", redis_server.url)
        path.write_text(text)

    port = free_port()
    run("-m", "flask", "--app", "accounts.app", "run", "--port", str(port))
    mailer = run("-m", "flask", "--app", "mailer.app", "run", "--port", str(free_port()))
    audit = run("audit.py")
    client = redis_server.client
    wait_until(lambda: len(client.client_list(_type="pubsub")) == 2, what="both listen")
    wait_until(
        lambda: _posts(f"http://127.0.0.1:{port}/register"), what="the registration is taken"
    )

    wait_until(lambda: "to ada@example.com: welcome! (accounts," in mailer.read_text(), what="mail")
    wait_until(lambda: "accounts {'user_id': 7" in audit.read_text(), what="the audit")


def _posts(url: str) -> bool:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, data=b"", timeout=5) as answer:  # noqa: S310 - our own server
            return bool(answer.status == 201)
    except URLError:
        return False


def test_what_a_program_may_write_runs_and_so_does_its_test(pytester: pytest.Pytester) -> None:
    program = block(README, "@app.signal")
    test = block(README, "eventbus.deliver")
    pytester.makepyfile(test_readme=program + "\n\n" + test)

    result = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")

    result.assert_outcomes(passed=1)


def test_the_configuration_page_has_every_setting_with_its_default() -> None:
    for setting in SETTINGS:
        assert f"\n## {setting}\n" in CONFIGURATION
        assert f"[`{setting}`](#{setting.lower()})" in CONFIGURATION


@pytest.mark.parametrize("text", blocks(CONFIGURATION))
def test_the_examples_of_the_configuration_page_are_read(text: str) -> None:
    names: dict[str, Any] = {}
    exec(text.replace('"accounts.hooks:api_call"', '"json:loads"'), names)  # noqa: S102

    if "EVENTBUS_PUBLISH" in names:
        assert routes.read_routes(names["EVENTBUS_PUBLISH"])
    else:
        assert routes.read_subscriptions(names["EVENTBUS_SUBSCRIBE"])


def test_every_line_of_what_happens_when_names_a_test_that_exists() -> None:
    rows = [line for line in FAILURES.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| What", "|---"))]
    known = set()

    for path in [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "services").rglob("test_*.py")]:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))

    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= known, row


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_version_is_in_the_changes() -> None:
    import flask_eventbus

    assert f"## {flask_eventbus.__version__}" in (ROOT / "CHANGES.md").read_text()


def test_the_readme_says_which_pythons_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11 or later" in README
