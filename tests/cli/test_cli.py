"""The commands, with an app and without: what they print, and exit codes that tell the truth."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import flask
import pytest
from click.testing import CliRunner, Result
from flask import Flask
from flask.cli import ScriptInfo
from proxies import Proxy
from servers import RedisServer, free_port, require
from waiting import wait_until

from flask_eventbus import Bus, EventBus, __version__, current_event
from flask_eventbus.__main__ import main
from flask_eventbus.cli.app import COMMANDS, flask_commands
from flask_eventbus.routing.registry import Registry
from flask_eventbus.text import read_value

ROOT = Path(__file__).parents[2]

_numbers = itertools.count()

Run = Callable[..., Result]
Make = Callable[..., Bus]


@pytest.fixture
def prefix() -> str:
    """Channels of this test alone, on a server that others use."""
    return f"cli-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def bare(shared_redis: RedisServer, prefix: str) -> Run:
    """Run a command without an app, against the shared server."""

    def run(*words: str, **options: Any) -> Result:
        settings = ["--url", shared_redis.url, "--prefix", prefix]
        return CliRunner().invoke(main, [*settings, *words], **options)

    return run


@pytest.fixture
def make_app(shared_redis: RedisServer, prefix: str) -> Callable[..., Flask]:
    """Make an app with a bus on the shared server."""

    def make(bus: EventBus | None = None, **settings: Any) -> Flask:
        app = Flask("shop")
        app.config.update(
            EVENTBUS_SERVICE="shop", EVENTBUS_URL=shared_redis.url, EVENTBUS_PREFIX=prefix
        )
        app.config.update(settings)
        (bus or EventBus()).init_app(app)
        return app

    return make


def run_in(app: Flask, *words: str, **options: Any) -> Result:
    """Run ``flask eventbus WORDS`` on an app."""
    return app.test_cli_runner().invoke(flask_commands, words, **options)


def no_server() -> str:
    """A URL, with a password, where nothing answers."""
    return f"redis://ada:s3cret@127.0.0.1:{free_port()}/0"


# -- publish ------------------------------------------------------------------------------


def test_publish_prints_the_id_and_how_many_listeners_got_it(
    make_app: Callable[..., Flask], make_bus: Make, shared_redis: RedisServer, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix)
    received: list[tuple[str, str, dict[str, Any]]] = []

    @bus.on("user_registered")
    def note(sender: str, **payload: Any) -> None:
        received.append((sender, current_event.id, payload))

    bus.start()
    assert bus.ready(10)

    result = run_in(make_app(), "publish", "user_registered", "user_id=7", "email=ada@example.com")

    assert result.exit_code == 0, result.output
    wait_until(lambda: received)
    sender, event_id, payload = received[0]
    assert (sender, payload) == ("shop", {"user_id": 7, "email": "ada@example.com"})
    assert result.output == f"Published {event_id}. 1 listener got it.\n"


def test_publish_succeeds_and_says_so_when_nobody_listens(bare: Run) -> None:
    result = bare("publish", "user_registered")

    assert result.exit_code == 0
    assert result.output.endswith(". No listener got it.\n")


def test_publish_without_an_app_uses_the_named_service_or_cli(
    bare: Run, make_bus: Make, shared_redis: RedisServer, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix)
    senders: list[str] = []
    bus.on("noted")(lambda sender: senders.append(sender))
    bus.start()
    assert bus.ready(10)

    bare("publish", "noted")
    bare("--service", "billing", "publish", "noted")

    wait_until(lambda: len(senders) == 2)
    assert senders == ["cli", "billing"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-1.5", -1.5),
        ("true", True),
        ("null", None),
        ('["a", 1]', ["a", 1]),
        ('{"a": {"b": 1}}', {"a": {"b": 1}}),
        ("", ""),
        ("ada@example.com", "ada@example.com"),
        ("0049", "0049"),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ('"7"', '"7"'),
        ("[draft] hello", "[draft] hello"),
        ("a=b", "a=b"),
    ],
)
def test_a_value_is_parsed_as_json_or_else_taken_as_text(text: str, value: Any) -> None:
    found = read_value(text)

    assert found == value
    assert type(found) is type(value)


def test_a_payload_can_be_a_json_object_from_stdin(
    bare: Run, make_bus: Make, shared_redis: RedisServer, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, prefix=prefix)
    payloads: list[dict[str, Any]] = []
    bus.on("price_changed")(lambda sender, **payload: payloads.append(payload))
    bus.start()
    assert bus.ready(10)

    bare("publish", "price_changed", "--json", '{"sku": "7", "price": 9.5}', "price=8", "eu=true")
    bare("publish", "price_changed", "--json", "-", input='{"sku": "8"}')

    wait_until(lambda: len(payloads) == 2)
    assert payloads == [{"sku": "7", "price": 8, "eu": True}, {"sku": "8"}]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["user registered"], "'user registered' cannot be a signal's name"),
        (["order_*"], "'order_*' cannot be a signal's name"),
        (["paid", "amount"], "'amount' is not KEY=VALUE. Write for example 'user_id=7'."),
        (["paid", "=7"], "'=7' is not KEY=VALUE"),
        (["paid", "a=1", "a=2"], "'a' is given twice. Write one list: 'a=[1, 2]'."),
        (["paid", "--json", "{a: 1}"], "'{a: 1}' is not JSON"),
        (["paid", "--json", "[1]"], "'[1]' is not a JSON object. Write for example '{\"a\": 1}'."),
        ([], "Missing argument 'NAME'"),
    ],
)
def test_a_usage_error_of_publish_is_shown_and_exits_with_2(
    bare: Run, words: list[str], text: str
) -> None:
    result = bare("publish", *words)

    assert result.exit_code == 2
    assert text in unwrapped(result.output)


def test_publish_fails_in_one_line_without_a_password_when_redis_is_away() -> None:
    result = CliRunner().invoke(main, ["--url", no_server(), "publish", "paid", "amount=1"])

    assert result.exit_code == 1
    assert result.output.startswith("Error: 'paid' was not published: Redis at redis://ada:***@")
    assert "Start it there, or correct 'EVENTBUS_URL'." in result.output
    assert "s3cret" not in result.output
    assert len(result.output.splitlines()) == 1


def test_publish_fails_for_an_unsupported_payload(bare: Run) -> None:
    result = bare("publish", "paid", "sender=ada")

    assert result.exit_code == 1
    assert "sender" in result.output


def test_publish_fails_when_redis_refuses_the_channel(redis_server: RedisServer) -> None:
    redis_server.client.execute_command("ACL", "SETUSER", "ada", "on", ">pw", "+@all", "&other")
    url = redis_server.url.replace("127", "ada:pw@127", 1)

    result = CliRunner().invoke(main, ["--url", url, "publish", "paid"])

    assert result.exit_code == 1
    assert "'+publish &eventbus:{paid}:channel'" in result.output


def test_publish_into_a_stream_prints_where_the_event_is(
    bare: Run, make_app: Callable[..., Flask], shared_redis: RedisServer, prefix: str
) -> None:
    app = make_app(EVENTBUS_PUBLISH={"paid": "stream"})

    results = [bare("publish", "paid", "--stream", "amount=1"), run_in(app, "publish", "paid")]

    client: Any = shared_redis.client
    found = client.xrange(f"{prefix}:{{paid}}:stream")
    assert [result.exit_code for result in results] == [0, 0]
    assert [result.output.partition(". ")[2] for result in results] == [
        f"Entry {entry.decode()} in the stream '{prefix}:{{paid}}:stream'.\n" for entry, _ in found
    ]


def test_publish_says_that_an_event_with_too_few_replicas_is_stored(
    make_app: Callable[..., Flask], shared_redis: RedisServer, prefix: str
) -> None:
    app = make_app(EVENTBUS_PUBLISH={"paid": {"via": "stream", "replicas": 1}})

    result = run_in(app, "publish", "paid")

    assert result.exit_code == 1
    assert result.output.startswith("Error: 'paid' is stored as the event ")
    assert result.output.endswith(", but only 0 of 1 replicas have it.\n")
    assert shared_redis.client.xlen(f"{prefix}:{{paid}}:stream") == 1


@pytest.mark.parametrize("words", [[], ["--stream"]], ids=["channel", "stream"])
def test_publish_does_not_call_an_event_lost_when_its_reply_is_lost(
    redis_server: RedisServer, words: list[str]
) -> None:
    def swallow(data: bytes) -> bytes | None:
        return None if data[:1] == b":" or b"-0" in data else data

    proxy = Proxy(redis_server.port, answer=lambda: swallow)

    result = CliRunner().invoke(main, ["--url", proxy.url, "publish", "paid", *words])
    proxy.close()

    assert result.exit_code == 1
    assert re.match(r"Error: It is not known whether \w+-1 was published: Redis", result.output)


@pytest.mark.parametrize(
    ("rights", "words"),
    [
        (["+@all", "-xadd", "~*"], "'+xadd ~eventbus:{paid}:stream'"),
        (["+@all", "~other"], "'+xadd ~eventbus:{paid}:stream'"),
    ],
    ids=["command", "key"],
)
def test_publish_fails_when_redis_refuses_the_stream(
    redis_server: RedisServer, rights: list[str], words: str
) -> None:
    redis_server.client.execute_command("ACL", "SETUSER", "ada", "on", ">pw", *rights)
    url = redis_server.url.replace("127", "ada:pw@127", 1)

    result = CliRunner().invoke(main, ["--url", url, "publish", "--stream", "paid"])

    assert result.exit_code == 1
    assert words in result.output


def test_publish_fails_when_the_stream_key_has_another_type(
    redis_server: RedisServer,
) -> None:
    redis_server.client.set("eventbus:{paid}:stream", "a text")

    result = CliRunner().invoke(main, ["--url", redis_server.url, "publish", "--stream", "paid"])

    assert result.exit_code == 1
    assert "WRONGTYPE Operation against a key" in result.output


def test_publish_into_a_stream_of_a_cluster_fails() -> None:
    words = ["--url", "redis+cluster://127.0.0.1:1", "publish", "--stream", "paid"]

    result = CliRunner().invoke(main, words)

    assert result.exit_code == 1
    assert "does not support streams yet" in result.output


def test_publish_does_nothing_on_a_disabled_bus(
    make_app: Callable[..., Flask],
) -> None:
    result = run_in(make_app(EVENTBUS_ENABLED=False), "publish", "paid")

    assert result.exit_code == 1
    assert result.output == (
        "Error: 'EVENTBUS_ENABLED' is False, so nothing is published. Set it to True to publish.\n"
    )


# -- routes -------------------------------------------------------------------------------


def send_welcome(sender: str, user_id: int, email: str, **extra: Any) -> None:
    """A receiver."""


def note_stock(sender: str, **payload: Any) -> None:
    """Another one."""


def summary(sender: Any, **payload: Any) -> dict[str, Any]:
    """Return an empty payload; routes name this function."""
    return {}


@pytest.fixture
def shop(make_app: Callable[..., Flask]) -> Flask:
    """An app with something in every table."""
    bus = EventBus()
    bus.signal("order_paid")
    bus.publishes(flask.request_finished, as_="api_call", payload=summary)
    bus.on("user_registered", from_="accounts")(send_welcome)
    bus.on("user_registered")(note_stock)
    bus.on("stock_*", echo=True)(note_stock)
    bus.signal("cache_cleared").connect(note_stock)
    routes = {
        "price_changed": {"confirm": True},
        "order_*": {"after_commit": True},
        "refund_*": {"outbox": True},
    }
    return make_app(
        bus, EVENTBUS_PUBLISH=routes, EVENTBUS_SUBSCRIBE={"tax_changed": {"from": ["tax", "law"]}}
    )


def tidy(table: str) -> str:
    """A table without what depends on the name of this module."""
    return re.sub(" {2,}", "  ", table.replace(f"{__name__}.", ""))


def test_routes_shows_published_subscribed_and_local_signals(shop: Flask) -> None:
    result = run_in(shop, "routes")

    assert result.exit_code == 0
    assert tidy(result.output) == tidy(
        """\
Service shop

Publishes      Via      Sent          Confirmed  Signal            Payload from
api_call       channel  at send       no         request-finished  summary
order_*        channel  after commit  no         order_paid        -
price_changed  channel  at send       yes        price_changed     -
refund_*       channel  by outbox     no         none yet          -

Subscribes to    Via   From      Echo  Group  Start
stock_*          both  anyone    yes   shop   new
tax_changed      both  law, tax  no    shop   new
user_registered  both  anyone    no    shop   new

Signal           Receivers     Retries  Timeout
stock_*          note_stock          5        -
tax_changed      none                -        -
user_registered  note_stock          5        -
                 send_welcome        5        -

Local only     Receivers
cache_cleared  note_stock
"""
    )


def test_routes_shows_the_same_as_json(shop: Flask) -> None:
    found = json.loads(run_in(shop, "routes", "--json").output)

    assert found["service"] == "shop"
    assert [route["name"] for route in found["publishes"]] == [
        "api_call",
        "order_*",
        "price_changed",
        "refund_*",
    ]
    assert found["publishes"][0] == {
        "name": "api_call",
        "via": "channel",
        "confirm": False,
        "after_commit": False,
        "outbox": False,
        "signal": "request-finished",
        "payload": f"{__name__}.summary",
        "covers": ["api_call"],
        "stream": None,
    }
    assert found["subscribes"][1] == {
        "name": "tax_changed",
        "via": ["channel", "stream"],
        "from": ["law", "tax"],
        "echo": False,
        "start": "new",
        "group": "shop",
        "receivers": [],
    }
    assert found["subscribes"][2]["receivers"][0] == {
        "name": f"{__name__}.note_stock",
        "retries": 5,
        "timeout": None,
    }
    assert found["local"] == [{"name": "cache_cleared", "receivers": [f"{__name__}.note_stock"]}]


async def ship(sender: str, **payload: Any) -> None:
    """A receiver that can be interrupted."""


@pytest.fixture
def till(make_app: Callable[..., Flask]) -> Flask:
    """An app with everything that can be said of streams."""
    bus = EventBus()
    bus.signal("order_paid")
    bus.on("user_registered", retries=2, timeout=2.5)(ship)
    bus.on("user_registered")(note_stock)
    bus.on("price_changed", via="channel")(note_stock)
    bus.on("stock_changed", group=None, via="stream")(note_stock)
    routes = {
        "order_*": {"via": "stream", "confirm": False},
        "invoice_paid": {"via": "stream", "key": "id", "maxlen": 1_000_000, "replicas": 1},
        "invoice_sent": {"via": "stream", "maxlen": "36h"},
    }
    received = {"user_registered": {"start": "earliest", "via": "stream"}}
    return make_app(bus, EVENTBUS_PUBLISH=routes, EVENTBUS_SUBSCRIBE=received, EVENTBUS_REPLICAS=2)


def test_routes_shows_stream_lengths_and_retries(till: Flask) -> None:
    result = run_in(till, "routes")

    assert tidy(result.output) == tidy(
        """\
Service shop

Publishes     Via     Sent     Confirmed  Signal        Payload from
invoice_paid  stream  at send  yes        invoice_paid  -
invoice_sent  stream  at send  yes        invoice_sent  -
order_*       stream  at send  no         order_paid    -

Stream            Keeps  Replicas  Ordered by
invoice_paid  1,000,000         1  id
invoice_sent        36h         2  -
order_*         100,000         2  -

Subscribes to    Via      From    Echo  Group  Start
price_changed    channel  anyone  no    -      -
stock_changed    stream   anyone  no    none   new
user_registered  stream   anyone  no    shop   earliest

Signal           Receivers   Retries  Timeout
price_changed    note_stock        -        -
stock_changed    note_stock        -        -
user_registered  note_stock        5        -
                 ship              2    2.5 s
"""
    )


def test_routes_shows_streams_as_json_too(till: Flask) -> None:
    found = json.loads(run_in(till, "routes", "--json").output)

    assert [route["stream"] for route in found["publishes"]] == [
        {"maxlen": 1_000_000, "max_age_seconds": None, "key": "id", "replicas": 1},
        {"maxlen": None, "max_age_seconds": 129_600, "key": None, "replicas": 2},
        {"maxlen": 100_000, "max_age_seconds": None, "key": None, "replicas": 2},
    ]
    assert found["subscribes"][1]["group"] is None
    assert found["subscribes"][2] == {
        "name": "user_registered",
        "via": ["stream"],
        "from": None,
        "echo": False,
        "start": "earliest",
        "group": "shop",
        "receivers": [
            {"name": f"{__name__}.note_stock", "retries": 5, "timeout": None},
            {"name": f"{__name__}.ship", "retries": 2, "timeout": 2.5},
        ],
    }


def test_in_a_cluster_routes_shows_only_channels(make_app: Callable[..., Flask]) -> None:
    bus = EventBus()
    bus.on("user_registered")(note_stock)
    app = make_app(bus, EVENTBUS_URL="redis+cluster://127.0.0.1:1")

    result = run_in(app, "routes")

    assert "\nuser_registered  channel  anyone  no    -      -\n" in result.output


def test_routes_fits_a_terminal_of_80_columns(till: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("flask_eventbus.cli.output.sys", terminal)
    bus: Registry = till.extensions["eventbus"].registry
    bus.publishes(flask.request_finished, as_="a_name/that_is_as_long_as_a_line", payload=summary)

    @bus.on("a_name/that_is_as_long_as_a_line", from_=["accounts-in-the-north", "accounts-south"])
    def a_receiver_with_a_name_that_is_long(sender: str, **payload: Any) -> None:
        """A receiver."""

    result = run_in(till, "routes")

    assert max(map(len, result.output.splitlines())) <= 80


def test_routes_without_an_app_shows_which_channels_have_listeners_now(
    redis_server: RedisServer, make_bus: Make
) -> None:
    for service in ("mailer", "mailer", "catalog"):
        bus = make_bus(redis_server.url, service)
        bus.on("price_changed")(note_stock)
        bus.start()
        assert bus.ready(10)

    audit = make_bus(redis_server.url, "audit")
    audit.on("*")(note_stock)
    audit.start()
    assert audit.ready(10)
    client: Any = redis_server.client
    wait_until(lambda: len(client.xinfo_groups("eventbus:{price_changed}:stream")) == 3)

    result = CliRunner().invoke(main, ["--url", redis_server.url, "routes"])
    found = CliRunner().invoke(main, ["--url", redis_server.url, "routes", "--json"])

    assert (
        result.output
        == """\

Channel of     Listeners
price_changed          3

Stream of      Events  Groups
price_changed       0  audit, catalog, mailer

Service  Processes that listen
audit                        1
catalog                      1
mailer                       2
"""
    )
    assert json.loads(found.output) == {
        "channels": {"price_changed": 3},
        "streams": {"price_changed": {"events": 0, "groups": ["audit", "catalog", "mailer"]}},
        "services": {"audit": 1, "catalog": 1, "mailer": 2},
    }


def test_routes_without_an_app_says_when_nobody_listens(redis_server: RedisServer) -> None:
    result = CliRunner().invoke(main, ["--url", redis_server.url, "routes"])

    assert (result.exit_code, result.output) == (
        0,
        "No channel has listeners, and there is no stream.\n",
    )


def test_routes_without_an_app_counts_services_that_read_only_streams(
    redis_server: RedisServer, make_bus: Make
) -> None:
    bus = make_bus(redis_server.url, "mailer")
    bus.on("user_registered", via="stream")(note_stock)
    bus.start()
    assert bus.ready(10)
    redis_server.client.sadd("eventbus:streams", "deleted")

    def shown() -> Any:
        words = ["--url", redis_server.url, "routes", "--json"]
        return json.loads(CliRunner().invoke(main, words).output)

    wait_until(lambda: shown()["services"] == {"mailer": 1})
    assert shown()["streams"] == {
        "deleted": {"events": 0, "groups": []},
        "user_registered": {"events": 0, "groups": ["mailer"]},
    }


def test_routes_without_an_app_leaves_out_a_key_that_is_no_stream(
    redis_server: RedisServer,
) -> None:
    with redis_server.client as client:
        client.sadd("eventbus:streams", "tick", "tock")
        client.xadd("eventbus:{tick}:stream", {"event": "x"})
        client.set("eventbus:{tock}:stream", "text")

    result = CliRunner().invoke(main, ["--url", redis_server.url, "routes", "--json"])

    assert json.loads(result.output)["streams"] == {"tick": {"events": 1, "groups": []}}


def test_routes_without_an_app_shows_what_the_acl_permits(redis_server: RedisServer) -> None:
    rights = ["on", "nopass", "&*", "+@all", "-client|list", "-smembers"]
    redis_server.client.execute_command("ACL", "SETUSER", "default", *rights)

    result = CliRunner().invoke(main, ["--url", redis_server.url, "routes"])

    assert result.exit_code == 0
    assert "Could not list the streams: this user has no right to." in result.output
    assert "this user has no right to CLIENT LIST" in result.output


def test_routes_without_an_app_fails_when_redis_cannot_be_asked(redis_server: RedisServer) -> None:
    away = CliRunner().invoke(main, ["--url", no_server(), "routes"])
    rights = ["on", "nopass", "+@all", "-pubsub"]
    redis_server.client.execute_command("ACL", "SETUSER", "default", *rights)
    refused = CliRunner().invoke(main, ["--url", redis_server.url, "routes"])

    assert (away.exit_code, refused.exit_code) == (1, 1)
    assert "s3cret" not in away.output
    assert "cannot be used" in away.output
    assert "Grant '+pubsub' in the ACL." in refused.output


# -- run ----------------------------------------------------------------------------------

LISTENING_APP = """
import threading
from flask import Flask, current_app
from flask_eventbus import EventBus

bus = EventBus()
both = threading.Barrier(2)

@bus.on("work")
def work(sender, number, **extra):
    if number == 2 or number == 3:
        both.wait(20)
    print(current_app.name, number, flush=True)

def create_app():
    app = Flask("worker")
    app.config.from_prefixed_env()
    bus.init_app(app)
    return app
"""

RECEIVERS = """
def register(bus):
    @bus.on("work")
    def work(sender, **payload):
        print("got", payload, flush=True)
"""


class Process:
    """A command in a process of its own, with what it writes in two files."""

    def __init__(self, folder: Path, *words: str, **environ: str) -> None:
        number = next(_numbers)
        self._out = folder / f"{number}.out"
        self._err = folder / f"{number}.err"
        path = os.pathsep.join([str(ROOT), str(folder)])
        known = {key: value for key, value in os.environ.items() if "EVENTBUS_" not in key}

        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=folder,
                env={**known, "PYTHONPATH": path, **environ},
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return self._err.read_text()

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for its end and return its exit code."""
        return self._process.wait(timeout=30)

    def kill(self) -> None:
        """End it if it still runs."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start ``python -m WORDS`` in a folder of this test's."""
    processes: list[Process] = []

    def begin(*words: str, **environ: str) -> Process:
        processes.append(Process(tmp_path, *words, **environ))
        return processes[-1]

    yield begin

    for process in processes:
        process.kill()


def require_installation() -> None:
    """``flask`` finds the commands by the entry point of an installed package."""
    found = {point.value for point in entry_points(group="flask.commands")}
    require("flask-eventbus to be installed", "flask_eventbus.cli.app:flask_commands" in found)


def start_app(start: Callable[..., Process], folder: Path, url: str, *words: str) -> Process:
    """Start ``flask eventbus WORDS`` with the listening app."""
    require_installation()
    (folder / "worker.py").write_text(LISTENING_APP)
    return start(
        "flask",
        *("--app", "worker", "eventbus", *words),
        FLASK_EVENTBUS_SERVICE="worker",
        FLASK_EVENTBUS_URL=url,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_listens_until_a_signal_and_exits_with_0(
    start: Callable[..., Process],
    tmp_path: Path,
    redis_server: RedisServer,
    number: signal.Signals,
) -> None:
    process = start_app(start, tmp_path, redis_server.url, "run")
    wait_until(lambda: "Listening to work." in process.err, what="it listens")

    publish = CliRunner().invoke(main, ["--url", redis_server.url, "publish", "work", "number=1"])
    wait_until(lambda: process.out == "worker 1\n", what="the receiver ran")
    process.send_signal(number)

    assert publish.output.endswith("1 listener got it.\n")
    assert process.end() == 0
    assert "Traceback" not in process.err


def test_run_limits_concurrent_receivers_to_the_option(
    start: Callable[..., Process], tmp_path: Path, redis_server: RedisServer
) -> None:
    process = start_app(start, tmp_path, redis_server.url, "run", "--concurrency", "2")
    wait_until(lambda: "Listening to work." in process.err, what="it listens")

    for number in ("2", "3"):
        CliRunner().invoke(main, ["--url", redis_server.url, "publish", "work", f"number={number}"])

    wait_until(lambda: len(process.out.splitlines()) == 2, what="both receivers met")
    process.send_signal(signal.SIGTERM)
    assert process.end() == 0


def test_run_starts_without_redis_and_receives_events_once_it_is_up(
    start: Callable[..., Process], tmp_path: Path, redis_server: RedisServer
) -> None:
    redis_server.kill()
    process = start_app(start, tmp_path, redis_server.url, "run")
    wait_until(lambda: "lost Redis" in process.err, what="it says that Redis is away")

    redis_server.start()
    wait_until(lambda: redis_server.client.pubsub_numsub("eventbus:{work}:channel")[0][1])
    CliRunner().invoke(main, ["--url", redis_server.url, "publish", "work", "number=1"])

    wait_until(lambda: process.out == "worker 1\n", what="the receiver ran")
    process.send_signal(signal.SIGTERM)
    assert process.end() == 0


def test_run_without_an_app_loads_the_named_receivers(
    start: Callable[..., Process], tmp_path: Path, redis_server: RedisServer
) -> None:
    (tmp_path / "reactions.py").write_text(RECEIVERS)
    process = start(
        "flask_eventbus",
        *("--url", redis_server.url, "--service", "audit"),
        *("run", "--receivers", "reactions"),
    )
    wait_until(lambda: "Listening to work." in process.err, what="it listens")

    CliRunner().invoke(main, ["--url", redis_server.url, "publish", "work", "number=1"])

    wait_until(lambda: process.out == "got {'number': 1}\n", what="the receiver ran")
    process.send_signal(signal.SIGTERM)
    assert process.end() == 0


def test_run_fails_without_subscriptions(make_app: Callable[..., Flask], bare: Run) -> None:
    in_app = run_in(make_app(), "run")
    switched_off = run_in(make_app(EVENTBUS_ENABLED=False, EVENTBUS_SUBSCRIBE=["work"]), "run")
    nameless = bare("run")
    alone = bare("--service", "audit", "run")

    assert [each.exit_code for each in (in_app, switched_off, nameless, alone)] == [1, 1, 1, 1]
    assert in_app.output.startswith("Error: There is nothing to listen to. Connect a receiver")
    assert "'EVENTBUS_ENABLED' is False, so no event would be received." in switched_off.output
    assert nameless.output.startswith("Error: 'EVENTBUS_SERVICE' is not set.")
    assert alone.output == in_app.output


# -- both faces ---------------------------------------------------------------------------


def test_the_flask_command_finds_the_commands_and_shows_them(
    start: Callable[..., Process],
) -> None:
    require_installation()

    process = start("flask", "eventbus", "--help")

    assert process.end() == 0, process.err
    for command in COMMANDS:
        assert command.name is not None
        assert f"\n  {command.name} " in process.out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_documents_its_options_its_exit_codes_and_has_examples(
    bare: Run, command: Any
) -> None:
    help_text = bare(command.name, "--help").output

    assert "Examples:\n\n    flask" in help_text
    assert "Exit codes: 0" in help_text
    assert all(option.help for option in command.params if option.param_type_name == "option")
    assert max(map(len, help_text.splitlines())) <= 80


@pytest.mark.parametrize(
    "words", [["publish", "noted"], ["routes"], ["check"], ["tail", "--seconds", "0.1"], ["run"]]
)
def test_no_command_without_an_app_loads_flask(
    shared_redis: RedisServer, words: list[str], tmp_path: Path
) -> None:
    program = f"""
import runpy, sys
sys.argv[1:] = {["--url", shared_redis.url, *words]!r}
try:
    runpy.run_module("flask_eventbus", run_name="__main__")
except SystemExit:
    print("loaded", *sorted(sys.modules))
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    loaded = outcome.stdout.partition("loaded")[2].split()
    assert "flask_eventbus.cli.app" in loaded
    assert {name.partition(".")[0] for name in loaded}.isdisjoint({"flask", "werkzeug"})


def test_settings_come_from_the_environment_too(shared_redis: RedisServer, prefix: str) -> None:
    environ = {
        "EVENTBUS_URL": shared_redis.url,
        "EVENTBUS_PREFIX": prefix,
        "EVENTBUS_MAX_EVENT_BYTES": "4096",
    }

    fits = CliRunner().invoke(main, ["publish", "noted"], env=environ)
    too_large = CliRunner().invoke(main, ["publish", "noted", f"text={'x' * 4096}"], env=environ)

    assert fits.exit_code == 0, fits.output
    assert too_large.exit_code == 1
    assert "EVENTBUS_MAX_EVENT_BYTES" in too_large.output


def test_commands_about_the_server_do_not_load_the_app(
    shared_redis: RedisServer, prefix: str
) -> None:
    environ = {
        "EVENTBUS_URL": shared_redis.url,
        "EVENTBUS_PREFIX": prefix,
        "EVENTBUS_PUBLISH": '{"noted": {"signal": "no_such_module:signal"}}',
    }

    for words in (["publish", "noted"], ["routes"], ["check"]):
        assert CliRunner().invoke(main, words, env=environ).exit_code == 0


@pytest.mark.parametrize("words", [["tail"], ["publish", "noted"], ["routes"], ["run"]])
def test_an_invalid_setting_is_one_line_and_not_a_traceback(words: list[str]) -> None:
    def create_app() -> Flask:
        app = Flask("shop")
        app.config["EVENTBUS_SERVICE"] = "a shop"
        EventBus(app)
        return app

    info = ScriptInfo(create_app=create_app)

    result = CliRunner().invoke(flask_commands, words, obj=info)

    assert result.exit_code == 1
    assert result.output.startswith("Error: 'EVENTBUS_SERVICE' is 'a shop'.")


def test_the_error_for_an_app_without_a_bus_names_the_remedy() -> None:
    result = run_in(Flask("shop"), "routes")

    assert result.exit_code == 1
    assert result.output == (
        "Error: The app 'shop' has no event bus. Call bus.init_app(app) where the app is created.\n"
    )


@pytest.mark.parametrize(
    "words", [["tail", "--seconds", "1"], ["publish", "work"], ["routes"], ["check"]]
)
def test_an_inspecting_command_does_not_listen_as_the_service(
    make_app: Callable[..., Flask], words: list[str]
) -> None:
    bus = EventBus()
    bus.on("work")(note_stock)
    app = make_app(bus)

    result = run_in(app, *words)

    assert result.exit_code == 0, result.output
    health = bus.health(app)
    assert (health.listening, health.connected, health.last_heard) == (False, False, None)
    assert health.counts == {}


def unwrapped(text: str) -> str:
    """Text that click has wrapped at 80 columns, without the wraps."""
    return " ".join(text.split())


# -- the page -----------------------------------------------------------------------------

PAGES = ("commands", "check", "status", "stream-commands")
PAGE = "\n".join((ROOT / "docs" / f"{name}.md").read_text() for name in PAGES)

#: The commands that go on, or need more than a Redis.
ENDLESS = {"tail", "run", "relay"}

#: What differs from run to run: ids and versions.
_VARIES = re.compile(r"\b[0-9a-f]{12}-1\b|(?<=It is )(Redis|Valkey) [\d.]+")


def examples() -> Iterator[tuple[list[str], str]]:
    """The commands of the page, as words, and what it says they print."""
    for text in re.findall(r"^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        for example in text.removeprefix("$ ").split("\n$ "):
            line, _, output = example.partition("\n")
            yield shlex.split(line.partition(" | ")[0]), output


@pytest.fixture
def page_app(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ScriptInfo]:
    """The app of the page, with the test's server in the place of its own."""
    text = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "shop.py").write_text(text.replace("localhost:6379", url_host(redis_server)))
    monkeypatch.chdir(tmp_path)
    yield ScriptInfo(app_import_path="shop")
    sys.modules.pop("shop", None)


def url_host(server: RedisServer) -> str:
    """``host:port`` of a server."""
    return server.url.removeprefix("redis://").removesuffix("/0")


@pytest.mark.parametrize(
    ("words", "output"),
    [(words, output) for words, output in examples() if not ENDLESS & {*words}],
    ids=lambda value: value if isinstance(value, str) else "_".join(value[-3:]),
)
def test_the_examples_on_the_page_print_the_documented_output(
    page_app: ScriptInfo, redis_server: RedisServer, words: list[str], output: str
) -> None:
    environ = {"EVENTBUS_URL": redis_server.url}
    here = [word.replace("localhost:6379", url_host(redis_server)) for word in words]

    if here[0] == "flask":
        result = CliRunner().invoke(flask_commands, here[4:], obj=page_app)
    else:
        result = CliRunner().invoke(main, here[3:], env=environ)

    found = result.output.replace(url_host(redis_server), "localhost:6379")
    assert result.exit_code == 0, result.output
    assert _VARIES.sub("", found).rstrip() == _VARIES.sub("", output).rstrip()


@pytest.mark.parametrize(
    "words", [words for words, _ in examples() if ENDLESS & {*words}], ids=" ".join
)
def test_the_long_running_examples_of_the_page_are_well_formed(words: list[str]) -> None:
    group: Any = flask_commands if words[0] == "flask" else main
    place = next(place for place, word in enumerate(words) if word in ENDLESS)
    name, *rest = words[place:]

    with click.Context(group) as parent:
        context = group.get_command(parent, name).make_context(name, rest, parent=parent)

    assert context.params


def test_the_page_has_every_command_and_every_option() -> None:
    for command in COMMANDS:
        page = PAGE.partition(f"\n## {command.name}\n")[2].partition("\n## ")[0]
        assert "\n| Exit code | When |\n" in page

        for option in command.params:
            if option.param_type_name == "option":
                assert f"`{option.opts[0]}" in page, option.opts


@pytest.mark.parametrize("words", [["--version"], ["-h"]], ids=" ".join)
def test_the_command_eventbus_is_installed_with_the_package(words: list[str]) -> None:
    (script,) = entry_points(group="console_scripts", name="eventbus")

    result = CliRunner().invoke(script.load(), words, prog_name="eventbus")

    assert result.exit_code == 0
    start = f"flask-eventbus {__version__}" if words == ["--version"] else "Usage: eventbus"
    assert result.output.startswith(start)


def test_flask_eventbus_accepts_h_for_help() -> None:
    assert CliRunner().invoke(flask_commands, ["-h"]).output.startswith("Usage: ")
