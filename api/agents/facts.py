"""Facts: changes that nodes report. Each becomes a message to the workflow that owns the thing, and is acknowledged
only when Temporal has stored it."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import dataclass
from itertools import takewhile

import structlog
from pydantic import JsonValue, ValidationError
from temporalio.client import Client

from api.agents.fleet import CallingNode, Fleet
from api.agents.signals import delivered
from heliostat.errors import InvalidRequest, Unavailable
from heliostat.models.agents import Fact, FactKind, ServeStatus
from heliostat.models.clusters import NodeRole
from runtime.messages.clusters import ClusterHandle, NodeFact
from runtime.messages.jobs import JobHandle
from runtime.messages.services import ServiceHandle
from store.database import Database
from store.log_streams import complete_run_log

log = structlog.get_logger(__name__)

SIGNAL_S = 3.0
AWAY_S = 1.0
"""After Temporal did not answer, facts stay with their agents for this long, so that reports stay quick."""
MAX_TEXT = 8_000
"""Characters of one text in a fact: a payload has 2 MB, and a history keeps it."""

RUN_FACTS = (FactKind.RUN_RUNNING, FactKind.RUN_ENDED)
BATCHED = (FactKind.RAY_READY, FactKind.NODE_LOST)
"""What a head reports of a hundred workers at once; those that follow each other go as one message."""
FACTS_MAX = 50
"""In one message: of some hundred bytes, at most a few texts of ``MAX_TEXT`` each; a payload may have 2 MB."""
HEAD_FACTS = (*RUN_FACTS, FactKind.NODE_LOST, FactKind.ACTIVITY, FactKind.DESIRED, FactKind.SERVE)


@dataclass
class Facts:
    """Delivers facts to workflows at least once; a workflow acts on an event id once."""

    db: Database
    temporal: Client
    fleet: Fleet
    _away_until: float = -1e9

    async def deliver(self, node: CallingNode, facts: list[Fact]) -> list[str]:
        """Ids that are stored. The first fact that Temporal has not stored ends the list, because the order counts."""
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
            batch = list(takewhile(lambda f: f.kind in BATCHED, wanted[:FACTS_MAX])) or wanted[:1]
            if not await self._signal(node, batch):
                break
            acked += [fact.id for fact in batch]
            del wanted[: len(batch)]
        return acked

    async def _refusal(self, node: CallingNode, fact: Fact) -> str:
        """Why this node may not report this, or "". A node's token covers its own cluster only."""
        if fact.kind in HEAD_FACTS and node.role != NodeRole.HEAD:
            return "only a head may report this"
        if fact.kind == FactKind.SERVE:
            view = await self.fleet.view(node.cluster_id)
            return _serve_status(fact) if view.service_id else "this cluster serves no service"
        if fact.kind in RUN_FACTS:
            run_id = str(fact.data.get("run_id", ""))
            return "" if await self.fleet.has_run(node.cluster_id, run_id) else f"run {run_id!r} is not this cluster's"
        about = str(fact.data.get("node_id", node.id))
        if about != node.id:
            if node.role != NodeRole.HEAD:
                return "a worker may report on itself only"
            if not await self.fleet.has(node.cluster_id, about):
                return f"node {about!r} is not this cluster's or has ended"
        return ""

    async def _signal(self, node: CallingNode, facts: list[Fact]) -> bool:
        """``facts``: one, or several of the cluster (``BATCHED``)."""
        if time.monotonic() < self._away_until:
            return False
        first = facts[0]
        run_id = str(first.data["run_id"]) if first.kind in RUN_FACTS else ""
        if first.kind == FactKind.RUN_ENDED:
            # Before the workflow learns of it: a reader that sees the job settled must find its log complete.
            async with self.db.begin() as conn:
                await complete_run_log(conn, node.cluster_id, node.id, run_id)
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
            await delivered(call, SIGNAL_S)  # False: its workflow has ended, and it concerns nobody else
        except InvalidRequest as e:
            if len(facts) > 1:  # one of them is at fault: the others are delivered
                for fact in facts:
                    if not await self._signal(node, [fact]):
                        return False
                return True
            log.error("fact can never be delivered", node_id=node.id, kind=first.kind, fact_id=first.id, error=str(e))
        except Unavailable as e:
            self._away_until = time.monotonic() + AWAY_S
            log.warning("Temporal does not answer; facts stay with their agents", error=str(e))
            return False
        return True


def _serve_status(fact: Fact) -> str:
    """Normalizes the status of Serve that a fact holds; unknown fields are dropped. Why it is invalid, or ""."""
    try:
        fact.data = ServeStatus.model_validate(fact.data).model_dump(mode="json")
    except ValidationError as e:
        return f"its data is not a valid ServeStatus: {'.'.join(map(str, e.errors()[0]['loc']))}"
    return ""


def _shortened(value: JsonValue) -> JsonValue:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return value[: MAX_TEXT // 2] + "\n… shortened …\n" + value[-MAX_TEXT // 2 :]
    if isinstance(value, dict):
        return {k: _shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(v) for v in value]
    return value
