"""Whole job lifecycles per second on the fake cloud, compared with a bare Temporal workflow with as many activities on
the same server. A job of Heliostat does more than the bare workflow: it is accepted over HTTP and recorded, leases its
cluster (an update and a signal of a second workflow), gets the run's start and end as signals, and shows its state in
Temporal's visibility."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections import Counter
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.client import Client

from benchmarks.stack import ROOT, Stack, running
from benchmarks.stats import median, table
from clouds.fake.agent import Behaviour

GOAL = 0.5
JOBS = 60
"""A batch; a pair is one batch of each."""
AT_ONCE = 30


async def run(pairs: int, **_: Any) -> dict[str, Any]:
    ours: list[float] = []
    bare: list[float] = []
    async with running(fake=Behaviour(run_s=0)) as (stack, _fleet):
        cluster = await stack.cluster("warm")
        job = await stack.post("/v1/jobs", {"name": "first", "entrypoint": "true", "cluster": cluster})
        await stack.until(f"/v1/jobs/{job['id']}", "SUCCEEDED")
        remote, local = await _activities(stack.temporal, job["id"])
        queue = uuid.uuid4().hex
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare_workflow", stack.home.state()["temporal_address"], queue], cwd=ROOT
        )
        try:
            for number in range(pairs + 1):
                theirs = await _batch(lambda _: _bare(stack.temporal, queue, remote, local))
                mine = await _batch(lambda n, b=number: _job(stack, cluster, f"{b}-{n}"))
                if number:
                    ours.append(mine)
                    bare.append(theirs)
                    print(f"  pair {number}: bare {theirs:.1f}/s, ours {mine:.1f}/s", flush=True)
        finally:
            worker.terminate()
            worker.wait()
    shares = [a / b for a, b in zip(ours, bare, strict=True)]
    return {"ours_per_s": ours, "bare_per_s": bare, "shares": shares, "remote": remote, "local": local}


async def _activities(temporal: Client, job: str) -> tuple[int, int]:
    history = await temporal.get_workflow_handle(job).fetch_history()
    kinds = Counter(event.event_type for event in history.events)
    return kinds[EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED], kinds[EventType.EVENT_TYPE_MARKER_RECORDED]


async def _batch(one: Any) -> float:
    """JOBS of them, AT_ONCE under way at any time; per second."""
    numbers = iter(range(JOBS))

    async def lane() -> None:
        for number in numbers:
            await one(number)

    began = time.monotonic()
    await asyncio.gather(*(lane() for _ in range(AT_ONCE)))
    return JOBS / (time.monotonic() - began)


async def _bare(temporal: Client, queue: str, remote: int, local: int) -> None:
    handle = await temporal.start_workflow("Bare", args=[remote, local], id=uuid.uuid4().hex, task_queue=queue)
    await handle.result()


async def _job(stack: Stack, cluster: str, name: str) -> None:
    job = await stack.post("/v1/jobs", {"name": f"job-{name}", "entrypoint": "true", "cluster": cluster})
    # By Temporal's own answer, as the bare one: thirty clients that poll would be part of the load.
    await stack.temporal.get_workflow_handle(job["id"]).result()


def show(found: dict[str, Any]) -> str:
    def rate(values: list[float]) -> str:
        return f"{median(values):.1f}/s ({min(values):.1f} – {max(values):.1f})"

    what = f"bare workflow, {found['remote']} activities + {found['local']} local ones"
    return table(
        ["job lifecycles", what, "share of pairs, median", "goal"],
        [[rate(found["ours_per_s"]), rate(found["bare_per_s"]), f"{median(found['shares']):.0%}", f"≥ {GOAL:.0%}"]],
    )
