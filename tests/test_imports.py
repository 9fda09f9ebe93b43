"""Tests of imports: what loads with the package, and that each module can be imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flask_eventbus

PACKAGE = Path(flask_eventbus.__file__).parent

#: Modules that only Flask, SQLAlchemy, pytest or the end of a program may load.
NOT_BY_ITSELF = {"__main__"}


def modules() -> list[str]:
    """The dotted names of all modules below the package."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {".".join(path.parts).removesuffix("__init__").rstrip(".") for path in paths}
    return sorted(names - NOT_BY_ITSELF - {""})


def loaded_by(program: str) -> set[str]:
    """The top-level packages that a fresh process has loaded after a program."""
    return {name.partition(".")[0] for name in modules_after(program)}


def modules_after(program: str) -> set[str]:
    """The modules that a fresh process has loaded after a program."""
    outcome = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert outcome.returncode == 0, outcome.stderr
    return set(outcome.stdout.split())


def own_after(program: str) -> set[str]:
    """The modules and folders of the package that a fresh process has loaded after a program."""
    names = {name for name in modules_after(program) if name.startswith("flask_eventbus.")}
    return {name.removeprefix("flask_eventbus.") for name in names}


def test_importing_the_bus_loads_neither_flask_nor_sqlalchemy_nor_click() -> None:
    loaded = loaded_by("import flask_eventbus; flask_eventbus.Bus")

    assert "flask_eventbus" in loaded
    assert loaded.isdisjoint({"flask", "werkzeug", "sqlalchemy", "click"})


def test_importing_the_extension_loads_no_node() -> None:
    loaded = own_after("import flask_eventbus; flask_eventbus.EventBus")

    assert "extension" in loaded
    assert loaded.isdisjoint({"node", "publisher", "transport", "database", "admin", "serving"})
    assert loaded.isdisjoint(RECEIVING)


APP = """
from flask import Flask
from flask_eventbus import EventBus
app = Flask("shop")
app.config.update(EVENTBUS_URL="memory://imports", EVENTBUS_SERVICE="shop")
"""

BUS = """
from flask_eventbus import Bus
bus = Bus("memory://imports", service="shop")
"""

#: What only a process that listens needs.
RECEIVING = {"listening", "receivers", "channels", "streams"}


@pytest.mark.parametrize(
    "program",
    [
        f"{BUS}bus.publishes('paid', via='stream'); bus.signal('paid').send(None); bus.stop()",
        f"{BUS}bus.start(); bus.node.publish('paid', {{}}); bus.health(); bus.stop()",
        f"{APP}bus = EventBus(app); bus.start(); bus.node().publish('paid', {{}}); bus.stop()",
    ],
    ids=["stream", "started", "app"],
)
def test_a_process_that_only_publishes_loads_nothing_that_receives(program: str) -> None:
    loaded = own_after(program)

    assert "publisher.writer" in loaded
    assert loaded.isdisjoint(RECEIVING)
    assert "transport.embedded" not in loaded


def test_a_subscription_loads_what_receives_when_the_process_listens() -> None:
    subscribed = f"{BUS}bus.on('paid')(print); bus.health()"

    assert own_after(f"{subscribed}; bus.stop()").isdisjoint(RECEIVING)
    assert own_after(f"{subscribed}; bus.start(); bus.stop()") >= RECEIVING


def test_a_subscription_that_the_server_cannot_serve_is_refused_before_anything_loads() -> None:
    loaded = own_after(
        """
from flask_eventbus import Bus, ConfigError
bus = Bus("redis+cluster://localhost", service="shop")
try:
    bus.on("paid", via="stream")
except ConfigError as error:
    raise SystemExit("not even declared") from error
try:
    bus.on("paid", via="stream")(print)
except ConfigError as error:
    assert "is a cluster" in str(error)
else:
    raise SystemExit("accepted")
"""
    )

    assert loaded.isdisjoint(RECEIVING)


RECEIVED = """
import threading
received = threading.Event()

@bus.on("paid")
def receive(sender):
    received.set()

def listen():
    bus.start()
    assert bus.ready(20)
    # As another service: a node does not receive its own events.
    with Bus("memory://imports", service="till", publish=["paid"]) as till:
        till.signal("paid").send(None)
    assert received.wait(20)
    print("received", end=" ")
"""


STARTS = {
    # The main thread imports the module that starts the thread.
    "thread": "thread = threading.Thread(target=listen); thread.start(); thread.join(60)",
    "handler": "import signal; signal.signal(signal.SIGUSR1, lambda *_: listen()); "
    "signal.raise_signal(signal.SIGUSR1)",
}

# Later versions start no thread at the end of a process.
if sys.version_info < (3, 12):
    STARTS["exit"] = "import atexit; atexit.register(listen); atexit.register(bus.stop)"


@pytest.mark.parametrize("program", STARTS.values(), ids=STARTS)
def test_a_node_can_listen_for_the_first_time_from_anywhere(tmp_path: Path, program: str) -> None:
    (tmp_path / "shop.py").write_text(f"{BUS}{RECEIVED}{program}\n")

    outcome = subprocess.run(
        [sys.executable, "-c", "import shop"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
    )

    assert (outcome.stdout.strip(), outcome.returncode) == ("received", 0), outcome.stderr


def test_a_child_listens_that_was_forked_while_a_thread_was_importing() -> None:
    program = """
import os, sys, threading, time, warnings
from flask_eventbus import Bus

warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
bus = Bus("redis://localhost:1", service="shop")
bus.on("paid")(print)
is_importing = threading.Event()

class Slow:
    # The import takes half a second, as from a slow disk.
    def find_spec(self, name, path, target=None):
        if name == "flask_eventbus.channels":
            is_importing.set()
            time.sleep(0.5)

sys.meta_path.insert(0, Slow())
thread = threading.Thread(target=bus.start)
thread.start()
assert is_importing.wait(20)
child = os.fork()

if not child:
    bus.start()
    os._exit(0)

deadline = time.monotonic() + 30

while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
    if time.monotonic() > deadline:
        os.kill(child, 9)
        raise SystemExit("the child hangs")

    time.sleep(0.05)

assert ended[1] == 0, ended
thread.join(20)
bus.stop(flush=0)
"""

    assert "flask_eventbus.channels.listener" in modules_after(program)


def test_importing_admin_loads_neither_flask_nor_click() -> None:
    folders = ("admin", "checks")
    names = [name for name in modules() if name.partition(".")[0] in folders]

    loaded = loaded_by("\n".join(f"import flask_eventbus.{name}" for name in names))

    assert loaded.isdisjoint({"flask", "werkzeug", "click"})


def test_each_module_can_be_imported_first() -> None:
    program = f"""
import importlib, sys
for name in {modules()!r}:
    for loaded in [each for each in sys.modules if each.startswith("flask_eventbus")]:
        del sys.modules[loaded]
    try:
        importlib.import_module(f"flask_eventbus.{{name}}")
    except ImportError as error:
        raise SystemExit(f"{{name}}: {{error}}") from error
"""

    assert "flask_eventbus" in loaded_by(program)
