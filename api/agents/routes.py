"""What nodes call: the agent's protocol, see docs/agent-protocol.md. The control plane never opens a connection to a
node; all that it knows of one, the node has reported here."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse

from api.agents import commands, logs
from api.agents.context import AgentContext, AgentCtx, AnyNode
from api.agents.fleet import CallingNode, Fleet, gone, maximum_uptime_at, sha256, worker_groups
from api.agents.logs import log_prefix
from api.agents.serve_metrics import TOTALS
from api.kit.context import Context, Ctx
from heliostat.errors import InvalidRequest, NotFound, Unauthenticated
from heliostat.models.agents import (
    SUPPORTED_PROTOCOLS,
    FactKind,
    NodeConfigAnswer,
    RegisterRequest,
    ReportAnswer,
    ReportRequest,
)
from heliostat.models.clusters import NodeRole
from runtime.settings import Settings
from store.database import Database
from store.nodes import RegisteringNode, head_generation, registering_node, set_node_token, write_first_report

MAX_REPORTS_PER_S = 100
"""Above this many the answers stretch the interval."""
SERVE_INTERVAL_S = 1.0
"""Heads of a service's cluster report at least so often: a canary is judged by what they see."""
WORKER_FACTOR = 5
"""A worker has less to report than a head, which reports for it too: its interval is so many times longer."""


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.agents = AgentContext.of(app.state.context)
    async with app.state.agents.running():
        yield


router = APIRouter(prefix="/agent/v1", tags=["agents"], lifespan=_lifespan)


@router.post("/report", response_model=ReportAnswer)
async def report(ctx: Ctx, agents: AgentCtx, body: ReportRequest, node: AnyNode) -> JSONResponse:
    """Every node, every ``interval_s``, and at once when it has a fact to report."""
    check_protocol(body.protocol)
    if node.boot_id and body.boot_id and node.boot_id != body.boot_id:
        raise gone(node.id)
    await _write_first(ctx.db, node, body)
    agents.reports.add(node, body)
    acked = await agents.facts.deliver(node, body.facts)
    view = await agents.fleet.view(node.cluster_id)
    if view.service_id and body.serve is not None and node.role == NodeRole.HEAD:
        await TOTALS.add(ctx.db, node.id, view.service_id, body.serve)
    answer = ReportAnswer(
        interval_s=interval_s(agents.fleet, node, ctx.settings, serves=view.service_id is not None),
        acked=acked,
        follow=view.follow,
        maximum_uptime_at=view.maximum_uptime_at,
    )
    if node.role == NodeRole.HEAD:
        answer.nodes, answer.desired, answer.groups = view.workers, view.desired, view.groups
    return JSONResponse(answer.model_dump(mode="json", exclude={"follow"} if body.protocol == 0 else None))


router.include_router(commands.router)
router.include_router(logs.router)


@router.get("/bundle/{digest}", response_class=Response)
async def bundle(ctx: Ctx, digest: str) -> Response:
    """The agent as a zip, by the sha256 that the machine's user-data names."""
    if digest not in ctx.bundles:
        raise NotFound(
            f"There is no agent bundle {digest}.",
            remedy="Launch the node again: it belongs to a release whose agent this API no longer serves.",
            resource=digest,
        )
    return Response(
        ctx.bundles[digest],
        media_type="application/zip",
        headers={"cache-control": "public, max-age=31536000, immutable", "etag": f'"{digest}"'},
    )


@router.post("/register", response_model=NodeConfigAnswer)
async def register(ctx: Ctx, agents: AgentCtx, body: RegisterRequest) -> NodeConfigAnswer:
    """A booted machine becomes its node. Repeatable by the same agent process; once the node has reported,
    by no other. Every registration issues a new token; the previous one becomes invalid."""
    check_protocol(body.protocol)
    expected = ctx.keys.bootstrap_token(body.node_id, body.generation)
    if not hmac.compare_digest(expected.encode(), body.bootstrap_token.encode()):
        raise Unauthenticated(
            "The bootstrap token is not this node's.",
            remedy="Boot the machine with the user-data that belongs to it.",
            resource=body.node_id,
        )
    async with ctx.db.read() as conn:
        row = await registering_node(conn, body.node_id)
    if row is None:
        raise NotFound(
            f"Node {body.node_id} is not in the records.",
            remedy="Try again: a node's row is written before its machine boots, so a backup may have been restored.",
            resource=body.node_id,
        )
    if row.ended:
        raise gone(body.node_id)
    if row.generation != body.generation or (row.authenticated and row.boot_id != body.boot_id):
        # Another machine or another boot is this node already; whatever ran under the first one is lost.
        raise gone(body.node_id)
    token = secrets.token_hex(32)
    async with ctx.db.begin() as conn:
        taken = await set_node_token(conn, body.node_id, sha256(token), body.boot_id)
    if not taken:  # another boot has become this node since the row was read
        raise gone(body.node_id)
    await agents.registrations.signal(row.cluster_id, body)
    return await _config(ctx, row, token)


def check_protocol(protocol: int) -> None:
    if protocol not in SUPPORTED_PROTOCOLS:
        served = " and ".join(str(p) for p in SUPPORTED_PROTOCOLS)
        raise InvalidRequest(
            f"This API does not support version {protocol} of the agent's protocol; it supports {served}.",
            remedy="Start new nodes: they boot this API's agent. Or run the API of that agent's release.",
            field="protocol",
        )


def base_interval_s(settings: Settings, *, serves: bool) -> float:
    """Of a head, when there are few nodes."""
    return min(settings.report_interval_s, SERVE_INTERVAL_S) if serves else settings.report_interval_s


def interval_s(fleet: Fleet, node: CallingNode, settings: Settings, *, serves: bool = False) -> float:
    base = base_interval_s(settings, serves=serves and node.role == NodeRole.HEAD)
    rate = (fleet.calling(NodeRole.HEAD) + fleet.calling(NodeRole.WORKER) / WORKER_FACTOR) / base
    # Stretched at most so far that three reports in a row may be lost before a head counts as silent.
    head = min(base * max(1.0, rate / MAX_REPORTS_PER_S), max(base, settings.silence_s / 4))
    return round(head if node.role == NodeRole.HEAD else head * WORKER_FACTOR, 2)


async def _write_first(db: Database, node: CallingNode, body: ReportRequest) -> None:
    """Writes at once what others wait for: that the node is authenticated, which closes its registration, and a
    head's address."""
    gcs_address = body.gcs_address
    for fact in body.facts:
        if fact.kind == FactKind.RAY_READY and fact.data.get("node_id", node.id) == node.id:
            gcs_address = str(fact.data.get("gcs_address") or gcs_address)
    new_address = gcs_address if node.role == NodeRole.HEAD and gcs_address != node.gcs_address else None
    if node.authenticated and not new_address:
        return
    async with db.begin() as conn:
        await write_first_report(conn, node.id, new_address or None)
    node.authenticated = True
    node.gcs_address = gcs_address or node.gcs_address


async def _config(ctx: Context, row: RegisteringNode, token: str) -> NodeConfigAnswer:
    if row.role == NodeRole.HEAD:
        generation = row.generation
    else:
        async with ctx.db.read() as conn:
            generation = await head_generation(conn, row.cluster_id)
    answer = NodeConfigAnswer(
        node_token=token,
        node_id=row.id,
        cluster_id=row.cluster_id,
        cluster_name=row.cluster_name,
        role=row.role,
        group=row.group,
        resources=row.resources,
        labels=row.labels,
        ray_token=ctx.keys.ray_token(row.cluster_id),
        head_generation=generation,
        deadman_s=ctx.settings.deadman_s,
        maximum_uptime_at=maximum_uptime_at(row.cluster),
        report_interval_s=base_interval_s(ctx.settings, serves=bool(row.service_id) and row.role == NodeRole.HEAD),
        log_prefix=log_prefix(row.cluster_id, row.id),
        service_id=row.service_id or "",
    )
    if row.role == NodeRole.HEAD:
        answer.groups, answer.desired = worker_groups(row.cluster), row.cluster.desired
    return answer
