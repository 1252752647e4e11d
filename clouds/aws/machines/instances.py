"""An EC2 instance as an argument of RunInstances, and as an answer of DescribeInstances. No call is made here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any

from clouds.aws.machines import advanced
from clouds.aws.machines.images import Image
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, Machine, MachineSpec, MachineState
from clouds.contract.retained import DEVICES, RETAINED_TAG
from heliostat.models.clouds import AwsConfig, Market

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import InstanceTypeDef

TOKEN_TAG, REQUEST_TAG, GENERATION_TAG = "heliostat-token", "heliostat-request", "heliostat-generation"
"""Of an instance: the token it was launched under, the hash of the whole request, and which try of its slot it is."""

STATES = {
    "pending": MachineState.PENDING,
    "running": MachineState.RUNNING,
    "shutting-down": MachineState.STOPPING,
    # By hand alone: shutdown terminates ours. They cost a disk, so they are not gone.
    "stopping": MachineState.STOPPING,
    "stopped": MachineState.STOPPING,
    "terminated": MachineState.GONE,
}
_REASONS = {
    "Client.UserInitiatedShutdown": "terminated",
    "Client.InstanceInitiatedShutdown": "the machine shut itself down",
    "Server.SpotInstanceTermination": "AWS reclaimed the spot machine",
    "Server.InsufficientInstanceCapacity": "AWS had no capacity for it",
}
"""By ``StateReason.Code``."""


@dataclass(frozen=True)
class RetainedIds:
    """The retained resources that a head is launched with."""

    volume_id: str | None = None
    interface_id: str | None = None

    @property
    def devices(self) -> str:
        """Where the volume appears: by its id where disks are NVMe, else by the name that it is attached as
        (https://docs.aws.amazon.com/ebs/latest/userguide/nvme-ebs-volumes.html)."""
        serial = (self.volume_id or "").replace("-", "")
        return f"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_{serial} /dev/xvdp"


def request(
    config: AwsConfig,
    spec: MachineSpec,
    subnet_id: str,
    image: Image,
    instance_type: str,
    more_tags: Mapping[str, str],
    retained: RetainedIds | None = None,
) -> dict[str, Any]:
    """Arguments of RunInstances: the same for the same arguments here, as EC2 compares them under one token.

    Args:
        retained: what a head has from the one before.
    """
    tags = {
        "Name": f"heliostat {spec.node_id}",
        **more_tags,
        **spec.tags,
        OWNER_TAG: spec.installation_id,
        CLUSTER_TAG: spec.cluster_id,
        NODE_TAG: spec.node_id,
        TOKEN_TAG: spec.token,
        # So that EC2 itself refuses another request of ours that would give it the same arguments.
        REQUEST_TAG: spec.digest(),
        GENERATION_TAG: str(spec.generation),
    }
    listed = [{"Key": key, "Value": value} for key, value in sorted(tags.items())]
    arguments: dict[str, Any] = {
        "ClientToken": spec.token,
        "MinCount": 1,
        "MaxCount": 1,
        "ImageId": image.id,
        "InstanceType": instance_type,
        "SubnetId": subnet_id,
        "SecurityGroupIds": config.security_groups,
        "IamInstanceProfile": {"Name": config.instance_profile},
        "UserData": spec.user_data,  # boto3 makes it base64
        "InstanceInitiatedShutdownBehavior": "terminate",  # a node ends itself by `shutdown`
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
        "BlockDeviceMappings": [
            {
                "DeviceName": image.root_device,
                "Ebs": {
                    "VolumeSize": max(config.root_volume_gib, image.root_gib),
                    "VolumeType": "gp3",
                    "Encrypted": True,
                    "DeleteOnTermination": True,
                },
            }
        ],
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": listed} for kind in ("instance", "volume", "network-interface")
        ],
    }
    if retained is not None and retained.volume_id is not None:
        arguments["UserData"] = spec.user_data.replace(DEVICES, retained.devices)
        of_instance = arguments["TagSpecifications"][0]
        of_instance["Tags"] = [*of_instance["Tags"], {"Key": RETAINED_TAG, "Value": retained.volume_id}]
    if retained is not None and retained.interface_id is not None:
        del arguments["SubnetId"], arguments["SecurityGroupIds"]  # they are the interface's; so are its tags
        arguments["NetworkInterfaces"] = [{"DeviceIndex": 0, "NetworkInterfaceId": retained.interface_id}]
        arguments["TagSpecifications"] = arguments["TagSpecifications"][:-1]
    if spec.market is Market.SPOT:
        arguments["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
    return advanced.put_over(arguments, spec.advanced) if spec.advanced else arguments


def machine(instance: InstanceTypeDef, hidden: Mapping[str, str]) -> Machine:
    """``hidden``: tags that every machine has; callers do not see them."""
    tags = tags_of(instance)
    state = STATES[instance["State"]["Name"]]
    said = instance.get("StateReason", {})
    ended = state in (MachineState.STOPPING, MachineState.GONE)
    reason = _REASONS.get(said.get("Code", ""), said.get("Message", "")) if ended else ""
    own = {OWNER_TAG, CLUSTER_TAG, NODE_TAG}
    if tags.get("Name") == f"heliostat {tags.get(NODE_TAG)}":
        del tags["Name"]
    return Machine(
        machine_id=instance["InstanceId"],
        node_id=tags.get(NODE_TAG),
        cluster_id=tags.get(CLUSTER_TAG),
        state=state,
        ip=instance.get("PrivateIpAddress") or None,
        launched_at=instance["LaunchTime"].astimezone(UTC),
        reason=reason,
        tags={k: v for k, v in tags.items() if k in own or not (k.startswith("heliostat-") or k in hidden)},
    )


def tags_of(instance: InstanceTypeDef) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
