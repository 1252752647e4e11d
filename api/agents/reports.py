"""What nodes report: the newest report of each goes to one narrow table in batches; a *change* becomes a
message to the workflow that owns the thing, and is acknowledged only when Temporal has taken it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sqlalchemy import case, update
from temporalio.client import Client

from api.agents.nodes import AnyNode, CallingNode, Fleet, gone
from api.agents.signals import told
from heliostat.errors import InvalidRequest, Unavailable
from heliostat.models.agents import SUPPORTED_PROTOCOLS, Fact, FactKind, ReportAnswer, ReportRequest, ServeStatus
from heliostat.models.clusters import NodeRole
from heliostat.models.common import utcnow
from runtime.messages.clusters import ClusterHandle, NodeFact
from runtime.messages.jobs import JobHandle
from runtime.messages.services import ServiceHandle
from runtime.settings import Settings
from runtime.telemetry import REPORTS
from store.database import Database, insert
from store.heartbeats import HEARING_GAP_S
from store.tables import hearing, log_streams, nodes, reports

log = structlog.get_logger(__name__)
router = APIRouter()

FLUSH_S = 0.5
BEAT_S = 1.0
"""Without any report we still write down so often that we can hear; must stay well below HEARING_GAP_S."""
SIGNAL_S = 3.0
AWAY_S = 1.0
"""After Temporal did not answer, facts are left with their agents for so long, so that reports stay quick."""
MAX_REPORTS_PER_S = 100
"""Above this many the answers stretch the interval."""
SERVE_INTERVAL_S = 1.0
"""Heads of a service's cluster report at least so often: a canary is judged by what they see."""
WORKER_FACTOR = 5
"""A worker has less to tell than a head, which speaks for it: it reports so many times more seldom."""
MAX_TEXT = 8_000
"""Characters of one text in a fact: a payload has 2 MB, and a history keeps it."""

RUN_FACTS = (FactKind.RUN_RUNNING, FactKind.RUN_ENDED)
TOGETHER = (FactKind.RAY_READY, FactKind.NODE_LOST)
"""What a head tells of a hundred workers at once; those that follow each other go as one message."""
FACTS_MAX = 50
"""In one message: of some hundred bytes, at most a few texts of ``MAX_TEXT`` each; a payload may have 2 MB."""
HEAD_FACTS = (*RUN_FACTS, FactKind.NODE_LOST, FactKind.ACTIVITY, FactKind.DESIRED, FactKind.SERVE)


def check_protocol(protocol: int) -> None:
    if protocol not in SUPPORTED_PROTOCOLS:
        served = " and ".join(str(p) for p in SUPPORTED_PROTOCOLS)
        raise InvalidRequest(
            f"This API does not speak version {protocol} of the agent's protocol; it serves {served}.",
            remedy="Start new nodes: they boot this API's agent. Or run the API of that agent's release.",
            field="protocol",
        )


@router.post("/report", response_model=ReportAnswer)
async def report(request: Request, body: ReportRequest, node: AnyNode) -> JSONResponse:
    """Every node, every ``interval_s``, and at once when it has a fact to tell."""
    check_protocol(body.protocol)
    state = request.app.state
    fleet: Fleet = state.fleet
    if node.boot_id and body.boot_id and node.boot_id != body.boot_id:
        raise gone(node.id)
    await _write_firsts(state.db, node, body)
    state.reports.add(node, body)
    acked = await state.facts.deliver(node, body.facts)
    view = await fleet.view(node.cluster_id)
    if view.service_id and body.serve is not None and node.role == NodeRole.HEAD:
        await state.serve_totals.heard(state.db, node.id, view.service_id, body.serve)
    answer = ReportAnswer(
        interval_s=interval_s(fleet, node, state.settings, serves=view.service_id is not None),
        acked=acked,
        follow=view.follow,
        maximum_uptime_at=view.maximum_uptime_at,
    )
    if node.role == NodeRole.HEAD:
        answer.nodes, answer.desired, answer.groups = view.workers, view.desired, view.groups
    return JSONResponse(answer.model_dump(mode="json", exclude={"follow"} if body.protocol == 0 else None))


def base_interval_s(settings: Settings, *, serves: bool) -> float:
    """Of a head, when there are few nodes."""
    return min(settings.report_interval_s, SERVE_INTERVAL_S) if serves else settings.report_interval_s


def interval_s(fleet: Fleet, node: CallingNode, settings: Settings, *, serves: bool = False) -> float:
    base = base_interval_s(settings, serves=serves and node.role == NodeRole.HEAD)
    rate = (fleet.calling(NodeRole.HEAD) + fleet.calling(NodeRole.WORKER) / WORKER_FACTOR) / base
    # Stretched at most so far that three reports in a row may be lost before a head counts as silent.
    head = min(base * max(1.0, rate / MAX_REPORTS_PER_S), max(base, settings.silence_s / 4))
    return round(head if node.role == NodeRole.HEAD else head * WORKER_FACTOR, 2)


async def _write_firsts(db: Database, node: CallingNode, body: ReportRequest) -> None:
    """What the first reports tell and others wait for: written at once, before the answer. The first one
    closes registration."""
    gcs_address = body.gcs_address
    for fact in body.facts:
        if fact.kind == FactKind.RAY_READY and fact.data.get("node_id", node.id) == node.id:
            gcs_address = str(fact.data.get("gcs_address") or gcs_address)
    values: dict[str, Any] = {}
    if not node.authenticated:
        values["authenticated"] = True
    if node.role == NodeRole.HEAD and gcs_address and gcs_address != node.gcs_address:
        values["gcs_address"] = gcs_address[:100]
    if values:
        async with db.begin() as conn:
            await conn.execute(update(nodes).where(nodes.c.id == node.id).values(**values))
        node.authenticated = True
        node.gcs_address = gcs_address or node.gcs_address


@dataclass
class Reports:
    """The newest report of every node, written in one transaction together with the note that we can hear."""

    db: Database
    _pending: dict[str, dict[str, Any]] = field(default_factory=dict)
    _wrote_at: float = -1e9

    def add(self, node: CallingNode, body: ReportRequest) -> None:
        REPORTS.labels(role=node.role).inc()
        self._pending[node.id] = {
            "node_id": node.id,
            "cluster_id": node.cluster_id,
            "is_head": node.role == NodeRole.HEAD,
            "seq": body.seq,
            "activity": body.activity,
            "doc": body.model_dump(mode="json", exclude={"facts", "seq", "activity", "protocol"}),
            "at": utcnow(),
        }

    async def run(self) -> None:
        """Until cancelled. While the records are away the newest reports are kept, and nothing says that
        we can hear: silence counts from anew afterwards."""
        failing = False
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                if self._pending or time.monotonic() - self._wrote_at >= BEAT_S:
                    await self.flush()
                failing = False
            except Unavailable as e:
                if not failing:
                    log.warning("reports are not written down", error=str(e))
                failing = True

    async def flush(self) -> None:
        taken, self._pending = self._pending, {}
        try:
            await self._write(list(taken.values()), utcnow())
        except BaseException:
            self._pending = {**taken, **self._pending}
            raise
        self._wrote_at = time.monotonic()

    async def _write(self, rows: list[dict[str, Any]], now: datetime) -> None:
        async with self.db.begin() as conn:
            if rows:
                row = insert(conn, reports)
                new = row.excluded
                await conn.execute(
                    row.on_conflict_do_update(
                        index_elements=["node_id"],
                        set_={k: new[k] for k in ("seq", "activity", "doc", "at")},
                        where=new.at > reports.c.at,  # another API may have heard it later
                    ),
                    rows,
                )
            gap = hearing.c.last < now - timedelta(seconds=HEARING_GAP_S)
            await conn.execute(
                insert(conn, hearing)
                .values(id=1, since=now, last=now)
                .on_conflict_do_update(
                    index_elements=["id"],
                    set_={
                        "since": case((gap, now), else_=hearing.c.since),
                        "last": case((hearing.c.last < now, now), else_=hearing.c.last),
                    },
                )
            )


@dataclass
class Facts:
    """Carries facts to workflows. Delivered at least once; the workflow acts on an event id once."""

    db: Database
    temporal: Client
    fleet: Fleet
    _away_until: float = -1e9

    async def deliver(self, node: CallingNode, facts: list[Fact]) -> list[str]:
        """Ids that are safe. The first one that Temporal has not taken ends the list, for the order counts."""
        acked: list[str] = []
        wanted: list[Fact] = []
        for fact in facts:
            refusal = await self._refusal(node, fact)
            if refusal:
                log.warning("fact refused", node_id=node.id, kind=fact.kind, fact_id=fact.id, reason=refusal)
                acked.append(fact.id)
            else:
                wanted.append(fact)
        while wanted:
            batch = list(takewhile(lambda f: f.kind in TOGETHER, wanted[:FACTS_MAX])) or wanted[:1]
            if not await self._signal(node, batch):
                break
            acked += [fact.id for fact in batch]
            del wanted[: len(batch)]
        return acked

    async def _refusal(self, node: CallingNode, fact: Fact) -> str:
        """Why this node may not tell this; a node's token reaches its own cluster only."""
        if fact.kind in HEAD_FACTS and node.role != NodeRole.HEAD:
            return "only a head may tell this"
        if fact.kind == FactKind.SERVE:
            view = await self.fleet.view(node.cluster_id)
            return _serve_status(fact) if view.service_id else "this cluster serves no service"
        if fact.kind in RUN_FACTS:
            run_id = str(fact.data.get("run_id", ""))
            return (
                "" if await self.fleet.runs_here(node.cluster_id, run_id) else f"run {run_id!r} is not this cluster's"
            )
        about = str(fact.data.get("node_id", node.id))
        if about != node.id:
            if node.role != NodeRole.HEAD:
                return "a worker may tell of itself only"
            if not await self.fleet.has(node.cluster_id, about):
                return f"node {about!r} is not this cluster's or has ended"
        return ""

    async def _signal(self, node: CallingNode, facts: list[Fact]) -> bool:
        """``facts``: one, or several of the cluster (``TOGETHER``)."""
        if time.monotonic() < self._away_until:
            return False
        first = facts[0]
        run_id = str(first.data["run_id"]) if first.kind in RUN_FACTS else ""
        if first.kind == FactKind.RUN_ENDED:
            # Before the workflow knows: who sees the job settled must find its log complete.
            await self._complete_log(node, run_id)
        messages = [
            NodeFact(
                event_id=f"{node.id}/{fact.id}",
                cluster_id=node.cluster_id,
                node_id=node.id,
                kind=fact.kind,
                at=fact.at,
                data=_shortened(fact.data),
            )
            for fact in facts
        ]
        call: Awaitable[None]
        if run_id:
            call = JobHandle(self.temporal, run_id.rpartition("-")[0]).run_fact(messages[0], timeout_s=SIGNAL_S)
        elif first.kind == FactKind.SERVE:
            service_id = (await self.fleet.view(node.cluster_id)).service_id or ""
            call = ServiceHandle(self.temporal, service_id).serve_fact(messages[0], timeout_s=SIGNAL_S)
        else:
            cluster = ClusterHandle(self.temporal, node.cluster_id)
            call = (
                cluster.fact(messages[0], timeout_s=SIGNAL_S)
                if len(messages) == 1
                else cluster.facts(messages, timeout_s=SIGNAL_S)
            )
        try:
            await told(call, SIGNAL_S)  # False: nobody is left whom it concerns
        except InvalidRequest as e:
            if len(facts) > 1:  # one of them: none is lost for another
                for fact in facts:
                    if not await self._signal(node, [fact]):
                        return False
                return True
            log.error("fact can never be delivered", node_id=node.id, kind=first.kind, fact_id=first.id, error=str(e))
        except Unavailable as e:
            self._away_until = time.monotonic() + AWAY_S
            log.warning("Temporal takes no facts; agents keep them", error=str(e))
            return False
        return True

    async def _complete_log(self, node: CallingNode, run_id: str) -> None:
        async with self.db.begin() as conn:
            await conn.execute(
                update(log_streams)
                .where(
                    log_streams.c.cluster_id == node.cluster_id,
                    log_streams.c.node_id == node.id,
                    log_streams.c.stream == f"runs/{run_id}.log",
                )
                .values(complete=True)
            )


def _serve_status(fact: Fact) -> str:
    """Brings what Serve is said to be into its form; what does not belong there is dropped. Why it can't be, or ""."""
    try:
        fact.data = ServeStatus.model_validate(fact.data).model_dump(mode="json")
    except ValidationError as e:
        return f"its data is no ServeStatus: {'.'.join(map(str, e.errors()[0]['loc']))}"
    return ""


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return value[: MAX_TEXT // 2] + "\n… shortened …\n" + value[-MAX_TEXT // 2 :]
    if isinstance(value, dict):
        return {k: _shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(v) for v in value]
    return value
