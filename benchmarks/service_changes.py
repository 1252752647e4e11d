"""Requests that fail, under the load of ``rollouts``, while a service changes in every other way."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import Load
from benchmarks.load_kinds import Plan
from benchmarks.services import NAME, Bench, bench, config, load_on, part, version_of
from benchmarks.stats import table
from benchmarks.warm_job import ray_access
from heliostat.models.services import Service

MOVED_S = 300.0
HELD = {"steps": [10, 100], "hold_s": 600}
"""A rollout that stays at its first step until it is told otherwise."""


async def run(**_: Any) -> dict[str, Any]:
    async with bench() as b:
        await b.deploy(config("v1"))
        async with load_on(await b.settled(), plan=Plan(one_text=False)) as load:
            parts = [
                await part(load, "update in place", lambda: _in_place(b)),
                await part(load, "pause, resume, promote", lambda: _pause_and_promote(b)),
                await part(load, "rollback", lambda: _rollback(b)),
                await part(load, "superseded by another deploy", lambda: _supersede(b)),
                await part(load, "tokens rotated", lambda: _rotate(b, load)),
            ]
        first = load.report()
        await b.end()
        await b.deploy(config("v9", workers=2))
        async with load_on(await b.settled()) as load:
            parts.append(await part(load, "worker node drained", lambda: _drain(b)))
        second = load.report()
        await b.end()
    return {
        "rows": [p.row() for p in parts],
        "sent": first.sent + second.sent,
        "failed": first.failed + second.failed,
        "failures": [str(f) for f in first.failures + second.failures],
    }


async def _in_place(b: Bench) -> None:
    await b.deploy(config("v2"), in_place=True)
    await b.one_version()


async def _pause_and_promote(b: Bench) -> None:
    await b.ask(config("v3", rollout=HELD))
    await b.until("the first step", lambda s: s.rollout if s.rollout and s.rollout.percent == 10 else None)
    await b.client.services.rollout(NAME, "pause")
    await b.until("the pause", lambda s: s.rollout if s.rollout and s.rollout.state == "paused" else None)
    await b.client.services.rollout(NAME, "resume")
    await b.client.services.rollout(NAME, "promote", percent=50)
    await b.until("half of the traffic", lambda s: s.rollout if s.rollout and s.rollout.percent == 50 else None)
    await b.client.services.rollout(NAME, "promote")
    await _primary(b, "v3")


async def _rollback(b: Bench) -> None:
    await b.client.services.rollback(NAME)
    await _primary(b, "v2")


async def _supersede(b: Bench) -> None:
    await b.ask(config("v4", rollout=HELD))
    await b.until("the first step", lambda s: s.rollout if s.rollout and s.rollout.percent == 10 else None)
    await b.deploy(config("v5"))
    await _primary(b, "v5")


async def _primary(b: Bench, name: str) -> None:
    def there(service: Service) -> bool:
        return service.primary_version == version_of(service, name).id and service.rollout is None

    await b.until(f"{name} to serve", there)
    await b.one_version()


async def _rotate(b: Bench, load: Load) -> None:
    made = await b.client.services.add_token(NAME)

    def active(service: Service) -> bool:
        return any(t.id == made.id and t.active for t in service.query_auth_tokens)

    await b.until("the new token to be taken", active)
    load.token = made.token
    await b.client.services.delete_token(NAME)
    await b.until("one token to be left", lambda s: len(s.query_auth_tokens) == 1)


async def _drain(b: Bench) -> None:
    """By Ray, as a cloud that takes a machine back announces it."""
    service = await b.get()
    dashboard, token = ray_access(b.stack, version_of(service, "v9").clusters[0].cluster_id)
    async with httpx.AsyncClient(
        base_url=dashboard, headers={"authorization": f"Bearer {token}"}, trust_env=False, timeout=60
    ) as ray:
        before = await _replicas(ray)
        victim = min(before)
        await _drain_node(dashboard, token, victim)
        deadline = time.monotonic() + MOVED_S
        while victim in (now := await _replicas(ray)) or len(now) < len(before):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the replicas did not move: they were on {before}, are on {now}")
            await asyncio.sleep(0.5)


async def _replicas(ray: httpx.AsyncClient) -> set[str]:
    """Ids of the nodes that run replicas."""
    answer = (await ray.get("/api/serve/applications/")).raise_for_status().json()
    deployments = (d for app in answer["applications"].values() for d in app["deployments"].values())
    return {str(r["node_id"]) for d in deployments for r in d["replicas"] if r["state"] == "RUNNING"}


async def _drain_node(dashboard: str, token: str, node_id: str) -> None:
    host, _, port = dashboard.removeprefix("http://").rpartition(":")
    child = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "ray"), "drain-node", "--address", f"{host}:{int(port) - 1}",
        "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "the benchmark takes it away", "--deadline-remaining-seconds", "60",
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(child.communicate(), 60)
    if child.returncode:
        raise RuntimeError(f"ray drain-node: {said.decode()[-2000:]}")


def show(found: dict[str, Any]) -> str:
    rows = [[r["what"], f"{r['seconds']:g} s", f"{r['sent']:,}", r["failed"], "0"] for r in found["rows"]]
    rows.append(["all, and the time between them", "—", f"{found['sent']:,}", found["failed"], "0"])
    return table(["change", "took", "requests in that time", "failed", "goal"], rows)
