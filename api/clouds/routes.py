"""The places that machines come from: registered by an admin, looked at by all, verified by a workflow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request
from sqlalchemy import Row, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import TimeoutError

from api.kit import lookup
from api.kit.auth import Caller, Me
from api.kit.idempotency import Ordered, claim, earlier
from api.kit.pagination import Cursor, Limit, page
from api.kit.temporal import calling
from clouds.contract.bucket import Bucket
from clouds.registry import Vendors
from heliostat.errors import Conflict, InternalError, InvalidRequest, NotFound, Unavailable
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
from store.clouds import lives_on
from store.tables import clouds, organizations

log = structlog.get_logger(__name__)

router = APIRouter(prefix="/v1/clouds", tags=["clouds"])

ASK_S = 55.0
"""For a worker's answer about a cloud, each call in which has its own limit. Less than clients wait for ours (60 s)."""
TAKEN_NAMES = ("trust", "setup", Provider.LOCAL.value, Provider.FAKE.value)
"""Of these routes, and of what a server calls the cloud of its own machine."""


def _vendors(request: Request) -> Vendors:
    vendors: Vendors | None = request.app.state.vendors
    if vendors is None:
        raise Unavailable("This API was started without vendors of clouds.", remedy="Start it by server.py.")
    return vendors


FromVendors = Annotated[Vendors, Depends(_vendors)]


@router.post("", status_code=201)
async def register(request: Request, me: Me, order: Ordered, vendors: FromVendors, body: CloudCreate) -> Cloud:
    """Makes a cloud of the organization; the first one is its default. Nothing is asked of the vendor: verify it next.
    Usable at once, without a restart of anything."""
    me.must_be_admin("register clouds")
    if body.name in TAKEN_NAMES:
        raise InvalidRequest(f"A cloud can't be called {body.name}.", remedy="Use another name.", field="name")
    if isinstance(body, AwsCloudCreate):
        check_external_id(request.app.state.keys, me, body.config)
    capabilities = await asyncio.to_thread(vendors.capabilities, body.config)
    async with request.app.state.db.begin() as conn:
        before = await earlier(conn, me.organization_id, order)
        if before is None:
            # Registrations wait for each other: of two at once only one may get the role, and be the default.
            await conn.execute(select(organizations.c.id).order_by(organizations.c.id).with_for_update(key_share=True))
            id = new_id("cld")
            if not await claim(conn, me.organization_id, order, id):
                before = await earlier(conn, me.organization_id, order)
        if before is not None:
            return Cloud.model_validate((await _row(conn, me, before))._mapping)
        living = await _living(conn, me)
        if body.name in living:
            raise Conflict(
                f"There is a cloud named {body.name} already.",
                remedy="Use another name, or delete that one.",
                resource=body.name,
                field="name",
            )
        await check_not_anothers(conn, me, body.config)
        row: dict[str, Any] = {
            "id": id,
            "name": body.name,
            "provider": body.provider.value,
            "is_default": False,
            "capabilities": capabilities.model_dump(mode="json"),
            "config": body.config.model_dump(mode="json"),
            "created_at": utcnow(),
        }
        await conn.execute(clouds.insert().values(organization_id=me.organization_id, **row))
        if body.is_default or not living:
            await make_default(conn, me, id)
            row["is_default"] = True
    log.info("cloud registered", cloud=id, name=body.name, actor=me.actor)
    return Cloud.model_validate(row)


def check_external_id(keys: Keys, me: Caller, config: AwsConfig) -> None:
    ours = keys.external_id(me.organization_id)
    if config.external_id != ours:
        raise InvalidRequest(
            f"The external id {config.external_id!r} is not this organization's.",
            remedy=f"Let the role's trust policy ask for {ours!r} (sts:ExternalId), and write that here.",
            field="config.external_id",
        )


async def check_not_anothers(conn: AsyncConnection, me: Caller, config: AwsConfig | GcpConfig) -> None:
    """The vendor's own check is the external id, or the claim ``org``; a role that asks for neither must not be
    reachable through an organization that it was not made for."""
    field, mine = _identity(config)
    others = (clouds.c.organization_id != me.organization_id) & clouds.c.deleted_at.is_(None)
    for found in await conn.scalars(select(clouds.c.config).where(others, clouds.c.config.is_not(None))):
        if str(found.get(field, "")).lower() == mine.lower():  # AWS tells no two names apart by their case
            raise Conflict(
                f"{mine} is registered by another organization of this installation.",
                remedy="Make one for this organization alone; `heliostat cloud setup` writes a template of it.",
                resource=mine,
                field=f"config.{field}",
            )


def _identity(config: AwsConfig | GcpConfig) -> tuple[str, str]:
    """The field that says as whom we act, and its value."""
    if isinstance(config, AwsConfig):
        return "role_arn", config.role_arn
    return "service_account", config.service_account


@router.get("")
async def list_all(request: Request, me: Me, limit: Limit = 50, cursor: Cursor = None) -> Page[Cloud]:
    query = select(clouds).where(clouds.c.organization_id == me.organization_id, clouds.c.deleted_at.is_(None))
    make = lambda r: Cloud.model_validate(r._mapping)  # noqa: E731
    async with request.app.state.db.read() as conn:
        return await page(conn, query, (clouds.c.created_at, clouds.c.id), make, limit, cursor)


@router.get("/trust")
async def trust(me: Me, vendors: FromVendors) -> Trust:
    """What the organization's accounts must trust, and by which name."""
    me.must_be_admin("register clouds")
    return await asyncio.to_thread(vendors.trust, me.organization_id)


@router.post("/setup")
async def setup(me: Me, vendors: FromVendors, body: CloudSetup) -> SetupFiles:
    """A template of all that a cloud needs in the customer's account, to be read and applied there. Makes nothing."""
    me.must_be_admin("register clouds")
    return await asyncio.to_thread(vendors.setup, me.organization_id, body)


@router.get("/{ref}")
async def get(request: Request, me: Me, ref: str) -> Cloud:
    async with request.app.state.db.read() as conn:
        return await lookup.cloud(conn, me, ref)


@router.post("/{ref}/default")
async def set_default(request: Request, me: Me, ref: str) -> Cloud:
    """Where goes what names no cloud."""
    me.must_be_admin("change the default cloud")
    async with request.app.state.db.begin() as conn:
        cloud = await lookup.cloud(conn, me, ref)
        await make_default(conn, me, cloud.id)
    log.info("default cloud set", cloud=cloud.id, actor=me.actor)
    return cloud.model_copy(update={"is_default": True})


@router.delete("/{ref}", status_code=204)
async def delete(request: Request, me: Me, ref: str, force: bool = False) -> None:
    """Forgets the cloud, whose account is not touched; its name is free again. Refused while anything lives there, and
    while the cloud says that it holds anything of ours, which only the sweep of a registered cloud ends. ``force``:
    does not ask the cloud, e.g. because its role is gone."""
    me.must_be_admin("delete clouds")
    state = request.app.state
    async with state.db.read() as conn:
        cloud = await lookup.cloud(conn, me, ref)
        await _check_unused(conn, me, state.buckets, cloud)
    if not force:
        await check_nothing_held(state, cloud)
    async with state.db.begin() as conn:
        # What is being accepted now waits for us, or we for it: its row refers to this one.
        await conn.execute(select(clouds.c.id).where(clouds.c.id == cloud.id).with_for_update())
        cloud = await lookup.cloud(conn, me, cloud.id)
        await _check_unused(conn, me, state.buckets, cloud)
        gone = {"deleted_at": utcnow(), "is_default": False, "name": f"{cloud.name[:38]}~{cloud.id}"}
        await conn.execute(update(clouds).where(clouds.c.id == cloud.id).values(**gone))
    log.info("cloud deleted", cloud=cloud.id, name=cloud.name, actor=me.actor, force=force)


async def _check_unused(conn: AsyncConnection, me: Caller, buckets: Mapping[str, Bucket], cloud: Cloud) -> None:
    if cloud.config is None and cloud.id in buckets:
        raise Conflict(
            f"Cloud {cloud.name} is this server's own.",
            remedy="It is there as long as the server is; make another one the default instead.",
            resource=cloud.id,
        )
    if living := await lives_on(conn, cloud.id):
        raise Conflict(
            f"Cloud {cloud.name} is in use: {', '.join(living)}.",
            remedy="Terminate them first, and point schedules elsewhere.",
            resource=cloud.id,
            details={"living": living},
        )
    if cloud.is_default and len(await _living(conn, me)) > 1:
        raise Conflict(
            f"Cloud {cloud.name} is the default one.",
            remedy="Make another one the default first: `heliostat cloud set-default NAME`.",
            resource=cloud.id,
        )


async def check_nothing_held(state: Any, cloud: Cloud) -> None:
    """By the cloud's own word. Raises Conflict, also when it gives none."""
    if held := await _held(state, cloud):
        raise Conflict(
            f"Cloud {cloud.name} still holds {', '.join(held[:5])}"
            + (f" and {len(held) - 5} more." if held[5:] else "."),
            remedy=f"The sweep ends what is nobody's, every {state.settings.sweep_interval_s:.0f} s: try again then.",
            resource=cloud.id,
            details={"held": held},
        )


async def _held(state: Any, cloud: Cloud) -> list[str]:
    if cloud.config is None:
        return []  # of a server that is there no more: nobody can be asked
    try:
        async with calling(ASK_S + 3):
            return await held_by_cloud(state.temporal, state.settings.task_queue, cloud.id, cloud.name, ASK_S)
    except WorkflowFailureError as e:
        raise Conflict(
            f"Cloud {cloud.name} does not tell whether it holds anything of ours: {_why(e)}",
            remedy="Mend it (`heliostat cloud verify` says what it lacks), or delete it with --force: what is left "
            "there is then yours to end.",
            resource=cloud.id,
        ) from e


@router.post("/{ref}/verify")
async def verify(request: Request, me: Me, ref: str) -> Verification:
    """Looks at every right, network rule and bucket that the cloud needs; takes some seconds. Makes no machine."""
    me.must_be_admin("verify clouds")
    state = request.app.state
    async with state.db.read() as conn:
        cloud = await lookup.cloud(conn, me, ref)
    try:
        async with calling(ASK_S + 3):
            checks = await verify_cloud(state.temporal, state.settings.task_queue, cloud.id, cloud.name, ASK_S)
    except WorkflowFailureError as e:
        raise InternalError(
            f"Cloud {cloud.name} could not be verified: {_why(e)}",
            remedy="Try again; if it goes on, see that a worker runs, and its log.",
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


async def _row(conn: AsyncConnection, me: Caller, cloud_id: str) -> Row[Any]:
    mine = (clouds.c.id == cloud_id) & (clouds.c.organization_id == me.organization_id)
    row = (await conn.execute(select(clouds).where(mine, clouds.c.deleted_at.is_(None)))).first()
    if row is None:
        raise NotFound(
            f"Cloud {cloud_id}, which this Idempotency-Key has made, was deleted.",
            remedy="Use a new key for a new cloud.",
            resource=cloud_id,
        )
    return row


async def _living(conn: AsyncConnection, me: Caller) -> list[str]:
    """Their names."""
    mine = (clouds.c.organization_id == me.organization_id) & clouds.c.deleted_at.is_(None)
    return list(await conn.scalars(select(clouds.c.name).where(mine)))


async def make_default(conn: AsyncConnection, me: Caller, cloud_id: str) -> None:
    mine = clouds.c.organization_id == me.organization_id
    await conn.execute(update(clouds).where(mine).values(is_default=clouds.c.id == cloud_id))
