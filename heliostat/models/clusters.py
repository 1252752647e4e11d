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
    """Asked for; the cloud may or may not know it yet."""
    LAUNCHED = "LAUNCHED"
    """The cloud has a machine; its agent has not called yet."""
    REGISTERED = "REGISTERED"
    """Its agent has called; Ray is starting."""
    RUNNING = "RUNNING"
    """Ray on it is alive."""
    LOST = "LOST"
    TERMINATING = "TERMINATING"
    TERMINATED = "TERMINATED"


class Activity(StrEnum):
    """What the head's agent sees. Unknown counts as busy."""

    BUSY = "busy"
    IDLE = "idle"
    UNKNOWN = "unknown"


class ClusterCreate(Model):
    name: Name | None = None
    """Default: generated. Unique among the project's clusters that are not ended."""
    compute_config: str | ComputeConfig | None = None
    """``name[:version]``, id, or the config itself; default: the cloud's default."""
    cloud: str | None = None
    project: str | None = None
    tags: dict[str, str] = {}


class ScaleLimits(Model):
    """New bounds of one worker group, within this cluster only."""

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
    """Counts the machines tried for this slot; a new zone, type or market is a new generation."""
    state: NodeState
    reason: str = ""
    notice: str = ""
    """What the cloud has announced for its machine: that it will be taken back."""
    machine_id: str | None = None
    """The cloud's own id."""
    ip: str | None = None
    created_at: datetime
    running_at: datetime | None = None
    ended_at: datetime | None = None
    instance_type: str | None = None
    """That it was asked for as; None: the cloud's choice."""
    zone: str | None = None
    market: Market | None = None


class Lease(Result):
    """The right of its holder to keep a cluster awake."""

    holder: str
    """Workflow id of the holder (a job, service or workspace), or ``user:<name>``."""
    since: datetime


class Cluster(Result):
    id: str
    name: str
    project: str
    cloud: str
    state: ClusterState
    reason: str = ""
    """Why it is in this state, for people."""
    waits_for: str = ""
    """What it is waiting for now, and what it needs; empty when nothing."""
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
    """When idle shutdown or maximum uptime will end it, as known now."""
    phase_seconds: dict[str, float] = {}
    """Seconds that each finished phase took: ``{"head_launched": 0.2, "head_ready": 5.9, "workers_ready": 3.1}``."""
    desired: dict[str, int] = {}
    """Workers wanted now, by group."""
    ray_version: str | None = None
    revision: int = 0
