"""``advanced_instance_config`` on AWS: it goes over our request, but never over what is ours."""

from __future__ import annotations

from typing import Any

import pytest

from clouds.aws.machines import advanced as aws
from clouds.contract.errors import BadConfig

EC2: dict[str, Any] = {
    "ImageId": "ami-1",
    "Monitoring": {"Enabled": False, "Kept": 1},
    "BlockDeviceMappings": [
        {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 100, "VolumeType": "gp3", **aws._DISK_OWNED}}
    ],
}


def test_aws_objects_are_merged_and_the_rest_is_replaced() -> None:
    disks = [
        {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 500, "Iops": 6000}},
        {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 50}},
        {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"},
    ]
    given = {"Monitoring": {"Enabled": True}, "ImageId": "ami-2", "EbsOptimized": True, "BlockDeviceMappings": disks}
    aws.check(given)
    found = aws.put_over(EC2, given)
    assert found["Monitoring"] == {"Enabled": True, "Kept": 1}
    assert (found["ImageId"], found["EbsOptimized"]) == ("ami-2", True)
    root, more, local = found["BlockDeviceMappings"]
    assert root["Ebs"] == {"VolumeSize": 500, "Iops": 6000, "VolumeType": "gp3"} | aws._DISK_OWNED
    assert more["Ebs"] == {"VolumeSize": 50} | aws._DISK_OWNED, "encrypted, and gone with the machine"
    assert local == {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}
    assert EC2["Monitoring"] == {"Enabled": False, "Kept": 1}, "ours is as it was"


@pytest.mark.parametrize("name", sorted(aws.OWNED))
def test_aws_refuses_what_is_ours_by_name(name: str) -> None:
    with pytest.raises(BadConfig, match=name) as caught:
        aws.check({"EbsOptimized": True, name: "x"})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"Monitering": {}}, "Monitering"),
        ({"EbsOptimized": "yes"}, "EbsOptimized"),
        ({"CpuOptions": {"CoreCount": "two"}}, "CoreCount"),
        ({"BlockDeviceMappings": [{"DeviceName": "d", "Ebs": {"DeleteOnTermination": False}}]}, "DeleteOnTermination"),
        ({"BlockDeviceMappings": {}}, "BlockDeviceMappings"),
        ({"Placement": {"AvailabilityZone": "a"}}, "set zones"),
    ],
)
def test_aws_refuses_what_run_instances_does_not_know(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        aws.check(given)
