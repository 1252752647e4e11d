"""Machines of an AWS account: one EC2 instance for each node."""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from clouds.aws.account.session import AwsSession
from clouds.aws.machines import advanced, catalogue, instances
from clouds.aws.machines.catalogue import InstanceType
from clouds.aws.machines.images import Image, Images, image_for
from clouds.aws.machines.instances import REQUEST_TAG, TOKEN_TAG
from clouds.aws.machines.orphans import Orphans
from clouds.aws.machines.retained import RetainedStore
from clouds.boot.user_data import MAX_USER_DATA_BYTES
from clouds.contract.errors import BadConfig, Gone, NotOffered
from clouds.contract.machines import OWNER_TAG, Machine, MachineSpec, MachineState
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig, AwsSubnet, Capabilities, Market

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import FilterTypeDef, InstanceTypeDef

VISIBLE_S = 300
"""EC2 is eventually consistent: this long after its launch a machine that EC2 does not show is not missing."""
BATCH = 200
"""Values that one filter of DescribeInstances takes."""

_INSTANCE_ID = re.compile(r"i-[0-9a-f]{8}(?:[0-9a-f]{9})?")


class AwsMachines:
    """EC2 instances (``clouds.contract.machines.Machines``).

    Calls: one RunInstances for each machine; describe, list and terminate one or two for each batch of up to 200; the
    image is looked up once an hour for all.

    Args:
        config: where machines go.
        session: of the same account and region.
        installation_id: whose machines may be ended here; another's in the same account are never touched.
        tags: on everything that we create, besides ours, e.g. the organization's.
        types: which instance type is chosen for what a node asks for; default: the catalogue that ships with us.
        clock: in seconds, for what is remembered for a while.

    ``PREFER_SPOT`` is not a single launch: the workflow asks for SPOT, then for ON_DEMAND under a new generation, so
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
        self._orphans = Orphans(session, clock)
        self._retained = RetainedStore(config, session, installation_id, self._tags)
        self._lock = threading.Lock()
        self._fresh: dict[str, tuple[Machine, float]] = {}

    def capabilities(self) -> Capabilities:
        return Capabilities(
            markets=list(Market),
            zones=list(dict.fromkeys(subnet.zone for subnet in self._config.subnets)),
            instance_types=None,
            max_cpu_per_node=self._types.max_cpu,
            max_memory_per_node=self._types.max_memory,
            max_gpu_per_node=self._types.max_gpu,
            keeps=True,
        )

    def launch(self, spec: MachineSpec) -> Machine:
        subnets = self._subnets(spec)
        if spec.market not in (Market.SPOT, Market.ON_DEMAND):
            raise _bad(spec, f"cannot be launched as {spec.market}", "Request SPOT or ON_DEMAND.")
        size = len(spec.user_data.encode())
        if size > MAX_USER_DATA_BYTES:
            raise _bad(spec, f"has {size} bytes of user-data; EC2 takes {MAX_USER_DATA_BYTES}", "Shorten it.")
        advanced.check(spec.advanced, spec.keep)
        instance_type, known = self._instance_type(spec)
        image = self._image(spec, instance_type, known)
        subnet, retained = self._retained.prepare(spec, spec.keep, subnets) if spec.keep else (subnets[0], None)
        request = instances.request(self._config, spec, subnet.id, image, instance_type, self._tags, retained)
        try:
            answer = self._session.call("ec2", "RunInstances", spec.node_id, **request)
        except BadConfig as e:
            return self._refused(spec, subnet, instance_type, e)
        machine = self._machine(answer["Instances"][0])
        answered = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        if (answered - machine.launched_at).total_seconds() > VISIBLE_S:
            return self._launched_before(machine)
        with self._lock:
            now = self._clock()
            self._fresh = {i: entry for i, entry in self._fresh.items() if entry[1] > now}
            self._fresh[machine.machine_id] = (machine, now + VISIBLE_S)
        return machine

    def describe(self, machine_ids: Iterable[str]) -> list[Machine]:
        wanted = [i for i in dict.fromkeys(machine_ids) if _INSTANCE_ID.fullmatch(i)]
        found = {m.machine_id: m for m in self._described(wanted)}
        with self._lock:
            fresh = {i: entry[0] for i, entry in self._fresh.items() if entry[1] > self._clock()}
        both = fresh | found
        return [both[i] for i in wanted if i in both]

    def find(self, token: str) -> Machine | None:
        # By our tag: moto knows no filter by client token, and EC2 indexes both.
        return next(iter(self._filtered([_filter(f"tag:{TOKEN_TAG}", token)])), None)

    def list_owned(self, installation_id: str) -> list[Machine]:
        living = [state for state, ours in instances.STATES.items() if ours is not MachineState.GONE]
        return self._filtered([_filter(f"tag:{OWNER_TAG}", installation_id), _filter("instance-state-name", *living)])

    def terminate(self, machine_ids: Iterable[str]) -> None:
        wanted = [i for i in dict.fromkeys(machine_ids) if _INSTANCE_ID.fullmatch(i)]
        known = {m.machine_id: m for m in self._described(wanted)}
        ours = [
            m.machine_id
            for m in known.values()
            if m.state is not MachineState.GONE and m.tags.get(OWNER_TAG) == self._installation_id
        ]
        with self._lock:  # launched here, so ours, though EC2 does not show it yet
            hidden = [i for i in wanted if i in self._fresh and i not in known]
        failed = [e for some in [*_batches(ours), *([i] for i in hidden)] for e in self._end(some)]
        if failed:
            raise failed[0]

    def forget_ended(self, older_than_s: float) -> list[str]:
        """EC2 does this by itself: instances after an hour or so, tokens a day after their instance."""
        return []

    def attach_retained(self, cluster_id: str, machine_id: str | None) -> None:
        if machine_id is None:
            self._retained.release(cluster_id)
        else:
            self._retained.attach(cluster_id, machine_id)

    def delete_orphans(
        self, installation_id: str, older_than_s: float, lives: Callable[[str], bool] = lambda cluster_id: True
    ) -> list[str]:
        return self._orphans.clear(installation_id, older_than_s, lives)

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

    def _subnets(self, spec: MachineSpec) -> list[AwsSubnet]:
        """Those that it may go to, the choice first. A cluster's nodes of one generation share a zone, as traffic
        between zones costs money; a new generation goes to the next."""
        fit = [s for s in self._config.subnets if spec.zone in (None, s.zone)]
        if not fit:
            zones = ", ".join(sorted({s.zone for s in self._config.subnets}))
            raise _bad(spec, f"requests zone {spec.zone}, in which the cloud has no subnet", f"Use one of {zones}.")
        first = (zlib.crc32(spec.cluster_id.encode()) + spec.generation) % len(fit)
        return fit[first:] + fit[:first]

    def _instance_type(self, spec: MachineSpec) -> tuple[str, InstanceType | None]:
        """Its name, and what is known of it."""
        name = spec.instance_type
        if name is None and not (spec.cpu or spec.memory or spec.gpu or spec.accelerator or spec.cpu_architecture):
            name = self._config.instance_type
        if name is not None:
            return name, self._types.types.get(name)
        architecture = spec.cpu_architecture or "x86_64"
        fit = self._types.candidates(spec.cpu or 0, spec.memory, spec.gpu, spec.accelerator or "", architecture)
        if not fit:
            memory = "" if spec.memory is None else f", {spec.memory} bytes of memory"
            gpus = f"{spec.gpu} GPUs" + (f" {spec.accelerator}" if spec.accelerator else "")
            raise _bad(
                spec,
                f"asks for {spec.cpu or 0:g} CPUs{memory} and {gpus} ({architecture}): no instance type has them",
                "Request less, or name an instance type.",
            )
        return fit[0].name, fit[0]

    def _image(self, spec: MachineSpec, instance_type: str, known: InstanceType | None) -> Image:
        named = spec.advanced.get("ImageId")
        if named is None:
            named = image_for(self._config, known)
        image = self._images.get(named)
        if known is not None and image.architecture != known.architecture:
            raise _bad(
                spec,
                f"is {instance_type} ({known.architecture}), and image {image.id} is for {image.architecture}",
                "Change the cloud's image, or name another instance type.",
            )
        return image

    def _refused(self, spec: MachineSpec, subnet: AwsSubnet, instance_type: str, error: BadConfig) -> Machine:
        """What EC2 refuses for good, looked at again; raises, or gives the machine that there is."""
        code = error.details.get("code")
        if code in ("IdempotentParameterMismatch", "IdempotentInstanceTerminated"):
            return self._under_the_same_token(spec, error)
        if code in ("InvalidNetworkInterface.InUse", "InvalidNetworkInterfaceID.NotFound") and spec.keep:
            raise CloudError(error.message, remedy="Try again: the head before has it, or EC2 does not show it yet.",
                             resource=spec.node_id, details=error.details) from error  # fmt: skip
        if code == "Unsupported" and "Availability Zone" in error.message:
            raise NotOffered(
                f"AWS does not offer {instance_type} in zone {subnet.zone}: {error.message}",
                remedy="Use another instance type or zone.",
                resource=spec.node_id,
            ) from error
        raise error

    def _launched_before(self, machine: Machine) -> Machine:
        """The answer to a repeated launch: it may give the state of that time."""
        now = self.describe([machine.machine_id])
        ended = {"state": MachineState.GONE, "reason": "EC2 no longer knows it"}
        return now[0] if now else machine.model_copy(update=ended)

    def _under_the_same_token(self, spec: MachineSpec, error: BadConfig) -> Machine:
        """The token was used with other arguments: by another request of ours, or by this one before the cloud's
        config changed, or the AMI that a parameter names. The latter is the same machine. Or its machine has ended."""
        instance = next(iter(self._instances([_filter(f"tag:{TOKEN_TAG}", spec.token)])), None)
        if instance is None:
            raise CloudError(
                f"EC2 has launched an instance under the token of node {spec.node_id}, but does not show it yet.",
                remedy="Try again, or use a new generation of the node.",
                resource=spec.node_id,
            ) from error
        if instances.tags_of(instance).get(REQUEST_TAG) == spec.digest():
            return self._machine(instance)
        raise BadConfig.same_token(instance["InstanceId"], spec.node_id) from error

    # -- asking EC2

    def _end(self, machine_ids: list[str]) -> list[CloudError]:
        """Why some could not be ended. One by one where EC2 refuses all of them for one: it does not know that one, or
        somebody has protected it (https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_TerminateInstances.html).
        """
        try:
            self._session.call("ec2", "TerminateInstances", machine_ids[0], InstanceIds=machine_ids)
        except CloudError as e:
            gone = isinstance(e, Gone)
            if len(machine_ids) > 1 and (gone or e.details.get("code") == "OperationNotPermitted"):
                return [failed for machine_id in machine_ids for failed in self._end([machine_id])]
            return [] if gone else [e]
        return []

    def _described(self, machine_ids: list[str]) -> list[Machine]:
        # By a filter: by id, one unknown to EC2 would fail the whole call.
        return [m for some in _batches(machine_ids) for m in self._filtered([_filter("instance-id", *some)])]

    def _filtered(self, filters: list[FilterTypeDef]) -> list[Machine]:
        return [self._machine(instance) for instance in self._instances(filters)]

    def _instances(self, filters: list[FilterTypeDef]) -> list[InstanceTypeDef]:
        reservations = self._session.pages("ec2", "DescribeInstances", "Reservations", Filters=filters, MaxResults=1000)
        return [instance for reservation in reservations for instance in reservation["Instances"]]

    def _machine(self, instance: InstanceTypeDef) -> Machine:
        return instances.machine(instance, self._tags)


def _filter(name: str, *values: str) -> FilterTypeDef:
    return {"Name": name, "Values": list(values)}


def _batches(ids: list[str]) -> list[list[str]]:
    return [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]


def _bad(spec: MachineSpec, what: str, remedy: str) -> BadConfig:
    return BadConfig(f"Node {spec.node_id} {what}.", remedy=remedy, resource=spec.node_id)
