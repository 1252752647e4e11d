"""A world in one process: a real Temporal server, real records, the real workflows and activities, a cloud in
memory, and agents that say and do what real ones do, without HTTP and without Ray.

Time: a workflow's clock moves only by :meth:`World.skip`; what agents and activities do takes real milliseconds.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, Interceptor, WorkflowHandle, WorkflowHistory
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment
from temporalio.testing._timeskipping import TimeSkipper

from clouds.base import Machine, Machines, MachineSpec, MachineState
from clouds.bootstrap import Bundles
from clouds.fake import FakeBucket, FakeMachines
from heliostat.models.agents import CommandKind, FactKind
from heliostat.models.clusters import Cluster, ClusterState, Node, NodeRole, NodeState
from heliostat.models.common import Event, new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import Job, JobConfig, JobState
from installation import Installation
from runtime.keys import Keys
from runtime.messages import (
    SEARCH_ATTRIBUTES,
    ClusterInput,
    JobInput,
    Limits,
    NodeFact,
    NodeRegistered,
    TerminateRequest,
    start_cluster,
    start_job,
)
from runtime.settings import Settings
from store import projection
from store.commands import OpenCommand, finish_command, open_commands
from store.database import Database, migrate
from store.tables import clouds, events, organizations, projects
from worker import make_worker

TEMPORAL = Path(sys.executable).parent / "temporal"
KEYS = Keys(b"k" * 32)
WAIT_S = 30.0
LOOK_S = 0.03
T = TypeVar("T")

FLAGS = {
    "history.transferProcessorMaxPollRPS": "1000",
    "history.timerProcessorMaxTimeShift": '"1ms"',
    "frontend.WorkflowTimeSkippingEnabled": "true",
    "system.forceSearchAttributesCacheRefreshOnRead": "true",
}


@asynccontextmanager
async def temporal_server(**more: str) -> AsyncIterator[Client]:
    """A server of our own; ``more``: dynamic configuration, with ``__`` for the dots in the names."""
    flags = FLAGS | {name.replace("__", "."): value for name, value in more.items()}
    env = await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        search_attributes=SEARCH_ATTRIBUTES,
        dev_server_existing_path=str(TEMPORAL),
        dev_server_log_level="error",
        dev_server_startup_timeout=timedelta(seconds=60),
        dev_server_extra_args=[x for k, v in flags.items() for x in ("--dynamic-config-value", f"{k}={v}")],
    )
    try:
        yield env.client
    finally:
        await env.shutdown()


@dataclass
class NodePlan:
    """What becomes of a machine."""

    register: bool = True
    ready: bool = True
    failed: str = ""
    """Its agent tells that Ray can't start, for this reason."""


@dataclass
class RunPlan:
    """What becomes of a run that is given to a head."""

    exit_code: int = 0
    error: str = ""
    """As in ``RUN_ENDED``; else ``entrypoint`` when the exit code is not 0."""
    hold: bool = False
    """Goes on until it is stopped or :meth:`FakeAgent.end_run` ends it."""
    timed_out: bool = False
    refuse: str = ""
    """The head does not take it, for this reason."""
    retryable: bool = False
    silent: bool = False
    """The head never answers to the command; the run does not begin."""
    answer: bool = True
    """False: the run begins and ends before the command is answered, and the answer never comes."""


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

    def fact(self, kind: FactKind, **data: Any) -> NodeFact:
        self._facts += 1
        return NodeFact(
            event_id=f"{self.node_id}/f{self._facts}",
            cluster_id=self.cluster_id,
            node_id=self.node_id,
            kind=kind,
            at=utcnow(),
            data=data,
        )

    async def tell(self, kind: FactKind, **data: Any) -> None:
        """As api.agent_messages does: run facts go to the job, the others to the cluster, in order."""
        fact = self.fact(kind, **data)
        async with self._facts_lock:
            if kind in (FactKind.RUN_RUNNING, FactKind.RUN_ENDED):
                await self.fleet.signal(str(data["run_id"]).rpartition("-")[0], "run_fact", fact)
            else:
                await self.fleet.signal(self.cluster_id, "fact", fact)

    async def tell_activity(self, activity: str | None = None) -> None:
        activity = activity or ("busy" if self.runs else "idle")
        await self.tell(FactKind.ACTIVITY, activity=activity, since=utcnow().isoformat(), reason="fake")

    def power_off(self) -> None:
        self.task.cancel()
        self.up = False
        self.fleet.agents.pop(self.node_id, None)
        head = self.fleet.heads.get(self.cluster_id)
        if head is self:
            del self.fleet.heads[self.cluster_id]

    # -- commands

    async def carry_out(self, command: OpenCommand) -> None:
        self.commands.append(command)
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
    """All agents. ``node_plan`` and ``run_plans`` are the knobs."""

    def __init__(self, client: Client, db: Database) -> None:
        self.client, self.db = client, db
        self.loop = asyncio.get_running_loop()
        self.agents: dict[str, FakeAgent] = {}
        self.heads: dict[str, FakeAgent] = {}
        self.node_plan: Callable[[MachineSpec], NodePlan] = lambda spec: NodePlan()
        self.run_plans: list[RunPlan] = []
        """Of the next runs, in order; after the last one: success."""
        self.run_plan = RunPlan()
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
        """As api.agent_commands.finish does."""
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
                if agent is not None and (agent.node_id, command.id) not in self._taken:
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


@dataclass
class World:
    client: Client
    db: Database
    settings: Settings
    machines: FakeMachines
    fleet: FakeFleet
    threads: ThreadPoolExecutor
    worker_client: Client
    """The worker's: may carry interceptors."""
    bucket: FakeBucket = field(default_factory=FakeBucket)
    sandboxed: bool = True
    limits: Limits = field(default_factory=Limits)
    ids: list[str] = field(default_factory=list)
    clouds: dict[str, Machines] = field(init=False)
    _worker: Any = None

    def __post_init__(self) -> None:
        self.clouds = {"cloud_1": self.machines}

    # -- the worker

    async def start_worker(self, **settings: Any) -> None:
        mine = Installation(
            settings=self.settings.model_copy(update=settings),
            keys=KEYS,
            db=self.db,
            machines=self.clouds,
            buckets={"cloud_1": self.bucket},
            bundles=Bundles(self.settings.home / "bundles"),
        )
        self._worker = make_worker(self.worker_client, mine, self.threads, sandboxed=self.sandboxed)
        self._running = asyncio.create_task(self._worker.run())

    async def stop_worker(self) -> None:
        if self._worker is not None:
            worker, self._worker = self._worker, None
            await worker.shutdown()
            await self._running

    async def restart_worker(self, **settings: Any) -> None:
        await self.stop_worker()
        await self.start_worker(**settings)

    # -- asking for things, as the API does

    def cluster_input(self, config: ComputeConfig | None = None, **more: Any) -> ClusterInput:
        cluster_id = new_id("cl")
        values: dict[str, Any] = {
            "cluster_id": cluster_id,
            "name": f"c-{cluster_id[-10:]}",
            "project_id": "prj_1",
            "project": "default",
            "cloud_id": "cloud_1",
            "cloud": "fake",
            "config": config or ComputeConfig(),
            "created_by": "ann",
            "created_at": utcnow(),
            "limits": self.limits,
        }
        return ClusterInput(**(values | more))

    async def accept_cluster(self, arg: ClusterInput) -> None:
        cluster = Cluster(
            id=arg.cluster_id,
            name=arg.name,
            project=arg.project,
            cloud=arg.cloud,
            state=ClusterState.STARTING,
            compute_config=arg.config,
            created_by=arg.created_by,
            created_at=arg.created_at,
            state_since=arg.created_at,
        )
        async with self.db.begin() as conn:
            assert await projection.insert_cluster(conn, cluster, arg)

    async def start_cluster(self, config: ComputeConfig | None = None, **more: Any) -> str:
        arg = self.cluster_input(config, **more)
        await self.accept_cluster(arg)
        self.ids.append(arg.cluster_id)
        await start_cluster(self.client, self.settings.task_queue, arg)
        await projection.mark_started(self.db, "cluster", arg.cluster_id)
        return arg.cluster_id

    async def running_cluster(self, config: ComputeConfig | None = None, **more: Any) -> str:
        cluster_id = await self.start_cluster(config, **more)
        await self.until_cluster(cluster_id, ClusterState.RUNNING)
        return cluster_id

    def job_input(self, cluster_id: str | None = None, compute: ComputeConfig | None = None, **config: Any) -> JobInput:
        return JobInput(
            job_id=new_id("job"),
            name="j",
            project_id="prj_1",
            project="default",
            cloud_id="cloud_1",
            cloud="fake",
            config=JobConfig(**({"entrypoint": "python main.py"} | config)),
            compute_config=compute or ComputeConfig(),
            cluster_id=cluster_id,
            created_by="ann",
            created_at=utcnow(),
            limits=self.limits,
        )

    async def accept_job(self, arg: JobInput) -> None:
        job = Job(
            id=arg.job_id,
            name=arg.name,
            project=arg.project,
            state=JobState.STARTING,
            config=arg.config,
            created_by=arg.created_by,
            created_at=arg.created_at,
            state_since=arg.created_at,
        )
        async with self.db.begin() as conn:
            assert await projection.insert_job(conn, job, arg)

    async def start_job(
        self, cluster_id: str | None = None, compute: ComputeConfig | None = None, **config: Any
    ) -> str:
        arg = self.job_input(cluster_id, compute, **config)
        await self.accept_job(arg)
        self.ids.append(arg.job_id)
        await start_job(self.client, self.settings.task_queue, arg)
        await projection.mark_started(self.db, "job", arg.job_id)
        return arg.job_id

    def handle(self, id: str) -> WorkflowHandle[Any, Any]:
        return self.client.get_workflow_handle(id)

    async def terminate(self, id: str, reason: str = "enough") -> None:
        await self.update(id, "terminate", TerminateRequest(actor="user:ann", reason=reason))

    async def update(self, id: str, name: str, message: Any, result: type[T] | None = None) -> T:
        """Said again where the workflow's task failed beneath it (a slow machine's deadlock alarm), as the API does."""
        while True:
            try:
                answer: T = await self.handle(id).execute_update(name, message, result_type=result)
                return answer
            except RPCError as error:
                if error.status != RPCStatusCode.FAILED_PRECONDITION:
                    raise
            await asyncio.sleep(LOOK_S)

    # -- looking

    async def cluster(self, id: str) -> Cluster:
        row = await projection.load_cluster(self.db, id)
        assert row is not None
        return row.cluster

    async def job(self, id: str) -> Job:
        row = await projection.load_job(self.db, id)
        assert row is not None
        return row.job

    async def nodes(self, cluster_id: str) -> list[Node]:
        return await projection.load_nodes(self.db, cluster_id)

    async def node(self, cluster_id: str, group: str = "head", state: NodeState = NodeState.RUNNING) -> Node:
        """The newest of this group in this state."""
        found = [n for n in await self.nodes(cluster_id) if n.group == group and n.state == state]
        assert found, f"no {group} node of {cluster_id} is {state}: {await self.nodes(cluster_id)}"
        return found[-1]

    async def story(self, id: str) -> list[Event]:
        async with self.db.read() as conn:
            rows = await conn.execute(events.select().where(events.c.resource_id == id).order_by(events.c.id))
            return [Event.model_validate(dict(r._mapping)) for r in rows]

    async def kinds(self, id: str) -> list[str]:
        return [event.kind for event in await self.story(id)]

    def alive(self) -> list[str]:
        """Machines that cost money."""
        return [m.machine_id for m in self.machines.list_owned(KEYS.installation_id())]

    async def until(self, look: Callable[[], Awaitable[T]], what: str, timeout_s: float = WAIT_S) -> T:
        """The first true value of ``look``."""
        deadline = time.monotonic() + timeout_s
        while not (found := await look()):
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
            await asyncio.sleep(LOOK_S)
        return found

    async def until_cluster(self, id: str, state: ClusterState, timeout_s: float = WAIT_S) -> Cluster:
        last: list[Cluster] = []

        async def look() -> Cluster | None:
            last[:] = [await self.cluster(id)]
            return last[0] if last[0].state == state else None

        try:
            return await self.until(look, f"{id} to be {state}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {last[0].state}: {last[0].reason}; {last[0].waits_for}") from None

    async def until_job(self, id: str, state: JobState, timeout_s: float = WAIT_S) -> Job:
        last: list[Job] = []

        async def look() -> Job | None:
            last[:] = [await self.job(id)]
            return last[0] if last[0].state == state else None

        try:
            return await self.until(look, f"{id} to be {state}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {last[0].state}: {last[0].reason}; {last[0].waits_for}") from None

    async def until_run(self, job_id: str, number: int = 1) -> str:
        """Run ``number`` of the job has begun on a head; gives its id."""
        run_id = f"{job_id}-{number}"

        async def look() -> bool:
            return run_id in self.fleet.started

        await self.until(look, f"{run_id} to begin")
        return run_id

    async def until_ended(self, id: str, timeout_s: float = WAIT_S) -> str:
        """The workflow has completed; its result."""
        result: str = await asyncio.wait_for(self.handle(id).result(), timeout_s)
        return result

    async def until_quiet(self, *ids: str) -> None:
        """The agents have said all, and no workflow task or activity of these is under way."""

        async def said() -> bool:
            return self.fleet.said_all()

        await self.until(said, "the agents to have said all")
        for id in ids:

            async def look(id: str = id) -> bool:
                d = await self.handle(id).describe()
                raw = d.raw_description
                return not raw.HasField("pending_workflow_task") and not raw.pending_activities

            await self.until(look, f"{id} to be quiet")

    async def until_gone(self) -> None:
        async def look() -> bool:
            return not self.alive()

        await self.until(look, f"all machines to be gone, {self.alive()} are left")

    def head(self, cluster_id: str) -> FakeAgent:
        return self.fleet.heads[cluster_id]

    async def kill_machine(self, node: Node) -> None:
        """By node, for an agent may be up before the launch's answer has told the machine's id."""
        (machine,) = [m for m in self.machines.list_owned(KEYS.installation_id()) if m.node_id == node.id]
        await asyncio.to_thread(self.machines.kill, machine.machine_id)

    async def skip(self, id: str, seconds: float) -> None:
        """Moves this workflow's clock by so much, firing its timers in between; waits for that. Its end is the end."""
        try:
            await asyncio.wait_for(TimeSkipper(self.client).fast_forward(self.handle(id), seconds), WAIT_S)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise

    async def history(self, id: str) -> WorkflowHistory:
        return await self.handle(id).fetch_history()

    async def events_of(self, id: str) -> list[str]:
        return [EventType.Name(e.event_type).removeprefix("EVENT_TYPE_") for e in (await self.history(id)).events]


_template: list[Path] = []


async def _records(folder: Path) -> Database:
    """Migrated records with a project and a cloud; migrated once for all worlds."""
    file = folder / "records.db"
    if not _template or not _template[0].exists():
        await migrate(f"sqlite+aiosqlite:///{file}")
        db = Database(f"sqlite+aiosqlite:///{file}")
        now = utcnow()
        async with db.begin() as conn:
            await conn.execute(organizations.insert().values(id="org_1", name="default", created_at=now))
            await conn.execute(
                projects.insert().values(id="prj_1", organization_id="org_1", name="default", created_at=now)
            )
            await conn.execute(
                clouds.insert().values(
                    id="cloud_1",
                    organization_id="org_1",
                    name="fake",
                    provider="fake",
                    is_default=True,
                    capabilities={},
                    created_at=now,
                )
            )
        await db.dispose()
        template = folder / "template.db"
        shutil.copy(file, template)
        _template[:] = [template]
    else:
        shutil.copy(_template[0], file)
    return Database(f"sqlite+aiosqlite:///{file}")


@asynccontextmanager
async def make_world(
    client: Client,
    folder: Path,
    *,
    interceptors: Sequence[Interceptor] = (),
    worker: bool = True,
    sandboxed: bool = True,
    **settings: Any,
) -> AsyncIterator[World]:
    """Ends what it started; fails when an agent saw an error or a machine was launched twice."""
    db = await _records(folder)
    fleet = FakeFleet(client, db)
    machines = FakeMachines(boot=fleet.boot)
    values: dict[str, Any] = {
        "home": folder,
        "task_queue": f"q-{new_id('q')}",
        "worker_shutdown_s": 0.2,
        "newborn_grace_s": 0.0,
        "worker_threads": 8,
    }
    worker_client = client
    if interceptors:
        config = client.config()
        config["interceptors"] = [*config["interceptors"], *interceptors]
        worker_client = Client(**config)
    with ThreadPoolExecutor(8) as threads:
        world = World(
            client,
            db,
            Settings(**(values | settings)),
            machines,
            fleet,
            threads,
            worker_client,
            sandboxed=sandboxed,
        )
        serving = asyncio.create_task(fleet.serve())
        if worker:
            await world.start_worker()
        try:
            yield world
            assert not fleet.errors, fleet.errors
            assert not [t for t, n in machines.boots.items() if n > 1], "launched twice"
            assert len(fleet.started) == len(set(fleet.started)), f"a run began twice: {fleet.started}"
            assert not serving.done() or serving.result() is None
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await fleet.close()
            for id in world.ids:
                with suppress(RPCError):
                    await client.get_workflow_handle(id).terminate("the test is over")
            await world.stop_worker()
            await db.dispose()


__all__ = ["FakeAgent", "MachineState", "NodePlan", "RunPlan", "World", "make_world", "temporal_server"]
