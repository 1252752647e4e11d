"""``advanced_instance_config``: what is put over our requests, and that what is ours stays ours."""

from __future__ import annotations

from typing import Any

import pytest

from clouds.aws.machines import advanced as aws
from clouds.contract.errors import BadConfig
from clouds.contract.machines import MachineSpec
from clouds.gcp.machines import advanced as gcp
from clouds.gcp.machines import instance
from clouds.gcp.machines.catalogue import shipped
from clouds.instance_types import accelerators, is_accelerator, nearest
from heliostat.models.clouds import Market
from heliostat.models.clusters import NodeRole
from heliostat.models.compute_configs import Architecture
from tests.clouds.gcp.support import config

EC2: dict[str, Any] = {
    "ImageId": "ami-1",
    "Monitoring": {"Enabled": False, "Kept": 1},
    "BlockDeviceMappings": [
        {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 100, "VolumeType": "gp3", **aws._DISK_OWNED}}
    ],
}


def spec(**fields: Any) -> MachineSpec:
    given: dict[str, Any] = {
        "token": "t", "cluster_id": "cl_1", "node_id": "nd_1", "generation": 1, "role": NodeRole.HEAD,
        "installation_id": "inst-1", "user_data": "#!/bin/sh\n", "tags": {"a": "b"},
    }  # fmt: skip
    return MachineSpec(**(given | fields))


def test_what_was_added_to_a_request_leaves_the_digests_of_before() -> None:
    """Those of machines that were launched by the release before: else a repeat would be another request."""
    before = "aba17bf320546ef47fc0c48080160ed0a661fd99fde0da00a4b0e618d17ccf0a"
    assert spec().digest() == before
    changed = {spec(**c).digest() for c in CHANGES}
    assert len(changed | {before}) == len(CHANGES) + 1


CHANGES: list[dict[str, Any]] = [
    {"accelerator": "T4"},
    {"cpu_architecture": Architecture.ARM64},
    {"advanced": {"EbsOptimized": True}},
    {"instance_type": "m6i.large"},
]


# --- AWS


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


# --- Google Cloud


def test_gcp_by_the_rest_apis_names_and_the_clients() -> None:
    given = {
        "minCpuPlatform": "Intel Ice Lake",
        "shielded_instance_config": {"enableSecureBoot": False},
        "disks": [
            {"boot": True, "initializeParams": {"diskSizeGb": 500}},
            {"type": "SCRATCH", "initializeParams": {"diskType": "zones/z/diskTypes/local-ssd"}},
        ],
    }
    gcp.check(given)
    kind = shipped().types["e2-standard-4"]
    plain = instance.request(spec(), config(), kind, "us-central1-a", Market.ON_DEMAND, {})
    found = instance.request(spec(advanced=given), config(), kind, "us-central1-a", Market.ON_DEMAND, {})
    assert found["min_cpu_platform"] == "Intel Ice Lake"
    assert found["shielded_instance_config"] == plain["shielded_instance_config"] | {"enable_secure_boot": False}
    boot, scratch = found["disks"]
    ours = plain["disks"][0]
    changed = {k for k, v in boot["initialize_params"].items() if v != ours["initialize_params"][k]}
    assert changed == {"disk_size_gb", "labels"}, "a label is the request's digest"
    assert boot["initialize_params"]["disk_size_gb"] == 500
    assert (boot["auto_delete"], scratch["auto_delete"]) == (True, True)
    assert found["metadata"] == plain["metadata"]


@pytest.mark.parametrize("name", sorted(gcp.OWNED))
def test_gcp_refuses_what_is_ours_by_name(name: str) -> None:
    first, *more = name.split("_")
    for written in {name, first + "".join(part.title() for part in more)}:
        with pytest.raises(BadConfig, match=name):
            gcp.check({"min_cpu_platform": "x", written: {}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"minCpuPlattform": "x"}, "min_cpu_plattform"),
        ({"canIpForward": "perhaps"}, "can_ip_forward"),
        ({"disks": [{"autoDelete": False}]}, "auto_delete"),
        ({"disks": [{"source": "zones/z/disks/d"}]}, "source"),
    ],
)
def test_gcp_refuses_what_an_instance_does_not_know(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig) as caught:
        gcp.check(given)
    assert words in f"{caught.value.field} {caught.value.message}"


def test_an_arm_machine_boots_an_arm_image() -> None:
    kind = shipped().types["c4a-standard-4"]
    found = instance.request(spec(), config(), kind, "us-central1-a", Market.ON_DEMAND, {})
    assert "arm64" in found["disks"][0]["initialize_params"]["source_image"]


# --- names


@pytest.mark.parametrize(
    ("wanted", "has", "same"),
    [
        ("T4", "nvidia-tesla-t4", True),
        ("nvidia-tesla-t4", "T4", True),
        ("A100", "nvidia-a100-80gb", True),
        ("A100-80GB", "nvidia-a100-80gb", True),
        ("A100-80GB", "nvidia-tesla-a100", False),
        ("H100", "nvidia-h100-mega-80gb", False),
        ("T4", "T4g", False),
        ("rtx pro 4500", "RTX PRO 4500", True),
        ("T4", "", False),
    ],
)
def test_accelerators_by_the_names_that_people_use(wanted: str, has: str, same: bool) -> None:
    assert is_accelerator(wanted, has) is same


def test_names_that_are_near() -> None:
    assert accelerators(shipped())[:2] == ["A100", "A100-80GB"]
    assert nearest("h10", ["H100", "L4"]) == "Did you mean 'H100'?"
    assert nearest("zzz", ["a", "b"]) == "There are: a, b."
    assert nearest("zzz", [str(n) for n in range(40)]).endswith("and 28 more.")
    assert nearest("x", []) == "There are: none."
