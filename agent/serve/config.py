"""The config for Serve: that of a ``serve_deploy`` command, completed."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any

from agent.boot import Boot
from agent.gate_install import GRPC_GUARD
from agent.journal import write_private
from agent.packages import Packages

KEEP_ALIVE_S = 90
"""Longer than load balancers keep idle connections (60 s as a rule): the sender closes them, so no request meets a
connection that is just closing."""
SURGE = {"max_surge_percent": 100}
"""A replica stops when its replacement is ready. Serve's default is to stop first: with one replica and broken code
none would be left."""

GRPC_MODULE = "heliostat_grpc"

Names = dict[str, set[str]]
"""Deployments' names by application."""


@dataclass
class Deploy:
    """One config for Serve. ``config`` holds env values: no file and no log may contain it."""

    version_id: str
    id: str
    config: dict[str, Any] = field(repr=False)
    secrets: list[str] = field(repr=False)
    surge: Names = field(default_factory=dict)
    """Deployments that get SURGE unless the config sets its own."""
    before: dict[str, float] = field(default_factory=dict)
    """``last_deployed_time_s`` by application before the submission: a status with the same one is stale."""

    @property
    def applications(self) -> list[str]:
        return [str(a["name"]) for a in self.config["applications"]]

    @property
    def grpc(self) -> bool:
        return bool(self.config["grpc_options"]["grpc_servicer_functions"])

    def add_secrets(self, secrets: list[str]) -> None:
        """Masks these as well: messages may still be about what ran before."""
        self.secrets = sorted({*self.secrets, *secrets}, key=len, reverse=True)

    def same(self, other: Deploy | None) -> bool:
        return other is not None and (self.version_id, self.id, self.config) == (
            other.version_id, other.id, other.config
        )  # fmt: skip

    def for_serve(self) -> dict[str, Any]:
        """With the surge."""
        config = copy.deepcopy(self.config)
        for app in config["applications"]:
            given = {d["name"]: d for d in app.get("deployments") or []}
            for name in sorted(self.surge.get(app["name"], ())):
                given[name] = {"name": name} | SURGE | given.get(name, {})
            if given:
                app["deployments"] = list(given.values())
        return config


def complete_config(boot: Boot, args: dict[str, Any], packages: Packages) -> Deploy:
    """Fetches packages. Raises PackageFailed, and KeyError for an invalid config."""
    given = dict(args["config"])
    shared = given.pop("runtime_env", None) or {}
    applications = [_application(app, shared, packages) for app in given["applications"]]
    functions = [str(f) for f in (given.get("grpc_options") or {}).get("grpc_servicer_functions") or []]
    if functions:
        functions = [GRPC_GUARD, *servicers(boot, functions, _archives(applications, packages))]
    config = given | {
        "applications": applications,
        "proxy_location": "HeadOnly",
        # All options, for ``immutable_changes``: Serve never changes them while it runs.
        "http_options": {"request_timeout_s": None, "keep_alive_timeout_s": KEEP_ALIVE_S}
        | (given.get("http_options") or {}) | {"host": boot.ip, "port": boot.ports.serve_http},
        "grpc_options": {"request_timeout_s": None} | (given.get("grpc_options") or {})
        | {"port": boot.ports.serve_grpc, "grpc_servicer_functions": functions},
    }  # fmt: skip
    if args.get("target_capacity") is not None:
        config["target_capacity"] = float(args["target_capacity"])
    return Deploy(str(args["version_id"]), str(args.get("deploy") or ""), config, secrets(config))


def _application(app: dict[str, Any], shared: dict[str, Any], packages: Packages) -> dict[str, Any]:
    own = app.get("runtime_env") or {}
    env = shared | own
    values = (shared.get("env_vars") or {}) | (own.get("env_vars") or {})
    if values:
        env["env_vars"] = {str(k): str(v) for k, v in values.items()}
    if isinstance(env.get("working_dir"), dict):
        env["working_dir"] = packages.uri(env["working_dir"])
    if env.get("py_modules"):
        env["py_modules"] = [packages.uri(m) if isinstance(m, dict) else m for m in env["py_modules"]]
    return {**app, "runtime_env": env} if env else app


def _archives(applications: list[dict[str, Any]], packages: Packages) -> list[str]:
    """The applications' packages on this head."""
    envs = [app.get("runtime_env") or {} for app in applications]
    uris = [u for env in envs for u in (env.get("working_dir"), *(env.get("py_modules") or []))]
    found = [packages.local(str(u)) for u in uris if u]
    return sorted({f"{path}/pkg" for path in found if path is not None})


def servicers(boot: Boot, functions: list[str], archives: list[str]) -> list[str]:
    """Import paths of the same functions for Serve's proxy, which runs without the applications' code: a generated
    module finds them in the environment, then in the packages (Python reads zips). Raises OSError."""
    names = {function: re.sub(r"\W", "_", function) for function in functions}
    lines = ["import sys", "from ray._common.utils import import_attr", f"sys.path += {archives!r}"]
    lines += [f"{name} = import_attr({function!r})" for function, name in names.items()]
    write_private(boot.provider_dir / f"{GRPC_MODULE}.py", "\n".join(lines) + "\n")
    return [f"{GRPC_MODULE}:{names[function]}" for function in functions]


def secrets(config: dict[str, Any]) -> list[str]:
    """All env values of a config that are long enough to be one, longest first."""
    found: set[str] = set()
    for app in config["applications"]:
        envs = [app.get("runtime_env"), *((d.get("ray_actor_options") or {}).get("runtime_env")
                                          for d in app.get("deployments") or [])]  # fmt: skip
        for env in envs:
            found |= {str(v) for v in ((env or {}).get("env_vars") or {}).values() if len(str(v)) >= 4}
    return sorted(found, key=len, reverse=True)


def immutable_changes(details: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Names of the proxy's options that ``config`` would change in the running Serve, which ignores such changes.
    ``details``: of ``RayApi.serve_details``."""
    return [
        f"{part}.{name}"
        for part in ("http_options", "grpc_options")
        for name, value in config[part].items()
        if name in (details.get(part) or {}) and details[part][name] != value
    ]


def refusal_reason(text: str) -> str:
    """Pydantic's errors, or a traceback, in one line: ``where: what``, without the values."""
    found = re.findall(r"^(\S+)\n  (.+?)(?: \[type=[^\n]*)?$", text, re.MULTILINE)
    if found and "validation error" in text.partition("\n")[0]:
        return "; ".join(f"{where}: {what}" for where, what in found)[:500]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given")[:500]
