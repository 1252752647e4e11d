"""A service on two clusters under load; the machine of one head is killed by ``kill -9``, again and again. An
idempotent request whose answer has not begun is sent to the other head and must succeed. Other requests in progress
on the dead head (answers that had begun, POST, websockets) fail and are counted. Bare Traefik with its retry lost 13
of 3,152 GETs."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from benchmarks.services import Bench, bench, config, load_on, part, version_of
from benchmarks.stats import spread, table
from heliostat.models.services import Service, ServiceState


async def run(kills: int = 5, **_: Any) -> dict[str, Any]:
    rows = []
    async with bench() as b:
        await b.deploy(config("v1", cluster_replicas=2))
        async with load_on(await _whole(b)) as load:
            for number in range(kills):
                healed = 0.0

                async def kill(number: int = number) -> None:
                    nonlocal healed
                    clusters = version_of(await b.get(), "v1").clusters
                    machine = await b.head_machine(clusters[number % len(clusters)].cluster_id)
                    began = time.monotonic()
                    await b.power_cut(machine)
                    await b.until("the loss to be seen", lambda s: None if _is_whole(s) else s)
                    await _whole(b)
                    healed = time.monotonic() - began

                rows.append((await part(load, f"kill {number + 1}", kill)).row() | {"healed_s": round(healed, 1)})
        report = load.report()
        await b.end()
    retried = [f for f in report.failures if f.idempotent and not f.began]
    return {
        "rows": rows,
        "kills": kills,
        "sent": report.sent,
        "idempotent_not_begun_failed": len(retried),
        "in_flight_failed": report.failed - len(retried),
        "failures": [asdict(f) for f in report.failures],
    }


def _is_whole(service: Service) -> bool:
    version = version_of(service, "v1")
    return service.state == ServiceState.RUNNING and sum(c.ready for c in version.clusters) == 2


async def _whole(b: Bench) -> Service:
    return await b.until("both clusters to take traffic", lambda s: s if _is_whole(s) else None)


def show(found: dict[str, Any]) -> str:
    return table(
        [
            "kills",
            "requests",
            "idempotent, answer not begun: failed",
            "others, in progress on the dead head: failed",
            "power cut → both clusters in traffic",
            "goal",
        ],
        [[
            found["kills"], f"{found['sent']:,}", found["idempotent_not_begun_failed"], found["in_flight_failed"],
            spread([r["healed_s"] for r in found["rows"]]), "0 of the first; the others counted",
        ]],
    )  # fmt: skip
