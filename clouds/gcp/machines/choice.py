"""Chooses the machine type of a node on Google Cloud, or says why there is none. No call is made here."""

from __future__ import annotations

from clouds.contract.errors import BadConfig
from clouds.contract.machines import MachineSpec
from clouds.gcp.account.operations import label
from clouds.gcp.machines import advanced, instance
from clouds.gcp.machines.catalogue import Catalogue, MachineType, disk_of, parts
from heliostat.models.clouds import GcpConfig

_ARM = ("t2a-", "c4a-", "n4a-", "a4x-")
_WITH_GPUS = ("a2-", "a3-", "a4-", "a4x-", "g2-", "g4-")


def chosen(spec: MachineSpec, config: GcpConfig, types: Catalogue) -> MachineType:
    """The machine type. One that is named is taken as it is: CPUs and GPUs beside it are what Ray is told. Raises
    BadConfig."""
    advanced.check(spec.advanced, spec.keep)
    refused = ""
    asks = spec.cpu or spec.memory or spec.gpu or spec.accelerator or spec.cpu_architecture
    if spec.zone is not None and spec.zone not in config.zones:
        refused = f"{spec.zone!r} is none of the cloud's zones ({', '.join(config.zones)})"
    elif len(spec.user_data.encode()) > instance.MAX_USER_DATA_BYTES:
        refused = f"the start-up script has {len(spec.user_data.encode())} bytes, more than 256 KiB"
    elif label(spec.installation_id) != spec.installation_id:
        refused = f"the installation's id {spec.installation_id!r} cannot be a label's value"
    elif spec.instance_type is None and asks:
        architecture = spec.cpu_architecture or "x86_64"
        fit = types.candidates(spec.cpu or 0, spec.memory, spec.gpu, spec.accelerator or "", architecture)
        if fit:
            return fit[0]
        gpus = f"{spec.gpu} GPUs" + (f" {spec.accelerator}" if spec.accelerator else "")
        refused = f"no machine type has {spec.cpu or 0:g} CPUs, {spec.memory or 0} bytes of memory, {gpus}"
        refused += f" ({architecture})"
    else:
        name = spec.instance_type or config.instance_type
        if config.instance_types is not None and name not in config.instance_types:
            refused = f"{name!r} is none of the cloud's instance types ({', '.join(config.instance_types)})"
        elif (kind := _named(types, name)) is not None:
            return kind
        else:
            refused = f"{name!r} is not a valid machine type"
    raise BadConfig(
        f"The cloud in project {config.project} cannot have node {spec.node_id}: {refused}.",
        remedy="Change the compute config.",
        resource=spec.node_id,
    )


def _named(types: Catalogue, name: str) -> MachineType | None:
    """The type of that name; one that is in no catalogue is Google's to know."""
    found = parts(name)
    if name in types.types or found is None:
        return types.types.get(name)
    machine, accelerator, count = found
    gpus = count or int(machine.startswith(_WITH_GPUS))
    arm = "arm64" if machine.startswith(_ARM) else "x86_64"
    return MachineType(name, 0, 0, gpus, accelerator, arm, choosable=False, disk=disk_of(machine))
