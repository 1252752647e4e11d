"""What a cloud must do. The docstrings are the contract; ``tests/clouds/test_contract.py`` runs it
against every implementation, fakes included.

All methods are synchronous (boto3 is; activities run them on threads), safe to call from several
threads, and safe to call again with the same arguments: a lost answer is the normal case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from pydantic import Field

from clouds.keeps import Keep
from heliostat.errors import CloudError
from heliostat.models.clouds import Capabilities, Market
from heliostat.models.clusters import NodeRole
from heliostat.models.common import Model, Result
from heliostat.models.compute_configs import Architecture

OWNER_TAG = "heliostat-installation"
"""Every thing that we make carries this tag with our installation's id; the sweep touches nothing else."""
CLUSTER_TAG = "heliostat-cluster"
NODE_TAG = "heliostat-node"


class NoCapacity(CloudError):
    """The cloud has no such machine now: try another zone, type or market, or wait."""

    code = "no_capacity"


class NotOffered(NoCapacity):
    """This zone never has that instance type: another zone or type may, and waiting does not help."""

    code = "not_offered"
    status = 422


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


class Outdated(CloudError):
    """The thing goes by a newer revision than the one given, or by another word of the same one: nothing was changed.
    ``details["revision"]`` is the one that it goes by; only a greater one changes it."""

    code = "outdated"
    status = 409

    @classmethod
    def backends(cls, service_id: str, given: int, has: int) -> Outdated:
        return cls(
            f"The load balancer of service {service_id} has backends of revision {has}: those of revision {given} are "
            f"{'others' if given == has else 'older'}, and were not taken.",
            remedy=f"Give what is wanted now under a revision above {has}.",
            resource=service_id,
            details={"revision": has},
        )


class BackendsLost(CloudError):
    """The endpoint no longer knows which backends it should have: say them anew by ``set_backends``, under whatever
    revision. It goes on by what it has, as long as that runs."""

    code = "backends_lost"


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
    accelerator: str | None = None
    """Which GPUs, where no instance type is named (``clouds.shapes.is_accelerator``)."""
    cpu_architecture: Architecture | None = None
    """Where no instance type is named; None: x86_64."""
    advanced: dict[str, Any] = {}
    """Fields of the vendor's own launch request, put over ours."""
    keep: Keep | None = None
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
        Where no instance type is named, one is picked that has what is asked for, the best of the catalogue.
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
        they are gone: ``describe`` tells. Never touches a machine without our owner tag."""
        ...

    def hand_over(self, cluster_id: str, machine_id: str | None) -> None:
        """What the cluster keeps (``MachineSpec.keep``) goes to this machine, which was launched with it; what launches
        in vain have left elsewhere is deleted. None: the cluster is over, and all of it is deleted. Nothing to hand
        over, or done already, is done. Raises CloudError when it is too early (the machine does not run yet, or the one
        before still holds it): repeat the call; Gone when that machine has ended."""
        ...

    def prune(self, older_than_s: float) -> list[str]:
        """Drops what is kept for us of machines that ended longer ago than that (directories, retained console
        output) and gives their ids; nothing where the cloud itself forgets. Their tokens may boot again
        afterwards, so nobody asks for less than a day."""
        ...

    def leftovers(
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

    def put_headers(self, *, sha256: str | None = None) -> dict[str, str]:
        """What a PUT to the URL of ``presign_put`` must carry beside its length, for the same ``sha256``."""
        ...


class EndpointSpec(Model):
    """One service's endpoint. The same service always gives the same bytes, but for ``grpc``."""

    service_id: str
    service_name: str
    installation_id: str
    grpc: bool = False
    """Some application of it speaks gRPC: requests of content type ``application/grpc`` go to the gRPC addresses."""


class Endpoint(Result):
    service_id: str
    url: str
    """Where people reach it, without a slash at its end: ``http://…`` or ``https://…``; gRPC at the same host and
    port."""
    state: str = "ready"
    """``ready``, or what it waits for."""


class Backend(Model):
    """One cluster of one version: its head's proxy."""

    id: str
    """The cluster's."""
    version_id: str
    http: str
    """``ip:port``."""
    grpc: str = ""
    weight: int = Field(ge=0)
    """Of this backend's *version*, the same for each of its clusters that have traffic: the version's share is weight /
    sum over versions, its clusters share it alike. 0: no traffic but that which names the backend
    (``BACKEND_HEADER``)."""


class BackendCounters(Result):
    """Since the load balancer's start; a smaller number than before means that it has started anew. An attempt that is
    retried on another backend counts at both."""

    backend_id: str
    version_id: str
    requests: dict[str, int] = {}
    """By status code, e.g. ``{"200": 17}``."""
    up: bool = True
    """By the load balancer's own health checks."""


class LoadBalancer(Protocol):
    """Endpoints of one cloud's services, in the data plane: they answer on while the control plane is away.

    What every implementation does with a request: it is sent to one of the backends by weight, or to the one that
    ``heliostat.models.services.BACKEND_HEADER`` names (503 when there is none such); one whose backend does not take it
    (connection refused or reset before the answer began) is tried on another if its method is idempotent; streams,
    websockets, large bodies and gRPC pass; a backend that does not answer ``GET /-/healthz`` gets no traffic, unless
    it is the only one that may have any. Tokens are checked by the backends.
    """

    def ensure(self, spec: EndpointSpec, *, make: bool = True) -> Endpoint:
        """Makes the endpoint, or mends it: starts what of it does not run, writes anew what is missing or garbled,
        takes a renewed certificate. Its URL stays the same for the service's life. Without backends it answers 503.

        Args:
            make: whether to make one where there is none; else that is Gone.

        Raises BadConfig (its port is taken by another program, its certificate is unreadable), BackendsLost, Denied,
        Throttled; any other CloudError may be tried again."""
        ...

    def set_backends(self, service_id: str, revision: int, backends: list[Backend]) -> None:
        """Replaces all backends and weights at once; returns when new requests go by them. Requests that are under way
        are not touched. The last call's repeat (same revision, same backends) is done. Raises Outdated, and changes
        nothing, for a smaller revision than the last one's and for other backends under the same one; Gone when there
        is no such endpoint."""
        ...

    def counters(self, service_id: str) -> list[BackendCounters]:
        """Of the backends that it has now. Raises Gone."""
        ...

    def describe(self, service_id: str) -> Endpoint | None:
        """None: there is none. Its ``state`` is ``ready`` only if there is nothing to be done for it by ``ensure`` or
        ``set_backends``. Cheap: the monitor asks for every service every few seconds. Raises Denied; any other
        CloudError may be tried again."""
        ...

    def remove(self, service_id: str) -> None:
        """Ends it and all that belongs to it. Already gone is done."""
        ...

    def list_owned(self, installation_id: str) -> list[str]:
        """Service ids of every endpoint that carries our owner tag with this installation's id."""
        ...
