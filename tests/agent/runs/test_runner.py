from __future__ import annotations

import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from agent import processes
from agent.constants import Constants
from agent.events import Events
from agent.journal import Journal
from agent.runs.runner import MAX_FAILED_POLLS, Run, Runs
from tests.agent.conftest import until
from tests.agent.scripted_ray import Ray


def test_the_end_of_a_run_waits_for_what_dies_late(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL ends a process when it is next given a processor."""
    unused = cast(Any, None)
    runs = Runs(Ray(), events, unused, unused, Journal(tmp_path / "r"), Constants(), tmp_path, f"MARK={tmp_path}")
    kill, late = processes.kill, threading.Event()
    threading.Timer(0.8, late.set).start()
    monkeypatch.setattr(processes, "kill", lambda victims: kill(victims) if late.is_set() else None)
    with subprocess.Popen(["sleep", "1000"], env={"MARK": str(tmp_path), "HELIOSTAT_RUN_ID": "j-1"}) as left:
        try:
            until(lambda: processes.command(left.pid) == "sleep 1000")
            runs._kill_remaining("j-1")
            assert late.is_set(), "it went on while the process lived"
            assert left.wait(30) == -signal.SIGKILL
        finally:
            left.kill()


def test_a_run_that_can_never_be_polled_ends_the_node_and_not_at_once(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = replace(Constants(), run_poll_old_s=0.001)
    unused = cast(Any, None)
    runs = Runs(Ray(), events, unused, unused, Journal(tmp_path / "r"), constants, tmp_path, "mark")
    sick, well = Run("j-1", None, [], submitted=True), Run("j-2", None, [], submitted=True)
    runs._active = {run.id: run for run in (sick, well)}
    polls: list[str] = []

    def poll(run: Run) -> None:
        polls.append(run.id)
        run.next_poll = 0
        if run is sick:
            raise KeyError("status")

    monkeypatch.setattr(runs, "_poll", poll)
    with pytest.raises(KeyError):
        runs.watch(threading.Event())
    assert polls.count("j-1") == MAX_FAILED_POLLS
    assert polls.count("j-2") >= MAX_FAILED_POLLS - 1, "the others are polled meanwhile"
