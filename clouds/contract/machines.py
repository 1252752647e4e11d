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
"""Every thing that we make carries this tag with our installation's id; the sweep touches nothing else."""
CLUSTER_TAG = "heliostat-cluster"
NODE_TAG = "heliostat-node"


class MachineState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    GONE = "gone"


class MachineSpec(Model):
    """One machine to launch. The same (slot, generation) of a cluster always gives the same bytes."""

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
    """Fields of the vendor's own launch request, put over ours."""
    keep: RetainedResources | None = None
    """Of a head: what it has from the one before, or begins to have for the next one."""

    def digest(self) -> str:
        """sha256 of the whole request, user-data included; hex. What was added to the fields since machines were first
        tagged with it counts only if it is given, so that an upgrade changes no digest."""
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
        """Asks for one machine and returns as soon as the cloud has accepted, without waiting for boot.

        Idempotent by ``spec.token``: the second call returns the first one's machine, also when that has
        ended since (it must never boot twice); other arguments under the same token raise BadConfig.
        Where no instance type is named, the best one of the catalogue that satisfies the request is picked.
        With ``spec.keep`` it makes what is to be kept where there is none yet; NotOffered where a head has had it
        elsewhere.
        Raises NoCapacity (NotOffered among it), QuotaExceeded, Throttled, BadConfig, Denied; any other CloudError may
        be tried again.
        """
        ...

    def describe(self, machine_ids: Iterable[str]) -> list[Machine]:
        """The machines among ``machine_ids`` that the cloud still knows; a missing one is gone. One call a batch."""
        ...

    def find(self, token: str) -> Machine | None:
        """The machine launched under this token, if the cloud knows one (after a lost answer)."""
        ...

    def list_owned(self, installation_id: str) -> list[Machine]:
        """Every machine that carries our owner tag and is not gone, ours by this installation's id only."""
        ...

    def terminate(self, machine_ids: Iterable[str]) -> None:
        """Asks the cloud to end them (a power cut: no grace inside). Already gone is done. Returns before
        they are gone: see ``describe``. Never touches a machine without our owner tag."""
        ...

    def attach_retained(self, cluster_id: str, machine_id: str | None) -> None:
        """What the cluster keeps (``MachineSpec.keep``) goes to this machine, which was launched with it; what launches
        in vain have left elsewhere is deleted. None: the cluster is over, and all of it is deleted. Nothing to hand
        over, or done already, is done. Raises CloudError when it is too early (the machine does not run yet, or the one
        before still holds it): repeat the call; Gone when that machine has ended."""
        ...

    def forget_ended(self, older_than_s: float) -> list[str]:
        """Drops what is kept for us of machines that ended longer ago than that (directories, retained console
        output) and gives their ids; nothing where the cloud itself forgets. Their tokens may boot again
        afterwards, so pass a day at least."""
        ...

    def delete_orphans(
        self, installation_id: str, older_than_s: float, lives: Callable[[str], bool] = lambda cluster_id: True
    ) -> list[str]:
        """Deletes what carries our owner tag beside machines, belongs to none (disks, network interfaces) and has been
        there for longer than that, and gives the ids; one that a machine takes meanwhile is spared. Raises, after all
        were tried, what the first that failed did. Nothing where a machine leaves nothing behind.

        Args:
            lives: whether a cluster is not known to be over, asked after the list was read: what its head is to hand on
                is spared, though between two heads it belongs to no machine.
        """
        ...

    def console_output(self, machine_id: str) -> str:
        """Tail of what the machine printed at boot, "" if there is none; for the reason of a node that
        never registered."""
        ...
