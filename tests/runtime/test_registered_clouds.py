"""Clouds registered while the processes run: open at once, gone when deleted, and none takes the others along.

Real boto3 against moto, real google-cloud-compute against our fake; the records are SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from clouds import registry
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig, GcpConfig
from heliostat.models.common import utcnow
from installation import Installation, open_installation
from runtime.settings import Settings
from store.database import migrate
from store.tables import clouds, organizations
from tests.clouds.aws.support import Account
from tests.clouds.conftest import _aws_account, aws_account, moto_url  # noqa: F401 - fixtures
from tests.clouds.gcp import support as gcp
from tests.lab.gce import GceFake


@pytest.fixture
async def mine(tmp_path: Any, moto_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Installation]:  # noqa: F811
    monkeypatch.setenv("HELIOSTAT_FAKE_CLOUD", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIACONTROLPLANE0000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    fake = GceFake()
    settings = Settings(home=tmp_path, aws_endpoint_url=moto_url, gcp_endpoint_url=gcp.served(fake))
    await migrate(settings.records_url)
    async with open_installation(settings) as found:
        yield found


async def register(mine: Installation, config: AwsConfig | GcpConfig | dict[str, Any], id: str = "cld_1") -> None:
    """The row that the API writes, by another process."""
    fields = config if isinstance(config, dict) else config.model_dump(mode="json")
    async with mine.db.begin() as conn:
        row = {
            "id": id,
            "organization_id": await conn.scalar(select(organizations.c.id)),
            "name": f"name-of-{id}",
            "provider": "aws" if "role_arn" in fields else "gcp",
            "config": fields,
            "capabilities": {},
            "created_at": utcnow(),
        }
        await conn.execute(insert(clouds).values(**row))


async def test_a_cloud_is_usable_as_soon_as_it_is_registered(mine: Installation, aws_account: Account) -> None:  # noqa: F811
    with pytest.raises(KeyError):
        mine.machines["cld_1"]
    await register(mine, aws_account.config)
    machines = await asyncio.to_thread(lambda: mine.machines["cld_1"])  # an activity's thread; nothing was restarted
    installation = mine.keys.installation_id()
    assert await asyncio.to_thread(machines.list_owned, installation) == []
    assert "cld_1" in mine.buckets, "and by then the event loop knows it too"
    assert (mine.cloud_names["cld_1"], len(mine.machines), sorted(mine.machines)) == (
        "name-of-cld_1",
        2,
        sorted(mine.verifies),
    )
    assert mine.balancers["cld_1"].describe("svc_1") is None


async def test_objects_lie_under_the_organization(mine: Installation, aws_account: Account) -> None:  # noqa: F811
    aws_account.bucket()
    await register(mine, aws_account.config)
    bucket = await asyncio.to_thread(lambda: mine.buckets["cld_1"])
    await asyncio.to_thread(bucket.put, "uploads/a.zip", b"code")
    async with mine.db.read() as conn:
        organization = await conn.scalar(select(organizations.c.id))
    held = await asyncio.to_thread(aws_account.bucket().list, "")
    assert [o.key for o in held] == [f"{organization}/uploads/a.zip"]


async def test_a_cloud_of_google_is_opened_by_our_own_issuer(mine: Installation) -> None:
    await register(mine, gcp.config())
    bucket = await asyncio.to_thread(lambda: mine.buckets["cld_1"])
    fake = gcp._stage()[0].fake
    assert mine.vendors is not None
    async with mine.db.read() as conn:
        organization = str(await conn.scalar(select(organizations.c.id)))
    fake.auth.jwks = mine.vendors.jwks()
    fake.auth.issuer = mine.vendors.openid_configuration()["issuer"]
    fake.auth.audience, fake.auth.organization = f"//iam.googleapis.com/{gcp.PROVIDER}", organization
    fake.auth.add_account(gcp.ACCOUNT)
    await asyncio.to_thread(bucket.put, "uploads/a.zip", b"code")
    assert [o.key for o in await asyncio.to_thread(bucket.list, "")] == ["uploads/a.zip"]
    assert fake.auth.calls["generateAccessToken"] == 1
    assert mine.machines["cld_1"].capabilities().zones == ["us-central1-a", "us-central1-b"]


async def test_what_is_deleted_or_changed_is_so_here_within_seconds(
    mine: Installation,
    aws_account: Account,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await register(mine, aws_account.config)
    first = await asyncio.to_thread(lambda: mine.machines["cld_1"])
    assert await asyncio.to_thread(lambda: mine.machines["cld_1"]) is first

    async def becomes(**values: Any) -> None:
        async with mine.db.begin() as conn:
            await conn.execute(update(clouds).where(clouds.c.id == "cld_1").values(**values))
        with pytest.raises(KeyError):
            await asyncio.to_thread(lambda: mine.machines["none"])  # has the records read anew

    one = aws_account.config.model_copy(update={"subnets": aws_account.config.subnets[:1]})
    await becomes(config=one.model_dump(mode="json"))
    assert mine.machines["cld_1"].capabilities().zones == ["us-west-2a"]
    await becomes(deleted_at=utcnow())
    assert "cld_1" not in mine.machines


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REFRESH_S", 0.02)


async def test_it_is_noticed_without_anybody_asking(
    soon: None,
    mine: Installation,
    aws_account: Account,  # noqa: F811
) -> None:
    await register(mine, aws_account.config)
    async with asyncio.timeout(60):
        while "cld_1" not in list(mine.machines):
            await asyncio.sleep(0.02)
    before = mine.machines["cld_1"]
    one = aws_account.config.model_copy(update={"subnets": aws_account.config.subnets[:1]})
    async with mine.db.begin() as conn:
        await conn.execute(update(clouds).values(config=one.model_dump(mode="json")).where(clouds.c.id == "cld_1"))
    async with asyncio.timeout(60):
        while mine.machines["cld_1"] is before:
            await asyncio.sleep(0.02)
    assert mine.machines["cld_1"].capabilities().zones == ["us-west-2a"]
    assert await asyncio.to_thread(before.list_owned, mine.keys.installation_id()) == [], "a call under way goes on"


@pytest.mark.parametrize(
    ("broken", "why"),
    [({"region": "us-west-2"}, "role_arn"), ({"role_arn": "x", "of_newer_code": 1}, "config can't be read")],
)
async def test_one_that_can_t_be_opened_stops_no_other(
    mine: Installation,
    aws_account: Account,  # noqa: F811
    broken: dict[str, Any],
    why: str,
) -> None:
    await register(mine, broken)
    await register(mine, aws_account.config, "cld_2")
    machines = await asyncio.to_thread(lambda: mine.machines["cld_2"])
    assert await asyncio.to_thread(machines.list_owned, mine.keys.installation_id()) == []
    with pytest.raises(CloudError, match=f"name-of-cld_1.*{why}"):
        mine.machines["cld_1"].list_owned("x")
    with pytest.raises(CloudError, match="name-of-cld_1"):
        mine.buckets["cld_1"].stat("x")
    with pytest.raises(CloudError, match="name-of-cld_1"):
        mine.verifies["cld_1"]()
    async with mine.db.begin() as conn:
        config = aws_account.config.model_dump(mode="json")
        await conn.execute(update(clouds).where(clouds.c.id == "cld_1").values(config=config, provider="aws"))
    with pytest.raises(KeyError):
        await asyncio.to_thread(lambda: mine.machines["none"])
    assert await asyncio.to_thread(mine.machines["cld_1"].list_owned, mine.keys.installation_id()) == []


async def test_the_principal_is_who_we_are_to_aws(mine: Installation) -> None:
    assert mine.vendors is not None
    trust = await asyncio.to_thread(mine.vendors.trust, "org_1")
    assert (trust.aws_principal or "").startswith("arn:aws:")
    assert trust.external_id == mine.keys.external_id("org_1")


async def test_this_hosts_own_cloud_can_be_verified(mine: Installation) -> None:
    (id,) = mine.machines
    found = {c.name: c.state for c in await asyncio.to_thread(mine.verifies[id])}
    assert (found["home"], found["machine ports"], found["service ports"]) == ("ok", "ok", "ok")
