"""Machines: each failure of a cloud arrives as what workflows decide by; ending waits for the cloud's word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.nodes import BootFacts, EndNodes, LaunchNode, MachineRefs, NodeActivities
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, MachineSpec, MachineState
from clouds.fake.machines import FakeMachines
from heliostat.models.clusters import NodeRole
from runtime.keys import Keys

KEYS = Keys(b"k" * 32)


def launch(number: int = 1, **more: object) -> LaunchNode:
    values: dict[str, object] = {
        "cloud_id": "cloud_1",
        "cluster_id": "cl_1",
        "node_id": f"nd_{number}",
        "generation": 1,
        "role": NodeRole.HEAD,
        "token": f"t{number}",
        "boot": BootFacts(api_url="http://api", bundle_sha256="0" * 64),
        "tags": {"team": "blue"},
    }
    return LaunchNode(**(values | more))  # type: ignore[arg-type]


@pytest.fixture
def cloud() -> FakeMachines:
    return FakeMachines()


@pytest.fixture
def nodes(cloud: FakeMachines) -> NodeActivities:
    return NodeActivities({"cloud_1": cloud}, KEYS, "inst_1")


def run(work: Callable[..., object], *args: object) -> object:
    return ActivityEnvironment().run(work, *args)


def test_a_launch_is_the_same_machine_again(cloud: FakeMachines, nodes: NodeActivities) -> None:
    specs: list[MachineSpec] = []
    cloud.boot = lambda spec, machine: specs.append(spec)
    first = run(nodes.launch_node, launch())
    second = run(nodes.launch_node, launch())
    assert first == second
    (spec,) = specs
    assert spec.tags == {"team": "blue", OWNER_TAG: "inst_1", CLUSTER_TAG: "cl_1", NODE_TAG: "nd_1"}
    assert KEYS.bootstrap_token("nd_1", 1) in spec.user_data
    assert KEYS.bootstrap_token("nd_1", 1) not in launch().model_dump_json(), "no history holds it"
    assert KEYS.bootstrap_token("nd_1", 1) not in str(first)


def no_capacity(c: FakeMachines) -> None:
    c.no_capacity(1)


def quota(c: FakeMachines) -> None:
    c.quota = 0


def bad_config(c: FakeMachines) -> None:
    c.bad_config = "no such shape"


def denied(c: FakeMachines) -> None:
    c.denied = "no right"


def throttled(c: FakeMachines) -> None:
    c.throttle(1)


def lost_answer(c: FakeMachines) -> None:
    c.lose_answers(1)


@pytest.mark.parametrize(
    ("trouble", "code", "final"),
    [
        (no_capacity, "no_capacity", True),
        (quota, "quota_exceeded", True),
        (bad_config, "bad_config", True),
        (denied, "denied", True),
        (throttled, "throttled", False),
        (lost_answer, "cloud_error", False),
    ],
)
def test_each_failure_has_its_code(
    cloud: FakeMachines, nodes: NodeActivities, trouble: Callable[[FakeMachines], None], code: str, final: bool
) -> None:
    trouble(cloud)
    with pytest.raises(ApplicationError) as failure:
        run(nodes.launch_node, launch())
    assert (failure.value.type, failure.value.non_retryable) == (code, final)
    assert failure.value.next_retry_delay == (timedelta(seconds=5) if code == "throttled" else None)


def test_a_cloud_that_this_worker_does_not_serve(nodes: NodeActivities) -> None:
    with pytest.raises(ApplicationError, match="does not serve the cloud cloud_9") as failure:
        run(nodes.launch_node, launch(cloud_id="cloud_9"))
    assert not failure.value.non_retryable, "another worker, or this one after a restart, may"


def test_ending_returns_only_when_the_cloud_says_gone(cloud: FakeMachines, nodes: NodeActivities) -> None:
    machine = cloud.launch(spec(nodes, cloud))
    cloud.stop_s = 3600
    beats: list[object] = []

    def beat(*details: object) -> None:
        beats.append(details)
        cloud.stop_s = 0  # gone by now

    env = ActivityEnvironment()
    env.on_heartbeat = beat
    env.run(nodes.end_machines, EndNodes(cloud_id="cloud_1", machine_ids=[machine.machine_id]))
    assert cloud.describe([machine.machine_id])[0].state == MachineState.GONE
    assert beats


def spec(nodes: NodeActivities, cloud: FakeMachines) -> MachineSpec:
    """What the activity would ask for."""
    asked: list[MachineSpec] = []
    probe = FakeMachines(boot=lambda s, m: asked.append(s))
    run(NodeActivities({"cloud_1": probe}, KEYS, "inst_1").launch_node, launch())
    return asked[0]


def test_ending_finds_by_token_what_a_lost_answer_hid(cloud: FakeMachines, nodes: NodeActivities) -> None:
    cloud.lose_answers(1)
    with pytest.raises(ApplicationError):
        run(nodes.launch_node, launch())
    assert len(cloud.list_owned("inst_1")) == 1
    run(nodes.end_machines, EndNodes(cloud_id="cloud_1", machine_ids=[], tokens=["t1", "t-never-used"]))
    assert cloud.list_owned("inst_1") == []
    run(nodes.end_machines, EndNodes(cloud_id="cloud_1", machine_ids=["fake-unknown"], tokens=["t1"]))


@pytest.mark.parametrize("trouble", [denied, throttled])
def test_ending_is_never_given_up(
    cloud: FakeMachines, nodes: NodeActivities, trouble: Callable[[FakeMachines], None]
) -> None:
    trouble(cloud)
    with pytest.raises(ApplicationError) as failure:
        run(nodes.end_machines, EndNodes(cloud_id="cloud_1", machine_ids=["fake-1"]))
    assert not failure.value.non_retryable


async def test_ending_hands_over_when_the_worker_stops(cloud: FakeMachines, nodes: NodeActivities) -> None:
    machine = cloud.launch(spec(nodes, cloud))
    cloud.stop_s = 3600
    env = ActivityEnvironment()
    beaten = asyncio.Event()
    loop = asyncio.get_running_loop()
    env.on_heartbeat = lambda *details: loop.call_soon_threadsafe(beaten.set)
    with ThreadPoolExecutor(1) as threads:
        ending = loop.run_in_executor(
            threads, env.run, nodes.end_machines, EndNodes(cloud_id="cloud_1", machine_ids=[machine.machine_id])
        )
        await beaten.wait()
        env.worker_shutdown()
        with pytest.raises(ApplicationError, match="shutting down") as failure:
            await ending
    assert not failure.value.non_retryable


def test_the_tail_of_a_console(cloud: FakeMachines, nodes: NodeActivities) -> None:
    machine = cloud.launch(spec(nodes, cloud))
    cloud.console = "x" * 5000 + "the end"
    text = run(nodes.console_output, MachineRefs(cloud_id="cloud_1", machine_ids=[machine.machine_id]))
    assert isinstance(text, str)
    assert len(text) == 4096
    assert text.endswith("the end")
