"""The config of a service. Field names and defaults follow Anyscale's; fields that are not supported are errors that
name them."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from heliostat.models.common import Model, Name
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import MASK

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
"""``module.sub:app``, Serve's format."""
DEFAULT_STEPS = [5, 10, 20, 30, 50, 75, 100]
"""Anyscale's steps on AWS; they take about two minutes there."""


class ProbeConfig(Model):
    """The health check of an application: a request through the load balancer."""

    path: str = Field(default="", max_length=2000, pattern=r"^(/.*)?$")
    """Path of the request. Default: the application's route prefix."""
    method: str = Field(default="GET", pattern=r"^(GET|HEAD|POST|PUT)$")
    """HTTP method: ``GET``, ``HEAD``, ``POST`` or ``PUT``."""
    body: str | None = Field(default=None, max_length=65_536)
    """Body of the request."""
    headers: dict[str, str] = {}
    """Headers of the request. They are not secret: every member of the project can see them."""
    expected_status: list[int] = []
    """Status codes of a healthy answer. Default: anything below 500, because the route prefix itself may not exist."""
    timeout_s: float = Field(default=10, gt=0, le=300)
    """Seconds to wait for the answer."""


class RolloutConfig(Model):
    """How a new version takes over the traffic, and when it is rolled back."""

    steps: list[int] = Field(default=DEFAULT_STEPS, min_length=1, max_length=100)
    """Percent of traffic for the new version, step by step; the last one is 100."""
    hold_s: float = Field(default=15, ge=1, le=86_400)
    """Seconds to hold and observe each step below 100."""
    max_error_rate: float = Field(default=0.01, ge=0, le=1)
    """Maximum share of 5xx answers of the new version, above the running version's share in the same time."""
    max_latency_ratio: float = Field(default=3.0, ge=1)
    """Maximum p95 latency of the new version, as a multiple of the running version's. Latency: until the answer
    begins."""
    min_latency_ms: float = Field(default=100, ge=0)
    """Milliseconds. A p95 below this is never too slow: for fast applications the ratio alone is noise."""
    min_requests: int = Field(default=10, ge=1)
    """Answers of the new version that a step needs for a decision by errors and latency. With fewer, only Serve's
    status and unanswered requests count."""
    health_timeout_s: float = Field(default=1800, gt=0, le=86_400)
    """Seconds from the deploy until every application of the new version is healthy, including the start of machines.
    Then the version fails; the running version is not affected."""
    timeout_s: float = Field(default=7200, gt=0)
    """Seconds for the whole rollout, without pauses; then it is rolled back."""
    drain_timeout_s: float = Field(default=120, ge=0, le=86_400)
    """Seconds for open requests and connections of the old version to end; then they are closed and reported."""
    keep_failed_s: float = Field(default=600, ge=0, le=7 * 86_400)
    """Seconds that a failed version stays for inspection."""

    @field_validator("steps")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if any(not 1 <= s <= 100 for s in value) or value != sorted(set(value)) or value[-1] != 100:
            raise ValueError("steps must be rising percentages that end with 100, e.g. 5,25,50,100")
        return value


class ApplicationConfig(Model):
    """One application in the shape of Ray Serve's config file (``ServeApplicationSchema``)."""

    name: str = Field(default="default", min_length=1, max_length=200)
    """Name of the application, unique in the service."""
    route_prefix: str | None = "/"
    """HTTP path of the application. None: reachable by gRPC or by other applications only."""
    import_path: str
    """``module.sub:app``: the application, or its builder."""
    args: dict[str, Any] = {}
    """Arguments of the application builder."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment. ``working_dir`` and ``py_modules`` override the service's; ``env_vars`` are secrets."""
    deployments: list[dict[str, Any]] = []
    """Serve's deployment options; Serve checks their values. A ``runtime_env`` per deployment is not supported."""
    logging_config: dict[str, Any] | None = None
    """Serve's logging config for this application, instead of the service's."""
    probe: ProbeConfig | None = ProbeConfig()
    """Health check of the application. None: it has no HTTP (for example gRPC only), and Serve's status decides; with
    gRPC, a call of Serve's gRPC health method checks the connection."""

    @field_validator("import_path")
    @classmethod
    def _import_path(cls, value: str) -> str:
        if not IMPORT_PATH.fullmatch(value):
            raise ValueError(f"{value!r} is not a valid import path: write module.sub:app")
        return value

    @field_validator("route_prefix")
    @classmethod
    def _route(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith("/") or (len(value) > 1 and value.endswith("/"))):
            raise ValueError("route_prefix must begin with / and not end with /")
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
    """One version of a service."""

    name: Name | None = None
    """Name of the service, unique in the project."""
    applications: list[ApplicationConfig] = Field(min_length=1, max_length=100)
    """The Ray Serve applications."""
    version_name: Name | None = None
    """Name of the version, unique in the service. Default: ``v<number>``."""
    working_dir: str | None = None
    """Directory to upload (the client replaces it with ``upload:<sha256>``), or the URL of a zip."""
    excludes: list[str] = []
    """Patterns of files that are not uploaded, as in .gitignore."""
    py_modules: list[str] = []
    """Package directories or ``.py`` files to upload and make importable, or URLs of zips."""
    requirements: list[str] = []
    """Lines of a requirements file for pip. In YAML also the path of a file, which the client reads."""
    env_vars: dict[str, str] = {}
    """Environment variables. Values are secrets: encrypted at rest and masked in every answer."""
    compute_config: str | ComputeConfig | None = None
    """``name[:version]``, id, or the config itself. Default: the cloud's default."""
    cloud: str | None = None
    """Name or id of the cloud. Default: the service's cloud, or the default cloud for a new service."""
    project: str | None = None
    """Project of the service. Default: yours, if you have only one."""
    query_auth_token_enabled: bool = True
    """Whether requests need a query token."""
    http_options: dict[str, Any] = {}
    """HTTP options of Serve's proxies: ``request_timeout_s`` and ``keep_alive_timeout_s``."""
    grpc_options: dict[str, Any] = {}
    """Serve's gRPC options: ``grpc_servicer_functions``, which enables gRPC, and ``request_timeout_s``."""
    logging_config: dict[str, Any] | None = None
    """Serve's logging config."""
    proxy_location: str | None = None
    """Only ``HeadOnly``, the default: the heads are the load balancer's backends."""
    cluster_replicas: int = Field(default=1, ge=1, le=10)
    """Number of clusters per version; 2 or more survive the loss of a head."""
    rollout: RolloutConfig = RolloutConfig()
    """How a new version takes over the traffic."""
    idle_termination_minutes: float | None = Field(default=None, gt=0)
    """Minutes without a request after which the service terminates. Default: never. A request does not start it
    again."""
    tags: dict[str, str] = {}
    """Tags of the service, for filters."""

    @field_validator("requirements", mode="before")
    @classmethod
    def _no_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("the client reads requirements files; send the lines as a list")
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
                f"{', '.join(other)}: not supported, because of the load balancer; set only "
                "request_timeout_s and keep_alive_timeout_s"
            )
        keep = value.get("keep_alive_timeout_s", 90)
        if not isinstance(keep, int) or keep < 75:
            raise ValueError(
                "keep_alive_timeout_s must be at least 75, longer than the idle timeout of the load balancers"
            )
        return value

    @field_validator("grpc_options")
    @classmethod
    def _grpc(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "service_names" in value:
            raise ValueError("service_names is not an option of Ray Serve: it serves all of grpc_servicer_functions")
        other = sorted(value.keys() - {"grpc_servicer_functions", "request_timeout_s"})
        if other:
            raise ValueError(f"{', '.join(other)} can't be set; the load balancer determines the port")
        functions = value.get("grpc_servicer_functions", [])
        if not isinstance(functions, list) or any(not isinstance(f, str) for f in functions):
            raise ValueError("grpc_servicer_functions must be a list of import paths")
        return value

    @field_validator("proxy_location")
    @classmethod
    def _head_only(cls, value: str | None) -> str | None:
        if value not in (None, "HeadOnly"):
            raise ValueError("only HeadOnly is supported: the heads are the load balancer's backends")
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
        """All env values by ``env_vars.<NAME>`` and ``applications.<i>.env_vars.<NAME>``: what is encrypted."""
        found = {f"env_vars.{k}": v for k, v in self.env_vars.items()}
        for i, app in enumerate(self.applications):
            env = app.runtime_env.get("env_vars") or {}
            found |= {f"applications.{i}.env_vars.{k}": str(v) for k, v in env.items()}
        return found

    def packages(self) -> list[tuple[str, str]]:
        """All code of the config: (field, ``upload:<sha256>`` or URL), including the applications'."""
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
        """The same config with these env values (keys as in ``secrets``)."""
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
    "image_uri": "a cloud's config sets the image; a local node runs the control plane's environment",
    "containerfile": "a cloud's config sets the image",
    "registry_login_secret": "a cloud's config sets the image",
    "ray_version": "the cloud's environment determines the Ray version",
    "py_executable": "not supported",
    "connections": "not supported",
    "ray_gcs_external_storage_config": "set cluster_replicas: 2 to survive the loss of a head",
    "tracing_config": "not supported yet",
}
