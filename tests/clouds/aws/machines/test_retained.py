"""What is AWS's own of what heads hand on; the rest is ``tests/clouds/contract/test_retained.py``."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clouds.contract.errors import NoCapacity, NotOffered
from clouds.contract.machines import MachineState
from clouds.contract.retained import DEVICES, RetainedResources
from heliostat.errors import CloudError
from tests.clouds.aws.moto_plus import KNOBS, Fault
from tests.clouds.aws.support import Account, aws_cloud, private_subnets
from tests.clouds.contract.test_retained import BOTH, HAD, end, handed_over, head, launched, left, zones
from tests.clouds.support import OURS, Cloud

pytestmark = pytest.mark.long  # starts the fake of the whole cloud


@pytest.fixture
def cloud(aws_account: Account, tmp_path: Path) -> Iterator[Cloud]:
    with private_subnets(aws_account), aws_cloud(tmp_path, aws_account) as found:
        yield found


def volumes(account: Account) -> list[dict[str, Any]]:
    filters = [{"Name": "tag-key", "Values": ["heliostat-kept"]}]
    found: list[dict[str, Any]] = account.client("ec2").describe_volumes(Filters=filters)["Volumes"]
    return found


def test_both_are_encrypted_tagged_and_in_the_clouds_group(cloud: Cloud, aws_account: Account) -> None:
    machine = cloud.machines.launch(head(cloud, user_data=f"mount {DEVICES}", tags={"team": "blue"}))
    handed_over(cloud, machine)
    ec2 = aws_account.client("ec2")
    (volume,) = volumes(aws_account)
    assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (20, "gp3", True)
    (attached,) = volume["Attachments"]
    assert (attached["InstanceId"], attached["Device"]) == (machine.machine_id, "/dev/sdp")
    (instance,) = ec2.describe_instances(InstanceIds=[machine.machine_id])["Reservations"][0]["Instances"]
    assert {"Key": "heliostat-kept", "Value": volume["VolumeId"]} in instance["Tags"], "which one it is to be given"
    (interface,) = ec2.describe_network_interfaces(
        NetworkInterfaceIds=[instance["NetworkInterfaces"][0]["NetworkInterfaceId"]]
    )["NetworkInterfaces"]
    assert [g["GroupId"] for g in interface["Groups"]] == aws_account.config.security_groups
    for told, kept in ((volume["Tags"], "volume"), (interface["TagSet"], "address")):
        tags = {t["Key"]: t["Value"] for t in told}
        assert tags["heliostat-installation"] == OURS
        assert (tags["heliostat-cluster"], tags["heliostat-kept"], tags["team"]) == ("clu_1", kept, "blue")
        assert "heliostat-node" not in tags
    script = ec2.describe_instance_attribute(InstanceId=machine.machine_id, Attribute="userData")["UserData"]["Value"]
    serial = volume["VolumeId"].replace("-", "")
    by_id = f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{serial}"
    assert base64.b64decode(script).decode() == f"mount {by_id} /dev/xvdp"
    asked = next(c for c in reversed(KNOBS.calls) if c.get("Action") == "RunInstances")
    assert not [key for key in asked if key.startswith(("SubnetId", "SecurityGroupId"))]


def test_what_a_zone_without_machines_leaves_is_deleted_by_the_first_head(cloud: Cloud, aws_account: Account) -> None:
    KNOBS.faults.append(Fault("RunInstances", "InsufficientInstanceCapacity", status=500))
    with pytest.raises(NoCapacity):
        cloud.machines.launch(head(cloud))
    machine = cloud.machines.launch(head(cloud, zone=1, generation=2))
    assert {v["AvailabilityZone"] for v in volumes(aws_account)} == set(zones(cloud))
    handed_over(cloud, machine)
    assert [v["AvailabilityZone"] for v in volumes(aws_account)] == [zones(cloud)[1]]
    end(cloud, machine)
    again = launched(cloud, cloud.spec(keep=HAD, generation=3))
    assert again.ip == machine.ip, "whatever zone is named"
    handed_over(cloud, again)
    end(cloud, again)
    assert len(left(cloud)) == 2


def test_a_first_head_that_names_no_zone_tries_the_next_one_too(cloud: Cloud, aws_account: Account) -> None:
    """What the first try has begun elsewhere does not hold it there."""
    KNOBS.faults.append(Fault("RunInstances", "InsufficientInstanceCapacity", status=500))
    with pytest.raises(NoCapacity):
        cloud.machines.launch(cloud.spec(keep=BOTH, generation=1))
    (begun,) = volumes(aws_account)
    machine = cloud.machines.launch(cloud.spec(keep=BOTH, generation=2))
    handed_over(cloud, machine)
    (kept,) = volumes(aws_account)
    assert kept["AvailabilityZone"] != begun["AvailabilityZone"]
    end(cloud, machine)
    assert len(left(cloud)) == 2, "the first one's address is gone too"


def test_an_answer_that_was_lost_makes_none_twice(cloud: Cloud, aws_account: Account) -> None:
    for action in ("CreateVolume", "CreateNetworkInterface", "RunInstances"):
        KNOBS.faults.append(Fault(action, lost=True))
    spec = head(cloud)
    machine = launched(cloud, spec)
    assert cloud.machines.launch(spec).machine_id == machine.machine_id
    assert len(volumes(aws_account)) == 1
    assert len(cloud.machines.list_owned(OURS)) == 1


def test_a_volume_that_ec2_does_not_show_yet_is_waited_for(cloud: Cloud, aws_account: Account) -> None:
    nothing = '<DescribeVolumesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><volumeSet/></DescribeVolumesResponse>'
    machine = cloud.machines.launch(head(cloud))
    cloud.wait_for(machine.machine_id, MachineState.RUNNING)
    KNOBS.faults.append(Fault("DescribeVolumes", answer=nothing))
    with pytest.raises(CloudError, match="not shown"):
        cloud.machines.attach_retained("clu_1", machine.machine_id)
    handed_over(cloud, machine)
    (volume,) = volumes(aws_account)
    assert [a["InstanceId"] for a in volume["Attachments"]] == [machine.machine_id]


def test_no_fixed_address_where_the_way_out_is_a_public_one(aws_account: Account, tmp_path: Path) -> None:
    with aws_cloud(tmp_path, aws_account) as cloud:
        with pytest.raises(NotOffered, match="public addresses"):
            cloud.machines.launch(head(cloud))
        assert volumes(aws_account) == []
        disk_alone = RetainedResources(volume_gib=1, mount_path="/data")
        machine = cloud.machines.launch(head(cloud, keep=disk_alone))
        handed_over(cloud, machine)


def test_calls_of_a_head(cloud: Cloud) -> None:
    """Two lists, a look at the subnet (once), and one call for each that is made."""
    KNOBS.calls.clear()
    cloud.machines.launch(head(cloud, keep=BOTH))
    asked = [c["Action"] for c in KNOBS.calls if c.get("Action") != "AssumeRole"]
    assert sorted(asked) == sorted(
        ["DescribeImages", "DescribeVolumes", "DescribeNetworkInterfaces", "DescribeSubnets", "CreateVolume",
         "CreateNetworkInterface", "RunInstances"]
    )  # fmt: skip
