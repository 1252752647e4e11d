"""The shape of a cluster. Field names and defaults follow Anyscale's ``ComputeConfig``
(research/anyscale.md §4) plus the two limits that only its API had.

A field of that platform which this Heliostat does not carry out is refused by name
(:class:`~heliostat.errors.NotHonoured`), see :data:`NOT_HONOURED`."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Self

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

    @field_validator("memory", mode="before")
    @classmethod
    def _memory(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value


class NodeConfig(Model):
    instance_type: str | None = None
    required_resources: PhysicalResources | None = None
    resources: dict[str, float] | None = None
    """Logical resources that Ray sees (CPU, GPU, memory, object_store_memory, custom); default: the physical ones."""
    labels: dict[str, str] = {}
    """Ray node labels."""

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

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.instance_type and self.required_resources:
            raise ValueError("give instance_type or required_resources, not both")
        cpu = (self.resources or {}).get("CPU")
        if cpu is not None and self.required_resources and cpu > self.required_resources.CPU:
            raise ValueError("resources.CPU may not exceed required_resources.CPU")
        return self


class HeadNodeConfig(NodeConfig):
    pass


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


NOT_HONOURED = {
    "ComputeConfig": {
        "cloud_resource": "a cloud has one resource here; name the cloud",
        "min_resources": "give min_nodes per worker group",
        "max_resources": "give max_nodes per worker group",
        "enable_cross_zone_scaling": "comes with the AWS and GCP clouds",
        "advanced_instance_config": "comes with the AWS and GCP clouds",
        "flags": "each flag that is honoured has a field of its own here, e.g. idle_termination_minutes",
        "auto_select_worker_config": "name the worker groups",
        "configs": "MultiResourceComputeConfig is not supported; name one cloud",
        "region": "the cloud has its region",
    },
    "NodeConfig": {
        "required_labels": "use labels or custom resources",
        "advanced_instance_config": "comes with the AWS and GCP clouds",
        "flags": "not supported per node group",
        "cloud_deployment": "name the cloud",
    },
    "PhysicalResources": {
        "accelerator": "comes with the AWS and GCP clouds; name the instance_type",
        "TPU": "TPUs are not supported",
        "tpu_hosts": "TPUs are not supported",
        "cpu_architecture": "the cloud's machines have one; name the instance_type",
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
