"""YAML files in the shapes of ``JobConfig``, ``ServiceConfig``, ``ComputeConfig`` and ``ScheduleConfig``.

A field that we know of but do not carry out is refused by name with the reason, an unknown one with the nearest name
that exists; nothing is accepted and ignored. Relative paths in a file are taken from the current directory, as the
command line's are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from heliostat.client.sources import COMMAND_LINE, Document, Source, load
from heliostat.errors import InvalidRequest, NotHonoured
from heliostat.models.clouds import AwsCloudCreate, AwsConfig, GcpCloudCreate, GcpConfig
from heliostat.models.common import Model, did_you_mean
from heliostat.models.compute_configs import (
    NOT_SUPPORTED,
    ComputeConfig,
    HeadNodeConfig,
    PhysicalResources,
    WorkerNodeGroupConfig,
)
from heliostat.models.jobs import NOT_SUPPORTED_JOB, JobConfig
from heliostat.models.schedules import ScheduleConfig
from heliostat.models.services import (
    NOT_SUPPORTED_SERVICE,
    ApplicationConfig,
    ProbeConfig,
    RolloutConfig,
    ServiceConfig,
)

__all__ = [
    "COMMAND_LINE",
    "Document",
    "Source",
    "build",
    "cloud",
    "compute_config",
    "from_shell",
    "job_config",
    "load",
    "read_requirements",
    "schedule_config",
    "service_config",
]

AnyModel = TypeVar("AnyModel", bound=Model)


def job_config(fields: Mapping[str, Any], source: Source, prefix: str = "") -> JobConfig:
    """Checks and builds; errors say where in ``source`` the field stands. ``prefix``: path of the mapping that the
    fields are in, with a dot."""
    fields = dict(fields)
    _check(fields, JobConfig, source, prefix, NOT_SUPPORTED_JOB)
    _workload(fields, source, prefix)
    return build(JobConfig, fields, source, prefix)


def service_config(fields: Mapping[str, Any], source: Source) -> ServiceConfig:
    """Likewise. What is null says nothing, except a ``route_prefix`` and a ``probe``."""
    fields = {name: value for name, value in fields.items() if value is not None}
    _check(fields, ServiceConfig, source, "", NOT_SUPPORTED_SERVICE)
    _workload(fields, source, "")
    if isinstance(fields.get("rollout"), dict):
        fields["rollout"] = _part(fields["rollout"], RolloutConfig, source, "rollout.")
    if isinstance(fields.get("applications"), list):
        fields["applications"] = [
            _application(app, source, f"applications.{i}.") if isinstance(app, dict) else app
            for i, app in enumerate(fields["applications"])
        ]
    return build(ServiceConfig, fields, source)


def _application(fields: Mapping[str, Any], source: Source, prefix: str) -> dict[str, Any]:
    app = {name: value for name, value in fields.items() if value is not None or name in ("route_prefix", "probe")}
    _check(app, ApplicationConfig, source, prefix, {})
    if isinstance(app.get("probe"), dict):
        app["probe"] = _part(app["probe"], ProbeConfig, source, f"{prefix}probe.")
    if isinstance(app.get("runtime_env"), dict):
        app["runtime_env"] = env = dict(app["runtime_env"])
        if isinstance(env.get("env_vars"), dict):
            env["env_vars"] = _env_vars(env["env_vars"], source, f"{prefix}runtime_env.env_vars.")
            for name, value in env["env_vars"].items():
                if not isinstance(value, str):  # the model can't tell: Serve's field takes anything
                    path = f"{prefix}runtime_env.env_vars.{name}"
                    raise InvalidRequest(
                        f"{source.at(path)}: {path} is not text.", remedy="Put it in quotes.", field=path
                    )
    return app


def _part(fields: Mapping[str, Any], model: type[Model], source: Source, prefix: str) -> dict[str, Any]:
    part = {name: value for name, value in fields.items() if value is not None}
    _check(part, model, source, prefix, {})
    return part


def compute_config(fields: Mapping[str, Any], source: Source) -> ComputeConfig:
    return build(ComputeConfig, _checked_compute(fields, source, ""), source)


def cloud(fields: Mapping[str, Any], source: Source) -> AwsCloudCreate | GcpCloudCreate:
    """What ``cloud register -f`` takes: ``name``, ``provider`` and the provider's ``config``."""
    models: dict[Any, type[AwsCloudCreate | GcpCloudCreate]] = {"aws": AwsCloudCreate, "gcp": GcpCloudCreate}
    provider = fields.get("provider")
    if provider not in models:
        what = "there is no provider" if provider is None else f"provider: there is no {provider!r}"
        raise InvalidRequest(f"{source.at('provider')}: {what}.", remedy="Set it to aws or gcp.", field="provider")
    fields = dict(fields)
    if isinstance(fields.get("config"), dict):
        model: type[Model] = AwsConfig if provider == "aws" else GcpConfig
        fields["config"] = _part(fields["config"], model, source, "config.")
    _check(fields, models[provider], source, "", {})
    return build(models[provider], fields, source)


def schedule_config(fields: Mapping[str, Any], source: Source) -> ScheduleConfig:
    fields = dict(fields)
    _check(fields, ScheduleConfig, source, "", {})
    if isinstance(fields.get("job_config"), dict):
        fields["job_config"] = job_config(fields["job_config"], source, "job_config.")
        if fields["job_config"].name is None:
            raise InvalidRequest(
                f"{source.at('job_config')}: the schedule has no name.",
                remedy="Set job_config.name.",
                field="job_config.name",
            )
    if fields.get("timezone") == "local":
        fields["timezone"] = _local_zone()
    if fields.get("timezone") is None:
        fields.pop("timezone", None)
    return build(ScheduleConfig, fields, source)


def read_requirements(path: str | Path) -> list[str]:
    """The lines of a requirements file, without comments. Lines that only pip's own command line understands (``-r``,
    ``-c``, ``-e``, local paths) are refused: the cluster does not have those files."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise InvalidRequest(
            f"requirements: the file {str(path)!r} can't be read: {why}.",
            remedy="Paths are taken from the current directory; a list of lines is accepted too.",
            field="requirements",
        ) from error
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        if line.endswith("\\") or line.split("=")[0].split()[0] in (
            "-r",
            "--requirement",
            "-c",
            "--constraint",
            "-e",
            "--editable",
        ):
            raise InvalidRequest(
                f"requirements: {path}:{number}: {line!r} refers to more than this line.",
                remedy="Write one requirement a line; a module of your own belongs into py_modules.",
                field="requirements",
            )
        lines.append(line)
    return lines


def from_shell(name: str, where: str) -> str:
    """The value of an environment variable that is named without one; ``where`` begins the error."""
    if name not in os.environ:
        raise InvalidRequest(
            f"{where} has no value and is not set in your environment.",
            remedy=f"Set {name} in your environment, or give it a value.",
            field=f"env_vars.{name}",
        )
    return os.environ[name]


def _workload(fields: dict[str, Any], source: Source, prefix: str) -> None:
    """What jobs and services have in common and the client reads: files that are named, the shell's variables."""
    if isinstance(fields.get("requirements"), str):
        fields["requirements"] = read_requirements(fields["requirements"])
    if isinstance(fields.get("env_vars"), dict):
        fields["env_vars"] = _env_vars(fields["env_vars"], source, f"{prefix}env_vars.")
    if isinstance(fields.get("compute_config"), dict):
        checked = _checked_compute(fields["compute_config"], source, f"{prefix}compute_config.")
        fields["compute_config"] = build(ComputeConfig, checked, source, f"{prefix}compute_config.")


def _env_vars(values: Mapping[str, Any], source: Source, prefix: str) -> dict[str, Any]:
    return {
        name: from_shell(name, f"{source.at(f'{prefix}{name}')}: {prefix}{name}") if value is None else value
        for name, value in values.items()
    }


def _checked_compute(fields: Mapping[str, Any], source: Source, prefix: str) -> dict[str, Any]:
    fields = dict(fields)
    _check(fields, ComputeConfig, source, prefix, NOT_SUPPORTED["ComputeConfig"])
    if fields.get("head_node", ...) is None:
        del fields["head_node"]
    if isinstance(fields.get("head_node"), dict):
        fields["head_node"] = head = dict(fields["head_node"])
        _check_node(head, HeadNodeConfig, source, f"{prefix}head_node.")
    if isinstance(fields.get("worker_nodes"), list):
        groups = [dict(g) if isinstance(g, dict) else g for g in fields["worker_nodes"]]
        for i, group in enumerate(groups):
            if isinstance(group, dict):
                _check_node(group, WorkerNodeGroupConfig, source, f"{prefix}worker_nodes.{i}.")
        fields["worker_nodes"] = groups
    return fields


def _check_node(fields: dict[str, Any], model: type[Model], source: Source, prefix: str) -> None:
    _check(fields, model, source, prefix, NOT_SUPPORTED["NodeConfig"] | NOT_SUPPORTED.get(model.__name__, {}))
    if isinstance(fields.get("required_resources"), dict):
        fields["required_resources"] = needed = dict(fields["required_resources"])
        _check(needed, PhysicalResources, source, f"{prefix}required_resources.", NOT_SUPPORTED["PhysicalResources"])


def _check(fields: dict[str, Any], model: type[Model], source: Source, prefix: str, refused: Mapping[str, str]) -> None:
    """Refuses unknown and not honoured fields; one that is null says nothing and is dropped."""
    for name in list(fields):
        if name in model.model_fields:
            continue
        if name in refused:
            if fields[name] is None:
                del fields[name]
                continue
            raise NotHonoured(
                f"{source.at(f'{prefix}{name}')}: {prefix}{name} is not supported: {refused[name]}.",
                remedy="Remove the field.",
                field=f"{prefix}{name}",
            )
        raise _unknown(f"{prefix}{name}", str(name), model.model_fields, source)


def _unknown(path: str, name: str, known: Iterable[str], source: Source) -> InvalidRequest:
    return InvalidRequest(
        f"{source.at(path)}: there is no field {path!r}.", remedy=did_you_mean(name, known), field=path
    )


def build(model: type[AnyModel], fields: Mapping[str, Any], source: Source, prefix: str = "") -> AnyModel:
    """Validates; the error names field and reason and never repeats the value, which may be a secret."""
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = (prefix + ".".join(str(part) for part in first["loc"])).rstrip(".")
        message = first["msg"].removeprefix("Value error, ")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        at = source.at(path)
        if first["type"] == "missing":
            raise InvalidRequest(f"{at}: {path} is missing{more}.", remedy=f"Add {path}.", field=path) from None
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(f"{at}: there is no field {path!r}{more}.", remedy="Remove it.", field=path) from None
        remedy = "Put it in quotes." if first["type"] == "string_type" else f"Correct {path or 'it'}."
        raise InvalidRequest(
            f"{at}: {path or model.__name__}: {message}{more}.", remedy=remedy, field=path or None
        ) from None


def _local_zone() -> str:
    """The IANA name of this machine's time zone."""
    named = os.environ.get("TZ", "").lstrip(":")
    if named:
        return named
    target = os.path.realpath("/etc/localtime")
    if "zoneinfo/" in target:
        return target.split("zoneinfo/", 1)[1]
    raise InvalidRequest(
        "timezone: this machine does not tell the name of its time zone.",
        remedy="Write it, e.g. 'Europe/Berlin'.",
        field="timezone",
    )
