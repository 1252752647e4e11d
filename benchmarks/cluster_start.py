"""From POST of a cluster to RUNNING with one worker, compared with ``ray start`` of the same head and worker by
hand."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.bare_ray import BareRay
from benchmarks.stack import running, timed
from benchmarks.stats import median, ratios, spread, table

GOAL = 1.25


async def run(pairs: int, **_: Any) -> dict[str, Any]:
    ours: list[float] = []
    bare: list[float] = []
    phases: list[dict[str, float]] = []
    async with running() as (stack, _fleet):
        for number in range(pairs + 1):
            async with BareRay() as ray:
                by_hand = await timed(ray.start)
            began = time.monotonic()
            cluster = await stack.cluster(f"bench-{number}", workers=1)
            took = time.monotonic() - began
            phases.append((await stack.get(f"/v1/clusters/{cluster}"))["phase_seconds"])
            await stack.post(f"/v1/clusters/{cluster}/terminate", {})
            await stack.until(f"/v1/clusters/{cluster}", "TERMINATED")
            if number:  # the first pair fills the disk cache
                ours.append(took)
                bare.append(by_hand)
                print(f"  pair {number}: by hand {by_hand:.2f} s, ours {took:.2f} s", flush=True)
    return {"ours_s": ours, "bare_s": bare, "ratios": ratios(ours, bare), "phases": phases[1:]}


def show(found: dict[str, Any]) -> str:
    return table(
        ["POST cluster → RUNNING, 1 worker", "`ray start` by hand", "ratio of pairs, median", "goal"],
        [[spread(found["ours_s"]), spread(found["bare_s"]), f"{median(found['ratios']):.2f} ×", f"≤ {GOAL} ×"]],
    )
