"""Redis away at boot, lost, hung and back, with a real server that is killed and stopped."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from blinker import NamedSignal
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus, PublishError, signals
from flask_eventbus.codec.codec import split_message
from flask_eventbus.signals import wait_until_sent
from flask_eventbus.transport.reconnect import Backoff

pytestmark = [
    pytest.mark.second_look("hangs, kills and restarts Redis servers"),
    pytest.mark.timing(tick=0.1, ping_after=0.3, ping_timeout=0.3),
]

Make = Callable[..., Bus]


def received_by(bus: Bus, name: str = "tick") -> list[Any]:
    """Start listening to ``name`` and return the list that its numbers go to."""
    received: list[Any] = []

    @bus.on(name)
    def receive(sender: str, n: int) -> None:
        received.append(n)

    bus.start()
    assert bus.ready(10)
    return received


@pytest.fixture
def reported() -> Iterator[list[str]]:
    """The names of the lifecycle signals that were sent, in order."""
    names: list[str] = []
    connected = []

    for signal in (
        signals.listener_connected,
        signals.listener_lost,
        signals.publisher_lost,
        signals.publisher_restored,
        signals.events_dropped,
        signals.events_missed,
    ):
        note = noting(signal, names)
        signal.connect(note)
        connected.append((signal, note))

    yield names

    for signal, note in connected:
        signal.disconnect(note)


def noting(signal: NamedSignal, names: list[str]) -> Callable[..., None]:
    """A receiver that appends the signal's name to ``names``, with its count if it has one."""

    def note(sender: str, **values: object) -> None:
        count = values.get("count")
        names.append(f"{signal.name} {count}" if count else signal.name)

    return note


def test_a_bus_starts_without_redis_and_works_once_it_is_up(
    redis_server: RedisServer, make_bus: Make
) -> None:
    redis_server.kill()
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    consumer = make_bus(redis_server.url, "consumer")
    received: list[int] = []

    @consumer.on("tick")
    def receive(sender: str, n: int) -> None:
        received.append(n)

    consumer.start()
    assert not consumer.ready(0.3)
    redis_server.start()
    assert consumer.ready(10)
    publisher.signal("tick").send("test", n=1)

    wait_until(lambda: received == [1], what="the event arrives")


def test_events_sent_while_redis_is_away_arrive_in_order_when_it_is_back(
    redis_server: RedisServer, make_bus: Make, reported: list[str]
) -> None:
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    received = received_by(make_bus(redis_server.url, "consumer"))
    publisher.signal("tick").send("test", n=0)
    wait_until(lambda: received == [0], what="the first event arrives")

    redis_server.kill()
    for n in range(1, 6):
        publisher.signal("tick").send("test", n=n)
    wait_until(lambda: not publisher.health().publishing, what="the loss is known")
    assert publisher.health().buffered == 5
    redis_server.start()

    # The publisher gives its listeners the time to come back first.
    assert publisher.flush(10)
    wait_until(lambda: received[-1:] == [5], what="the last event arrives")
    assert received == [0, 1, 2, 3, 4, 5]
    assert publisher.health().buffered == 0
    wait_until(wait_until_sent, what="all receivers have run")
    assert reported.count("publisher_lost") == 1
    assert reported.count("publisher_restored") == 1


def test_a_listener_reconnects_after_a_restart_and_signals_loss_and_return_once(
    redis_server: RedisServer,
    make_bus: Make,
    reported: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "flask_eventbus")
    consumer = make_bus(redis_server.url, "consumer")
    received = received_by(consumer)

    redis_server.kill()
    wait_until(lambda: not consumer.health().connected, what="the loss is noticed")
    redis_server.start()
    assert consumer.ready(20)
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    publisher.signal("tick").send("test", n=1)

    wait_until(lambda: received == [1], what="the event arrives")
    wait_until(wait_until_sent, what="all receivers have run")
    assert reported == ["listener_connected", "listener_lost", "listener_connected"]
    texts = [r.getMessage() for r in caplog.records if r.name == "flask_eventbus.channels.listener"]
    assert sum("lost Redis" in text for text in texts) == 1
    assert sum("is back after" in text for text in texts) == 1


def test_a_listener_detects_a_server_that_hangs_and_resumes_with_it(
    redis_server: RedisServer, make_bus: Make
) -> None:
    consumer = make_bus(redis_server.url, "consumer")
    received = received_by(consumer)

    redis_server.hang()
    wait_until(lambda: not consumer.health().connected, what="the hanging server is noticed")
    redis_server.resume()
    assert consumer.ready(20)
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    publisher.signal("tick").send("test", n=1)

    wait_until(lambda: received == [1], what="the event arrives")


@pytest.mark.timing(ping_after=60.0)
def test_events_sent_to_a_server_that_hangs_arrive_once_when_it_resumes(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    consumer = make_bus(redis_server.url, "consumer")
    # This listener waits: the subscription outlives the stop, as TCP does.
    received = received_by(consumer)
    publisher.signal("tick").send("test", n=0)
    assert publisher.flush(10)

    redis_server.hang()
    for n in range(1, 4):
        publisher.signal("tick").send("test", n=n)
    # The writer sends, gets no answer in two seconds, and will send the same again.
    wait_until(lambda: not publisher.health().publishing, what="the writer gives up")
    redis_server.resume()
    assert publisher.flush(20)
    publisher.signal("tick").send("test", n=4)

    wait_until(lambda: received[-1:] == [4], what="the last event arrives")
    assert received == [0, 1, 2, 3, 4]
    assert consumer.health().counts["duplicates"] >= 1


def test_a_confirmed_send_waits_for_the_timeout_and_the_next_ones_do_not_wait(
    redis_server: RedisServer, make_bus: Make
) -> None:
    route = {"tick": {"confirm": True}}
    publisher = make_bus(redis_server.url, publish=route, timeout=1.0, on_outage="raise")
    publisher.signal("tick").send("test", n=0)
    redis_server.hang()

    with pytest.raises(PublishError, match=r"no answer within 1\.0 s") as caught:
        publisher.signal("tick").send("test", n=1)

    assert caught.value.event_id is not None
    assert not publisher.health().publishing
    with pytest.raises(PublishError, match="Send it again when Redis is back"):
        publisher.signal("tick").send("test", n=2)
    redis_server.resume()
    wait_until(lambda: publisher.health().publishing, what="Redis is asked for and found")
    publisher.signal("tick").send("test", n=3)


@pytest.mark.parametrize("policy", ["buffer", "raise"])
def test_only_the_first_of_many_confirmed_sends_waits_for_a_server_that_hangs(
    redis_server: RedisServer, make_bus: Make, policy: str
) -> None:
    route = {"tick": {"confirm": True}}
    publisher = make_bus(redis_server.url, publish=route, on_outage=policy, timeout=1.0)
    publisher.signal("tick").send("test", n=0)
    redis_server.hang()

    began = time.monotonic()
    for n in range(100):
        with suppress(PublishError):
            publisher.signal("tick").send("test", n=n)

    # It would be 100 s if each of them waited.
    assert time.monotonic() - began < 25
    redis_server.resume()


@pytest.mark.timing(ping_after=60.0)
def test_a_channel_event_sent_again_from_its_error_is_handled_once_and_leaves_no_gap(
    redis_server: RedisServer, make_bus: Make
) -> None:
    # The listener waits: its subscription outlives the stop.
    consumer = make_bus(redis_server.url, "consumer")
    received = received_by(consumer)
    route = {"tick": {"confirm": True}}
    bus = make_bus(redis_server.url, "publisher", publish=route, timeout=1.0, on_outage="raise")
    bus.signal("tick").send("test", n=0)
    redis_server.hang()
    with pytest.raises(PublishError) as caught:
        bus.signal("tick").send("test", n=1)

    redis_server.resume()
    wait_until(lambda: bus.health().publishing, what="Redis is found")
    caught.value.resend()
    bus.signal("tick").send("test", n=2)

    wait_until(lambda: 2 in received, what="the next event arrives")
    assert (received, consumer.health().missed) == ([0, 1, 2], 0)
    assert caught.value.in_doubt


def test_a_full_buffer_drops_counts_and_signals_the_oldest_events(
    redis_server: RedisServer, make_bus: Make, reported: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"], buffer_size=5)
    redis_server.kill()
    publisher.signal("tick").send("test", n=0)
    wait_until(lambda: not publisher.health().publishing, what="the loss is known")

    for n in range(1, 9):
        publisher.signal("tick").send("test", n=n)

    assert publisher.health().counts["dropped"] == 4
    assert publisher.health().buffered == 5
    wait_until(lambda: reported.count("events_dropped 1") == 4, what="each drop is reported")
    assert caplog.text.count("The buffer is full") == 1


def test_raise_fails_the_send_while_redis_is_known_to_be_away(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publisher = make_bus(redis_server.url, publish=["tick"], on_outage="raise")
    locally: list[int] = []

    @publisher.on("tick")
    def receive(sender: str, n: int) -> None:
        locally.append(n)

    redis_server.kill()
    publisher.signal("tick").send("test", n=0)
    wait_until(lambda: not publisher.health().publishing, what="the loss is known")

    with pytest.raises(PublishError, match="'tick' was not confirmed by Redis"):
        publisher.signal("tick").send("test", n=1)

    assert locally == [0, 1]  # the local receivers run whatever Redis does


@pytest.mark.timing(write_timeout=20.0)
def test_a_send_makes_no_round_trip(redis_server: RedisServer, make_bus: Make) -> None:
    publisher = make_bus(redis_server.url, publish=["tick"])
    publisher.signal("tick").send("test", n=0)
    assert publisher.flush(10)
    redis_server.hang()

    began = time.monotonic()
    for n in range(1, 1_000):
        publisher.signal("tick").send("test", n=n)

    # One round trip would not end before its time is over.
    assert time.monotonic() - began < 15
    assert publisher.health().buffered == 999
    redis_server.resume()
    assert publisher.flush(10)


def test_health_reports_the_state_of_a_node(redis_server: RedisServer, make_bus: Make) -> None:
    bus = make_bus(redis_server.url, "consumer")
    release = threading.Event()
    bus.on("tick")(lambda sender, n: release.wait(30))
    new = bus.health()
    assert (new.listening, new.connected, new.publishing) == (False, False, True)
    assert (new.last_heard, new.lag, new.buffered, new.missed) == (None, 0, 0, 0)

    bus.start()
    assert bus.ready(10)
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    for n in range(5):
        publisher.signal("tick").send("test", n=n)
    wait_until(lambda: bus.health().counts.get("received") == 5, what="all are read")
    busy = bus.health()
    release.set()

    assert (busy.listening, busy.connected) == (True, True)
    assert busy.last_heard is not None
    assert 0 <= busy.last_heard < 10
    assert 0 < busy.lag <= 5
    wait_until(lambda: bus.health().counts.get("handled") == 5, what="all are handled")
    assert bus.health().lag == 0
    bus.stop()
    assert (bus.health().listening, bus.health().connected) == (False, False)


def test_reconnect_delays_double_with_jitter_and_reset_after_a_success() -> None:
    backoff = Backoff(most=1.0)
    longest = [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]

    for _ in range(20):
        for most in longest:
            assert most / 2 <= backoff.next() <= most
        backoff.tries = 0


def test_the_count_of_missed_events_is_exact(
    redis_server: RedisServer, make_bus: Make, reported: list[str]
) -> None:
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    consumer = make_bus(redis_server.url, "consumer")
    received = received_by(consumer)
    publisher.signal("tick").send("test", n=0)
    wait_until(lambda: received == [0], what="the first event arrives")

    client = redis_server.client
    client.execute_command("ACL", "SETUSER", "default", "-subscribe")
    client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    wait_until(lambda: not consumer.health().connected, what="the connection is lost")
    for n in range(1, 4):
        publisher.signal("tick").send("test", n=n)
    assert publisher.flush(10)
    client.execute_command("ACL", "SETUSER", "default", "+subscribe")
    assert consumer.ready(20)
    publisher.signal("tick").send("test", n=4)

    wait_until(lambda: received == [0, 4], what="the event after the gap arrives")
    assert consumer.health().missed == 3
    wait_until(wait_until_sent, what="all receivers have run")
    assert "events_missed 3" in reported


def test_a_refused_subscription_is_logged_and_resumes_once_granted(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    client = redis_server.client
    client.execute_command("ACL", "SETUSER", "default", "resetchannels", "&eventbus:{tick}:*")
    consumer = make_bus(redis_server.url, "consumer")
    received: list[int] = []

    @consumer.on("tick")
    def receive(sender: str, n: int) -> None:
        received.append(n)

    @consumer.on("tock")
    def receive_tock(sender: str, n: int) -> None:
        received.append(n)

    consumer.start()
    wait_until(lambda: consumer.health().refused, what="the refusal is known")

    assert list(consumer.health().refused) == ["tock"]
    assert not consumer.health().connected
    assert "does not receive its events" in caplog.text
    publisher = make_bus(redis_server.url, "publisher", publish=["tick", "tock"])
    publisher.signal("tick").send("test", n=1)
    wait_until(lambda: received == [1], what="the other subscription works")
    client.execute_command("ACL", "SETUSER", "default", "allchannels")
    assert consumer.ready(10)
    assert consumer.health().refused == {}


def test_events_that_redis_refuses_are_counted_and_later_events_are_published(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    received = received_by(make_bus(redis_server.url, "consumer"))
    client = redis_server.client
    client.execute_command("ACL", "SETUSER", "default", "resetchannels", "&eventbus:{tick}:*")
    publisher = make_bus(redis_server.url, "publisher", publish=["tick", "tock"])
    publisher.signal("tock").send("test", n=1)
    publisher.signal("tick").send("test", n=2)

    wait_until(lambda: received == [2], what="the event of the granted channel arrives")
    assert publisher.flush(10)
    assert publisher.health().counts["refused"] == 1
    assert "refused the event" in caplog.text


def test_a_refused_event_fails_a_confirmed_send(redis_server: RedisServer, make_bus: Make) -> None:
    client = redis_server.client
    client.execute_command("ACL", "SETUSER", "default", "resetchannels")
    publisher = make_bus(redis_server.url, publish={"tick": {"confirm": True}}, timeout=5)

    with pytest.raises(PublishError, match=r"was not published: .*permission"):
        publisher.signal("tick").send("test", n=1)


def test_events_that_cannot_be_flushed_at_the_end_are_logged_by_id(
    redis_server: RedisServer, make_bus: Make, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"])
    redis_server.kill()
    node = publisher.health().node
    publisher.signal("tick").send("test", n=1)
    publisher.signal("tick").send("test", n=2)

    publisher.stop(flush=0.1)

    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert any(f"tick {node}-1 to {node}-2 (2)" in text for text in errors)


def test_a_script_flushes_at_exit_by_itself(redis_server: RedisServer) -> None:
    program = f"""
from flask_eventbus import Bus
bus = Bus({redis_server.url!r}, service="cron", publish=["tick"])
for n in range(1000):
    bus.signal("tick").send("cron", n=n)
"""
    counter = redis_server.client.pubsub()
    counter.subscribe("eventbus:{tick}:channel")
    assert counter.get_message(timeout=5) is not None

    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

    events = 0

    while events < 1000:
        message = counter.get_message(timeout=5)
        assert message is not None, events
        events += len(split_message(message["data"]))

    counter.close()


def wait_for_traffic(received: list[Any]) -> None:
    seen = len(received)
    wait_until(lambda: len(received) > seen + 50, timeout=20, what="fifty more events arrive")


def test_many_threads_can_send_while_redis_is_killed_and_restarted(
    redis_server: RedisServer, make_bus: Make
) -> None:
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"], buffer_size=100_000)
    consumer = make_bus(redis_server.url, "consumer")
    received = received_by(consumer)
    stop = threading.Event()
    sent = []

    def work(start: int) -> None:
        n = start
        while not stop.wait(0.001):
            publisher.signal("tick").send("test", n=n)
            sent.append(n)
            n += 4

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        wait_for_traffic(received)
        redis_server.restart()
    wait_for_traffic(received)
    stop.set()
    for thread in threads:
        thread.join()
    assert publisher.flush(20)
    wait_until(lambda: sent[-1] in received, what="the last event arrives")

    # Nothing twice, nothing invented; what is not there is what the sequence says is missing.
    assert len(received) == len(set(received))
    assert len(sent) - len(received) == consumer.health().missed
