"""Receivers found by configuration: modules, folders and the entry points of plug-ins."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_eventbus import Bus, ConfigError, EventBus
from flask_eventbus.routing import loading

PLUGIN = """
def register(bus):
    @bus.on("user_registered")
    def {name}(sender, **payload):
        ...
"""


def receivers(bus: Any, name: str = "user_registered") -> list[str]:
    return sorted(r.__name__ for r in bus.signal(name).receivers_for("accounts"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable folder, which is also the current one."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offer(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Let an installed package offer receivers."""
    points = [EntryPoint(name, value, loading.GROUP)]
    monkeypatch.setattr(loading, "entry_points", lambda group: points)


def bus_with(*names: str) -> Bus:
    return Bus("memory://loading", service="mailer", receivers=list(names))


def test_a_module_is_imported_and_registered(folder: Path) -> None:
    (folder / "mails_a.py").write_text(PLUGIN.format(name="send"))

    assert receivers(bus_with("mails_a")) == ["send"]


def test_a_function_is_named_after_a_colon(folder: Path) -> None:
    (folder / "mails_b.py").write_text(
        PLUGIN.format(name="send").replace("def register", "def connect")
    )

    assert receivers(bus_with("mails_b:connect")) == ["send"]


def test_a_folder_is_loaded_in_alphabetical_order(folder: Path) -> None:
    (folder / "plugins").mkdir()
    (folder / "plugins" / "one.py").write_text(PLUGIN.format(name="one"))
    (folder / "plugins" / "two.py").write_text(PLUGIN.format(name="two"))
    (folder / "plugins" / "_not.py").write_text("raise ValueError")

    assert receivers(bus_with("plugins/")) == ["one", "two"]


def test_a_folder_is_relative_to_the_app(folder: Path, tmp_path: Path) -> None:
    (folder / "plugins").mkdir()
    (folder / "plugins" / "one.py").write_text(PLUGIN.format(name="one"))
    app = Flask("mailer", root_path=str(folder))
    app.config.from_mapping(EVENTBUS_SERVICE="mailer", EVENTBUS_RECEIVERS=["plugins/"])

    assert receivers(EventBus(app)) == ["one"]


def test_an_installed_plug_in_is_loaded_by_its_entry_point(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "loyalty.py").write_text(PLUGIN.format(name="points"))
    offer(monkeypatch, "loyalty", "loyalty:register")

    assert receivers(bus_with()) == ["points"]
    assert receivers(bus_with("-loyalty")) == []
    assert receivers(bus_with("-*")) == []


WRONG = [
    ("no_such_module", r"'no_such_module', named in 'EVENTBUS_RECEIVERS', cannot be loaded: Mod"),
    ("json:nothing", "'json:nothing', named in .* cannot be loaded: AttributeError"),
    ("nowhere/", "names the folder 'nowhere/', but there is no"),
    ("broken/", r"broken/bad.py, in a folder of .* cannot be loaded: ValueError: no good"),
]


@pytest.mark.parametrize(("name", "words"), WRONG)
def test_receivers_that_cannot_be_loaded_are_a_named_error_at_start(
    folder: Path, name: str, words: str
) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "bad.py").write_text("raise ValueError('no good')")

    with pytest.raises(ConfigError, match=words):
        bus_with(name)


def test_a_plug_in_that_cannot_be_loaded_is_a_named_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, "loyalty", "no_such_package.receivers:register")

    with pytest.raises(ConfigError, match=r"The plug-in 'loyalty' \(no_such_package.receivers:re"):
        bus_with()


def test_a_module_is_registered_with_each_bus_that_names_it(folder: Path) -> None:
    (folder / "mails_c.py").write_text(PLUGIN.format(name="send"))

    assert receivers(bus_with("mails_c")) == receivers(bus_with("mails_c")) == ["send"]
    assert "mails_c" in sys.modules


def test_two_apps_of_one_bus_register_a_module_once(folder: Path) -> None:
    (folder / "mails_d.py").write_text(PLUGIN.format(name="send"))
    bus = EventBus()

    for name in ("one", "two"):
        app = Flask(name)
        app.config.from_mapping(EVENTBUS_SERVICE=name, EVENTBUS_RECEIVERS=["mails_d"])
        bus.init_app(app)

    assert receivers(bus) == ["send"]


def test_two_folders_may_contain_modules_of_the_same_name(folder: Path) -> None:
    for shop in ("north", "south"):
        (folder / shop / "plugins").mkdir(parents=True)
        path = folder / shop / "plugins" / "same.py"
        path.write_text(PLUGIN.format(name=shop))

    bus = bus_with("north/plugins/", "south/plugins/")

    assert receivers(bus) == ["north", "south"]
    assert {"plugins.same", "south.plugins.same"} <= set(sys.modules)


def test_a_folders_module_is_imported_once_and_registered_with_each_bus(folder: Path) -> None:
    (folder / "addons").mkdir()
    counting = (
        "import builtins\nbuiltins.addon_imports = getattr(builtins, 'addon_imports', 0) + 1\n"
    )
    (folder / "addons" / "counted.py").write_text(counting + PLUGIN.format(name="react"))

    assert receivers(bus_with("addons/")) == receivers(bus_with("addons/")) == ["react"]

    import builtins

    assert builtins.addon_imports == 1  # type: ignore[attr-defined]  # made by the module
