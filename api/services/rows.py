"""The rows of an accepted deploy, in one transaction that locks the service's row: the service if it is new, its
versions with their encrypted env values, the deploy, and its event."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from api.kit.acceptance import accepted_event
from api.kit.callers import Caller, Project
from api.kit.context import Context
from api.kit.limits import limits
from api.services.checks import check_canary, check_fits, check_in_place, check_state, check_weights
from heliostat.errors import Conflict, NotFound, Unavailable
from heliostat.models.clouds import Cloud
from heliostat.models.common import Event, new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import Service, ServiceConfig, ServiceDeploy, ServiceState, ServiceVersion
from heliostat.models.services import ServiceVersionState as VersionState
from runtime.messages.services import DeployRequest, ServiceInput, VersionSpec
from store.database import AsyncConnection
from store.encrypted_values import write_sealed
from store.events import insert_event
from store.services import deploys as store
from store.services.find import version_names
from store.services.rows import ServiceRow, StoredToken, living_named, lock_service, versions_of

TRIES = 5
"""Others may take a name, and give it up again, between two queries; once is rare already."""


@dataclass(frozen=True)
class NewVersion:
    """A version that a deploy creates, checked as far as possible without its service's state."""

    at: str
    """Where its config is in the request, e.g. ``config.``."""
    config: ServiceConfig
    compute_config: ComputeConfig
    cloud: Cloud


@dataclass(frozen=True)
class WrittenDeploy:
    service: ServiceRow
    request: DeployRequest


async def write(
    ctx: Context,
    conn: AsyncConnection,
    me: Caller,
    project: Project,
    name: str,
    deploy_id: str,
    body: ServiceDeploy,
    new: list[NewVersion],
) -> WrittenDeploy:
    """Raises what the service's state shows to be wrong; then nothing is written."""
    row, created = await _service(ctx, conn, me, project, name, new, utcnow())
    now = utcnow()  # taken with the row locked: versions' times grow as their numbers do
    living = await versions_of(conn, row.id, ended=0)
    if not created:
        check_state(row)
        for version in new:
            check_fits(row, version.at, version.config, version.cloud.id, version.cloud.name)
    check_canary(name, None if created else row, body.canary_percent)
    if body.in_place:
        check_in_place(name, None if created else row, living, new[0].config, new[0].compute_config)
    if body.versions:
        check_weights(name, body, [v.name for v in living if v.state != VersionState.TERMINATING])
    if new and not created:
        row = await store.retag_service(conn, row, new[-1].config.tags)
    if row.state == ServiceState.TERMINATED:
        row = await store.reopen_service(conn, row, now)
    number = await store.next_number(conn, row.id)
    specs: list[VersionSpec] = []
    for offset, version in enumerate(new):
        at = now + timedelta(microseconds=offset)
        specs.append(await _write_version(ctx, conn, me, project, row.id, deploy_id, number + offset, version, at))
    ids = {v.name: v.id for v in living} | {s.name: s.id for s in specs}
    request = DeployRequest(
        id=deploy_id,
        actor=me.actor,
        versions=specs,
        in_place=body.in_place,
        canary_percent=body.canary_percent,
        max_surge_percent=body.max_surge_percent,
        weights={ids[w.name]: w.traffic_percent for w in body.versions},
        gate=row.gate,  # each time: this deploy may be what starts the workflow
        life=row.told_revision,
    )
    await store.insert_deploy(conn, project.id, row.id, request)
    what = _describe(body, specs)
    if created:
        await accepted_event(conn, row.id, me.actor, f"service {name} requested on cloud {row.input.cloud}: {what}")
    else:
        event = Event(id=f"ev_{deploy_id}", resource_id=row.id, at=now, kind="accepted", actor=me.actor, message=what)
        await insert_event(conn, event)
    return WrittenDeploy(row, request)


async def _service(
    ctx: Context, conn: AsyncConnection, me: Caller, project: Project, name: str, new: list[NewVersion], now: datetime
) -> tuple[ServiceRow, bool]:
    """The row of this name, locked; created if there is none (True)."""
    for _ in range(TRIES):
        existing = await living_named(conn, project.id, name)
        if existing is not None:
            row = await lock_service(conn, existing.id)
            if row is not None:
                return row, False
            continue  # deleted or cancelled while we waited for its lock
        if not new:
            raise NotFound(
                f"There is no service {name!r} to change the weights of.",
                remedy="Give the configs of its versions.",
                resource=name,
                field="name",
            )
        row = await _create(ctx, conn, me, project, name, new[-1], now)
        if row is not None:
            return row, True
    raise Unavailable(
        f"Concurrent requests create and delete services named {name!r}.", remedy="Try again.", resource=name
    )


async def _create(
    ctx: Context, conn: AsyncConnection, me: Caller, project: Project, name: str, new: NewVersion, now: datetime
) -> ServiceRow | None:
    id, tags = new_id("svc"), new.config.tags
    service = Service(
        id=id,
        name=name,
        project=project.name,
        cloud=new.cloud.name,
        state=ServiceState.STARTING,
        reason="requested",
        created_by=me.name,
        created_at=now,
        state_since=now,
        tags=tags,
    )
    arg = ServiceInput(
        service_id=id,
        name=name,
        project_id=project.id,
        project=project.name,
        cloud_id=new.cloud.id,
        cloud=new.cloud.name,
        created_by=me.name,
        created_at=now,
        tags=tags,
        limits=limits(ctx.settings, new.cloud),
    )
    tokens = []
    if new.config.query_auth_token_enabled:
        token, stored = new_token(acknowledged=True)
        tokens = [stored]
    if not await store.insert_service(conn, service, arg, tokens):
        return None
    for stored in tokens:
        await write_sealed(conn, ctx.keys, stored.id, project.id, {"token": token})
    return await lock_service(conn, id)


def new_token(*, acknowledged: bool) -> tuple[str, StoredToken]:
    """256 random bits, and what the service's row holds of them; the encrypted value is stored apart."""
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    return token, StoredToken(id=new_id("qt"), created_at=utcnow(), sha256=digest, told=acknowledged)


async def _write_version(
    ctx: Context,
    conn: AsyncConnection,
    me: Caller,
    project: Project,
    service_id: str,
    deploy_id: str,
    number: int,
    new: NewVersion,
    now: datetime,
) -> VersionSpec:
    config, id = new.config, new_id("sv")
    name = await _free_name(conn, service_id, config.version_name, number, new.at)
    spec = VersionSpec(
        id=id,
        name=name,
        number=number,
        compute_config=new.compute_config,
        cluster_replicas=config.cluster_replicas,
        probes={
            app.name: app.probe.model_copy(update={"path": app.probe.path or app.route_prefix})
            for app in config.applications
            if app.route_prefix is not None and app.probe is not None
        },
        grpc=config.serves_grpc,
        limits=limits(ctx.settings, new.cloud),
        rollout=config.rollout,
        idle_termination_minutes=config.idle_termination_minutes,
        created_by=me.name,
        created_at=now,
        tags=config.tags,
    )
    version = ServiceVersion(
        id=id,
        service_id=service_id,
        name=name,
        number=number,
        state=VersionState.STARTING,
        reason="requested",
        config=config.masked(),
        created_by=me.name,
        created_at=now,
        state_since=now,
    )
    secret = config.secrets()
    env_ref = new_id("env") if secret else None
    if env_ref is not None:
        await write_sealed(conn, ctx.keys, env_ref, project.id, secret)
    await store.insert_version(conn, project.id, deploy_id, spec, version, env_ref)
    return spec


async def _free_name(conn: AsyncConnection, service_id: str, wanted: str | None, number: int, at: str) -> str:
    taken = await version_names(conn, service_id)
    if wanted is not None:
        if wanted in taken:
            raise Conflict(
                f"The service already has or had a version {wanted!r}.",
                remedy="Choose another version_name, or leave it out.",
                resource=service_id,
                field=f"{at}version_name",
            )
        return wanted
    name = f"v{number}"
    while name in taken:  # somebody has chosen this name
        name += "a"
    return name


def _describe(body: ServiceDeploy, specs: list[VersionSpec]) -> str:
    what = f"version{'s' if len(specs) > 1 else ''} {', '.join(s.name for s in specs)} deployed" if specs else ""
    if body.versions:
        weights = ", ".join(f"{w.name} {w.traffic_percent} %" for w in body.versions)
        return f"{what}, weights {weights}" if what else f"weights {weights}"
    if body.in_place:
        return f"{what} in place"
    return what if body.canary_percent is None else f"{what}, canary at {body.canary_percent} %"
