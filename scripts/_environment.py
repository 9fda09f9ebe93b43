"""The virtual environment the scripts of this folder run in: made when missing, kept current.

``python3 scripts/_environment.py FOLDER requirements/dev.txt [MORE ...]`` makes one elsewhere; each
further file is installed over the one before it. ``--package WHEEL`` installs that in place of the
checkout.
"""

# A Python too old for the rest must still be able to read this file down to the message below.
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the bootstrap is what checks it
    sys.exit(
        "Python 3.11 or newer is needed; this is Python {}.{}.{} at {}. Install a newer one, or "
        "name one that is there, for example: python3.13 {}".format(
            *sys.version_info[:3], sys.executable, " ".join(sys.argv)
        )
    )

import argparse
import fcntl
import hashlib
import importlib.util
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ready_for_demo() -> Path:
    """Return the Python of .venv where it is complete, else that of a smaller environment."""
    python = ROOT / ".venv" / "bin" / "python"
    stamp = ROOT / ".venv" / "installed"

    if stamp.is_file() and stamp.read_text() == _state(python, ("requirements/dev.txt",), ROOT):
        return python

    return ready(ROOT / ".demo" / "venv", "requirements/demo.txt")


def ready(folder: Path = ROOT / ".venv", *requirements: str, package: Path = ROOT) -> Path:
    """Return the Python of the environment in *folder*, with everything installed there.

    Quick where nothing has changed since the last time; two at once take turns.

    :param package: a wheel of the package; the checkout unless given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)

    with Path(f"{folder}.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        return _ready(folder, requirements or ("requirements/dev.txt",), package)


def _ready(folder: Path, requirements: tuple[str, ...], package: Path) -> Path:
    python = folder / "bin" / "python"
    stamp = folder / "installed"

    if (
        python.exists()
        and stamp.is_file()
        and stamp.read_text() == _state(python, requirements, package)
    ):
        return python

    stamp.unlink(missing_ok=True)

    if not _usable(python):
        _make(folder)

    _install(python, requirements, package)
    stamp.write_text(_state(python, requirements, package))

    return python


def _state(python: Path, requirements: tuple[str, ...], package: Path) -> str:
    """Sum up what an installation depends on: a moved checkout or a new Python is a new one."""
    digest = hashlib.sha256(f"{ROOT}\n{python.resolve()}\n".encode())

    for name in ("pyproject.toml", "requirements/dev.txt", *requirements):
        digest.update((ROOT / name).read_bytes())

    if package.is_file():
        digest.update(package.read_bytes())

    return digest.hexdigest()


def _usable(python: Path) -> bool:
    if not python.exists():
        return False

    probe = "import pip, sys; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0


def _make(folder: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"Python {version} at {sys.executable} cannot make a virtual environment: its modules "
            "'venv' and 'ensurepip' are not installed. On Debian and Ubuntu: "
            f"apt-get install python{version}-venv"
        )

    _say(f"Making {folder} with {sys.executable}")
    _run([sys.executable, "-m", "venv", "--clear", folder])


def _install(python: Path, requirements: tuple[str, ...], package: Path) -> None:
    _say(f"Installing {', '.join(requirements)} into {python.parent.parent}: about a minute")
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    first, *others = requirements

    extras = "embedded" if first == "requirements/demo.txt" else "embedded,testing"
    source = [f"{package}[{extras}]"] if package.is_file() else ["--editable", f".[{extras}]"]
    _run([*pip, "install", "--requirement", first, *source])

    for name in others:
        _run([*pip, "install", "--requirement", name])

    _run([*pip, "check"])


def _run(command: list[str | Path]) -> None:
    code = subprocess.run(command, cwd=ROOT).returncode

    if code:
        _say("The environment is not ready: the reason stands above. Mend it and run this again.")
        sys.exit(code)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, default=ROOT)
    parser.add_argument("folder", type=Path)
    parser.add_argument("requirements", nargs="*")
    given = parser.parse_args()
    ready(given.folder.resolve(), *given.requirements, package=given.package.resolve())
