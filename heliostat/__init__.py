"""Heliostat: Ray clusters, jobs and services on your own machines. What is not listed here or in ``heliostat.models``
and ``heliostat.errors`` may change without notice."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heliostat.client.client import AsyncClient, Client
    from heliostat.client.logs import LogText
    from heliostat.errors import HeliostatError
    from heliostat.models.clusters import Cluster, ClusterCreate, ClusterState, Node, ScaleLimits
    from heliostat.models.common import Event
    from heliostat.models.compute_configs import (
        ComputeConfig,
        ComputeConfigCreate,
        ComputeConfigVersion,
        HeadNodeConfig,
        PhysicalResources,
        WorkerNodeGroupConfig,
    )
    from heliostat.models.jobs import Job, JobConfig, JobState, Run, RunCause, RunState
    from heliostat.models.plans import Plan, PlannedNodes, PlannedType
    from heliostat.models.schedules import OverlapPolicy, Schedule, ScheduleConfig, ScheduleState
    from heliostat.models.services import (
        ApplicationConfig,
        ProbeConfig,
        QueryToken,
        Rollout,
        RolloutAction,
        RolloutConfig,
        Service,
        ServiceConfig,
        ServiceDeploy,
        ServiceState,
        ServiceVersion,
        ServiceVersionState,
        Traffic,
        VersionWeight,
    )

__version__ = "0.1.0"

# Where each public name lives. Loaded at first use: the server and the command line import this package for a part.
_HOME = {
    "heliostat.client.logs": ["LogText"],
    "heliostat.client.client": ["AsyncClient", "Client"],
    "heliostat.errors": ["HeliostatError"],
    "heliostat.models.clusters": ["Cluster", "ClusterCreate", "ClusterState", "Node", "ScaleLimits"],
    "heliostat.models.common": ["Event"],
    "heliostat.models.compute_configs": [
        "ComputeConfig",
        "ComputeConfigCreate",
        "ComputeConfigVersion",
        "HeadNodeConfig",
        "PhysicalResources",
        "WorkerNodeGroupConfig",
    ],
    "heliostat.models.jobs": ["Job", "JobConfig", "JobState", "Run", "RunCause", "RunState"],
    "heliostat.models.plans": ["Plan", "PlannedNodes", "PlannedType"],
    "heliostat.models.schedules": ["OverlapPolicy", "Schedule", "ScheduleConfig", "ScheduleState"],
    "heliostat.models.services": [
        "ApplicationConfig",
        "ProbeConfig",
        "QueryToken",
        "Rollout",
        "RolloutAction",
        "RolloutConfig",
        "Service",
        "ServiceConfig",
        "ServiceDeploy",
        "ServiceState",
        "ServiceVersion",
        "ServiceVersionState",
        "Traffic",
        "VersionWeight",
    ],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ApplicationConfig",
    "AsyncClient",
    "Client",
    "Cluster",
    "ClusterCreate",
    "ClusterState",
    "ComputeConfig",
    "ComputeConfigCreate",
    "ComputeConfigVersion",
    "Event",
    "HeadNodeConfig",
    "HeliostatError",
    "Job",
    "JobConfig",
    "JobState",
    "LogText",
    "Node",
    "OverlapPolicy",
    "PhysicalResources",
    "Plan",
    "PlannedNodes",
    "PlannedType",
    "ProbeConfig",
    "QueryToken",
    "Rollout",
    "RolloutAction",
    "RolloutConfig",
    "Run",
    "RunCause",
    "RunState",
    "ScaleLimits",
    "Schedule",
    "ScheduleConfig",
    "ScheduleState",
    "Service",
    "ServiceConfig",
    "ServiceDeploy",
    "ServiceState",
    "ServiceVersion",
    "ServiceVersionState",
    "Traffic",
    "VersionWeight",
    "WorkerNodeGroupConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'heliostat' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
