"""Lives under seeded faults: a job on a cluster of its own, during which the worker dies, answers are lost, the cloud
is throttled or out of machines, machines die or never call, people end things in every way, and sweeps run. Whatever
happens, no machine is left, none is launched twice, and no sweep ends one that somebody owns."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowUpdateFailedError
from temporalio.service import RPCError, RPCStatusCode

from activities.sweep.result import SweepResult
from heliostat.models.agents import FactKind
from heliostat.models.clusters import NodeRole, NodeState
from heliostat.models.common import new_id
from heliostat.models.compute_configs import ComputeConfig, HeadNodeConfig, RetainedVolume, WorkerNodeGroupConfig
from tests.workflows.clusters.test_healing import silent
from tests.workflows.crashes import Crashes
from tests.workflows.world import RunPlan, World, make_world
from workflows import ids

CONFIG = ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(name="w", min_nodes=1, max_nodes=2)])
KEEPING = CONFIG.model_copy(
    update={"head_node": HeadNodeConfig(retained_volume=RetainedVolume(size=2**30), fixed_address=True)}
)
"""Of odd seeds: a disk and an address go from head to head."""
STRIKES = ("throttled", "no machines", "answer lost", "never calls", "machine dies", "job ended", "cluster ended",
           "cluster terminated by hand", "job terminated by hand", "sweep")  # fmt: skip
LOSABLE = ("launch", "terminate", "describe", "find", "list_owned")
STEPS = 30
"""About so many activities has a life; later faults of a schedule may never come."""
STALLED_S = 0.25
"""Nothing has happened for so long: what waits, waits for time to pass, or for somebody to notice."""
LIFE_S = 120.0


@dataclass(frozen=True)
class Schedule:
    """The same for the same seed."""

    seed: int
    crashes: dict[int, str]
    strikes: dict[int, list[tuple[str, int]]]
    """By step: what strikes, and a number that it uses."""
    cold: bool
    die: bool

    @classmethod
    def of(cls, seed: int) -> Schedule:
        dice = random.Random(seed)
        crashes = {dice.randrange(STEPS): dice.choice(["before", "after"]) for _ in range(dice.randint(0, 5))}
        strikes: dict[int, list[tuple[str, int]]] = {}
        for _ in range(dice.randint(1, 5)):
            strikes.setdefault(dice.randrange(STEPS), []).append((dice.choice(STRIKES), dice.randrange(1000)))
        return cls(seed, crashes, strikes, cold=dice.random() < 0.3, die=dice.random() < 0.5)


@dataclass
class Life:
    world: World
    schedule: Schedule
    crashes: Crashes
    job_id: str = ""
    by_hand: set[str] = field(default_factory=set)
    """Clusters that may have machines without an owner: somebody has ended their workflow, or their job's."""
    swept: list[str] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    # -- what strikes

    def on_step(self, step: int) -> None:
        for what, number in self.schedule.strikes.get(step, []):
            self.struck.append(f"{step}: {what}")
            self._strike(what, number)

    def _strike(self, what: str, number: int) -> None:
        world, machines, few = self.world, self.world.machines, number % 3 + 1
        cluster_id = ids.job_cluster_id(self.job_id, max(len(self._clusters_with_machines()), 1))
        match what:
            case "throttled":
                machines.throttle(few)
            case "no machines":
                machines.no_capacity(few)
            case "answer lost":
                machines.lose_answers(1, LOSABLE[number % len(LOSABLE)])
            case "never calls":
                machines.never_register(1)
            case "machine dies":
                living = self._living()
                if living:
                    self._later(asyncio.to_thread(machines.kill, living[number % len(living)]))
            case "job ended":
                self._later(world.terminate(self.job_id))
            case "cluster ended":
                self._later(world.terminate(cluster_id))
            case "cluster terminated by hand":
                self.by_hand.add(cluster_id)
                self._later(world.handle(cluster_id).terminate("by hand"))
            case "job terminated by hand":
                self._later(world.handle(self.job_id).terminate("by hand"))
            case "sweep":
                self._later(self.sweep())

    def _later(self, work: Awaitable[Any]) -> None:
        async def done() -> None:
            with suppress(RPCError, WorkflowUpdateFailedError):  # it has ended, or has not begun
                await work

        task = asyncio.ensure_future(done())
        self._tasks.add(task)

    async def sweep(self) -> None:
        try:
            result: SweepResult = await self.world.client.execute_workflow(
                "SweepWorkflow",
                id=f"{self.world.settings.task_queue}-{new_id('sw')}",
                task_queue=self.world.settings.task_queue,
                result_type=SweepResult,
            )
        except WorkflowFailureError:
            return  # the cloud was struck while it was asked; the next sweep comes
        self.swept += result.ended

    # -- the life

    def _living(self) -> list[str]:
        """Without a call, which a fault might hit."""
        return list(self.world.machines._lit)

    def _clusters_with_machines(self) -> set[str]:
        return {m.spec.cluster_id for m in self.world.machines._machines.values()}

    def owned_but_swept(self) -> list[str]:
        cluster_of = {i: m.spec.cluster_id for i, m in self.world.machines._machines.items()}
        return [i for i in self.swept if cluster_of[i] not in self.by_hand]

    async def running(self) -> list[str]:
        """The job and its clusters, as far as their workflows run."""
        found = []
        for n in range(20):
            id = self.job_id if n == 0 else ids.job_cluster_id(self.job_id, n)
            try:
                status = (await self.world.handle(id).describe()).status
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:
                    raise
                break
            if status == WorkflowExecutionStatus.RUNNING:
                found.append(id)
        return found

    async def live(self) -> None:
        self.job_id = await self.world.start_job(compute=KEEPING if self.schedule.seed % 2 else CONFIG)
        deadline = time.monotonic() + LIFE_S
        seen: tuple[Any, ...] = ()
        while running := await self.running():
            assert time.monotonic() < deadline, f"{running} did not end in {LIFE_S:.0f} s"
            now = (self.crashes.step, self.crashes.under_way, tuple(running), len(self.world.fleet.started))
            if now == seen:
                await self._help(running)
            seen = now
            await asyncio.sleep(STALLED_S)
        self.crashes.plan, self.crashes.on_step = {}, None
        await asyncio.gather(*self._tasks)
        await self.crashes.settled()
        await self.world.until(self._idle, "no activity under way")
        machines = self.world.machines
        machines.throttle(0)
        machines.restock()
        for method in LOSABLE:
            machines.lose_answers(0, method)
        await self.sweep()

    async def _idle(self) -> bool:
        return self.crashes.under_way == 0

    async def _help(self, running: list[str]) -> None:
        """What the monitor, the agents of heads and the sweep's schedule do in time, and the time itself."""
        held = set(self._living())
        for cluster_id in [i for i in running if i != self.job_id]:
            for node in await self.world.nodes(cluster_id):
                up = node.state in (NodeState.REGISTERED, NodeState.RUNNING)
                if not up or node.machine_id is None or node.machine_id in held:
                    continue
                if node.role == NodeRole.HEAD:
                    await silent(self.world, cluster_id, node.id, seconds=130 + len(self.struck) + random.random())
                elif cluster_id in self.world.fleet.heads:
                    await self.world.head(cluster_id).tell(FactKind.NODE_LOST, node_id=node.id, reason="died")
        if self.by_hand or "job terminated by hand" in str(self.struck):
            await self.sweep()
        for id in running:
            with suppress(RPCError, TimeoutError):
                await self.world.skip(id, 30)


async def live_through(temporal: Client, folder: Path, seed: int) -> Life:
    """One life. Raises AssertionError with the schedule and the way to play it again."""
    schedule = Schedule.of(seed)
    crashes = Crashes(dict(schedule.crashes))
    folder.mkdir()
    cached = 1 if schedule.cold else 100
    try:
        async with make_world(
            temporal, folder, interceptors=[crashes], worker_max_cached_workflows=cached, worker_shutdown_s=0.05
        ) as world:
            life = Life(world, schedule, crashes)
            if schedule.die:
                crashes.restart = world.restart_worker
            crashes.on_step = life.on_step
            world.fleet.run_plans = [RunPlan(exit_code=7)]
            await life.live()
            twice = {token: n for token, n in world.machines.boots.items() if n > 1}
            assert not twice, f"launched twice: {twice}"
            assert not world.alive(), f"left after the sweep: {world.alive()}"
            assert not world.machines.retained.held, (
                f"kept by heads of clusters that are over: {world.machines.retained.held}"
            )
            assert not life.owned_but_swept(), f"a sweep ended machines that somebody owned: {life.owned_but_swept()}"
            return life
    except BaseException as error:
        struck = life.struck if "life" in locals() else []
        error.add_note(f"{schedule}; struck {struck}; crashed {crashes.crashed}; steps {crashes.names}")
        error.add_note(
            f"Again: HELIOSTAT_FAULT_SEED={seed} pytest tests/workflows/clusters/test_crash_points.py -m '' -k leaks"
        )
        raise
