"""Tests of the log: each failure once, within bounds, and no line that a sender could forge."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from servers import RedisServer
from stream_store import StreamStore
from waiting import wait_until

from flask_eventbus import Bus, Event, Reject, Retry, current_event, logs, signals
from flask_eventbus.codec.records import DeadLetter
from flask_eventbus.logs import MAX_TRACEBACK_CHARS, BoundedLog, get_logger, traceback_of
from flask_eventbus.receivers.workers import MAX_EVENTS
from flask_eventbus.testing import Isolation

Make = Callable[..., Bus]

_numbers = itertools.count()


@pytest.fixture
def bus(make_bus: Make) -> Bus:
    return make_bus("memory://", "mailer")


@pytest.fixture
def infos(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The records of the bus, those of the level INFO included."""
    caplog.set_level(logging.INFO, "flask_eventbus")
    return caplog


def failures(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the log records of receivers that failed."""
    return [
        record for record in caplog.records if record.name == "flask_eventbus.receivers.dispatcher"
    ]


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a record that the bus adds."""
    names = ("event_id", "signal", "service", "receiver", "attempt")
    return {name: getattr(record, name) for name in names if hasattr(record, name)}


# -- each failure once ----------------------------------------------------------------------


@pytest.mark.timing(first_retry=0.01)
def test_each_failed_attempt_is_one_error_and_the_same_traceback_is_logged_once(
    make_bus: Make,
    shared_redis: RedisServer,
    infos: pytest.LogCaptureFixture,
) -> None:
    store = StreamStore(shared_redis)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, retries=2)

    @bus.on("tick", via="stream", start="earliest")
    def fail(sender: str, n: int) -> None:
        raise ValueError("no such user")

    bus.start()
    _, event = store.add("tick", n=1)
    wait_until(lambda: store.dead("tick"), what="it is a dead letter")

    errors = [record for record in infos.records if record.levelno >= logging.WARNING]
    lines = [record.getMessage() for record in errors]
    assert [record.levelname for record in errors] == ["ERROR"] * 3
    assert [record.exc_info is not None for record in errors] == [True, False, False]
    name = f"{__name__}.{fail.__qualname__}"
    reported = (
        f"The receiver {name} failed at the event {event.id} of 'tick' from 'accounts', attempt "
    )
    assert lines[0].startswith(f"{reported}1, and is tried again in 0.0 s, at 2")
    assert lines[0].endswith("+00:00: ValueError: no such user")
    assert lines[1].startswith(f"{reported}2, and is tried again in 0.0 s, at 2")
    assert (
        lines[2]
        == f"{reported}3, the last, now a dead letter of 'mailer': ValueError: no such user"
    )
    assert [fields(record) for record in errors] == [
        {
            "event_id": event.id,
            "signal": "tick",
            "service": "mailer",
            "receiver": name,
            "attempt": attempt,
        }
        for attempt in (1, 2, 3)
    ]


def test_a_requested_retry_is_logged_as_one_info_line(
    bus: Bus, eventbus: Isolation, infos: pytest.LogCaptureFixture
) -> None:
    @bus.on("tick")
    def wait(sender: str) -> None:
        if current_event.attempt < 3:
            raise Retry("not yet", after=60)

    eventbus.deliver("tick", retry=True)
    eventbus.run_retries()

    assert [record.levelname for record in failures(infos)] == ["INFO", "INFO"]
    assert "asks for another attempt at the event" in infos.text
    assert "attempt 2, and is tried again in 60.0 s, at 2" in infos.text
    assert "Traceback" not in infos.text


def test_a_receiver_that_asks_for_too_many_retries_has_failed(
    bus: Bus, eventbus: Isolation, infos: pytest.LogCaptureFixture
) -> None:
    @bus.on("tick", retries=1)
    def wait(sender: str) -> None:
        raise Retry("not yet", after=60)

    eventbus.deliver("tick", retry=True)
    eventbus.run_retries()

    assert [record.levelname for record in failures(infos)] == ["INFO", "ERROR"]
    assert "attempt 2, the last, now a dead letter of 'mailer': Retry: not yet" in infos.text


def test_a_rejected_event_is_logged_as_one_warning(
    bus: Bus, make_bus: Make, shared_redis: RedisServer, infos: pytest.LogCaptureFixture
) -> None:
    store = StreamStore(shared_redis)
    bus = make_bus(store.url, "mailer", prefix=store.prefix)

    @bus.on("tick", via="stream", start="earliest")
    def refuse(sender: str, n: int) -> None:
        raise Reject("nobody delivers there")

    bus.start()
    store.add("tick", n=1)
    wait_until(lambda: bus.health().counts.get("dead_lettered"), what="it is a dead letter")

    found = [record for record in infos.records if record.levelno >= logging.WARNING]
    assert [record.levelname for record in found] == ["WARNING"]
    assert found[0].exc_info is None
    assert (
        found[0]
        .getMessage()
        .endswith("attempt 1, now a dead letter of 'mailer': Reject: nobody delivers there")
    )


def test_a_receiver_that_fails_is_logged_and_signalled(
    bus: Bus, eventbus: Isolation, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[dict[str, Any]] = []

    @bus.on("tick")
    def fail(sender: str) -> None:
        raise ValueError("no such user")

    def note(sender: str, **values: Any) -> None:
        reported.append({"sender": sender, **values})

    with signals.receiver_failed.connected_to(note), pytest.raises(ValueError, match="no such"):
        eventbus.deliver("tick", id="abc-1")

    (record,) = failures(caplog)
    assert record.levelname == "ERROR"
    assert (
        ".fail failed at the event abc-1 of 'tick' from 'elsewhere': ValueError: no such user"
        in (record.getMessage())
    )
    assert fields(record)["event_id"] == "abc-1"
    assert record.exc_info
    assert isinstance(record.exc_info[1], ValueError)
    (values,) = reported
    assert values["sender"] == "mailer"
    assert values["receiver"] is fail
    assert values["event"].id == "abc-1"
    assert isinstance(values["error"], ValueError)


# -- within bounds --------------------------------------------------------------------------


def test_errors_of_a_receiver_that_always_fails_are_rate_limited(
    bus: Bus, eventbus: Isolation, caplog: pytest.LogCaptureFixture
) -> None:
    @bus.on("tick")
    def fail(sender: str, text: str) -> None:
        raise ValueError(f"cannot write to {text}")

    for _ in range(30):
        with pytest.raises(ValueError, match="cannot write"):
            eventbus.deliver("tick", text="A" * 100_000)

    assert len(failures(caplog)) == logs.LINES_PER_MINUTE == 10
    assert all(record.getMessage().count("A") < 500 for record in failures(caplog))
    assert len(caplog.text) < 10 * 10_000


def test_ten_lines_are_logged_in_each_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = BoundedLog(get_logger("flask_eventbus.tests"))

    def flood() -> list[str]:
        caplog.clear()
        for n in range(25):
            log.warning("flood", "line %d", n)
        return [record.getMessage() for record in caplog.records]

    first = flood()
    now[0] += 59.0
    same_minute = flood()
    now[0] += 2.0
    second = flood()
    now[0] += 61.0
    third = flood()

    assert first == [f"line {n}" for n in range(10)]
    assert same_minute == []
    assert second[0] == "line 0 (40 more like this were counted and not logged)"
    assert second[1:] == [f"line {n}" for n in range(1, 10)]
    assert third[0] == "line 0 (15 more like this were counted and not logged)"
    assert len(third) == 10


def test_a_lasting_state_is_logged_when_it_starts_and_when_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = BoundedLog(get_logger("flask_eventbus.tests"))

    for _ in range(2):
        log.over("refused", "granted")
        log.error("refused", "refused")
        log.over("refused", "granted")
        log.over("refused", "granted")

    assert [record.getMessage() for record in caplog.records] == ["refused", "granted"] * 2


def test_slow_receivers_are_logged_and_so_is_their_recovery(
    make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus(f"memory://logs-{time.time_ns()}", "mailer")
    may_go_on = threading.Event()

    @bus.on("tick", via="channel")
    def wait(sender: str) -> None:
        assert may_go_on.wait(20)

    bus.start()
    assert bus.ready(10)
    event = Event(name="tick", source="shop", id="abc-1", time=datetime.now(UTC), payload={})
    bus.node._inbound.pool.put([event] * (MAX_EVENTS + 1), [1] * (MAX_EVENTS + 1))
    may_go_on.set()

    wait_until(lambda: "Receivers have caught up" in caplog.text, what="the end is logged")
    assert [record.getMessage()[:28] for record in caplog.records] == [
        "Receivers are slower than ev",
        "Receivers have caught up; no",
    ]


# -- nothing forged -------------------------------------------------------------------------

FORGERY = (
    "eve\n2026-11-27 17:00:00,000 CRITICAL auth root logged in\r\x1b[2J\x1b]0;pwned\x07"
    "\u202e\x85\u2028x"
)


def raise_it(error: BaseException) -> None:
    raise error


def chained() -> None:
    try:
        raise_it(ValueError(FORGERY))
    except ValueError as error:
        error.add_note(FORGERY)
        raise KeyError(FORGERY) from error


def grouped() -> None:
    raise_it(ExceptionGroup(FORGERY, [ValueError(FORGERY), TypeError(f'File "{FORGERY}')]))


ERRORS: dict[str, Callable[[], None]] = {
    "a text": lambda: raise_it(ValueError(FORGERY)),
    "a cause": chained,
    "a group": grouped,
    "syntax": lambda: exec("x = (\n'" + FORGERY.replace("\n", " ")),  # noqa: S102 - wanted
    "a file": lambda: raise_it(OSError(2, FORGERY, FORGERY)),
    "the name of a file": lambda: exec(compile("x = (", FORGERY, "exec")),  # noqa: S102 - wanted
    "a frame": lambda: exec(compile("raise ValueError", FORGERY, "exec")),  # noqa: S102 - wanted
}


@pytest.mark.parametrize("kind", ERRORS)
def test_the_text_of_an_error_cannot_forge_a_log_record(
    bus: Bus, eventbus: Isolation, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    @bus.on("tick")
    def fail(sender: str) -> None:
        ERRORS[kind]()

    with pytest.raises(Exception):  # noqa: B017, PT011 - any of them
        eventbus.deliver("tick")

    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    (record,) = failures(caplog)
    shown = formatter.format(record)
    assert "Traceback" in shown
    assert not any(line.startswith("2026-11-27 17:00") for line in shown.splitlines())
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "\\nThe above exception" not in shown


def test_text_from_the_wire_cannot_forge_a_log_record(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("flask_eventbus.tests")

    log.warning("The service %s said %r: %s", FORGERY, FORGERY, ValueError(FORGERY))
    log.warning("It said %s", "A" * 1_000_000)

    first, second = (record.getMessage() for record in caplog.records)
    assert first.isprintable()
    assert "\\n2026-11-27" in first
    assert len(second) < 3_000
    assert second.endswith("... (1000000 characters)")


def test_a_log_record_names_the_line_that_wrote_it(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("flask_eventbus.tests")

    log.warning("plain")
    BoundedLog(log).warning("kind", "bounded")
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("raised")

    assert {record.funcName for record in caplog.records} == {
        "test_a_log_record_names_the_line_that_wrote_it"
    }


def test_a_dead_letter_keeps_the_end_of_a_traceback(
    shared_redis: RedisServer, make_bus: Make
) -> None:
    store = StreamStore(shared_redis)
    bus = make_bus(store.url, "mailer", prefix=store.prefix, retries=0)

    def last_of_all() -> None:
        raise ValueError("A" * 100_000)

    def descend(depth: int) -> None:
        # By turns: Python leaves out what repeats itself.
        (descend_too if depth else last_of_all)(*[depth - 1][:depth])

    def descend_too(depth: int) -> None:
        (descend if depth else last_of_all)(*[depth - 1][:depth])

    @bus.on("tick", via="stream", start="earliest")
    def fail(sender: str, n: int) -> None:
        descend(100)

    bus.start()
    store.add("tick", n=1)
    wait_until(lambda: store.dead("tick"), what="it is a dead letter")

    ((_, found),) = store.client.xrange(store.keys.dead("tick", "mailer"))
    letter = DeadLetter.from_fields(found)
    assert len(letter.traceback) == MAX_TRACEBACK_CHARS
    assert letter.traceback.startswith("...")
    assert "in last_of_all" in letter.traceback
    assert "ValueError: AAAA" in letter.traceback.splitlines()[-1]
    assert "in fail" not in letter.traceback
    assert len(letter.error) <= 500


def test_an_unavailable_traceback_is_reported_as_missing() -> None:
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise ValueError("there are no words for it")

    assert "UnspeakableError" in traceback_of(UnspeakableError())


# -- fields ---------------------------------------------------------------------------------


def test_published_and_handled_events_are_logged_if_the_setting_says_so(
    shared_redis: RedisServer, make_bus: Make, infos: pytest.LogCaptureFixture
) -> None:
    prefix = f"logs-{os.getpid()}-{next(_numbers)}-{time.time_ns()}"
    publisher = make_bus(
        shared_redis.url, "shop", prefix=prefix, publish={"paid": "stream"}, log_events=True
    )
    consumer = make_bus(shared_redis.url, "mailer", prefix=prefix, log_events=True)

    @consumer.on("paid")
    def mail(sender: str, n: int) -> None: ...

    consumer.start()
    assert consumer.ready(10)
    publisher.signal("paid").send("test", n=1)

    def reported(begin: str) -> list[logging.LogRecord]:
        return [record for record in infos.records if record.getMessage().startswith(begin)]

    wait_until(lambda: reported("Handled") and reported("Published"), what="both are reported")
    (published,), (handled,) = reported("Published the event"), reported("Handled the event")
    assert published.levelname == handled.levelname == "INFO"
    assert fields(published) == {
        "event_id": published.args[0],  # type: ignore[index]  # it has some
        "signal": "paid",
        "service": "shop",
    }
    assert fields(handled) == {
        **fields(published),
        "service": "mailer",
        "attempt": 1,
        "receiver": f"{__name__}.{mail.__qualname__}",
    }


def test_handled_events_are_not_logged_by_default(
    bus: Bus, eventbus: Isolation, infos: pytest.LogCaptureFixture
) -> None:
    bus.on("tick")(lambda sender: None)

    eventbus.deliver("tick")

    assert not infos.records


def test_a_log_record_without_an_event_has_the_service_of_the_process(
    make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    from flask_eventbus.node import nodes

    nodes.clear()
    bus = make_bus("redis://127.0.0.1:1/0", "mailer", publish=["tick"])
    bus.signal("tick").send("test", n=1)

    wait_until(lambda: "Redis is away" in caplog.text, what="it is logged")
    assert fields(caplog.records[0]) == {"service": "mailer"}
