"""Services: what a person asks for (``config``, ``requests``) and what they are told (``resource``)."""

from heliostat.models.services.config import (
    DEFAULT_STEPS,
    IMPORT_PATH,
    NOT_SUPPORTED_SERVICE,
    ApplicationConfig,
    ProbeConfig,
    RolloutConfig,
    ServiceConfig,
)
from heliostat.models.services.latency import LATENCY_BOUNDS_MS, quantile
from heliostat.models.services.requests import (
    RolloutAction,
    RolloutCommand,
    ServiceDeploy,
    ServiceRollback,
    ServiceTerminate,
    VersionWeight,
)
from heliostat.models.services.resource import (
    BACKEND_HEADER,
    MAX_VERSIONS,
    VERSION_HEADER,
    QueryToken,
    Rollout,
    Service,
    ServiceCluster,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
    Traffic,
)

__all__ = [
    "ApplicationConfig",
    "BACKEND_HEADER",
    "DEFAULT_STEPS",
    "IMPORT_PATH",
    "LATENCY_BOUNDS_MS",
    "MAX_VERSIONS",
    "NOT_SUPPORTED_SERVICE",
    "ProbeConfig",
    "QueryToken",
    "Rollout",
    "RolloutAction",
    "RolloutCommand",
    "RolloutConfig",
    "Service",
    "ServiceCluster",
    "ServiceConfig",
    "ServiceDeploy",
    "ServiceRollback",
    "ServiceState",
    "ServiceTerminate",
    "ServiceVersion",
    "ServiceVersionState",
    "Traffic",
    "VERSION_HEADER",
    "VersionWeight",
    "quantile",
]
