"""What the contract's suite does not ask of EC2 instances: their shape, their faults, and how many calls they cost."""

from __future__ import annotations

import base64
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clouds.aws.machines import catalogue
from clouds.aws.machines.ec2 import VISIBLE_S, AwsMachines
from clouds.contract.errors import BadConfig, Denied, NoCapacity, NotOffered, QuotaExceeded
from clouds.contract.machines import MachineSpec, MachineState
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsSubnet, Market
from tests.clouds.aws.moto_plus import KNOBS, Fault
from tests.clouds.aws.support import Account
from tests.clouds.support import OURS, Cloud, eventually

pytestmark = pytest.mark.long  # hundreds of calls to the fake of the whole cloud

NOTHING = '<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><reservationSet/></DescribeInstancesResponse>'


def spec(**fields: Any) -> MachineSpec:
    return Cloud.spec(Cloud(machines=None, boots=Path("/nowhere")), **fields)  # type: ignore[arg-type]


class Pages:
    """An EC2 client with these answers: moto takes 10 s for all types."""

    def __init__(self, pages: list[dict[str, Any]]) -> None:
        self._pages = pages

    def get_paginator(self, _operation: str) -> Pages:
        return self

    def paginate(self) -> list[dict[str, Any]]:
        return self._pages


def launch_arguments() -> dict[str, str]:
    return next(call for call in reversed(KNOBS.calls) if call.get("Action") == "RunInstances")


def test_the_shape_of_an_instance(aws_account: Account) -> None:
    machines = AwsMachines(aws_account.config, aws_account.shared, OURS, tags={"heliostat-organization": "org_1"})
    asked = spec(tags={"team": "blue"}, market=Market.SPOT, generation=3)
    machine = machines.launch(asked)
    ec2 = aws_account.client("ec2")
    (instance,) = ec2.describe_instances(InstanceIds=[machine.machine_id])["Reservations"][0]["Instances"]
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert instance["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert instance["InstanceLifecycle"] == "spot"
    assert instance["ClientToken"] == asked.token
    assert [g["GroupId"] for g in instance["SecurityGroups"]] == aws_account.config.security_groups
    assert instance["IamInstanceProfile"]["Arn"].endswith("instance-profile/heliostat-node")
    (disk,) = ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [machine.machine_id]}])[
        "Volumes"
    ]
    assert (disk["Encrypted"], disk["VolumeType"], disk["Size"]) == (True, "gp3", 100)
    attribute = lambda name: ec2.describe_instance_attribute(InstanceId=machine.machine_id, Attribute=name)  # noqa: E731
    assert base64.b64decode(attribute("userData")["UserData"]["Value"]).decode() == asked.user_data
    behaviour = attribute("instanceInitiatedShutdownBehavior")["InstanceInitiatedShutdownBehavior"]["Value"]
    assert behaviour == "terminate"
    wanted = {
        "Name": "heliostat nod_1",
        "team": "blue",
        "heliostat-installation": OURS,
        "heliostat-organization": "org_1",
        "heliostat-cluster": "clu_1",
        "heliostat-node": "nod_1",
        "heliostat-generation": "3",
        "heliostat-token": asked.token,
    }
    for tagged in (instance, disk):
        tags = {t["Key"]: t["Value"] for t in tagged["Tags"]}
        assert wanted.items() <= tags.items()
    given = launch_arguments()
    kinds = {given[f"TagSpecification.{i}.ResourceType"] for i in (1, 2, 3)}
    assert kinds == {"instance", "volume", "network-interface"}


def test_generations_take_turns_in_the_zones(aws_account: Account) -> None:
    machines = aws_account.machines()
    zones = []
    for generation in (1, 2, 3):
        machine = machines.launch(spec(generation=generation))
        (found,) = aws_account.client("ec2").describe_instances(InstanceIds=[machine.machine_id])["Reservations"]
        zones.append(found["Instances"][0]["Placement"]["AvailabilityZone"])
    assert zones[0] != zones[1]
    assert zones[0] == zones[2]
    machine = machines.launch(spec(zone="us-west-2b"))
    (found,) = aws_account.client("ec2").describe_instances(InstanceIds=[machine.machine_id])["Reservations"]
    assert found["Instances"][0]["Placement"]["AvailabilityZone"] == "us-west-2b"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, "m6i.large"),
        ({"cpu": 4.0}, "m6i.xlarge"),
        ({"cpu": 4.0, "memory": 60 * 2**30}, "r6i.2xlarge"),
        ({"cpu": 4.0, "gpu": 1}, "g4dn.xlarge"),
        ({"gpu": 8}, "g5.48xlarge"),
        ({"cpu": 4.0, "instance_type": "c5.large"}, "c5.large"),
    ],
)
def test_an_instance_type_is_chosen(aws_account: Account, wanted: dict[str, Any], expected: str) -> None:
    aws_account.machines().launch(spec(**wanted))
    assert launch_arguments()["InstanceType"] == expected


def test_a_lost_answer_is_one_machine(aws_account: Account) -> None:
    machines, asked = aws_account.machines(), spec()
    KNOBS.faults.append(Fault("RunInstances", lost=True))
    with pytest.raises(CloudError, match="safe to repeat") as caught:
        machines.launch(asked)
    assert type(caught.value) is CloudError
    found = machines.find(asked.token)
    assert found is not None
    assert aws_account.machines().launch(asked).machine_id == found.machine_id
    assert [m.machine_id for m in machines.list_owned(OURS)] == [found.machine_id]


def test_the_same_request_after_the_image_has_moved_on_is_the_same_machine(aws_account: Account) -> None:
    asked = spec()
    first = aws_account.machines().launch(asked)
    changed = aws_account.machines(root_volume_gib=200)
    assert changed.launch(asked).machine_id == first.machine_id
    with pytest.raises(BadConfig, match="same token"):
        changed.launch(asked.model_copy(update={"user_data": "#!/bin/sh\n"}))
    KNOBS.faults.append(Fault("DescribeInstances", answer=NOTHING))
    with pytest.raises(CloudError, match="does not show it") as caught:
        changed.launch(asked)
    assert type(caught.value) is CloudError, "it may be tried again"


def test_a_repeat_of_long_ago_gives_the_state_of_now(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    machines, asked = aws_account.machines(), spec()
    first = machines.launch(asked)
    machines.terminate([first.machine_id])
    eventually(lambda: machines.describe([first.machine_id])[0].state is MachineState.GONE)
    monkeypatch.setattr("clouds.aws.machines.ec2.VISIBLE_S", -5)
    KNOBS.faults.append(Fault("DescribeInstances", answer=NOTHING))
    again = aws_account.machines().launch(asked)  # by another process
    assert (again.machine_id, again.state) == (first.machine_id, MachineState.GONE)
    assert "no longer knows it" in again.reason


def test_a_token_whose_machine_has_ended_gives_that_machine(aws_account: Account) -> None:
    """EC2 may say so by a code of its own, and not by the answer of then."""
    machines, asked = aws_account.machines(), spec()
    first = machines.launch(asked)
    machines.terminate([first.machine_id])
    eventually(lambda: machines.describe([first.machine_id])[0].state is MachineState.GONE)
    KNOBS.faults.append(Fault("RunInstances", "IdempotentInstanceTerminated", times=3))
    again = aws_account.machines().launch(asked)
    assert (again.machine_id, again.state) == (first.machine_id, MachineState.GONE)
    with pytest.raises(BadConfig, match="same token"):
        machines.launch(asked.model_copy(update={"user_data": "#!/bin/sh\n"}))
    KNOBS.faults.append(Fault("DescribeInstances", answer=NOTHING))
    with pytest.raises(CloudError, match="does not show it") as caught:
        machines.launch(asked)
    assert type(caught.value) is CloudError, "it may be tried again"


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("InsufficientInstanceCapacity", 500, NoCapacity),
        ("UnfulfillableCapacity", 400, NoCapacity),
        ("InsufficientFreeAddressesInSubnet", 400, NoCapacity),
        ("SpotMaxPriceTooLow", 400, NoCapacity),
        ("VcpuLimitExceeded", 400, QuotaExceeded),
        ("InvalidSubnetID.NotFound", 400, BadConfig),
        ("UnauthorizedOperation", 403, Denied),
    ],
)
def test_what_ec2_refuses(aws_account: Account, code: str, status: int, expected: type[CloudError]) -> None:
    machines, asked, since = aws_account.machines(), spec(), len(KNOBS.calls)
    KNOBS.faults.append(Fault("RunInstances", code, status, times=1e9))
    with pytest.raises(expected, match=code) as caught:
        machines.launch(asked)
    assert caught.value.resource == "nod_1"
    assert caught.value.remedy
    assert Counter(c.get("Action") for c in KNOBS.calls[since:])["RunInstances"] == 1, (
        "nothing tries beside the workflow"
    )
    KNOBS.faults.clear()
    assert machines.list_owned(OURS) == []
    machines.launch(asked)


def test_an_unknown_image(aws_account: Account) -> None:
    for image in ("ami-00000000000000000", "/heliostat/no/such/parameter"):
        with pytest.raises(BadConfig) as caught:
            aws_account.machines(image=image).launch(spec())
        assert image in str(caught.value)


def test_an_image_by_parameter_is_looked_up_once(aws_account: Account) -> None:
    aws_account.client("ssm").put_parameter(Name="/our/image", Type="String", Value=aws_account.config.image)
    machines, since = aws_account.machines(image="/our/image"), len(KNOBS.calls)
    with ThreadPoolExecutor(8) as pool:
        launched = list(pool.map(lambda _: machines.launch(spec()), range(8)))
    assert len({m.machine_id for m in launched}) == 8
    counts = Counter(c.get("Action") for c in KNOBS.calls[since:])
    del counts["AssumeRole"]
    assert counts == {"DescribeImages": 1, "RunInstances": 8}


def test_a_type_that_the_zone_does_not_have(aws_account: Account) -> None:
    message = (
        "Your requested instance type (m6i.large) is not supported in your requested Availability Zone (us-west-2a)."
    )
    KNOBS.faults.append(Fault("RunInstances", "Unsupported", message=message, times=2))
    with pytest.raises(NotOffered, match=r"does not offer m6i\.large in zone us-west-2"):
        aws_account.machines().launch(spec())
    only = [AwsSubnet(id=aws_account.config.subnets[0].id, zone="us-west-2a")]
    with pytest.raises(NotOffered, match=r"does not offer m6i\.large in zone us-west-2a") as caught:
        aws_account.machines(subnets=only).launch(spec())
    assert "another instance type" in caught.value.remedy


def test_what_is_refused_before_ec2_is_asked(aws_account: Account) -> None:
    machines, since = aws_account.machines(), len(KNOBS.calls)
    for fields, words in (
        ({"user_data": "x" * 16385}, "16385 bytes of user-data"),
        ({"market": Market.PREFER_SPOT}, "PREFER_SPOT"),
        ({"zone": "us-west-2z"}, "us-west-2z"),
    ):
        with pytest.raises(BadConfig, match=words) as caught:
            machines.launch(spec(**fields))
        assert caught.value.remedy
    assert len(KNOBS.calls) == since
    machines.launch(spec(user_data="x" * 16384))


def test_only_ours_are_ended(aws_account: Account) -> None:
    machines = aws_account.machines()
    mine = machines.launch(spec()).machine_id
    others = aws_account.machines(installation_id="another").launch(spec(installation_id="another")).machine_id
    ec2 = aws_account.client("ec2")
    foreign = ec2.run_instances(
        ImageId=aws_account.config.image,
        MinCount=1,
        MaxCount=1,
        SubnetId=aws_account.config.subnets[0].id,
        InstanceType="m5.large",
    )["Instances"][0]["InstanceId"]
    machines.terminate([foreign, others, mine, "i-00000000000000000"])
    eventually(lambda: machines.describe([mine])[0].state is MachineState.GONE)
    states = {m.machine_id: m.state for m in machines.describe([foreign, others])}
    assert set(states.values()) == {MachineState.RUNNING}


def test_one_that_vanishes_does_not_save_the_others(aws_account: Account) -> None:
    machines = aws_account.machines()
    a, b = (machines.launch(spec()).machine_id for _ in range(2))
    KNOBS.faults.append(Fault("TerminateInstances", "InvalidInstanceID.NotFound"))
    KNOBS.faults.append(Fault("TerminateInstances", "InvalidInstanceID.NotFound", match={"InstanceId.1": a}))
    machines.terminate([a, b])
    eventually(lambda: machines.describe([b])[0].state is MachineState.GONE)


def test_one_that_somebody_protects_does_not_save_the_others(aws_account: Account) -> None:
    """EC2 then ends none of the same zone, and says why."""
    machines = aws_account.machines()
    a, b, c = (machines.launch(spec()).machine_id for _ in range(3))
    aws_account.client("ec2").modify_instance_attribute(InstanceId=a, DisableApiTermination={"Value": True})
    with pytest.raises(CloudError, match=f"{a}.* may not be terminated") as caught:
        machines.terminate([a, b, c])
    assert caught.value.resource == a
    eventually(lambda: {m.state for m in machines.describe([b, c])} == {MachineState.GONE})
    assert machines.describe([a])[0].state is MachineState.RUNNING


def test_a_machine_that_ec2_does_not_show_yet_is_pending_and_can_be_ended(aws_account: Account) -> None:
    now = [0.0]
    machines = AwsMachines(aws_account.config, aws_account.shared, OURS, clock=lambda: now[0])
    machine = machines.launch(spec())
    KNOBS.faults.append(Fault("DescribeInstances", answer=NOTHING, times=3))
    assert machines.describe([machine.machine_id]) == [machine]
    machines.terminate([machine.machine_id])
    now[0] += VISIBLE_S + 1
    assert machines.describe([machine.machine_id]) == []
    assert not KNOBS.faults[0].times
    eventually(lambda: machines.describe([machine.machine_id])[0].state is MachineState.GONE)


def test_calls_are_by_batch(aws_account: Account) -> None:
    machines = aws_account.machines()
    with ThreadPoolExecutor(8) as pool:
        ids = [m.machine_id for m in pool.map(lambda _: machines.launch(spec()), range(12))]
    since = len(KNOBS.calls)
    assert len(machines.describe(ids)) == 12
    assert len(machines.list_owned(OURS)) == 12
    machines.terminate(ids)
    counts = Counter(c.get("Action") for c in KNOBS.calls[since:])
    assert counts == {"DescribeInstances": 3, "TerminateInstances": 1}


def test_console_output_of_old_hardware(aws_account: Account) -> None:
    machines = aws_account.machines()
    machine = machines.launch(spec())
    KNOBS.faults.append(Fault("GetConsoleOutput", "UnsupportedOperation", match={"Latest": "true"}))
    assert machines.console_output(machine.machine_id) == "hello from boot\n"
    assert machines.console_output("i-00000000000000000") == ""


def test_the_catalogue_that_ships_is_what_describe_instance_types_says(aws_account: Account, tmp_path: Path) -> None:
    names = ["m6i.large", "p5.48xlarge", "g6f.large", "m6g.large", "t3.micro", "mac1.metal"]
    said = aws_account.client("ec2").describe_instance_types(InstanceTypes=names)
    asked = catalogue.refreshed(Pages([said]))
    assert len(asked.types) == len(names) - 1, "no Macs"
    catalogue.save(asked, tmp_path / "types.csv")
    assert catalogue.load(tmp_path / "types.csv").types == asked.types
    shipped = catalogue.shipped().types
    assert asked.types.items() <= shipped.items()
    h100 = shipped["p5.48xlarge"]
    assert (h100.cpu, h100.memory, h100.gpu, h100.accelerator, h100.architecture) == (192, 2**41, 8, "H100", "x86_64")
    assert not shipped["g6f.large"].choosable, "a part of a GPU is none"
