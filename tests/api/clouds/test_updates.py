"""Another config for a registered cloud: who may, what is refused while what lives there, what is in force when."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy import select, update
from temporalio.client import Client

from api.clouds import updates as cloud_updates
from clouds.registry import REFRESH_S
from heliostat.models.common import utcnow
from store.tables import accepted, clouds, projects, services
from tests.api.clouds.test_routes import AWS, GCP, Answers, aws, ends, nobody, worker  # noqa: F401 - fixtures
from tests.api.conftest import World

SUBNETS = [*AWS["subnets"], {"id": "subnet-0123456789abcdef1", "zone": "us-west-2b"}]
CERTIFICATE = "arn:aws:acm:us-west-2:123456789012:certificate/0123"
BUCKET = {"bucket": "another-bucket"}
IMAGE = {"container_image": "rayproject/ray:2.60.0-py311"}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for other processes, which are not there."""
    assert cloud_updates.IN_FORCE_S > REFRESH_S
    monkeypatch.setattr(cloud_updates, "IN_FORCE_S", 0)


@pytest.fixture
async def prod(world: World) -> str:
    async with world.admin as http:
        made = await http.post("/v1/clouds", json=await aws(world))
    return str(made.json()["id"])


async def put(world: World, body: dict[str, Any], ref: str = "prod", **headers: str) -> Any:
    async with world.admin as http:
        return await http.put(f"/v1/clouds/{ref}", json=body, headers=headers)


async def test_its_config_is_the_new_one_and_what_it_can_do_too(world: World, prod: str) -> None:
    changed = await put(world, await aws(world, subnets=SUBNETS, **IMAGE))
    assert changed.status_code == 200, changed.text
    cloud = changed.json()
    assert (cloud["id"], cloud["name"], cloud["is_default"]) == (prod, "prod", False)
    assert cloud["config"]["container_image"] == IMAGE["container_image"]
    assert cloud["capabilities"]["zones"] == ["us-west-2a", "us-west-2b"]
    async with world.admin as http:
        assert (await http.get("/v1/clouds/prod")).json() == cloud
    back = await put(world, await aws(world), ref=prod)
    assert back.json()["config"]["container_image"] is None, "the whole config: what is left out gets its default"
    assert (await put(world, await aws(world) | {"is_default": True})).json()["is_default"] is True
    assert (await put(world, await aws(world))).json()["is_default"] is True, "it takes a default from nobody"


async def test_repeated_under_its_key_it_is_done_once(world: World, prod: str) -> None:
    first = await aws(world, **IMAGE)
    assert (await put(world, first, **{"idempotency-key": "k"})).status_code == 200
    await put(world, await aws(world))
    repeated = await put(world, first, **{"idempotency-key": "k"})
    assert repeated.json()["config"]["container_image"] is None, "what came after it stays"
    other = await put(world, await aws(world), **{"idempotency-key": "k"})
    assert (other.status_code, other.json()["field"]) == (409, "Idempotency-Key")
    async with world.db.read() as conn:
        kept = list(await conn.scalars(select(accepted.c.resource_id).where(accepted.c.key == "k")))
    assert [id.partition("_")[0] for id in kept] == ["od"], "which retention takes by its age"


async def test_it_answers_when_every_process_goes_by_it(
    world: World, prod: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_updates, "IN_FORCE_S", 0.3)
    began = time.monotonic()
    await put(world, await aws(world, **IMAGE))
    assert time.monotonic() - began >= 0.3
    monkeypatch.setattr(cloud_updates, "IN_FORCE_S", 3600)
    async with asyncio.timeout(60):
        await put(world, await aws(world, **IMAGE))  # nothing has changed


async def test_who_may_not(world: World, prod: str) -> None:
    body = await aws(world, **IMAGE)
    async with world.ada as http:
        assert (await http.put("/v1/clouds/prod", json=body)).status_code == 403
    assert (await put(world, body, ref="none")).status_code == 404
    own = await put(world, body | {"name": "local"}, ref="local")
    assert (own.status_code, "server's own" in own.json()["detail"]) == (409, True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "other"}, "name"),
        ({"provider": "gcp", "config": GCP}, "provider"),
        ({"config": {**AWS, "external_id": "another-one"}}, "config.external_id"),
        ({"config": {**AWS, "external_id": "x1", "subnets": []}}, "config.subnets"),
        ({"config": {**AWS, "external_id": "x1", "sub_nets": []}}, "config.sub_nets"),
    ],
)
async def test_what_is_never_taken(world: World, prod: str, change: dict[str, Any], field: str) -> None:
    refused = await put(world, await aws(world) | change)
    assert (refused.status_code, refused.json()["field"]) == (422, field), refused.text


async def test_another_organizations_role_is_refused(world: World, prod: str) -> None:
    theirs = {**AWS, "role_arn": AWS["role_arn"].replace("heliostat", "theirs")}
    from store.tables import organizations

    async with world.db.begin() as conn:
        await conn.execute(organizations.insert().values(id="org_2", name="second", created_at=utcnow()))
        row = {"id": "cld_2", "organization_id": "org_2", "name": "prod", "provider": "aws", "is_default": True}
        await conn.execute(clouds.insert().values(**row, capabilities={}, config=theirs, created_at=utcnow()))
    refused = await put(world, await aws(world, role_arn=theirs["role_arn"]))
    assert (refused.status_code, refused.json()["field"]) == (409, "config.role_arn")


MOVES: list[tuple[dict[str, Any], str]] = [
    ({"region": "us-east-1"}, "region"),
    ({"role_arn": "arn:aws:iam::999999999999:role/heliostat"}, "role_arn"),
    ({"vpc_id": "vpc-0123456789abcdef1"}, "vpc_id"),
    (BUCKET, "bucket"),
    ({"bucket_prefix": "new/"}, "bucket_prefix"),
]


async def test_what_a_cluster_that_lives_needs_stays(world: World, prod: str, worker: Answers) -> None:  # noqa: F811
    async with world.admin as http:
        cluster = (await http.post("/v1/clusters", json={"name": "train", "cloud": "prod"})).json()
    for change, field in MOVES:
        refused = await put(world, await aws(world, **change))
        problem = refused.json()
        assert (refused.status_code, problem["field"]) == (409, f"config.{field}"), refused.text
        assert f"cluster train ({cluster['id']})" in problem["detail"]
    assert worker.asked == [], "the cloud is not asked for what is refused anyway"
    both = await put(world, await aws(world, **BUCKET, region="us-east-1"))
    assert both.json()["details"]["fields"] == ["config.bucket", "config.region"]
    role = "arn:aws:iam::123456789012:role/heliostat-2"
    fine = await put(world, await aws(world, role_arn=role, subnets=SUBNETS, balancer_certificate=CERTIFICATE, **IMAGE))
    assert fine.status_code == 200, "another role of the account, and what is only of new machines"
    await ends(world, cluster["id"])
    for change, _ in MOVES:
        assert (await put(world, await aws(world, **change))).status_code == 200


async def test_it_does_not_move_away_from_what_is_left_there(world: World, prod: str, worker: Answers) -> None:  # noqa: F811
    worker.answers["HeldByCloudWorkflow"] = ["machine i-1"]
    refused = await put(world, await aws(world, region="us-east-1"))
    assert (refused.status_code, refused.json()["details"]["held"]) == (409, ["machine i-1"])
    assert (await put(world, await aws(world, **BUCKET))).status_code == 200, "which is no place of machines"
    worker.answers["HeldByCloudWorkflow"] = []
    assert (await put(world, await aws(world, region="us-east-1"))).status_code == 200


async def test_a_services_url_stays(world: World, prod: str, temporal: Client) -> None:
    async with world.db.begin() as conn:
        project = await conn.scalar(select(projects.c.id).where(projects.c.name == "team"))
        row = {"id": "svc_1", "project_id": project, "cloud_id": prod, "name": "chat", "live_name": "chat"}
        rest: dict[str, Any] = {"state": "RUNNING", "doc": {}, "input": {}, "tokens": [], "created_at": utcnow()}
        await conn.execute(services.insert().values(**row, **rest))
    refused = await put(world, await aws(world, balancer_certificate=CERTIFICATE))
    assert (refused.status_code, refused.json()["field"]) == (409, "config.balancer_certificate")
    assert refused.json()["details"]["living"] == ["service chat (svc_1)"]
    assert (await put(world, await aws(world, balancer_internal=True))).json()["field"] == "config.balancer_internal"
    async with world.db.begin() as conn:
        await conn.execute(update(services).values(ended_at=utcnow()))
    assert (await put(world, await aws(world, balancer_certificate=CERTIFICATE))).status_code == 200
    async with world.db.begin() as conn:
        await conn.execute(update(services).values(ended_at=None))
    renewed = await put(world, await aws(world, balancer_certificate=f"{CERTIFICATE}-2"))
    assert renewed.status_code == 200, renewed.text


async def test_google_likewise(world: World, worker: Answers) -> None:  # noqa: F811
    async with world.admin as http:
        await http.post("/v1/clouds", json={"name": "google", "provider": "gcp", "config": GCP})
        await http.post("/v1/clusters", json={"cloud": "google"})

    async def changed(**fields: Any) -> tuple[int, str | None]:
        answer = await put(world, {"name": "google", "provider": "gcp", "config": {**GCP, **fields}}, ref="google")
        return answer.status_code, answer.json().get("field")

    assert await changed(project="acme-prod-2") == (409, "config.project")
    assert await changed(network="other") == (409, "config.network")
    certificate = "projects/acme-prod-1/regions/us-central1/sslCertificates/wild"
    assert await changed(zones=["us-central1-b"], balancer_certificates=[certificate]) == (200, None)
