"""Checks names and types of a deploy's options for Ray Serve and for probes: Serve ignores an unknown name, and refuses
a wrong value only when machines are running. Serve itself checks what the values mean.

The names are those of Ray 2.60's ``ray/serve/schema.py`` and ``ray/serve/config.py`` (a test compares).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection
from typing import Any

from heliostat.errors import InvalidRequest, NotHonoured
from heliostat.models.common import did_you_mean
from heliostat.models.services import ApplicationConfig, ProbeConfig, ServiceConfig

DEPLOYMENT = (
    "name", "num_replicas", "max_ongoing_requests", "max_queued_requests", "backpressure_config", "user_config",
    "autoscaling_config", "graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s", "health_check_period_s",
    "health_check_timeout_s", "ray_actor_options", "placement_group_bundles", "placement_group_strategy",
    "placement_group_bundle_label_selector", "max_replicas_per_node", "logging_config", "request_router_config",
    "gang_scheduling_config", "deployment_actors", "rolling_update_percentage", "max_surge_percent",
)  # fmt: skip
"""``DeploymentSchema``."""
PARTS: dict[str, tuple[str, ...]] = {
    "ray_actor_options": (
        "runtime_env", "num_cpus", "num_gpus", "memory", "resources", "accelerator_type", "label_selector",
        "fallback_strategy",
    ),
    "autoscaling_config": (
        "min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests", "metrics_interval_s",
        "look_back_period_s", "smoothing_factor", "upscale_smoothing_factor", "downscale_smoothing_factor",
        "upscaling_factor", "downscaling_factor", "downscale_delay_s", "downscale_to_zero_delay_s", "upscale_delay_s",
        "aggregation_function", "policy",
    ),
    "backpressure_config": ("status_code", "retry_after_s"),
    "gang_scheduling_config": ("gang_size", "gang_placement_strategy", "runtime_failure_policy"),
    "request_router_config": (
        "request_router_class", "request_router_kwargs", "request_routing_stats_period_s",
        "request_routing_stats_timeout_s", "initial_backoff_s", "backoff_multiplier", "max_backoff_s",
    ),
    "logging_config": ("encoding", "log_level", "logs_dir", "enable_access_log", "additional_log_standard_attrs"),
}  # fmt: skip
"""``RayActorOptionsSchema``, ``AutoscalingConfig`` and so on: objects within a deployment's options."""
ACTOR = ("name", "actor_class", "init_args", "init_kwargs", "actor_options")
"""``DeploymentActorConfig``: one of a deployment's ``deployment_actors``."""

PROXY: tuple[tuple[str, str, Any], ...] = (
    ("http_options", "request_timeout_s", None),
    ("http_options", "keep_alive_timeout_s", 90),
    ("grpc_options", "request_timeout_s", None),
    ("grpc_options", "grpc_servicer_functions", []),
)
"""Options of Serve's proxies, each with its default."""

_ENV_WHY = "its values would be neither encrypted nor masked, its code not uploaded"
_ENV_REMEDY = "Put it into the application's runtime_env, which its deployments inherit."

_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110, token."""
_VALUE = re.compile(r"[ -~\t]*")
_PATH = re.compile(r"[!-~]*")
_RESERVED = {
    "authorization": "the probe sends its own token",
    "host": "it is the load balancer's address",
    "content-length": "it follows from the body",
    "transfer-encoding": "it follows from the body",
    "connection": "each probe has its own connection",
}


def check_options(at: str, config: ServiceConfig) -> None:
    """``at``: where the config is in the request. Raises InvalidRequest, NotHonoured."""
    for part in ("http_options", "grpc_options"):
        timeout = getattr(config, part).get("request_timeout_s")
        if timeout is not None and not _is_seconds(timeout):
            raise _wrong_type(f"{at}{part}.request_timeout_s", "must be a number of seconds above 0, or null")
    if config.logging_config is not None:
        _check_logging(f"{at}logging_config", config.logging_config)
    for i, app in enumerate(config.applications):
        _check_application(f"{at}applications.{i}.", app)
    if config.serves_grpc and all(app.route_prefix is None for app in config.applications):
        raise InvalidRequest(
            "The service speaks gRPC, but none of its applications has a route_prefix: Ray Serve routes gRPC, too, "
            "only to applications with one.",
            remedy="Give the application a route_prefix, and `probe: null` if it does not answer HTTP.",
            field=f"{at}applications.0.route_prefix",
        )


def proxy_options(config: ServiceConfig) -> dict[str, Any]:
    """By field: options that a running Serve can't change, with Serve's defaults (``agent/serve/config.py``)."""
    given = {"http_options": config.http_options, "grpc_options": config.grpc_options}
    return {f"{part}.{name}": given[part].get(name, default) for part, name, default in PROXY}


def _check_application(at: str, app: ApplicationConfig) -> None:
    if app.logging_config is not None:
        _check_logging(f"{at}logging_config", app.logging_config)
    for i, deployment in enumerate(app.deployments):
        _check_deployment(f"{at}deployments.{i}", deployment)
    prefix = app.route_prefix or "/"
    if not _PATH.fullmatch(prefix) or "{" in prefix or "}" in prefix:
        raise _wrong_type(f"{at}route_prefix", "must be printable ASCII without spaces and braces")
    if app.route_prefix is None and app.probe not in (None, ProbeConfig()):
        raise InvalidRequest(
            f"Application {app.name!r} has a probe, but no route_prefix to reach it by.",
            remedy="Leave out the probe: then Serve's status of the application decides. Or give it a route_prefix.",
            field=f"{at}probe",
        )
    if app.probe is not None:
        _check_probe(f"{at}probe.", app.probe)


def _check_deployment(at: str, deployment: dict[str, Any]) -> None:
    _known(at, deployment, DEPLOYMENT)
    for part, names in PARTS.items():
        value = deployment.get(part)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise _wrong_type(f"{at}.{part}", "must be an object")
        _known(f"{at}.{part}", value, names)
    _no_env(f"{at}.ray_actor_options", deployment.get("ray_actor_options"))
    if deployment.get("logging_config") is not None:
        _check_logging(f"{at}.logging_config", deployment["logging_config"])
    actors = deployment.get("deployment_actors")
    if actors is None:
        return
    if not isinstance(actors, list) or any(not isinstance(a, dict) for a in actors):
        raise _wrong_type(f"{at}.deployment_actors", "must be a list of objects")
    for i, actor in enumerate(actors):
        _known(f"{at}.deployment_actors.{i}", actor, ACTOR)
        _no_env(f"{at}.deployment_actors.{i}.actor_options", actor.get("actor_options"))


def _no_env(at: str, options: object) -> None:
    if isinstance(options, dict) and "runtime_env" in options:
        raise NotHonoured(
            f"A runtime_env of a deployment is not supported: {_ENV_WHY}.",
            remedy=_ENV_REMEDY,
            field=f"{at}.runtime_env",
        )


def _check_logging(at: str, given: dict[str, Any]) -> None:
    _known(at, given, PARTS["logging_config"])
    levels = logging.getLevelNamesMapping()
    encoding, level = given.get("encoding", "TEXT"), given.get("log_level", "INFO")
    if encoding not in ("TEXT", "JSON"):
        raise _wrong_type(f"{at}.encoding", "must be TEXT or JSON")
    if isinstance(level, bool) or level not in (*levels, *levels.values()):
        raise _wrong_type(f"{at}.log_level", f"must be one of {', '.join(levels)}")
    if not isinstance(given.get("logs_dir"), str | None):
        raise _wrong_type(f"{at}.logs_dir", "must be the path of a directory")
    if not isinstance(given.get("enable_access_log", True), bool):
        raise _wrong_type(f"{at}.enable_access_log", "must be true or false")
    attributes = given.get("additional_log_standard_attrs", [])
    if not isinstance(attributes, list) or any(not isinstance(a, str) for a in attributes):
        raise _wrong_type(f"{at}.additional_log_standard_attrs", "must be a list of names of a log record's attributes")


def _check_probe(at: str, probe: ProbeConfig) -> None:
    if not _PATH.fullmatch(probe.path):
        raise _wrong_type(f"{at}path", "must be printable ASCII without spaces; write other characters percent-encoded")
    for name, value in probe.headers.items():
        field, lower = f"{at}headers.{name}", name.lower()
        if not _HEADER.fullmatch(name):
            raise InvalidRequest(
                f"{name!r} is not a valid header name.", remedy="Use letters, digits and dashes.", field=f"{at}headers"
            )
        if lower in _RESERVED or lower.startswith("x-heliostat-"):
            why = _RESERVED.get(lower, "Heliostat reserves headers of this name")
            raise InvalidRequest(f"A probe's header {name!r} can't be set: {why}.", remedy="Leave it out.", field=field)
        if not _VALUE.fullmatch(value):
            raise _wrong_type(field, "must be one line of printable ASCII")


def _known(at: str, given: dict[str, Any], names: Collection[str]) -> None:
    for name in given:
        if name not in names:
            raise InvalidRequest(
                f"{at}.{name}: Ray Serve has no such option.",
                remedy=did_you_mean(str(name), names),
                field=f"{at}.{name}",
            )


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


def _wrong_type(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {what}.", remedy=f"Correct {field!r}.", field=field)
