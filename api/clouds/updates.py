"""Another config for a registered cloud. What runs there must still be found with it, so some fields change only while
nothing uses them."""

from __future__ import annotations

import asyncio

import structlog
from fastapi import APIRouter
from pydantic import JsonValue

from api.clouds.routes import check_external_id, check_not_anothers, check_nothing_held
from api.kit import lookup
from api.kit.auth import Me
from api.kit.context import Ctx, FromVendors
from api.kit.idempotency import COMMAND_PREFIX, Key, find_previous, reserve
from clouds.registry import REFRESH_S
from heliostat.errors import Conflict, InvalidRequest
from heliostat.models.clouds import AwsCloudCreate, AwsConfig, Cloud, CloudCreate, GcpCloudCreate, GcpConfig
from heliostat.models.common import new_id
from store import clouds as store
from store.clouds import NOUNS, lives_on
from store.database import AsyncConnection

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1/clouds", tags=["clouds"])

IN_FORCE_S = REFRESH_S + 1.0
"""By then every process has read the records again."""

PLACE = {"region", "account", "project"}
"""Where machines are: those that are left there would never be found again."""
FIXED = PLACE | {"vpc_id", "network", "bucket", "bucket_prefix"}
"""What running machines, their code and their logs are in."""
ENDPOINT = {"balancer_internal", "https"}
"""What the URL of a running service depends on."""


@router.put("/{ref}")
async def change(ctx: Ctx, me: Me, key: Key, vendors: FromVendors, ref: str, body: CloudCreate) -> Cloud:
    """Replaces the cloud's config as a whole: what is left out gets its default. Checked as at registration; the vendor
    is called only when the cloud moves, to ask what the old location still holds. Name and provider never change;
    location, network and bucket, and how services' URLs begin, not while anything runs there. Machines that are
    launched from then on use it; it answers when all processes do, after some seconds. ``is_default`` true makes it
    the default cloud; false changes nothing about that."""
    me.must_be_admin("change clouds")
    async with ctx.db.read() as conn:
        repeated = await find_previous(conn, me.organization_id, key) is not None
        cloud = await lookup.cloud(conn, me, ref)
    if repeated:
        return cloud
    _check_same(cloud, body)
    if isinstance(body, AwsCloudCreate):
        check_external_id(ctx.keys, me, body.config)
    capabilities = await asyncio.to_thread(vendors.capabilities, body.config)
    if PLACE & _differing(cloud.config, body.config):
        async with ctx.db.read() as conn:
            await _check_may_change(conn, cloud, body.config)
        await check_nothing_held(ctx, cloud)
    async with ctx.db.begin() as conn:
        await store.lock_organizations(conn)
        await store.lock_cloud(conn, cloud.id)
        cloud = await lookup.cloud(conn, me, cloud.id)
        if await reserve(conn, me.organization_id, key, new_id(COMMAND_PREFIX)) is not None:
            return cloud
        changed = _differing(cloud.config, body.config)
        await _check_may_change(conn, cloud, body.config)
        await check_not_anothers(conn, me, body.config)
        await store.change_cloud(conn, cloud.id, body.config, capabilities)
        if body.is_default:
            await store.make_default(conn, me.organization_id, cloud.id)
        cloud = await lookup.cloud(conn, me, cloud.id)
    log.info("cloud changed", cloud=cloud.id, name=cloud.name, fields=sorted(changed), actor=me.actor)
    if changed:
        await asyncio.sleep(IN_FORCE_S)
    return cloud


def _check_same(cloud: Cloud, body: AwsCloudCreate | GcpCloudCreate) -> None:
    if cloud.config is None:
        raise Conflict(
            f"Cloud {cloud.name} is the cloud of a server's own machine: it has no config.",
            remedy="Change that server's settings (HELIOSTAT_…).",
            resource=cloud.id,
        )
    for field, had, given in (("name", cloud.name, body.name), ("provider", cloud.provider, body.provider)):
        if had != given:
            raise InvalidRequest(
                f"The {field} of cloud {cloud.name} can't change to {given}.",
                remedy=f"Leave it {had}, or register another cloud.",
                field=field,
            )


def _differing(before: AwsConfig | GcpConfig | None, after: AwsConfig | GcpConfig) -> set[str]:
    """Names of what differs: fields, and ``account`` and ``https``, which are parts of a field's value."""
    old, new = _values(before), _values(after)
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def _values(config: AwsConfig | GcpConfig | None) -> dict[str, JsonValue]:
    if config is None:
        return {}
    found: dict[str, JsonValue] = config.model_dump(mode="json")
    if isinstance(config, AwsConfig):
        more: dict[str, JsonValue] = {
            "account": config.role_arn.split(":")[4],
            "https": config.balancer_certificate is not None,
        }
    else:
        more = {"https": bool(config.balancer_certificates)}
    return found | more


async def _check_may_change(conn: AsyncConnection, cloud: Cloud, config: AwsConfig | GcpConfig) -> None:
    changed = _differing(cloud.config, config)
    wrong = sorted(changed & FIXED) or sorted(changed & ENDPOINT)
    if not wrong or not (living := await lives_on(conn, cloud.id, NOUNS if changed & FIXED else ("service",))):
        return
    https = "balancer_certificate" if isinstance(config, AwsConfig) else "balancer_certificates"
    written = {"account": "role_arn", "https": https}
    shown = {"account": "account", "https": f"use of https ({https})"}
    raise Conflict(
        f"The {' and '.join(shown.get(name, name) for name in wrong)} of cloud {cloud.name} can't change while "
        f"anything runs there: {', '.join(living)}.",
        remedy="Terminate them first, and change or delete the schedules; or register another cloud.",
        resource=cloud.id,
        field=f"config.{written.get(wrong[0], wrong[0])}",
        details={"living": living, "fields": [f"config.{written.get(name, name)}" for name in wrong]},
    )
