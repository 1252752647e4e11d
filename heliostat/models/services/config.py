"""The config of a service, field by field."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from heliostat.models.common import Model, Name
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import MASK

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
"""``module.sub:app``, as Serve takes it."""
DEFAULT_STEPS = [5, 10, 20, 30, 50, 75, 100]
"""Anyscale's progression on AWS (research/anyscale.md §3), which takes about two minutes there."""


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


NOT_SUPPORTED_SERVICE = {
    "image_uri": "images come with the AWS and GCP clouds; a local node runs the control plane's own environment",
    "containerfile": "images come with the AWS and GCP clouds",
    "registry_login_secret": "images come with the AWS and GCP clouds",
    "ray_version": "the cloud's environment decides the Ray version",
    "py_executable": "not supported",
    "connections": "not supported",
    "ray_gcs_external_storage_config": "run cluster_replicas: 2 to outlive the loss of a head",
    "tracing_config": "not supported yet",
}
