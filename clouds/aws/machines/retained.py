"""A cluster's retained resources on AWS: an EBS volume and a network interface. Both are of one zone.

They are made before the first head's machine, since it is launched with the interface and looks for the volume by its
id; each place that a first head is tried in may leave its own. The volume is attached when the machine runs, which EC2
asks for (https://docs.aws.amazon.com/ebs/latest/userguide/ebs-attaching-volume.html); then the others are deleted.
Ending the machine takes both off it again.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

from clouds.aws.account.session import AwsSession
from clouds.aws.machines import instances
from clouds.aws.machines.advanced import RETAINED_DEVICE
from clouds.aws.machines.instances import RetainedIds
from clouds.contract.errors import Gone, NotOffered
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, MachineSpec, MachineState
from clouds.contract.retained import RETAINED_TAG, RetainedResources
from clouds.try_each import try_each
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig, AwsSubnet

if TYPE_CHECKING:
    from types_boto3_ec2.literals import ResourceTypeType
    from types_boto3_ec2.type_defs import (
        CreateNetworkInterfaceRequestTypeDef,
        CreateVolumeRequestTypeDef,
        FilterTypeDef,
        InstanceTypeDef,
        NetworkInterfaceTypeDef,
        TagSpecificationTypeDef,
        VolumeTypeDef,
    )


class RetainedStore:
    """Args:
    installation_id: whose things are found and deleted here.
    tags: on what is made, besides ours.
    """

    def __init__(self, config: AwsConfig, session: AwsSession, installation_id: str, tags: Mapping[str, str]) -> None:
        self._config, self._session, self._installation_id, self._tags = config, session, installation_id, tags
        self._lock = threading.Lock()
        self._private: set[str] = set()
        """Subnets that were looked at."""

    def prepare(
        self, spec: MachineSpec, keep: RetainedResources, subnets: list[AwsSubnet]
    ) -> tuple[AwsSubnet, RetainedIds]:
        """Where this head goes, and with what; makes what is not there. Two lists, and a call for each that is made.

        Args:
            subnets: those that it may be launched in, the first choice first.

        Raises NotOffered where it cannot go, CloudError for what is not there any more."""
        volumes = self._volumes(spec.cluster_id) if keep.volume_gib else []
        interfaces = self._interfaces(spec.cluster_id) if keep.address else []
        subnet = self._where(spec, keep, volumes, interfaces, subnets) if keep.had else subnets[0]
        if keep.address:
            self._must_not_need_a_public_address(spec, subnet)
        volume_id = interface_id = None
        if keep.volume_gib:
            here = [v["VolumeId"] for v in volumes if v["AvailabilityZone"] == subnet.zone]
            volume_id = here[0] if here else self._make_volume(spec, keep, subnet)
        if keep.address:
            here = [i["NetworkInterfaceId"] for i in interfaces if i["SubnetId"] == subnet.id]
            interface_id = here[0] if here else self._make_interface(spec, subnet)
        return subnet, RetainedIds(volume_id, interface_id)

    def attach(self, cluster_id: str, machine_id: str) -> None:
        """See ``Machines.attach_retained``. Three lists, one call to attach, one for each that is deleted."""
        volumes, interfaces = self._volumes(cluster_id), self._interfaces(cluster_id)
        if not volumes and not interfaces:
            return
        instance = self._running(machine_id)
        wanted = instances.tags_of(instance).get(RETAINED_TAG)
        if wanted is not None:
            self._attach(next((v for v in volumes if v["VolumeId"] == wanted), None), wanted, machine_id)
        used = {i["NetworkInterfaceId"] for i in instance.get("NetworkInterfaces", [])}
        self._delete(
            [v for v in volumes if v["VolumeId"] != wanted],
            [i for i in interfaces if i["NetworkInterfaceId"] not in used],
        )

    def release(self, cluster_id: str) -> None:
        """Two lists, and a call for each."""
        self._delete(self._volumes(cluster_id), self._interfaces(cluster_id))

    def volume_request(
        self, spec: MachineSpec, keep: RetainedResources, subnet: AwsSubnet
    ) -> CreateVolumeRequestTypeDef:
        """Arguments of CreateVolume."""
        return {
            "ClientToken": _token(spec.cluster_id, subnet.zone),
            "AvailabilityZone": subnet.zone,
            "Size": keep.volume_gib,
            "VolumeType": "gp3",
            "Encrypted": True,
            "TagSpecifications": self._specification("volume", "volume", spec),
        }

    def interface_request(self, spec: MachineSpec, subnet: AwsSubnet) -> CreateNetworkInterfaceRequestTypeDef:
        """Arguments of CreateNetworkInterface."""
        return {
            "ClientToken": _token(spec.cluster_id, subnet.id),
            "SubnetId": subnet.id,
            "Groups": self._config.security_groups,
            "Description": f"Heliostat: head of {spec.cluster_id}",
            "TagSpecifications": self._specification("network-interface", "address", spec),
        }

    # -- inside

    def _attach(self, volume: VolumeTypeDef | None, volume_id: str, machine_id: str) -> None:
        holders = [a["InstanceId"] for a in volume.get("Attachments", [])] if volume is not None else None
        if holders is None or (holders and machine_id not in holders):
            where = "with another machine" if holders else "not shown by EC2"
            raise CloudError(f"Volume {volume_id} is {where}.", remedy="Try again.", resource=machine_id)
        if not holders:
            arguments = {"VolumeId": volume_id, "InstanceId": machine_id, "Device": RETAINED_DEVICE}
            self._session.call("ec2", "AttachVolume", volume_id, **arguments)

    def _where(
        self,
        spec: MachineSpec,
        keep: RetainedResources,
        volumes: list[VolumeTypeDef],
        interfaces: list[NetworkInterfaceTypeDef],
        subnets: list[AwsSubnet],
    ) -> AwsSubnet:
        lost = ["volume"] if keep.volume_gib and not volumes else []
        lost += ["address"] if keep.address and not interfaces else []
        if lost:
            raise CloudError(  # to try again: EC2 may not show it for a moment
                f"AWS does not show the {' and the '.join(lost)} that the heads of cluster {spec.cluster_id} retain.",
                remedy="If it was deleted by hand, create another cluster.",
                resource=spec.node_id,
            )
        zones, ids = {v["AvailabilityZone"] for v in volumes}, {i["SubnetId"] for i in interfaces}
        fit = [s for s in subnets if (not volumes or s.zone in zones) and (not interfaces or s.id in ids)]
        if not fit:
            where = ", ".join(sorted(zones or ids))
            self._elsewhere(spec, subnets[0], f"the head's retained resources are in {where}")
        return fit[0]

    def _must_not_need_a_public_address(self, spec: MachineSpec, subnet: AwsSubnet) -> None:
        """EC2 gives one to an interface that it makes with the machine, never to one that is there already
        (https://docs.aws.amazon.com/vpc/latest/userguide/vpc-ip-addressing.html): the head would have no way out."""
        with self._lock:
            if subnet.id in self._private:
                return
        answer = self._session.call("ec2", "DescribeSubnets", subnet.id, SubnetIds=[subnet.id])
        public = bool(answer["Subnets"][0]["MapPublicIpOnLaunch"])
        if public:
            why = f"subnet {subnet.id} gives machines public addresses, which one with a fixed address cannot have"
            self._elsewhere(spec, subnet, why)
        with self._lock:
            self._private.add(subnet.id)

    def _elsewhere(self, spec: MachineSpec, subnet: AwsSubnet, why: str) -> NoReturn:
        raise NotOffered(
            f"The head cannot be in zone {subnet.zone}: {why}.",
            remedy="Use another zone, or remove retained_volume and fixed_address.",
            resource=spec.node_id,
        )

    def _make_volume(self, spec: MachineSpec, keep: RetainedResources, subnet: AwsSubnet) -> str:
        request = self.volume_request(spec, keep, subnet)
        return str(self._session.call("ec2", "CreateVolume", spec.node_id, **request)["VolumeId"])

    def _make_interface(self, spec: MachineSpec, subnet: AwsSubnet) -> str:
        request = self.interface_request(spec, subnet)
        answer = self._session.call("ec2", "CreateNetworkInterface", spec.node_id, **request)
        return str(answer["NetworkInterface"]["NetworkInterfaceId"])

    def _specification(self, kind: ResourceTypeType, what: str, spec: MachineSpec) -> list[TagSpecificationTypeDef]:
        tags = {
            "Name": f"heliostat head of {spec.cluster_id}",
            **self._tags,
            **spec.tags,
            OWNER_TAG: spec.installation_id,
            CLUSTER_TAG: spec.cluster_id,
            RETAINED_TAG: what,
        }
        tags.pop(NODE_TAG, None)  # the first head's
        return [{"ResourceType": kind, "Tags": [{"Key": k, "Value": v} for k, v in sorted(tags.items())]}]

    def _volumes(self, cluster_id: str) -> list[VolumeTypeDef]:
        found = self._session.pages("ec2", "DescribeVolumes", "Volumes", Filters=self._filters(cluster_id))
        return [v for v in found if v["State"] not in ("deleting", "deleted")]

    def _interfaces(self, cluster_id: str) -> list[NetworkInterfaceTypeDef]:
        filters = self._filters(cluster_id)
        return list(self._session.pages("ec2", "DescribeNetworkInterfaces", "NetworkInterfaces", Filters=filters))

    def _filters(self, cluster_id: str) -> list[FilterTypeDef]:
        return [
            {"Name": f"tag:{OWNER_TAG}", "Values": [self._installation_id]},
            {"Name": f"tag:{CLUSTER_TAG}", "Values": [cluster_id]},
            {"Name": "tag-key", "Values": [RETAINED_TAG]},
        ]

    def _running(self, machine_id: str) -> InstanceTypeDef:
        filters = [{"Name": "instance-id", "Values": [machine_id]}]
        pages = self._session.pages("ec2", "DescribeInstances", "Reservations", Filters=filters)
        found: InstanceTypeDef | None = next((i for reservation in pages for i in reservation["Instances"]), None)
        state = instances.STATES[found["State"]["Name"]] if found else MachineState.PENDING
        if state in (MachineState.STOPPING, MachineState.GONE):
            raise Gone(f"Machine {machine_id} has ended.", resource=machine_id)
        if found is None or state is MachineState.PENDING:
            raise CloudError(f"Machine {machine_id} does not run yet.", remedy="Try again.", resource=machine_id)
        return found

    def _delete(self, volumes: Iterable[VolumeTypeDef], interfaces: Iterable[NetworkInterfaceTypeDef]) -> None:
        """Raises, after all were tried, what the first that failed did; InUse among it, which passes."""
        things = [("DeleteVolume", "VolumeId", v["VolumeId"]) for v in volumes]
        things += [("DeleteNetworkInterface", "NetworkInterfaceId", i["NetworkInterfaceId"]) for i in interfaces]

        def delete(thing: tuple[str, str, str]) -> None:
            operation, argument, thing_id = thing
            self._session.call("ec2", operation, thing_id, **{argument: thing_id})

        try:
            try_each(things, delete, lambda error: str(error.details.get("code")).endswith("NotFound"))
        except CloudError as e:
            raise CloudError(e.message, remedy="Try again.", resource=e.resource, details=e.details) from e


def _token(cluster_id: str, place: str) -> str:
    """One of each kind for a cluster in each place; EC2 tells the kinds apart by the call."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"heliostat kept {cluster_id} {place}"))
