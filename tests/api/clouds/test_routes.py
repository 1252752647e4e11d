"""Registering clouds: who may, what is refused, what stays when one is deleted; and what others' accounts trust."""

from __future__ import annotations

import stat
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError, TimeoutError

from heliostat.models.clouds import Check, CheckState
from heliostat.models.common import utcnow
from heliostat.models.users import Role
from store.tables import clouds, clusters, organizations, users
from tests.api.conftest import World

AWS: dict[str, Any] = {
    "region": "us-west-2",
    "role_arn": "arn:aws:iam::123456789012:role/heliostat",
    "vpc_id": "vpc-0123456789abcdef0",
    "subnets": [{"id": "subnet-0123456789abcdef0", "zone": "us-west-2a"}],
    "security_groups": ["sg-0123456789abcdef0"],
    "instance_profile": "heliostat-node",
    "bucket": "acme-heliostat",
}
GCP: dict[str, Any] = {
    "project": "acme-prod-1",
    "region": "us-central1",
    "zones": ["us-central1-a"],
    "workload_identity_provider": "projects/123/locations/global/workloadIdentityPools/heliostat/providers/heliostat",
    "service_account": "heliostat@acme-prod-1.iam.gserviceaccount.com",
    "bucket": "acme-heliostat",
}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control plane has no credentials of AWS, and looks for none outside."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


class Answers:
    """A worker's part, without one: the real client but for the workflows that ask a cloud."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.answers: dict[str, Any] = {"HeldByCloudWorkflow": []}
        self.asked: list[tuple[str, str]] = []

    async def execute_workflow(self, name: str, cloud_id: str, **_: Any) -> Any:
        self.asked.append((name, cloud_id))
        if isinstance(self.answers[name], Exception):
            raise self.answers[name]
        return self.answers[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


@pytest.fixture
def worker(world: World, temporal: Client) -> Answers:
    answers = Answers(temporal)
    world.change(temporal=answers)
    return answers


def failure(cause: BaseException) -> WorkflowFailureError:
    return WorkflowFailureError(cause=cause)


async def organization(world: World) -> str:
    async with world.db.read() as conn:
        return str(await conn.scalar(select(organizations.c.id)))


async def aws(world: World, name: str = "prod", **changes: Any) -> dict[str, Any]:
    config = {**AWS, "external_id": world.keys.external_id(await organization(world)), **changes}
    return {"name": name, "provider": "aws", "config": config}


async def test_a_registered_cloud_is_there_at_once(world: World) -> None:
    async with world.admin as http:
        made = await http.post("/v1/clouds", json=await aws(world))
        assert made.status_code == 201, made.text
        cloud = made.json()
        assert (cloud["name"], cloud["provider"], cloud["is_default"]) == ("prod", "aws", False)
        assert cloud["config"]["role_arn"] == AWS["role_arn"]
        can = cloud["capabilities"]
        assert can["zones"] == ["us-west-2a"]
        assert "SPOT" in can["markets"]
        assert can["max_gpu_per_node"] >= 8, "the catalogue's, not this machine's"
        for ref in ("prod", cloud["id"]):
            assert (await http.get(f"/v1/clouds/{ref}")).json() == cloud
        assert [c["name"] for c in (await http.get("/v1/clouds")).json()["items"]] == ["prod", "local"]
        accepted = await http.post("/v1/clusters", json={"cloud": "prod"})
        assert (accepted.status_code, accepted.json()["cloud"]) == (201, "prod")
        made = await http.post("/v1/clouds", json={"name": "google", "provider": "gcp", "config": GCP})
        assert made.status_code == 201, made.text
        assert made.json()["capabilities"]["zones"] == ["us-central1-a"]


async def test_repeated_under_its_key_it_is_the_same_cloud(world: World, worker: Answers) -> None:
    async with world.admin as http:
        key = {"idempotency-key": "k1"}
        body = await aws(world)
        first = await http.post("/v1/clouds", json=body, headers=key)
        assert (await http.post("/v1/clouds", json=body, headers=key)).json() == first.json()
        other = await http.post("/v1/clouds", json=body | {"name": "other"}, headers=key)
        assert (other.status_code, other.json()["field"]) == (409, "Idempotency-Key")
        again = await http.post("/v1/clouds", json=body)
        assert (again.status_code, again.json()["field"]) == (409, "name")
        assert (await http.delete("/v1/clouds/prod")).status_code == 204
        gone = await http.post("/v1/clouds", json=body, headers=key)
        assert (gone.status_code, gone.json()["resource"]) == (404, first.json()["id"])


async def test_only_an_admin_changes_clouds(world: World) -> None:
    async with world.ada as http:
        answers = [
            await http.post("/v1/clouds", json=await aws(world)),
            await http.post("/v1/clouds/local/default"),
            await http.post("/v1/clouds/local/verify"),
            await http.delete("/v1/clouds/local"),
            await http.get("/v1/clouds/trust"),
            await http.post("/v1/clouds/setup", json={"provider": "aws", "region": "us-west-2", "name": "prod"}),
        ]
    assert [a.status_code for a in answers] == [403] * 6


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"role_arn": "arn:aws:iam::12:role/x"}, "config.role_arn"),
        ({"subnets": []}, "config.subnets"),
        ({"secret_access_key": "s"}, "config.secret_access_key"),
        ({"bucket": "B"}, "config.bucket"),
    ],
)
async def test_a_config_that_can_t_be_is_refused_by_field(world: World, config: dict[str, Any], field: str) -> None:
    async with world.admin as http:
        refused = await http.post("/v1/clouds", json=await aws(world, **config))
    assert refused.status_code == 422
    assert refused.json()["field"] == field


async def test_a_misspelt_field_is_told_what_was_meant(world: World) -> None:
    async with world.admin as http:
        body = {"name": "g", "provider": "gcp", "config": GCP | {"sub_network": "x"}}
        refused = await http.post("/v1/clouds", json=body)
    assert (refused.status_code, refused.json()["field"]) == (422, "config.sub_network")
    assert refused.json()["remedy"] == "Did you mean 'subnetwork'?"


async def test_credentials_are_no_config(world: World) -> None:
    async with world.admin as http:
        file = {"type": "service_account", "private_key": "-----BEGIN", "token_uri": "http://evil"}
        refused = await http.post("/v1/clouds", json={"name": "g", "provider": "gcp", "config": GCP | file})
    assert refused.status_code == 422
    assert "-----BEGIN" not in refused.text


async def test_another_external_id_is_refused_and_the_right_one_is_told(world: World) -> None:
    async with world.admin as http:
        trust = (await http.get("/v1/clouds/trust")).json()
        for other in (world.keys.external_id("org_another"), "chosen-by-me"):
            refused = await http.post("/v1/clouds", json=await aws(world, external_id=other))
            assert (refused.status_code, refused.json()["field"]) == (422, "config.external_id")
            assert trust["external_id"] in refused.json()["remedy"]


async def test_another_organizations_role_is_refused(world: World) -> None:
    """Under our external id and under theirs: organization A never acts as what B has registered."""
    now, theirs = utcnow(), "org_theirs"
    arn = AWS["role_arn"]
    async with world.db.begin() as conn:
        await conn.execute(organizations.insert().values(id=theirs, name="theirs", created_at=now))
        row = {"organization_id": theirs, "capabilities": {}, "created_at": now}
        theirs_aws = AWS | {"external_id": world.keys.external_id(theirs)}
        await conn.execute(clouds.insert().values(id="cld_1", name="a", provider="aws", config=theirs_aws, **row))
        await conn.execute(clouds.insert().values(id="cld_2", name="g", provider="gcp", config=GCP, **row))
    async with world.admin as http:
        for role in (arn, arn.replace("heliostat", "Heliostat")):
            refused = await http.post("/v1/clouds", json=await aws(world, role_arn=role))
            assert (refused.status_code, refused.json()["field"]) == (409, "config.role_arn")
            assert "theirs" not in refused.text
        refused = await http.post("/v1/clouds", json={"name": "g", "provider": "gcp", "config": GCP})
        assert (refused.status_code, refused.json()["field"]) == (409, "config.service_account")
        for ref in ("cld_1", "a"):
            assert (await http.get(f"/v1/clouds/{ref}")).status_code == 404
            assert (await http.delete(f"/v1/clouds/{ref}")).status_code == 404
        assert (await http.post("/v1/clouds", json=await aws(world, role_arn=arn + "-2"))).status_code == 201


async def test_the_default_can_be_another_one(world: World) -> None:
    async with world.admin as http:
        await http.post("/v1/clouds", json=await aws(world))

        async def default() -> list[str]:
            return [c["name"] for c in (await http.get("/v1/clouds")).json()["items"] if c["is_default"]]

        assert (await http.post("/v1/clouds/prod/default")).json()["is_default"] is True
        assert await default() == ["prod"]
        assert (await http.post("/v1/clusters", json={})).json()["cloud"] == "prod"
        refused = await http.delete("/v1/clouds/prod")
        assert refused.status_code == 409
        await http.post("/v1/clouds/local/default")
        assert await default() == ["local"]
        await http.post("/v1/clouds", json=await aws(world, "two") | {"is_default": True})
        assert await default() == ["two"]
        assert (await http.post("/v1/clouds/none/default")).status_code == 404


async def ends(world: World, cluster_id: str) -> None:
    async with world.db.begin() as conn:
        await conn.execute(update(clusters).where(clusters.c.id == cluster_id).values(ended_at=utcnow()))


async def test_a_cloud_in_use_is_not_deleted_and_its_name_is_free_afterwards(world: World, worker: Answers) -> None:
    async with world.admin as http:
        first = (await http.post("/v1/clouds", json=await aws(world))).json()
        cluster = (await http.post("/v1/clusters", json={"name": "train", "cloud": "prod"})).json()
        job = (await http.post("/v1/jobs", json={"name": "j", "entrypoint": "x", "cloud": "prod"})).json()
        schedule = {
            "cron_expression": "0 0 1 1 *",
            "job_config": {"name": "yearly", "entrypoint": "x", "cloud": "prod"},
        }
        applied = await http.put("/v1/schedules/yearly", json=schedule)
        assert applied.status_code in (200, 201), applied.text
        refused = await http.delete("/v1/clouds/prod")
        assert refused.status_code == 409
        for named in (f"cluster train ({cluster['id']})", f"job j ({job['id']})", "schedule yearly"):
            assert named in refused.json()["details"]["living"]
        await http.delete("/v1/schedules/yearly")
        async with world.db.begin() as conn:
            from store.tables import jobs

            await conn.execute(update(jobs).where(jobs.c.id == job["id"]).values(ended_at=utcnow()))
        await ends(world, cluster["id"])
        assert (await http.delete("/v1/clouds/prod")).status_code == 204
        assert (await http.get("/v1/clouds/prod")).status_code == 404
        assert (await http.get(f"/v1/clouds/{first['id']}")).status_code == 404
        refused = await http.post("/v1/clusters", json={"cloud": "prod"})
        assert (refused.status_code, refused.json()["field"]) == (404, "cloud")
        second = (await http.post("/v1/clouds", json=await aws(world))).json()
        assert (second["name"], second["id"] != first["id"]) == ("prod", True)
        assert (await http.get(f"/v1/clusters/{cluster['id']}")).json()["cloud"] == "prod", (
            "it still knows where it was"
        )


async def test_this_servers_own_cloud_stays(world: World) -> None:
    async with world.admin as http:
        await http.post("/v1/clouds", json=await aws(world) | {"is_default": True})
        refused = await http.delete("/v1/clouds/local")
        assert (refused.status_code, "own" in refused.json()["detail"]) == (409, True)
        assert (await http.get("/v1/clouds/local")).status_code == 200


@pytest.mark.parametrize("name", ["trust", "setup", "fake"])
async def test_names_of_routes_and_of_servers_own_are_no_names_of_clouds(world: World, name: str) -> None:
    async with world.admin as http:
        refused = await http.post("/v1/clouds", json=await aws(world, name))
    assert (refused.status_code, refused.json()["field"]) == (422, "name")


async def test_trust_is_the_organizations_own_and_holds_no_secret(world: World) -> None:
    async with world.admin as http:
        trust = (await http.get("/v1/clouds/trust")).json()
    mine = await organization(world)
    assert trust == {
        "installation_id": world.keys.installation_id(),
        "external_id": world.keys.external_id(mine),
        "aws_principal": None,
        "aws_principal_whole": True,
        "issuer": world.settings.public_api_url,
        "subject": f"heliostat:{world.keys.installation_id()}:{mine}",
    }
    assert world.keys.external_id("org_another") != trust["external_id"]


async def test_the_issuers_documents_need_no_token_and_show_no_private_key(world: World) -> None:
    async with world.client(None) as http:
        discovery = (await http.get("/.well-known/openid-configuration")).json()
        answer = await http.get(httpx.URL(discovery["jwks_uri"]).path)
    assert discovery["issuer"] == world.settings.public_api_url
    (key,) = answer.json()["keys"]
    assert (key["kty"], key["alg"], set(key) & {"d", "p", "q"}) == ("RSA", "RS256", set())
    file = world.settings.home / "oidc.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_verifying_asks_a_worker_and_says_what_failed(world: World, worker: Answers) -> None:
    found = [Check(name="bucket", state=CheckState.OK), Check(name="right", state=CheckState.FAILED, remedy="add it")]
    worker.answers["VerifyCloudWorkflow"] = found
    async with world.admin as http:
        answer = await http.post("/v1/clouds/local/verify")
        assert answer.json() == {
            "cloud_id": world.cloud_id,
            "ok": False,
            "checks": [c.model_dump(mode="json") for c in found],
        }
        found.pop()
        assert (await http.post(f"/v1/clouds/{world.cloud_id}/verify")).json()["ok"] is True
        assert (await http.post("/v1/clouds/none/verify")).status_code == 404
        assert worker.asked == [("VerifyCloudWorkflow", world.cloud_id)] * 2
        worker.answers["VerifyCloudWorkflow"] = failure(TimeoutError("", type=None, last_heartbeat_details=[]))
        unanswered = await http.post("/v1/clouds/local/verify")
        assert (unanswered.status_code, "no answer within" in unanswered.json()["detail"]) == (500, True)


async def test_a_cloud_that_holds_something_or_does_not_say_is_deleted_by_force_alone(
    world: World, worker: Answers
) -> None:
    """Only the sweep of a registered cloud would end what is left there."""
    async with world.admin as http:
        id = (await http.post("/v1/clouds", json=await aws(world))).json()["id"]
        worker.answers["HeldByCloudWorkflow"] = ["i-1", "svc_1"]
        refused = await http.delete("/v1/clouds/prod")
        assert (refused.status_code, refused.json()["details"]) == (409, {"held": ["i-1", "svc_1"]})
        worker.answers["HeldByCloudWorkflow"] = failure(ApplicationError("The role is gone."))
        refused = await http.delete("/v1/clouds/prod")
        assert (refused.status_code, "The role is gone" in refused.json()["detail"]) == (409, True)
        assert "--force" in refused.json()["remedy"]
        assert worker.asked == [("HeldByCloudWorkflow", id)] * 2
        assert (await http.delete("/v1/clouds/prod", params={"force": True})).status_code == 204
        assert len(worker.asked) == 2


async def test_an_admin_of_another_organization_sees_none_of_it(world: World, worker: Answers) -> None:
    """Two organizations of one installation share the records and nothing else."""
    import hashlib

    from store.tables import tokens

    async with world.admin as http:
        await http.post("/v1/clouds", json=await aws(world))
    now = utcnow()
    async with world.db.begin() as conn:
        await conn.execute(organizations.insert().values(id="org_2", name="second", created_at=now))
        user = {"id": "usr_2", "organization_id": "org_2", "name": "root", "role": Role.ADMIN, "created_at": now}
        await conn.execute(users.insert().values(**user))
        sha256 = hashlib.sha256(b"second").hexdigest()
        await conn.execute(tokens.insert().values(id="tok_2", user_id="usr_2", name="t", sha256=sha256, created_at=now))
    async with world.client("second") as http:
        assert (await http.get("/v1/clouds")).json()["items"] == []
        assert (await http.get("/v1/clouds/prod")).status_code == 404
        body = await aws(world, role_arn=AWS["role_arn"] + "-2")
        assert (await http.post("/v1/clouds", json=body)).status_code == 422, "that external id is the first one's"
        body["config"]["external_id"] = world.keys.external_id("org_2")
        made = await http.post("/v1/clouds", json=body)
        assert (made.status_code, made.json()["is_default"]) == (201, True), "its first is its default"
        assert (await http.delete("/v1/clouds/prod")).status_code == 204, "and its only one"
    async with world.admin as http:
        assert (await http.get("/v1/clouds/prod")).status_code == 200


async def test_an_upload_is_told_the_headers_that_its_bucket_wants(world: World) -> None:
    """S3 checks the bytes only of a PUT that carries their checksum."""
    from clouds.local.bucket.bucket import LocalBucket

    class LikeS3(LocalBucket):
        def put_headers(self, *, sha256: str | None = None) -> dict[str, str]:
            return {"x-amz-checksum-sha256": f"of {sha256}"}

    bucket = LikeS3(world.settings.home / "bucket", "http://127.0.0.1:9", world.keys.bucket_key())
    world.context.buckets[world.cloud_id] = bucket
    async with world.ada as http:
        upload = (await http.post("/v1/uploads", json={"sha256": "0" * 64, "size": 3})).json()
    assert upload["headers"] == {"x-amz-checksum-sha256": f"of {'0' * 64}"}


async def test_what_a_deleted_cloud_has_written_is_said_to_be_in_its_bucket(world: World) -> None:
    async with world.ada as http:
        cluster = (await http.post("/v1/clusters", json={})).json()
        del world.context.buckets[world.cloud_id]
        gone = await http.get(f"/v1/clusters/{cluster['id']}/logs")
    assert (gone.status_code, "bucket" in gone.json()["remedy"]) == (404, True)
