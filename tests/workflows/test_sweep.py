"""No leaked machine, ever: what nobody owns is ended; what somebody owns or may own, or is another's, is not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError

from activities.sweep.result import SweepResult
from clouds.contract.errors import Denied
from clouds.contract.machines import MachineSpec, MachineState
from clouds.fake.machines import FakeMachines
from heliostat.errors import CloudError
from heliostat.models.clusters import ClusterState, NodeRole, NodeState
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from heliostat.models.jobs import JobState
from store.tables import sweeps
from tests.workflows.world import KEYS, RunPlan, World, make_world
from workflows import ids

ONE_WORKER = ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(min_nodes=1)])


def spec(cluster_id: str = "cl_nobodys", installation: str | None = None, number: int = 1) -> MachineSpec:
    return MachineSpec(
        token=f"{cluster_id}/{number}",
        cluster_id=cluster_id,
        node_id=f"nd_{cluster_id}_{number}",
        generation=1,
        role=NodeRole.HEAD,
        installation_id=installation or KEYS.installation_id(),
        user_data="",
    )


def stray(machines: FakeMachines, **more: object) -> str:
    """A machine that was launched though nobody knows why."""
    boot, machines.boot = machines.boot, None
    try:
        return machines.launch(spec(**more)).machine_id  # type: ignore[arg-type]
    finally:
        machines.boot = boot


async def sweep(world: World) -> SweepResult:
    result: SweepResult = await world.client.execute_workflow(
        "SweepWorkflow",
        id=f"{world.settings.task_queue}-sweep",
        task_queue=world.settings.task_queue,
        result_type=SweepResult,
    )
    return result


async def test_orphans_are_ended_and_owned_machines_spared(world: World) -> None:
    cluster_id = await world.running_cluster(ONE_WORKER)
    owned = set(world.alive())
    orphan = stray(world.machines)
    of_a_known_cluster = stray(world.machines, cluster_id=cluster_id, number=77)
    result = await sweep(world)
    assert set(result.ended) == {orphan, of_a_known_cluster}
    assert result.machines == 4
    assert set(world.alive()) == owned
    assert "swept" in await world.kinds(cluster_id)
    async with world.db.read() as conn:
        (row,) = await conn.execute(sweeps.select())
    assert (row.cloud, row.found, set(row.ended)) == ("cloud_1", 4, {orphan, of_a_known_cluster})
    assert (await sweep(world)).ended == []


async def test_the_newborn_are_spared(temporal: Client, tmp_path: Path) -> None:
    async with make_world(temporal, tmp_path, newborn_grace_s=120) as world:
        orphan = stray(world.machines)
        assert (await sweep(world)).ended == []
        assert world.alive() == [orphan]


async def test_what_its_owner_has_ended_since_it_was_listed_is_no_orphan(world: World) -> None:
    orphan, ended = stray(world.machines), stray(world.machines, number=2)
    listed = world.machines.list_owned(KEYS.installation_id())
    world.machines.kill(ended)
    world.machines.list_owned = lambda installation_id: listed  # type: ignore[method-assign]
    assert (await sweep(world)).ended == [orphan]


async def test_another_installations_machines_are_not_touched(world: World) -> None:
    theirs = stray(world.machines, installation="somebody-else")
    assert (await sweep(world)).machines == 0
    assert [m.machine_id for m in world.machines.list_owned("somebody-else")] == [theirs]


async def test_machines_of_a_cluster_that_cannot_be_asked_are_spared(temporal: Client, tmp_path: Path) -> None:
    """Its workflow runs, but no worker answers for it: unknown counts as owned."""
    async with make_world(temporal, tmp_path) as world:
        cluster_id = await world.running_cluster()
        await world.until_quiet(cluster_id)
        from activities.sweep import machines as module

        real = module.MachineSweepActivities._owned_nodes

        async def unanswered(self: object, asked: str) -> set[str] | None:
            return None if asked == cluster_id else await real(self, asked)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.MachineSweepActivities, "_owned_nodes", unanswered)
            assert (await sweep(world)).ended == []
        assert len(world.alive()) == 1


async def test_a_cloud_out_of_reach_keeps_the_others_clean_and_shows_red(world: World) -> None:
    broken = FakeMachines()
    broken.denied = "the key was revoked"
    world.clouds["cloud_0"] = broken
    await world.restart_worker()
    orphan = stray(world.machines)
    with pytest.raises(WorkflowFailureError):
        await sweep(world)
    assert orphan not in world.alive()
    assert broken.calls["list_owned"] == 3


async def test_an_orphan_that_somebody_protects_keeps_nothing_else_from_being_swept(world: World) -> None:
    orphan, protected = stray(world.machines), stray(world.machines, number=2)
    end, cleared = world.machines.terminate, []

    def terminate(machine_ids: Iterable[str]) -> None:
        ids = set(machine_ids)
        end(ids - {protected})
        if protected in ids:
            raise CloudError(f"{protected} may not be terminated.")

    def delete_orphans(*_: object) -> list[str]:
        cleared.append(True)
        return []

    world.machines.terminate = terminate  # type: ignore[method-assign]
    world.machines.delete_orphans = delete_orphans  # type: ignore[method-assign]
    with pytest.raises(WorkflowFailureError) as failure:
        await sweep(world)
    assert "may not be terminated" in str(failure.value.cause.cause)  # type: ignore[union-attr]
    assert world.alive() == [protected]
    assert cleared
    async with world.db.read() as conn:
        rows = list(await conn.execute(sweeps.select()))
    assert [row.ended for row in rows if row.ended] == [[orphan]], "what is told is what was ended"


async def test_a_cluster_terminated_in_the_ui_is_swept_settled_and_its_holder_told(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster(ONE_WORKER)
    job_id = await world.start_job(cluster_id)
    await world.until_run(job_id)
    await world.until_quiet(cluster_id, job_id)
    await world.handle(cluster_id).terminate("by hand")
    result = await sweep(world)
    assert len(result.ended) == 2
    assert result.orphaned == [cluster_id]
    assert not world.alive()
    cluster = await world.cluster(cluster_id)
    assert cluster.state == ClusterState.FAILED
    assert "by hand" in cluster.reason
    assert {n.state for n in await world.nodes(cluster_id)} == {NodeState.TERMINATED}
    job = await world.until_job(job_id, JobState.FAILED)
    assert "by hand" in job.reason
    assert (await sweep(world)).orphaned == []


async def test_a_jobs_own_cluster_terminated_in_the_ui_is_followed_by_a_new_one(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job(max_retries=0)
    await world.until_run(job_id)
    first = ids.job_cluster_id(job_id, 1)
    await world.until_quiet(first, job_id)
    await world.handle(first).terminate("by hand")
    await sweep(world)
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert [r.cluster_id for r in job.runs] == [first, ids.job_cluster_id(job_id, 2)]
    await world.until_ended(job_id)
    await world.until_gone()


async def test_a_job_terminated_in_the_ui_is_settled_and_its_cluster_ended(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job()
    await world.until_run(job_id)
    await world.until_quiet(job_id)
    await world.handle(job_id).terminate("by hand")
    result = await sweep(world)
    assert result.orphaned == [job_id]
    job = await world.job(job_id)
    assert job.state == JobState.FAILED
    assert {r.state for r in job.runs} <= {"FAILED", "STOPPED"}, "no run of an ended job looks alive"
    await world.until_cluster(ids.job_cluster_id(job_id, 1), ClusterState.TERMINATED)
    assert not world.alive()


async def test_a_job_terminated_in_the_ui_gives_its_lease_back(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    job_id = await world.start_job(cluster_id)
    await world.until_run(job_id)
    await world.until_quiet(job_id, cluster_id)
    await world.handle(job_id).terminate("by hand")
    await sweep(world)
    await world.until_quiet(cluster_id)
    cluster = await world.cluster(cluster_id)
    assert (cluster.state, cluster.leases) == (ClusterState.RUNNING, [])


async def test_leftovers_are_deleted_with_the_newborns_spared_and_reported(temporal: Client, tmp_path: Path) -> None:
    async with make_world(temporal, tmp_path, newborn_grace_s=77) as world:
        asked = []

        def delete_orphans(installation_id: str, older_than_s: float, _lives: object) -> list[str]:
            asked.append((installation_id, older_than_s))
            return ["vol-1"]

        world.machines.delete_orphans = delete_orphans  # type: ignore[method-assign]
        assert (await sweep(world)).leftovers == ["vol-1"]
        assert asked == [(KEYS.installation_id(), 77)]


@pytest.mark.long
async def test_a_machine_of_google_that_stopped_itself_is_deleted_within_one_sweep(
    world: World, tmp_path: Path
) -> None:
    """Nothing there ends with its shutdown: until it is deleted its disk costs money."""
    from tests.clouds.gcp.support import gcp_cloud

    with gcp_cloud(tmp_path) as (cloud, fake):
        machines = cloud.machines
        machines._installation_id = KEYS.installation_id()  # type: ignore[attr-defined]
        world.clouds["cloud_gcp"] = machines
        await world.restart_worker()
        machine = machines.launch(cloud.spec(installation_id=KEYS.installation_id()))
        cloud.wait_for(machine.machine_id, MachineState.RUNNING)
        fake.stop_itself(machine.machine_id)
        await sweep(world)

        async def gone() -> bool:  # Google takes some seconds for a delete
            fake.advance()
            return not [key for key in fake.resources if key[1] == "instances"]

        await world.until(gone, "the stopped machine to be deleted")


async def test_a_cloud_that_refuses_keeps_no_other_one_dirty_and_is_reported(world: World) -> None:
    """Everything that the sweep asks of a cloud, refused by the one that comes first."""
    refused: list[str] = []

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            def refuse(*_: object, **__: object) -> None:
                refused.append(name)
                raise Denied(f"{name} is denied.")

            return refuse

    pruned: list[float] = []
    world.machines.forget_ended = lambda older_than_s: pruned.append(older_than_s) or []  # type: ignore[method-assign,func-returns-value]
    world.clouds["cloud_0"] = world.balancers["cloud_0"] = Refusing()  # type: ignore[assignment]
    await world.restart_worker()
    orphan = stray(world.machines)
    with pytest.raises(WorkflowFailureError) as failure:
        await sweep(world)
    assert "denied" in str(failure.value.cause.cause)  # type: ignore[union-attr]
    assert world.alive() == [], f"{orphan} is in the other cloud"
    assert len(pruned) == 1
    assert {"list_owned", "forget_ended"} <= set(refused)
