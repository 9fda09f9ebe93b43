"""Tests that the rights named in the log suffice: a user with exactly those can do everything."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, Reject, Retry, current_event

pytestmark = [
    pytest.mark.second_look("waits for rights to take effect in a real Redis"),
    pytest.mark.timing(
        check_released_every=0.1,
        first_retry=0.01,
        ask_stream_again_after=0.05,
        ask_command_again_after=0.05,
        resend_after=0.05,
        search_orphans_every=0.1,
        list_streams_every=0.1,
        check_trimmed_every=0.1,
        ping_after=0.1,
    ),
]

Make = Callable[..., Bus]

#: What a user needs before anything can be refused to it.
LEAST = ("reset", "on", ">secret", "-@all", "+client|setname", "+ping", "+auth", "+hello")

#: What a worker logs once it may note the ids of events again.
NOTED_AGAIN = "Redis stores the ids of received events again"

#: A selector, "(+xadd ~key)", or rules in quotes, "'+role'".
GRANT = re.compile(r"\([+&~][^()]*\)|(?<=')[+&][^']*(?=')")


class User:
    """A user of Redis who may nothing, until the log says what to grant."""

    def __init__(self, store: StreamStore, caplog: pytest.LogCaptureFixture) -> None:
        self._store = store
        self._caplog = caplog
        self._granted: set[str] = set()
        self.name = f"user-{store.prefix}"
        self.url = store.url.replace("://", f"://{self.name}:secret@")
        self.allow(*LEAST)

    def grant(self) -> None:
        """Grant what was logged since the last time, as it stands there."""
        for record in list(self._caplog.records):
            for rules in GRANT.findall(record.getMessage()):
                if rules not in self._granted:
                    self._granted.add(rules)
                    self.allow(*([rules] if rules.startswith("(") else rules.split()))

    def grant_until(self, condition: Callable[[], Any], what: str) -> None:
        """Grant what is logged until a condition is true."""

        def is_so() -> bool:
            self.grant()
            return bool(condition())

        wait_until(is_so, timeout=60, what=what)

    @property
    def refusals(self) -> list[str]:
        """Return the commands that Redis refused to this user since :meth:`forgive`.

        But for the notes of the streams' names, which others make as well.
        """
        found = [line for line in self._store.client.acl_log() if line["username"] == self.name]
        return [line["object"] for line in found if line["object"] != "sadd"]

    def forgive(self) -> None:
        """Forget what was refused so far."""
        self._store.client.acl_log_reset()

    def end(self) -> None:
        """Take it away."""
        self._store.client.execute_command("ACL", "DELUSER", self.name)

    def allow(self, *rules: str) -> None:
        """Change what it may."""
        self._store.client.execute_command("ACL", "SETUSER", self.name, *rules)


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams under a prefix of this test's own."""
    return StreamStore(shared_redis)


@pytest.fixture
def user(store: StreamStore, caplog: pytest.LogCaptureFixture) -> Iterator[User]:
    """A user who may nothing."""
    caplog.set_level(logging.WARNING, "flask_eventbus")
    user = User(store, caplog)
    yield user
    user.end()


@pytest.mark.parametrize("via", ["channel", "stream"])
def test_the_logged_rights_are_exactly_those_that_a_publisher_needs(
    store: StreamStore, user: User, make_bus: Make, via: str
) -> None:
    bus = make_bus(user.url, prefix=store.prefix, publish={"tick": {"via": via, "confirm": False}})

    def is_published() -> bool:
        bus.signal("tick").send("test")
        assert bus.flush(10)
        return bus.health().counts.get("published", 0) > 0

    user.grant_until(is_published, what="an event is published")

    user.forgive()
    assert is_published()
    assert user.refusals == []


@pytest.mark.parametrize("name", ["tick", "ti*"])
def test_the_logged_rights_are_exactly_those_that_a_listener_needs(
    store: StreamStore, user: User, make_bus: Make, name: str
) -> None:
    bus = make_bus(user.url, "mailer", prefix=store.prefix)
    received: list[int] = []
    bus.on(name, via="channel")(lambda sender, n: received.append(n))
    bus.start()

    user.grant_until(lambda: bus.ready(0), what="it is received")

    user.forgive()
    publisher = make_bus(store.url, "clock", prefix=store.prefix, publish=["tick"])
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: received == [1], what="the event arrives")
    assert user.refusals == []


@pytest.mark.parametrize("name", ["tick", "ti*"])
@pytest.mark.parametrize("group", [True, None], ids=["group", "no group"])
def test_the_logged_rights_are_exactly_those_that_a_worker_needs(
    store: StreamStore,
    user: User,
    make_bus: Make,
    caplog: pytest.LogCaptureFixture,
    name: str,
    group: Literal[True] | None,
) -> None:
    bus = make_bus(user.url, "mailer", prefix=store.prefix, dead_maxlen=1, retries=1)
    handled: list[int] = []

    @bus.on(name, via="stream", group=group, start="earliest")
    def receive(sender: str, n: int) -> None:
        if n % 3 == 1:
            raise Reject("a dead letter")

        if n % 3 == 2 and group and current_event.attempt == 1:
            raise Retry("once more", after=0.01)

        handled.append(n)

    def is_done(numbers: range) -> bool:
        missing = {n for n in numbers if n % 3 == 0 or (group and n % 3 == 2)} - {*handled}
        return not missing and (not group or not store.retries("tick"))

    for n in range(6):
        store.add("tick", n=n)

    bus.start()
    user.grant_until(lambda: bus.ready(0) and is_done(range(6)), what="all events are handled")
    # Rights that are for what goes wrong, or for the service's bookkeeping, are named meanwhile.
    numbers = iter(range(6, 10_000, 6))

    def is_without_refusals() -> bool:
        user.forgive()
        first = next(numbers)

        for n in range(first, first + 6):
            store.add("tick", n=n)

        user.grant_until(lambda: is_done(range(first, first + 6)), what="they are handled")
        return not user.refusals and (not group or NOTED_AGAIN in caplog.text)

    user.grant_until(is_without_refusals, what="nothing is refused any more")


def test_the_log_names_the_rights_that_trimming_dead_letters_needs(
    store: StreamStore, user: User, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    # XTRIM removes whole nodes, of a hundred entries each.
    for _ in range(250):
        store.give_up("tick")

    bus = make_bus(user.url, "mailer", prefix=store.prefix, dead_maxlen=100)

    @bus.on("tick", via="stream", start="earliest")
    def receive(sender: str, n: int) -> None:
        raise Reject("a dead letter")

    user.allow("+@all", "allkeys", "-xtrim", "-incrby")
    bus.start()
    assert bus.ready(10)
    store.add("tick", n=1)

    wait_until(lambda: "Redis refuses XTRIM of" in caplog.text, what="the first right is named")
    assert len(store.dead("tick")) == 251
    key = store.keys.dead("tick", "mailer")
    assert f"'EVENTBUS_DEAD_MAXLEN' has no effect. Grant its user (+xtrim ~{key})" in caplog.text

    user.grant()
    store.add("tick", n=2)
    wait_until(lambda: "Redis refuses INCRBY of" in caplog.text, what="the second one is named")
    assert len(store.dead("tick")) < 252
    assert (
        f"Dropped dead letters are not counted. Grant its user (+incrby ~{key}:dropped)"
        in caplog.text
    )

    user.grant()
    user.forgive()
    store.add("tick", n=3)
    wait_until(lambda: store.client.get(f"{key}:dropped"), what="they are counted")
    assert int(store.client.get(f"{key}:dropped")) + len(store.dead("tick")) == 253
    assert user.refusals == []


def test_the_log_names_the_right_to_delete_the_ids_of_a_lost_group(
    store: StreamStore, user: User, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(user.url, "mailer", prefix=store.prefix)
    received: list[int] = []
    bus.on("tick", via="stream")(lambda sender, n: received.append(n))
    user.allow("+@all", "allkeys", "allchannels", "-expire")
    bus.start()
    assert bus.ready(10)

    def destroy() -> None:
        store.client.xgroup_destroy(store.keys.stream("tick"), "mailer")

    destroy()
    hint = f"Grant its user (+expire ~{store.prefix}:{{tick}}:seen:mailer:*) in the ACL."
    wait_until(lambda: hint in caplog.text, what="the right is named")
    assert "The events of the last 600 s are not delivered again" in caplog.text

    user.grant()
    user.forgive()
    store.add("tick", n=1)
    wait_until(lambda: received == [1], what="the event is handled, and noted")
    destroy()
    wait_until(lambda: received == [1, 1], what="it comes again")
    assert user.refusals == []
