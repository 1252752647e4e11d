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
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment
from temporalio.testing._timeskipping import TimeSkipper

from clouds.boot.user_data import Bundles
from clouds.contract.balancer import LoadBalancer
from clouds.contract.machines import Machines, MachineState
from clouds.fake.machines import FakeBucket, FakeMachines
from clouds.registry import Verify
from heliostat.models.clusters import Cluster, ClusterState, Node, NodeState
from heliostat.models.common import Event, new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import Job, JobConfig, JobState
from installation import Installation
from runtime.keys import Keys
from runtime.messages.clusters import ClusterInput, start_cluster
from runtime.messages.common import SEARCH_ATTRIBUTES, Limits, TerminateRequest
from runtime.messages.jobs import JobInput, start_job
from runtime.settings import Settings
from store import clusters as cluster_records
from store import jobs as job_records
from store.acceptance import mark_started
from store.database import Database, migrate
from store.tables import clouds, events, organizations, projects
from tests.workflows.fleet import LOOK_S, FakeAgent, FakeFleet
from tests.workflows.plans import NodePlan, RunPlan, ServePlan
from worker import make_worker

TEMPORAL = Path(sys.executable).parent / "temporal"
KEYS = Keys(b"k" * 32)
WAIT_S = 60.0
T = TypeVar("T")

ENDS = {f"WORKFLOW_EXECUTION_{how}" for how in ("COMPLETED", "FAILED", "TERMINATED", "CANCELED", "TIMED_OUT")}

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
    sandboxed: bool = False
    limits: Limits = field(default_factory=Limits)
    ids: list[str] = field(default_factory=list)
    clouds: dict[str, Machines] = field(init=False)
    balancers: dict[str, LoadBalancer] = field(default_factory=dict)
    verifies: dict[str, Verify] = field(default_factory=dict)
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
            balancers=self.balancers,
            verifies=self.verifies,
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
            assert await cluster_records.insert_cluster(conn, cluster, arg)

    async def start_cluster(self, config: ComputeConfig | None = None, **more: Any) -> str:
        arg = self.cluster_input(config, **more)
        await self.accept_cluster(arg)
        self.ids.append(arg.cluster_id)
        await start_cluster(self.client, self.settings.task_queue, arg)
        await self._mark_started(arg.cluster_id)
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
            assert await job_records.insert_job(conn, job, arg)

    async def start_job(
        self, cluster_id: str | None = None, compute: ComputeConfig | None = None, **config: Any
    ) -> str:
        arg = self.job_input(cluster_id, compute, **config)
        await self.accept_job(arg)
        self.ids.append(arg.job_id)
        await start_job(self.client, self.settings.task_queue, arg)
        await self._mark_started(arg.job_id)
        return arg.job_id

    async def _mark_started(self, id: str) -> None:
        async with self.db.begin() as conn:
            await mark_started(conn, [id])

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
        row = await cluster_records.load_cluster(self.db, id)
        assert row is not None
        return row.cluster

    async def job(self, id: str) -> Job:
        row = await job_records.load_job(self.db, id)
        assert row is not None
        return row.job

    async def nodes(self, cluster_id: str) -> list[Node]:
        return await cluster_records.load_nodes(self.db, cluster_id)

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
        """The agents have said all, no workflow task or activity of these is under way, and no word of one to another;
        but for the watch over a canary, which lasts as long as a pause. All at one moment, so looked at twice: while
        one is looked at, another that was quiet before may be woken."""

        async def rest() -> list[tuple[str, int] | None]:
            return [await self._at_rest(id) for id in ids] if self.fleet.said_all() else [None]

        async def look() -> bool:
            seen = await rest()
            if None in seen or any([await self._signals_under_way(id) for id in ids]):
                return False
            return await rest() == seen

        await self.until(look, f"{', '.join(ids) or 'the agents'} to be quiet")

    async def _at_rest(self, id: str) -> tuple[str, int] | None:
        """Its run and the length of its history; None: something is under way."""
        raw = (await self.handle(id).describe()).raw_description
        busy = [a for a in raw.pending_activities if a.activity_type.name != "watch_canary"]
        if raw.HasField("pending_workflow_task") or busy:
            return None
        info = raw.workflow_execution_info
        return info.execution.run_id, info.history_length

    async def _signals_under_way(self, id: str) -> bool:
        """It has said something to another workflow, and has not heard yet that this has it; never will, once over."""
        events = await self.events_of(id)
        if events[-1] in ENDS:
            return False
        over = ("EXTERNAL_WORKFLOW_EXECUTION_SIGNALED", "SIGNAL_EXTERNAL_WORKFLOW_EXECUTION_FAILED")
        return events.count("SIGNAL_EXTERNAL_WORKFLOW_EXECUTION_INITIATED") > sum(map(events.count, over))

    async def until_machine_known(self, cluster_id: str, node_id: str) -> None:
        """The launch's answer has reached the workflow: the node's agent may be up before. Another's node: at once."""

        async def look() -> bool:
            return all(n.machine_id is not None for n in await self.nodes(cluster_id) if n.id == node_id)

        await self.until(look, f"the machine of {node_id} to be known")

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

    async def task_failures(self, id: str) -> list[str]:
        """Why tasks of the workflow failed; but for the alarm that one took 2 s, which is a slow machine's."""
        failed = [e.workflow_task_failed_event_attributes.failure.message for e in (await self.history(id)).events]
        return [message for message in failed if message and "TMPRL1101" not in message]

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
    sandboxed: bool = False,
    kind: type[World] | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """Ends what it started; fails when an agent saw an error or a machine was launched twice. ``kind``: of the world,
    with more in it."""
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
        world = (kind or World)(
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


__all__ = [
    "FakeAgent",
    "FakeFleet",
    "MachineState",
    "NodePlan",
    "RunPlan",
    "ServePlan",
    "World",
    "make_world",
    "temporal_server",
]
