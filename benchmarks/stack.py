"""A stack of its own for each benchmark: a temporary home, free ports, ended whatever happens."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from clouds.fake.agent import Behaviour, FakeFleet
from runtime.home import Home

ROOT = Path(__file__).resolve().parent.parent
PORTS = ("API", "TEMPORAL", "UI", "BUCKET", "METRICS", "SDK_METRICS")
POLL_S = 0.05


@dataclass
class Stack:
    home: Home
    env: dict[str, str]
    http: httpx.AsyncClient
    temporal: Client

    def pid(self, part: str) -> int:
        return int(self.home.state()["pids"][part])

    def cpu_s(self, part: str) -> float:
        """Processor seconds of one part so far."""
        fields = Path(f"/proc/{self.pid(part)}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self, part: str) -> float:
        for line in Path(f"/proc/{self.pid(part)}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError(f"{part} has no memory: it has ended")

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.http.post(path, json=body)
        if not answer.is_success:
            raise RuntimeError(f"POST {path}: {answer.status_code} {answer.text[:500]}")
        found: dict[str, Any] = answer.json()
        return found

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        answer = await self.http.get(path, params=params)
        if not answer.is_success:
            raise RuntimeError(f"GET {path}: {answer.status_code} {answer.text[:500]}")
        found: dict[str, Any] = answer.json()
        return found

    async def until(self, path: str, wanted: str, timeout_s: float = 300) -> dict[str, Any]:
        """Polls a resource as a client does until its state is ``wanted``. Raises when it is settled otherwise."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = await self.get(path)
            if found["state"] == wanted:
                return found
            if found["state"] in ("FAILED", "TERMINATED", "SUCCEEDED") or time.monotonic() > deadline:
                raise RuntimeError(f"{path} is {found['state']}, not {wanted}: {found['reason']} {found['waits_for']}")
            await asyncio.sleep(POLL_S)

    async def cluster(self, name: str, workers: int = 0, timeout_s: float = 300) -> str:
        """A running cluster; its id."""
        made = await self.post("/v1/clusters", {"name": name, "compute_config": compute_config(workers)})
        await self.until(f"/v1/clusters/{made['id']}", "RUNNING", timeout_s)
        return str(made["id"])


def compute_config(workers: int) -> dict[str, Any]:
    groups = [{"name": "small", "resources": {"CPU": 1}, "min_nodes": workers, "max_nodes": max(1, workers)}]
    return {"head_node": {"resources": {"CPU": 1}}, "worker_nodes": groups if workers else []}


@asynccontextmanager
async def running(*, fake: Behaviour | None = None, **settings: str) -> AsyncIterator[tuple[Stack, FakeFleet | None]]:
    """A stack that is ready. ``fake``: on the fake cloud, with fake agents in this process that behave so."""
    scratch = Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp"))
    home = Home(scratch / "h")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HELIOSTAT_", "TEMPORAL_"))}
    env |= {f"HELIOSTAT_{name}_PORT": "0" for name in PORTS}
    env |= {"HELIOSTAT_HOME": str(home.path), "HELIOSTAT_LOG_LEVEL": "WARNING"} | settings
    if fake is not None:
        (scratch / "machines").mkdir()
        env["HELIOSTAT_FAKE_CLOUD"] = str(scratch / "machines")
    watching = fleet = None
    try:
        _stack(env, "up", "--detach")
        state = home.state()
        token = home.token_file.read_text().strip()
        many = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {token}"}
        tls = ssl.create_default_context()  # 20 ms each, and not needed
        async with httpx.AsyncClient(base_url=state["api_url"], headers=headers, timeout=60, limits=many) as http:
            if fake is not None:
                fleet = FakeFleet(lambda: httpx.AsyncClient(verify=tls), fake)
                watching = asyncio.create_task(fleet.watch(scratch / "machines"))
            temporal = await Client.connect(state["temporal_address"], data_converter=pydantic_data_converter)
            yield Stack(home, env, http, temporal), fleet
            if fleet is not None and fleet.errors:
                raise RuntimeError(f"a fake agent failed: {fleet.errors[0]!r}")
            if watching is not None:
                watching.cancel()
            if fleet is not None:
                await fleet.stop()
    finally:
        if fake is None:
            _stack(env, "down")  # its machines are processes: they end in order
        else:
            _kill(home)
        shutil.rmtree(scratch, ignore_errors=True)


def _stack(env: dict[str, str], *command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embedded.stack", *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"stack {' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


def _kill(home: Home) -> None:
    """Nothing of a fake cloud outlives its control plane, so a backlog need not be worked off first."""
    pids = [p for p in (home.stack_pid(), *home.processes()) if p is not None]
    for pid in pids:  # the supervisor first: it would start the others again
        for number in (signal.SIGKILL, signal.SIGCONT):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
    deadline = time.monotonic() + 10
    while home.processes() and time.monotonic() < deadline:
        time.sleep(0.05)


async def timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    await work()
    return time.monotonic() - began
