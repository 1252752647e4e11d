"""The contract of ``clouds.contract.machines.Machines``, on every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clouds.contract.errors import BadConfig
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, MachineState
from heliostat.models.clouds import Market
from tests.clouds.support import MODES, OURS, Cloud, eventually, fake_cloud, local_cloud


@pytest.fixture(params=["fake", *MODES, "aws"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cloud]:
    if request.param == "fake":
        yield fake_cloud(tmp_path)
        return
    if request.param == "aws":
        from tests.clouds.aws.support import aws_cloud  # patches moto

        with aws_cloud(tmp_path, request.getfixturevalue("aws_account")) as found:
            yield found
        return
    with local_cloud(tmp_path, request.param) as found:
        yield found


def test_a_launched_machine_boots_and_says_who_it_is(cloud: Cloud) -> None:
    spec = cloud.spec(tags={"team": "blue"})
    machine = cloud.machines.launch(spec)
    assert machine.state in (MachineState.PENDING, MachineState.RUNNING)
    running = cloud.wait_for(machine.machine_id, MachineState.RUNNING)
    assert (running.machine_id, running.node_id, running.cluster_id) == (machine.machine_id, "nod_1", "clu_1")
    assert running.ip
    assert running.tags == {"team": "blue", OWNER_TAG: OURS, CLUSTER_TAG: "clu_1", NODE_TAG: "nod_1"}
    eventually(lambda: "hello from boot" in cloud.machines.console_output(machine.machine_id))
    assert cloud.machines.console_output("nobody") == ""


def test_one_token_is_one_machine(cloud: Cloud) -> None:
    spec = cloud.spec()
    first = cloud.launch_and_boot(spec)
    again = cloud.machines.launch(spec.model_copy(deep=True))
    assert again.machine_id == first.machine_id
    assert again.launched_at == first.launched_at
    assert cloud.boot_count() == 1
    assert cloud.machines.launch(cloud.spec()).machine_id != first.machine_id


@pytest.mark.parametrize(
    "change", [{"user_data": "#!/bin/sh\n"}, {"generation": 2}, {"cpu": 1.0}, {"tags": {"a": "b"}}]
)
def test_another_request_under_the_same_token_is_refused(cloud: Cloud, change: dict[str, object]) -> None:
    spec = cloud.spec()
    cloud.launch_and_boot(spec)
    with pytest.raises(BadConfig, match="same token") as caught:
        cloud.machines.launch(spec.model_copy(update=change))
    assert caught.value.remedy
    assert cloud.boot_count() == 1


def test_twenty_launches_at_once_with_one_token(cloud: Cloud) -> None:
    spec = cloud.spec()
    with ThreadPoolExecutor(20) as pool:
        machines = list(pool.map(lambda _: cloud.machines.launch(spec), range(20)))
    assert len({m.machine_id for m in machines}) == 1
    assert MachineState.GONE not in {m.state for m in machines}
    cloud.wait_for(machines[0].machine_id, MachineState.RUNNING)
    eventually(lambda: cloud.boot_count() == 1)
    assert len(cloud.machines.list_owned(OURS)) == 1
    cloud.machines.terminate([machines[0].machine_id])
    cloud.wait_for(machines[0].machine_id, MachineState.GONE)
    assert cloud.boot_count() == 1


def test_find_by_token(cloud: Cloud) -> None:
    spec = cloud.spec()
    assert cloud.machines.find(spec.token) is None
    machine = cloud.machines.launch(spec)
    found = cloud.machines.find(spec.token)
    assert found is not None
    assert found.machine_id == machine.machine_id


def test_describe_leaves_out_what_it_does_not_know(cloud: Cloud) -> None:
    a, b = (cloud.machines.launch(cloud.spec()).machine_id for _ in range(2))
    unknown = ["local-" + "0" * 32, "fake-" + "0" * 32, "../../etc", ""]
    assert {m.machine_id for m in cloud.machines.describe([a, *unknown, b])} == {a, b}
    assert cloud.machines.describe([]) == []


def test_list_owned_is_ours_and_living(cloud: Cloud) -> None:
    mine = cloud.machines.launch(cloud.spec()).machine_id
    dead = cloud.machines.launch(cloud.spec()).machine_id
    other = cloud.machines.launch(cloud.spec(installation_id="another")).machine_id
    cloud.machines.terminate([dead])
    cloud.wait_for(dead, MachineState.GONE)
    assert [m.machine_id for m in cloud.machines.list_owned(OURS)] == [mine]
    assert [m.machine_id for m in cloud.machines.list_owned("another")] == [other]
    assert cloud.machines.list_owned("nobody") == []


def test_terminate_is_confirmed_by_describe_and_repeatable(cloud: Cloud) -> None:
    spec = cloud.spec()
    machine = cloud.launch_and_boot(spec)
    cloud.machines.terminate([machine.machine_id, "local-" + "0" * 32, "no such machine"])
    gone = cloud.wait_for(machine.machine_id, MachineState.GONE)
    assert gone.reason == "terminated"
    cloud.machines.terminate([machine.machine_id])
    assert cloud.one(machine.machine_id) == gone
    assert cloud.machines.list_owned(OURS) == []


def test_what_has_ended_never_boots_again(cloud: Cloud) -> None:
    spec = cloud.spec()
    machine = cloud.launch_and_boot(spec)
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)
    again = cloud.machines.launch(spec)
    assert (again.machine_id, again.state) == (machine.machine_id, MachineState.GONE)
    found = cloud.machines.find(spec.token)
    assert found is not None
    assert found.state is MachineState.GONE
    assert cloud.boot_count() == 1


def test_what_a_machine_has_is_no_leftover(cloud: Cloud) -> None:
    machine = cloud.launch_and_boot(cloud.spec())
    assert cloud.machines.delete_orphans(OURS, 0) == []
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)
    assert cloud.machines.delete_orphans(OURS, 0) == [], "it took all that it had along"


def test_prune_forgets_the_ended_only(cloud: Cloud) -> None:
    lives, ends = (cloud.launch_and_boot(cloud.spec()).machine_id for _ in range(2))
    cloud.machines.terminate([ends])
    cloud.wait_for(ends, MachineState.GONE)
    assert cloud.machines.forget_ended(older_than_s=3600) == []
    assert cloud.machines.forget_ended(older_than_s=0) == ([ends] if cloud.keeps_the_ended else [])
    if not cloud.keeps_the_ended:
        return
    assert [m.machine_id for m in cloud.machines.describe([lives, ends])] == [lives]


def test_what_the_cloud_does_not_have_is_refused_for_good(cloud: Cloud) -> None:
    can = cloud.machines.capabilities()
    absent: list[dict[str, object]] = [{"zone": "nowhere"}]
    absent += [{"market": market} for market in Market if market not in can.markets]
    if can.instance_types is not None:
        absent.append({"instance_type": "m7i.48xlarge"})
    if can.max_cpu_per_node is not None and can.max_memory_per_node is not None:
        absent += [{"cpu": can.max_cpu_per_node + 1}, {"memory": can.max_memory_per_node + 1}]
        absent.append({"gpu": can.max_gpu_per_node + 1})
    for fields in absent:
        spec = cloud.spec(**fields)
        with pytest.raises(BadConfig):
            cloud.machines.launch(spec)
        assert cloud.machines.find(spec.token) is None, "a refused request leaves nothing"
    assert cloud.boot_count() == 0
