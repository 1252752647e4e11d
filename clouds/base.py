"""What a cloud must do. The docstrings are the contract; ``tests/clouds/test_contract.py`` runs it
against every implementation, fakes included.

All methods are synchronous (boto3 is; activities run them on threads), safe to call from several
threads, and safe to call again with the same arguments: a lost answer is the normal case.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from heliostat.errors import CloudError
from heliostat.models.clouds import Capabilities, Market
from heliostat.models.clusters import NodeRole
from heliostat.models.common import Model, Result

OWNER_TAG = "heliostat-installation"
"""Every thing that we make carries this tag with our installation's id; the sweep touches nothing else."""
CLUSTER_TAG = "heliostat-cluster"
NODE_TAG = "heliostat-node"


class NoCapacity(CloudError):
    """The cloud has no such machine now: try another zone, type or market, or wait."""

    code = "no_capacity"


class QuotaExceeded(CloudError):
    """The account's limit is reached: wait or raise it."""

    code = "quota_exceeded"


class Throttled(CloudError):
    """Too many calls: the same call again, later."""

    code = "throttled"
    status = 503


class BadConfig(CloudError):
    """The cloud refuses this request for good: nothing but another request helps."""

    code = "bad_config"
    status = 422


class Denied(CloudError):
    """Our right is missing: the operator must grant it."""

    code = "denied"


class Gone(CloudError):
    """The thing does not exist any more. Deletes treat this as done and never raise it."""

    code = "gone"
    status = 404


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
    """What the machine runs at first boot (``clouds.bootstrap``); holds no presigned URL."""
    tags: dict[str, str] = {}


class Machine(Result):
    machine_id: str
    node_id: str | None
    cluster_id: str | None
    state: MachineState
    ip: str | None = None
    launched_at: datetime
    reason: str = ""
    """Why it ended, as far as the cloud tells."""
    tags: dict[str, str] = {}


class Machines(Protocol):
    """Machines of one cloud."""

    def capabilities(self) -> Capabilities:
        """What can be asked for; read once, when the cloud is registered or the server starts."""
        ...

    def launch(self, spec: MachineSpec) -> Machine:
        """Asks for one machine and returns as soon as the cloud has accepted, without waiting for boot.

        Idempotent by ``spec.token``: the second call returns the first one's machine, also when that has
        ended since (it must never boot twice); other arguments under the same token raise BadConfig.
        Raises NoCapacity, QuotaExceeded, Throttled, BadConfig, Denied; any other CloudError may be tried again.
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
        they are gone: ``describe`` tells. Never touches a machine without our owner tag."""
        ...

    def prune(self, older_than_s: float) -> list[str]:
        """Drops what is kept for us of machines that ended longer ago than that (directories, retained console
        output) and gives their ids; nothing where the cloud itself forgets. Their tokens may boot again
        afterwards, so nobody asks for less than a day."""
        ...

    def console_output(self, machine_id: str) -> str:
        """Tail of what the machine printed at boot, "" if there is none; for the reason of a node that
        never registered."""
        ...


class StoredObject(Result):
    key: str
    size: int
    modified_at: datetime


class Bucket(Protocol):
    """Objects of one cloud: code and logs. Keys are ``/``-separated, written whole (a reader never sees half
    of an object), last write wins."""

    def put(self, key: str, data: bytes) -> None: ...

    def get(self, key: str) -> bytes:
        """Raises Gone."""
        ...

    def stat(self, key: str) -> StoredObject | None: ...

    def list(self, prefix: str, start_after: str = "") -> list[StoredObject]:
        """All objects under ``prefix`` in key order."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Already gone is done."""
        ...

    def presign_get(self, key: str, expires_in_s: int) -> str:
        """URL that anyone may GET (Range honoured) until it expires."""
        ...

    def presign_put(self, key: str, expires_in_s: int, *, size: int | None = None, sha256: str | None = None) -> str:
        """URL that anyone may PUT one object to until it expires. With ``size``/``sha256`` the bucket refuses
        other bytes (HTTP 400); a full disk is 507."""
        ...
