"""`replay`: past events reach the receivers again, and the group knows nothing of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Flask, current_app
from programs import Program
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, EventBus, current_event
from flask_eventbus.cli.app import flask_commands
from flask_eventbus.codec.codec import Codec


@pytest.fixture
def store(shared_redis: RedisServer) -> StreamStore:
    """Streams of this test alone."""
    return StreamStore(shared_redis)


Make = Callable[..., Flask]


@pytest.fixture
def make_app(store: StreamStore) -> Make:
    """Make the app of a bus."""

    def make(bus: EventBus, **settings: Any) -> Flask:
        app = Flask("mailer")
        app.config.update(
            EVENTBUS_SERVICE="mailer", EVENTBUS_URL=store.url, EVENTBUS_PREFIX=store.prefix
        )
        app.config.update(settings)
        bus.init_app(app)
        return app

    return make


def replay(app: Flask, *words: str) -> Result:
    """Run ``flask eventbus replay paid WORDS``."""
    return app.test_cli_runner().invoke(flask_commands, ["replay", "paid", *words])


ALL = ("--from", "earliest")


class RecordingBus:
    """A bus with two receivers of 'paid', and what they received."""

    def __init__(self) -> None:
        self.bus = EventBus()
        self.bills: list[int] = []
        self.counts: list[int] = []
        self.events: list[tuple[bool, str, str, str]] = []
        #: What the first one fails at.
        self.bad: set[int] = set()
        self.bus.on("paid")(self.bill)
        self.bus.on("paid")(self.count)

    def bill(self, sender: str, number: int, **extra: Any) -> None:
        """A receiver that may fail."""
        event = current_event
        self.events.append((event.replayed, event.via, event.id, current_app.name))

        if number in self.bad:
            raise OSError(f"no paper for {number} \x1b[2J")

        self.bills.append(number)

    def count(self, sender: str, number: int, **extra: Any) -> None:
        """A receiver that does not."""
        self.counts.append(number)


@pytest.fixture
def received() -> RecordingBus:
    """Return the events of two receivers."""
    return RecordingBus()


def test_replay_runs_every_receiver_for_every_event_in_order(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    events = [store.add("paid", number=number)[1] for number in range(250)]

    result = replay(make_app(received.bus), *ALL)

    assert result.exit_code == 0, result.output
    assert result.output == "Read 250 events of 'paid': 250 handled.\n"
    assert received.bills == received.counts == list(range(250))
    assert received.events == [(True, "stream", event.id, "mailer") for event in events]
    assert not current_event


def test_replay_does_not_change_the_group(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    for number in range(5):
        store.add("paid", number=number)

    store.group("paid")
    store.read("paid", 3)
    store.give_up("paid")
    store.client.sadd(store.keys.seen("paid", "mailer", 7), "an-id")

    def state() -> list[Any]:
        key = store.keys.stream("paid")
        (group,) = store.client.xinfo_groups(key)
        return [
            group,
            store.client.xpending_range(key, "mailer", "-", "+", 10)[0]["times_delivered"],
            sorted(store.client.keys(f"{store.prefix}:*")),
            store.client.smembers(store.keys.seen("paid", "mailer", 7)),
            store.client.xlen(key),
            store.dead("paid"),
        ]

    before = state()
    received.bad = {1}
    result = replay(make_app(received.bus), *ALL)

    assert result.exit_code == 1
    assert received.counts == [0, 1, 2, 3, 4]
    assert state() == before


def test_replay_runs_the_events_between_two_positions(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    now = int(time.time() * 1000)
    ages = {7_200_000: 0, 3_000_000: 0, 2_999_999: 5, 1_000_000: 0, 10_000: 0}
    # The third is of the same instant as the second.
    ids = [
        store.add("paid", id=f"{now - age - bool(number)}-{number}", number=number or age)[0]
        for age, number in ages.items()
    ]
    app = make_app(received.bus)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime((now - 2_000_000) / 1000))

    for words, numbers in [
        (["--from", "1h"], [3_000_000, 5, 1_000_000, 10_000]),
        (["--from", "1h", "--to", "20m"], [3_000_000, 5]),
        (["--from", ids[1], "--to", ids[1]], [3_000_000]),
        (["--from", ids[1][:-2], "--to", ids[1][:-2]], [3_000_000, 5]),
        (["--from", moment], [1_000_000, 10_000]),
        (["--from", "earliest", "--to", moment], [7_200_000, 3_000_000, 5]),
        (["--from", "0", "--to", ids[0]], [7_200_000]),
        (["--from", "1s"], []),
    ]:
        received.counts.clear()
        result = replay(app, *words)
        assert result.exit_code == 0, result.output
        assert received.counts == numbers, words


def test_ages_in_replay_use_the_clock_of_redis(
    store: StreamStore, make_app: Make, received: RecordingBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.time() * 1000)
    for number, minutes in enumerate([90, 50, 10]):
        store.add("paid", id=f"{now - minutes * 60_000}-0", number=number)
    here = time.time
    monkeypatch.setattr(time, "time", lambda: here() + 1_800)

    result = replay(make_app(received.bus), "--from", "1h", "--to", "30m")

    assert result.exit_code == 0, result.output
    assert received.counts == [1]


def test_replay_ends_at_the_last_event_at_its_start(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    @received.bus.on("paid")
    def pay_again(sender: str, number: int) -> None:
        store.add("paid", number=number + 1)

    store.add("paid", number=1)

    result = replay(make_app(received.bus), *ALL)

    assert result.output == "Read 1 event of 'paid': 1 handled.\n"
    assert store.client.xlen(store.keys.stream("paid")) == 2


@pytest.mark.parametrize("name", ["count", "test_replay_command.RecordingBus.count"])
def test_replay_can_run_a_single_receiver(
    store: StreamStore, make_app: Make, received: RecordingBus, name: str
) -> None:
    store.add("paid", number=1)

    result = replay(make_app(received.bus), *ALL, "--receiver", name)

    assert result.exit_code == 0, result.output
    assert (received.bills, received.counts) == ([], [1])


def test_replay_lists_failed_receivers_and_exits_with_1(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    added = [store.add("paid", number=number) for number in range(4)]
    received.bad = {1, 3}

    result = replay(make_app(received.bus), *ALL)

    assert result.exit_code == 1
    assert received.counts == [0, 1, 2, 3]
    lines = result.stdout.splitlines()
    assert lines[0] == "Read 4 events of 'paid': 2 handled, 2 failed."
    assert lines[1].endswith("test_replay_command.RecordingBus.bill failed at 2 events:")
    assert lines[2:] == [
        rf"  {added[number][1].id} ({added[number][0]}): OSError: no paper for {number} \x1b[2J"
        for number in (1, 3)
    ]


def test_replay_counts_and_lists_unreadable_entries_without_failing(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    store.add("paid", number=1)
    junk = store.add_fields("paid", {b"event": b"\xff\x1b[2J"})
    empty = store.add_fields("paid", {b"\x1b[2J": b"x"})
    other = store.event("sold", number=2)
    codec = received.bus.codec
    wrong = store.add_fields("paid", {b"event": codec.encode(other)})
    store.add("paid", number=3)

    result = replay(make_app(received.bus), *ALL)

    assert result.exit_code == 0, result.output
    assert received.counts == [1, 3]
    lines = result.output.splitlines()
    assert lines[0] == "Read 5 events of 'paid': 2 handled, 3 unreadable."
    assert lines[1].startswith(f"  {junk} (")
    assert "cannot be decoded: It is not msgpack" in lines[1]
    assert lines[2].startswith(f"  {empty} (")
    assert lines[2].endswith("It has no field 'event'.")
    assert lines[3].startswith(f"  {wrong} (")
    assert lines[3].endswith("The event is of signal 'sold'.")
    assert "\x1b" not in result.output


@pytest.mark.parametrize("where", ["in code", "in settings"])
def test_replay_skips_events_of_services_that_are_not_subscribed_to(
    store: StreamStore, make_app: Make, where: str
) -> None:
    bus = EventBus()
    numbers: list[int] = []
    sources = ["accounts", "mailer"]
    in_code, in_settings = (sources, None) if where == "in code" else (None, sources)
    bus.on("paid", from_=in_code)(lambda sender, number: numbers.append(number))
    store.add("paid", number=1)
    store.add("paid", number=2, source="billing")
    # Its own, which comes back to nobody who did not ask for that.
    store.add("paid", number=3, source="mailer")

    result = replay(make_app(bus, EVENTBUS_SUBSCRIBE={"paid": {"from": in_settings}}), *ALL)

    assert result.exit_code == 0, result.output
    assert result.output == (
        "Read 3 events of 'paid': 1 handled, 2 from services that no receiver listens to.\n"
    )
    assert numbers == [1]


def test_replay_includes_own_events_with_echo(store: StreamStore, make_app: Make) -> None:
    bus = EventBus()
    numbers: list[int] = []
    bus.on("paid", echo=True)(lambda sender, number: numbers.append(number))
    store.add("paid", number=3, source="mailer")

    assert replay(make_app(bus), *ALL).exit_code == 0
    assert numbers == [3]


def test_a_dry_run_counts_and_runs_nothing(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    for number in range(3):
        store.add("paid", number=number)

    store.add_fields("paid", {b"event": b"junk"})

    result = replay(make_app(received.bus), *ALL, "--dry-run", "--rate", "0.001")

    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "Read 4 events of 'paid': 3 would be replayed, 1 unreadable."
    assert lines[1].startswith("Receivers: ")
    assert "RecordingBus.bill, " in lines[1]
    assert (received.events, received.counts) == ([], [])


def test_replay_keeps_to_the_rate(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    for number in range(6):
        store.add("paid", number=number)

    begun = time.monotonic()
    result = replay(make_app(received.bus), *ALL, "--rate", "20")

    assert result.exit_code == 0, result.output
    assert time.monotonic() - begun >= 5 / 20


def test_events_sent_during_a_replay_are_in_redis_at_its_end(
    store: StreamStore, make_app: Make
) -> None:
    bus = EventBus()
    mail_sent = bus.signal("mail_sent")
    bus.on("paid")(lambda sender, number: mail_sent.send(None, number=number))
    store.add("paid", number=1)
    app = make_app(bus, EVENTBUS_PUBLISH={"mail_sent": {"via": "stream", "confirm": False}})

    result = replay(app, *ALL)

    assert result.exit_code == 0, result.output
    assert store.client.xlen(store.keys.stream("mail_sent")) == 1


# -- mistakes -----------------------------------------------------------------------------


def test_replay_needs_receivers_and_says_how_to_name_them(store: StreamStore) -> None:
    store.add("paid", number=1)

    result = store.run("replay", "paid", *ALL)

    assert result.exit_code == 1
    assert result.output == (
        "Error: There are no receivers to run: replay runs them in its own process. Name the app, "
        "as in 'flask --app mailer eventbus replay', or a module of receivers with --receivers.\n"
    )


def test_replay_says_why_a_program_cannot_replay(
    store: StreamStore, make_app: Make, received: RecordingBus
) -> None:
    store.add("paid", number=1)
    local = EventBus()
    local.signal("paid").connect(received.count)
    found = {
        "Nothing here receives 'paid'.": replay(make_app(EventBus()), *ALL),
        "'mailer' does not subscribe to 'paid'": replay(make_app(local), *ALL),
        "'EVENTBUS_ENABLED' is False": replay(make_app(received.bus, EVENTBUS_ENABLED=False), *ALL),
    }

    for text, result in found.items():
        assert result.exit_code == 1
        assert text in result.output

    assert received.counts == []


def test_replay_reports_an_unknown_or_ambiguous_receiver(
    store: StreamStore, make_app: Make
) -> None:
    bus = EventBus()

    class Other:
        def count(self, sender: str, number: int) -> None: ...

    first = RecordingBus()
    bus.on("paid")(first.count)
    bus.on("paid")(Other().count)
    store.add("paid", number=1)
    app = make_app(bus)

    nobody = replay(app, *ALL, "--receiver", "nobody\x1b[2J")
    several = replay(app, *ALL, "--receiver", "count")

    assert (nobody.exit_code, several.exit_code) == (1, 1)
    assert "is the name of no receiver of 'paid'. Write one of: " in nobody.output
    assert "\x1b" not in nobody.output
    assert "'count' is the name of several receivers of 'paid'." in several.output
    assert "RecordingBus.count" in several.output
    assert "Other.count" in several.output


def test_replay_reports_a_missing_stream(make_app: Make, received: RecordingBus) -> None:
    result = replay(make_app(received.bus), *ALL)

    assert result.exit_code == 1
    assert result.output.startswith("Error: There is no stream of 'paid' under this prefix")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "Missing option '--from'"),
        (
            ["--from", "yesterday"],
            "'yesterday' is not a place in a stream. Write an entry's id such",
        ),
        (["--from", "5-"], "'5-' is not a place in a stream"),
        (["--from", f"{2**64}-0"], "is too large for an entry's id"),
        (["--from", "1h", "--to", "2h"], "--to is before --from"),
        (["--from", "1h", "--rate", "0"], "0.0 is not in the range x>0"),
        (["--from", "\x1b[2J"], r"'\x1b[2J' is not a place"),
    ],
    ids=["none", "word", "half", "large", "before", "rate", "hostile"],
)
def test_a_usage_error_of_replay_exits_with_2(
    make_app: Make, received: RecordingBus, words: list[str], text: str
) -> None:
    result = replay(make_app(received.bus), *words)

    assert result.exit_code == 2
    assert text in " ".join(result.output.split())


# -- in a process of its own --------------------------------------------------------------

RECEIVERS = """\
import inspect
import signal
from flask_eventbus import current_event


def register(bus):
    @bus.on("paid")
    def note(sender, number):
        print("got", number, current_event.replayed, flush=True)

        if number == 2:
            # The signal takes effect in a thread: the event lasts until it has.
            handler = signal.getsignal(signal.SIGINT)
            assert inspect.getclosurevars(handler).nonlocals["stopping"].wait(30)
"""


def test_ctrl_c_finishes_the_running_event_and_says_where_to_continue(
    store: StreamStore, tmp_path: Path
) -> None:
    (tmp_path / "reactions.py").write_text(RECEIVERS)
    ids = [store.add("paid", number=number)[0] for number in range(1, 5)]
    settings = ["--url", store.url, "--prefix", store.prefix, "--service", "mailer"]
    words = ["replay", "paid", "--from", "earliest", "--receivers", "reactions"]
    process = Program(["-m", "flask_eventbus", *settings, *words], tmp_path, {})

    try:
        wait_until(lambda: "got 2" in process.output, what="the second event is handled")
        process.send_signal(signal.SIGINT)
        code = process.end()
    finally:
        process.kill()

    milliseconds, _, number = ids[1].partition("-")
    assert code == 1, process.output
    assert process.output == (
        "got 1 True\n"
        "got 2 True\n"
        "Read 2 events of 'paid': 2 handled.\n"
        f"Error: Stopped early, after {ids[1]}. To continue, pass: --from "
        f"{milliseconds}-{int(number) + 1}\n"
    )


def test_replay_reports_an_outage_with_its_progress(
    redis_server: RedisServer, received: RecordingBus
) -> None:
    store = StreamStore(redis_server)

    for number in range(150):
        store.add("paid", number=number)

    app = Flask("mailer")
    app.config.update(
        EVENTBUS_SERVICE="mailer", EVENTBUS_URL=store.url, EVENTBUS_PREFIX=store.prefix
    )
    received.bus.on("paid")(lambda sender, number: redis_server.kill() if number == 99 else None)
    received.bus.init_app(app)

    result = replay(app, *ALL)

    assert result.exit_code == 1
    assert "Read 100 events of 'paid': 100 handled.\n" in result.stdout
    assert "cannot be used" in result.stderr
    assert len(received.counts) == 100


def test_the_replay_command_that_dead_retry_prints_replays_an_oversized_event(
    store: StreamStore, make_app: Make, received: RecordingBus, make_bus: Callable[..., Bus]
) -> None:
    worker = make_bus(store.url, "mailer", prefix=store.prefix)
    worker.on("paid", via="stream", start="earliest")(received.count)
    event = store.event("paid", number=7, text="x" * 3_000_000)
    store.add_fields("paid", {b"event": Codec(max_bytes=4_000_000).encode(event)})
    worker.start()
    wait_until(lambda: store.dead("paid"), what="it is a dead letter")
    worker.stop()

    refused = store.run("dead", "retry", "--all")
    words = refused.output.partition("flask_eventbus replay paid ")[2].split()[:4]
    low = replay(make_app(received.bus), *words)
    high = replay(make_app(received.bus, EVENTBUS_MAX_EVENT_BYTES=4_000_000), *words)

    assert refused.exit_code == 1
    assert "Raise that setting and replay the entry" in refused.output
    assert "1 unreadable" in low.output
    assert "more than the 1048576 of EVENTBUS_MAX_EVENT_BYTES" in low.output
    assert (high.exit_code, high.output) == (0, "Read 1 event of 'paid': 1 handled.\n")
    assert received.bills == received.counts == [7]
