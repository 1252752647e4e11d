"""Disks and network interfaces that belong to no machine any more."""

from __future__ import annotations

from typing import Any

import pytest

from clouds.aws.machines.ec2 import AwsMachines
from clouds.contract.machines import OWNER_TAG
from tests.clouds.aws.support import Account
from tests.clouds.support import OURS

pytestmark = pytest.mark.long  # starts the fake of the whole cloud

HOUR = 3600.0


def tags(kind: str, owner: str = OURS) -> list[dict[str, Any]]:
    return [{"ResourceType": kind, "Tags": [{"Key": OWNER_TAG, "Value": owner}]}]


def test_what_is_ours_unattached_and_old_is_deleted(aws_account: Account) -> None:
    now = [1000.0]
    machines = AwsMachines(aws_account.config, aws_account.shared, OURS, clock=lambda: now[0])
    ec2, zone = aws_account.client("ec2"), aws_account.config.subnets[0].zone

    def volume(owner: str = OURS) -> str:
        made = ec2.create_volume(AvailabilityZone=zone, Size=8, TagSpecifications=tags("volume", owner))
        return str(made["VolumeId"])

    def interface(owner: str = OURS) -> str:
        subnet = aws_account.config.subnets[0].id
        made = ec2.create_network_interface(SubnetId=subnet, TagSpecifications=tags("network-interface", owner))
        return str(made["NetworkInterface"]["NetworkInterfaceId"])

    mine, theirs = {volume(), interface()}, {volume("another"), interface("another")}
    attached = volume()
    instance = ec2.run_instances(ImageId=aws_account.config.image, MinCount=1, MaxCount=1,
                                 SubnetId=aws_account.config.subnets[0].id)["Instances"][0]["InstanceId"]  # fmt: skip
    ec2.get_waiter("instance_running").wait(InstanceIds=[instance], WaiterConfig={"Delay": 1})
    ec2.attach_volume(VolumeId=attached, InstanceId=instance, Device="/dev/sdf")

    assert machines.delete_orphans(OURS, HOUR) == [], "the newborn: a launch may be about to take them"
    now[0] += HOUR
    # A disk says when it was made; an interface has been seen for an hour now.
    (seen,) = machines.delete_orphans(OURS, HOUR)
    assert seen in mine
    assert set(machines.delete_orphans(OURS, 0)) == mine - {seen}
    assert machines.delete_orphans(OURS, 0) == []
    left = {v["VolumeId"] for v in ec2.describe_volumes()["Volumes"]}
    left |= {i["NetworkInterfaceId"] for i in ec2.describe_network_interfaces()["NetworkInterfaces"]}
    assert theirs | {attached} <= left
