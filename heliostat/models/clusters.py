"""A Ray cluster and its nodes."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from heliostat.models.clouds import Market
from heliostat.models.common import Condition, Model, Name, Result
from heliostat.models.compute_configs import ComputeConfig


class ClusterState(StrEnum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    TERMINATING = "TERMINATING"
    TERMINATED = "TERMINATED"
    FAILED = "FAILED"

    @property
    def settled(self) -> bool:
        return self in (ClusterState.TERMINATED, ClusterState.FAILED)


class NodeRole(StrEnum):
    HEAD = "head"
    WORKER = "worker"


class NodeState(StrEnum):
    REQUESTED = "REQUESTED"
    """Requested; the cloud may not have it yet."""
    LAUNCHED = "LAUNCHED"
    """The cloud has a machine; its agent has not registered yet."""
    REGISTERED = "REGISTERED"
    """Its agent has registered; Ray is starting."""
    RUNNING = "RUNNING"
    """Ray runs on it."""
    LOST = "LOST"
    TERMINATING = "TERMINATING"
    TERMINATED = "TERMINATED"


class Activity(StrEnum):
    """Activity that the head's agent reports. Unknown counts as busy."""

    BUSY = "busy"
    IDLE = "idle"
    UNKNOWN = "unknown"


class ClusterCreate(Model):
    name: Name | None = None
    """Name of the cluster, unique among the project's clusters that have not ended. Default: generated."""
    compute_config: str | ComputeConfig | None = None
    """``name[:version]``, id, or the config itself. Default: the cloud's default."""
    cloud: str | None = None
    project: str | None = None
    tags: dict[str, str] = {}


class ScaleLimits(Model):
    """New limits of one worker group, for this cluster only."""

    group: str
    min_nodes: int | None = Field(default=None, ge=0)
    max_nodes: int | None = Field(default=None, ge=0)


class ClusterTerminate(Model):
    reason: str = Field(default="", max_length=500)


class Node(Result):
    id: str
    cluster_id: str
    role: NodeRole
    group: str
    """``head`` or the worker group's name."""
    slot: int
    generation: int
    """Number of machines tried for this slot; another zone, type or market is another generation."""
    state: NodeState
    reason: str = ""
    notice: str = ""
    """Interruption notice of the cloud for its machine."""
    machine_id: str | None = None
    """Id of the machine in the cloud."""
    ip: str | None = None
    created_at: datetime
    running_at: datetime | None = None
    ended_at: datetime | None = None
    instance_type: str | None = None
    """Requested instance type; None: the cloud's choice."""
    zone: str | None = None
    market: Market | None = None


class Lease(Result):
    """A lease: while it exists, the cluster does not terminate because it is idle."""

    holder: str
    """Workflow id of the holder (a job or service), or ``user:<name>``."""
    since: datetime


class Cluster(Result):
    id: str
    name: str
    project: str
    cloud: str
    state: ClusterState
    reason: str = ""
    """Why it is in this state."""
    waits_for: str = ""
    """What it waits for; empty: nothing."""
    compute_config: ComputeConfig
    tags: dict[str, str] = {}
    created_by: str
    created_at: datetime
    state_since: datetime
    ended_at: datetime | None = None
    conditions: list[Condition] = []
    leases: list[Lease] = []
    activity: Activity = Activity.UNKNOWN
    idle_since: datetime | None = None
    terminates_at: datetime | None = None
    """When idle termination or maximum uptime will terminate it, as of now."""
    phase_seconds: dict[str, float] = {}
    """Duration of each finished phase in seconds: ``{"head_launched": 0.2, "head_ready": 5.9, "workers_ready":
    3.1}``."""
    desired: dict[str, int] = {}
    """Desired workers by group."""
    ray_version: str | None = None
    revision: int = 0
