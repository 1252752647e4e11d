"""Checks of a deploy: of the config itself, against the service's state, of the weights."""

from __future__ import annotations

from collections.abc import Sequence

from api.kit.checks import check_env, check_env_size, check_tags
from api.services.serve_schema import check_options, proxy_options
from heliostat.errors import Conflict, InvalidRequest, NotHonoured
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import ApplicationConfig, ServiceConfig, ServiceDeploy, ServiceState
from heliostat.models.services import ServiceVersionState as VersionState
from store.services.rows import ServiceRow, VersionRow

RUNTIME_ENV = ("env_vars", "working_dir", "py_modules", "pip")
_WHY_NOT = {
    "conda": "nodes have no conda; give pip",
    "uv": "give pip",
    "container": "set the image in the cloud's config",
    "image_uri": "set the image in the cloud's config",
    "excludes": "set it in the service's config, next to working_dir",
    "py_executable": "nodes run one Python",
}


# --- the config itself ----------------------------------------------------------------------------------------------


def check_config(at: str, config: ServiceConfig) -> None:
    """``at``: where the config is in the request."""
    check_tags(config.tags, f"{at}tags")
    check_env(config.env_vars, f"{at}env_vars")
    for i, app in enumerate(config.applications):
        _check_application(f"{at}applications.{i}.", app)
    check_options(at, config)
    check_env_size(config.secrets(), f"{at}env_vars")


def _check_application(at: str, app: ApplicationConfig) -> None:
    names = [d["name"] for d in app.deployments]
    if double := sorted({n for n in names if names.count(n) > 1}):
        raise InvalidRequest(
            f"Application {app.name!r} has two deployments named {', '.join(double)}.",
            remedy="Give the options of each deployment once.",
            field=f"{at}deployments",
        )
    at = f"{at}runtime_env"
    for key in sorted(app.runtime_env.keys() - set(RUNTIME_ENV)):
        raise NotHonoured(
            f"{key!r} of a runtime_env is not supported: {_WHY_NOT.get(key, 'there is no substitute')}.",
            remedy=f"Leave it out; supported are {', '.join(RUNTIME_ENV)}.",
            field=f"{at}.{key}",
        )
    env = app.runtime_env.get("env_vars")
    if env is not None:
        if not isinstance(env, dict) or any(not isinstance(v, str) for v in env.values()):
            raise _wrong_type(f"{at}.env_vars", "must be an object of strings")
        check_env(env, f"{at}.env_vars")
    if not isinstance(app.runtime_env.get("working_dir"), str | None):
        raise _wrong_type(f"{at}.working_dir", "must be a string")
    if not _strings(app.runtime_env.get("py_modules", [])):
        raise _wrong_type(f"{at}.py_modules", "must be a list of strings")
    pip = app.runtime_env.get("pip", [])
    if not _strings(pip) and not (isinstance(pip, dict) and _strings(pip.get("packages"))):
        raise _wrong_type(f"{at}.pip", "must be a list of requirement lines, or an object that has them in 'packages'")


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _wrong_type(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {what}.", remedy=f"Correct {field!r}.", field=field)


# --- against the service's state -----------------------------------------------------------------------------------


def check_state(row: ServiceRow) -> None:
    if row.state == ServiceState.TERMINATING:
        raise Conflict(
            f"Service {row.name} is TERMINATING.",
            remedy="Deploy again when it is TERMINATED: it keeps its id, its name and its tokens.",
            resource=row.id,
        )


def check_fits(row: ServiceRow, at: str, config: ServiceConfig, cloud_id: str, cloud: str) -> None:
    """A further version of a service, terminated ones included."""
    if cloud_id != row.cloud_id:
        raise Conflict(
            f"Service {row.name} is in cloud {row.input.cloud}, this version would be in {cloud}.",
            remedy="Name the same cloud, or deploy under another name.",
            resource=row.id,
            field=f"{at}cloud",
        )
    if config.query_auth_token_enabled != row.gate.enabled:
        now, then = ("need a", "needs none") if row.gate.enabled else ("need no", "needs one")
        raise Conflict(
            f"Requests to service {row.name} {now} token, and this version {then}: that is fixed for a service's life.",
            remedy=f"Set query_auth_token_enabled to {str(row.gate.enabled).lower()}, or delete the service first.",
            resource=row.id,
            field=f"{at}query_auth_token_enabled",
        )


def check_in_place(
    name: str,
    row: ServiceRow | None,
    living: Sequence[VersionRow],
    config: ServiceConfig,
    compute_config: ComputeConfig,
) -> None:
    """Whether its running version can become this one on its own clusters. ``row``: None, the service is new."""
    running = [v for v in living if v.state == VersionState.RUNNING]
    under_way = [v.name for v in living if v.state in (VersionState.STARTING, VersionState.UPDATING)]
    if row is None or row.state != ServiceState.RUNNING or len(running) != 1:
        what = "is new" if row is None else f"is {row.state} with {len(running)} running versions"
        raise Conflict(
            f"Only a RUNNING service with one running version is updated in place; {name} {what}.",
            remedy="Leave out in_place, or wait until it is RUNNING.",
            resource=row.id if row is not None else name,
            field="in_place",
        )
    if row.service.rollout is not None or under_way:
        raise Conflict(
            f"Service {name} is rolling out {', '.join(under_way) or 'another version'}.",
            remedy="Wait until the rollout is done, abort it, or leave out in_place: then this deploy supersedes it.",
            resource=row.id,
            field="in_place",
        )
    old = running[0].spec
    was, is_ = proxy_options(running[0].version.config), proxy_options(config)
    for field, same in (
        ("compute_config", compute_config == old.compute_config),
        ("cluster_replicas", config.cluster_replicas == old.cluster_replicas),
        *((name, is_[name] == was[name]) for name in is_),
    ):
        if not same:
            raise InvalidRequest(
                f"{field} differs from that of the running version {old.name}, whose clusters this one would use.",
                remedy=f"Leave {field} as it is, or leave out in_place.",
                field=f"config.{field}",
            )


def check_canary(name: str, row: ServiceRow | None, percent: int | None) -> None:
    """``row``: None, the service is new. ``percent``: 100 requests no stop."""
    if percent is None or percent == 100 or (row is not None and row.service.primary_version is not None):
        return
    raise InvalidRequest(
        f"No version of service {name} serves yet, so this one can't be a canary.",
        remedy="Leave out canary_percent, or wait until the service is RUNNING.",
        resource=row.id if row is not None else name,
        field="canary_percent",
    )


def check_weights(name: str, body: ServiceDeploy, living: Sequence[str]) -> None:
    """``living``: names of the service's versions that are not ending."""
    new = {c.version_name for c in body.configs}
    for i, weight in enumerate(body.versions):
        if weight.name in new:
            if weight.traffic_percent == 0:
                raise InvalidRequest(
                    f"Version {weight.name!r} is new and would be terminated at once: its weight is 0.",
                    remedy="Give it a share, or leave it out.",
                    field=f"versions.{i}.traffic_percent",
                )
        elif weight.name not in living:
            raise InvalidRequest(
                f"Service {name} has no running version {weight.name!r}.",
                remedy=f"Running are: {', '.join(living) or 'none'}. Give the config of a new version in 'configs'.",
                field=f"versions.{i}.name",
            )
