"""``advanced_instance_config`` on AWS: fields of RunInstances, put over ours.

What makes a machine one that we can find, end and trust is ours: its name says so when it is refused. All else is
checked by EC2's own model of the request (botocore's), which takes no call.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import botocore.session
from botocore.validate import ParamValidator

from clouds.aws.account.session import _loader
from clouds.contract.errors import BadConfig
from clouds.contract.retained import RetainedResources

OWNED = {
    "ClientToken": "it makes a launch idempotent",
    "UserData": "it starts the node's agent",
    "TagSpecifications": "set tags of the cluster",
    "InstanceInitiatedShutdownBehavior": "a node ends itself by shutting down",
    "MetadataOptions": "nodes use IMDSv2 only",
    "InstanceMarketOptions": "give market_type",
    "InstanceType": "give instance_type",
    "MinCount": "each node is launched separately",
    "MaxCount": "each node is launched separately",
    "SubnetId": "set zones; the cloud has its subnets",
    "NetworkInterfaces": "the cloud has its subnets and security groups",
    "IamInstanceProfile": "the cloud has its instance profile",
    "LaunchTemplate": "it could override Heliostat's fields",
    "HibernationOptions": "each machine boots once",
    "DisableApiTermination": "it would outlive its cluster",
    "DisableApiStop": "it would outlive its cluster",
    "DryRun": "nothing would be launched",
}
"""Field → why it is ours, or what to give instead."""

RETAINED_DEVICE = "/dev/sdp"
"""Device name of a head's retained volume."""
_ADDRESS_OWNED = ("SecurityGroupIds", "SecurityGroups", "PrivateIpAddress", "Ipv6AddressCount", "Ipv6Addresses",
                  "EnablePrimaryIpv6")  # fmt: skip
"""What EC2 takes from the network interface, where one is given."""

_DISK_OWNED = {"Encrypted": True, "DeleteOnTermination": True}


def check(advanced: Mapping[str, Any], keep: RetainedResources | None = None) -> None:
    """Raises BadConfig that names the field."""
    if not advanced:
        return
    for name in _ADDRESS_OWNED if keep is not None and keep.address else ():
        if name in advanced:
            raise _refused(name, f"with fixed_address {name} is the network interface's")
    for name, why in OWNED.items():
        if name in advanced:
            raise _refused(name, f"{name} is set by Heliostat: {why}")
    placement = advanced.get("Placement")
    if isinstance(placement, Mapping) and "AvailabilityZone" in placement:
        raise _refused("Placement.AvailabilityZone", "the zone is set by Heliostat: set zones")
    report = ParamValidator().validate({**advanced, "MinCount": 1, "MaxCount": 1}, _request_shape())
    if report.has_errors():
        raise _refused(next(iter(advanced)), f"RunInstances has no such field: {report.generate_report()}")
    for i, disk in enumerate(advanced.get("BlockDeviceMappings", [])):
        if (
            keep is not None
            and keep.volume_gib
            and disk.get("DeviceName") in (RETAINED_DEVICE, "/dev/xvdp", "xvdp", "sdp")
        ):
            raise _refused(f"BlockDeviceMappings.{i}.DeviceName", f"{RETAINED_DEVICE} is the retained volume")
        for name, must in _DISK_OWNED.items():
            if disk.get("Ebs", {}).get(name, must) != must:
                raise _refused(f"BlockDeviceMappings.{i}.Ebs.{name}", f"{name} of a disk is always {must}")


def put_over(request: dict[str, Any], advanced: Mapping[str, Any]) -> dict[str, Any]:
    """Objects are merged field by field, disks by their device's name; else what is given replaces ours. More disks are
    encrypted and go with the machine."""
    disks = {disk["DeviceName"]: disk for disk in request["BlockDeviceMappings"]}
    for given in advanced.get("BlockDeviceMappings", []):
        name = given.get("DeviceName", "")
        disk = _merged(disks.get(name, {}), given)
        if "Ebs" in disk:
            disk["Ebs"] = {**disk["Ebs"], **_DISK_OWNED}
        disks[name] = disk
    rest = {key: value for key, value in advanced.items() if key != "BlockDeviceMappings"}
    return {**_merged(request, rest), "BlockDeviceMappings": list(disks.values())}


def _merged(ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return theirs
    return {**ours, **{key: _merged(ours[key], v) if key in ours else v for key, v in theirs.items()}}


@functools.cache
def _request_shape() -> Any:
    session = botocore.session.Session()
    session.register_component("data_loader", _loader())
    model = session.get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def _refused(field: str, why: str) -> BadConfig:
    return BadConfig(
        f"advanced_instance_config is not valid: {why}.", remedy=f"Leave out or correct {field}.", field=field
    )
