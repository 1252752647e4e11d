"""What a deploy's config may not contain."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from api.services.serve_schema import ACTOR, PARTS
from api.services.serve_schema import DEPLOYMENT as DEPLOYMENT_OPTIONS
from heliostat.models.jobs import MASK
from store.tables import accepted, sealed, service_deploys, service_versions, services
from tests.api.conftest import World
from tests.api.services.support import APP, body, deployed

pytestmark = pytest.mark.timeout(90)


# --- bad input --------------------------------------------------------------------------------------------

APPS = "config.applications.0"


def with_app(**more: Any) -> dict[str, Any]:
    return body(applications=[{**APP, **more}])


def with_env(**runtime_env: Any) -> dict[str, Any]:
    return with_app(runtime_env=runtime_env)


DEPLOYMENT = f"{APPS}.deployments.0"
PROBE = f"{APPS}.probe.headers"


def with_deployment(part: str, value: Any) -> dict[str, Any]:
    return with_app(deployments=[{"name": "d", part: value}])


def with_header(name: str, value: str = "1") -> dict[str, Any]:
    return with_app(probe={"headers": {name: value}})


CASES: list[tuple[dict[str, Any], int, str | None, str]] = [
    (body(None), 422, "config.name", "no name"),
    ({}, 422, None, "set one 'config'"),
    ({**body(), "name": "other"}, 422, "config.name", "Two names"),
    (body("no spaces"), 422, "config.name", "pattern"),
    (body(image_uri="x"), 422, "config.image_uri", "sets the image"),
    (body(tracing_config={}), 422, "config.tracing_config", "not supported yet"),
    (body(applications=[]), 422, "config.applications", "at least 1"),
    (body(applications=[APP, APP]), 422, "config", "same name: default"),
    (with_app(import_path="main"), 422, f"{APPS}.import_path", "not a valid import path"),
    (with_app(import_path="a b:c"), 422, f"{APPS}.import_path", "not a valid import path"),
    (with_app(route_prefix="/-"), 422, f"{APPS}.route_prefix", "Serve's own"),
    (with_app(deployments=[{"name": "d"}, {"name": "d"}]), 422, f"{APPS}.deployments", "two deployments named d"),
    (with_env(conda="x"), 422, f"{APPS}.runtime_env.conda", "not supported"),
    (with_env(image_uri="x"), 422, f"{APPS}.runtime_env.image_uri", "cloud's config"),
    (with_env(container={}), 422, f"{APPS}.runtime_env.container", "cloud's config"),
    (with_env(env_vars={"A B": "x"}), 422, f"{APPS}.runtime_env.env_vars", "environment variable"),
    (with_env(env_vars={"A": 1}), 422, f"{APPS}.runtime_env.env_vars", "object of strings"),
    (with_env(env_vars={"A": MASK}), 422, f"{APPS}.runtime_env.env_vars.A", "mask"),
    (with_env(env_vars=["A"]), 422, f"{APPS}.runtime_env.env_vars", "object of strings"),
    (with_env(working_dir="./x"), 422, f"{APPS}.runtime_env.working_dir", "neither an upload"),
    (with_env(working_dir=3), 422, f"{APPS}.runtime_env.working_dir", "must be a string"),
    (with_env(py_modules=["x"]), 422, f"{APPS}.runtime_env.py_modules.0", "neither an upload"),
    (with_env(pip="reqs.txt"), 422, f"{APPS}.runtime_env.pip", "list of requirement lines"),
    (with_env(working_dir="upload:" + "0" * 64), 404, f"{APPS}.runtime_env.working_dir", "not in the bucket"),
    (body(working_dir="https://me:pw@x/y.zip"), 422, "config.working_dir", "password"),
    (body(excludes=["x"]), 422, "config.excludes", "service uploads nothing"),
    (body(env_vars={"A": "x" * 300_000}), 422, "config.env_vars", "bytes"),
    (body(tags={"": "x"}), 422, "config.tags", "not valid"),
    (body(cloud="mars"), 404, "config.cloud", "mars"),
    (body(project="mars"), 404, "config.project", "mars"),
    (body(compute_config="mars:2"), 404, "config.compute_config", "mars:2"),
    (body(compute_config=3), 422, "config.compute_config", "give a name"),
    (body(compute_config={"flags": {}}), 422, "config.compute_config.flags", "fields of their own"),
    (
        body(compute_config={"head_node": {"required_resources": {"CPU": 64}}}), 422,
        "config.compute_config.head_node.required_resources.CPU", "64 CPUs; cloud local has 2",
    ),
    (body(grpc_options={"service_names": ["x"]}), 422, "config.grpc_options", "service_names is not an option"),
    (body(http_options={"request_timeout_s": "abc"}), 422, "config.http_options.request_timeout_s", "seconds"),
    (body(http_options={"request_timeout_s": -1}), 422, "config.http_options.request_timeout_s", "seconds"),
    (body(grpc_options={"request_timeout_s": "soon"}), 422, "config.grpc_options.request_timeout_s", "seconds"),
    (body(logging_config={"bogus": 1}), 422, "config.logging_config.bogus", "no such option"),
    (body(logging_config={"log_level": "loud"}), 422, "config.logging_config.log_level", "DEBUG"),
    (body(logging_config={"encoding": "XML"}), 422, "config.logging_config.encoding", "TEXT or JSON"),
    (body(logging_config={"logs_dir": 3}), 422, "config.logging_config.logs_dir", "path"),
    (body(logging_config={"enable_access_log": 3}), 422, "config.logging_config.enable_access_log", "true or false"),
    (
        body(logging_config={"additional_log_standard_attrs": "x"}), 422,
        "config.logging_config.additional_log_standard_attrs", "list of names",
    ),
    (with_app(logging_config={"bogus": 1}), 422, f"{APPS}.logging_config.bogus", "no such option"),
    (with_app(route_prefix="/{x}"), 422, f"{APPS}.route_prefix", "braces"),
    (with_app(route_prefix="/\u00e4"), 422, f"{APPS}.route_prefix", "ASCII"),
    (with_app(deployments=[{"name": "d", "num_replica": 2}]), 422, f"{DEPLOYMENT}.num_replica", "no such option"),
    (with_deployment("ray_actor_options", {"num_cpu": 1}), 422, f"{DEPLOYMENT}.ray_actor_options.num_cpu", "no such"),
    (with_deployment("autoscaling_config", {"max": 1}), 422, f"{DEPLOYMENT}.autoscaling_config.max", "no such option"),
    (with_deployment("autoscaling_config", "auto"), 422, f"{DEPLOYMENT}.autoscaling_config", "must be an object"),
    (with_deployment("logging_config", {"log_level": 3}), 422, f"{DEPLOYMENT}.logging_config.log_level", "DEBUG"),
    (
        with_deployment("ray_actor_options", {"runtime_env": {"env_vars": {"A": "hunter2"}}}), 422,
        f"{DEPLOYMENT}.ray_actor_options.runtime_env", "encrypted",
    ),
    (
        with_deployment("deployment_actors", [{"name": "a", "actor_options": {"runtime_env": {"conda": "x"}}}]), 422,
        f"{DEPLOYMENT}.deployment_actors.0.actor_options.runtime_env", "encrypted",
    ),
    (with_deployment("deployment_actors", [{"nam": "a"}]), 422, f"{DEPLOYMENT}.deployment_actors.0.nam", "no such"),
    (with_deployment("deployment_actors", "a"), 422, f"{DEPLOYMENT}.deployment_actors", "list of objects"),
    (with_app(route_prefix=None, probe={"path": "/x"}), 422, f"{APPS}.probe", "no route_prefix"),
    (
        body(
            applications=[{**APP, "route_prefix": None}],
            grpc_options={"grpc_servicer_functions": ["pb:add"]},
        ),
        422, f"{APPS}.route_prefix", "gRPC",
    ),
    (with_app(probe={"path": "/\u00e4"}), 422, f"{APPS}.probe.path", "ASCII"),
    (with_app(probe={"path": "/a b"}), 422, f"{APPS}.probe.path", "without spaces"),
    (with_header("aUTHORIZATION"), 422, f"{PROBE}.aUTHORIZATION", "its own token"),
    (with_header("Host"), 422, f"{PROBE}.Host", "can't be set"),
    (with_header("content-length"), 422, f"{PROBE}.content-length", "can't be set"),
    (with_header("Transfer-Encoding"), 422, f"{PROBE}.Transfer-Encoding", "can't be set"),
    (with_header("Connection"), 422, f"{PROBE}.Connection", "can't be set"),
    (with_header("x-heliostat-Backend"), 422, f"{PROBE}.x-heliostat-Backend", "Heliostat reserves"),
    (with_header("X A"), 422, PROBE, "not a valid header name"),
    (with_header("X-A\nB"), 422, PROBE, "not a valid header name"),
    (with_header("X-A", "1\r\nHost: x"), 422, f"{PROBE}.X-A", "one line"),
    (with_header("X-A", "\u20ac"), 422, f"{PROBE}.X-A", "ASCII"),
    (body(canary_percent=20), 422, "canary_percent", "can't be a canary"),
    ({**body(in_place=True), "max_surge_percent": 50}, 422, None, "in-place"),
    (
        {"name": "c", "versions": [{"name": "v", "traffic_percent": 100}], "max_surge_percent": 0}, 422, None,
        "static weights",
    ),
    (body(http_options={"port": 1}), 422, "config.http_options", "load balancer"),
    (body(proxy_location="EveryNode"), 422, "config.proxy_location", "HeadOnly"),
    (body(rollout={"steps": [5, 50]}), 422, "config.rollout.steps", "end with 100"),
    (body(in_place=True, canary_percent=5), 422, None, "no canary"),
    (body(canary_percent=101), 422, "canary_percent", "less than or equal"),
    ({"name": "c", "versions": [{"name": f"v{i}", "traffic_percent": 0} for i in range(11)]}, 422, "versions", "10"),
    ({"name": "c", "versions": [{"name": "v", "traffic_percent": 90}]}, 422, None, "sums to 90"),
    (
        {
            "versions": [{"name": "a", "traffic_percent": 50}, {"name": "b", "traffic_percent": 50}],
            "configs": [
                {"name": "c", "applications": [APP], "version_name": "a"},
                {"applications": [APP], "version_name": "b", "query_auth_token_enabled": False},
            ],
        },
        422, "configs.1.query_auth_token_enabled", "do not agree",
    ),
]  # fmt: skip


async def test_bad_input_is_refused_by_field_and_leaves_nothing(world: World) -> None:
    async with world.ada as http:
        for case, status, field, words in CASES:
            answer = await http.post("/v1/services", json=case, headers={"idempotency-key": ascii(case)[:250]})
            problem = answer.json()
            assert answer.headers["content-type"] == "application/problem+json", case
            assert (answer.status_code, problem.get("field")) == (status, field), (case, problem)
            assert (words in problem["detail"], bool(problem["remedy"])) == (True, True), (case, problem)
        large = await http.post("/v1/services", json=with_app(args={"x": "y" * 2**20}))
        assert large.status_code == 413
    async with world.db.read() as conn:
        for table in (services, service_versions, service_deploys, sealed, accepted):
            assert await conn.scalar(select(func.count()).select_from(table)) == 0, table.name


async def test_all_options_of_serves_are_taken_and_no_others(world: World, worker: None) -> None:
    """The lists are Ray's own, which is not imported here either."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    known: dict[str, list[str]] = {}
    for file in ("schema.py", "config.py"):
        for node in ast.parse((Path(spec.origin).parent / "serve" / file).read_text()).body:
            if isinstance(node, ast.ClassDef):
                fields = [
                    f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
                ]
                known[node.name] = [f for f in fields if not f.startswith("_") and f != "model_config"]
    ours = {
        "DeploymentSchema": DEPLOYMENT_OPTIONS, "DeploymentActorConfig": ACTOR,
        "RayActorOptionsSchema": PARTS["ray_actor_options"], "AutoscalingConfig": PARTS["autoscaling_config"],
        "BackpressureConfig": PARTS["backpressure_config"], "GangSchedulingConfig": PARTS["gang_scheduling_config"],
        "RequestRouterConfig": PARTS["request_router_config"], "LoggingConfig": PARTS["logging_config"],
    }  # fmt: skip
    assert {name: sorted(known[name]) for name in ours} == {name: sorted(fields) for name, fields in ours.items()}
    logs = {"encoding": "JSON", "log_level": "DEBUG", "logs_dir": "/x", "enable_access_log": False}
    deployment = {
        "name": "d", "num_replicas": "auto", "max_ongoing_requests": 3, "user_config": {"a": 1},
        "ray_actor_options": {"num_cpus": 0.5, "resources": {}}, "logging_config": logs,
        "autoscaling_config": {"min_replicas": 0, "max_replicas": 2}, "deployment_actors": [{"name": "a"}],
    }  # fmt: skip
    probe = {"path": "/a%20b?x=1", "headers": {"X-A": "1 2", "Content-Type": "text/plain"}}
    app = {**APP, "deployments": [deployment], "probe": probe, "logging_config": logs}
    async with world.ada as http:
        options = {"http_options": {"request_timeout_s": 1.5}, "grpc_options": {"request_timeout_s": None}}
        service = await deployed(http, applications=[app], logging_config={"log_level": 10}, **options)
    assert service["versions"][0]["config"]["applications"][0]["deployments"] == [deployment]
