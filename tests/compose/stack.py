"""The stack of docker-compose.yml: built, driven and looked into by tests."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servers import free_port, require
from waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "docker-compose.yml"

WEB = ("accounts", "mailer-web", "catalog", "analytics")
SERVICES = (*WEB, "mailer", "audit", "mail", "redis")

#: Services with more than one container.
WORKERS = {"mailer": 2}

#: Seconds a build may take, that of base images included where an engine has to fetch them.
BUILD = 900


class Stack:
    """One stack of its own: its name, passwords, ports and volumes are no other's.

    :param folder: where its passwords are written.
    """

    def __init__(self, folder: Path) -> None:
        require("a container engine; set DOCKER_HOST or start Docker", has_engine())
        require("docker-compose, or the plug-in 'docker compose'", compose_program())
        self.project = f"eventbus-test-{secrets.token_hex(4)}"
        self._ports = {service: free_port() for service in WEB}
        self._passwords = make_secrets(folder)

    def start(self) -> None:
        """Build the images, start all containers, and wait until each is healthy."""
        self.compose("build", timeout=BUILD)
        self.up()

    def up(self) -> None:
        """Start what does not run, and wait until all is healthy."""
        self.compose("up", "--detach")
        wait_until(self.is_healthy, timeout=90, what="every container is healthy")

    def remove(self) -> None:
        """Leave nothing behind."""
        self.compose("down", "--volumes", "--rmi", "local", "--timeout", "1")

    # -- commands -------------------------------------------------------------------------

    def compose(self, *arguments: str, timeout: float = 120) -> str:
        """Return the output of a Compose command, which must succeed."""
        return run(self._compose(arguments), self._environment, timeout=timeout)

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A Compose command that goes on meanwhile."""
        environment = os.environ | self._environment
        return subprocess.Popen(
            self._compose(arguments),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def execute(self, service: str, *command: str, succeeds: bool = True) -> str:
        """Return the output of a command in a container."""
        return docker("exec", self.container(service), *command, succeeds=succeeds)

    def redis(self, user: str, *command: str) -> str:
        """Return the reply of Redis to one of its users."""
        password = self._passwords[f"{user.upper()}_PASSWORD"]
        client = ["redis-cli", "--no-auth-warning", "--user", user, "--pass", password]
        return self.execute("redis", *client, *command, succeeds=False)

    # -- what the engine knows ------------------------------------------------------------

    def containers(self, service: str) -> list[str]:
        """The containers of a service, though they may have stopped."""
        labels = {"service": service, "project": self.project}
        filters = [f"--filter=label=com.docker.compose.{key}={labels[key]}" for key in labels]
        found = docker("ps", "--all", "--quiet", *filters).split()
        assert len(found) == WORKERS.get(service, 1), f"{service} has {len(found)} containers."
        return found

    def container(self, service: str) -> str:
        """The container of a service, or one of several."""
        return self.containers(service)[0]

    def inspect(self, service: str) -> list[dict[str, Any]]:
        """All that the engine knows of each container."""
        found: list[dict[str, Any]] = json.loads(docker("inspect", *self.containers(service)))
        return found

    def states(self, service: str) -> list[dict[str, Any]]:
        """Of each container whether it runs, since when, and how its last end was."""
        return [found["State"] for found in self.inspect(service)]

    def is_healthy(self) -> bool:
        """Return True if every health check passes."""
        states = {service: self.states(service) for service in SERVICES}
        ended = [name for name in SERVICES if any(map(_has_ended, states[name]))]
        assert not ended, f"{ended} do not run.\n{self.report()}"
        return all(
            state["Health"]["Status"] == "healthy" for each in states.values() for state in each
        )

    def logs(self, service: str) -> str:
        """Return the logs of the containers, one after the other."""
        return "".join(docker("logs", container) for container in self.containers(service))

    def report(self) -> str:
        """The last lines of every container, for a test that fails."""
        return "\n".join(
            f"-- {service}\n{docker('logs', '--tail=40', container)}"
            for service in SERVICES
            for container in self.containers(service)
        )

    # -- what the services answer ---------------------------------------------------------

    def get(self, service: str, path: str) -> Any:
        """Return the response of a service."""
        return self._ask(service, path, "GET", None)

    def send(self, service: str, path: str, *, method: str = "POST", **body: str) -> Any:
        """Return the response of a service to a JSON object."""
        return self._ask(service, path, method, json.dumps(body).encode())

    def _ask(self, service: str, path: str, method: str, body: bytes | None) -> Any:
        url = f"http://127.0.0.1:{self._ports[service]}{path}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers, method=method)

        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - ours
            return json.load(response)

    @property
    def _environment(self) -> dict[str, str]:
        ports = {_port_of(service): str(port) for service, port in self._ports.items()}
        return self._passwords | ports

    def _compose(self, arguments: tuple[str, ...]) -> list[str]:
        program = compose_program() or []
        return [*program, f"--project-name={self.project}", f"--file={FILE}", *arguments]


def _has_ended(state: Mapping[str, Any]) -> bool:
    return bool(state["Status"] != "running")


def _port_of(service: str) -> str:
    """The variable that names the port of a service on this machine."""
    return f"{service.removesuffix('-web').upper()}_PORT"


def has_engine() -> bool:
    """Return True if a container engine answers, that of ``DOCKER_HOST`` or of this machine."""
    return shutil.which("docker") is not None and succeeds("docker", "info")


def compose_program() -> list[str] | None:
    """Compose 1.29, or what came after it."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]

    return ["docker", "compose"] if succeeds("docker", "compose", "version") else None


def make_secrets(folder: Path) -> dict[str, str]:
    """Passwords as deploy/make-secrets writes them for a checkout, in ``folder`` instead."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    subprocess.run([folder / "deploy" / "make-secrets"], check=True, capture_output=True)
    lines = (folder / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def docker(*arguments: str, succeeds: bool = True) -> str:
    """Return the output of a command of the engine."""
    return run(["docker", *arguments], {}, succeeds=succeeds)


def run(
    command: list[str],
    environment: Mapping[str, str],
    *,
    timeout: float = 60,
    succeeds: bool = True,
) -> str:
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    failed = succeeds and done.returncode
    assert not failed, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout
