"""Compute configs, clouds, health, metrics, and the committed OpenAPI."""

from __future__ import annotations

import asyncio

from temporalio.client import Client

from api.openapi import FILE, render
from tests.api.conftest import World


async def test_a_name_has_versions_and_each_is_found(world: World) -> None:
    async with world.ada as http:
        made = []
        for minutes in (1, 2, 3):
            body = {"name": "small", "config": {"idle_termination_minutes": minutes}}
            made.append((await http.post("/v1/compute-configs", json=body)).json())
        assert [m["version"] for m in made] == [1, 2, 3]

        async def minutes_of(ref: str) -> float:
            answer = await http.get(f"/v1/compute-configs/{ref}")
            assert answer.status_code == 200, answer.text
            return float(answer.json()["config"]["idle_termination_minutes"])

        assert [await minutes_of(r) for r in ("small", "small:1", "small:2", made[1]["id"])] == [3, 1, 2, 2]
        for ref in ("small:4", "small:x", "none", "small:"):
            assert (await http.get(f"/v1/compute-configs/{ref}")).status_code == 404, ref
        cluster = (await http.post("/v1/clusters", json={"compute_config": "small:2"})).json()
        assert cluster["compute_config"]["idle_termination_minutes"] == 2
        listed = (await http.get("/v1/compute-configs", params={"name": "small"})).json()["items"]
        assert [c["version"] for c in listed] == [3, 2, 1]


async def test_unnamed_ones_are_reachable_by_id_only(world: World) -> None:
    async with world.ada as http:
        made = (await http.post("/v1/compute-configs", json={"config": {}})).json()
        assert (made["name"], made["version"]) == (None, 1)
        assert (await http.get(f"/v1/compute-configs/{made['id']}")).json() == made
        assert (await http.get("/v1/compute-configs")).json()["items"] == []
        assert (await http.post("/v1/jobs", json={"entrypoint": "x", "compute_config": made["id"]})).status_code == 201


async def test_an_archived_one_is_for_nobody_new(world: World) -> None:
    async with world.ada as http:
        for _ in range(2):
            await http.post("/v1/compute-configs", json={"name": "c", "config": {}})
        assert (await http.post("/v1/compute-configs/c:2/archive")).json()["archived_at"]
        assert (await http.get("/v1/compute-configs/c")).json()["version"] == 1
        used = await http.post("/v1/clusters", json={"compute_config": "c:2"})
        assert (used.status_code, used.json()["field"]) == (409, "compute_config")
        assert (await http.post("/v1/compute-configs/c/archive")).json()["archived_at"]
        assert (await http.post("/v1/clusters", json={"compute_config": "c"})).status_code == 409
        assert (await http.get("/v1/compute-configs")).json()["items"] == []
        assert len((await http.get("/v1/compute-configs", params={"archived": True})).json()["items"]) == 2


async def test_versions_made_at_once_are_all_different(world: World) -> None:
    async with world.ada as http:
        body = {"name": "c", "config": {}}
        answers = await asyncio.gather(*(http.post("/v1/compute-configs", json=body) for _ in range(8)))
        keyed = await asyncio.gather(
            *(http.post("/v1/compute-configs", json=body, headers={"idempotency-key": "k"}) for _ in range(4))
        )
    assert sorted(a.json()["version"] for a in answers) == list(range(1, 9))
    assert {a.json()["version"] for a in keyed} == {9}


async def test_clouds_are_listed_and_found(world: World) -> None:
    async with world.ada as http:
        listed = (await http.get("/v1/clouds")).json()["items"]
        assert [(c["name"], c["is_default"], c["capabilities"]["max_cpu_per_node"]) for c in listed] == [
            ("local", True, 2)
        ]
        for ref in ("local", world.cloud_id):
            assert (await http.get(f"/v1/clouds/{ref}")).json() == listed[0]
        missing = await http.get("/v1/clouds/mars")
        assert (missing.status_code, "local" in missing.json()["remedy"]) == (404, True)


async def test_ready_means_records_temporal_and_hearing(world: World, temporal: Client, absent: Client) -> None:
    async with world.client(None) as http:
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        async with asyncio.timeout(30):
            while (await http.get("/readyz")).status_code != 200:  # the first note of our hearing takes a moment
                await asyncio.sleep(0.05)
        world.change(temporal=absent)
        away = await http.get("/readyz")
        assert (away.status_code, away.json()["checks"]["records"]) == (503, "ok")
        assert away.json()["checks"]["temporal"] != "ok"


async def test_metrics_count_by_route_not_by_id(world: World) -> None:
    async with world.ada as http:
        await http.get("/v1/jobs/some-name")
    async with world.client(None) as http:
        text = (await http.get("/metrics")).text
    assert 'route="/v1/jobs/{ref}",status="404"' in text
    assert "some-name" not in text


def test_the_committed_openapi_is_up_to_date() -> None:
    assert FILE.read_text() == render(), "run `python -m api.openapi` and commit api/openapi.json"
