"""The fake cloud's knobs: each does what it says, and only that."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from clouds.contract.errors import BadConfig, Denied, NoCapacity, QuotaExceeded, Throttled
from clouds.contract.machines import Machine, MachineSpec, MachineState
from clouds.fake.machines import FakeMachines
from heliostat.errors import CloudError
from heliostat.models.clouds import Market
from tests.clouds.support import OURS, Cloud, fake_cloud


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return fake_cloud(tmp_path)


@pytest.fixture
def fake(cloud: Cloud) -> FakeMachines:
    assert isinstance(cloud.machines, FakeMachines)
    return cloud.machines


def test_no_capacity_by_place_and_count(cloud: Cloud, fake: FakeMachines) -> None:
    fake.no_capacity(2, zone="zone-a")
    for _ in range(2):
        with pytest.raises(NoCapacity, match="zone-a"):
            fake.launch(cloud.spec(zone="zone-a"))
        fake.launch(cloud.spec(zone="zone-b"))
    fake.launch(cloud.spec(zone="zone-a"))
    fake.no_capacity(instance_type="big", market=Market.SPOT)
    for _ in range(5):
        with pytest.raises(NoCapacity):
            fake.launch(cloud.spec(instance_type="big", market=Market.SPOT))
    fake.launch(cloud.spec(instance_type="big"))
    fake.restock()
    fake.launch(cloud.spec(instance_type="big", market=Market.SPOT))
    assert cloud.boot_count() == len(fake.list_owned(OURS)) == 5


def test_quota_counts_the_living(cloud: Cloud, fake: FakeMachines) -> None:
    fake.quota = 2
    first = fake.launch(cloud.spec())
    spec = cloud.spec()
    fake.launch(spec)
    with pytest.raises(QuotaExceeded):
        fake.launch(cloud.spec())
    fake.launch(spec)  # the same machine is no new one
    fake.terminate([first.machine_id])
    fake.launch(cloud.spec())


def test_throttled_calls_do_nothing(cloud: Cloud, fake: FakeMachines) -> None:
    fake.throttle(3)
    spec = cloud.spec()
    calls: list[Callable[[], object]] = [
        lambda: fake.launch(spec),
        lambda: fake.describe([]),
        lambda: fake.terminate([]),
    ]
    for call in calls:
        with pytest.raises(Throttled):
            call()
    assert fake.find(spec.token) is None
    assert fake.calls == {"launch": 1, "describe": 1, "terminate": 1, "find": 1}


def test_a_lost_answer_has_done_its_work(cloud: Cloud, fake: FakeMachines) -> None:
    fake.lose_answers(1)
    spec = cloud.spec()
    with pytest.raises(CloudError, match="lost"):
        fake.launch(spec)
    found = fake.find(spec.token)
    assert found is not None
    assert fake.launch(spec).machine_id == found.machine_id
    assert fake.boots == {spec.token: 1}
    fake.lose_answers(1, "terminate")
    with pytest.raises(CloudError, match="lost"):
        fake.terminate([found.machine_id])
    assert cloud.state(found.machine_id) is MachineState.GONE


def test_bad_config_and_denied(cloud: Cloud, fake: FakeMachines) -> None:
    fake.bad_config = "no such image"
    with pytest.raises(BadConfig, match="no such image"):
        fake.launch(cloud.spec())
    fake.bad_config, fake.denied = "", "no right"
    with pytest.raises(Denied, match="no right"):
        fake.list_owned(OURS)


def test_times_go_by_the_clock(cloud: Cloud, fake: FakeMachines) -> None:
    clock = Clock()
    slept: list[float] = []
    fake.clock, fake.sleep = clock, slept.append
    fake.boot_s, fake.stop_s, fake.latency_s = 30, 60, {"launch": 2.5, "*": 0.1}
    machine = fake.launch(cloud.spec())
    assert machine.state is MachineState.PENDING
    clock.pass_s(30)
    assert cloud.state(machine.machine_id) is MachineState.RUNNING
    fake.terminate([machine.machine_id])
    assert cloud.state(machine.machine_id) is MachineState.STOPPING
    assert [m.machine_id for m in fake.list_owned(OURS)] == [machine.machine_id]
    clock.pass_s(60)
    assert cloud.state(machine.machine_id) is MachineState.GONE
    assert slept == [2.5, 0.1, 0.1, 0.1, 0.1, 0.1]


def test_power_goes_once_however_a_machine_ends(cloud: Cloud, fake: FakeMachines) -> None:
    clock = Clock()
    dark: list[str] = []

    def boot(spec: MachineSpec, machine: Machine) -> Callable[[], None]:
        return lambda: dark.append(machine.machine_id)

    fake.clock, fake.boot = clock, boot
    ended, killed, died = (fake.launch(cloud.spec()).machine_id for _ in range(3))
    fake.terminate([ended])
    fake.terminate([ended])
    fake.kill(killed)
    assert dark == [ended, killed]
    assert cloud.one(killed).reason == "the cloud reclaimed the machine"
    fake.dies_after_s = 10
    clock.pass_s(10)
    assert cloud.one(died).reason == "the machine has died"
    assert dark == [ended, killed, died]
    assert {cloud.state(i) for i in (ended, killed, died)} == {MachineState.GONE}


def test_a_machine_on_which_nothing_boots(cloud: Cloud, fake: FakeMachines) -> None:
    fake.never_register(1)
    machine = fake.launch(cloud.spec())
    assert cloud.state(machine.machine_id) is MachineState.RUNNING
    assert cloud.boot_count() == 0
    assert fake.console_output(machine.machine_id) == ""
    fake.launch(cloud.spec())
    assert cloud.boot_count() == 1
