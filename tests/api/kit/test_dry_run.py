"""Dry runs over HTTP: all is checked, the plan says what would be made and what it costs, and nothing is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from clouds.offers import offers
from heliostat.models.common import new_id, utcnow
from store.tables import accepted, clouds, clusters, events, jobs, organizations
from tests.api.compute_configs.test_placement import AWS
from tests.api.conftest import World

PRICES = """provider,region,instance_type,market,usd_per_hour
aws,us-west-2,m6i.large,ON_DEMAND,0.096
aws,us-west-2,m6i.xlarge,ON_DEMAND,0.192
aws,us-west-2,m6i.xlarge,SPOT,0.07
aws,us-west-2,m7i.xlarge,ON_DEMAND,0.2016
aws,*,m7i.xlarge,SPOT,0.09
"""
GROUP = {"name": "w", "min_nodes": 2, "max_nodes": 10, "instance_types": ["m6i.xlarge", "m7i.xlarge"]}
CONFIG = {"cloud": "prod", "worker_nodes": [{**GROUP, "market_type": "PREFER_SPOT"}]}


@pytest.fixture
async def priced(world: World) -> World:
    """With a cloud of AWS, and a price table."""
    world.change(offers=offers(world.settings.home))
    (world.settings.home / "prices.csv").write_text(PRICES)
    async with world.db.begin() as conn:
        row = {
            "id": new_id("cld"),
            "organization_id": await conn.scalar(select(organizations.c.id)),
            "name": "prod",
            "provider": "aws",
            "is_default": False,
            "capabilities": AWS.capabilities.model_dump(mode="json"),
            "config": AWS.config.model_dump(mode="json") if AWS.config else None,
            "created_at": utcnow(),
        }
        await conn.execute(insert(clouds).values(row))
    return world


async def nothing_was_made(world: World) -> None:
    async with world.db.read() as conn:
        for table in (clusters, jobs, events, accepted):
            assert await conn.scalar(select(func.count()).select_from(table)) == 0, table.name


async def plan(world: World, noun: str, body: dict[str, Any]) -> dict[str, Any]:
    async with world.ada as http:
        answer = await http.post(f"/v1/{noun}", params={"dry_run": True}, json=body, headers={"idempotency-key": "k"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("noun", ["clusters", "jobs"])
async def test_the_plan_and_its_price(priced: World, noun: str) -> None:
    body = {"name": "p", "compute_config": CONFIG} | ({"entrypoint": "true"} if noun == "jobs" else {})
    found = await plan(priced, noun, body)
    head, workers = found["nodes"]
    assert (found["kind"], found["name"], found["cloud"], found["region"]) == (noun[:-1], "p", "prod", "us-west-2")
    assert [t["name"] for t in head["types"]] == ["m6i.large"]
    assert (head["markets"], head["usd_per_hour"]) == (["ON_DEMAND"], 0.096)
    assert head["zones"] == ["us-west-2b", "us-west-2a"]
    assert [t["name"] for t in workers["types"]] == ["m6i.xlarge", "m7i.xlarge"]
    assert workers["types"][0] | {"usd_per_hour": 0} == {
        "name": "m6i.xlarge", "cpu": 4, "memory": 16 * 2**30, "gpu": 0, "accelerator": "", "architecture": "x86_64",
        "usd_per_hour": 0,
    }  # fmt: skip
    assert (workers["markets"], workers["min_nodes"], workers["max_nodes"]) == (["SPOT", "ON_DEMAND"], 2, 10)
    assert (workers["usd_per_hour"], workers["dearest_usd_per_hour"]) == (0.07, 0.2016)
    assert (found["min_nodes"], found["max_nodes"]) == (3, 11)
    assert found["min_usd_per_hour"] == pytest.approx(0.096 + 2 * 0.07)
    assert found["max_usd_per_hour"] == pytest.approx(0.096 + 10 * 0.2016)
    assert (found["unpriced"], Path(found["price_table"]).name) == ([], "prices.csv")
    assert found["compute_config"]["worker_nodes"][0]["resources"] == {"CPU": 4}
    await nothing_was_made(priced)


async def test_what_is_not_in_the_table_is_said_and_no_total_is_made_up(priced: World) -> None:
    found = await plan(priced, "clusters", {"compute_config": {"cloud": "prod", "worker_nodes": [
        {"name": "w", "max_nodes": 1, "instance_type": "c6i.large"}]}})  # fmt: skip
    assert found["unpriced"] == ["c6i.large ON_DEMAND"]
    assert found["min_usd_per_hour"] == 0.096, "no worker at least"
    assert found["max_usd_per_hour"] is None


async def test_an_unreadable_table_is_told_by_name(priced: World) -> None:
    (priced.settings.home / "prices.csv").write_text(PRICES + "aws,*,m,SPOT,free\n")
    async with priced.ada as http:
        answer = await http.post("/v1/clusters", params={"dry_run": True}, json={})
    assert answer.status_code == 503
    assert "prices.csv can't be read: line 7: 'free'" in answer.json()["detail"]


async def test_the_local_cloud_and_no_table(world: World) -> None:
    found = await plan(world, "clusters", {"compute_config": {"worker_nodes": [{"max_nodes": 2}]}})
    assert (found["provider"], found["min_nodes"], found["max_nodes"]) == ("local", 1, 3)
    assert (found["price_table"], found["unpriced"], found["min_usd_per_hour"]) == ("", [], None)
    await nothing_was_made(world)


async def test_all_that_a_real_one_is_refused_for(priced: World) -> None:
    typo = {"compute_config": {**CONFIG, "head_node": {"instance_type": "m6i.lrge"}}}
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("clusters", typo, 422, "compute_config.head_node.instance_type"),
        ("clusters", {"compute_config": {**CONFIG, "zones": ["us-west-2z"]}}, 422, "compute_config.zones"),
        ("clusters", {"cloud": "mars"}, 404, "cloud"),
        ("jobs", {"entrypoint": "true", "working_dir": "upload:" + "0" * 64}, 404, "working_dir"),
        ("jobs", {"entrypoint": "true", "env_vars": {"A B": "x"}}, 422, "env_vars"),
        ("jobs", {"entrypoint": "true", "cluster": "none"}, 404, "cluster"),
        ("jobs", {"entrypoint": "true", **typo}, 422, "compute_config.head_node.instance_type"),
    ]
    async with priced.ada as http:
        for noun, body, status, field in cases:
            for params in ({"dry_run": "true"}, {}):
                answer = await http.post(f"/v1/{noun}", params=params, json=body)
                assert (answer.status_code, answer.json().get("field")) == (status, field), (noun, body, answer.text)
        assert (await http.post("/v1/clusters", json={"name": "taken"})).status_code == 201
        taken = await http.post("/v1/clusters", params={"dry_run": True}, json={"name": "taken"})
        assert (taken.status_code, taken.json()["field"]) == (409, "name")
    async with priced.client(None) as http:
        assert (await http.post("/v1/clusters", params={"dry_run": True}, json={})).status_code == 401


async def test_a_job_on_an_existing_cluster_needs_no_more(priced: World) -> None:
    async with priced.ada as http:
        cluster = (await http.post("/v1/clusters", json={"name": "c"})).json()
    found = await plan(priced, "jobs", {"entrypoint": "true", "cluster": "c"})
    assert (found["cluster_id"], found["nodes"], found["max_nodes"]) == (cluster["id"], [], 0)


async def test_a_real_one_is_made_of_what_the_plan_says(priced: World) -> None:
    async with priced.ada as http:
        made = (await http.post("/v1/clusters", json={"compute_config": CONFIG})).json()
    planned = await plan(priced, "clusters", {"compute_config": CONFIG})
    assert made["compute_config"] == planned["compute_config"]


async def test_the_default_configs_by_name_unless_the_project_has_its_own(priced: World) -> None:
    gpu = await plan(priced, "clusters", {"compute_config": "default-gpu", "cloud": "prod"})
    assert gpu["nodes"][0]["types"][0]["name"] == "g4dn.xlarge"
    async with priced.ada as http:
        refused = await http.post("/v1/clusters", json={"compute_config": "default-gpu"})
        assert (refused.status_code, refused.json()["field"]) == (
            422,
            "compute_config.head_node.required_resources.GPU",
        ), "the local cloud of this test has none"
        await http.post("/v1/compute-configs", json={"name": "default-gpu", "config": {"idle_termination_minutes": 7}})
    own = await plan(priced, "clusters", {"compute_config": "default-gpu"})
    assert own["compute_config"]["idle_termination_minutes"] == 7
