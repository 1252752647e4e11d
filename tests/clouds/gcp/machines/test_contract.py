"""The contract of ``clouds.contract.machines.Machines`` (``tests/clouds/contract/test_machines.py``), on
Compute Engine's fake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds.contract.machines import MachineState
from tests.clouds.contract.test_machines import *  # noqa: F403 # the suite, with the cloud below
from tests.clouds.gcp.support import gcp_cloud
from tests.clouds.support import Cloud

pytestmark = pytest.mark.long  # hundreds of calls to the fake of the whole cloud


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with gcp_cloud(tmp_path) as (found, _):
        yield found


def test_prune_forgets_the_ended_only(cloud: Cloud) -> None:
    """Compute Engine itself forgets what was deleted; the operations on it tell for some weeks."""
    lives, ends = (cloud.launch_and_boot(cloud.spec()).machine_id for _ in range(2))
    cloud.machines.terminate([ends])
    cloud.wait_for(ends, MachineState.GONE)
    assert cloud.machines.forget_ended(older_than_s=0) == []
    assert {m.machine_id: m.state for m in cloud.machines.describe([lives, ends])} == {
        lives: MachineState.RUNNING,
        ends: MachineState.GONE,
    }
