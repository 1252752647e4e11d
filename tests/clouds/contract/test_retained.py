"""What heads hand on (``MachineSpec.keep``, ``Machines.attach_retained``), on every cloud that has it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clouds.contract.errors import BadConfig, Gone, NotOffered
from clouds.contract.machines import Machine, MachineSpec, MachineState
from clouds.contract.retained import RetainedResources
from heliostat.errors import CloudError
from tests.clouds.support import OURS, Cloud, eventually, fake_cloud, local_cloud

BOTH = RetainedResources(volume_gib=20, mount_path="/mnt/head", address=True)
HAD = BOTH.model_copy(update={"had": True})


@pytest.fixture(params=["fake", pytest.param("aws", marks=pytest.mark.long)])
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cloud]:
    if request.param == "fake":
        yield fake_cloud(tmp_path)
        return
    from tests.clouds.aws.support import aws_cloud, private_subnets

    account = request.getfixturevalue("aws_account")
    with private_subnets(account), aws_cloud(tmp_path, account) as found:
        yield found


def zones(cloud: Cloud) -> list[str]:
    return cloud.machines.capabilities().zones


def head(cloud: Cloud, zone: int = 0, keep: RetainedResources = BOTH, **fields: Any) -> MachineSpec:
    return cloud.spec(zone=zones(cloud)[zone], keep=keep, **fields)


def handed_over(cloud: Cloud, machine: Machine, cluster_id: str = "clu_1") -> None:
    eventually(lambda: _done(cloud, cluster_id, machine.machine_id))


def released(cloud: Cloud, cluster_id: str = "clu_1") -> None:
    eventually(lambda: _done(cloud, cluster_id, None))


def _done(cloud: Cloud, cluster_id: str, machine_id: str | None) -> bool:
    try:
        cloud.machines.attach_retained(cluster_id, machine_id)
    except Gone:
        raise
    except CloudError:
        return False  # too early: it is to be repeated
    return True


def end(cloud: Cloud, machine: Machine) -> None:
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)


def left(cloud: Cloud) -> list[str]:
    """What a sweep deletes where no cluster lives any more."""
    return cloud.machines.delete_orphans(OURS, 0, lambda _cluster_id: False)


def launched(cloud: Cloud, spec: MachineSpec) -> Machine:
    """A head's launch is repeated until the one before has let go of what it had."""
    found: list[Machine] = []

    def go() -> bool:
        try:
            found.append(cloud.machines.launch(spec))
        except (BadConfig, NotOffered):
            raise
        except CloudError:
            return False
        return True

    eventually(go)
    return found[0]


def test_the_next_head_has_the_address_of_the_one_before(cloud: Cloud) -> None:
    first = cloud.machines.launch(head(cloud))
    assert cloud.machines.launch(head(cloud, cluster_id="clu_2")).ip != first.ip
    handed_over(cloud, first)
    handed_over(cloud, first)
    end(cloud, first)
    second = launched(cloud, head(cloud, keep=HAD, generation=2))
    assert second.machine_id != first.machine_id
    handed_over(cloud, second)
    assert cloud.one(second.machine_id).ip == first.ip


def test_a_head_that_had_it_goes_nowhere_else(cloud: Cloud) -> None:
    first = cloud.machines.launch(head(cloud, zone=1))
    handed_over(cloud, first)
    end(cloud, first)
    with pytest.raises(NotOffered, match=zones(cloud)[1]):
        cloud.machines.launch(head(cloud, zone=0, keep=HAD, generation=2))
    assert launched(cloud, head(cloud, zone=1, keep=HAD, generation=3)).ip == first.ip


def test_what_is_not_there_any_more_is_not_made_anew(cloud: Cloud) -> None:
    with pytest.raises(CloudError, match=r"not show|no longer") as caught:
        cloud.machines.launch(head(cloud, keep=HAD))
    assert not isinstance(caught.value, BadConfig | NotOffered)
    assert cloud.machines.list_owned(OURS) == []


def test_a_launch_that_is_repeated_makes_nothing_twice(cloud: Cloud) -> None:
    spec = head(cloud)
    with ThreadPoolExecutor(8) as pool:
        machines = list(pool.map(lambda _: cloud.machines.launch(spec), range(8)))
    assert len({m.machine_id for m in machines}) == 1
    handed_over(cloud, machines[0])
    end(cloud, machines[0])
    released(cloud)
    assert left(cloud) == []


def test_release_ends_all_of_one_cluster(cloud: Cloud) -> None:
    machine = cloud.machines.launch(head(cloud))
    other = cloud.machines.launch(head(cloud, cluster_id="clu_2"))
    handed_over(cloud, machine)
    handed_over(cloud, other, "clu_2")
    with pytest.raises(CloudError):
        cloud.machines.attach_retained("clu_1", None)
    end(cloud, machine)
    released(cloud)
    released(cloud)
    cloud.machines.attach_retained("clu_nobody", None)
    assert left(cloud) == [], "and the other cluster's is with its machine"
    end(cloud, other)
    eventually(lambda: left(cloud))


def test_too_early_and_too_late(cloud: Cloud) -> None:
    machine = cloud.machines.launch(head(cloud))
    handed_over(cloud, machine)
    end(cloud, machine)
    with pytest.raises(Gone):
        cloud.machines.attach_retained("clu_1", machine.machine_id)


def test_the_sweep_spares_what_a_living_cluster_keeps(cloud: Cloud) -> None:
    machine = cloud.machines.launch(head(cloud))
    handed_over(cloud, machine)
    asked: list[str] = []

    def lives(cluster_id: str) -> bool:
        asked.append(cluster_id)
        return True

    end(cloud, machine)
    eventually(lambda: cloud.machines.delete_orphans(OURS, 0, lives) == [] and asked)
    assert set(asked) == {"clu_1"}
    assert cloud.machines.delete_orphans(OURS, 3600, lambda _: False) == [], "the newborn"
    assert eventually(lambda: left(cloud))
    assert left(cloud) == []


def test_a_disk_alone_and_an_address_alone(cloud: Cloud) -> None:
    for cluster_id, keep in (
        ("clu_1", RetainedResources(volume_gib=1, mount_path="/data")),
        ("clu_2", RetainedResources(address=True)),
    ):
        machine = cloud.machines.launch(head(cloud, keep=keep, cluster_id=cluster_id))
        handed_over(cloud, machine, cluster_id)
        end(cloud, machine)
        assert len(eventually(lambda: left(cloud))) == 1


def test_nothing_to_hand_over_is_done(cloud: Cloud) -> None:
    machine = cloud.launch_and_boot(cloud.spec())
    cloud.machines.attach_retained("clu_1", machine.machine_id)
    cloud.machines.attach_retained("clu_1", None)


def test_the_local_cloud_has_neither(tmp_path: Path) -> None:
    with local_cloud(tmp_path, "process") as cloud:
        assert not cloud.machines.capabilities().keeps
        with pytest.raises(BadConfig, match="retained_volume"):
            cloud.machines.launch(cloud.spec(keep=BOTH))
        cloud.machines.attach_retained("clu_1", None)


def test_a_launch_under_way_is_none_of_the_old_heads(cloud: Cloud) -> None:
    """Two heads never live at once; should it be asked for, the second one is not given the first one's."""
    first = cloud.machines.launch(head(cloud))
    handed_over(cloud, first)
    gone = threading.Event()

    def second() -> Machine:
        machine = launched(cloud, head(cloud, keep=HAD, generation=2))
        handed_over(cloud, machine)
        assert gone.is_set()
        return machine

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        gone.set()
        cloud.machines.terminate([first.machine_id])
        assert waiting.result(20).ip == first.ip
