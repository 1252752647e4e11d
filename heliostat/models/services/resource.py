"""Services, their versions and rollouts, as the API returns them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from heliostat.models.common import Condition, Result
from heliostat.models.services.config import ServiceConfig

MAX_VERSIONS = 10
"""Maximum number of versions that share an endpoint by static weights."""
VERSION_HEADER = "X-Heliostat-Version"
"""Header in answers of a service: the id of the version that answered."""
BACKEND_HEADER = "X-Heliostat-Backend"
"""Header in requests, for probes: the id of the cluster to route to, independent of the weights. The request needs the
token like any other."""


class ServiceState(StrEnum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    ROLLING_OUT = "ROLLING_OUT"
    ROLLING_BACK = "ROLLING_BACK"
    UPDATING = "UPDATING"
    UNHEALTHY = "UNHEALTHY"
    TERMINATING = "TERMINATING"
    TERMINATED = "TERMINATED"

    @property
    def settled(self) -> bool:
        return self == ServiceState.TERMINATED


class ServiceVersionState(StrEnum):
    STARTING = "STARTING"
    """Its clusters start, its applications are deployed and probed."""
    UPDATING = "UPDATING"
    """It replaces another version in place, on that version's clusters."""
    RUNNING = "RUNNING"
    UNHEALTHY = "UNHEALTHY"
    """It failed its health checks. After a failed rollout it stays for inspection for a while."""
    TERMINATING = "TERMINATING"
    """It is drained, then its clusters are released."""
    TERMINATED = "TERMINATED"


class Traffic(Result):
    """Traffic of a version, measured by its proxies. A request counts when its answer ends; errors are 5xx answers and
    aborted ones. Latency: until the answer begins."""

    requests: int = 0
    errors: int = 0
    ongoing: int = 0
    connections: int = 0
    window_s: float = 0
    """Window of the four values below, in seconds."""
    requests_per_s: float = 0
    errors_per_s: float = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    last_request_at: datetime | None = None


class ServiceCluster(Result):
    """One of a version's clusters, as the service sees it."""

    cluster_id: str
    state: str
    """State of the cluster, then of the service on it."""
    ready: bool = False
    """Whether the load balancer routes to it."""
    message: str = ""


class ServiceVersion(Result):
    id: str
    service_id: str
    name: str
    number: int
    state: ServiceVersionState
    reason: str = ""
    weight: int = 0
    """Current percent of traffic in the load balancer."""
    target_weight: int = 0
    """Percent of traffic after the rollout."""
    config: ServiceConfig
    """Config of the version; env values are masked."""
    clusters: list[ServiceCluster] = []
    checklist: list[Condition] = []
    """Conditions ``Cluster``, ``Application``, ``Endpoint`` and ``Weight``, each with its time and, while false, what
    it waits for."""
    traffic: Traffic | None = None
    created_by: str
    created_at: datetime
    state_since: datetime
    kept_until: datetime | None = None
    """A failed version stays for inspection until then."""
    ended_at: datetime | None = None


class Rollout(Result):
    """The change from one version to the next."""

    version_id: str
    from_version_id: str | None = None
    percent: int = 0
    """Current percent of traffic of the new version."""
    steps: list[int] = []
    state: str = ""
    """``starting``, ``shifting``, ``holding``, ``paused``."""
    since: datetime
    holds_until: datetime | None = None
    observed: str = ""
    """Result of the last canary analysis."""


class QueryToken(Result):
    """A query token of a service. ``active``: every proxy of the service accepts it."""

    id: str
    token: str
    created_at: datetime
    primary: bool = True
    active: bool = True


class Service(Result):
    id: str
    name: str
    project: str
    cloud: str
    state: ServiceState
    reason: str = ""
    waits_for: str = ""
    endpoint_trouble: str = ""
    """Unrecoverable error of its load balancer, which needs a person; "": none."""
    query_url: str | None = None
    query_auth_token: str | None = None
    """Primary query token; None if the service needs none, and in lists."""
    query_auth_tokens: list[QueryToken] = []
    gate_hashes: list[str] = []
    """sha256 of each token that every proxy with traffic accepts; empty in answers."""
    primary_version: str | None = None
    previous_version: str | None = None
    """Version to which a rollback returns when there is no rollout."""
    canary_version: str | None = None
    rollout: Rollout | None = None
    versions: list[ServiceVersion] = []
    """Running versions and the newest ended ones. All: ``GET /v1/services/{id}/versions``."""
    created_by: str
    created_at: datetime
    state_since: datetime
    ended_at: datetime | None = None
    tags: dict[str, str] = {}
    """Tags of its newest version."""
    revision: int = 0
