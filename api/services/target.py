"""A service as the target of commands to its workflow."""

from __future__ import annotations

from dataclasses import replace

from api.kit.commands import Target
from api.kit.context import Context
from heliostat.models.services import ServiceState
from store.services.rows import ServiceRow, load_service


def target_of(ctx: Context, row: ServiceRow) -> Target:
    async def deliver() -> None:
        await ctx.outbox.deliver_deploys(row.id, mark=True)

    async def reload() -> Target:
        now = await load_service(ctx.db, row.id)
        return target_of(ctx, now) if now is not None else replace(target, ended=True, state=ServiceState.TERMINATED)

    target = Target(
        noun="service",
        id=row.id,
        name=row.name,
        project_id=row.project_id,
        state=row.state,
        ended=row.withdrawn or row.state == ServiceState.TERMINATED,
        after_end="Deploy to it to start it again.",
        if_gone="Deploy to the service to start it again; then it can be terminated.",
        ensure_started=deliver,
        reload=reload,
    )
    return target
