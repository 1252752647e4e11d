"""One way to command a workflow: fix the Idempotency-Key, make sure that the workflow exists, send the update, and tell
a workflow that has just ended from one that was lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from api.kit.context import Context
from api.kit.idempotency import IdempotencyKey, reserve_for_command
from api.kit.temporal import UPDATE_S, WorkflowGone, updating
from heliostat.errors import Conflict

Update = Callable[[], Awaitable[None]]
"""Sends an update by the noun's handle, with ``timeout_s=UPDATE_S``."""


@dataclass(frozen=True)
class Target:
    """A resource whose workflow takes commands, as its row is now."""

    noun: str
    id: str
    name: str
    project_id: str
    state: str
    ended: bool
    after_end: str
    """What to do instead of a command, when it has ended."""
    if_gone: str
    """What to do when its workflow has ended but the resource has not."""
    ensure_started: Callable[[], Awaitable[None]]
    reload: Callable[[], Awaitable[Target]]


async def command(
    ctx: Context, target: Target, update: Update, key: IdempotencyKey | None, *, may_have_ended: bool
) -> None:
    """Returns when the workflow has accepted the command. ``may_have_ended``: then there is nothing left to do; else
    Conflict."""
    if key is not None:
        await reserve_for_command(ctx.db, target.project_id, key)
    if target.ended or not await send(target, update):
        if may_have_ended:
            return
        now = await target.reload()
        raise Conflict(f"{now.noun.capitalize()} {now.name} is {now.state}.", remedy=now.after_end, resource=now.id)


async def send(target: Target, update: Update, limit_s: float = UPDATE_S + 2) -> bool:
    """False: the resource has ended meanwhile. Raises Conflict when its workflow has ended but the resource has not."""
    await target.ensure_started()
    try:
        async with updating(target.noun, target.id, limit_s):
            await update()
    except WorkflowGone as e:
        if (await target.reload()).ended:
            return False
        raise Conflict(
            f"The workflow of {target.noun} {target.id} has ended: somebody terminated it in Temporal.",
            remedy=target.if_gone,
            resource=target.id,
        ) from e
    return True
