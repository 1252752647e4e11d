"""The shape of a cluster. Field names and defaults follow Anyscale's ``ComputeConfig``
(research/anyscale.md §4) plus the two limits that only its API had.

A field of that platform which this Heliostat does not carry out is refused by name
(:class:`~heliostat.errors.NotHonoured`), see :data:`NOT_SUPPORTED`."""

from __future__ import annotations

import json
import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from heliostat.models.clouds import Market
from heliostat.models.common import Model, Name, Result

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

MAX_RESOURCE = 100e12
MIN_OBJECT_STORE = 75 * 2**20
LABEL_KEY = re.compile(
    r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
)
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
"""What `ray start` (2.60) takes; its "no" would come minutes later, from every machine that is tried."""

MAX_NODES_DEFAULT = 10
"""Anyscale's default of ``max_nodes`` (research/anyscale.md §4)."""

MAX_NODES_PER_CLUSTER = 1000
"""Bound on one cluster: its nodes are the state of one workflow, 2 MB a payload (research/temporal.md §5)."""

MAX_INSTANCE_TYPES = 20
"""That one group tries: with zones and markets they are the places of a walk."""

MAX_ADVANCED_BYTES = 8 * 1024
"""Of an ``advanced_instance_config`` as JSON: every launch carries it through the cluster's history."""

InstanceTypeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,80}$")]

DEFAULT_CPU, DEFAULT_GPU = "default-cpu", "default-gpu"
"""Compute configs that every cloud has, unless the project has one of that name."""


class Architecture(StrEnum):
    X86_64 = "x86_64"
    ARM64 = "arm64"


def parse_bytes(text: str | int) -> int:
    """``"8Gi"`` or a number of bytes → bytes. Raises ValueError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]i?|)B?", text.strip())
    if not match or match[2] == "ki":
        raise ValueError(f"{text!r} is not a size: write bytes or e.g. '8Gi'")
    return int(float(match[1]) * UNITS[match[2]])


class PhysicalResources(Model):
    """What the machine must have."""

    CPU: int = Field(gt=0, le=512)
    memory: int | None = Field(default=None, ge=2**20)
    """Bytes, or text such as ``"8Gi"``."""
    GPU: int = Field(default=0, ge=0, le=16)
    accelerator: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,40}$")
    """Which GPUs, e.g. ``T4``, ``A10G``, ``H100``; default: any."""
    cpu_architecture: Architecture | None = None
    """Default: ``x86_64``."""

    @field_validator("memory", mode="before")
    @classmethod
    def _memory(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _accelerator_is_of_gpus(self) -> Self:
        if self.accelerator and not self.GPU:
            raise ValueError("accelerator says which GPUs: say in GPU how many")
        return self


def _advanced(value: Any) -> Any:
    if value is None:
        return {}
    if isinstance(value, dict):
        try:
            size = len(json.dumps(value))
        except (TypeError, ValueError):
            raise ValueError("advanced_instance_config holds something that JSON can't say") from None
        if size > MAX_ADVANCED_BYTES:
            raise ValueError(f"advanced_instance_config has {size} bytes; {MAX_ADVANCED_BYTES} are the most")
    return value


class NodeConfig(Model):
    instance_type: str | None = None
    required_resources: PhysicalResources | None = None
    resources: dict[str, float] | None = None
    """Logical resources that Ray sees (CPU, GPU, memory, object_store_memory, custom); default: the physical ones."""
    labels: dict[str, str] = {}
    """Ray node labels."""
    instance_types: list[InstanceTypeName] = Field(default=[], max_length=MAX_INSTANCE_TYPES)
    """In the order in which they are tried where the cloud has no machine of the one before, zone by zone. With
    ``required_resources`` each must have those; without, Ray is told the least CPUs and GPUs that one of them has.
    Default: what ``required_resources`` picks from the cloud's catalogue."""
    advanced_instance_config: dict[str, Any] = {}
    """Fields of the cloud's own launch request (AWS: RunInstances; GCP: ``Instance``), put over ours. What must stay
    ours is refused by name. Put over the cluster's own."""

    @field_validator("resources", mode="before")
    @classmethod
    def _resources(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        parsed = {k: parse_bytes(v) if isinstance(v, str) else v for k, v in value.items()}
        numbers = {k: v for k, v in parsed.items() if isinstance(v, int | float)}
        wrong = [k for k, v in numbers.items() if not 0 <= v <= MAX_RESOURCE or v % 1]
        if wrong:
            raise ValueError(f"resources are whole numbers from 0 to 10^14: {', '.join(wrong)}")
        if 0 < numbers.get("object_store_memory", 0) < MIN_OBJECT_STORE:
            raise ValueError("object_store_memory is at least 75Mi")
        reserved = [k for k in parsed if k.startswith("system_reserved_")]
        if reserved:  # Ray would take it for a custom resource
            raise ValueError(f"{', '.join(reserved)} is not supported: Ray decides what it keeps for itself")
        return parsed

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: dict[str, str]) -> dict[str, str]:
        for key, text in value.items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(text):
                raise ValueError(f"label {key!r}: keys and values are up to 63 letters, digits, '-', '_' and '.'")
        return value

    @field_validator("instance_types")
    @classmethod
    def _types_once(cls, value: list[str]) -> list[str]:
        double = sorted({t for t in value if value.count(t) > 1})
        if double:
            raise ValueError(f"each instance type is tried once: {', '.join(double)}")
        return value

    @field_validator("advanced_instance_config", mode="before")
    @classmethod
    def _node_advanced(cls, value: Any) -> Any:
        return _advanced(value)

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.instance_type and self.required_resources:
            raise ValueError("give instance_type or required_resources, not both")
        if self.instance_type and self.instance_types:
            raise ValueError("give instance_type or instance_types, not both")
        cpu = (self.resources or {}).get("CPU")
        if cpu is not None and self.required_resources and cpu > self.required_resources.CPU:
            raise ValueError("resources.CPU may not exceed required_resources.CPU")
        return self


SYSTEM_FOLDERS = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var"}
)
"""A disk mounted there would hide what the machine runs by."""

GIB = 2**30


class RetainedVolume(Model):
    """A disk that outlives the head's machine: the next head of the cluster has it again. It ends with the cluster."""

    size: int = Field(ge=GIB, le=16 * 2**40)
    """Bytes, or text such as ``"100Gi"``; made as whole GiB, rounded up."""
    mount_path: str = Field(default="/mnt/head", max_length=200)
    """Where it is found on the head, in its container too."""

    @property
    def gib(self) -> int:
        return -(-self.size // GIB)

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("mount_path")
    @classmethod
    def _mount_path(cls, value: str) -> str:
        folders = value.split("/")[1:]
        if not re.fullmatch(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+", value) or folders[0] in SYSTEM_FOLDERS:
            raise ValueError(f"{value!r} is no place for a disk: give an absolute path outside of the system's folders")
        return value


class HeadNodeConfig(NodeConfig):
    retained_volume: RetainedVolume | None = None
    fixed_address: bool = False
    """Each head of the cluster has the same private address as the one before it."""

    @property
    def keeps(self) -> str:
        """What one head hands on to the next one, in words for a person; "": nothing."""
        volume = self.retained_volume
        parts = [f"a disk of {volume.gib} GiB at {volume.mount_path}"] if volume else []
        return " and ".join([*parts, *(["its private address"] if self.fixed_address else [])])


class WorkerNodeGroupConfig(NodeConfig):
    name: Name = "workers"
    min_nodes: int = Field(default=0, ge=0)
    max_nodes: int = Field(default=MAX_NODES_DEFAULT, ge=1, le=MAX_NODES_PER_CLUSTER)
    market_type: Market = Market.ON_DEMAND

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) is greater than max_nodes ({self.max_nodes})")
        return self


class ComputeConfig(Model):
    cloud: str | None = None
    """Name or id; default: the default cloud."""
    head_node: HeadNodeConfig = HeadNodeConfig()
    """Beside worker groups the head takes no user work: Ray is told that it has no CPU and no GPU."""
    worker_nodes: list[WorkerNodeGroupConfig] = []
    """Empty: the head does the work itself."""
    zones: list[str] | None = None
    idle_termination_minutes: float = Field(default=120, ge=0)
    """Minutes without a lease and without activity after which the whole cluster is ended; 0 = never."""
    maximum_uptime_minutes: float | None = Field(default=None, gt=0)
    """Ends the cluster so long after it started, whatever it does."""
    advanced_instance_config: dict[str, Any] = {}
    """Of all nodes; a node's own is put over it."""

    @field_validator("advanced_instance_config", mode="before")
    @classmethod
    def _cluster_advanced(cls, value: Any) -> Any:
        return _advanced(value)

    @field_validator("worker_nodes", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any) -> Any:
        return [] if value is None else value

    @model_validator(mode="after")
    def _groups(self) -> Self:
        names = [group.name for group in self.worker_nodes]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"worker group names must be unique: {', '.join(double)}")
        if "head" in names:
            raise ValueError("'head' is reserved and can't name a worker group")
        total = sum(group.max_nodes for group in self.worker_nodes)
        if total > MAX_NODES_PER_CLUSTER:
            raise ValueError(f"max_nodes add up to {total}; one cluster may have {MAX_NODES_PER_CLUSTER}")
        return self

    def group(self, name: str) -> WorkerNodeGroupConfig | None:
        return next((g for g in self.worker_nodes if g.name == name), None)


NOT_SUPPORTED = {
    "ComputeConfig": {
        "cloud_resource": "a cloud has one resource here; name the cloud",
        "min_resources": "give min_nodes per worker group",
        "max_resources": "give max_nodes per worker group",
        "enable_cross_zone_scaling": "nodes go to the first of 'zones' that has a machine; name one zone to stay in it",
        "flags": "each flag that is honoured has a field of its own here, e.g. idle_termination_minutes",
        "auto_select_worker_config": "name the worker groups",
        "configs": "MultiResourceComputeConfig is not supported; name one cloud",
        "region": "the cloud has its region",
    },
    "NodeConfig": {
        "required_labels": "use labels or custom resources",
        "flags": "not supported per node group",
        "cloud_deployment": "name the cloud",
    },
    "WorkerNodeGroupConfig": {
        "retained_volume": "only the head has one",
        "fixed_address": "only the head has one",
    },
    "PhysicalResources": {
        "TPU": "TPUs are not supported",
        "tpu_hosts": "TPUs are not supported",
    },
}
"""Known fields of the platform that we measure ourselves against which we refuse, with what to do instead."""


class ComputeConfigCreate(Model):
    name: Name | None = None
    """None: an anonymous config, reachable by id."""
    config: ComputeConfig


class ComputeConfigVersion(Result):
    """One immutable version of a named config; referred to as ``name:version`` or by id."""

    id: str
    name: str | None
    version: int
    config: ComputeConfig
    created_at: datetime
    created_by: str
    archived_at: datetime | None = None
