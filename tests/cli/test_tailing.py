"""``tail``: a spectator of live events that outlives Redis and shows whatever is on the wire."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner
from proxies import Proxy
from servers import RedisServer, free_port
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, ConfigError, Event
from flask_eventbus.__main__ import main
from flask_eventbus.admin.tail import Filter, Tail, TailEvent
from flask_eventbus.cli.output import as_json, as_line
from flask_eventbus.codec.codec import Codec
from flask_eventbus.config import TIMING, Timing

pytestmark = pytest.mark.second_look("kills and restarts Redis servers below a running command")

ROOT = Path(__file__).parents[2]

_numbers = itertools.count()


class Watching:
    """``python -m flask_eventbus tail`` in a process of its own."""

    def __init__(self, folder: Path, url: str, *words: str) -> None:
        number = next(_numbers)
        self._out = folder / f"{number}.out"
        self._err = folder / f"{number}.err"
        environ = {key: value for key, value in os.environ.items() if "EVENTBUS_" not in key}

        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flask_eventbus", "--url", url, "tail", *words],
                cwd=folder,
                env={**environ, "PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=err,
            )

    @property
    def lines(self) -> list[str]:
        """Return the lines of its output so far."""
        return self._out.read_text().splitlines()

    @property
    def output(self) -> list[str]:
        """Return its standard error so far."""
        return self._err.read_text().splitlines()

    def wait_until_listening(self) -> None:
        """Wait until Redis has confirmed its subscriptions."""
        wait_until(
            lambda: any(line.startswith("Listening to ") for line in self.output), what="it listens"
        )

    def end(self, number: signal.Signals | None = None) -> int:
        """Send it a signal, wait for its end and return its exit code."""
        if number is not None:
            self.process.send_signal(number)

        return self.process.wait(timeout=30)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watching]]:
    """Start a tail, and end it with the test."""
    started: list[Watching] = []

    def begin(url: str, *words: str) -> Watching:
        started.append(Watching(tmp_path, url, *words))
        return started[-1]

    yield begin

    for watching in started:
        watching.process.kill()
        watching.process.wait()


@pytest.fixture
def store(redis_server: RedisServer) -> StreamStore:
    """Streams of a prefix of their own."""
    return StreamStore(redis_server)


def publish(url: str, name: str, *pairs: str, service: str = "accounts") -> str:
    """Publish an event and return its id."""
    words = ["--url", url, "--service", service, "publish", name, *pairs]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.output.split()[1].rstrip(".")


def an_event(**changes: Any) -> Event:
    """An event with some attributes of its own."""
    attributes: dict[str, Any] = {
        "name": "user_registered",
        "source": "accounts",
        "id": "3f2a-17",
        "time": datetime(2026, 3, 1, 12, 30, 1, 123456, tzinfo=UTC),
        "payload": {},
    }
    return Event(**{**attributes, **changes})


# -- as a process -------------------------------------------------------------------------


def test_tail_shows_each_event_of_the_prefix_in_one_line(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    watching = watch(redis_server.url)
    watching.wait_until_listening()

    first = publish(redis_server.url, "user_registered", "user_id=7", "email=ada@example.com")
    second = publish(redis_server.url, "price_changed", service="catalog")

    wait_until(lambda: len(watching.lines) == 2)
    assert watching.lines[0].split()[1:] == [
        *("channel", "user_registered", "accounts", first),
        *("user_id=7", "email=ada@example.com"),
    ]
    assert watching.lines[1].split()[1:] == ["channel", "price_changed", "catalog", second]


def test_tail_as_json_shows_the_whole_event(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    watching = watch(redis_server.url, "--json", "--count", "1")
    watching.wait_until_listening()

    event_id = publish(redis_server.url, "user_registered", "user_id=7")

    assert watching.end() == 0
    shown = json.loads(watching.lines[0])
    assert datetime.fromisoformat(shown.pop("time")).tzinfo is not None
    assert shown == {
        "specversion": "1.0",
        "id": event_id,
        "source": "accounts",
        "type": "user_registered",
        "data": {"user_id": 7},
        "seq": 1,
        "via": "channel",
    }


def test_tail_filters_by_name_and_value_and_ends_after_a_count(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    words = ["order_*", "order_paid", "--source", "shop", "--match", "total=9.5", "--count", "2"]
    watching = watch(redis_server.url, *words)
    watching.wait_until_listening()

    publish(redis_server.url, "refund_paid", "total=9.5", service="shop")
    publish(redis_server.url, "order_paid", "total=9.5", service="till")
    publish(redis_server.url, "order_paid", "total=9", service="shop")
    first = publish(redis_server.url, "order_paid", "total=9.5", service="shop")
    second = publish(redis_server.url, "order_sent", "total=9.5", service="shop")

    assert watching.end() == 0
    assert [line.split()[4] for line in watching.lines] == [first, second]


def test_tail_survives_a_restart_of_redis_and_says_so(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    watching = watch(redis_server.url, "user_registered")
    watching.wait_until_listening()

    redis_server.restart()
    wait_until(lambda: "Redis is back after" in watching.output[-1], what="it is back")
    publish(redis_server.url, "user_registered", "user_id=8")

    wait_until(lambda: watching.lines)
    assert watching.lines[0].endswith("user_id=8")
    assert [" ".join(line.split()[:2]) for line in watching.output] == [
        "Listening to",
        "Redis at",
        "Redis is",
    ]


def test_tail_waits_for_redis_to_start(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    redis_server.kill()
    watching = watch(redis_server.url)
    wait_until(lambda: watching.output, what="it says that Redis is away")

    redis_server.start()
    watching.wait_until_listening()

    assert "is away: " in watching.output[0]
    assert watching.output[1] == f"Listening to * on {redis_server.url}. Press Ctrl-C to stop."


def test_tail_shows_undecodable_bytes_as_one_line_on_stderr(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    watching = watch(redis_server.url)
    watching.wait_until_listening()
    stranger = Codec().encode(an_event(name="other"))

    redis_server.client.publish("eventbus:{noted}:channel", b"\x1b[31mhello")
    redis_server.client.publish("eventbus:{noted}:channel", stranger)
    publish(redis_server.url, "noted")

    wait_until(lambda: watching.lines)
    assert len(watching.output) == 3
    assert watching.output[1].startswith("Not an event on the channel of 'noted' (not_msgpack): ")
    assert watching.output[1].endswith(r"It begins with b'\x1b[31mhello'.")
    assert "(wrong_channel): The event is of signal 'other'." in watching.output[2]


def test_tail_ends_quietly_on_ctrl_c(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    watching = watch(redis_server.url)
    watching.wait_until_listening()

    assert watching.end(signal.SIGINT) == 0
    assert watching.output == [f"Listening to * on {redis_server.url}. Press Ctrl-C to stop."]


def test_tail_ends_quietly_when_its_pipe_is_closed(
    redis_server: RedisServer,
) -> None:
    command = [sys.executable, "-m", "flask_eventbus", "--url", redis_server.url, "tail"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Listening to ")
        process.stdout.close()

        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""


def test_tail_exits_with_1_if_the_count_was_not_reached(redis_server: RedisServer) -> None:
    def tail(url: str, *words: str) -> int:
        return CliRunner().invoke(main, ["--url", url, "tail", "--seconds", "1", *words]).exit_code

    assert tail(redis_server.url) == 0
    assert tail(redis_server.url, "--count", "1") == 1
    assert tail(f"redis://127.0.0.1:{free_port()}/0") == 1


def test_tail_does_not_count_as_a_listener(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    watch(redis_server.url).wait_until_listening()

    result = CliRunner().invoke(main, ["--url", redis_server.url, "routes", "--json"])

    names = {client["name"] for client in redis_server.client.client_list(_type="pubsub")}
    assert names == {"eventbus-tail"}
    assert json.loads(result.output)["services"] == {}


def test_tail_ends_with_a_clear_error_where_redis_refuses(redis_server: RedisServer) -> None:
    admin = redis_server.client
    rights = ["on", ">pw", "+@all", "&eventbus:{noted}:channel"]
    admin.execute_command("ACL", "SETUSER", "ada", *rights)

    def tail(user: str, *words: str) -> Any:
        url = redis_server.url.replace("127", f"{user}@127", 1)
        return CliRunner().invoke(main, ["--url", url, "tail", "--seconds", "1", *words])

    allowed = tail("ada:pw", "noted")
    refused = tail("ada:pw")
    unknown = tail("ada:wrong-s3cret")

    assert (allowed.exit_code, refused.exit_code, unknown.exit_code) == (0, 1, 1)
    assert "Error: The Redis user cannot listen to '*': " in refused.output
    assert (
        "Grant the user in the ACL: '+psubscribe &eventbus:{*}:channel'. Or name" in refused.output
    )
    assert "does not let this user in" in unknown.output
    assert "s3cret" not in unknown.output


@pytest.mark.parametrize(
    "words", [["a name"], ["--count", "0"], ["--seconds", "0"], ["--match", "user_id"], ["--jsn"]]
)
def test_a_usage_error_of_tail_exits_with_2(words: list[str]) -> None:
    result = CliRunner().invoke(main, ["tail", *words])

    assert result.exit_code == 2
    assert result.output.startswith("Usage: ")


# -- in this process ----------------------------------------------------------------------


def test_tail_detects_a_server_that_hangs(redis_server: RedisServer) -> None:
    reported: list[str] = []
    tail = Tail(
        url=redis_server.url,
        prefix="eventbus",
        codec=Codec(),
        names=["*"],
        notify=reported.append,
        timing=Timing(ping_after=0.1, ping_timeout=0.1),
    )
    batches = tail.events(seconds=60)
    wait_until(lambda: next(batches) == [] and tail.connected)

    redis_server.hang()
    wait_until(lambda: next(batches) == [] and "no answer to a PING" in reported[-1])
    redis_server.resume()
    wait_until(lambda: next(batches) == [] and "Redis is back" in reported[-1])

    batches.close()  # type: ignore[attr-defined]  # a generator


def test_values_of_a_registered_type_are_shown_if_the_type_is_known(
    redis_server: RedisServer, make_bus: Callable[..., Bus]
) -> None:
    reported: list[str] = []
    bus = make_bus(redis_server.url)
    bus.register_type(
        40,
        complex,
        pack=lambda value: str(value).encode(),
        unpack=lambda raw: complex(raw.decode()),
    )

    def tail(codec: Codec) -> Tail:
        return Tail(
            url=redis_server.url,
            prefix="eventbus",
            codec=codec,
            names=["*"],
            notify=reported.append,
        )

    knowing, strange = tail(bus.codec), tail(Codec())
    received, unheard = knowing.events(60), strange.events(60)
    wait_until(lambda: not next(received) and not next(unheard) and len(reported) == 2)
    bus.node.publish("measured", {"value": 1j})

    events = wait_until(lambda: next(received))
    wait_until(lambda: not next(unheard) and len(reported) == 3)

    assert as_line(events[0].event).endswith("value=1j")
    assert "ext type" in reported[2]


@pytest.mark.parametrize(
    ("sources", "values", "accepted"),
    [
        ((), (), True),
        (("accounts",), (), True),
        (("billing", "accounts"), (), True),
        (("billing",), (), False),
        ((), (("user_id", "7"),), True),
        ((), (("user_id", "8"),), False),
        ((), (("code", "7"),), True),
        ((), (("code", "07"),), False),
        ((), (("price", "9.50"),), True),
        ((), (("price", "9.5"),), True),
        ((), (("price", "9.4"),), False),
        ((), (("tags", '["a", "b"]'),), True),
        ((), (("note", "null"),), True),
        ((), (("missing", "null"),), False),
        ((), (("user_id", "7"), ("code", "8")), False),
        (("accounts",), (("user_id", "7"),), True),
    ],
)
def test_a_filter_takes_sources_and_all_values(
    sources: tuple[str, ...], values: tuple[tuple[str, str], ...], accepted: bool
) -> None:
    payload = {
        "user_id": 7,
        "code": "7",
        "price": Decimal("9.50"),
        "tags": ["a", "b"],
        "note": None,
    }

    assert Filter(sources=sources, values=values).accepts(an_event(payload=payload)) is accepted


def test_a_line_shows_values_in_command_line_syntax() -> None:
    payload = {
        "id": 7,
        "code": "7",
        "email": "ada@example.com",
        "name": "Ada Lovelace",
        "city": "Zürich",
        "vip": True,
        "note": None,
        "empty": "",
        "tags": ["a", 1],
        "day": date(2026, 3, 1),
        "price": Decimal("9.50"),
    }

    line = as_line(an_event(payload=payload))

    assert line.endswith(
        'user_registered accounts 3f2a-17 id=7 code="7" email=ada@example.com '
        'name="Ada Lovelace" city=Zürich vip=true note=null empty="" tags=["a", 1] '
        'day=2026-03-01 price="9.50"'
    )


def test_a_line_abbreviates_long_payloads() -> None:
    payload = {f"key{number}": "x" * 1_000 for number in range(100)}

    line = as_line(an_event(payload=payload))

    assert len(line) < 300
    assert line.endswith("...")
    assert f"key0={'x' * 57}... key1=" in line


def test_a_payload_cannot_send_escape_sequences_to_the_terminal() -> None:
    nasty = "\x1b[2J\r\n\x9b31m\u202egpj.exe\u2028\x00"
    payload = {"text": nasty, nasty: [nasty, {nasty: nasty}], "bytes": nasty.encode()}
    event = an_event(payload=payload)

    assert as_line(event).isprintable()
    assert as_json(event).isprintable()
    assert json.loads(as_json(event))["data"]["text"] == nasty


def test_a_time_that_cannot_be_localized_is_shown_as_it_is() -> None:
    assert " user_registered " in as_line(an_event(time=datetime.max.replace(tzinfo=UTC)))
    assert " user_registered " in as_line(an_event(time=datetime.min.replace(tzinfo=UTC)))


def test_values_that_json_lacks_are_text_and_bytes_are_base64() -> None:
    payload = {
        "at": datetime(2026, 3, 1, tzinfo=UTC),
        "for": timedelta(minutes=5),
        "price": Decimal("9.50"),
        "uuid": UUID(int=1),
        "raw": b"\x00\xff",
        "set": {2, 1},
        "nan": float("nan"),
        "huge": 2**80,
    }
    event = an_event(
        payload=payload, correlation_id="aa-1", causation_id="bb-2", hops=2, traceparent="00-1"
    )

    shown = json.loads(as_json(event))

    assert shown["data"] == {
        "at": "2026-03-01T00:00:00+00:00",
        "for": "0:05:00",
        "price": "9.50",
        "uuid": "00000000-0000-0000-0000-000000000001",
        "raw": "AP8=",
        "set": [1, 2],
        "nan": "nan",
        "huge": 2**80,
    }
    assert shown["time"] == "2026-03-01T12:30:01.123456Z"
    assert (shown["correlationid"], shown["causationid"], shown["hops"]) == ("aa-1", "bb-2", 2)
    assert "seq" not in shown


def test_tail_refuses_an_invalid_url() -> None:
    with pytest.raises(ConfigError, match="EVENTBUS_URL"):
        Tail(url="redis://x:port/", prefix="p", codec=Codec(), names=["*"], notify=print)


# -- streams ------------------------------------------------------------------------------


class Seen:
    """A tail in a thread of its own: what it showed, and what it said."""

    def __init__(
        self, url: str, *names: str, prefix: str = "eventbus", timing: Timing = TIMING
    ) -> None:
        self.reported: list[str] = []
        self.received: list[TailEvent] = []
        self.tail = Tail(
            url=url,
            prefix=prefix,
            codec=Codec(),
            names=names or ["*"],
            notify=self.reported.append,
            timing=timing,
        )
        self._batches = self.tail.events(60)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Listen until something is so."""

        def listen() -> Any:
            self.received += next(self._batches)
            return condition()

        return wait_until(listen, timeout=20)

    def until_listening(self) -> Seen:
        """Listen until it says that it hears."""
        self.until(lambda: self.reported and self.reported[-1].startswith("Listening to "))
        return self

    @property
    def entries(self) -> list[str | None]:
        """The entries of what it showed."""
        return [received.entry for received in self.received]

    def close(self) -> None:
        """End it."""
        self._batches.close()  # type: ignore[attr-defined]  # a generator


@pytest.fixture
def see() -> Iterator[Callable[..., Seen]]:
    """Make tails that end with the test."""
    made: list[Seen] = []

    def begin(url: str, *names: str, **options: Any) -> Seen:
        made.append(Seen(url, *names, **options))
        return made[-1]

    yield begin

    for seen in made:
        seen.close()


def test_tail_shows_stream_and_channel_events_and_which_is_which(
    watch: Callable[..., Watching], redis_server: RedisServer
) -> None:
    lines = watch(redis_server.url, "--match", "user_id=7", "--source", "accounts")
    objects = watch(redis_server.url, "--json", "--count", "2", "--match", "user_id=7")
    lines.wait_until_listening()
    objects.wait_until_listening()

    publish(redis_server.url, "user_registered", "user_id=8", "--stream")
    publish(redis_server.url, "user_registered", "user_id=7", "--stream")
    wait_until(lambda: lines.lines and objects.lines)
    publish(redis_server.url, "user_registered", "user_id=7")

    assert objects.end() == 0
    wait_until(lambda: len(lines.lines) == 2)
    assert [line.split()[1] for line in lines.lines] == ["stream", "channel"]
    by_stream, by_channel = (json.loads(line) for line in objects.lines)
    client: Any = redis_server.client
    [_, (entry, _)] = client.xrange("eventbus:{user_registered}:stream")
    assert (by_stream["via"], by_stream["entry"]) == ("stream", entry.decode())
    assert by_channel["via"] == "channel"
    assert "entry" not in by_channel


def test_tail_shows_new_events_and_not_earlier_ones_of_a_stream(
    see: Callable[..., Seen], store: StreamStore
) -> None:
    store.add("user_registered", user_id=1)
    seen = see(store.url, prefix=store.prefix).until_listening()

    entry, _ = store.add("user_registered", user_id=2)

    seen.until(lambda: seen.received)
    assert seen.entries == [entry]


@pytest.mark.parametrize("name", ["*", "order_?aid", "order_paid"])
def test_tail_shows_the_first_event_of_a_stream_that_appears_later(
    see: Callable[..., Seen], store: StreamStore, name: str
) -> None:
    seen = see(store.url, name, prefix=store.prefix).until_listening()

    store.add("refund_sent" if name != "*" else "order_paid")
    entries = [store.add("order_paid")[0] for _ in range(2)]

    seen.until(lambda: len(seen.received) >= 2)
    assert [received.entry for received in seen.received if received.event.name == "order_paid"][
        -2:
    ] == entries
    assert {received.event.name for received in seen.received} == {"order_paid"}


def test_a_stream_registered_late_is_not_shown_from_its_beginning(
    see: Callable[..., Seen], store: StreamStore
) -> None:
    store.add("order_paid")
    store.client.delete(store.keys.names)
    seen = see(store.url, prefix=store.prefix).until_listening()
    seen.until(lambda: True)

    entry, _ = store.add("order_paid")

    seen.until(lambda: seen.received)
    assert seen.entries == [entry]


def test_after_a_lost_connection_tail_continues_streams_without_a_gap(
    see: Callable[..., Seen], store: StreamStore, redis_server: RedisServer
) -> None:
    proxy = Proxy(redis_server.port)
    seen = see(proxy.url, prefix=store.prefix).until_listening()
    first, _ = store.add("user_registered")
    seen.until(lambda: seen.received)

    proxy.request = lambda: lambda data: None
    proxy.cut()
    seen.until(lambda: "is away" in seen.reported[-1])
    missed = [store.add("user_registered")[0], store.add("order_paid")[0]]
    proxy.request = lambda: lambda data: data
    seen.until(lambda: "Redis is back" in seen.reported[-1])
    last, _ = store.add("user_registered")
    seen.until(lambda: len(seen.received) == 4)
    proxy.close()

    assert sorted(filter(None, seen.entries)) == [first, *missed, last]
    assert len(seen.reported) == 3
    assert seen.reported[-1].endswith(
        " s. Channel events sent in that time are missed; streams continue where they stopped."
    )


def test_a_redis_that_comes_back_empty_is_read_from_its_beginning(
    see: Callable[..., Seen], store: StreamStore, redis_server: RedisServer
) -> None:
    store.add("user_registered", id="9999999999999-0")
    seen = see(store.url, prefix=store.prefix).until_listening()

    redis_server.restart()
    seen.until(lambda: "Redis is back" in seen.reported[-1])
    entry, _ = store.add("user_registered")

    seen.until(lambda: seen.received)
    assert seen.entries == [entry]


def test_undecodable_entries_are_reported_and_the_rest_is_shown(
    see: Callable[..., Seen], store: StreamStore
) -> None:
    seen = see(store.url, prefix=store.prefix).until_listening()

    first = store.add_fields("noted", {b"event": b"\x1b[31mhello"})
    second = store.add_fields("noted", {b"colour": b"red"})
    third = store.add_fields("noted", {b"event": Codec().encode(store.event("other"))})
    entry, _ = store.add("noted")
    seen.until(lambda: seen.received)

    assert seen.entries == [entry]
    where = "Not an event in the stream of 'noted', entry"
    assert seen.reported[1].startswith(f"{where} {first} (not_msgpack): ")
    assert seen.reported[1].endswith(r"It begins with b'\x1b[31mhello'.")
    assert seen.reported[2] == (
        f"{where} {second} (missing_attribute): "
        "It has no field 'event'; its fields are [b'colour']."
    )
    assert seen.reported[3].startswith(
        f"{where} {third} (wrong_channel): The event is of signal 'other'."
    )


def test_tail_leaves_nothing_behind_in_redis(see: Callable[..., Seen], store: StreamStore) -> None:
    store.add("user_registered")
    before = sorted(store.client.keys())
    seen = see(store.url, prefix=store.prefix).until_listening()
    store.add("user_registered")
    seen.until(lambda: seen.received)

    assert sorted(store.client.keys()) == before
    assert store.client.xinfo_groups(store.keys.stream("user_registered")) == []


def test_tail_shows_the_permitted_transport_of_a_signal_and_reports_the_refused_one(
    see: Callable[..., Seen], redis_server: RedisServer
) -> None:
    def url(*rights: str) -> str:
        rules = ["reset", "on", ">pw", *rights]
        redis_server.client.execute_command("ACL", "SETUSER", "ada", *rules)
        return redis_server.url.replace("127", "ada:pw@127", 1)

    by_stream = see(url("+@all", "~eventbus:{noted}:stream"), "noted").until_listening()
    publish(redis_server.url, "noted", "--stream")
    by_stream.until(lambda: by_stream.received)
    by_stream.close()
    by_channel = see(url("+@all", "&eventbus:{noted}:channel"), "noted").until_listening()
    publish(redis_server.url, "noted")
    by_channel.until(lambda: by_channel.received)

    assert "The Redis user cannot listen to 'noted': " in by_stream.reported[0]
    assert "'+subscribe &eventbus:{noted}:channel'" in by_stream.reported[0]
    assert "The Redis user cannot read the stream of 'noted': " in by_channel.reported[0]
    assert by_channel.reported[0].endswith(
        "Grant the user in the ACL: '+xread +xrevrange ~eventbus:{noted}:stream'."
    )


def test_tail_reports_that_it_may_not_list_the_streams(
    see: Callable[..., Seen], redis_server: RedisServer
) -> None:
    rules = ["on", ">pw", "+@all", "-smembers", "allkeys", "allchannels"]
    redis_server.client.execute_command("ACL", "SETUSER", "ada", *rules)

    seen = see(redis_server.url.replace("127", "ada:pw@127", 1)).until_listening()

    assert seen.reported[0].startswith("The Redis user cannot list the streams for '*': ")
    assert "'+smembers ~eventbus:streams'" in seen.reported[0]


def test_a_refused_stream_is_reported_once_and_retried(
    see: Callable[..., Seen], store: StreamStore
) -> None:
    key = store.keys.stream("noted")
    store.client.sadd(store.keys.names, "noted", "bad name\x1b", "fine")
    store.client.set(key, "something else")
    timing = Timing(ask_stream_again_after=0.0)
    seen = see(store.url, prefix=store.prefix, timing=timing).until_listening()
    first, _ = store.add("fine")
    seen.until(lambda: seen.received)

    store.client.delete(key)
    seen.until(lambda: store.add("noted") and len(seen.received) > 1)

    assert sorted(seen.reported) == [
        f"'{store.keys.names}' has a name that is not valid for a signal. Skipping it: "
        "'bad name\\x1b'.",
        f"Listening to * on {store.url}. Press Ctrl-C to stop.",
        "The Redis user cannot read the stream of 'noted': WRONGTYPE Operation "
        f"against a key holding the wrong kind of value. Another program stores a different "
        f"type under {key!r}. Delete the key, or set 'EVENTBUS_PREFIX' to another prefix.",
    ]
    assert seen.entries[0] == first


def test_in_a_cluster_tail_shows_only_channels(
    see: Callable[..., Seen], redis_server: RedisServer
) -> None:
    seen = see(redis_server.url.replace("redis://", "redis+cluster://")).until_listening()
    publish(redis_server.url, "noted", "--stream")
    publish(redis_server.url, "noted")

    seen.until(lambda: seen.received)
    assert [received.event.via for received in seen.received] == ["channel"]
