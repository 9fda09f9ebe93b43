"""Tests of the README and the documentation: every block runs, every name exists."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from servers import RedisServer, free_port, require, unread
from waiting import wait_until

from flask_eventbus import Bus
from flask_eventbus.codec.records import REASONS
from flask_eventbus.config import SETTINGS, Config
from flask_eventbus.receivers.dispatcher import delay
from flask_eventbus.routing import routes, subscriptions
from flask_eventbus.transport.keys import StreamKeys

pytestmark = pytest.mark.second_look("runs the programs of the pages beside a real Redis")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
PUBLISH_AND_SUBSCRIBE = (ROOT / "docs" / "publish-and-subscribe.md").read_text()
FAILURES = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("what-happens-*.md")))
STREAMS = "".join(
    (ROOT / "docs" / f"{page}.md").read_text() for page in ("streams", "stream-subscriptions")
)
IDEMPOTENCY = (ROOT / "docs" / "idempotency.md").read_text()


keys = StreamKeys("eventbus")


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
    wait_until(lambda: groups(client, "user_registered") >= {"mailer"}, what="it has its group")
    wait_until(
        lambda: _posts(f"http://127.0.0.1:{port}/register"), what="the registration is taken"
    )

    wait_until(lambda: "to ada@example.com: welcome! (accounts," in mailer.read_text(), what="mail")
    wait_until(lambda: "accounts {'user_id': 7" in audit.read_text(), what="the audit")


def groups(client: Any, name: str) -> set[str]:
    """The services that have a group at a stream."""
    key = keys.stream(name)
    found = client.xinfo_groups(key) if client.exists(key) else []
    return {group["name"].decode() for group in found}


def _posts(url: str) -> bool:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, data=b"", timeout=5) as answer:  # noqa: S310 - our own server
            return bool(answer.status == 201)
    except URLError:
        return False


def test_the_program_of_the_readme_and_its_test_run(pytester: pytest.Pytester) -> None:
    program = block(README, "@app.signal")
    test = block(README, "eventbus.deliver")
    pytester.makepyfile(test_readme=program + "\n\n" + test)

    result = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")

    result.assert_outcomes(passed=1)


def test_the_configuration_page_has_every_setting_with_its_type_default_and_meaning() -> None:
    for setting, field in zip(SETTINGS, dataclasses.fields(Config), strict=True):
        assert f"\n## {setting}\n" in CONFIGURATION
        begin = f"| [`{setting}`](#{setting.lower()}) | {field.metadata['type']} | "
        end = f" | {field.metadata['meaning']} |"
        row = rf"^{re.escape(begin)}([^|]+){re.escape(end)}$"
        [reported] = re.findall(row, CONFIGURATION, re.MULTILINE)
        default = field.default

        if default is dataclasses.MISSING:
            assert reported == "required"
        elif default == ():
            assert reported == "nothing"
        else:
            assert default in (read_default(reported), reported.strip("`"))


def read_default(reported: str) -> object:
    """Return the Python value of code on a page; ``None`` if it is a bare word."""
    try:
        return ast.literal_eval(reported.strip("`"))
    except (SyntaxError, ValueError):
        return None


@pytest.mark.parametrize("text", blocks(PUBLISH_AND_SUBSCRIBE))
def test_the_examples_on_publishing_and_subscribing_are_valid(text: str) -> None:
    names: dict[str, Any] = {}
    exec(text.replace('"accounts.hooks:api_call"', '"json:loads"'), names)  # noqa: S102

    if "EVENTBUS_PUBLISH" in names:
        assert routes.read_routes(names["EVENTBUS_PUBLISH"])
    else:
        assert subscriptions.read_subscriptions(names["EVENTBUS_SUBSCRIBE"])


def test_the_page_on_publishing_and_subscribing_has_every_option() -> None:
    rows = re.findall(r"^\| `(\w+)` (?:\|[^|]+){3}\|$", PUBLISH_AND_SUBSCRIBE, re.MULTILINE)
    readers = (*routes._READERS, *subscriptions._READERS)

    assert sorted(rows) == sorted(["via", "via", *readers])


def test_every_case_of_what_happens_when_names_a_test_that_exists() -> None:
    cases = re.findall(r"^- \*\*.*?(?=\n- |\n\n|\Z)", FAILURES, re.DOTALL | re.MULTILINE)
    known = names_of_tests()

    assert len(cases) > 150
    for case in cases:
        named = re.findall(r"`(test_\w+)`", case)
        assert named, case
        assert set(named) <= known, case


def test_every_test_that_the_page_on_serving_names_exists() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "serving.md").read_text())

    assert len(named) > 30
    assert set(named) <= names_of_tests()


def names_of_tests() -> set[str]:
    paths = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "services").rglob("test_*.py")]
    return {
        name
        for path in paths
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
    }


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks/README.md",
]

#: Names on the pages that are no settings of this version, or that Kubernetes sets.
NO_SETTINGS = {
    "EVENTBUS_PORT",
    "EVENTBUS_SERVCE",
    "EVENTBUS_SERVICE_HOST",
    "EVENTBUS_SIGNING_KEY",
    "EVENTBUS_SIGNING_KEY_FALLBACKS",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"\bEVENTBUS_[A-Z_]*[A-Z]", page.read_text()))

    assert named <= {*SETTINGS, *NO_SETTINGS}


def test_every_name_on_the_architecture_page_exists_where_it_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = set(re.findall(r"`((?:\w+/)*\w+)\.py`", page))
    modules = [import_module(f"flask_eventbus.{path.replace('/', '.')}") for path in files]
    found = {name: value for module in modules for name, value in vars(module).items()}
    named = re.findall(r"`([A-Z][a-z]\w+)(?:\.([a-z]\w+))?`", page)

    assert len(files) > 12
    assert len(named) > 30

    for name, attribute in named:
        source = inspect.getsource(found[name])
        assert not attribute or re.search(rf"def {attribute}\b|self\.{attribute} = ", source), (
            f"{name}.{attribute}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_version_is_in_the_changes() -> None:
    import flask_eventbus

    assert f"## {flask_eventbus.__version__}" in (ROOT / "CHANGES.md").read_text()


def test_the_readme_names_the_pythons_that_the_package_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11 or later" in README


@pytest.fixture
def streams_page(redis_server: RedisServer) -> Iterator[dict[str, Any]]:
    """The programs of the pages on streams, loaded against a real server, listening."""
    names: dict[str, Any] = {"__name__": "shipping"}

    for text in blocks(STREAMS):
        exec(text.replace("redis://localhost:6379/0", redis_server.url), names)  # noqa: S102

    names["bus"].start()
    assert names["bus"].ready(10)
    yield names
    names["bus"].stop(flush=0)


def test_the_receivers_on_the_streams_page_behave_as_described(
    streams_page: dict[str, Any],
    redis_server: RedisServer,
    make_bus: Callable[..., Bus],
    capsys: pytest.CaptureFixture[str],
) -> None:
    require("redis-cli", shutil.which("redis-cli"))
    shop = make_bus(redis_server.url, "shop", publish={"order_paid": "stream"})
    said = ""

    shop.signal("order_paid").send(number=1, country="nowhere")
    shop.signal("order_paid").send(number=2, country="Norway")

    def received() -> str:
        nonlocal said
        said += capsys.readouterr().out
        return said

    wait_until(lambda: "order 2: shipped at attempt 2" in received(), what="the retry")
    assert received().count("thank you") == 2
    dead = subprocess.run(
        ["/bin/sh", "-c", blocks(STREAMS, "sh")[0]],
        env={**os.environ, "REDIS_URL": redis_server.url},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        errors="replace",
    ).stdout.split("\n")
    assert dead[dead.index("reason") + 1] == "rejected"
    assert dead[dead.index("error") + 1] == "Reject: nobody delivers to nowhere"
    assert dead[dead.index("payload") + 1] == '{"number": 1, "country": "nowhere"}'


def test_the_page_on_streams_has_every_reason_for_a_dead_letter() -> None:
    part = STREAMS.split("## Dead letters")[1].split("\n## ")[0]

    assert tuple(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) == REASONS


def test_the_page_on_streams_says_how_long_retries_last() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.+) \|$", STREAMS, re.MULTILINE)
    units = {"s": 1, "minutes": 60, "hours": 3_600}

    assert len(rows) == 6
    for retries, attempts, reported in rows:
        lasts = sum(delay(attempt, jitter=0.0) for attempt in range(1, int(retries) + 1))
        number, _, unit = reported.partition(" ")
        seconds = 0.0 if reported == "at once" else float(number) * units[unit]
        assert int(attempts) == int(retries) + 1
        assert lasts == pytest.approx(seconds, rel=0.005)


def test_a_stored_id_takes_the_memory_that_the_streams_page_says(shared_redis: RedisServer) -> None:
    client: Any = shared_redis.client
    key, node = f"ids-{os.getpid()}", secrets.token_hex(6)
    numbers = itertools.count(1)
    costs = []

    for count in (1_000, 9_000, 90_000):
        client.sadd(key, *(f"{node}-{next(numbers)}" for _ in range(count)))
        costs.append(client.memory_usage(key, samples=0) / client.scard(key))

    client.delete(key)
    assert all(55 < cost < 90 for cost in costs), costs


@pytest.fixture
def loyalty(
    tmp_path: Path,
    redis_server: RedisServer,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The program of the page on idempotency, listening in two workers; its database."""
    monkeypatch.setenv("FLASK_EVENTBUS_URL", redis_server.url)
    database = tmp_path / "loyalty.db"
    text = block(IDEMPOTENCY, "loyalty.py").replace("loyalty.db", str(database))
    (tmp_path / "loyalty.py").write_text(text)

    # One after the other: both would make the tables.
    for count in (1, 2):
        run("-m", "flask", "--app", "loyalty", "eventbus", "run")
        wait_for_workers(redis_server.client, count)

    return database


def wait_for_workers(client: Any, count: int) -> None:
    def nodes() -> set[str]:
        names = (found["name"] for found in client.client_list())
        return {name for name in names if name.startswith("eventbus:loyalty:")}

    wait_until(lambda: "loyalty" in groups(client, "order_paid"), what="the group is there")
    wait_until(lambda: len(nodes()) == count, what="the worker is there")


def test_the_receiver_on_the_idempotency_page_acts_once_per_event(
    loyalty: Path, redis_server: RedisServer, make_bus: Callable[..., Bus]
) -> None:
    shop = make_bus(redis_server.url, "shop", publish={"order_paid": "stream"})
    client: Any = redis_server.client
    key = keys.stream("order_paid")

    for customer_id in (1, 2, 1):
        shop.signal("order_paid").send(customer_id=customer_id, amount=10)

    wait_until(lambda: points(loyalty) == [(1, 20), (2, 10)], what="the points")

    # The window forgets, and what was handled comes again, in another worker perhaps.
    for seen in client.scan_iter(match="*:seen:*"):
        client.delete(seen)
    for _, fields in client.xrange(key):
        client.xadd(key, fields)

    wait_until(lambda: all_handled(client, key, 6), what="everything is acknowledged")
    assert points(loyalty) == [(1, 20), (2, 10)]
    assert not client.exists(keys.retry("order_paid", "loyalty"))


def all_handled(client: Any, key: str, count: int) -> bool:
    [group] = client.xinfo_groups(key)

    # Unread entries are counted first: one that is read in between is pending afterwards.
    if unread(client, key, group["name"].decode()):
        return False

    [group] = client.xinfo_groups(key)
    return bool(client.xlen(key) == count and not group["pending"])


def points(database: Path) -> list[tuple[int, int]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT * FROM account ORDER BY customer_id").fetchall()


def test_the_page_on_existing_signals_publishes_its_signal() -> None:
    text = (ROOT / "docs" / "existing-signals.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program: dict[str, Any] = {"__name__": __name__}

    exec(code, program)  # noqa: S102 - the page's own code

    bus = program["bus"]
    assert bus.flush(5)
    assert bus.health().counts["published"] == 1
    bus.stop()
