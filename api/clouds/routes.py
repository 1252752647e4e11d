"""Clouds, which machines come from: registered by an admin, visible to all, verified by a workflow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog
from fastapi import APIRouter
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import TimeoutError

from api.kit import lookup
from api.kit.auth import Me
from api.kit.callers import Caller
from api.kit.context import Context, Ctx, FromVendors
from api.kit.idempotency import Key, find_previous, reserve
from api.kit.listing import Cursor, Limit, list_page
from api.kit.temporal import calling
from clouds.contract.bucket import Bucket
from heliostat.errors import Conflict, InternalError, InvalidRequest, NotFound
from heliostat.models.clouds import (
    AwsCloudCreate,
    AwsConfig,
    CheckState,
    Cloud,
    CloudCreate,
    CloudSetup,
    GcpConfig,
    Provider,
    SetupFiles,
    Trust,
    Verification,
)
from heliostat.models.common import Page, new_id, utcnow
from runtime.keys import Keys
from runtime.messages.clouds import held_by_cloud, verify_cloud
from store import clouds as store
from store.database import AsyncConnection
from store.pages import Found, PageRequest

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1/clouds", tags=["clouds"])

ASK_S = 55.0
"""For a worker's answer about a cloud; its calls have their own limits. Clients wait longer for us (60 s)."""
TAKEN_NAMES = ("trust", "setup", Provider.LOCAL.value, Provider.FAKE.value)
"""Paths of these routes, and names that a server gives the cloud of its own machine."""


@router.post("", status_code=201)
async def register(ctx: Ctx, me: Me, key: Key, vendors: FromVendors, body: CloudCreate) -> Cloud:
    """Registers a cloud of the organization; the first one is its default. The vendor is not called: verify it next.
    It is usable at once, without a restart."""
    me.must_be_admin("register clouds")
    if body.name in TAKEN_NAMES:
        raise InvalidRequest(f"The name {body.name} is reserved.", remedy="Use another name.", field="name")
    if isinstance(body, AwsCloudCreate):
        check_external_id(ctx.keys, me, body.config)
    capabilities = await asyncio.to_thread(vendors.capabilities, body.config)
    async with ctx.db.begin() as conn:
        previous = await find_previous(conn, me.organization_id, key)
        if previous is None:
            await store.lock_organizations(conn)  # of concurrent ones, one may get the role, and one be the default
            id = new_id("cld")
            previous = await reserve(conn, me.organization_id, key, id)
        if previous is not None:
            return await _created_before(conn, me, previous)
        names = await store.cloud_names(conn, me.organization_id)
        if body.name in names:
            raise Conflict(
                f"Cloud {body.name} exists already.",
                remedy="Use another name, or delete that cloud.",
                resource=body.name,
                field="name",
            )
        await check_not_anothers(conn, me, body.config)
        cloud = Cloud(
            id=id,
            name=body.name,
            provider=body.provider,
            capabilities=capabilities,
            config=body.config,
            created_at=utcnow(),
        )
        await store.insert_cloud(conn, me.organization_id, cloud)
        if body.is_default or not names:
            await store.make_default(conn, me.organization_id, id)
            cloud.is_default = True
    log.info("cloud registered", cloud=id, name=body.name, actor=me.actor)
    return cloud


def check_external_id(keys: Keys, me: Caller, config: AwsConfig) -> None:
    ours = keys.external_id(me.organization_id)
    if config.external_id != ours:
        raise InvalidRequest(
            f"The external id {config.external_id!r} is not this organization's.",
            remedy=f"Let the role's trust policy require {ours!r} (sts:ExternalId), and write that here.",
            field="config.external_id",
        )


async def check_not_anothers(conn: AsyncConnection, me: Caller, config: AwsConfig | GcpConfig) -> None:
    """The vendor's own check is the external id, or the claim ``org``; a role that requires neither must not be
    reachable through an organization that it was not created for."""
    field, mine = _identity(config)
    for found in await store.configs_of_others(conn, me.organization_id):
        if str(found.get(field, "")).lower() == mine.lower():  # names on AWS do not differ by case alone
            raise Conflict(
                f"{mine} is registered by another organization of this installation.",
                remedy="Create one for this organization alone; `heliostat cloud setup` writes a template of it.",
                resource=mine,
                field=f"config.{field}",
            )


def _identity(config: AwsConfig | GcpConfig) -> tuple[str, str]:
    """The field with the identity that we assume, and its value."""
    if isinstance(config, AwsConfig):
        return "role_arn", config.role_arn
    return "service_account", config.service_account


@router.get("")
async def list_all(ctx: Ctx, me: Me, limit: Limit = 50, cursor: Cursor = None) -> Page[Cloud]:
    async def find(conn: AsyncConnection, page: PageRequest) -> Found[Cloud]:
        return await store.list_clouds(conn, me.organization_id, page)

    return await list_page(ctx, find, limit, cursor)


@router.get("/trust")
async def trust(me: Me, vendors: FromVendors) -> Trust:
    """What the organization's accounts must trust, and by which name."""
    me.must_be_admin("register clouds")
    return await asyncio.to_thread(vendors.trust, me.organization_id)


@router.post("/setup")
async def setup(me: Me, vendors: FromVendors, body: CloudSetup) -> SetupFiles:
    """A template of all that a cloud needs in the customer's account, to be read and applied there. Creates nothing."""
    me.must_be_admin("register clouds")
    return await asyncio.to_thread(vendors.setup, me.organization_id, body)


@router.get("/{ref}")
async def get(ctx: Ctx, me: Me, ref: str) -> Cloud:
    async with ctx.db.read() as conn:
        return await lookup.cloud(conn, me, ref)


@router.post("/{ref}/default")
async def set_default(ctx: Ctx, me: Me, ref: str) -> Cloud:
    """Requests that name no cloud use it from now on."""
    me.must_be_admin("change the default cloud")
    async with ctx.db.begin() as conn:
        cloud = await lookup.cloud(conn, me, ref)
        await store.make_default(conn, me.organization_id, cloud.id)
    log.info("default cloud set", cloud=cloud.id, actor=me.actor)
    return cloud.model_copy(update={"is_default": True})


@router.delete("/{ref}", status_code=204)
async def delete(ctx: Ctx, me: Me, ref: str, force: bool = False) -> None:
    """Unregisters the cloud, whose account is not changed; its name is free again. Refused while anything runs there,
    and while the cloud still holds resources of ours, which only the sweep of a registered cloud ends. ``force``: does
    not ask the cloud, e.g. because its role no longer exists."""
    me.must_be_admin("delete clouds")
    async with ctx.db.read() as conn:
        cloud = await lookup.cloud(conn, me, ref)
        await _check_unused(conn, me, ctx.buckets, cloud)
    if not force:
        await check_nothing_held(ctx, cloud)
    async with ctx.db.begin() as conn:
        await store.lock_cloud(conn, cloud.id)
        cloud = await lookup.cloud(conn, me, cloud.id)
        await _check_unused(conn, me, ctx.buckets, cloud)
        await store.delete_cloud(conn, cloud)
    log.info("cloud deleted", cloud=cloud.id, name=cloud.name, actor=me.actor, force=force)


async def _check_unused(conn: AsyncConnection, me: Caller, buckets: Mapping[str, Bucket], cloud: Cloud) -> None:
    if cloud.config is None and cloud.id in buckets:
        raise Conflict(
            f"Cloud {cloud.name} is this server's own.",
            remedy="It exists as long as the server does; make another one the default instead.",
            resource=cloud.id,
        )
    if living := await store.lives_on(conn, cloud.id):
        raise Conflict(
            f"Cloud {cloud.name} is in use: {', '.join(living)}.",
            remedy="Terminate them first, and change or delete the schedules.",
            resource=cloud.id,
            details={"living": living},
        )
    if cloud.is_default and len(await store.cloud_names(conn, me.organization_id)) > 1:
        raise Conflict(
            f"Cloud {cloud.name} is the default cloud.",
            remedy="Make another cloud the default first: `heliostat cloud set-default NAME`.",
            resource=cloud.id,
        )


async def check_nothing_held(ctx: Context, cloud: Cloud) -> None:
    """Asks the cloud itself. Raises Conflict, also when it does not answer."""
    if held := await _held(ctx, cloud):
        raise Conflict(
            f"Cloud {cloud.name} still holds {', '.join(held[:5])}"
            + (f" and {len(held) - 5} more." if held[5:] else "."),
            remedy=f"The sweep ends orphaned resources every {ctx.settings.sweep_interval_s:.0f} s: try again later.",
            resource=cloud.id,
            details={"held": held},
        )


async def _held(ctx: Context, cloud: Cloud) -> list[str]:
    if cloud.config is None:
        return []  # of a server that no longer exists: nobody can answer
    try:
        async with calling(ASK_S + 3):
            return await held_by_cloud(ctx.temporal, ctx.settings.task_queue, cloud.id, cloud.name, ASK_S)
    except WorkflowFailureError as e:
        raise Conflict(
            f"Cloud {cloud.name} does not answer which of our resources it holds: {_why(e)}",
            remedy="Repair it (`heliostat cloud verify` shows what is missing), or delete it with --force and end what "
            "is left there yourself.",
            resource=cloud.id,
        ) from e


@router.post("/{ref}/verify")
async def verify(ctx: Ctx, me: Me, ref: str) -> Verification:
    """Checks every permission, network rule and bucket that the cloud needs; takes some seconds. Starts no machine."""
    me.must_be_admin("verify clouds")
    async with ctx.db.read() as conn:
        cloud = await lookup.cloud(conn, me, ref)
    try:
        async with calling(ASK_S + 3):
            checks = await verify_cloud(ctx.temporal, ctx.settings.task_queue, cloud.id, cloud.name, ASK_S)
    except WorkflowFailureError as e:
        raise InternalError(
            f"Cloud {cloud.name} could not be verified: {_why(e)}",
            remedy="Try again. If it persists, check that a worker is running, and its log.",
            resource=cloud.id,
        ) from e
    return Verification(cloud_id=cloud.id, ok=all(c.state is not CheckState.FAILED for c in checks), checks=checks)


def _why(error: WorkflowFailureError) -> str:
    """The innermost cause."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None)) is not None:
        cause = inner
    if isinstance(cause, TimeoutError):
        return f"no answer within {ASK_S:.0f} s."
    return str(cause)


async def _created_before(conn: AsyncConnection, me: Caller, cloud_id: str) -> Cloud:
    found = await store.find_cloud(conn, me.organization_id, cloud_id)
    if found is None:
        raise NotFound(
            f"Cloud {cloud_id}, which was created with this Idempotency-Key, was deleted.",
            remedy="Use a new key for a new cloud.",
            resource=cloud_id,
        )
    return found
