"""Services: who sees them, lists, deletion, logs."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from heliostat.models.common import utcnow
from heliostat.models.services import (
    ServiceCluster,
    ServiceState,
    ServiceVersion,
)
from store.services import rows as store
from store.tables import log_streams, sealed
from tests.api.conftest import World
from tests.api.services.support import RUNNING, a_head, a_service, body, deployed, write

pytestmark = pytest.mark.timeout(90)


async def test_others_do_not_see_it(world: World, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http)
    calls = [
        ("GET", ""), ("GET", "/versions"), ("GET", "/events"), ("GET", "/logs"), ("POST", "/terminate"),
        ("POST", "/rollback"), ("POST", "/rollout"), ("POST", "/tokens"), ("DELETE", "/tokens"), ("DELETE", ""),
    ]  # fmt: skip
    order = {"action": "pause"}
    async with world.eve as eve, world.client(None) as nobody:
        for method, path in calls:
            json = order if path == "/rollout" else None
            for ref in (service["id"], "chat"):
                answer = await eve.request(method, f"/v1/services/{ref}{path}", json=json)
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, path)
            refused = await nobody.request(method, f"/v1/services/{service['id']}{path}", json=json)
            assert refused.status_code == 401, (method, path)
        assert (await nobody.post("/v1/services", json=body())).status_code == 401
        assert (await eve.get("/v1/services")).json()["items"] == []
        assert (await eve.post("/v1/services", json=body(project="team"))).status_code == 404
        mine = await deployed(eve)  # the name is another project's there
        assert mine["id"] != service["id"]


async def test_pages_and_filters(world: World, worker: None) -> None:
    async with world.ada as http:
        made = [(await deployed(http, f"s{n}", tags={"n": str(n)}))["id"] for n in range(5)]
        await write(world, made[0], ServiceState.RUNNING, gate_hashes=["0" * 64])
        first = (await http.get("/v1/services", params={"limit": 3})).json()
        rest = (await http.get("/v1/services", params={"limit": 3, "cursor": first["next_cursor"]})).json()
        assert [s["id"] for s in first["items"] + rest["items"]] == made[::-1]
        assert all(s["query_auth_token"] is None and not s["gate_hashes"] for s in first["items"] + rest["items"])
        filters: list[tuple[dict[str, Any], list[str]]] = [
            ({"name": "s1"}, [made[1]]),
            ({"tag": "n:2"}, [made[2]]),
            ({"state": "RUNNING"}, [made[0]]),
            ({"project": "team", "state": ["STARTING", "RUNNING"]}, made[::-1]),
            ({"cloud": "local", "limit": 1}, [made[4]]),
        ]
        for params, ids in filters:
            found = (await http.get("/v1/services", params=params)).json()["items"]
            assert [s["id"] for s in found] == ids, params


async def test_a_terminated_service_is_deleted_and_its_name_is_free_at_once(world: World, worker: None) -> None:
    async with world.ada as http:
        old = await deployed(http, env_vars={"A": "b"})
        for state in (ServiceState.RUNNING, ServiceState.ROLLING_OUT, ServiceState.TERMINATING):
            await write(world, old["id"], state, RUNNING)
            busy = await http.delete("/v1/services/chat")
            assert (busy.status_code, "Terminate it first" in busy.json()["remedy"]) == (409, True)
        await write(world, old["id"], ServiceState.TERMINATED)
        assert (await http.delete("/v1/services/chat")).status_code == 204
        assert (await http.get(f"/v1/services/{old['id']}")).status_code == 404
        assert (await http.get("/v1/services")).json()["items"] == []
        async with world.db.read() as conn:
            assert await conn.scalar(select(func.count()).select_from(sealed)) == 0
        new = await deployed(http)
        assert new["id"] != old["id"]
        assert new["query_auth_token"] != old["query_auth_token"]
        assert [v["number"] for v in new["versions"]] == [1]


async def test_the_logs_of_a_versions_replicas(world: World, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http)
        await deployed(http)
        for cluster in ("cl_a", "cl_b"):
            await a_head(world, service, cluster, utcnow())
            for stream in ("ray/worker-1.out", "ray/serve/replica.log", "ray/raylet.out", "node/agent.log"):
                async with world.db.begin() as conn:
                    await conn.execute(
                        log_streams.insert().values(
                            cluster_id=cluster, node_id="nd_1", stream=stream, complete=False, created_at=utcnow()
                        )
                    )
                world.bucket.put(f"logs/{cluster}/nd_1/{stream}/{0:020d}", b"text")

        def on_a(version: ServiceVersion) -> None:
            version.clusters = [ServiceCluster(cluster_id="cl_a", state="RUNNING")]

        await write(world, service["id"], ServiceState.RUNNING, RUNNING, change=on_a)

        async def streams(**params: Any) -> list[str]:
            page = await http.get("/v1/services/chat/logs", params=params)
            assert (page.status_code, page.json()["complete"]) == (200, False), page.text
            return [c["stream"] for c in page.json()["chunks"]]

        one = ["nd_1/ray/serve/replica.log", "nd_1/ray/worker-1.out"]
        assert await streams() == one * 2
        for version in ("v1", "1", service["versions"][0]["id"]):
            assert await streams(version=version, follow=True) == one
        assert await streams(version="v2") == []
        absent = await http.get("/v1/services/chat/logs", params={"version": "v9"})
        assert (absent.status_code, absent.json()["field"]) == (404, "version")


async def test_a_write_to_what_is_not_there_is_told(world: World) -> None:
    assert not await store.write_service(world.db, a_service(), [], [])
    assert not await store.claim_deploy(world.db, "dp_none")
