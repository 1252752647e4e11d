"""Ray started by hand, with the very flags and environment that our agent uses, on addresses of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import httpx

from agent.boot import Boot, Ports
from agent.constants import Constants
from agent.ray_node.process import accepts, arguments, environment, token_path
from clouds.local.machines.host import namespaces_work
from clouds.local.machines.supervisor import NAMESPACE


class BareRay:
    """A head and one worker, started as a person would who wastes no moment: the worker as soon as the head's
    GCS listens. ``async with`` it; ``start`` returns when Ray says that both are alive."""

    def __init__(self) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="hbr-", dir="/tmp"))
        self._token = secrets.token_hex(32)
        self._leaders: list[subprocess.Popen[bytes]] = []
        self._wrap = NAMESPACE if namespaces_work() else []

    async def __aenter__(self) -> BareRay:
        return self

    async def start(self) -> None:
        head = self._boot("head", "127.121.7.1", 27100)
        self._spawn(head, {"role": "head", "group": "head", "resources": {"CPU": 1}})
        address = f"{head.ip}:{head.ports.gcs}"
        while not accepts(address):
            self._check()
            await asyncio.sleep(0.02)
        worker = self._boot("worker", "127.121.7.2", 27200)
        self._spawn(worker, {"role": "worker", "group": "small", "resources": {"CPU": 1}}, address)
        url = f"http://{head.ip}:{head.ports.dashboard}/api/v0/nodes"
        headers = {"authorization": f"Bearer {self._token}"}
        async with httpx.AsyncClient(headers=headers, timeout=5, trust_env=False) as http:
            while await self._alive(http, url) < 2:
                self._check()
                await asyncio.sleep(0.05)

    async def _alive(self, http: httpx.AsyncClient, url: str) -> int:
        try:
            answer = await http.get(url)
        except httpx.TransportError:
            return 0
        if not answer.is_success:
            return 0
        return sum(node["state"] == "ALIVE" for node in answer.json()["data"]["result"]["result"])

    def _boot(self, name: str, ip: str, base: int) -> Boot:
        boot = Boot(
            api_url="",
            node_id=f"bare-{name}",
            generation=1,
            bootstrap_token="",
            ip=ip,
            ports=Ports.of(base),
            node_dir=self._dir / name,
            constants=Constants(),
        )
        boot.make_dirs()
        token_path(boot).write_text(self._token)
        return boot

    def _spawn(self, boot: Boot, config: dict[str, Any], head_address: str = "") -> None:
        head = config["role"] == "head"
        with (boot.node_dir / "out").open("wb") as out:
            leader = subprocess.Popen(
                [*self._wrap, *arguments(boot, config, head_address, None)],
                env=environment(boot, config["group"], head, autoscaling=False),
                cwd=boot.node_dir,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._leaders.append(leader)

    def _check(self) -> None:
        for leader in self._leaders:
            if leader.poll() is not None:
                said = "\n".join(p.read_text()[-2000:] for p in self._dir.glob("*/out"))
                raise RuntimeError(f"ray start ended with {leader.returncode}\n{said}")

    async def __aexit__(self, *_: object) -> None:
        for leader in reversed(self._leaders):
            try:
                os.killpg(leader.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            leader.wait()
        for name in ("head", "worker"):
            link = self._boot(name, "", 1).temp_dir
            if link.is_symlink():
                link.unlink()
        shutil.rmtree(self._dir, ignore_errors=True)
