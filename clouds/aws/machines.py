"""Machines of an AWS account: one EC2 instance for each node."""

from __future__ import annotations

import hashlib
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

from clouds.aws import catalogue
from clouds.aws.images import Image, Images
from clouds.aws.session import AwsSession
from clouds.base import (
    CLUSTER_TAG,
    NODE_TAG,
    OWNER_TAG,
    BadConfig,
    Gone,
    Machine,
    MachineSpec,
    MachineState,
    NoCapacity,
)
from clouds.bootstrap import MAX_USER_DATA_BYTES
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig, AwsSubnet, Capabilities, Market

TOKEN_TAG, REQUEST_TAG, GENERATION_TAG = "heliostat-token", "heliostat-request", "heliostat-generation"
"""Of an instance: the token it was launched under, the hash of the whole request, and which try of its slot it is."""

VISIBLE_S = 300
"""EC2 is eventually consistent: for so long after its launch a machine that EC2 does not show yet is no missing one."""
BATCH = 200
"""Values that one filter of DescribeInstances takes."""

_STATES = {
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
    "Client.InstanceInitiatedShutdown": "the machine has shut itself down",
    "Server.SpotInstanceTermination": "AWS has reclaimed the spot machine",
    "Server.InsufficientInstanceCapacity": "AWS had no machine for it after all",
}
"""By ``StateReason.Code``."""
_INSTANCE_ID = re.compile(r"i-[0-9a-f]{8}(?:[0-9a-f]{9})?")


class AwsMachines:
    """EC2 instances (``clouds.base.Machines``).

    Calls: one RunInstances for each machine; describe, list and terminate one or two for each batch of up to 200; the
    image is looked up once an hour for all.

    Args:
        config: where machines go.
        session: of the same account and region.
        installation_id: whose machines may be ended here; another's in the same account are never touched.
        tags: on everything that is made, beside ours, e.g. the organization's.
        types: which instance type is chosen for what a node asks for; default: the catalogue that ships with us.
        clock: in seconds, for what is remembered for a while.

    ``PREFER_SPOT`` is no launch of its own: the workflow asks for SPOT, then for ON_DEMAND under a new generation, so
    that the bytes under one token never change.
    """

    def __init__(
        self,
        config: AwsConfig,
        session: AwsSession,
        installation_id: str,
        *,
        tags: Mapping[str, str] | None = None,
        types: catalogue.Catalogue | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._session, self._installation_id = config, session, installation_id
        self._tags = dict(tags or {})
        self._types = types or catalogue.shipped()
        self._images = Images(session, clock)
        self._clock = clock
        self._lock = threading.Lock()
        self._fresh: dict[str, tuple[Machine, float]] = {}

    def capabilities(self) -> Capabilities:
        return Capabilities(
            markets=list(Market),
            zones=sorted({subnet.zone for subnet in self._config.subnets}),
            instance_types=None,
            max_cpu_per_node=self._types.max_cpu,
            max_memory_per_node=self._types.max_memory,
            max_gpu_per_node=self._types.max_gpu,
        )

    def launch(self, spec: MachineSpec) -> Machine:
        subnet = self._subnet(spec)
        if spec.market not in (Market.SPOT, Market.ON_DEMAND):
            raise _bad(spec, f"can't be launched as {spec.market}", "Ask for SPOT or ON_DEMAND.")
        size = len(spec.user_data.encode())
        if size > MAX_USER_DATA_BYTES:
            raise _bad(spec, f"has {size} bytes of user-data; EC2 takes {MAX_USER_DATA_BYTES}", "Shorten it.")
        image = self._images.get(self._config.image)
        instance_type = self._instance_type(spec, image)
        try:
            answer = self._session.call(
                "ec2", "RunInstances", spec.node_id, **self._request(spec, subnet, image, instance_type)
            )
        except BadConfig as e:
            return self._refused(spec, subnet, instance_type, e)
        machine = self._machine(answer["Instances"][0])
        answered = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        if (answered - machine.launched_at).total_seconds() > VISIBLE_S:
            return self._launched_before(machine)
        with self._lock:
            now = self._clock()
            self._fresh = {i: kept for i, kept in self._fresh.items() if kept[1] > now}
            self._fresh[machine.machine_id] = (machine, now + VISIBLE_S)
        return machine

    def describe(self, machine_ids: Iterable[str]) -> list[Machine]:
        wanted = [i for i in dict.fromkeys(machine_ids) if _INSTANCE_ID.fullmatch(i)]
        found = {m.machine_id: m for m in self._described(wanted)}
        with self._lock:
            for machine_id in found:
                self._fresh.pop(machine_id, None)  # EC2 knows it: from now on its word counts
            fresh = {i: kept[0] for i, kept in self._fresh.items() if kept[1] > self._clock()}
        both = fresh | found
        return [both[i] for i in wanted if i in both]

    def find(self, token: str) -> Machine | None:
        # By our tag: moto knows no filter by client token, and EC2 indexes both.
        return next(iter(self._filtered([_filter(f"tag:{TOKEN_TAG}", token)])), None)

    def list_owned(self, installation_id: str) -> list[Machine]:
        living = [state for state, ours in _STATES.items() if ours is not MachineState.GONE]
        return self._filtered([_filter(f"tag:{OWNER_TAG}", installation_id), _filter("instance-state-name", *living)])

    def terminate(self, machine_ids: Iterable[str]) -> None:
        wanted = [i for i in dict.fromkeys(machine_ids) if _INSTANCE_ID.fullmatch(i)]
        living = [
            m.machine_id
            for m in self._described(wanted)
            if m.state is not MachineState.GONE and m.tags.get(OWNER_TAG) == self._installation_id
        ]
        with self._lock:  # launched here, so ours, though EC2 does not show it yet
            hidden = [i for i in wanted if i in self._fresh and i not in living]
        for some in _batches(living):
            self._end(some)
        for one in hidden:
            self._end([one])

    def prune(self, older_than_s: float) -> list[str]:
        """EC2 forgets by itself: instances after an hour or so, tokens a day after their instance."""
        return []

    def console_output(self, machine_id: str) -> str:
        if not _INSTANCE_ID.fullmatch(machine_id):
            return ""
        try:
            try:
                # Without `Latest` EC2 gives what it last kept, some minutes after the boot.
                answer = self._session.call("ec2", "GetConsoleOutput", machine_id, InstanceId=machine_id, Latest=True)
            except BadConfig:  # not on Nitro
                answer = self._session.call("ec2", "GetConsoleOutput", machine_id, InstanceId=machine_id)
        except Gone:
            return ""
        return str(answer.get("Output", ""))

    # -- one request

    def _subnet(self, spec: MachineSpec) -> AwsSubnet:
        """A cluster's nodes of one generation share a zone, as traffic between zones costs money; a new generation
        goes to the next."""
        fit = [s for s in self._config.subnets if spec.zone in (None, s.zone)]
        if not fit:
            zones = ", ".join(sorted({s.zone for s in self._config.subnets}))
            raise _bad(spec, f"asks for zone {spec.zone}, of which the cloud has no subnet", f"Use one of {zones}.")
        return fit[(zlib.crc32(spec.cluster_id.encode()) + spec.generation) % len(fit)]

    def _instance_type(self, spec: MachineSpec, image: Image) -> str:
        if spec.instance_type is not None:
            return spec.instance_type
        if not (spec.cpu or spec.memory or spec.gpu):
            return self._config.instance_type
        fit = self._types.candidates(spec.cpu or 0, spec.memory, spec.gpu, architecture=image.architecture)
        if not fit:
            memory = "" if spec.memory is None else f", {spec.memory} bytes of memory"
            raise _bad(
                spec,
                f"asks for {spec.cpu or 0:g} CPUs{memory} and {spec.gpu} GPUs ({image.architecture}): no type has them",
                "Ask for less, or name an instance type.",
            )
        return fit[0].name

    def _request(self, spec: MachineSpec, subnet: AwsSubnet, image: Image, instance_type: str) -> dict[str, Any]:
        tags = {
            "Name": f"heliostat {spec.node_id}",
            **self._tags,
            **spec.tags,
            OWNER_TAG: spec.installation_id,
            CLUSTER_TAG: spec.cluster_id,
            NODE_TAG: spec.node_id,
            TOKEN_TAG: spec.token,
            # So that EC2 itself refuses another request of ours that would give it the same arguments.
            REQUEST_TAG: _digest(spec),
            GENERATION_TAG: str(spec.generation),
        }
        listed = [{"Key": key, "Value": value} for key, value in sorted(tags.items())]
        request: dict[str, Any] = {
            "ClientToken": spec.token,
            "MinCount": 1,
            "MaxCount": 1,
            "ImageId": image.id,
            "InstanceType": instance_type,
            "SubnetId": subnet.id,
            "SecurityGroupIds": self._config.security_groups,
            "IamInstanceProfile": {"Name": self._config.instance_profile},
            "UserData": spec.user_data,  # boto3 makes it base64
            "InstanceInitiatedShutdownBehavior": "terminate",  # a node ends itself by `shutdown`
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
            "BlockDeviceMappings": [
                {
                    "DeviceName": image.root_device,
                    "Ebs": {
                        "VolumeSize": max(self._config.root_volume_gib, image.root_gib),
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
        if spec.market is Market.SPOT:
            request["InstanceMarketOptions"] = {
                "MarketType": "spot",
                "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
            }
        return request

    def _refused(self, spec: MachineSpec, subnet: AwsSubnet, instance_type: str, error: BadConfig) -> Machine:
        """What EC2 refuses for good, looked at again; raises, or gives the machine that there is."""
        code = error.details.get("code")
        if code == "IdempotentParameterMismatch":
            return self._under_the_same_token(spec, error)
        if code == "Unsupported" and "Availability Zone" in error.message:
            message = f"AWS does not offer {instance_type} in zone {subnet.zone}: {error.message}"
            if len(self.capabilities().zones) > 1:
                raise NoCapacity(message, remedy="Another zone may have it.", resource=spec.node_id) from error
            raise BadConfig(message, remedy="Use another instance type.", resource=spec.node_id) from error
        raise error

    def _launched_before(self, machine: Machine) -> Machine:
        """The answer to a launch that was made long ago: it may give the state of then."""
        now = self.describe([machine.machine_id])
        ended = {"state": MachineState.GONE, "reason": "EC2 does not know it any more"}
        return now[0] if now else machine.model_copy(update=ended)

    def _under_the_same_token(self, spec: MachineSpec, error: BadConfig) -> Machine:
        """The token was used with other arguments: by another request of ours, or by this one before the cloud's
        config changed, or the AMI that a parameter names. The latter is the same machine."""
        instance = next(iter(self._instances([_filter(f"tag:{TOKEN_TAG}", spec.token)])), None)
        if instance is None:
            raise CloudError(
                f"EC2 has launched something under the token of node {spec.node_id}, and does not show it (yet).",
                remedy="Try again, or use a new generation of the node.",
                resource=spec.node_id,
            ) from error
        if _tags(instance).get(REQUEST_TAG) == _digest(spec):
            return self._machine(instance)
        raise BadConfig(
            f"Machine {instance['InstanceId']} was launched under the same token with another request.",
            remedy="Use a new generation of the node for another request.",
            resource=spec.node_id,
        ) from error

    # -- asking EC2

    def _end(self, machine_ids: list[str]) -> None:
        """One by one where EC2 does not know one of them, which refuses all."""
        try:
            self._session.call("ec2", "TerminateInstances", machine_ids[0], InstanceIds=machine_ids)
        except Gone:
            for machine_id in machine_ids if len(machine_ids) > 1 else []:
                self._end([machine_id])

    def _described(self, machine_ids: list[str]) -> list[Machine]:
        # By a filter: asked for by id, one that EC2 does not know would refuse all.
        return [m for some in _batches(machine_ids) for m in self._filtered([_filter("instance-id", *some)])]

    def _filtered(self, filters: list[dict[str, Any]]) -> list[Machine]:
        return [self._machine(instance) for instance in self._instances(filters)]

    def _instances(self, filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
        reservations = self._session.pages("ec2", "DescribeInstances", "Reservations", Filters=filters, MaxResults=1000)
        return [instance for reservation in reservations for instance in reservation["Instances"]]

    def _machine(self, instance: dict[str, Any]) -> Machine:
        tags = _tags(instance)
        state = _STATES[instance["State"]["Name"]]
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
            tags={k: v for k, v in tags.items() if k in own or not (k.startswith("heliostat-") or k in self._tags)},
        )


def _tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}


def _filter(name: str, *values: str) -> dict[str, Any]:
    return {"Name": name, "Values": list(values)}


def _batches(ids: list[str]) -> list[list[str]]:
    return [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]


def _digest(spec: MachineSpec) -> str:
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()


def _bad(spec: MachineSpec, what: str, remedy: str) -> BadConfig:
    return BadConfig(f"Node {spec.node_id} {what}.", remedy=remedy, resource=spec.node_id)
