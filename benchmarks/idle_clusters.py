"""What idle clusters cost the control plane: reports and long polls of many heads."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.stack import running
from benchmarks.stats import table
from clouds.fake.agent import Behaviour

WINDOW_S = 30
PARTS = ("api", "worker", "temporal")


async def run(clusters: int, **_: Any) -> dict[str, Any]:
    async with running(fake=Behaviour()) as (stack, _fleet):
        rows = []
        for count in (0, clusters):
            numbers = iter(range(count))

            async def lane(numbers: Any = numbers) -> None:
                for n in numbers:
                    await stack.cluster(f"idle-{n}", timeout_s=600)

            await asyncio.gather(*(lane() for _ in range(10)))
            await asyncio.sleep(10)
            before = {part: stack.cpu_s(part) for part in PARTS}
            await asyncio.sleep(WINDOW_S)
            cpu = {part: round(100 * (stack.cpu_s(part) - was) / WINDOW_S, 1) for part, was in before.items()}
            rows.append({"clusters": count, **cpu, "worker_mib": round(stack.rss_mib("worker"))})
            print(f"  {rows[-1]}", flush=True)
    return {"rows": rows, "window_s": WINDOW_S}


def show(found: dict[str, Any]) -> str:
    return table(
        ["idle clusters", *(f"{part}, % of a core" for part in PARTS), "worker MiB"],
        [[row["clusters"], *(row[part] for part in PARTS), row["worker_mib"]] for row in found["rows"]],
    )
