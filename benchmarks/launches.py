"""A cluster of 200 nodes on a fake cloud whose calls take as long as EC2's do when it is busy. Our own share is the
time without the cloud's and the machines' own: a launch and a boot, since all of them may run in parallel; at the end
a terminate and a describe. A launch that starts later than it was requested has waited for a thread."""

from __future__ import annotations

import asyncio
import os
from datetime import datetime
from typing import Any

from temporalio.api.enums.v1 import EventType

from benchmarks.stack import POLL_S, Stack, running, timed
from benchmarks.stats import median, percentile, spread, table
from clouds.fake.agent import Behaviour

NODES = 200
LAUNCH_S, BOOT_S, TERMINATE_S, DESCRIBE_S = 2.0, 5.0, 1.0, 0.3
GOAL_S = 10.0
TIMES = 3


async def run(**_: Any) -> dict[str, Any]:
    latency = f'{{"launch": {LAUNCH_S}, "terminate": {TERMINATE_S}, "describe": {DESCRIBE_S}}}'
    rows = []
    async with running(fake=Behaviour(register_delay_s=BOOT_S), HELIOSTAT_FAKE_LATENCY=latency, **_threads()) as (
        stack,
        fleet,
    ):
        assert fleet is not None
        for number in range(TIMES + 1):
            row = await _once(stack, f"many-{number}")
            await asyncio.sleep(1)  # the machines' end is told to their agents by a file
            if fleet.agents:
                raise RuntimeError(f"{len(fleet.agents)} machines are left")
            print(f"  {number or 'warm-up'}: {row}", flush=True)
            rows += [row] if number else []
    return {"rows": rows, "nodes": NODES, "launch_s": LAUNCH_S, "boot_s": BOOT_S, "terminate_s": TERMINATE_S}


def _threads() -> dict[str, str]:
    """Of the worker, where the caller says how many."""
    given = os.environ.get("HELIOSTAT_WORKER_THREADS")
    return {"HELIOSTAT_WORKER_THREADS": given} if given else {}


async def _once(stack: Stack, name: str) -> dict[str, Any]:
    cpu = {part: stack.cpu_s(part) for part in ("api", "worker", "temporal")}
    made: list[str] = []

    async def up() -> None:
        made.append(await stack.cluster(name, workers=NODES - 1))

    async def down() -> None:
        await stack.post(f"/v1/clusters/{made[0]}/terminate", {})
        while (await stack.get(f"/v1/clusters/{made[0]}"))["state"] != "TERMINATED":
            await asyncio.sleep(POLL_S)

    up_s, down_s = await timed(up), await timed(down)
    waits = await _waits(stack, made[0])
    return {
        "up_s": round(up_s, 2),
        "up_own_s": round(up_s - LAUNCH_S - BOOT_S, 2),
        "down_s": round(down_s, 2),
        "down_own_s": round(down_s - TERMINATE_S - DESCRIBE_S, 2),
        "launches": len(waits),
        "wait_median_s": round(median(waits), 3),
        "wait_p99_s": round(percentile(waits, 99), 3),
        "events": await _length(stack, made[0]),
        "cpu_s": {part: round(stack.cpu_s(part) - was, 1) for part, was in cpu.items()},
    }


async def _waits(stack: Stack, cluster: str) -> list[float]:
    """Of each launch: seconds from being asked for to being begun."""
    asked: dict[int, datetime] = {}
    waits = []
    async for event in stack.temporal.get_workflow_handle(cluster).fetch_history_events():
        at = event.event_time.ToDatetime()
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            if event.activity_task_scheduled_event_attributes.activity_type.name == "launch_node":
                asked[event.event_id] = at
        elif event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_STARTED:
            of = event.activity_task_started_event_attributes.scheduled_event_id
            if of in asked:
                waits.append((at - asked[of]).total_seconds())
    return waits


async def _length(stack: Stack, cluster: str) -> int:
    return (await stack.temporal.get_workflow_handle(cluster).describe()).history_length


def show(found: dict[str, Any]) -> str:
    rows = found["rows"]

    def of(name: str) -> list[float]:
        return [row[name] for row in rows]

    own = f"≤ {GOAL_S:g} s"
    return table(
        [f"{found['nodes']} nodes at once", "measured", "goal"],
        [
            ["from POST until all have registered and the cluster runs", spread(of("up_s")), "—"],
            ["our own share of that", spread(of("up_own_s")), own],
            ["from terminate until all machines are gone", spread(of("down_s")), "—"],
            ["our own share of that", spread(of("down_own_s")), own],
            ["a launch waits for its start, median", spread(of("wait_median_s")), "—"],
            ["the same, p99", spread(of("wait_p99_s")), "no launch waits for another"],
            ["launches", ", ".join(str(row["launches"]) for row in rows), f"{found['nodes']}"],
            ["events of the cluster's history", ", ".join(str(row["events"]) for row in rows), "—"],
        ],
    )
