"""The shape of a cluster. Field names and defaults follow Anyscale's ``ComputeConfig`` plus two limits of its API.

A field of Anyscale's that Heliostat does not support is an error that names it
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
"""What `ray start` (2.60) accepts. It would refuse minutes later, on every machine."""

MAX_NODES_DEFAULT = 10
"""Anyscale's default of ``max_nodes``."""

MAX_NODES_PER_CLUSTER = 1000
"""Limit of one cluster: its nodes are the state of one workflow, and Temporal limits a payload to 2 MB."""

MAX_INSTANCE_TYPES = 20
"""Limit per group: with zones and markets they multiply to the placements to try."""

MAX_ADVANCED_BYTES = 8 * 1024
"""Limit of an ``advanced_instance_config`` as JSON: every launch writes it to the cluster's history."""

InstanceTypeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,80}$")]

DEFAULT_CPU, DEFAULT_GPU = "default-cpu", "default-gpu"
"""Compute configs that every cloud has, unless the project has its own of that name."""


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
    """Minimum resources of the machine."""

    CPU: int = Field(gt=0, le=512)
    """Minimum number of vCPUs."""
    memory: int | None = Field(default=None, ge=2**20)
    """Minimum memory: bytes, or text such as ``"8Gi"``."""
    GPU: int = Field(default=0, ge=0, le=16)
    """Number of GPUs."""
    accelerator: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,40}$")
    """GPU model, e.g. ``T4``, ``A10G``, ``H100``. Default: any."""
    cpu_architecture: Architecture | None = None
    """CPU architecture. Default: ``x86_64``."""

    @field_validator("memory", mode="before")
    @classmethod
    def _memory(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _accelerator_is_of_gpus(self) -> Self:
        if self.accelerator and not self.GPU:
            raise ValueError("accelerator needs GPU: set how many")
        return self


def _advanced(value: Any) -> Any:
    if value is None:
        return {}
    if isinstance(value, dict):
        try:
            size = len(json.dumps(value))
        except (TypeError, ValueError):
            raise ValueError("advanced_instance_config is not valid JSON") from None
        if size > MAX_ADVANCED_BYTES:
            raise ValueError(f"advanced_instance_config has {size} bytes; the maximum is {MAX_ADVANCED_BYTES}")
    return value


class NodeConfig(Model):
    instance_type: str | None = None
    """Instance type of the cloud, e.g. ``m6i.large``. Excludes ``required_resources`` and ``instance_types``."""
    required_resources: PhysicalResources | None = None
    """Minimum resources of the machine. Up to four instance types of the cloud's catalogue that have them are tried."""
    resources: dict[str, float] | None = None
    """Logical resources for Ray (CPU, GPU, memory, object_store_memory, custom). Default: the physical ones."""
    labels: dict[str, str] = {}
    """Ray labels of the node."""
    instance_types: list[InstanceTypeName] = Field(default=[], max_length=MAX_INSTANCE_TYPES)
    """Instance types to try in this order, zone by zone, when the cloud has no machine of the one before. Each must
    have ``required_resources``, if set; without them, Ray gets the lowest number of CPUs and GPUs among them. Default:
    chosen from the cloud's catalogue by ``required_resources``."""
    advanced_instance_config: dict[str, Any] = {}
    """Fields of the cloud's launch request (AWS: RunInstances; GCP: ``Instance``), merged over Heliostat's. Fields that
    Heliostat must set itself are errors. Merged over those of the cluster."""

    @field_validator("resources", mode="before")
    @classmethod
    def _resources(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        parsed = {k: parse_bytes(v) if isinstance(v, str) else v for k, v in value.items()}
        numbers = {k: v for k, v in parsed.items() if isinstance(v, int | float)}
        wrong = [k for k, v in numbers.items() if not 0 <= v <= MAX_RESOURCE or v % 1]
        if wrong:
            raise ValueError(f"resources must be whole numbers from 0 to 10^14: {', '.join(wrong)}")
        if 0 < numbers.get("object_store_memory", 0) < MIN_OBJECT_STORE:
            raise ValueError("object_store_memory must be at least 75Mi")
        reserved = [k for k in parsed if k.startswith("system_reserved_")]
        if reserved:  # Ray would take it for a custom resource
            raise ValueError(f"{', '.join(reserved)} is not supported: Ray decides what it reserves")
        return parsed

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: dict[str, str]) -> dict[str, str]:
        for key, text in value.items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(text):
                raise ValueError(f"label {key!r}: keys and values can have up to 63 letters, digits, '-', '_' and '.'")
        return value

    @field_validator("instance_types")
    @classmethod
    def _types_once(cls, value: list[str]) -> list[str]:
        double = sorted({t for t in value if value.count(t) > 1})
        if double:
            raise ValueError(f"instance_types has duplicates: {', '.join(double)}")
        return value

    @field_validator("advanced_instance_config", mode="before")
    @classmethod
    def _node_advanced(cls, value: Any) -> Any:
        return _advanced(value)

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.instance_type and self.required_resources:
            raise ValueError("set instance_type or required_resources, not both")
        if self.instance_type and self.instance_types:
            raise ValueError("set instance_type or instance_types, not both")
        cpu = (self.resources or {}).get("CPU")
        if cpu is not None and self.required_resources and cpu > self.required_resources.CPU:
            raise ValueError("resources.CPU must not exceed required_resources.CPU")
        return self


SYSTEM_FOLDERS = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var"}
)
"""A disk mounted there would hide files that the system needs."""

GIB = 2**30


class RetainedVolume(Model):
    """A disk that survives the loss of the head: the next head of the cluster gets it. It is deleted with the
    cluster."""

    size: int = Field(ge=GIB, le=16 * 2**40)
    """Size: bytes, or text such as ``"100Gi"``; rounded up to whole GiB."""
    mount_path: str = Field(default="/mnt/head", max_length=200)
    """Mount path on the head, and in its container."""

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
            raise ValueError(
                f"{value!r} is not a valid mount path: use an absolute path outside of the system's folders"
            )
        return value


class HeadNodeConfig(NodeConfig):
    retained_volume: RetainedVolume | None = None
    """Disk that survives the loss of the head."""
    fixed_address: bool = False
    """Whether the next head gets the private address of the lost one."""

    @property
    def keeps(self) -> str:
        """The resources that the next head gets, as text; "": none."""
        volume = self.retained_volume
        parts = [f"a disk of {volume.gib} GiB at {volume.mount_path}"] if volume else []
        return " and ".join([*parts, *(["its private address"] if self.fixed_address else [])])


class WorkerNodeGroupConfig(NodeConfig):
    name: Name = "workers"
    """Name of the group, unique in the cluster."""
    min_nodes: int = Field(default=0, ge=0)
    """Minimum number of nodes."""
    max_nodes: int = Field(default=MAX_NODES_DEFAULT, ge=1, le=MAX_NODES_PER_CLUSTER)
    """Maximum number of nodes."""
    market_type: Market = Market.ON_DEMAND
    """``ON_DEMAND``, ``SPOT``, or ``PREFER_SPOT``: on-demand where no spot machine is available."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) is greater than max_nodes ({self.max_nodes})")
        return self


class ComputeConfig(Model):
    cloud: str | None = None
    """Name or id of the cloud. Default: the default cloud."""
    head_node: HeadNodeConfig = HeadNodeConfig()
    """The head node. In a cluster with worker groups it runs no user work: Ray gets 0 CPUs and 0 GPUs for it."""
    worker_nodes: list[WorkerNodeGroupConfig] = []
    """Worker groups. Empty: the head runs the work itself."""
    zones: list[str] | None = None
    """Zones to try, in this order. Default: the cloud's."""
    idle_termination_minutes: float = Field(default=120, ge=0)
    """Minutes without a lease and without activity after which the cluster terminates; 0: never."""
    maximum_uptime_minutes: float | None = Field(default=None, gt=0)
    """Minutes after its start at which the cluster terminates, also while work runs on it. Default: never."""
    advanced_instance_config: dict[str, Any] = {}
    """Fields of the cloud's launch request for all nodes; those of a node are merged over it."""

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
            raise ValueError("'head' is reserved: give the worker group another name")
        total = sum(group.max_nodes for group in self.worker_nodes)
        if total > MAX_NODES_PER_CLUSTER:
            raise ValueError(f"max_nodes add up to {total}; the maximum per cluster is {MAX_NODES_PER_CLUSTER}")
        return self

    def group(self, name: str) -> WorkerNodeGroupConfig | None:
        return next((g for g in self.worker_nodes if g.name == name), None)


NOT_SUPPORTED = {
    "ComputeConfig": {
        "cloud_resource": "a cloud has one resource; set cloud",
        "min_resources": "set min_nodes per worker group",
        "max_resources": "set max_nodes per worker group",
        "enable_cross_zone_scaling": "nodes start in the first of zones that has a machine; set one zone to stay in it",
        "flags": "supported flags have fields of their own, e.g. idle_termination_minutes",
        "auto_select_worker_config": "list the worker groups",
        "configs": "MultiResourceComputeConfig is not supported; set one cloud",
        "region": "the cloud determines the region",
    },
    "NodeConfig": {
        "required_labels": "use labels or custom resources",
        "flags": "not supported per node group",
        "cloud_deployment": "set cloud",
    },
    "WorkerNodeGroupConfig": {
        "retained_volume": "only the head can have one",
        "fixed_address": "only the head can have one",
    },
    "PhysicalResources": {
        "TPU": "TPUs are not supported",
        "tpu_hosts": "TPUs are not supported",
    },
}
"""Anyscale's fields that Heliostat does not support, with what to do instead."""


def resources_of(config: NodeConfig) -> dict[str, float]:
    """The resources that Ray on the node starts with: ``resources``, else what the machine must have, else one CPU."""
    resources: dict[str, float] = {}
    if config.required_resources is not None:
        resources["CPU"] = config.required_resources.CPU
        if config.required_resources.memory:
            resources["memory"] = config.required_resources.memory
        if config.required_resources.GPU:
            resources["GPU"] = config.required_resources.GPU
    if config.resources is not None:
        resources.update(config.resources)
    resources.setdefault("CPU", 1)
    return resources


class ComputeConfigCreate(Model):
    name: Name | None = None
    """Name of the config. Default: none; refer to it by id."""
    config: ComputeConfig


class ComputeConfigVersion(Result):
    """One immutable version of a config; refer to it as ``name:version`` or by id."""

    id: str
    name: str | None
    version: int
    config: ComputeConfig
    created_at: datetime
    created_by: str
    archived_at: datetime | None = None
