"""Commands on their way to heads and results on their way back to the activities that wait.

One poller per process asks the records for everybody who waits here: an agent's long poll
costs no query of its own.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import select
from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from api.agents.nodes import ENDED, AnyNode, Fleet, HeadNode
from api.agents.serve_config import serve_config
from api.agents.signals import told
from api.storage.buckets import bucket_of
from api.storage.packages import sign
from heliostat.errors import HeliostatError, InternalError, NotFound, Unavailable
from heliostat.models.agents import Command, CommandKind, CommandList, CommandResult, HeadAddress
from heliostat.models.clusters import NodeRole
from runtime.keys import Keys
from runtime.telemetry import COMMANDS_OPEN
from store.commands import OpenCommand, finish_command, open_commands
from store.database import Database
from store.encrypted_values import read_sealed
from store.tables import commands, nodes

log = structlog.get_logger(__name__)
router = APIRouter()

POLL_S = 0.04
"""Between two looks while somebody waits: what it adds to a command's way, half of it on average."""
REST_POLL_S = 0.2
REST_AFTER_S = 60.0
"""Between two looks once nothing new has been found for so long: an idle cluster costs next to nothing."""
MAX_WAIT_S = 30.0
COMPLETE_S = 5.0


@router.get("/commands", response_model=CommandList)
async def take_commands(
    request: Request,
    node: HeadNode,
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 25.0,
    known: Annotated[str, Query(max_length=20_000)] = "",
) -> CommandList:
    """All commands that are not finished: at once if one of them is not in ``known`` (ids with commas between),
    else after ``wait`` seconds. Holds env values and presigned URLs."""
    state = request.app.state
    found = await state.polls.commands(node.id, frozenset(known.split(",")), wait)
    answer = []
    for command in found:
        try:
            args = await resolve(command, state)
        except (NotFound, InternalError) as e:
            # Nobody can ever carry it out: its workflow must hear that from us, not wait for the agent.
            await finish(state, command.id, node.id, CommandResult(ok=False, error=str(e)))
            continue
        answer.append(Command(id=command.id, kind=CommandKind(command.kind), args=args))
    return CommandList(commands=answer)


@router.post("/commands/{command_id:path}/result", status_code=204)
async def report_result(request: Request, command_id: str, body: CommandResult, node: HeadNode) -> Response:
    """The first result counts. 503: keep it and send it again."""
    await finish(request.app.state, command_id, node.id, body)
    return Response(status_code=204)


@router.get("/head", response_model=HeadAddress)
async def head_address(
    request: Request, node: AnyNode, wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 20.0
) -> HeadAddress:
    """Where the node's cluster has its head, as soon as the head knows it."""
    found: HeadAddress | None = await request.app.state.polls.head(node.cluster_id, wait)
    if found is None:
        raise NotFound(
            f"The head of cluster {node.cluster_id} has not told its address yet.",
            remedy="Ask again.",
            resource=node.cluster_id,
        )
    return found


async def finish(state: Any, command_id: str, node_id: str, result: CommandResult) -> None:
    """Writes the result down first and tells Temporal after: dying in between, the agent's repeat finds the
    token again and tells Temporal then. Nobody waiting any more is success. Raises NotFound for a command
    that is not this node's, Unavailable when Temporal must be told again."""
    db: Database = state.db
    temporal: Client = state.temporal
    token = await finish_command(db, command_id, node_id, result.model_dump(mode="json"))
    if token is None:
        raise NotFound(f"Node {node_id} has no command {command_id}.", remedy="Forget its result.", resource=command_id)
    handle = temporal.get_async_activity_handle(task_token=token)
    if result.ok:
        await told(handle.complete(result.result), COMPLETE_S)
    else:
        failure = ApplicationError(
            result.error[:4000] or "the agent gave no reason", type="command_failed", non_retryable=not result.retryable
        )
        await told(handle.fail(failure), COMPLETE_S)


async def resolve(command: OpenCommand, state: Any) -> dict[str, Any]:
    """The arguments with what they refer to: env values opened, package URLs signed. Never written anywhere.
    Raises NotFound or InternalError when a reference leads nowhere."""
    args = dict(command.args)
    keys: Keys = state.keys
    fleet: Fleet = state.fleet
    if command.kind == CommandKind.SERVE_DEPLOY:
        view = await fleet.view(command.cluster_id)
        args["config"] = await serve_config(state, view, str(args.get("version_id")))
        return args
    if reference := args.pop("env_ref", None):
        values = await read_sealed(state.db, keys, reference)
        if values is None:
            raise NotFound("The job's env values are gone by retention.", remedy="Submit the job again.")
        args["env_vars"] = {**values, **(args.get("env_vars") or {})}
    named = [args.get("working_dir"), *(args.get("py_modules") or [])]
    references = [p for p in named if isinstance(p, str)]
    if references:
        view = await fleet.view(command.cluster_id)
        bucket = await bucket_of(state.buckets, view.cloud_id)
        found = await asyncio.to_thread(sign, references, view.project_id, bucket, "Submit the job again.")
        signed = [found[p] if isinstance(p, str) else p for p in named]
        args["working_dir"], args["py_modules"] = signed[0], signed[1:]
    return args


@dataclass(eq=False)
class _Waiter:
    key: str
    """Node id (commands) or cluster id (head)."""
    known: frozenset[str]
    done: asyncio.Future[Any]


@dataclass
class Polls:
    """Long polls of this process, and the one task that looks for all of them."""

    db: Database
    _commands: set[_Waiter] = field(default_factory=set)
    _heads: set[_Waiter] = field(default_factory=set)
    _somebody: asyncio.Event = field(default_factory=asyncio.Event)
    _found_at: float = field(default_factory=time.monotonic)

    async def commands(self, node_id: str, known: frozenset[str], wait_s: float) -> list[OpenCommand]:
        await self._wait(self._commands, node_id, known, wait_s)
        return await open_commands(self.db, [node_id])

    async def head(self, cluster_id: str, wait_s: float) -> HeadAddress | None:
        found: HeadAddress | None = await self._wait(self._heads, cluster_id, frozenset(), wait_s)
        return found or (await self._look_for_heads([cluster_id])).get(cluster_id)

    async def _wait(self, waiters: set[_Waiter], key: str, known: frozenset[str], wait_s: float) -> Any:
        waiter = _Waiter(key, known, asyncio.get_running_loop().create_future())
        waiters.add(waiter)
        self._somebody.set()
        try:
            async with asyncio.timeout(wait_s):
                return await waiter.done
        except TimeoutError:
            return None
        finally:
            waiters.discard(waiter)

    async def run(self) -> None:
        """Until cancelled; asleep while nobody waits."""
        while True:
            await self._somebody.wait()
            try:
                await self._look()
            except Unavailable as e:
                self._tell_all(e)
            if not self._commands and not self._heads:
                self._somebody.clear()
            busy = bool(self._heads) or time.monotonic() - self._found_at < REST_AFTER_S
            await asyncio.sleep(POLL_S if busy else REST_POLL_S)

    def _tell_all(self, error: HeliostatError) -> None:
        for waiter in (*self._commands, *self._heads):
            if not waiter.done.done():
                waiter.done.set_exception(error)

    async def _look(self) -> None:
        if self._commands:
            async with self.db.read() as conn:
                rows = await conn.execute(select(commands.c.node_id, commands.c.id).where(commands.c.done.is_(False)))
                open_ids: dict[str, set[str]] = {}
                for r in rows:
                    open_ids.setdefault(r.node_id, set()).add(r.id)
            COMMANDS_OPEN.set(sum(map(len, open_ids.values())))
            for waiter in self._commands:
                if not waiter.done.done() and open_ids.get(waiter.key, set()) - waiter.known:
                    waiter.done.set_result(None)
                    self._found_at = time.monotonic()
        if self._heads:
            found = await self._look_for_heads([w.key for w in self._heads])
            for waiter in self._heads:
                if waiter.key in found and not waiter.done.done():
                    waiter.done.set_result(found[waiter.key])

    async def _look_for_heads(self, cluster_ids: list[str]) -> dict[str, HeadAddress]:
        n = nodes.c
        async with self.db.read() as conn:
            rows = await conn.execute(
                select(n.cluster_id, n.generation, n.gcs_address)
                .where(
                    n.cluster_id.in_(cluster_ids),
                    n.role == NodeRole.HEAD,
                    n.ended_at.is_(None),
                    n.state.not_in(ENDED),
                )
                .order_by(n.generation)
            )
            # The newest head counts, also while it has no address yet: the one before it is being replaced.
            newest = {r.cluster_id: r for r in rows}
        return {
            r.cluster_id: HeadAddress(generation=r.generation, gcs_address=r.gcs_address)
            for r in newest.values()
            if r.gcs_address
        }
