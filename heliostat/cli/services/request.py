"""From the files and flags of ``heliostat service deploy`` to one ``ServiceDeploy``. Nothing is sent before all of it
is checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.cli import options
from heliostat.errors import InvalidRequest

if TYPE_CHECKING:
    from heliostat.models.services import ServiceDeploy

VERSIONS_SHAPE = """Write --versions '[{"name": "v1", "traffic_percent": 80}, …]'."""


@dataclass(frozen=True)
class Added:
    """Flags that are merged with what a file says; all others replace it."""

    application: dict[str, Any]
    """``import_path`` and ``args`` of the only application; empty: the file's."""
    excludes: list[str]
    env_vars: dict[str, str]
    rollout: dict[str, Any]

    def __bool__(self) -> bool:
        return bool(self.application or self.excludes or self.env_vars or self.rollout)


def build(
    files: list[Path], *, replacing: dict[str, Any], adding: Added, how: dict[str, Any], versions: str | None
) -> ServiceDeploy:
    """``how``: ``in_place``, ``canary_percent``, ``max_surge_percent``; ``versions``: JSON, static weights."""
    from heliostat.client import yaml_files
    from heliostat.models.services import ServiceDeploy

    if versions is None and len(files) > 1:
        raise InvalidRequest("Several files need --versions.", remedy="Give each version its weight with --versions.")
    if len(files) > 1 and "version_name" in replacing:
        raise InvalidRequest(
            "--version-name can't name the versions of several files.", remedy="Set version_name in each file."
        )
    if len(files) > 1 and adding.application:
        raise InvalidRequest("IMPORT_PATH can't apply to several files.", remedy="Set `applications` in each file.")
    if adding.rollout and (versions is not None or how.get("in_place")):
        flag = "--versions" if versions is not None else "--in-place"
        raise InvalidRequest(
            f"--steps and --hold-s can't be combined with {flag}.",
            remedy="Remove them. For later rollouts, set `rollout` in the file.",
            field=f"rollout.{next(iter(adding.rollout))}",
        )
    fields: dict[str, Any] = dict(how)
    if versions is not None:
        fields["versions"] = _weights(versions)
    if versions is not None and not files and not adding.application:
        if adding or replacing.keys() - {"name", "project"}:
            raise InvalidRequest(
                "Without a file or an import path, --versions changes weights only.",
                remedy="Combine --versions with -n and --project only, or give the new version's file with -f.",
            )
        return yaml_files.build(ServiceDeploy, fields | replacing, yaml_files.COMMAND_LINE)
    documents = [yaml_files.load(path) for path in files] or [yaml_files.Document({}, yaml_files.COMMAND_LINE)]
    configs = [
        yaml_files.service_config(
            _merged(document, replacing, adding),
            document.source.replaced(replacing)
            .replaced(adding.application, "applications.0.")
            .replaced(adding.rollout, "rollout."),
        )
        for document in documents
    ]
    if all(config.name is None for config in configs):
        raise InvalidRequest("The service has no name.", remedy="Give -n, or set `name` in the file.", field="name")
    fields |= {"config": configs[0]} if versions is None else {"configs": configs}
    return yaml_files.build(ServiceDeploy, fields, yaml_files.COMMAND_LINE)


def application(import_path: str | None, arguments: list[str]) -> dict[str, Any]:
    if import_path is None:
        return {}
    args = {"args": options.pairs(arguments, "ARGS")} if arguments else {}
    return {"import_path": import_path, **args}


def rollout(steps: str | None, hold_s: float | None) -> dict[str, Any]:
    """``steps``: ``5,25,50,100``."""
    fields: dict[str, Any] = {} if hold_s is None else {"hold_s": hold_s}
    if steps is None:
        return fields
    try:
        return fields | {"steps": [int(part.strip().removesuffix("%")) for part in steps.split(",")]}
    except ValueError:
        raise InvalidRequest(
            f"--steps {steps!r} is not a list of percentages.",
            remedy="Write e.g. --steps 5,25,50,100.",
            field="rollout.steps",
        ) from None


def _merged(fields: dict[str, Any], replacing: dict[str, Any], adding: Added) -> dict[str, Any]:
    fields = {**fields, **replacing}
    if adding.application:
        apps = fields.get("applications") or [{}]
        if not isinstance(apps, list) or len(apps) > 1 or not isinstance(apps[0], dict):
            raise InvalidRequest(
                "The file has several applications; IMPORT_PATH names only one.",
                remedy="Remove IMPORT_PATH, or change the file.",
                field="applications",
            )
        fields["applications"] = [{**apps[0], **adding.application}]
    if not fields.get("applications"):
        raise InvalidRequest(
            "The service has no application.",
            remedy="Give its import path, module:app, or set `applications` in the file.",
            field="applications",
        )
    if adding.excludes:
        fields["excludes"] = [*(fields.get("excludes") or []), *adding.excludes]
    if adding.env_vars:
        fields["env_vars"] = {**_mapping(fields, "env_vars"), **adding.env_vars}
    if adding.rollout:
        fields["rollout"] = {**_mapping(fields, "rollout"), **adding.rollout}
    return fields


def _mapping(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} is not a mapping.", remedy="Write 'key: value' lines.", field=name)
    return value


def _weights(text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(
            f"--versions is not valid JSON: {error}.", remedy=VERSIONS_SHAPE, field="versions"
        ) from None
    if not isinstance(content, list):
        raise InvalidRequest("--versions is not a list.", remedy=VERSIONS_SHAPE, field="versions")
    return content
