"""Commands that heads carry out: their agents fetch them here and send the results back, which complete the activities
that wait."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Query, Response
from temporalio.exceptions import ApplicationError

from api.agents.context import AgentContext, AgentCtx, AnyNode, HeadNode
from api.agents.serve_config import serve_config
from api.agents.signals import delivered
from api.kit.context import Context, Ctx
from api.storage.buckets import bucket_of
from api.storage.packages import sign
from heliostat.errors import InternalError, NotFound
from heliostat.models.agents import Command, CommandKind, CommandList, CommandResult, HeadAddress
from store.commands import OpenCommand, finish_command
from store.encrypted_values import read_sealed

log = structlog.get_logger(__name__)
router = APIRouter()

MAX_WAIT_S = 30.0
COMPLETE_S = 5.0


@router.get("/commands", response_model=CommandList)
async def take_commands(
    ctx: Ctx,
    agents: AgentCtx,
    node: HeadNode,
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 25.0,
    known: Annotated[str, Query(max_length=20_000)] = "",
) -> CommandList:
    """All commands that are not finished: at once if one of them is not in ``known`` (ids with commas between),
    else after ``wait`` seconds. Holds env values and presigned URLs."""
    found = await agents.polls.commands(node.id, frozenset(known.split(",")), wait)
    answer = []
    for command in found:
        try:
            args = await resolve(ctx, agents, command)
        except (NotFound, InternalError) as e:
            # It can never be carried out: its workflow must learn that now, not wait for the agent.
            await finish(ctx, command.id, node.id, CommandResult(ok=False, error=str(e)))
            continue
        answer.append(Command(id=command.id, kind=CommandKind(command.kind), args=args))
    return CommandList(commands=answer)


@router.post("/commands/{command_id:path}/result", status_code=204)
async def report_result(ctx: Ctx, command_id: str, body: CommandResult, node: HeadNode) -> Response:
    """The first result counts. 503: send it again."""
    await finish(ctx, command_id, node.id, body)
    return Response(status_code=204)


@router.get("/head", response_model=HeadAddress)
async def head_address(
    agents: AgentCtx, node: AnyNode, wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 20.0
) -> HeadAddress:
    """The address of the cluster's head, as soon as the head has reported it."""
    found = await agents.polls.head(node.cluster_id, wait)
    if found is None:
        raise NotFound(
            f"The head of cluster {node.cluster_id} has not reported its address yet.",
            remedy="Ask again.",
            resource=node.cluster_id,
        )
    return found


async def finish(ctx: Context, command_id: str, node_id: str, result: CommandResult) -> None:
    """Writes the result first and completes the activity after that: if this process dies in between, the agent's
    repeat finds the token again and completes it then. An activity that no longer waits is success. Raises NotFound
    for a command that is not this node's, Unavailable when the agent must repeat."""
    token = await finish_command(ctx.db, command_id, node_id, result.model_dump(mode="json"))
    if token is None:
        raise NotFound(
            f"Node {node_id} has no command {command_id}.", remedy="Discard its result.", resource=command_id
        )
    handle = ctx.temporal.get_async_activity_handle(task_token=token)
    if result.ok:
        await delivered(handle.complete(result.result), COMPLETE_S)
    else:
        failure = ApplicationError(
            result.error[:4000] or "the agent gave no reason", type="command_failed", non_retryable=not result.retryable
        )
        await delivered(handle.fail(failure), COMPLETE_S)


async def resolve(ctx: Context, agents: AgentContext, command: OpenCommand) -> dict[str, Any]:
    """The arguments with what they refer to: env values decrypted, package URLs signed. Never written anywhere.
    Raises NotFound or InternalError when a reference leads nowhere."""
    args: dict[str, Any] = dict(command.args)
    if command.kind == CommandKind.SERVE_DEPLOY:
        view = await agents.fleet.view(command.cluster_id)
        args["config"] = await serve_config(ctx, view, str(args.get("version_id")))
        return args
    if reference := args.pop("env_ref", None):
        values = await read_sealed(ctx.db, ctx.keys, reference)
        if values is None:
            raise NotFound(
                "The job's env values have been deleted by the retention policy.", remedy="Submit the job again."
            )
        args["env_vars"] = {**values, **(args.get("env_vars") or {})}
    named = [args.get("working_dir"), *(args.get("py_modules") or [])]
    references = [p for p in named if isinstance(p, str)]
    if references:
        view = await agents.fleet.view(command.cluster_id)
        bucket = await bucket_of(ctx.buckets, view.cloud_id)
        found = await asyncio.to_thread(sign, references, view.project_id, bucket, "Submit the job again.")
        signed = [found[p] if isinstance(p, str) else p for p in named]
        args["working_dir"], args["py_modules"] = signed[0], signed[1:]
    return args
