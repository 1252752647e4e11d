"""Services, their versions and rollouts. Field names and defaults of :class:`ServiceConfig` follow Anyscale's
(research/anyscale.md §3); what we do not carry out is refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from heliostat.models.common import Condition, Model, Name, Result
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import MASK

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
"""``module.sub:app``, as Serve takes it."""

DEFAULT_STEPS = [5, 10, 20, 30, 50, 75, 100]
"""Anyscale's progression on AWS (research/anyscale.md §3), which takes about two minutes there."""

MAX_VERSIONS = 10
"""That may share an endpoint by static weights."""

LATENCY_BOUNDS_MS = (
    1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700,
    1000, 1500, 2000, 3000, 5000, 7000, 10000, 20000, 30000, 60000,
)  # fmt: skip
"""Upper bounds of a latency histogram's buckets, milliseconds; one more bucket holds what is slower. The agent has
the same in ``agent/constants.py`` (a test compares)."""

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


class ProbeConfig(Model):
    """The real request by which an application shows that it is healthy, sent through the load balancer."""

    path: str = Field(default="", max_length=2000, pattern=r"^(/.*)?$")
    """Default: the application's route prefix."""
    method: str = Field(default="GET", pattern=r"^(GET|HEAD|POST|PUT)$")
    body: str | None = Field(default=None, max_length=65_536)
    headers: dict[str, str] = {}
    """Shown to everybody of the project and kept in histories, as they stand: put no secret into them."""
    expected_status: list[int] = []
    """Default: anything below 500, for an application need not have anything at its route prefix."""
    timeout_s: float = Field(default=10, gt=0, le=300)


class RolloutConfig(Model):
    steps: list[int] = Field(default=DEFAULT_STEPS, min_length=1, max_length=100)
    """Percent of the traffic that the new version gets, step by step; ends with 100."""
    hold_s: float = Field(default=15, ge=1, le=86_400)
    """Seconds for which each step below 100 is held and watched."""
    max_error_rate: float = Field(default=0.01, ge=0, le=1)
    """Share of the new version's answers that may be 5xx, above the running version's own share in the same time."""
    max_latency_ratio: float = Field(default=3.0, ge=1)
    """Its p95 until the answer begins may be so many times the running version's."""
    min_latency_ms: float = Field(default=100, ge=0)
    """A p95 below this is never a breach: on fast applications a ratio alone is noise."""
    min_requests: int = Field(default=10, ge=1)
    """Fewer answers of the new version in a step are no evidence: only Serve's own status and unanswered requests
    count."""
    health_timeout_s: float = Field(default=1800, gt=0, le=86_400)
    """From the deploy until every application of the new version is healthy, machines included; then it is given up
    with the running version untouched."""
    timeout_s: float = Field(default=7200, gt=0)
    """Of a whole rollout, pauses not counted; then traffic goes back. Anyscale's 120 minutes."""
    drain_timeout_s: float = Field(default=120, ge=0, le=86_400)
    """For requests and connections of the old version to end by themselves; what is left then is ended and reported."""
    keep_failed_s: float = Field(default=600, ge=0, le=7 * 86_400)
    """A version that failed is kept so long for inspection."""

    @field_validator("steps")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if any(not 1 <= s <= 100 for s in value) or value != sorted(set(value)) or value[-1] != 100:
            raise ValueError("steps are rising percentages from 1 on that end with 100, e.g. 5,25,50,100")
        return value


class ApplicationConfig(Model):
    """One application in the shape of Ray Serve's config file (``ServeApplicationSchema``)."""

    name: str = Field(default="default", min_length=1, max_length=200)
    route_prefix: str | None = "/"
    """None: reached by gRPC or by other applications only."""
    import_path: str
    args: dict[str, Any] = {}
    runtime_env: dict[str, Any] = {}
    """``working_dir`` and ``py_modules`` as the service's own (they win over those); ``env_vars`` are secrets."""
    deployments: list[dict[str, Any]] = []
    """Serve's deployment options; their values are checked by Serve. A ``runtime_env`` of their own is refused."""
    logging_config: dict[str, Any] | None = None
    """Of this application's deployments, instead of the service's."""
    probe: ProbeConfig | None = ProbeConfig()
    """Ours, not Serve's. None: it answers no HTTP (one of gRPC, say), and Serve's own word on it decides; where the
    service speaks gRPC, a call of Serve's own gRPC method shows that the way to it is open."""

    @field_validator("import_path")
    @classmethod
    def _import_path(cls, value: str) -> str:
        if not IMPORT_PATH.fullmatch(value):
            raise ValueError(f"{value!r} is no import path: write module.sub:app")
        return value

    @field_validator("route_prefix")
    @classmethod
    def _route(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith("/") or (len(value) > 1 and value.endswith("/"))):
            raise ValueError("route_prefix begins with / and does not end with one")
        if value is not None and (value == "/-" or value.startswith("/-/")):
            raise ValueError("route_prefix /- is Serve's own")
        return value

    @field_validator("deployments")
    @classmethod
    def _deployments(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if any(not isinstance(d.get("name"), str) for d in value):
            raise ValueError("every deployment needs a name")
        return value


class ServiceConfig(Model):
    name: Name | None = None
    applications: list[ApplicationConfig] = Field(min_length=1, max_length=100)
    version_name: Name | None = None
    """Default: ``v<number>``. Unique within the service."""
    working_dir: str | None = None
    """A directory (the client uploads it and puts ``upload:<sha256>`` here) or the URL of a zip."""
    excludes: list[str] = []
    py_modules: list[str] = []
    requirements: list[str] = []
    """pip requirement lines; a file's path in YAML is read by the client."""
    env_vars: dict[str, str] = {}
    """Values are secrets: encrypted at rest and masked in every answer."""
    compute_config: str | ComputeConfig | None = None
    cloud: str | None = None
    project: str | None = None
    query_auth_token_enabled: bool = True
    http_options: dict[str, Any] = {}
    """Of Serve's proxies: ``request_timeout_s`` and ``keep_alive_timeout_s``."""
    grpc_options: dict[str, Any] = {}
    """``grpc_servicer_functions`` and ``request_timeout_s``, as Serve's; gRPC is on when the first is not empty."""
    logging_config: dict[str, Any] | None = None
    proxy_location: str | None = None
    """``HeadOnly``, which is the default here: the load balancer's backends are the heads."""
    cluster_replicas: int = Field(default=1, ge=1, le=10)
    """Clusters that a version runs on; 2 or more outlive the loss of a head."""
    rollout: RolloutConfig = RolloutConfig()
    idle_termination_minutes: float | None = Field(default=None, gt=0)
    """Terminates the service after so long without a request; None: never. It is not woken up by a request."""
    tags: dict[str, str] = {}

    @field_validator("requirements", mode="before")
    @classmethod
    def _no_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("a requirements file is read by the client; send its lines as a list")
        return [] if value is None else value

    @field_validator("excludes", "py_modules", mode="before")
    @classmethod
    def _none_is_empty_list(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("env_vars", "tags", "http_options", "grpc_options", mode="before")
    @classmethod
    def _none_is_empty_dict(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("http_options")
    @classmethod
    def _http(cls, value: dict[str, Any]) -> dict[str, Any]:
        other = sorted(value.keys() - {"request_timeout_s", "keep_alive_timeout_s"})
        if other:
            raise ValueError(
                f"{', '.join(other)}: the load balancer decides it; only "
                "request_timeout_s and keep_alive_timeout_s are yours"
            )
        keep = value.get("keep_alive_timeout_s", 90)
        if not isinstance(keep, int) or keep < 75:
            raise ValueError(
                "keep_alive_timeout_s is at least 75, longer than the load balancers keep idle connections"
            )
        return value

    @field_validator("grpc_options")
    @classmethod
    def _grpc(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "service_names" in value:
            raise ValueError(
                "service_names is no option of Ray Serve's: it answers for all services of grpc_servicer_functions"
            )
        other = sorted(value.keys() - {"grpc_servicer_functions", "request_timeout_s"})
        if other:
            raise ValueError(f"{', '.join(other)} can't be set; the port is the load balancer's")
        functions = value.get("grpc_servicer_functions", [])
        if not isinstance(functions, list) or any(not isinstance(f, str) for f in functions):
            raise ValueError("grpc_servicer_functions is a list of import paths")
        return value

    @field_validator("proxy_location")
    @classmethod
    def _head_only(cls, value: str | None) -> str | None:
        if value not in (None, "HeadOnly"):
            raise ValueError("only HeadOnly is carried out: the load balancer's backends are the heads")
        return value

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for what in ("name", "route_prefix"):
            values = [v for v in (getattr(app, what) for app in self.applications) if v is not None]
            double = sorted({v for v in values if values.count(v) > 1})
            if double:
                raise ValueError(f"two applications have the same {what}: {', '.join(double)}")
        return self

    @property
    def serves_grpc(self) -> bool:
        return bool(self.grpc_options.get("grpc_servicer_functions"))

    def secrets(self) -> dict[str, str]:
        """All env values by ``env_vars.<NAME>`` and ``applications.<i>.env_vars.<NAME>``: what is sealed."""
        found = {f"env_vars.{k}": v for k, v in self.env_vars.items()}
        for i, app in enumerate(self.applications):
            env = app.runtime_env.get("env_vars") or {}
            found |= {f"applications.{i}.env_vars.{k}": str(v) for k, v in env.items()}
        return found

    def packages(self) -> list[tuple[str, str]]:
        """All code that it names: (field, ``upload:<sha256>`` or URL), the applications' own included."""
        named = [("working_dir", self.working_dir)] if self.working_dir is not None else []
        named += [(f"py_modules.{i}", uri) for i, uri in enumerate(self.py_modules)]
        for n, app in enumerate(self.applications):
            at, env = f"applications.{n}.runtime_env", app.runtime_env
            if env.get("working_dir") is not None:
                named.append((f"{at}.working_dir", env["working_dir"]))
            named += [(f"{at}.py_modules.{i}", uri) for i, uri in enumerate(env.get("py_modules") or [])]
        return named

    def masked(self) -> ServiceConfig:
        return self.with_secrets(dict.fromkeys(self.secrets(), MASK))

    def with_secrets(self, values: dict[str, str]) -> ServiceConfig:
        """The same with these env values (keys as of ``secrets``) in the places of its own."""
        apps = []
        for i, app in enumerate(self.applications):
            env = app.runtime_env.get("env_vars")
            if env:
                opened = {k: values.get(f"applications.{i}.env_vars.{k}", v) for k, v in env.items()}
                app = app.model_copy(update={"runtime_env": {**app.runtime_env, "env_vars": opened}})
            apps.append(app)
        own = {k: values.get(f"env_vars.{k}", v) for k, v in self.env_vars.items()}
        return self.model_copy(update={"env_vars": own, "applications": apps})

    def __repr__(self) -> str:
        return f"ServiceConfig(name={self.name!r}, …)"

    __str__ = __repr__


NOT_HONOURED_SERVICE = {
    "image_uri": "images come with the AWS and GCP clouds; a local node runs the control plane's own environment",
    "containerfile": "images come with the AWS and GCP clouds",
    "registry_login_secret": "images come with the AWS and GCP clouds",
    "ray_version": "the cloud's environment decides the Ray version",
    "py_executable": "not supported",
    "connections": "not supported",
    "ray_gcs_external_storage_config": "run cluster_replicas: 2 to outlive the loss of a head",
    "tracing_config": "not supported yet",
}


class VersionWeight(Model):
    name: Name
    traffic_percent: int = Field(ge=0, le=100)


class ServiceDeploy(Model):
    """One deploy: a new version of one service, or the static weights of several."""

    config: ServiceConfig | None = None
    configs: list[ServiceConfig] = Field(default=[], max_length=MAX_VERSIONS)
    """With ``versions`` only: those of them that are new, each with its ``version_name``."""
    name: Name | None = None
    """Of the service, where no config says it: a change of weights only."""
    project: str | None = None
    """Where no config says it."""
    in_place: bool = False
    """Update the running version on its own clusters: only Serve's config, replica counts or code may differ."""
    canary_percent: int | None = Field(default=None, ge=0, le=100)
    """Stop the rollout at this share until ``rollout promote`` or ``rollout abort``; 100: do not stop."""
    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """Replica capacity that may exist beyond the running version's while two versions do."""
    versions: list[VersionWeight] = Field(default=[], max_length=MAX_VERSIONS)
    """Static weights, which sum to 100. A version with 0, or that is not named, is terminated."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.versions:
            if self.config is not None:
                raise ValueError("with 'versions' the configs stand in 'configs'")
            total = sum(v.traffic_percent for v in self.versions)
            if total != 100:
                raise ValueError(f"versions: traffic_percent sums to {total}; it must be 100")
            names = [v.name for v in self.versions]
            if len(set(names)) != len(names):
                raise ValueError("versions: two have the same name")
            given = [c.version_name for c in self.configs]
            unknown = sorted({str(g) for g in given} - set(names))
            if None in given or unknown or len(set(given)) != len(given):
                raise ValueError("configs: each needs a version_name of its own that stands in 'versions'")
            if self.in_place or self.canary_percent is not None:
                raise ValueError("in_place and canary_percent do not go with 'versions'")
            if self.name is None and not self.configs:
                raise ValueError("name the service, or give a config that does")
        elif self.config is None or self.configs:
            raise ValueError("give one 'config', or 'versions' with 'configs'")
        if self.in_place and self.canary_percent is not None:
            raise ValueError("an update in place has no canary: leave out canary_percent")
        if self.max_surge_percent != 100 and (self.in_place or self.versions):
            how = "an update in place" if self.in_place else "static weights"
            raise ValueError(f"max_surge_percent bounds a rollout; it does not go with {how}")
        return self


class RolloutAction(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    ABORT = "abort"


class RolloutCommand(Model):
    action: RolloutAction
    percent: int | None = Field(default=None, ge=1, le=100)
    """With promote: go to this share and stop there; default 100."""

    @model_validator(mode="after")
    def _to_promote(self) -> Self:
        if self.percent is not None and self.action is not RolloutAction.PROMOTE:
            raise ValueError(f"percent is of promote alone; {self.action} has none")
        return self


class ServiceTerminate(Model):
    reason: str = Field(default="", max_length=500)


class ServiceRollback(Model):
    reason: str = Field(default="", max_length=500)


def quantile(buckets: Sequence[int], q: float) -> float | None:
    """Milliseconds below which the share ``q`` lies, interpolated within its bucket; None without any. What is slower
    than the last bound counts as that bound. ``buckets``: counts by LATENCY_BOUNDS_MS and one more."""
    total = sum(buckets)
    if not total:
        return None
    rank, seen, low = q * total, 0, 0.0
    for count, bound in zip(buckets, (*LATENCY_BOUNDS_MS, LATENCY_BOUNDS_MS[-1]), strict=True):
        if count and seen + count >= rank:
            return round(low + (bound - low) * max(rank - seen, 0) / count, 2)
        seen, low = seen + count, float(bound)
    return float(LATENCY_BOUNDS_MS[-1])


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
