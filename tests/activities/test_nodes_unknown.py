"""Machines that a cloud does not know yet when it is asked to end them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from activities.nodes import EndNodes, NodeActivities
from clouds.contract.machines import MachineState
from clouds.fake.machines import FakeMachines
from tests.activities.test_nodes import KEYS, run, spec


def test_a_machine_that_the_cloud_did_not_know_yet_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Compute Engine, which does not list one whose insert is under way, and EC2 for some seconds. The activity's
    next try would come after five minutes, which the machine costs."""

    class SlowToList(FakeMachines):
        asked = 0

        def terminate(self, machine_ids: Iterable[str]) -> None:
            self.asked += 1
            if self.asked > 1:
                super().terminate(machine_ids)

    cloud, slept = SlowToList(), [0.0]

    def sleep(seconds: float) -> None:
        slept.append(slept[-1] + seconds)
        assert slept[-1] < 60

    monkeypatch.setattr("activities.nodes.time.sleep", sleep)
    nodes = NodeActivities({"cloud_1": cloud}, KEYS, "inst_1")
    machine = cloud.launch(spec(nodes, cloud))
    run(nodes.end_machines, EndNodes(cloud_id="cloud_1", machine_ids=[machine.machine_id]))
    assert cloud.asked == 2
    assert cloud.describe([machine.machine_id])[0].state == MachineState.GONE
