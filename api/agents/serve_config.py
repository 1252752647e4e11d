"""Ray Serve's config of a version on a head: the recorded config with its env values decrypted and its packages signed.
For the agent only: never written, never logged."""

from __future__ import annotations

import asyncio
from typing import Any

from api.agents.fleet import ClusterView
from api.kit.context import Context
from api.storage.buckets import bucket_of
from api.storage.packages import sign
from heliostat.errors import NotFound
from heliostat.models.services import ServiceConfig
from store.encrypted_values import read_sealed
from store.services.rows import load_version

DEPLOY_AGAIN = "Deploy the service again."


async def serve_config(ctx: Context, view: ClusterView, version_id: str) -> dict[str, Any]:
    """Serve's multi-application config, without host and port, which the agent sets. Raises NotFound when the version
    is not one of the cluster's service, or when what it refers to has been deleted; InternalError."""
    row = await load_version(ctx.db, version_id)
    if row is None or not view.service_id or row.service_id != view.service_id:
        raise NotFound(
            f"Version {version_id} is not one of the service of cluster {view.id}.",
            remedy=DEPLOY_AGAIN,
            resource=version_id,
        )
    config = row.version.config
    if row.env_ref is not None:
        values = await read_sealed(ctx.db, ctx.keys, row.env_ref)
        if values is None:
            raise NotFound("The version's env values have been deleted by the retention policy.", remedy=DEPLOY_AGAIN)
        config = config.with_secrets(values)
    named = [uri for _, uri in config.packages()]
    signed: dict[str, Any] = {}
    if named:
        bucket = await bucket_of(ctx.buckets, view.cloud_id)
        signed = await asyncio.to_thread(sign, named, view.project_id, bucket, DEPLOY_AGAIN)
    given: dict[str, Any] = {
        "applications": [
            {
                "name": app.name,
                "route_prefix": app.route_prefix,
                "import_path": app.import_path,
                "args": app.args,
                "runtime_env": _runtime_env(config, app.runtime_env, signed),
                "deployments": app.deployments,
                **({"logging_config": app.logging_config} if app.logging_config is not None else {}),
            }
            for app in config.applications
        ],
        "http_options": config.http_options,
        "grpc_options": config.grpc_options,
    }
    if config.logging_config is not None:
        given["logging_config"] = config.logging_config
    return given


def _runtime_env(config: ServiceConfig, own: dict[str, Any], signed: dict[str, Any]) -> dict[str, Any]:
    """The application's own wins; of the env values, name by name."""
    env: dict[str, Any] = {"env_vars": {**config.env_vars, **(own.get("env_vars") or {})}}
    if (working_dir := own.get("working_dir") or config.working_dir) is not None:
        env["working_dir"] = signed[working_dir]
    if py_modules := own.get("py_modules") or config.py_modules:
        env["py_modules"] = [signed[uri] for uri in py_modules]
    if (pip := own.get("pip") or config.requirements) and not isinstance(pip, dict):
        pip = {"packages": pip, "pip_check": False}
    if pip:
        env["pip"] = pip
    return env
