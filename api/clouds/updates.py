"""Another config for a cloud that is registered. What runs there must be found again by the new one, so some fields
change only while nothing lives that goes by them."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from fastapi import APIRouter, Request
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from api.clouds.routes import FromVendors, check_external_id, check_not_anothers, check_nothing_held, make_default
from api.kit import lookup
from api.kit.auth import Me
from api.kit.idempotency import TOLD, Ordered, claim, earlier
from clouds.registry import REFRESH_S
from heliostat.errors import Conflict, InvalidRequest
from heliostat.models.clouds import AwsCloudCreate, AwsConfig, Cloud, CloudCreate, GcpCloudCreate, GcpConfig
from heliostat.models.common import new_id
from store.clouds import NOUNS, lives_on
from store.tables import clouds, organizations

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1/clouds", tags=["clouds"])

IN_FORCE_S = REFRESH_S + 1.0
"""By then every process has read the records anew."""

PLACE = {"region", "account", "project"}
"""Where machines are: those that are left there would never be seen again."""
FIXED = PLACE | {"vpc_id", "network", "bucket", "bucket_prefix"}
"""What machines that live, and the code and logs of what runs on them, are in."""
ENDPOINT = {"balancer_internal", "https"}
"""What the URL of a service that lives says."""


@router.put("/{ref}")
async def change(request: Request, me: Me, order: Ordered, vendors: FromVendors, ref: str, body: CloudCreate) -> Cloud:
    """Gives the cloud another config, whole: what is left out gets its default. Checked as at its registration; nothing
    is asked of the vendor but, when it moves, what the old place still holds. Name and provider never change; the
    place, network and bucket, and how services' URLs begin, not while anything lives there. Machines that are launched
    from then on go by it; it answers when all processes do, after some seconds. ``is_default`` true makes it the
    default; false leaves that as it is."""
    me.must_be_admin("change clouds")
    state = request.app.state
    async with state.db.read() as conn:
        repeated = await earlier(conn, me.organization_id, order) is not None
        cloud = await lookup.cloud(conn, me, ref)
    if repeated:
        return cloud
    _check_same(cloud, body)
    if isinstance(body, AwsCloudCreate):
        check_external_id(state.keys, me, body.config)
    capabilities = await asyncio.to_thread(vendors.capabilities, body.config)
    if PLACE & _differing(cloud.config, body.config):
        async with state.db.read() as conn:
            await _check_may_change(conn, cloud, body.config)
        await check_nothing_held(state, cloud)
    async with state.db.begin() as conn:
        # As in ``register``, and as in ``delete``: what is being accepted now waits for us, or we for it.
        await conn.execute(select(organizations.c.id).order_by(organizations.c.id).with_for_update(key_share=True))
        await conn.execute(select(clouds.c.id).where(clouds.c.id == cloud.id).with_for_update())
        cloud = await lookup.cloud(conn, me, cloud.id)
        if not await claim(conn, me.organization_id, order, new_id(TOLD)):
            return cloud
        changed = _differing(cloud.config, body.config)
        await _check_may_change(conn, cloud, body.config)
        await check_not_anothers(conn, me, body.config)
        values: dict[str, Any] = {
            "config": body.config.model_dump(mode="json"),
            "capabilities": capabilities.model_dump(mode="json"),
        }
        await conn.execute(update(clouds).where(clouds.c.id == cloud.id).values(**values))
        if body.is_default:
            await make_default(conn, me, cloud.id)
        cloud = await lookup.cloud(conn, me, cloud.id)
    log.info("cloud changed", cloud=cloud.id, name=cloud.name, fields=sorted(changed), actor=me.actor)
    if changed:
        await asyncio.sleep(IN_FORCE_S)
    return cloud


def _check_same(cloud: Cloud, body: AwsCloudCreate | GcpCloudCreate) -> None:
    if cloud.config is None:
        raise Conflict(
            f"Cloud {cloud.name} is a server's own: it has no config.",
            remedy="Its server's settings say how it is (HELIOSTAT_…).",
            resource=cloud.id,
        )
    for field, had, given in (("name", cloud.name, body.name), ("provider", cloud.provider, body.provider)):
        if had != given:
            raise InvalidRequest(
                f"The {field} of cloud {cloud.name} can't become {given}.",
                remedy=f"Leave it {had}, or register another cloud.",
                field=field,
            )


def _differing(before: AwsConfig | GcpConfig | None, after: AwsConfig | GcpConfig) -> set[str]:
    """Names of what is not the same: of fields, and ``account`` and ``https``, which parts of a field's value say."""
    old, new = _said(before), _said(after)
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def _said(config: AwsConfig | GcpConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    found = config.model_dump(mode="json")
    if isinstance(config, AwsConfig):
        more = {"account": config.role_arn.split(":")[4], "https": config.balancer_certificate is not None}
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
    said = {"account": "account", "https": f"use of https ({https})"}
    raise Conflict(
        f"The {' and '.join(said.get(name, name) for name in wrong)} of cloud {cloud.name} can't change while anything "
        f"lives there: {', '.join(living)}.",
        remedy="Terminate them first, and point schedules elsewhere; or register another cloud.",
        resource=cloud.id,
        field=f"config.{written.get(wrong[0], wrong[0])}",
        details={"living": living, "fields": [f"config.{written.get(name, name)}" for name in wrong]},
    )
