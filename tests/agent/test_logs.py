"""Log chunks: every byte once, whatever the bucket does."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from agent.channel import Channel, Unavailable
from agent.constants import Constants
from agent.logs import LogShipper
from tests.agent.control_plane import ControlPlane

CHUNK = 1000


@pytest.fixture
def shipper(plane: ControlPlane) -> LogShipper:
    plane.add_node("n")
    plane.nodes["n"]["token"] = "t"
    channel = Channel(plane.url)
    channel.token = "t"
    return LogShipper(channel, Constants(log_chunk_bytes=CHUNK, log_follow_s=0.05, log_interval_s=0.2))


def test_chunks_grow_in_place_and_then_the_next_begins(
    plane: ControlPlane, shipper: LogShipper, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    shipper.add("runs/r.log", path)
    shipper.ship()  # no file yet
    assert plane.puts == []
    text = random.Random(1).randbytes(3500)
    for end in (10, 990, 1000, 1001, 3400, 3500, 3500):
        path.write_bytes(text[:end])
        shipper.ship()
        assert plane.log("n", "runs/r.log") == text[:end]
    assert len(plane.bucket) == 4
    assert [n for _, n in plane.puts] == [10, 990, 1000, 1, 1000, 1000, 400, 500]


def test_nothing_is_lost_while_the_bucket_or_the_api_is_away(
    plane: ControlPlane, shipper: LogShipper, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    shipper.add("node/agent.log", path)
    path.write_bytes(b"a" * 1500)
    plane.bucket_down = True
    with pytest.raises(Unavailable):
        shipper.ship()
    assert not shipper.flush(0.2, "node/agent.log")
    assert shipper.pending() == 1500
    plane.bucket_down, plane.down = False, True
    assert not shipper.flush(0.2)
    plane.down = False
    assert shipper.flush(30)
    assert plane.log("n", "node/agent.log") == b"a" * 1500


def test_a_lost_answer_of_the_api_is_harmless(plane: ControlPlane, shipper: LogShipper, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"b" * 2500)
    shipper.add("s", tmp_path / "log")
    plane.lose_answers = 2
    assert shipper.flush(30)
    assert plane.log("n", "s") == b"b" * 2500


def test_a_rotated_file_becomes_another_stream(plane: ControlPlane, shipper: LogShipper, tmp_path: Path) -> None:
    path = tmp_path / "log"
    shipper.add("ray/raylet.out", path)
    path.write_bytes(b"old" * 100)
    shipper.ship()
    path.write_bytes(b"new")
    shipper.ship()
    assert plane.log("n", "ray/raylet.out") == b"old" * 100
    assert plane.log("n", "ray/raylet.out.1") == b"new"


def test_a_bounded_stream_stops_at_its_bound(plane: ControlPlane, shipper: LogShipper, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"c" * 5000)
    shipper.add("ray/worker-1.out", tmp_path / "log", limit=1700)
    shipper.ship()
    assert plane.log("n", "ray/worker-1.out") == b"c" * 1700
    assert shipper.pending() == 0


def test_sessions_are_searched_for_what_is_worth_it_and_holds_no_secret(
    plane: ControlPlane, shipper: LogShipper, tmp_path: Path
) -> None:
    names = ["raylet.out", "monitor.log", "runtime_env_agent.log", "worker-1-2.out", "worker-1-2.err", "dashboard.log"]
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "worker-1-2.err").write_text("")
    shipper.watch_session(lambda: tmp_path)
    shipper._discover()
    shipper.ship()
    streams = {key.split("/", 3)[3].rsplit("/", 1)[0] for key in plane.bucket}
    assert streams == {"ray/raylet.out", "ray/monitor.log", "ray/worker-1-2.out", "ray/dashboard.log"}


def test_following_ships_at_once_and_then_every_interval(
    plane: ControlPlane, shipper: LogShipper, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"1")
    shipper.add("s", path)
    stop = threading.Event()
    thread = threading.Thread(target=shipper.run, args=(stop,))
    thread.start()
    try:
        plane.wait(lambda: plane.bucket)
        shipper.set_follow(True)
        for n in range(2, 6):
            with path.open("ab") as log:
                log.write(b"x")
            plane.wait(lambda n=n: len(plane.log("n", "s")) == n)
    finally:
        stop.set()
        shipper.wake()
        thread.join(30)
    assert not thread.is_alive()
