"""What the agents' routes work with in addition to ``api.kit.context``, and which node calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated

import structlog
from fastapi import Depends, Request

from api.agents.facts import Facts
from api.agents.fleet import CallingNode, Fleet
from api.agents.polls import Polls
from api.agents.registrations import Registrations
from api.agents.reports import Reports
from api.kit.context import Context
from heliostat.errors import PermissionDenied, Unauthenticated, Unavailable
from heliostat.models.clusters import NodeRole

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class AgentContext:
    fleet: Fleet
    reports: Reports
    facts: Facts
    registrations: Registrations
    polls: Polls

    @classmethod
    def of(cls, ctx: Context) -> AgentContext:
        fleet = Fleet(ctx.db)
        return cls(
            fleet=fleet,
            reports=Reports(ctx.db),
            facts=Facts(ctx.db, ctx.temporal, fleet),
            registrations=Registrations(ctx.temporal),
            polls=Polls(ctx.db),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """With its two tasks: the flush of reports, which also notes that we can receive any, and the long polls."""
        tasks = [asyncio.create_task(self.reports.run()), asyncio.create_task(self.polls.run())]
        for task in tasks:
            task.add_done_callback(_must_not_end)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(Unavailable):  # the next reports hold the same again
                await self.reports.flush()


def _must_not_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        log.critical("a task of the agents' API has ended; restart this API", exc_info=task.exception())


async def _agents(request: Request) -> AgentContext:
    agents: AgentContext = request.app.state.agents
    return agents


AgentCtx = Annotated[AgentContext, Depends(_agents)]


async def _calling_node(request: Request, agents: AgentCtx) -> CallingNode:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated(
            "This call needs a node token.", remedy="Send it as 'Authorization: Bearer <node token>'."
        )
    return await agents.fleet.node(token.strip())


async def _calling_head(node: Annotated[CallingNode, Depends(_calling_node)]) -> CallingNode:
    if node.role != NodeRole.HEAD:
        raise PermissionDenied(
            f"Node {node.id} is a worker; only the head of its cluster may call this.",
            remedy="Call this from the head's agent.",
            resource=node.id,
        )
    return node


AnyNode = Annotated[CallingNode, Depends(_calling_node)]
HeadNode = Annotated[CallingNode, Depends(_calling_head)]
