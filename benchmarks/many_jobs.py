"""2,000 jobs that run at once on the fake cloud: the worker's memory, and whether all jobs continue after a restart."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from benchmarks.stack import Stack, running
from benchmarks.stats import table
from clouds.fake.agent import Behaviour

CLUSTERS = 20
GOAL_MIB = 1536
LONG_S = 1e6


async def run(jobs: int, **_: Any) -> dict[str, Any]:
    async with running(fake=Behaviour(run_s=LONG_S)) as (stack, fleet):
        assert fleet is not None
        clusters = [await stack.cluster(f"many-{n}") for n in range(CLUSTERS)]
        empty = stack.rss_mib("worker")
        began = time.monotonic()
        ids = await _submit(stack, clusters, jobs)
        await _all(stack, "RUNNING", jobs)
        rising = time.monotonic() - began
        print(f"  {jobs} jobs run after {rising:.0f} s", flush=True)
        before = {part: stack.cpu_s(part) for part in ("worker", "api", "temporal")}
        await asyncio.sleep(20)
        idle = {part: round(100 * (stack.cpu_s(part) - was) / 20, 1) for part, was in before.items()}
        full = stack.rss_mib("worker")

        old = stack.pid("worker")
        os.kill(old, signal.SIGKILL)
        while stack.home.state()["pids"].get("worker") in (None, old):
            await asyncio.sleep(0.1)
        began = time.monotonic()
        for head in list(fleet.heads.values()):
            for run_id in list(head.runs):
                head._end(run_id, "SUCCEEDED", 0, "")
        await _all(stack, "SUCCEEDED", jobs)
        picked_up = time.monotonic() - began
        after = stack.rss_mib("worker")
        assert len(ids) == jobs
    return {
        "jobs": jobs,
        "clusters": CLUSTERS,
        "rss_empty_mib": round(empty),
        "rss_mib": round(full),
        "rss_after_mib": round(after),
        "kib_per_job": round((full - empty) * 1024 / jobs),
        "cpu_percent_while_nothing_changes": idle,
        "submitted_and_running_s": round(rising, 1),
        "all_ended_after_kill_s": round(picked_up, 1),
    }


async def _submit(stack: Stack, clusters: list[str], jobs: int) -> list[str]:
    numbers, ids = iter(range(jobs)), []

    async def lane() -> None:
        for n in numbers:
            body = {"name": f"job-{n}", "entrypoint": "true", "cluster": clusters[n % len(clusters)]}
            ids.append((await stack.post("/v1/jobs", body))["id"])

    await asyncio.gather(*(lane() for _ in range(8)))
    return ids


async def _all(stack: Stack, state: str, jobs: int, timeout_s: float = 900) -> None:
    deadline, shown = time.monotonic() + timeout_s, 0.0
    while True:
        count, cursor = 0, None
        while True:
            params = {"state": state, "limit": 200} | ({"cursor": cursor} if cursor else {})
            page = await stack.get("/v1/jobs", **params)
            count += len(page["items"])
            cursor = page.get("next_cursor")
            if not cursor:
                break
        if count >= jobs:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {count} of {jobs} jobs are {state}")
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            print(f"  {count} of {jobs} are {state}", flush=True)
        await asyncio.sleep(1)


def show(found: dict[str, Any]) -> str:
    memory = f"{found['rss_mib']:,} MiB ({found['rss_empty_mib']} before, {found['rss_after_mib']:,} after the restart)"
    cpu = ", ".join(f"{part} {value} %" for part, value in found["cpu_percent_while_nothing_changes"].items())
    return table(
        [
            "jobs at once",
            "worker's memory",
            "a job",
            "CPU while all run",
            "all ended after its kill -9",
            "goal",
        ],
        [
            [
                f"{found['jobs']:,} on {found['clusters']} clusters",
                memory,
                f"{found['kib_per_job']} KiB",
                cpu,
                f"{found['all_ended_after_kill_s']} s",
                f"≤ {GOAL_MIB:,} MiB; all jobs continue",
            ]
        ],
    )
