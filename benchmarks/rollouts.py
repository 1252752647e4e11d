"""Requests that fail while a service is rolled out again and again, under a steady load of fresh and kept connections,
GET, POST with 64 KiB, requests of 5 s, streams and websockets (23/s in all). Every answer is compared byte by byte with
the right one; nothing is retried. The steps 5, 10, 20, 30, 50, 75, 100 are held for 1 s each."""

from __future__ import annotations

from typing import Any

from benchmarks.services import bench, config, load_on, part
from benchmarks.stats import spread, table


async def run(rollouts: int, **_: Any) -> dict[str, Any]:
    rows = []
    async with bench() as b:
        await b.deploy(config("v0"))
        async with load_on(await b.settled()) as load:
            for number in range(1, rollouts + 1):

                async def roll(number: int = number) -> None:
                    await b.deploy(config(f"v{number}"))
                    await b.one_version()  # the old one is drained and released: that is part of it

                rows.append((await part(load, f"rollout {number}", roll)).row())
        report = load.report()
        await b.end()
    return {
        "rows": rows,
        "rollouts": rollouts,
        "versions_seen": len(report.versions),
        "report": report.to_dict() | {"timeline": []},
    }


def show(found: dict[str, Any]) -> str:
    report = found["report"]
    kinds = ", ".join(f"{name} {kind['ok']:,}" for name, kind in report["kinds"].items())
    return table(
        ["rollouts in a row", "versions that answered", "requests", "right answers", "failed", "one rollout", "goal"],
        [[
            found["rollouts"], found["versions_seen"], f"{report['sent']:,}", kinds, report["failed"],
            spread([row["seconds"] for row in found["rows"]]), "0 failed",
        ]],
    )  # fmt: skip
