"""Exactly one listener in each process that serves, and none elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from programs import Program, Service, get
from servers import RedisServer, free_port
from waiting import wait_until

from flask_eventbus import Bus

pytestmark = pytest.mark.second_look("starts, reloads and kills web servers with several workers")

APP = """
from serving_app.app import bus, create_app, shouted

app = create_app()
"""

FLASK = ["-m", "flask"]
FLASK_RUN = [*FLASK, "run", "--port", "0"]
GUNICORN = ["-m", "gunicorn", "--no-control-socket", "--bind", "127.0.0.1:0", "app:app"]

#: Ways to serve the app with one process.
ONE_PROCESS = [
    pytest.param(FLASK_RUN, id="flask run"),
    pytest.param([*GUNICORN, "-k", "sync"], id="gunicorn"),
]


class Tripwire:
    """An address where Redis could be, that tells whether anybody knocked."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.url = f"redis://127.0.0.1:{self._socket.getsockname()[1]}/0"

    @property
    def touched(self) -> bool:
        """Return True if a client has connected."""
        try:
            self._socket.accept()[0].close()
        except BlockingIOError:
            return False

        return True

    def close(self) -> None:
        """Take the address away."""
        self._socket.close()


@pytest.fixture
def service(tmp_path: Path, shared_redis: RedisServer) -> Iterator[Service]:
    """A service on the server that tests share."""
    service = Service(tmp_path, shared_redis)
    service.write("app.py", APP)
    yield service
    service.end()


@pytest.fixture
def lonely_service(tmp_path: Path, redis_server: RedisServer) -> Iterator[Service]:
    """A service with a server of its own, to be hung."""
    service = Service(tmp_path, redis_server)
    service.write("app.py", APP)
    yield service
    redis_server.resume()
    service.end()


@pytest.fixture
def tripwire() -> Iterator[Tripwire]:
    """An address that nobody is to connect to."""
    tripwire = Tripwire()
    yield tripwire
    tripwire.close()


def touch(path: Path) -> None:
    """Change a file's time, so that a reloader sees it changed."""
    later = path.stat().st_mtime + 2
    os.utime(path, (later, later))


def workers_leave(program: Program) -> None:
    """Wait until a gunicorn worker has left its main loop."""
    wait_until(lambda: "Worker exiting" in program.output, what="a worker leaves")


# -- the development server ---------------------------------------------------------------


def test_flask_run_listens_in_its_one_process(service: Service) -> None:
    program = service.run(*FLASK_RUN)

    assert service.receiving_processes(1) == {program.pid}


def test_flask_run_with_the_reloader_listens_only_in_a_child_that_has_loaded_the_app(
    service: Service,
) -> None:
    program = service.run(*FLASK_RUN, "--debug")
    (first,) = service.receiving_processes(1)

    service.write("app.py", f"{APP}\nraise RuntimeError('half of it')")
    wait_until(lambda: "half of it" in program.output, what="the change is noticed")

    with pytest.raises(urllib.error.HTTPError, match="500"):
        program.get()

    assert not service.nodes("pubsub")

    touch(service.write("app.py", APP))

    (second,) = service.receiving_processes(1)
    assert len({program.pid, first, second}) == 3
    assert {line["parent"] for line in service.reports("called")} == {program.pid}


@pytest.mark.parametrize("reloads", [False, True])
def test_app_run_listens_before_the_first_request(service: Service, reloads: bool) -> None:
    service.write("app.py", f"{APP}\napp.run(port=0, use_reloader={reloads})")

    program = service.run("app.py")

    (process,) = service.receiving_processes(1)
    assert (process != program.pid) == reloads


# -- gunicorn -----------------------------------------------------------------------------


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_each_worker_of_gunicorn_listens_and_the_master_does_not(
    service: Service, worker: str, preload: list[str]
) -> None:
    program = service.run(*GUNICORN, "-k", worker, "-w", "2", *preload)

    workers = service.receiving_processes(2)

    assert program.pid not in workers
    assert {line["parent"] for line in service.reports("called")} == {program.pid}
    assert int(program.get()) in workers


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_after_a_reload_of_gunicorn_only_the_new_workers_listen(
    service: Service, preload: list[str]
) -> None:
    program = service.run(*GUNICORN, "-w", "2", *preload)
    old = service.receiving_processes(2)
    before = service.nodes("pubsub")

    program.send_signal(signal.SIGHUP)
    service.listeners(2, besides=before)

    assert not service.receiving_processes(2) & old


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_the_replacement_of_a_killed_worker_listens(service: Service, preload: list[str]) -> None:
    service.run(*GUNICORN, "-w", "2", *preload)
    killed, spared = service.receiving_processes(2)
    before = service.nodes("pubsub")

    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: service.nodes("pubsub") - before, what="the replacement listens")

    after = service.receiving_processes(2)
    assert spared in after
    assert killed not in after


def test_the_replacement_of_a_worker_that_reached_max_requests_listens(service: Service) -> None:
    program = service.run(*GUNICORN, "--max-requests", "2")
    old = service.receiving_processes(1)
    before = service.nodes("pubsub")

    program.get()
    program.get()
    service.listeners(1, besides=before)

    assert not service.receiving_processes(1) & old


def test_an_app_created_before_gunicorn_forks_listens_in_the_workers(
    service: Service,
) -> None:
    service.write(
        "serve.py",
        f"""{APP}
from gunicorn.app.base import BaseApplication


class Served(BaseApplication):
    def load_config(self):
        self.cfg.set("bind", "127.0.0.1:0")
        self.cfg.set("workers", 2)
        self.cfg.set("control_socket_disable", True)

    def load(self):
        return app


Served().run()
""",
    )

    program = service.run("serve.py")

    assert program.pid not in service.receiving_processes(2)


def test_the_hooks_of_a_gunicorn_configuration_still_run(service: Service) -> None:
    service.write(
        "gunicorn.conf.py",
        """
from app import app  # as somebody does who shares settings: earlier than gunicorn would
from serving_app.reports import report

def post_worker_init(worker):
    report("begun")

def worker_exit(server, worker):
    report("ended")
""",
    )
    program = service.run(*GUNICORN)

    (worker,) = service.receiving_processes(1)
    program.send_signal(signal.SIGTERM)

    assert program.end() == 0
    assert [line["pid"] for line in service.reports("begun")] == [worker]
    assert [line["pid"] for line in service.reports("ended")] == [worker]


def test_checking_a_gunicorn_configuration_opens_no_connection(
    service: Service, tripwire: Tripwire
) -> None:
    program = service.run(*GUNICORN, "--check-config", FLASK_EVENTBUS_URL=tripwire.url)

    assert program.end() == 0
    assert not tripwire.touched


# -- the end of a worker ------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_running_receivers_finish_before_their_worker_ends(service: Service, worker: str) -> None:
    program = service.run(*GUNICORN, "-k", worker, FLASK_EVENTBUS_CONCURRENCY="2")
    service.listeners(1)

    for what in ("held", "awaited"):
        service.publish(what)
        service.wait_for(what)

    program.send_signal(signal.SIGTERM)
    workers_leave(program)
    service.release.touch()

    assert program.end() == 0
    assert service.reports("held to the end")
    assert service.reports("awaited to the end")
    assert "Traceback" not in program.output


def test_a_receiver_that_does_not_finish_is_abandoned_after_the_grace(service: Service) -> None:
    program = service.run(*GUNICORN, FLASK_EVENTBUS_GRACE="0.1")
    service.listeners(1)
    service.publish("held")
    service.wait_for("held")

    program.send_signal(signal.SIGTERM)

    assert program.end() == 0
    assert "Receivers were still running after the grace of 0.1 s" in program.output
    assert not service.reports("held to the end")


@pytest.mark.parametrize("worker", ["sync", "gevent"])
def test_buffered_events_are_published_before_the_worker_ends(
    lonely_service: Service, worker: str
) -> None:
    service, server = lonely_service, lonely_service.server
    program = service.run(*GUNICORN, "-k", worker)
    arrived: list[int] = []
    other = Bus(server.url, service="other", prefix=service.name)
    other.on("shouted")(lambda sender, number: arrived.append(number))
    other.start()
    assert other.ready(5)
    service.listeners(1)

    server.hang()
    program.get("/shout/5", method="POST")
    program.send_signal(signal.SIGTERM)
    workers_leave(program)
    server.resume()

    assert program.end() == 0
    wait_until(lambda: len(arrived) == 5, what="all five arrive")
    other.stop(flush=0)
    assert arrived == [0, 1, 2, 3, 4]


# -- a server that leaves SIGTERM at its default ------------------------------------------

WAITRESS = ["-m", "waitress", "--listen", "127.0.0.1:0", "app:app"]


@pytest.mark.parametrize("server", [FLASK_RUN, WAITRESS], ids=["flask run", "waitress"])
def test_sigterm_publishes_buffered_events_before_the_process_ends(
    lonely_service: Service, server: list[str]
) -> None:
    service, redis = lonely_service, lonely_service.server
    program = service.run(*server, FLASK_EVENTBUS_PUBLISH='{"shouted": "stream"}')
    program.get()
    service.listeners(1)
    redis.hang()
    program.get("/shout/3", method="POST")

    program.send_signal(signal.SIGTERM)
    wait_until(lambda: not catches_sigterm(program), what="the signal is taken")
    redis.resume()

    assert program.end() == -signal.SIGTERM
    client: Any = redis.client
    assert client.xlen(f"{service.name}:{{shouted}}:stream") == 3


def test_sigterm_logs_the_ids_of_unpublished_events(service: Service) -> None:
    settings = {"FLASK_EVENTBUS_PUBLISH": '{"shouted": "stream"}'}
    program = service.run(*FLASK_RUN, FLASK_EVENTBUS_URL="redis://127.0.0.1:9/0", **settings)
    program.get("/shout/3", method="POST")

    program.send_signal(signal.SIGTERM)

    assert program.end() == -signal.SIGTERM
    assert "3 events were not published before the end" in program.output


def test_a_second_sigterm_ends_the_process_at_once(service: Service) -> None:
    program = service.run(*FLASK_RUN, FLASK_EVENTBUS_URL="redis://127.0.0.1:9/0")
    program.get("/shout/1", method="POST")

    program.send_signal(signal.SIGTERM)
    wait_until(lambda: not catches_sigterm(program), what="the first is taken")
    program.send_signal(signal.SIGTERM)

    assert program.end() == -signal.SIGTERM
    assert "not published" not in program.output


def catches_sigterm(program: Program) -> bool:
    """Return True while the process has a handler of its own for SIGTERM."""
    status = Path(f"/proc/{program.pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    assert caught
    return bool(int(caught[1], 16) >> signal.SIGTERM - 1 & 1)


# -- gevent -------------------------------------------------------------------------------


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_a_gevent_worker_answers_requests_while_receivers_and_redis_block(
    lonely_service: Service, preload: list[str]
) -> None:
    service = lonely_service
    program = service.run(*GUNICORN, "-k", "gevent", *preload, FLASK_EVENTBUS_CONCURRENCY="3")
    service.listeners(1)

    for what in ("held", "awaited", "awaited"):
        service.publish(what)

    service.wait_for("held")
    service.wait_for("awaited", 2)
    assert program.get()

    service.server.hang()
    assert program.get("/shout/5", method="POST")
    assert program.get()

    service.server.resume()
    service.release.touch()
    service.wait_for("held to the end")
    service.wait_for("awaited to the end", 2)
    assert service.receiving_processes(1)


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_concurrent_greenlets_wait_for_room_in_the_buffer(
    service: Service, preload: list[str]
) -> None:
    settings = {"FLASK_EVENTBUS_BUFFER_SIZE": "10", "FLASK_EVENTBUS_TIMEOUT": "10"}
    program = service.run(*GUNICORN, "-k", "gevent", "-w", "2", *preload, **settings)
    service.listeners(2)

    sender = int(program.get("/shout/50/threads/10", method="POST"))

    arrived = service.wait_for("shouted", 500, arrived=True)
    assert len(arrived) == 500
    assert sender not in {line["pid"] for line in arrived}


# -- other servers ------------------------------------------------------------------------


def test_another_server_listens_from_its_first_request(service: Service) -> None:
    service.write(
        "serve.py",
        f"""{APP}
from wsgiref.simple_server import make_server

server = make_server("127.0.0.1", 0, app)
print(f"Serving at http://127.0.0.1:{{server.server_port}}", flush=True)
server.serve_forever()
""",
    )
    program = service.run("serve.py")

    assert program.address
    assert not service.nodes("pubsub")

    program.get()
    program.get()

    assert service.receiving_processes(1) == {program.pid}


def test_another_server_listens_at_once_when_the_app_starts_the_bus(service: Service) -> None:
    service.write("serve.py", f"{APP}\nbus.start(app)\nimport threading\nthreading.Event().wait()")

    program = service.run("serve.py")

    assert service.receiving_processes(1) == {program.pid}


# -- not serving --------------------------------------------------------------------------

REQUESTS = """
with app.test_client() as client:
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"User-Agent": "curl/8"}).status_code == 200

app.testing = True
assert app.test_client().get("/").status_code == 200
app.testing = False

with app.test_request_context("/"):
    app.preprocess_request()

print("listening:", bus.health().listening)
"""


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        pytest.param([*FLASK, "shell"], "from app import bus\n" + REQUESTS, id="flask shell"),
        pytest.param([*FLASK, "routes"], "", id="flask routes"),
        pytest.param([*FLASK, "look"], "", id="command"),
        pytest.param(["-c", f"from app import app, bus\n{REQUESTS}"], "", id="test client"),
        pytest.param(["-c", "import app"], "", id="import"),
    ],
)
def test_a_flask_command_that_does_not_serve_opens_no_connection(
    service: Service, tripwire: Tripwire, command: list[str], typed: str
) -> None:
    program = service.run(*command, FLASK_EVENTBUS_URL=tripwire.url)

    assert program.end(typed=typed) == 0
    assert "Error" not in program.output
    assert "listening: True" not in program.output
    assert not tripwire.touched


def test_an_app_with_testing_does_not_listen_even_in_a_server(
    service: Service, tripwire: Tripwire
) -> None:
    settings = {"FLASK_TESTING": "true", "FLASK_EVENTBUS_URL": tripwire.url}
    program = service.run(*FLASK_RUN, **settings)

    assert program.get()
    assert not tripwire.touched


@pytest.mark.parametrize("command", ONE_PROCESS)
def test_a_service_with_listen_false_still_publishes(service: Service, command: list[str]) -> None:
    program = service.run(*command, FLASK_EVENTBUS_LISTEN="false")

    program.get("/shout/1", method="POST")

    wait_until(lambda: service.nodes("normal"), what="the service publishes")
    assert not service.nodes("pubsub")


@pytest.mark.parametrize("command", ONE_PROCESS)
def test_a_disabled_bus_opens_no_connection(
    service: Service, tripwire: Tripwire, command: list[str]
) -> None:
    settings = {"FLASK_EVENTBUS_ENABLED": "false", "FLASK_EVENTBUS_URL": tripwire.url}
    program = service.run(*command, **settings)

    program.get("/shout/1", method="POST")

    assert not tripwire.touched


# -- the beginning ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ONE_PROCESS)
def test_no_event_arrives_before_the_app_is_loaded(service: Service, command: list[str]) -> None:
    gate = service.folder / "gate"
    service.run(*command, GATE=str(gate))
    service.wait_for("loading")

    service.publish("called", number=-1)
    assert not service.nodes("pubsub")

    gate.touch()
    assert service.receiving_processes(1)
    assert not service.reports("called", number=-1)


@pytest.mark.parametrize("command", ONE_PROCESS)
def test_a_service_starts_without_redis_and_receives_events_once_it_is_up(
    tmp_path: Path, command: list[str]
) -> None:
    server = RedisServer(tmp_path)
    service = Service(tmp_path, server)
    service.write("app.py", APP)

    try:
        program = service.run(*command)
        assert program.get()

        server.start()

        assert service.receiving_processes(1)
    finally:
        service.end()
        server.kill()


def test_workers_share_an_embedded_server_that_ends_with_them(service: Service) -> None:
    home = Path(tempfile.mkdtemp(prefix="eb"))
    settings = {"FLASK_EVENTBUS_URL": "embedded://", "TMPDIR": str(home)}
    program = service.run(*GUNICORN, "-w", "2", **settings)

    def heard_by_the_other() -> bool:
        program.get("/shout/1", method="POST")
        return bool(service.reports("shouted", arrived=True))

    wait_until(heard_by_the_other, what="one worker hears the other")
    program.send_signal(signal.SIGTERM)

    assert program.end() == 0
    wait_until(lambda: not list(home.glob("*/*")), what="the embedded server is gone")
    shutil.rmtree(home)


# -- a server that forks without Python's hooks -------------------------------------------


def test_each_worker_of_uwsgi_is_a_node_of_its_own(service: Service) -> None:
    port = free_port()
    uwsgi = str(Path(sys.executable).with_name("pyuwsgi"))
    options = ["--http-socket", f"127.0.0.1:{port}", "--wsgi-file", "app.py", "--callable", "app"]
    options += ["--master", "--processes", "3", "--enable-threads", "--die-on-term"]
    # The app is loaded before the fork, and has published by then.
    service.write("app.py", f"{APP}\nwith app.app_context():\n    shouted.send(app, number=0)")
    program = service.run(uwsgi, *options, FLASK_EVENTBUS_PUBLISH='{"shouted": "stream"}')
    wait_until(lambda: "spawned uWSGI worker 3" in program.output, what="the workers are there")

    def shout() -> str:
        return get(f"http://127.0.0.1:{port}/shout/1", method="POST")

    wait_until(lambda: shout() and len(service.nodes("pubsub")) == 3, what="each worker answers")

    assert len(service.receiving_processes(3) - {program.pid}) == 3
    redis: Any = service.server.client
    entries = redis.xrange(f"{service.name}:{{shouted}}:stream")
    ids = [msgpack.unpackb(fields[b"event"], timestamp=3)["id"] for _, fields in entries]
    assert len(ids) == len(set(ids))
    assert len({id.rpartition("-")[0] for id in ids}) == 4

    program.send_signal(signal.SIGTERM)
    assert program.end() == 0
