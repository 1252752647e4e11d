"""Real stacks as a user starts them: processes, on any free ports, in a home of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedded.parts import ROOT
from runtime.home import Home, end_processes, is_alive

PORTS = {f"HELIOSTAT_{name}_PORT": "0" for name in ("API", "TEMPORAL", "UI", "BUCKET", "METRICS", "SDK_METRICS")}


def eventually(what: Callable[[], Any], timeout: float = 60) -> Any:
    """What it gives, as soon as that is true."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout} s")


class StackUnderTest:
    def __init__(self, path: Path, **env: str) -> None:
        self.home = Home(path)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HELIOSTAT_", "TEMPORAL_"))}
        self.env = clean | PORTS | {"HELIOSTAT_HOME": str(self.home.path)} | env

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "embedded.stack", *command],
            cwd=ROOT,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def up(self) -> StackUnderTest:
        self.run("up", DETACH="1")  # as `make up DETACH=1`
        return self

    def stop(self) -> None:
        """Ctrl-C."""
        pid = self.home.stack_pid()
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        eventually(lambda: not is_alive(pid))

    def kill_everything(self) -> None:
        """As the end of a machine would, the supervisor first so that it can't heal the rest."""
        for pid in (self.pids["stack"], *self.home.processes()):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.home.processes())

    @property
    def state(self) -> dict[str, Any]:
        return self.home.state()

    @property
    def pids(self) -> dict[str, int]:
        found: dict[str, int] = self.state["pids"]
        return found

    @property
    def token(self) -> str:
        return self.home.token_file.read_text().strip()

    def api(self, method: str, path: str, **kw: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}", **kw.pop("headers", {})}
        url = self.state["api_url"] + path
        return httpx.request(method, url, headers=headers, timeout=30, trust_env=False, **kw)

    def is_ready(self) -> bool:
        try:
            return self.api("GET", "/readyz").is_success
        except httpx.HTTPError:
            return False

    def cli(self, *command: str, timeout: float = 150, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "heliostat", *command],
            cwd=ROOT,
            env=self.env | {"HELIOSTAT_HOST": self.state["api_url"], "HELIOSTAT_TOKEN": self.token},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("job", "status", name, "-o", "json").stdout)
        return found

    def end(self) -> None:
        """Whatever state a test left it in: nothing of it lives afterwards."""
        pid = self.home.stack_pid()
        end_processes([pid] if pid else [], grace_s=60)
        end_processes(self.home.processes(), grace_s=5)
        subprocess.run([sys.executable, "-m", "clouds.local", "end"], cwd=ROOT, env=self.env, check=True, timeout=90)


@pytest.fixture
def make_stack(tmp_path: Path) -> Iterator[Callable[..., StackUnderTest]]:
    """Stacks on the fake cloud unless told otherwise, ended after the test."""
    made: list[StackUnderTest] = []

    def make(name: str = "home", **env: str) -> StackUnderTest:
        made.append(StackUnderTest(tmp_path / name, **({"HELIOSTAT_FAKE_CLOUD": "1"} | env)))
        return made[-1]

    yield make
    for stack in made:
        stack.end()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackUnderTest]:
    """One stack on the fake cloud for all tests of a module that leave it as it was."""
    stack = StackUnderTest(tmp_path_factory.mktemp("stack") / "home", HELIOSTAT_FAKE_CLOUD="1")
    try:
        yield stack.up()
    finally:
        stack.end()
