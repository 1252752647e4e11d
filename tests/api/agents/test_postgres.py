"""The statements that differ between the databases, on PostgreSQL and with two APIs."""

from __future__ import annotations

import asyncio

from sqlalchemy import select

from heliostat.models.clusters import NodeRole
from store.database import Database
from store.tables import hearing, log_streams, reports
from tests.api.agents.conftest import World, fact


async def test_two_apis_serve_one_cluster(postgres_world: World) -> None:
    world, other_db = postgres_world, Database(postgres_world.db.url)
    async with world.api() as first, world.api(db=other_db) as second:
        cluster = await world.cluster()
        head = await world.joined(cluster, NodeRole.HEAD, first)
        worker = await world.joined(cluster, NodeRole.WORKER, second)
        waiting = asyncio.create_task(worker.get("/head", wait=10))
        run_id = await world.submitted(cluster, head.node)
        assert [c["args"]["run_id"] for c in (await head.get("/commands", wait=10)).json()["commands"]] == [run_id]
        head.http = second
        sign = {"items": [{"stream": f"runs/{run_id}.log", "offset": 0}]}
        assert (await head.post("/logs/sign", sign)).status_code == 200
        assert (await head.post("/logs/sign", sign)).status_code == 200
        told = [fact("run_running", run_id=run_id), fact("run_ended", run_id=run_id, status="SUCCEEDED")]
        answer = await head.report(*told, gcs_address="127.0.9.1:6379", activity="idle")
        assert answer.json()["acked"] == [f["id"] for f in told]
        assert [w["id"] for w in answer.json()["nodes"]] == [worker.node.id]
        assert (await waiting).json()["gcs_address"] == "127.0.9.1:6379"
        assert len(await world.heard(run_id.rpartition("-")[0])) == 2
        stranger = await world.joined(await world.cluster(), NodeRole.HEAD, second)
        assert (await stranger.post("/logs/sign", sign)).status_code == 403
        async with asyncio.timeout(30):
            while True:
                async with world.db.read() as conn:
                    seen = {r.node_id: r.seq for r in await conn.execute(select(reports))}
                    beats = (await conn.execute(select(hearing))).all()
                    stream = (await conn.execute(select(log_streams))).one()
                if seen.get(head.node.id) == head.seq and worker.node.id in seen:
                    break
                await asyncio.sleep(0.05)
        assert len(beats) == 1
        assert stream.complete
    await other_db.dispose()
