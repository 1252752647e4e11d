"""What is asked of a cloud as a whole: whether it is as it must be, and what of ours is there."""

from __future__ import annotations

import pytest
from temporalio.client import WorkflowFailureError

from clouds.contract.errors import Denied
from clouds.fake.balancer import FakeBalancer
from heliostat.models.clouds import Check, CheckState
from tests.workflows.test_sweep import stray
from tests.workflows.world import World


async def ask(world: World, workflow: str, cloud_id: str, answer: type) -> list[object]:
    found: list[object] = await world.client.execute_workflow(
        workflow, cloud_id, id=f"{workflow}-{cloud_id}", task_queue=world.settings.task_queue, result_type=answer
    )
    return found


async def test_a_clouds_checks_are_looked_at_by_a_worker(world: World) -> None:
    check = Check(name="bucket", state=CheckState.WARNING, detail="it is public")
    world.verifies["cloud_1"] = lambda: [check]
    assert await ask(world, "VerifyCloudWorkflow", "cloud_1", list[Check]) == [check]

    def denied() -> list[Check]:
        raise Denied("The role can't be assumed.", remedy="Trust us.")

    world.verifies["cloud_1"] = denied
    (found,) = await ask(world, "VerifyCloudWorkflow", "cloud_1", list[Check])
    assert (found.state, found.detail, found.remedy) == (  # type: ignore[attr-defined]
        CheckState.FAILED,
        "The role can't be assumed.",
        "Trust us.",
    )
    with pytest.raises(WorkflowFailureError):
        await ask(world, "VerifyCloudWorkflow", "none", list[Check])


async def test_what_a_cloud_holds_is_its_own_and_nobodys_but_not_another_clouds(world: World) -> None:
    """Two clouds may be of one account: the same machines are listed by both."""
    world.clouds["cloud_2"] = world.machines
    world.balancers |= {"cloud_1": FakeBalancer(), "cloud_2": FakeBalancer()}
    cluster_id = await world.running_cluster()
    orphan = stray(world.machines)
    held = await ask(world, "HeldByCloudWorkflow", "cloud_1", list[str])
    assert sorted(held) == sorted(str(id) for id in world.alive())  # type: ignore[type-var]
    assert len(held) == 2
    assert await ask(world, "HeldByCloudWorkflow", "cloud_2", list[str]) == [orphan], f"{cluster_id} is not there"
