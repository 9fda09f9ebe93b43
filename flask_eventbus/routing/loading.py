"""Load receivers: the modules of ``EVENTBUS_RECEIVERS``, and installed plug-ins."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError
from .registry import Registry

#: Entry point group of plug-ins. Each entry point names a function that takes the bus, or a module
#: with a function ``register(bus)``.
GROUP = "flask_eventbus.receivers"


def load_receivers(bus: Registry, names: Iterable[str], *, root: Path) -> None:
    """Load the modules of ``EVENTBUS_RECEIVERS`` and the plug-ins, each once per bus.

    A name is a module, ``module:function``, or a folder of modules. A folder contains a ``/`` and
    is relative to ``root``. ``-NAME`` excludes the plug-in of that name, ``-*`` all plug-ins. If
    a module defines ``register(bus)``, it is called.

    :raises ConfigError: a module cannot be imported or registered; chained to the original error.
    """
    names = list(names)
    excluded = {name[1:] for name in names if name.startswith("-")}

    for point in () if "*" in excluded else entry_points(group=GROUP):
        if point.name not in excluded:
            _load_once(f"The plug-in {point.name!r} ({point.value})", bus, point.load)

    for name in names:
        if not name.startswith("-"):
            _load_named(name, bus, root)


def _load_named(name: str, bus: Registry, root: Path) -> None:
    if "/" not in name:
        _load_once(f"{name!r}, named in 'EVENTBUS_RECEIVERS',", bus, partial(_import, name))
        return

    folder = root / name

    if not folder.is_dir():
        raise ConfigError(
            f"'EVENTBUS_RECEIVERS' names the folder {name!r}, but there is no {str(folder)!r}. "
            "Create it, or correct the name."
        )

    for path in sorted(folder.glob("[!_]*.py")):
        load = partial(_import_file, path)
        _load_once(f"{path}, in a folder of 'EVENTBUS_RECEIVERS',", bus, load)


def _load_once(what: str, bus: Registry, load: Callable[[], Any]) -> None:
    if what in bus.loaded:
        return

    try:
        found = load()
        register = getattr(found, "register", None) if isinstance(found, ModuleType) else found

        if callable(register):
            register(bus)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{what} cannot be loaded: {type(error).__name__}: {error}. Correct it, or remove it "
            "from 'EVENTBUS_RECEIVERS'; '-NAME' there excludes an installed plug-in."
        ) from error

    bus.loaded.add(what)


def _import(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def _import_file(path: Path) -> ModuleType:
    name = _name_of(path.resolve())

    if name in sys.modules:
        return sys.modules[name]

    spec = importlib.util.spec_from_file_location(name, path)

    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python module")

    module = sys.modules[name] = importlib.util.module_from_spec(spec)

    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise

    return module


def _name_of(path: Path) -> str:
    """Return a module name such as ``plugins.newsletter``, unique among loaded modules.

    It starts with as many parent folders as are needed to be unique.
    """
    name = path.stem

    for folder in path.parents:
        name = f"{folder.name}.{name}"
        known = sys.modules.get(name)

        if known is None or getattr(known, "__file__", None) == str(path):
            break

    return name
