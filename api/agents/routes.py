"""What nodes call: version 1 of the agent's protocol, see docs/agent-protocol.md. The control plane never
opens a connection to a node; all that it knows of one, the node has told here."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from sqlalchemy import select, update
from temporalio.client import Client

from api.agents import commands as agent_commands
from api.agents import logs as agent_logs
from api.agents import reports as agent_reports
from api.agents.commands import Polls
from api.agents.logs import log_prefix
from api.agents.nodes import ENDED, Fleet, gone, maximum_uptime_at, sha256, worker_groups
from api.agents.reports import Facts, Reports, base_interval_s, check_protocol
from api.agents.signals import told
from api.services.metrics import TOTALS
from heliostat.errors import InvalidRequest, NotFound, Unauthenticated, Unavailable
from heliostat.models.agents import NodeConfigAnswer, RegisterRequest
from heliostat.models.clusters import Cluster, NodeRole, NodeState
from runtime.keys import Keys
from runtime.messages.clusters import ClusterHandle, NodeRegistered
from store.database import Database
from store.tables import clusters, nodes

log = structlog.get_logger(__name__)

SIGNAL_S = 5.0
REGISTRATIONS_MAX = 500
"""In one message: 100 KB, where a payload may have 2 MB."""


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The tasks of one API process: the flush of reports with the heartbeat of our hearing, and the long polls."""
    state = app.state
    state.fleet = Fleet(state.db)
    state.reports = Reports(state.db)
    state.facts = Facts(state.db, state.temporal, state.fleet)
    state.registrations = Registrations(state.temporal)
    state.polls = Polls(state.db)
    state.serve_totals = TOTALS
    tasks = [asyncio.create_task(state.reports.run()), asyncio.create_task(state.polls.run())]
    for task in tasks:
        task.add_done_callback(_must_not_end)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(Unavailable):  # the next reports say the same again
            await state.reports.flush()


def _must_not_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        log.critical("a task of the agents' API has ended; restart this API", exc_info=task.exception())


router = APIRouter(prefix="/agent/v1", tags=["agents"], lifespan=_lifespan)
router.include_router(agent_reports.router)
router.include_router(agent_commands.router)
router.include_router(agent_logs.router)


@router.get("/bundle/{digest}", response_class=Response)
async def bundle(request: Request, digest: str) -> Response:
    """The agent as a zip, by the sha256 that the machine's user-data names."""
    bundles: Mapping[str, bytes] = request.app.state.bundles
    if digest not in bundles:
        raise NotFound(
            f"There is no agent bundle {digest}.",
            remedy="Launch the node anew: it belongs to a release whose agent this API no longer serves.",
            resource=digest,
        )
    return Response(
        bundles[digest],
        media_type="application/zip",
        headers={"cache-control": "public, max-age=31536000, immutable", "etag": f'"{digest}"'},
    )


@router.post("/register", response_model=NodeConfigAnswer)
async def register(request: Request, body: RegisterRequest) -> NodeConfigAnswer:
    """A booted machine becomes its node. Repeatable by the same agent process; once the node has reported,
    by no other. Every registration issues a new token; the one before dies."""
    check_protocol(body.protocol)
    state = request.app.state
    keys: Keys = state.keys
    expected = keys.bootstrap_token(body.node_id, body.generation)
    if not hmac.compare_digest(expected.encode(), body.bootstrap_token.encode()):
        raise Unauthenticated(
            "The bootstrap token is not this node's.",
            remedy="Boot the machine with the user-data that was made for it.",
            resource=body.node_id,
        )
    row = await _node_row(state.db, body.node_id)
    if row.ended_at is not None or row.state in ENDED or row.cluster_ended_at is not None:
        raise gone(body.node_id)
    if row.generation != body.generation or (row.authenticated and row.boot_id != body.boot_id):
        # Another machine or another boot has this node already; whatever ran under the first one is lost.
        raise gone(body.node_id)
    token = secrets.token_hex(32)
    async with state.db.begin() as conn:
        taken = await conn.execute(
            update(nodes)
            .where(
                nodes.c.id == body.node_id,
                nodes.c.authenticated.is_(False) | (nodes.c.boot_id == body.boot_id),
                nodes.c.ended_at.is_(None),
            )
            .values(token_sha256=sha256(token), boot_id=body.boot_id[:64])
        )
    if not taken.rowcount:  # between the two statements another one has become this node
        raise gone(body.node_id)
    await state.registrations.tell(row.cluster_id, body)
    return await _config(state, row, token)


async def _node_row(db: Database, node_id: str) -> Any:
    n, c = nodes.c, clusters.c
    async with db.read() as conn:
        row = (
            await conn.execute(
                select(
                    n.id, n.cluster_id, n.role, n.generation, n.state, n.doc, n.config, n.authenticated, n.boot_id,
                    n.ended_at, c.ended_at.label("cluster_ended_at"), c.name.label("cluster_name"),
                    c.service_id, c.doc.label("cluster_doc"),
                )
                .select_from(nodes.join(clusters, c.id == n.cluster_id))
                .where(n.id == node_id)
            )
        ).first()  # fmt: skip
    if row is None:
        raise NotFound(
            f"Node {node_id} is not in the records.",
            remedy="Try again: a node is written down before its machine boots, so the records may have been restored.",
            resource=node_id,
        )
    return row


class Registrations:
    """Tells workflows of new nodes. Of one cluster one message is under way at a time; who comes meanwhile goes with
    the next one, so that a hundred nodes at once are a few messages and a few turns of their workflow."""

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal
        self._waiting: dict[str, list[tuple[NodeRegistered, asyncio.Future[bool]]]] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}

    async def tell(self, cluster_id: str, body: RegisterRequest) -> None:
        """Returns when Temporal has it, so that no node is up that its workflow has not heard of. Raises Gone, or
        Unavailable: the agent repeats."""
        message = NodeRegistered(
            event_id=f"{body.node_id}/registered/{body.generation}/{body.boot_id[:64]}",
            node_id=body.node_id,
            generation=body.generation,
            ip=body.ip,
        )
        heard: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(cluster_id, []).append((message, heard))
        if cluster_id not in self._telling:
            self._telling[cluster_id] = asyncio.create_task(self._run(cluster_id))
        if not await heard:
            raise gone(body.node_id)

    async def _run(self, cluster_id: str) -> None:
        cluster = ClusterHandle(self._temporal, cluster_id)
        while waiting := self._waiting.pop(cluster_id, []):
            batches = [waiting[i : i + REGISTRATIONS_MAX] for i in range(0, len(waiting), REGISTRATIONS_MAX)]
            while batches:
                batch = batches.pop(0)
                messages = [message for message, _ in batch]
                call = (
                    cluster.node_registered(messages[0], timeout_s=SIGNAL_S)
                    if len(messages) == 1
                    else cluster.nodes_registered(messages, timeout_s=SIGNAL_S)
                )
                try:
                    heard = await told(call, SIGNAL_S)
                except Exception as error:  # noqa: BLE001 - each of those who wait raises it
                    if isinstance(error, InvalidRequest) and len(batch) > 1:  # one of them: none pays for another
                        batches[:0] = [[one] for one in batch]
                        continue
                    for _, future in batch:
                        if not future.done():  # a caller that has gone has cancelled its own
                            future.set_exception(error)
                else:
                    for _, future in batch:
                        if not future.done():
                            future.set_result(heard)
        del self._telling[cluster_id]  # nothing was awaited since the list was seen empty


async def _config(state: Any, row: Any, token: str) -> NodeConfigAnswer:
    keys: Keys = state.keys
    cluster = Cluster.model_validate(row.cluster_doc)
    role = NodeRole(row.role)
    given = row.config or {}
    answer = NodeConfigAnswer(
        node_token=token,
        node_id=row.id,
        cluster_id=row.cluster_id,
        cluster_name=row.cluster_name,
        role=role,
        group=row.doc["group"],
        resources=given.get("resources") or {},
        labels=given.get("labels") or {},
        ray_token=keys.ray_token(row.cluster_id),
        head_generation=row.generation if role == NodeRole.HEAD else await _head_generation(state.db, row.cluster_id),
        deadman_s=state.settings.deadman_s,
        maximum_uptime_at=maximum_uptime_at(cluster),
        report_interval_s=base_interval_s(state.settings, serves=bool(row.service_id) and role == NodeRole.HEAD),
        log_prefix=log_prefix(row.cluster_id, row.id),
        service_id=row.service_id or "",
    )
    if role == NodeRole.HEAD:
        answer.groups, answer.desired = worker_groups(cluster), cluster.desired
    return answer


async def _head_generation(db: Database, cluster_id: str) -> int:
    n = nodes.c
    async with db.read() as conn:
        found = await conn.scalar(
            select(n.generation)
            .where(n.cluster_id == cluster_id, n.role == NodeRole.HEAD, n.state != NodeState.TERMINATED)
            .order_by(n.generation.desc())
            .limit(1)
        )
    return found or 1
