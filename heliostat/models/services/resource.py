"""Services, their versions and rollouts. Field names and defaults of :class:`ServiceConfig` follow Anyscale's
(research/anyscale.md §3); what we do not carry out is refused by name."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from heliostat.models.common import Condition, Result
from heliostat.models.services.config import ServiceConfig

MAX_VERSIONS = 10
"""That may share an endpoint by static weights."""
VERSION_HEADER = "X-Heliostat-Version"
"""Answers of a service carry the id of the version that gave them."""
BACKEND_HEADER = "X-Heliostat-Backend"
"""A request that carries a cluster's id in it is sent to that cluster, whatever the weights are: for probes. It needs
the token like any other."""


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
    """It replaces another one in place, on that one's clusters."""
    RUNNING = "RUNNING"
    UNHEALTHY = "UNHEALTHY"
    """It did not become, or did not stay, fit for traffic. After a failed rollout it is kept for a while for
    inspection."""
    TERMINATING = "TERMINATING"
    """It is drained, then its clusters are released."""
    TERMINATED = "TERMINATED"


class Traffic(Result):
    """What a version's proxies have seen. Requests count when their answer ends; errors are 5xx answers and those
    that broke off. Latency: until the answer begins."""

    requests: int = 0
    errors: int = 0
    ongoing: int = 0
    connections: int = 0
    window_s: float = 0
    """Of the four below: the last so many seconds."""
    requests_per_s: float = 0
    errors_per_s: float = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    last_request_at: datetime | None = None


class ServiceCluster(Result):
    """One of a version's clusters, as the service sees it."""

    cluster_id: str
    state: str
    """The cluster's own state, then what the service does on it."""
    ready: bool = False
    """In the load balancer."""
    message: str = ""


class ServiceVersion(Result):
    id: str
    service_id: str
    name: str
    number: int
    state: ServiceVersionState
    reason: str = ""
    weight: int = 0
    """Percent of the traffic that the load balancer gives it now."""
    target_weight: int = 0
    """What it is to have when the rollout is done."""
    config: ServiceConfig
    """Env values masked."""
    clusters: list[ServiceCluster] = []
    checklist: list[Condition] = []
    """``Cluster``, ``Application``, ``Endpoint``, ``Weight``: each with its time and, while not true, what it waits
    for."""
    traffic: Traffic | None = None
    created_by: str
    created_at: datetime
    state_since: datetime
    kept_until: datetime | None = None
    """A failed version is kept for inspection until then."""
    ended_at: datetime | None = None


class Rollout(Result):
    """The passage from one version to the next."""

    version_id: str
    from_version_id: str | None = None
    percent: int = 0
    """The share that the new version has now."""
    steps: list[int] = []
    state: str = ""
    """``starting``, ``shifting``, ``holding``, ``paused``."""
    since: datetime
    holds_until: datetime | None = None
    observed: str = ""
    """What the last look at the canary saw."""


class QueryToken(Result):
    """``active``: every proxy of the service takes it."""

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
    """What of its load balancer can't be mended without a person, "" as long as nothing is."""
    query_url: str | None = None
    query_auth_token: str | None = None
    """The primary one; None when the service needs none, and in lists."""
    query_auth_tokens: list[QueryToken] = []
    gate_hashes: list[str] = []
    """sha256 of each token that every proxy with traffic takes by now; empty in answers."""
    primary_version: str | None = None
    previous_version: str | None = None
    """To which a rollback goes while no rollout is under way."""
    canary_version: str | None = None
    rollout: Rollout | None = None
    versions: list[ServiceVersion] = []
    """Those that live and the newest that ended; all: ``GET /v1/services/{id}/versions``."""
    created_by: str
    created_at: datetime
    state_since: datetime
    ended_at: datetime | None = None
    tags: dict[str, str] = {}
    """Those of its newest version."""
    revision: int = 0
