"""From a new version's first answers to real requests until it has all the traffic, by steps 5, 10, 20, 30, 50, 75, 100
with the shortest hold of 1 s, under the load of ``rollouts``, by the service's own events."""

from __future__ import annotations

from typing import Any

from benchmarks.services import bench, config, load_on, version_of
from benchmarks.stats import spread, table

GOAL_S = 30
THEIRS = "about 2 min"
"""Anyscale's on AWS, by its documentation (the same steps)."""


async def run(pairs: int, **_: Any) -> dict[str, Any]:
    shifts, wholes = [], []
    failed = 0
    async with bench() as b:
        await b.deploy(config("v0"))
        async with load_on(await b.settled()) as load:
            for number in range(1, pairs + 1):
                asked, deploy = await b.ask(config(f"v{number}"))
                made = version_of(asked, f"v{number}")
                await b.client.services.wait_deployed(asked, deploy, timeout=900)
                events = await b.events(made.created_at, "fit", "step")
                fit = max(e.at for e in events if e.kind == "fit" and e.message.startswith(f"{made.name}:"))
                full = max(e.at for e in events if e.kind == "step" and e.message.startswith(f"{made.name} has 100 %"))
                shifts.append((full - fit).total_seconds())
                wholes.append((full - made.created_at).total_seconds())
                print(f"  {number}: healthy → 100 % {shifts[-1]:.1f} s, deploy → 100 % {wholes[-1]:.1f} s", flush=True)
                await b.one_version()
        failed = load.report().failed
        await b.end()
    return {"shift_s": shifts, "deploy_s": wholes, "failed": failed}


def show(found: dict[str, Any]) -> str:
    return table(
        ["healthy → 100 %", "deploy → 100 %, clusters included", "requests failed", "Anyscale, same steps", "goal"],
        [[spread(found["shift_s"]), spread(found["deploy_s"]), found["failed"], THEIRS, f"≤ {GOAL_S} s"]],
    )
