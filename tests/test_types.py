"""A type checker accepts what is right in a user's program, and refuses what is wrong."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from blinker import Signal
from flask import Flask
from servers import require

from flask_eventbus import EventBus, signals
from flask_eventbus.config import SETTINGS, Config
from flask_eventbus.routing import routes, subscriptions
from flask_eventbus.testing import Isolation
from flask_eventbus.typing import PublishOptions, Settings, SubscribeOptions

PAGE = (Path(__file__).parent.parent / "docs" / "types.md").read_text()
PAGE = PAGE.partition("```python\n")[2].partition("```")[0]

#: Each line that mypy refuses ends with the code of the error.
PROGRAM = """
from __future__ import annotations

from typing import Any, Literal, assert_type

from blinker import NamedSignal, Signal
from flask import Flask, current_app, request_finished

from flask_eventbus import Bus, EventBus, current_event, signals
from flask_eventbus.extension import AppSignal, AppSignals, Results
from flask_eventbus.testing import Isolation
from flask_eventbus.typing import Publish, Subscribe

bus = EventBus()
app = Flask(__name__)
bus.init_app(app)


# The face of the app

@bus.app_signal("user_registered")
def welcome(sender: object, username: str) -> str:
    return username

@bus.app_signal
def signal_user_left(sender: object, username: str) -> None: ...

assert_type(welcome(app, "ada"), str)
assert_type(bus.app_signal("user_registered"), AppSignal)
assert_type(bus.app_signal(bus.signal("user_registered")), AppSignal)
assert_type(bus.app_signal("user_registered")(app), Results)
assert_type(bus.app_signal("user_registered")(app, "ada"), Results)
assert_type(bus.app_signal("user_registered")(current_app, username="ada"), Results)
assert_type(bus.app_signal("user_registered").send("me", username="ada"), Results)
welcome(app, 7)  # error: arg-type
bus.app_signal(7)  # error: call-overload
app.signal("user_registered")  # error: attr-defined

class App(Flask):
    signal: AppSignals

shop = App(__name__)

@shop.signal("order_paid")
def pay(sender: object, number: int) -> int:
    return number

assert_type(shop.signal("order_paid")(shop, 7), Results)
assert_type(pay(shop, 7), int)


# Options

@bus.on("order_paid", via="stream", start="earliest", group=None, from_=["shop"], retries=8)
def ship(sender: str, number: int, **extra: Any) -> int:
    assert_type(current_event.via, Literal["channel", "stream"])
    return number

assert_type(ship("shop", 7), int)
bus.on("order_paid", via="streams")  # error: arg-type
bus.on("order_paid", group=False)  # error: arg-type
bus.on("order_paid", retries="8")  # error: arg-type
bus.on("order_paid", retry=8)  # error: call-arg

assert_type(bus.publishes("order_paid", via="stream", key="number", maxlen="7d"), Signal)
assert_type(bus.signal("order_paid"), NamedSignal)
bus.publishes(request_finished, as_="api_call", payload=lambda sender, **extra: {"n": 1})
bus.publishes("order_paid", via="topic")  # error: arg-type
bus.publishes("order_paid", payload=lambda sender, **extra: 1)  # error: arg-type


# Settings

names: Publish = ["order_paid", request_finished]
routes: Publish = {"order_*": "channel", "paid": {"via": "stream", "key": "id"}, "left": None}
by_signal: Publish = {request_finished: {"payload": "shop.hooks:api_call"}}
no_route: Publish = {"order_paid": "streams"}  # error: dict-item
no_option: Publish = {"order_paid": {"vai": "stream"}}  # error: dict-item
sources: Subscribe = {"paid": {"from": ["shop"], "group": None, "start": "earliest"}, "left": None}
no_source: Subscribe = {"order_paid": {"from_": ["shop"]}}  # error: dict-item

Bus("redis://h", service="audit", publish=routes, subscribe=sources, on_outage="raise", maxlen="7d")
Bus("redis://h", service="audit", publish=["report_ready"], concurrency=4, grace=10)
Bus("redis://h", service="audit", concurency=4)  # error: call-arg
Bus("redis://h", service="audit", concurrency="four")  # error: arg-type
Bus("redis://h", service="audit", on_outage="wait")  # error: arg-type

def bus_of(settings: dict[str, Any]) -> Bus:
    return Bus(**settings)


# Lifecycle signals, and the testing kit

@signals.receiver_failed.connect
def alarm(sender: str, **values: Any) -> None: ...

assert_type(signals.receiver_failed, NamedSignal)
signals.receiver_fails  # error: attr-defined

def test_ship(eventbus: Isolation) -> None:
    eventbus.deliver("order_paid", number=7, via="stream")
    eventbus.deliver("order_paid", number=7, via="topic")  # error: arg-type
"""


def test_type_checkers_accept_correct_programs_and_reject_wrong_ones(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "page.py").write_text(PAGE)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", "page.py", "program.py"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    require("mypy", "No module named mypy" not in done.stderr)
    assert "page.py" not in done.stdout
    assert refused_by(done.stdout) == wrong_lines(PROGRAM), done.stdout + done.stderr


def test_the_program_of_the_page_on_types_runs() -> None:
    names: dict[str, Any] = {"__name__": "shop"}

    exec(PAGE, names)  # noqa: S102 - the project's own page

    assert names["bus"].flush(5)
    names["bus"].stop()


def test_bus_app_signal_and_app_signal_are_the_same(eventbus: Isolation) -> None:
    bus = EventBus()
    app = Flask(__name__)
    app.config.from_mapping(EVENTBUS_SERVICE="accounts")
    bus.init_app(app)

    @bus.app_signal("user_registered")
    def welcome(sender: Any, username: str) -> str:
        return f"welcome, {username}"

    sent = app.signal("user_registered")(app, "ada")  # type: ignore[attr-defined]  # see the page

    assert sent == [(welcome, "welcome, ada")]


def test_every_setting_is_typed() -> None:
    settings = {f"EVENTBUS_{name.upper()}" for name in Settings.__annotations__}

    assert settings | {"EVENTBUS_SERVICE", "EVENTBUS_URL"} == set(SETTINGS)


def test_the_types_of_settings_are_those_of_the_table_unless_more_is_accepted() -> None:
    accepted, read = get_type_hints(Settings), get_type_hints(Config)
    others = {name for name, hint in accepted.items() if hint != read[name]}

    assert others == {"publish", "subscribe", "receivers", "on_outage", "maxlen"}


def test_the_types_know_every_option_of_a_signal() -> None:
    assert PublishOptions.__annotations__.keys() == {"via", *routes._READERS}
    assert SubscribeOptions.__annotations__.keys() == {"via", *subscriptions._READERS}


def test_every_lifecycle_signal_has_a_docstring() -> None:
    statements = ast.parse(inspect.getsource(signals)).body
    shown = {
        statement.targets[0].id
        for statement, text in pairwise(statements)
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(text, ast.Expr)
    }

    assert shown == {name for name, value in vars(signals).items() if isinstance(value, Signal)}


def refused_by(output: str) -> dict[int, set[str]]:
    """The codes of mypy's errors in the program, by line."""
    found: dict[int, set[str]] = {}

    for line, code in re.findall(r"^program\.py:(\d+): error: .*\[([\w-]+)\]$", output, re.M):
        found.setdefault(int(line), set()).add(code)

    return found


def wrong_lines(program: str) -> dict[int, set[str]]:
    """The codes that ``program`` expects, by line."""
    lines = enumerate(program.split("\n"), 1)
    announced = ((number, line.partition("  # error: ")[2]) for number, line in lines)
    return {number: {code} for number, code in announced if code}
