"""The node's first process: whoever is killed, nothing below stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent import processes
from tests.agent.conftest import ROOT, UNSHARE, namespaces_work, until

AGENT = """
import os, subprocess, sys, time
from pathlib import Path
from agent import init
from agent.boot import Boot, Ports
from agent.constants import Constants
boot = Boot("http://127.0.0.1:1", "nd_init_{tag}", 1, "x", "127.0.0.1", Ports.of(20000), Path({folder!r}), Constants())
def agent():
    env = {{**os.environ, "HELIOSTAT_NODE_DIR": str(boot.node_dir)}}
    bare = {{"PATH": os.environ["PATH"]}}
    # an orphan in a session of its own, as Ray starts job drivers, with a child of its own
    subprocess.Popen(["sh", "-c", "sleep 1234 & exec sleep 1234"], env=env, start_new_session=True)
    # a double fork that forgot its environment
    subprocess.run(["sh", "-c", "setsid sleep 1234 &"], env=bare)
    subprocess.Popen(["sleep", "1234"], env=env)
    {first}
    Path({folder!r}, "ready").touch()
    {body}
sys.exit(init.run(boot, agent))
"""


class Started:
    def __init__(
        self, folder: Path, isolate: bool, body: str = "time.sleep(1000)", supervised: bool = False, first: str = ""
    ) -> None:
        """``first``: what the agent does before it is ready; ``body``: afterwards."""
        self.tag = f"{os.getpid()}_{os.urandom(3).hex()}"
        script = folder / "agent_script.py"
        script.write_text(AGENT.format(folder=str(folder), tag=self.tag, body=body, first=first))
        prefix = UNSHARE if isolate else []
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if supervised:  # by a process with the same mark, as on the local cloud
            env["HELIOSTAT_NODE_DIR"] = str(folder)
            prefix = ["sh", "-c", '"$@"; exit $?', "sh"]
        self.process = subprocess.Popen([*prefix, sys.executable, str(script)], env=env)
        until((folder / "ready").exists, why="the agent's children")
        self.init = self.process.pid
        if isolate or supervised:
            self.init = until(lambda: next(iter(processes.descendants(self.process.pid)), None))
        self.agent = next(p for p in processes.descendants(self.init) if "agent_script" in processes.command(p))
        self.sleeps = until(lambda: s if len(s := self._sleeps()) == 4 else None, why="four sleeps")

    def _sleeps(self) -> list[int]:
        return [p for p in processes.descendants(self.process.pid) if processes.command(p) == "sleep 1234"]

    def gone(self) -> None:
        until(lambda: not any(processes.alive(p) for p in [self.init, self.agent, *self.sleeps]), why="all dead")

    def close(self) -> None:
        processes.kill([p for p in [self.process.pid, self.init, self.agent, *self.sleeps] if processes.alive(p)])
        self.process.wait(30)


@pytest.fixture(params=["namespace", "process"])
def isolate(request: pytest.FixtureRequest) -> bool:
    if request.param == "namespace" and not namespaces_work():
        pytest.skip("this kernel lets an ordinary user make no user and PID namespace")
    return bool(request.param == "namespace")


def test_kill_9_of_the_agent_ends_everything_below(tmp_path: Path, isolate: bool) -> None:
    started = Started(tmp_path, isolate)
    try:
        os.kill(started.agent, signal.SIGKILL)
        started.gone()
        assert started.process.wait(30) == 128 + signal.SIGKILL
    finally:
        started.close()


def test_kill_9_of_init_ends_the_agent(tmp_path: Path, isolate: bool) -> None:
    started = Started(tmp_path, isolate)
    try:
        os.kill(started.init, signal.SIGKILL)
        until(lambda: not processes.alive(started.agent), why="the agent dies with its init")
        if isolate:
            started.gone()
    finally:
        started.close()


def test_sigterm_reaches_the_agent_and_its_exit_code_comes_back(tmp_path: Path, isolate: bool) -> None:
    handler = "import signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(5))"
    started = Started(tmp_path, isolate, first=handler)
    try:
        os.kill(started.init, signal.SIGTERM)
        started.gone()
        assert started.process.wait(30) == 5
    finally:
        started.close()


def test_init_takes_in_orphans(tmp_path: Path, isolate: bool) -> None:
    body = """for _ in range(20): subprocess.run(["sh", "-c", "sleep 0.01 &"])
    time.sleep(1000)"""
    started = Started(tmp_path, isolate, body)

    def zombies() -> list[int]:
        found = []
        for pid in processes.pids():
            stat = processes._stat(pid)
            if stat and stat[0] == "Z" and int(stat[1]) == started.init:
                found.append(pid)
        return found

    try:
        until(lambda: "sh" not in str([processes.command(p) for p in processes.descendants(started.init)]))
        until(lambda: not zombies(), why="no zombie stays with init")
    finally:
        started.close()


def test_processes_of_others_are_spared(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "1234"], env={**os.environ, "HELIOSTAT_NODE_DIR": str(tmp_path / "other")})
    started = Started(tmp_path, isolate=False)
    try:
        os.kill(started.agent, signal.SIGKILL)
        started.gone()
        assert other.poll() is None
    finally:
        started.close()
        other.kill()
        other.wait()


def test_a_supervisor_with_the_nodes_mark_is_spared_and_hears_the_end(tmp_path: Path) -> None:
    started = Started(tmp_path, isolate=False, supervised=True)
    try:
        os.kill(started.agent, signal.SIGKILL)
        started.gone()
        assert started.process.wait(30) == 128 + signal.SIGKILL  # said by the supervisor itself, not killed by signal 9
    finally:
        started.close()
