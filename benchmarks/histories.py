"""The number of events by which a history grows: a whole job on a warm cluster, an idle cluster, one change."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.stack import Stack, running
from benchmarks.stats import median, table
from clouds.fake.agent import Behaviour

REST_S = 20


async def run(pairs: int, **_: Any) -> dict[str, Any]:
    async with running(fake=Behaviour(run_s=0.3, damp_s=0.5)) as (stack, _fleet):
        cluster = await stack.cluster("warm", workers=1)
        await _quiet(stack, cluster)
        start = await _length(stack, cluster)
        jobs, on_cluster = [], []
        for number in range(pairs):
            before = await _quiet(stack, cluster)
            job = await stack.post("/v1/jobs", {"name": f"j{number}", "entrypoint": "true", "cluster": cluster})
            await stack.until(f"/v1/jobs/{job['id']}", "SUCCEEDED")
            await stack.temporal.get_workflow_handle(job["id"]).result()
            jobs.append(await _length(stack, job["id"]))
            on_cluster.append(await _quiet(stack, cluster) - before)
        before = await _quiet(stack, cluster)
        await asyncio.sleep(REST_S)
        rest = await _length(stack, cluster) - before
        changes = []
        for number in range(pairs):
            before = await _quiet(stack, cluster)
            limits = {"group": "small", "max_nodes": 2 + number % 2}
            answer = await stack.http.patch(f"/v1/clusters/{cluster}/limits", json=limits)
            if not answer.is_success:
                raise RuntimeError(f"limits: {answer.status_code} {answer.text[:300]}")
            changes.append(await _quiet(stack, cluster) - before)
    return {
        "cluster_until_running": start,
        "job": jobs,
        "cluster_per_job": on_cluster,
        "cluster_at_rest": rest,
        "rest_s": REST_S,
        "per_change": changes,
    }


async def _length(stack: Stack, workflow: str) -> int:
    description = await stack.temporal.get_workflow_handle(workflow).describe()
    return description.history_length


async def _quiet(stack: Stack, workflow: str) -> int:
    """Events once nothing has been added for two seconds."""
    length, still = -1, 0
    while still < 4:
        await asyncio.sleep(0.5)
        now = await _length(stack, workflow)
        length, still = now, still + 1 if now == length else 0
    return length


def show(found: dict[str, Any]) -> str:
    def events(values: list[int]) -> str:
        return f"{median(values):g} ({min(values)} – {max(values)})"

    return table(
        ["events", "measured", "goal"],
        [
            ["a whole job on a warm cluster", events(found["job"]), "≤ 30"],
            ["an idle cluster for {rest_s} s".format(**found), found["cluster_at_rest"], "0"],
            [
                "four changes of a cluster (a job's lease, busy, idle, release)",
                events(found["cluster_per_job"]),
                "≤ 40",
            ],
            [
                "one change that the head gets (new limits, with its next report)",
                events(found["per_change"]),
                "≤ 10",
            ],
            ["a cluster from POST to RUNNING with one worker", found["cluster_until_running"], "—"],
        ],
    )
