"""What a cloud's machines must do; ``tests/clouds/contract/test_machines.py`` runs it against every provider."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from clouds.contract.retained import RetainedResources
from heliostat.models.clouds import Capabilities, Market
from heliostat.models.clusters import NodeRole
from heliostat.models.common import Model, Result
from heliostat.models.compute_configs import Architecture

OWNER_TAG = "heliostat-installation"
"""Every resource that Heliostat creates carries this tag with the installation's id; the sweep touches nothing else."""
CLUSTER_TAG = "heliostat-cluster"
NODE_TAG = "heliostat-node"


class MachineState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    GONE = "gone"


class MachineSpec(Model):
    """One machine to launch. The same (slot, generation) of a cluster always gives the same bytes. Names of fields are
    part of ``digest``, which machines carry as a tag: they never change."""

    token: str
    """Idempotency token: uuid5(cluster id, slot, generation)."""
    cluster_id: str
    node_id: str
    generation: int
    role: NodeRole
    installation_id: str
    instance_type: str | None = None
    cpu: float | None = None
    memory: int | None = None
    gpu: int = 0
    zone: str | None = None
    market: Market = Market.ON_DEMAND
    user_data: str
    """What the machine runs at first boot (``clouds.boot.user_data``); holds no presigned URL."""
    tags: dict[str, str] = {}
    accelerator: str | None = None
    """Which GPUs, where no instance type is named (``clouds.instance_types.is_accelerator``)."""
    cpu_architecture: Architecture | None = None
    """Where no instance type is named; None: x86_64."""
    advanced: dict[str, Any] = {}
    """Fields of the vendor's own launch request, merged over Heliostat's."""
    keep: RetainedResources | None = None
    """Of a head: the resources that the cluster retains for its next head."""

    def digest(self) -> str:
        """sha256 of the whole request, user-data included; hex. Fields that were added later count only if they are
        set, so that an upgrade changes no digest."""
        later = {"accelerator", "cpu_architecture", "advanced", "keep"}
        unset = {name for name in later if not getattr(self, name)}
        return hashlib.sha256(self.model_dump_json(exclude=unset).encode()).hexdigest()


class Machine(Result):
    machine_id: str
    node_id: str | None
    cluster_id: str | None
    state: MachineState
    ip: str | None = None
    launched_at: datetime
    reason: str = ""
    """Why it ended, as far as the cloud knows."""
    tags: dict[str, str] = {}


class Machines(Protocol):
    """Machines of one cloud."""

    def capabilities(self) -> Capabilities:
        """What can be requested; read once, when the cloud is registered or the server starts."""
        ...

    def launch(self, spec: MachineSpec) -> Machine:
        """Launches one machine and returns as soon as the cloud accepts, without waiting for its boot.

        Idempotent by ``spec.token``: a second call returns the same machine, even if it has ended (it must never boot
        twice); other arguments under the same token raise BadConfig.
        Where no instance type is named, the best one of the catalogue that satisfies the request is picked.
        With ``spec.keep`` it creates the retained resources that are missing; NotOffered where an earlier head has them
        in another zone.
        Raises NoCapacity (NotOffered among it), QuotaExceeded, Throttled, BadConfig, Denied; any other CloudError may
        be tried again.
        """
        ...

    def describe(self, machine_ids: Iterable[str]) -> list[Machine]:
        """Those machines that the cloud still knows; a missing one is gone. One call for a batch."""
        ...

    def find(self, token: str) -> Machine | None:
        """The machine launched under this token, if the cloud knows one (after a lost answer)."""
        ...

    def list_owned(self, installation_id: str) -> list[Machine]:
        """Every machine that carries our owner tag and is not gone, ours by this installation's id only."""
        ...

    def terminate(self, machine_ids: Iterable[str]) -> None:
        """Tells the cloud to end them at once, without a graceful shutdown. Already gone is done. Returns before
        they are gone: see ``describe``. Never touches a machine without our owner tag."""
        ...

    def attach_retained(self, cluster_id: str, machine_id: str | None) -> None:
        """Attaches the cluster's retained resources (``MachineSpec.keep``) to this machine, which was launched with
        them, and deletes those that failed launches left in other zones. None: the cluster has ended, and all of them
        are deleted. Nothing to attach, or attached already, is done.

        Raises CloudError when it is too early (the machine does not run yet, or the previous one still holds them):
        repeat the call. Raises Gone when that machine has ended."""
        ...

    def forget_ended(self, older_than_s: float) -> list[str]:
        """Drops what remains of machines that ended longer ago than that (directories, console output) and returns
        their ids; nothing where the cloud itself forgets. Their tokens may boot again afterwards, so pass a day at
        least."""
        ...

    def delete_orphans(
        self, installation_id: str, older_than_s: float, lives: Callable[[str], bool] = lambda cluster_id: True
    ) -> list[str]:
        """Deletes disks and network interfaces that carry our owner tag, are older than that and belong to no machine,
        and returns their ids; one that a machine takes meanwhile is spared. Raises the first failure after all were
        tried. Nothing where a machine leaves nothing behind.

        Args:
            lives: whether a cluster may still live. It is called after the list was read. A living cluster's retained
                resources are spared, although between two heads they belong to no machine.
        """
        ...

    def console_output(self, machine_id: str) -> str:
        """Tail of what the machine printed at boot, "" if there is none; for the reason of a node that
        never registered."""
        ...
