"""The nodes' agents in a test's world: they say and do what real ones do, without HTTP and without Ray."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import select
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from clouds.contract.machines import Machine, MachineSpec
from heliostat.models.agents import CommandKind, FactKind
from heliostat.models.clusters import NodeRole
from heliostat.models.common import utcnow
from runtime.messages.clusters import NodeFact, NodeRegistered
from store.commands import OpenCommand, finish_command, open_commands
from store.database import Database
from store.tables import clusters
from tests.workflows.balancer import WatchedBalancer
from tests.workflows.plans import NodePlan, RunPlan, ServePlan
from tests.workflows.serving import FakeServe

LOOK_S = 0.03


class FakeAgent:
    def __init__(self, fleet: FakeFleet, spec: MachineSpec, ip: str, plan: NodePlan) -> None:
        self.fleet, self.spec, self.ip, self.plan = fleet, spec, ip, plan
        self.node_id, self.cluster_id, self.is_head = spec.node_id, spec.cluster_id, spec.role == NodeRole.HEAD
        self.up = False
        self.runs: set[str] = set()
        self.ended: dict[str, dict[str, Any]] = {}
        self.fenced = False
        self.fence_answer: dict[str, Any] | None = None
        """Answer to the next fences instead of the truth."""
        self.deaf = False
        """Takes no commands."""
        self.commands: list[OpenCommand] = []
        """All that were carried out."""
        self.serve = FakeServe(self)
        self._facts = 0
        self._facts_lock = asyncio.Lock()
        self.task = asyncio.create_task(self._live())

    async def _live(self) -> None:
        if not self.plan.register:
            return
        await self.fleet.signal(
            self.cluster_id,
            "node_registered",
            NodeRegistered(
                event_id=f"{self.node_id}/registered/{self.spec.generation}/boot",
                node_id=self.node_id,
                generation=self.spec.generation,
                ip=self.ip,
            ),
        )
        if self.plan.failed:
            await self.tell(FactKind.NODE_FAILED, reason=self.plan.failed)
        if not self.plan.ready:
            return
        if self.is_head:
            self.up = True
            self.fleet.heads[self.cluster_id] = self
            await self.tell(FactKind.RAY_READY, gcs_address=f"{self.ip}:6379", ray_version="2.60.0")
            await self.tell_activity()
        else:
            head = await self.fleet.head_of(self.cluster_id)
            self.up = True
            await head.tell(FactKind.RAY_READY, node_id=self.node_id)

    def fact(self, kind: FactKind, /, **data: Any) -> NodeFact:
        self._facts += 1
        return NodeFact(
            event_id=f"{self.node_id}/f{self._facts}",
            cluster_id=self.cluster_id,
            node_id=self.node_id,
            kind=kind,
            at=utcnow(),
            data=data,
        )

    async def tell(self, kind: FactKind, /, **data: Any) -> None:
        """As api.agents.signals does: run facts go to the job, Serve's to the service, the others to the cluster, in
        order."""
        fact = self.fact(kind, **data)
        async with self._facts_lock:
            if kind in (FactKind.RUN_RUNNING, FactKind.RUN_ENDED):
                await self.fleet.signal(str(data["run_id"]).rpartition("-")[0], "run_fact", fact)
            elif kind == FactKind.SERVE:
                await self.fleet.signal(await self.fleet.service_of(self.cluster_id), "serve_fact", fact)
            else:
                await self.fleet.signal(self.cluster_id, "fact", fact)

    async def tell_activity(self, activity: str | None = None) -> None:
        activity = activity or ("busy" if self.runs else "idle")
        await self.tell(FactKind.ACTIVITY, activity=activity, since=utcnow().isoformat(), reason="fake")

    def power_off(self) -> None:
        self.task.cancel()
        self.up = False
        self.fleet.on_power_off(self)
        self.fleet.agents.pop(self.node_id, None)
        head = self.fleet.heads.get(self.cluster_id)
        if head is self:
            del self.fleet.heads[self.cluster_id]

    # -- commands

    async def carry_out(self, command: OpenCommand) -> None:
        self.commands.append(command)
        if command.kind in self.serve.kinds:
            result = await self.serve.result(command)
        else:
            result = await self._result(command.kind, command.args)
        if result is not None:
            await self.fleet.finish(command.id, self.node_id, result)

    async def _result(self, kind: str, args: dict[str, Any]) -> dict[str, Any] | None:
        done = {"ok": True, "result": {}, "error": "", "retryable": False}
        if kind == CommandKind.SUBMIT_RUN:
            return await self._submit(args)
        if kind == CommandKind.STOP_RUN:
            run_id = args["run_id"]
            if run_id in self.runs:
                await self.end_run(run_id, status="STOPPED", exit_code=None)
            self.ended.setdefault(run_id, {"status": "UNKNOWN", "exit_code": None})
            return done | {"result": self.ended[run_id]}
        if kind == CommandKind.FENCE:
            truth = {"activity": "busy" if self.runs else "idle", "reason": "fake"}
            self.fenced = True
            return done | {"result": self.fence_answer or truth}
        if kind == CommandKind.UNFENCE:
            self.fenced = False
        return done

    async def _submit(self, args: dict[str, Any]) -> dict[str, Any] | None:
        done = {"ok": True, "result": {"accepted": True}, "error": "", "retryable": False}
        run_id = args["run_id"]
        if self.fenced:
            return {"ok": False, "result": {}, "error": "this head is fenced", "retryable": False}
        if run_id in self.runs or run_id in self.ended:
            return done
        plan = self.fleet.next_run(args)
        if plan.refuse:
            return {"ok": False, "result": {}, "error": plan.refuse, "retryable": plan.retryable}
        if plan.silent:
            return None
        self.fleet.started.append(run_id)
        self.runs.add(run_id)
        self.fleet.spawn(self._run(run_id, plan))
        return done if plan.answer else None

    async def _run(self, run_id: str, plan: RunPlan) -> None:
        if plan.error != "runtime_env":
            await self.tell(FactKind.RUN_RUNNING, run_id=run_id)
        if self.fleet.activity_facts:
            await self.tell_activity()
        if not plan.hold and run_id in self.runs and self.up:
            await self.end_run(run_id, exit_code=plan.exit_code, error=plan.error, timed_out=plan.timed_out)

    async def end_run(
        self,
        run_id: str,
        *,
        exit_code: int | None = 0,
        error: str = "",
        status: str = "",
        timed_out: bool = False,
    ) -> None:
        self.runs.discard(run_id)
        failed = bool(exit_code or error or timed_out)
        status = status or ("FAILED" if failed else "SUCCEEDED")
        self.ended[run_id] = {"status": status, "exit_code": exit_code}
        await self.tell(
            FactKind.RUN_ENDED,
            run_id=run_id,
            status=status,
            exit_code=exit_code,
            message=f"said {error}" if error else "",
            error=error or ("entrypoint" if failed and not timed_out else ""),
            timed_out=timed_out,
        )
        if self.fleet.activity_facts:
            await self.tell_activity()


class FakeFleet:
    """All agents. ``node_plan``, ``run_plans`` and ``serve_plans`` are the knobs."""

    def __init__(self, client: Client, db: Database) -> None:
        self.client, self.db = client, db
        self.loop = asyncio.get_running_loop()
        self.agents: dict[str, FakeAgent] = {}
        self.heads: dict[str, FakeAgent] = {}
        self.node_plan: Callable[[MachineSpec], NodePlan] = lambda spec: NodePlan()
        self.run_plans: list[RunPlan] = []
        """Of the next runs, in order; after the last one: success."""
        self.run_plan = RunPlan()
        self.serve_plans: dict[str, ServePlan] = {}
        """By version id; else everything goes well."""
        self.deployed: dict[str, set[str]] = defaultdict(set)
        """Clusters on which Serve took a version, by version id."""
        self.capacities: list[tuple[str, int]] = []
        """(version id, percent) of every deploy that Serve took, in order."""
        self.balancer: WatchedBalancer | None = None
        """By which probes go."""
        self.on_power_off: Callable[[FakeAgent], None] = lambda agent: None
        self.started: list[str] = []
        """Run ids that began, in order; one twice is a bug."""
        self.activity_facts = True
        self.errors: list[BaseException] = []
        self._taken: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def boot(self, spec: MachineSpec, machine: Machine) -> Callable[[], None]:
        self.loop.call_soon_threadsafe(self._boot, spec, machine)
        return lambda: self._off(spec.node_id)

    def _boot(self, spec: MachineSpec, machine: Machine) -> None:
        if not self._closed:
            agent = FakeAgent(self, spec, machine.ip or "", self.node_plan(spec))
            agent.task.add_done_callback(self._ended)
            self.agents[spec.node_id] = agent

    def _off(self, node_id: str) -> None:
        with suppress(RuntimeError):  # the test is over
            self.loop.call_soon_threadsafe(lambda: (a := self.agents.get(node_id)) and a.power_off())

    def spawn(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[assignment]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)

    def next_run(self, args: dict[str, Any]) -> RunPlan:
        return self.run_plans.pop(0) if self.run_plans else self.run_plan

    def serve_plan(self, version_id: str) -> ServePlan:
        return self.serve_plans.setdefault(version_id, ServePlan())

    async def service_of(self, cluster_id: str) -> str:
        async with self.db.read() as conn:
            return str(await conn.scalar(select(clusters.c.service_id).where(clusters.c.id == cluster_id)))

    async def head_of(self, cluster_id: str) -> FakeAgent:
        while cluster_id not in self.heads:
            await asyncio.sleep(LOOK_S)
        return self.heads[cluster_id]

    async def signal(self, workflow_id: str, name: str, message: Any) -> None:
        try:
            await self.client.get_workflow_handle(workflow_id).signal(name, message)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise

    async def finish(self, command_id: str, node_id: str, result: dict[str, Any]) -> None:
        """As api.agents.commands.finish does."""
        token = await finish_command(self.db, command_id, node_id, result)
        if not result["ok"] and result["retryable"]:
            self._taken.discard((node_id, command_id))
        if token is None:
            return
        handle = self.client.get_async_activity_handle(task_token=token)
        try:
            if result["ok"]:
                await handle.complete(result["result"])
            else:
                await handle.fail(
                    ApplicationError(result["error"], type="command_failed", non_retryable=not result["retryable"])
                )
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise

    async def serve(self) -> None:
        """Hands commands to heads until cancelled."""
        while True:
            hearing = [h.node_id for h in self.heads.values() if h.up and not h.deaf]
            for command in await open_commands(self.db, hearing) if hearing else []:
                agent = self.agents.get(command.node_id)
                if agent is not None and not agent.deaf and (agent.node_id, command.id) not in self._taken:
                    self._taken.add((agent.node_id, command.id))
                    self.spawn(agent.carry_out(command))
            await asyncio.sleep(LOOK_S)

    def said_all(self) -> bool:
        return not self._tasks and all(a.task.done() for a in self.agents.values())

    async def close(self) -> None:
        self._closed = True
        tasks = [*self._tasks, *(a.task for a in self.agents.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
