"""A home's lock, its living parts, its ports, its private files."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded import parts
from heliostat.errors import Conflict
from runtime.home import Home, end_processes, free_port, is_alive, port_is_free, write_private
from runtime.messages.common import SEARCH_ATTRIBUTES
from tests.embedded.conftest import eventually

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    return made


@pytest.fixture
def spawned() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_one_supervisor_at_a_time(home: Home) -> None:
    lock = home.try_lock()
    assert lock is not None
    assert home.try_lock() is None
    assert home.stack_pid() == os.getpid()
    lock.close()
    assert home.stack_pid() is None
    again = home.try_lock()
    assert again is not None
    again.close()


def test_the_lock_dies_with_its_process(home: Home, spawned: list[subprocess.Popen[bytes]]) -> None:
    code = f"from pathlib import Path; from runtime.home import Home; lock = Home(Path({str(home.path)!r})).try_lock()"
    holder = subprocess.Popen([sys.executable, "-c", f"{code}; import time; time.sleep(600)"], cwd=parts.ROOT)
    spawned.append(holder)
    eventually(lambda: home.stack_pid() == holder.pid)
    os.kill(holder.pid, signal.SIGKILL)
    eventually(lambda: home.stack_pid() is None)


def test_parts_are_known_by_what_they_are_not_by_a_file(home: Home, spawned: list[subprocess.Popen[bytes]]) -> None:
    mine = {**os.environ, "HELIOSTAT_HOME": str(home.path), "HELIOSTAT_PART": "api"}
    ours = subprocess.Popen(SLEEP, env=mine, start_new_session=True)
    of_another_home = subprocess.Popen(SLEEP, env={**mine, "HELIOSTAT_HOME": "/elsewhere"}, start_new_session=True)
    child_of_a_part = subprocess.Popen(SLEEP, env=mine)  # no session of its own
    spawned += [ours, of_another_home, child_of_a_part]
    home.write_state({"pids": {"api": of_another_home.pid}})  # stale: the pid is somebody else's by now
    eventually(lambda: home.processes() == {ours.pid: "api"})
    ours.kill()
    ours.wait()
    assert home.processes() == {}


def test_end_processes_kills_what_does_not_listen(spawned: list[subprocess.Popen[bytes]]) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    deaf = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    spawned.append(deaf)
    assert deaf.stdout is not None
    deaf.stdout.readline()
    end_processes([deaf.pid, 2**22 - 1], grace_s=0.2)
    assert not is_alive(deaf.pid)


def test_state_is_private_and_whole(home: Home) -> None:
    home.write_state({"a": 1})
    assert home.state() == {"a": 1}
    assert stat.S_IMODE(home.stack_json.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    with pytest.raises(UnicodeEncodeError):
        write_private(home.stack_json, "half \udc00")
    assert home.state() == {"a": 1}
    assert [path.name for path in home.path.glob(".stack*")] == []


def test_a_home_keeps_its_ports(home: Home) -> None:
    first = home.ports({"api": 0, "ui": 0}, {"api", "ui"})
    assert all(port_is_free(port) for port in first.values())
    home.write_state({"ports": first})
    assert home.ports({"api": 0, "ui": 0}, {"api", "ui"}) == first
    assert home.ports({"api": 8700, "ui": 8233}, set()) == first, "a default must not move what nodes call"
    moved = free_port()
    assert home.ports({"api": moved, "ui": 0}, {"api"})["api"] == moved, "the operator may"


def test_two_who_ask_for_a_port_at_the_same_moment_get_two() -> None:
    """Another process draws the same number before anything listens there."""
    port = free_port()
    assert port_is_free(port)
    code = (
        f"from runtime import home; drawn = iter([{port}, *range(61_000, 65_500)]);"
        "home.random.randint = lambda *_: next(drawn); print(home.free_port())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=parts.ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) != port


@pytest.mark.parametrize(("name", "asked"), [("api", True), ("api", False), ("ui", True)])
def test_a_taken_port_is_an_error_where_it_matters(home: Home, name: str, asked: bool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        if not asked:
            home.write_state({"ports": {name: port}})
        with pytest.raises(Conflict, match=f"port {port} is taken"):
            home.ports({name: port if asked else 0}, {name} if asked else set())


def test_a_port_that_nobody_calls_from_outside_just_moves(home: Home) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        home.write_state({"ports": {"ui": other.getsockname()[1]}})
        assert home.ports({"ui": 0}, set())["ui"] != other.getsockname()[1]


def test_the_names_of_search_attributes() -> None:
    assert sorted(parts.SEARCH_ATTRIBUTES) == sorted(key.name for key in SEARCH_ATTRIBUTES)
