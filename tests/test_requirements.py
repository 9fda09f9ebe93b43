from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> list[Requirement]:
    """Return the requirements in pyproject.toml, extras included."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in sum(extras, PROJECT["dependencies"])]


def pinned(name: str) -> dict[str, Version]:
    """The one version of each package that a file of requirements/ names."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(item.name): exact(item) for item in requirements}


def exact(requirement: Requirement) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned: write it with '=='."

    return Version(specifier.version)


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = [item.version for item in requirement.specifier if item.operator == ">="]
    return Version(bound)


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_lowest_versions_are_the_lower_bounds(requirement: Requirement) -> None:
    lowest = pinned("lowest.txt")

    assert lowest[canonicalize_name(requirement.name)] == lower_bound(requirement)


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_pinned_versions_are_allowed(requirement: Requirement) -> None:
    version = pinned("dev.txt")[canonicalize_name(requirement.name)]

    assert version in requirement.specifier


def test_every_package_with_a_lowest_version_is_pinned_for_development() -> None:
    assert pinned("lowest.txt").keys() <= pinned("dev.txt").keys()


def test_the_demo_installs_only_the_services_and_their_servers() -> None:
    lines = (ROOT / "requirements" / "demo.txt").read_text().splitlines()
    names = {canonicalize_name(line) for line in lines if line[0] not in "#-"}

    assert "--constraint dev.txt" in lines
    assert names == {"aiosmtpd", "flask-sqlalchemy", "gunicorn", "honcho"}
    assert names < pinned("dev.txt").keys()


#: The first command of a service's README.
FIRST_COMMAND = re.compile(r"^    (pip install .*)$", re.MULTILINE)

SERVICES = sorted((ROOT / "services").glob("*/README.md"))


def first_commands() -> set[str]:
    """Return the first command of each service's README."""
    found = [FIRST_COMMAND.search(page.read_text()) for page in SERVICES]
    assert len(found) == 5
    return {match[1] for match in found if match}


@pytest.mark.parametrize("version", ["23.2.1", "26.2"])
def test_the_first_command_of_the_services_works_with_this_pip(
    version: str, tmp_path: Path
) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-compile", "--target", tmp_path, f"pip=={version}"],
        check=True,
    )
    (command,) = first_commands()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = ["--dry-run", "--no-deps", "--no-build-isolation", "--ignore-installed"]

    # Its dependencies are not looked at: what failed were the requirements of the line itself.
    outcome = subprocess.run(
        [*pip, *shlex.split(command)[1:], *words],
        cwd=SERVICES[0].parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    used = subprocess.check_output([*pip, "--version"], env=environment, text=True)

    assert outcome.returncode == 0, outcome.stderr
    assert "Would install" in outcome.stdout
    assert f"pip {version} " in used
