"""How long the API takes to accept a job, in an open loop: requests are sent on time, whether earlier ones are answered
or not, and a late start counts as waiting."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from benchmarks.stack import Stack, running
from benchmarks.stats import percentile, table
from clouds.fake.agent import Behaviour

RATES = (5, 10, 20, 50)
GOALS = {(10, "running"), (50, "paused")}
GOAL_P50_MS, GOAL_P99_MS = 25, 150


async def run(seconds: float, **_: Any) -> dict[str, Any]:
    rows = []
    for worker in ("running", "paused"):
        for rate in RATES:
            rows.append(await _measure(rate, worker, seconds))
            print(f"  {rows[-1]}", flush=True)
    return {"rows": rows, "seconds": seconds}


async def _measure(rate: int, worker: str, seconds: float) -> dict[str, Any]:
    """On a stack of its own: no backlog of the rate before."""
    async with running(fake=Behaviour(run_s=0.5)) as (stack, _fleet):
        cluster = await stack.cluster("warm")
        await asyncio.gather(*(_post(stack, cluster, -n, time.monotonic(), [], []) for n in range(1, 6)))
        if worker == "paused":
            os.kill(stack.pid("worker"), signal.SIGSTOP)
        taken: list[float] = []
        refused: list[str] = []
        began = time.monotonic()
        async with asyncio.TaskGroup() as requests:
            for number in range(int(rate * seconds)):
                due = began + number / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                requests.create_task(_post(stack, cluster, number, due, taken, refused))
    millis = [1000 * t for t in taken]
    return {
        "rate": rate,
        "worker": worker,
        "accepted": len(taken),
        "refused": len(refused),
        "refusal": refused[0] if refused else "",
        "p50_ms": round(percentile(millis, 50), 1),
        "p90_ms": round(percentile(millis, 90), 1),
        "p99_ms": round(percentile(millis, 99), 1),
        "max_ms": round(max(millis), 1),
    }


async def _post(stack: Stack, cluster: str, number: int, due: float, taken: list[float], refused: list[str]) -> None:
    body = {"name": f"job-{abs(number)}", "entrypoint": "true", "cluster": cluster}
    answer = await stack.http.post("/v1/jobs", json=body)
    if answer.is_success:
        taken.append(time.monotonic() - due)
    else:
        refused.append(answer.text)


def show(found: dict[str, Any]) -> str:
    def goal(row: dict[str, Any]) -> str:
        is_goal = (row["rate"], row["worker"]) in GOALS
        return f"p50 ≤ {GOAL_P50_MS}, p99 ≤ {GOAL_P99_MS}" if is_goal else "—"

    keys = ("rate", "worker", "accepted", "refused", "p50_ms", "p90_ms", "p99_ms", "max_ms")
    return table(
        ["jobs/s", "worker", "accepted", "refused", "p50 ms", "p90 ms", "p99 ms", "max ms", "goal"],
        [[*(row[k] for k in keys), goal(row)] for row in found["rows"]],
    )
