"""The stack of docker-compose.yml on a real engine: it works, heals, drains, and is locked up."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from compose.stack import FILE, SERVICES, WEB, Stack, compose_program, docker
from servers import require
from waiting import wait_until

# The first test builds the images.
pytestmark = [
    pytest.mark.timeout(1_200),
    pytest.mark.second_look("starts, kills and restarts containers"),
]

#: What a worker says when it is told to stop.
ENDS = "Waiting for running receivers"

_numbers = itertools.count(1)


def register(stack: Stack) -> str:
    """Register a user who was never seen before, and return the address."""
    email = f"user{next(_numbers)}@example.com"
    stack.send("accounts", "/register", email=email, name="Ada")
    return email


def mails(stack: Stack) -> Iterator[dict[str, Any]]:
    for line in stack.logs("mail").splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def has_mail(stack: Stack, email: str) -> bool:
    return any(mail["to"] == [email] for mail in mails(stack))


def audited(stack: Stack) -> list[dict[str, Any]]:
    lines = stack.execute("audit", "cat", "/data/audit.jsonl").splitlines()
    return [json.loads(line) for line in lines]


def is_audited(stack: Stack, email: str) -> bool:
    payloads = [line["payload"] for line in audited(stack) if line["what"] == "event"]
    return any(payload.get("email") == email for payload in payloads)


def calls_counted(stack: Stack, service: str) -> int:
    counts = stack.get("analytics", "/counts.json")
    return next((found["total"] for found in counts["services"] if found["name"] == service), 0)


def prices(stack: Stack, *, workers: int = 2) -> dict[int, dict[str, Any]]:
    """Return the answer of each worker of the catalog, once that many have answered."""
    answers: dict[int, dict[str, Any]] = {}

    def ask() -> bool:
        answer = stack.get("catalog", "/products/A1")
        answers[answer["worker"]] = answer
        return len(answers) == workers

    wait_until(ask, timeout=20, what=f"{workers} workers answer")
    return answers


def change_price(stack: Stack) -> str:
    price = f"{next(_numbers)}.25"
    stack.send("catalog", "/products/A1/price", method="PUT", price=price)
    return price


def serves(stack: Stack, price: str) -> bool:
    return {answer["price"] for answer in prices(stack).values()} == {price}


def test_a_registration_is_mailed_audited_and_counted(stack: Stack) -> None:
    counted = calls_counted(stack, "accounts")

    email = register(stack)

    wait_until(lambda: has_mail(stack, email), what="the mail is at the mail server")
    wait_until(lambda: is_audited(stack, email), what="audit has written the event")
    wait_until(lambda: calls_counted(stack, "accounts") > counted, what="the call is counted")


def test_after_a_change_no_worker_serves_the_old_price(stack: Stack) -> None:
    wait_until(
        lambda: all(answer["cached"] for answer in prices(stack).values()),
        what="both workers have the price in their caches",
    )

    price = change_price(stack)

    wait_until(lambda: serves(stack, price), what="both workers serve the new price")


def test_a_restart_of_redis_needs_no_other_restart(stack: Stack) -> None:
    others = [service for service in SERVICES if service != "redis"]
    started = {service: starts(stack, service) for service in others}

    stack.compose("restart", "redis")

    wait_until(lambda: registration_arrives(stack), timeout=60, what="a user gets a mail again")
    wait_until(lambda: serves(stack, change_price(stack)), timeout=60, what="prices arrive again")
    wait_until(stack.is_healthy, timeout=60, what="every container is healthy again")
    assert "reconnected" in [line["what"] for line in audited(stack)]
    assert {service: starts(stack, service) for service in others} == started
    assert restarts(stack) == {0}


def starts(stack: Stack, service: str) -> set[str]:
    return {state["StartedAt"] for state in stack.states(service)}


def restarts(stack: Stack) -> set[int]:
    """Return how often the engine restarted a container."""
    return {each["RestartCount"] for service in SERVICES for each in stack.inspect(service)}


def registration_arrives(stack: Stack) -> bool:
    """Return True if all subscribers receive a registration within a moment."""
    email = register(stack)
    deadline = time.monotonic() + 3

    while time.monotonic() < deadline:
        if has_mail(stack, email) and is_audited(stack, email):
            return True

    return False


def test_a_thousand_registrations_are_a_thousand_mails_while_redis_and_the_mailer_restart(
    stack: Stack,
) -> None:
    before = sum(1 for _ in mails(stack))
    registered: list[str] = []
    pool = ThreadPoolExecutor(max_workers=4)
    tasks = [pool.submit(lambda: registered.append(register(stack))) for _ in range(1_000)]

    wait_until(lambda: len(registered) >= 300, timeout=120, what="300 users are registered")
    commands = [stack.begin("restart", service) for service in ("redis", "mailer")]
    assert len(registered) < 1_000
    assert [command.wait(90) for command in commands] == [0, 0]

    pool.shutdown()
    assert [error for task in tasks if (error := task.exception())] == []
    assert len(set(registered)) == 1_000
    # What a worker could not hand back, Redis being away, is taken over after a minute.
    wait_until(lambda: is_settled(stack), timeout=150, what="nothing is left to be handled")
    sent = Counter(mail["to"][0] for mail in mails(stack))
    assert {email for email in registered if sent[email] != 1} == set()
    assert sum(sent.values()) == before + 1_000


def is_settled(stack: Stack) -> bool:
    """Return True if the mailer has no unread, pending, retried or dead event."""
    words = ("--service", "mailer", "status", "--json")
    said = stack.compose("run", "--rm", "ops", *words, timeout=120)
    # What Compose itself says comes before, that it builds an image for example.
    [stream] = json.loads(said[said.rindex("\n{") :])["streams"]
    [group] = stream["groups"]
    return not any(group[count] for count in ("lag", "pending", "retries", "dead"))


def test_a_restart_of_redis_forgets_no_dead_letter_and_no_retry(stack: Stack) -> None:
    sent = Counter(mail["to"][0] for mail in mails(stack))
    stack.redis("accounts", "XADD", "eventbus:{user_registered}:stream", "*", "event", "no event")
    stack.compose("stop", "mail")
    email = register(stack)
    wait_until(lambda: outcomes(stack) == (1, 1, 0), timeout=60, what="one is a retry, one is dead")

    stack.compose("restart", "redis")
    wait_until(lambda: registered_again(stack), timeout=60, what="Redis takes events again")

    wait_until(lambda: outcomes(stack) == (2, 1, 0), timeout=60, what="nothing was forgotten")
    stack.up()
    wait_until(lambda: outcomes(stack) == (0, 1, 0), timeout=150, what="the retries are done")
    stack.compose("run", "--rm", "ops", "--service", "mailer", "dead", "purge", "--yes")
    stack.compose("run", "--rm", "ops", "--service", "audit", "dead", "purge", "--yes")
    sent.update([email])
    found = Counter(mail["to"][0] for mail in mails(stack))
    assert {address: found[address] for address in sent} == dict(sent)


def registered_again(stack: Stack) -> bool:
    """Register one more user once Redis is there; return True if Redis has the event."""
    if not publishing(stack) or buffered(stack):
        return False

    register(stack)
    return True


def outcomes(stack: Stack) -> tuple[int, int, int]:
    """Retries, dead letters, and events in hand of the mailer."""
    key = "eventbus:{user_registered}"
    retries = stack.redis("ops", "ZCARD", f"{key}:retry:mailer")
    dead = stack.redis("ops", "XLEN", f"{key}:dead:mailer")
    pending = stack.redis("ops", "XPENDING", f"{key}:stream", "mailer").split()[0]
    return int(retries), int(dead), int(pending)


def test_users_register_while_redis_is_away_and_their_events_wait(stack: Stack) -> None:
    stack.compose("stop", "redis")
    register(stack)
    wait_until(lambda: not publishing(stack), what="accounts knows that Redis is away")
    register(stack)
    assert buffered(stack) >= 2

    stack.up()

    wait_until(lambda: publishing(stack) and not buffered(stack), timeout=30, what="they are sent")


def publishing(stack: Stack) -> bool:
    return bool(stack.get("accounts", "/health")["publishing"])


def buffered(stack: Stack) -> int:
    return int(stack.get("accounts", "/health")["buffered"])


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("accounts", ("PUBLISH", "eventbus:{price_changed}:channel", "")),
        ("accounts", ("XRANGE", "eventbus:{user_registered}:stream", "-", "+")),
        ("mailer", ("XADD", "eventbus:{user_registered}:stream", "*", "event", "")),
        ("mailer", ("XGROUP", "DESTROY", "eventbus:{user_registered}:stream", "audit")),
        ("analytics", ("PUBLISH", "eventbus:{api_call}:channel", "")),
        ("catalog", ("SUBSCRIBE", "eventbus:{user_registered}:channel")),
        ("audit", ("GET", "anything")),
        ("ops", ("CONFIG", "SET", "maxmemory", "1")),
    ],
)
def test_redis_refuses_a_service_the_commands_it_does_not_need(
    stack: Stack, user: str, command: tuple[str, ...]
) -> None:
    assert "NOPERM" in stack.redis(user, *command)


def test_redis_allows_the_services_every_command_they_use(stack: Stack) -> None:
    stack.redis("ops", "ACL", "LOG", "RESET")

    stack.compose("restart", "catalog", "mailer")
    wait_until(stack.is_healthy, timeout=60, what="every container is healthy again")
    email = register(stack)
    change_price(stack)
    wait_until(lambda: has_mail(stack, email), what="the mail is at the mail server")
    wait_until(lambda: is_audited(stack, email), what="audit has written the event")

    assert stack.redis("ops", "ACL", "LOG").strip() == ""


def test_operators_can_list_the_listeners_in_redis(stack: Stack) -> None:
    said = stack.compose("run", "--rm", "ops", "routes", timeout=300)

    assert re.search("price_changed +2\n", said)


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_not_root_and_writes_only_its_data(stack: Stack, service: str) -> None:
    host = stack.inspect(service)[0]["HostConfig"]

    assert stack.execute(service, "id", "-u").strip() == "10001"
    assert "Read-only" in stack.execute(service, "touch", "/srv/x", "/etc/x", succeeds=False)
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"


def test_only_the_web_services_have_published_ports_and_only_on_loopback(stack: Stack) -> None:
    published = {
        service: stack.inspect(service)[0]["NetworkSettings"]["Ports"] for service in SERVICES
    }
    addresses = {
        service: {binding["HostIp"] for bindings in ports.values() for binding in bindings or ()}
        for service, ports in published.items()
    }

    assert addresses == {
        service: {"127.0.0.1"} if service in WEB else set() for service in SERVICES
    }


def test_a_stop_lets_a_running_mail_arrive(stack: Stack) -> None:
    mail = stack.container("mail")
    docker("pause", mail)
    email = register(stack)
    wait_until(lambda: is_mailing(stack), what="the mailer speaks to the mail server")

    begin, ends = time.monotonic(), stack.logs("mailer").count(ENDS)
    stop = stack.begin("stop")
    wait_until(lambda: stack.logs("mailer").count(ENDS) > ends, what="it is told to stop")
    assert "running" in [state["Status"] for state in stack.states("mailer")]
    docker("unpause", mail)

    assert stop.wait(60) == 0
    assert time.monotonic() - begin < 40
    assert has_mail(stack, email)
    codes = {name: {state["ExitCode"] for state in stack.states(name)} for name in SERVICES}
    assert codes == {name: {0} for name in SERVICES}

    stack.up()


def is_mailing(stack: Stack) -> bool:
    """Return True if a worker of the mailer is connected to port 1025."""
    tables = [docker("exec", each, "cat", "/proc/net/tcp") for each in stack.containers("mailer")]
    return any(":0401 01 " in table for table in tables)


def test_stored_data_survives_new_containers(stack: Stack) -> None:
    price = change_price(stack)
    email = register(stack)
    wait_until(lambda: is_audited(stack, email), what="audit has written the event")

    stack.compose("up", "--detach", "--force-recreate", "--no-deps", "catalog", "audit")
    wait_until(stack.is_healthy, timeout=60, what="every container is healthy again")

    assert serves(stack, price)
    assert is_audited(stack, email)


def test_an_event_survives_a_new_redis_container(stack: Stack) -> None:
    stack.compose("stop", "mailer")
    email = register(stack)
    wait_until(lambda: not buffered(stack), what="Redis has the event")

    stack.compose("up", "--detach", "--force-recreate", "--no-deps", "redis")
    stack.up()

    wait_until(lambda: has_mail(stack, email), timeout=60, what="the mail is at the mail server")


def test_without_passwords_compose_names_the_command_that_makes_them(tmp_path: Path) -> None:
    require("docker-compose, or the plug-in 'docker compose'", program := compose_program())
    empty = tmp_path / "empty"
    empty.touch()

    done = subprocess.run(
        [*(program or ()), f"--file={FILE}", f"--env-file={empty}", "config"],
        capture_output=True,
        text=True,
    )

    assert done.returncode != 0
    assert "Run deploy/make-secrets first" in done.stderr
