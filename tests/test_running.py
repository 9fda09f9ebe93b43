"""Scripts as real processes: they hear, finish what runs, and end with an honest exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import RedisServer
from waiting import wait_until

from flask_eventbus import Bus, signals
from flask_eventbus.receivers.workers import EventQueue
from flask_eventbus.signals import wait_until_sent

pytestmark = pytest.mark.second_look("sends signals to processes as they start and end")

Make = Callable[..., Bus]

CONSUMER = """
import logging, signal, sys, threading, time
from flask_eventbus import Bus

logging.basicConfig(level=logging.INFO)
bus = Bus({url!r}, service="consumer", prefix={prefix!r}, grace={grace})

def watch(before):
    while signal.getsignal(signal.SIGINT) is before:
        time.sleep(0.001)
    print("ready", flush=True)

    while bus.health().counts.get("received", 0) < 4:
        time.sleep(0.01)
    print("4 received", flush=True)

@bus.on("work")
def work(sender, seconds):
    print("begun", flush=True)
    time.sleep(seconds)
    print("finished", flush=True)

@bus.on("work")
async def work_too(sender, seconds):
    print("async", flush=True)

if __name__ == "__main__":
    assert "flask" not in sys.modules
    bus.start()
    bus.ready(10)
    # A signal that comes before bus.run() has its handlers ends the program.
    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=watch, args=(before,), daemon=True).start()
    bus.run()
    print("ended", flush=True)
"""


class Program:
    """A script in a process of its own, and the lines it has printed."""

    def __init__(self, path: Path, text: str) -> None:
        path.write_text(text)
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(path)],
            # Unbuffered, a line and its end are two writes, and the log may come between them.
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, line: str) -> None:
        wait_until(lambda: line in self.lines, timeout=20, what=f"{line!r} among {self.lines}")

    def end(self) -> int:
        """The exit code, once it has ended by itself."""
        code = self.process.wait(timeout=30)
        self._reader.join(timeout=10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None

        for line in self.process.stdout:
            self.lines.append(line.strip())


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own on the shared server."""
    return str(request.node.name)[:60].replace("[", "-").replace("]", "")


@pytest.fixture
def start(
    shared_redis: RedisServer, tmp_path: Path, prefix: str
) -> Iterator[Callable[..., Program]]:
    """Start the consumer script."""
    programs: list[Program] = []

    def start_program(text: str = CONSUMER, grace: float = 20) -> Program:
        filled = text.format(url=shared_redis.url, prefix=prefix, grace=grace)
        programs.append(Program(tmp_path / f"program{len(programs)}.py", filled))
        return programs[-1]

    yield start_program

    for program in programs:
        program.process.kill()
        program.end()


@pytest.fixture
def work(shared_redis: RedisServer, make_bus: Make, prefix: str) -> Callable[..., None]:
    """Send the consumer work from this process."""
    bus = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["work"])

    def send(seconds: float) -> None:
        bus.signal("work").send("test", seconds=seconds)

    return send


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_lets_a_running_receiver_finish_and_exits_0(
    start: Callable[..., Program], work: Callable[..., None], number: signal.Signals
) -> None:
    program = start()
    program.wait_for("ready")
    work(1.0)
    program.wait_for("begun")

    program.process.send_signal(number)

    assert program.end() == 0
    assert program.lines[-1] == "ended"
    assert {"finished", "async"} <= set(program.lines)


def test_a_second_signal_forces_the_end(
    start: Callable[..., Program], work: Callable[..., None]
) -> None:
    program = start()
    program.wait_for("ready")
    work(60)
    program.wait_for("begun")

    program.process.send_signal(signal.SIGTERM)
    wait_until(
        lambda: any("Waiting for running receivers" in line for line in program.lines),
        what="the first signal is taken",
    )
    program.process.send_signal(signal.SIGTERM)

    assert program.end() == 128 + signal.SIGTERM
    assert "finished" not in program.lines


def test_receivers_that_outlast_the_grace_are_abandoned_and_logged(
    start: Callable[..., Program], work: Callable[..., None]
) -> None:
    program = start(grace=0.2)
    program.wait_for("ready")
    for _ in range(4):
        work(60)
    program.wait_for("begun")
    program.wait_for("4 received")

    program.process.send_signal(signal.SIGTERM)

    assert program.end() == 0
    (line,) = [line for line in program.lines if "still running after the grace" in line]
    assert "after the grace of 0.2 s" in line
    assert "3 channel events that had arrived are lost" in line


SIGNALLED = """
import random, signal
from flask_eventbus import bus
from flask_eventbus.config import Config

bus.SIGNAL_CHECK = 0.01

class Node:
    config = Config(service="signalled")
    fatal = None

    def start(self):
        # In a real process the signal comes from outside; this one comes at any instruction.
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 5e-5))

    def stop(self):
        pass

for _ in range(1_000):
    bus.run_until_signal(Node())
"""


def test_a_termination_signal_is_handled_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "signalled.py"
    path.write_text(SIGNALLED)

    assert subprocess.run([sys.executable, str(path)], timeout=30).returncode == 0


def test_a_script_without_subscriptions_fails_at_once(start: Callable[..., Program]) -> None:
    program = start(
        "from flask_eventbus import Bus\nBus({url!r}, service='x', prefix={prefix!r}).run()"
    )

    assert program.end() == 1
    assert any("There is nothing to listen to." in line for line in program.lines)


def test_a_publisher_script_flushes_when_its_with_block_ends(
    start: Callable[..., Program], make_bus: Make, shared_redis: RedisServer, prefix: str
) -> None:
    received: list[int] = []
    bus = make_bus(shared_redis.url, "consumer", prefix=prefix)

    @bus.on("tick")
    def receive(sender: str, n: int) -> None:
        received.append(n)

    bus.start()
    assert bus.ready(10)
    program = start(
        "import os\n"
        "from flask_eventbus import Bus\n"
        "with Bus({url!r}, service='cron', prefix={prefix!r}, publish=['tick']) as bus:\n"
        "    for n in range(500): bus.signal('tick').send('cron', n=n)\n"
        "os._exit(0)  # nothing is left for the end of the process\n"
    )

    assert program.end() == 0
    wait_until(lambda: len(received) == 500, what="all events arrive")
    assert received == list(range(500))


def test_a_bus_can_be_started_and_stopped_repeatedly(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    received: list[int] = []
    bus = make_bus(shared_redis.url, "consumer", prefix=prefix)
    bus.on("tick")(lambda sender, n: received.append(n))
    publisher = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])

    def use(n: int) -> None:
        bus.stop()
        with bus, publisher, publisher:
            bus.start()
            bus.start()
            assert bus.ready(10)
            publisher.signal("tick").send("test", n=n)
            wait_until(lambda: received[-1:] == [n], what="it is received")
        bus.stop()

    for n in range(3):
        use(n)
        assert not bus.health().listening

    assert received == [0, 1, 2]


def test_a_script_takes_its_settings_from_the_environment(
    shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVENTBUS_SERVICE", "cron")
    monkeypatch.setenv("EVENTBUS_URL", shared_redis.url)
    monkeypatch.setenv("EVENTBUS_PUBLISH", "tick,tock")

    bus = Bus.from_env()

    assert bus.node.config.service == "cron"
    assert sorted(bus.node.routes) == ["tick", "tock"]


def test_stop_from_a_receiver_is_refused_instead_of_deadlocking(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, "consumer", prefix=prefix)
    errors: list[BaseException] = []

    def note(sender: str, error: BaseException, **values: Any) -> None:
        errors.append(error)

    @bus.on("tick")
    def receive(sender: str) -> None:
        bus.stop()

    bus.start()
    assert bus.ready(10)
    with signals.receiver_failed.connected_to(note):
        make_bus(shared_redis.url, "publisher", prefix=prefix).node.publish("tick", {})
        wait_until(lambda: errors, what="the receiver fails")

    assert "stop() was called from a thread of the bus" in str(errors[0])


def test_slow_receivers_run_side_by_side_with_more_concurrency(
    shared_redis: RedisServer, make_bus: Make, prefix: str
) -> None:
    bus = make_bus(shared_redis.url, "consumer", prefix=prefix, concurrency=4)
    together = threading.Barrier(4, timeout=10)
    passed: list[int] = []

    @bus.on("tick")
    def receive(sender: str, n: int) -> None:
        together.wait()
        passed.append(n)

    bus.start()
    assert bus.ready(10)
    publisher = make_bus(shared_redis.url, "publisher", prefix=prefix, publish=["tick"])
    for n in range(4):
        publisher.signal("tick").send("test", n=n)

    wait_until(lambda: sorted(passed) == [0, 1, 2, 3], what="four receivers met")


def test_a_slow_receiver_does_not_make_redis_cut_the_connection(
    redis_server: RedisServer, make_bus: Make
) -> None:
    client = redis_server.client
    client.config_set("client-output-buffer-limit", "pubsub 4mb 4mb 1")
    bus = make_bus(redis_server.url, "consumer")
    release = threading.Event()
    received: list[int] = []
    reported: list[int] = []

    @bus.on("tick")
    def receive(sender: str, n: int, s: str) -> None:
        release.wait(30)
        received.append(n)

    def note(sender: str, where: str, count: int) -> None:
        reported.append(count)

    bus.start()
    assert bus.ready(10)
    publisher = make_bus(redis_server.url, "publisher", publish=["tick"], buffer_size=100_000)
    with signals.events_dropped.connected_to(note, sender="consumer"):
        for n in range(12_000):
            publisher.signal("tick").send("test", n=n, s="x" * 500)
        assert publisher.flush(30)
        wait_until(
            lambda: bus.health().counts["received"] == 12_000, what="everything is read meanwhile"
        )
        release.set()
        wait_until(lambda: received[-1:] == [11_999], what="the last event is handled")
        wait_until(wait_until_sent, what="all receivers have run")

    # What did not fit was dropped from the old end, counted and told; nothing was cut off.
    assert len(received) + sum(reported) == 12_000
    assert bus.health().counts["dropped"] == sum(reported)
    assert bus.health().missed == 0


def test_the_event_queue_is_bounded_in_bytes_too() -> None:
    changed = threading.Condition()
    queue = EventQueue(changed, changed, most_events=100, most_bytes=1_000)
    event: Any = object()

    assert queue.put([event] * 2, [400] * 2) == 0
    assert queue.put([event], [400]) == 1
    assert queue.put([event], [5_000]) == 2  # one that is larger than all stays alone
    assert len(queue) == 1


def test_a_thread_takes_only_a_few_large_events_at_once() -> None:
    changed = threading.Condition()
    queue = EventQueue(changed, changed)
    event: Any = object()
    queue.put([event] * 64, [400_000] * 64)

    assert len(queue.pick()) == 3


OWN_HANDLER = """
import os, signal, sys, threading, time
from flask_eventbus import Bus

# A signal handler must not print: it may interrupt another print.
def say(words):
    os.write(1, words + b"\\n")

bus = Bus({url!r}, service="consumer", prefix={prefix!r}, grace={grace}, publish=["bye"])
bus.on("bye", echo=True)(lambda sender, number: say(b"bye"))

def handle(number, frame):
    say(b"handler")
    bus.signal("bye").send(number=1)
    {end}

def say_when_it_runs():
    while signal.getsignal(signal.SIGTERM) is handle:
        time.sleep(0.01)

    say(b"ready")

signal.signal(signal.SIGTERM, handle)
bus.start()
bus.ready(10)
threading.Thread(target=say_when_it_runs).start()
bus.run()
say(b"ended")
"""


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(3)", 3)], ids=["returns", "exits"]
)
def test_run_calls_a_signal_handler_set_before_it(
    start: Callable[..., Program], end: str, code: int
) -> None:
    program = start(OWN_HANDLER.replace("{end}", end))
    program.wait_for("ready")

    program.process.send_signal(signal.SIGTERM)

    assert program.end() == code
    assert program.lines.count("handler") == 1
    assert ("ended" in program.lines) == (code == 0)


PUBLISHER = """
import time
from flask_eventbus import Bus

bus = Bus("redis://127.0.0.1:9/0", service="consumer", publish={{"paid": {{"confirm": False}}}})
bus.signal("paid").send(number=1)
print("sent", flush=True)
time.sleep(60)
"""


def test_sigterm_logs_the_ids_a_script_could_not_publish(start: Callable[..., Program]) -> None:
    program = start(PUBLISHER)
    program.wait_for("sent")

    program.process.send_signal(signal.SIGTERM)

    assert program.end() == -signal.SIGTERM
    assert any("1 events were not published before the end" in line for line in program.lines)


def test_sigterm_ends_a_process_that_has_reached_its_limit_of_threads(
    start: Callable[..., Program],
) -> None:
    limit = """
import _thread

def refuse(*arguments):
    raise RuntimeError("can't start new thread")

_thread.start_new_thread = refuse
"""
    program = start(PUBLISHER.replace('print("sent"', f'{limit}\nprint("sent"'))
    program.wait_for("sent")

    program.process.send_signal(signal.SIGTERM)

    assert program.end() == 128 + signal.SIGTERM
    assert any("1 events were not published before the end" in line for line in program.lines)


LATE = """
import os, threading, time
from flask_eventbus import Bus

bus = Bus("redis://127.0.0.1:9/0", service="consumer", publish={{"paid": {{"confirm": False}}}})
bus.signal("paid").send(number=1)
before = bus.node._publisher

def send_late():
    while bus.node._publisher is before:
        time.sleep(0.01)

    bus.signal("paid").send(number=2)
    print("late", bus.health().node, flush=True)

threading.Thread(target=send_late, daemon=True).start()
{end}
"""


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), 15); time.sleep(60)", ""], ids=["by SIGTERM", "by itself"]
)
def test_events_sent_while_a_process_ends_are_logged_too(
    start: Callable[..., Program], end: str
) -> None:
    program = start(LATE.replace("{end}", end))

    program.end()

    node = next(line.split()[1] for line in program.lines if line.startswith("late"))
    assert sum("1 events were not published" in line for line in program.lines) == 2
    assert any(line.endswith(f"paid {node}-1") for line in program.lines)


GEVENT = """
from gevent import monkey
monkey.patch_all()
import gevent, signal

def watch_handler():
    while getattr(signal.getsignal(signal.SIGTERM), "__name__", "") != "HANDLER":
        gevent.sleep(0.05)

    print("handled", flush=True)

gevent.spawn(watch_handler)
"""


@pytest.mark.parametrize(
    ("text", "handler", "code"),
    [(PUBLISHER, "end_by_signal", -signal.SIGTERM), (CONSUMER, "end", 0)],
    ids=["script", "run"],
)
def test_a_termination_signal_while_all_greenlets_wait_raises_no_error(
    start: Callable[..., Program], text: str, handler: str, code: int
) -> None:
    program = start(GEVENT.replace("HANDLER", handler) + text)
    program.wait_for("handled")

    program.process.send_signal(signal.SIGTERM)

    assert program.end() == code
    assert not any("Traceback" in line or "gevent.exceptions" in line for line in program.lines)


#: Linux does not let a signal end the first process of a container by its default.
FIRST_OF_A_CONTAINER = """
import os
os.getpid = lambda: 1
os.kill = lambda process, number: None
"""


def test_sigterm_ends_a_process_with_pid_1(start: Callable[..., Program]) -> None:
    program = start(FIRST_OF_A_CONTAINER + PUBLISHER)
    program.wait_for("sent")

    program.process.send_signal(signal.SIGTERM)

    assert program.end() == 128 + signal.SIGTERM
    assert any("1 events were not published before the end" in line for line in program.lines)


def test_a_sigterm_handler_of_the_program_is_kept(
    start: Callable[..., Program],
) -> None:
    program = start(
        "import signal\n"
        "from flask_eventbus import Bus\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "bus = Bus({url!r}, service='consumer', prefix={prefix!r})\n"
        "print(signal.getsignal(signal.SIGTERM).name, flush=True)\n"
    )

    assert program.end() == 0
    assert program.lines == ["SIG_IGN"]
