"""The rows of an accepted deploy, in one transaction that holds the service's row: the service if it is new, its
versions with their sealed env values, the deploy, and the first line of its story."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.kit.acceptance import first_event
from api.kit.auth import Caller, Project
from api.kit.limits import limits
from api.services.checks import check_canary, check_fits, check_in_place, check_state, check_weights
from heliostat.errors import Conflict, NotFound, Unavailable
from heliostat.models.clouds import Cloud
from heliostat.models.common import Event, new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import Service, ServiceConfig, ServiceDeploy, ServiceState, ServiceVersion
from heliostat.models.services import ServiceVersionState as VersionState
from runtime.messages.services import DeployRequest, ServiceInput, VersionSpec
from store.database import insert_new
from store.encrypted_values import write_sealed
from store.services import deploys as store
from store.services.rows import ServiceRow, StoredToken, living_named, lock_service, versions_of
from store.tables import events, service_versions

TRIES = 5
"""A name may be taken, and given up again, by others while we look; once is rare already."""


@dataclass(frozen=True)
class New:
    """A version that a deploy brings, checked as far as it can be without its service's state."""

    at: str
    """Where its config stands in the request, e.g. ``config.``."""
    config: ServiceConfig
    shape: ComputeConfig
    cloud: Cloud


@dataclass(frozen=True)
class Written:
    service: ServiceRow
    request: DeployRequest


async def write(
    state: Any,
    conn: AsyncConnection,
    me: Caller,
    project: Project,
    name: str,
    deploy_id: str,
    body: ServiceDeploy,
    news: list[New],
) -> Written:
    """Raises what is wrong with it in view of the service's state; then nothing is written."""
    row, made = await _service(state, conn, me, project, name, news, utcnow())
    now = utcnow()  # the row is ours by now: versions' times grow as their numbers do
    living = await versions_of(conn, row.id, ended=0)
    if not made:
        check_state(row)
        for new in news:
            check_fits(row, new.at, new.config, new.cloud.id, new.cloud.name)
    check_canary(name, None if made else row, body.canary_percent)
    if body.in_place:
        check_in_place(name, None if made else row, living, news[0].config, news[0].shape)
    if body.versions:
        check_weights(name, body, [v.name for v in living if v.state != VersionState.TERMINATING])
    if news and not made:
        row = await store.retag_service(conn, row, news[-1].config.tags)
    if row.state == ServiceState.TERMINATED:
        row = await store.reopen_service(conn, row, now)
    number = await store.next_number(conn, row.id)
    specs: list[VersionSpec] = []
    for offset, new in enumerate(news):
        at = now + timedelta(microseconds=offset)
        specs.append(await _write_version(state, conn, me, project, row.id, deploy_id, number + offset, new, at))
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
    what = _in_words(body, specs)
    if made:
        await first_event(conn, row.id, me.actor, f"service {name} asked for on cloud {row.input.cloud}: {what}")
    else:
        event = Event(id=f"ev_{deploy_id}", resource_id=row.id, at=now, kind="accepted", actor=me.actor, message=what)
        await insert_new(conn, events, event.model_dump())
    return Written(row, request)


async def _service(
    state: Any, conn: AsyncConnection, me: Caller, project: Project, name: str, news: list[New], now: datetime
) -> tuple[ServiceRow, bool]:
    """The row of this name, locked; made if there is none (True)."""
    for _ in range(TRIES):
        existing = await living_named(conn, project.id, name)
        if existing is not None:
            row = await lock_service(conn, existing.id)
            if row is not None:
                return row, False
            continue  # deleted, or taken back, while we waited for it
        if not news:
            raise NotFound(
                f"There is no service {name!r} whose weights could be changed.",
                remedy="Give the configs of its versions.",
                resource=name,
                field="name",
            )
        row = await _make(state, conn, me, project, name, news[-1], now)
        if row is not None:
            return row, True
    raise Unavailable(f"The name {name!r} changes hands all the time.", remedy="Try again.", resource=name)


async def _make(
    state: Any, conn: AsyncConnection, me: Caller, project: Project, name: str, new: New, now: datetime
) -> ServiceRow | None:
    id, tags = new_id("svc"), new.config.tags
    service = Service(
        id=id,
        name=name,
        project=project.name,
        cloud=new.cloud.name,
        state=ServiceState.STARTING,
        reason="asked for",
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
        limits=limits(state.settings, new.cloud),
    )
    tokens = []
    if new.config.query_auth_token_enabled:
        token, stored = new_token(told=True)
        tokens = [stored]
    if not await store.insert_service(conn, service, arg, tokens):
        return None
    for stored in tokens:
        await write_sealed(conn, state.keys, stored.id, project.id, {"token": token})
    return await lock_service(conn, id)


def new_token(*, told: bool) -> tuple[str, StoredToken]:
    """256 random bits, and what is kept of them beside the sealed value."""
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    return token, StoredToken(id=new_id("qt"), created_at=utcnow(), sha256=digest, told=told)


async def _write_version(
    state: Any,
    conn: AsyncConnection,
    me: Caller,
    project: Project,
    service_id: str,
    deploy_id: str,
    number: int,
    new: New,
    now: datetime,
) -> VersionSpec:
    config, id = new.config, new_id("sv")
    name = await _free_name(conn, service_id, config.version_name, number, new.at)
    spec = VersionSpec(
        id=id,
        name=name,
        number=number,
        compute_config=new.shape,
        cluster_replicas=config.cluster_replicas,
        probes={
            app.name: app.probe.model_copy(update={"path": app.probe.path or app.route_prefix})
            for app in config.applications
            if app.route_prefix is not None and app.probe is not None
        },
        grpc=config.serves_grpc,
        limits=limits(state.settings, new.cloud),
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
        reason="asked for",
        config=config.masked(),
        created_by=me.name,
        created_at=now,
        state_since=now,
    )
    secret = config.secrets()
    env_ref = new_id("env") if secret else None
    if env_ref is not None:
        await write_sealed(conn, state.keys, env_ref, project.id, secret)
    await store.insert_version(conn, project.id, deploy_id, spec, version, env_ref)
    return spec


async def _free_name(conn: AsyncConnection, service_id: str, wanted: str | None, number: int, at: str) -> str:
    v = service_versions.c
    taken = set(await conn.scalars(select(v.name).where(v.service_id == service_id)))
    if wanted is not None:
        if wanted in taken:
            raise Conflict(
                f"The service has had a version {wanted!r} already.",
                remedy="Choose another version_name, or leave it out.",
                resource=service_id,
                field=f"{at}version_name",
            )
        return wanted
    name = f"v{number}"
    while name in taken:  # somebody has chosen it
        name += "a"
    return name


def _in_words(body: ServiceDeploy, specs: list[VersionSpec]) -> str:
    what = f"version{'s' if len(specs) > 1 else ''} {', '.join(s.name for s in specs)} deployed" if specs else ""
    if body.versions:
        weights = ", ".join(f"{w.name} {w.traffic_percent} %" for w in body.versions)
        return f"{what}, weights {weights}" if what else f"weights {weights}"
    if body.in_place:
        return f"{what} in place"
    return what if body.canary_percent is None else f"{what}, canary at {body.canary_percent} %"
