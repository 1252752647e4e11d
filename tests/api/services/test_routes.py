"""Accepting services: what is written, what their workflow is told, what is answered. The workflow is a recorder."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import importlib.util
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from temporalio import workflow
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

from api.services.serve_schema import ACTOR, PARTS
from api.services.serve_schema import DEPLOYMENT as DEPLOYMENT_OPTIONS
from heliostat.models.clusters import Cluster, ClusterState, Node, NodeRole, NodeState
from heliostat.models.common import new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import MASK
from heliostat.models.services import (
    LATENCY_BOUNDS_MS,
    Rollout,
    Service,
    ServiceCluster,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
)
from heliostat.models.uploads import upload_key
from runtime.messages.clusters import ClusterInput
from runtime.messages.common import TerminateRequest
from runtime.messages.services import DeployRequest, GateOrder, RollbackOrder, RolloutOrder, ServiceInput
from store import clusters as cluster_records
from store import encrypted_values
from store.services import rows as store
from store.tables import accepted, log_streams, reports, sealed, service_deploys, service_versions, services
from tests.api.conftest import World, opened

pytestmark = pytest.mark.timeout(90)
APP = {"import_path": "main:app"}
BUCKETS = len(LATENCY_BOUNDS_MS) + 1


@workflow.defn(name="ServiceWorkflow", sandboxed=False)
class Recorder:
    """Stands for a service's workflow: writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.ended = False

    @workflow.run
    async def run(self, arg: ServiceInput) -> None:
        self.heard.insert(0, {"started": arg.model_dump(mode="json")})
        await workflow.wait_condition(lambda: self.ended)

    @workflow.signal
    def deploy(self, request: DeployRequest) -> None:
        self.heard.append({"deploy": request.model_dump(mode="json")})

    @workflow.update
    def set_gate(self, order: GateOrder) -> None:
        self.heard.append({"set_gate": order.model_dump(mode="json")})

    @workflow.update
    def terminate(self, order: TerminateRequest) -> None:
        self.heard.append({"terminate": order.model_dump(mode="json")})

    @workflow.update
    def rollback(self, order: RollbackOrder) -> None:
        raise ApplicationError("there is no version to roll back to", type="conflict", non_retryable=True)

    @workflow.update
    def rollout(self, order: RolloutOrder) -> None:
        self.heard.append({"rollout": order.model_dump(mode="json")})

    @workflow.signal
    def end(self) -> None:
        self.ended = True

    @workflow.query
    def all_heard(self) -> list[dict[str, Any]]:
        return self.heard


@pytest.fixture
async def worker(world: World, temporal: Client) -> AsyncIterator[None]:
    async with Worker(temporal, task_queue=world.settings.task_queue, workflows=[Recorder]):
        yield


async def heard(temporal: Client, id: str, what: str) -> list[dict[str, Any]]:
    found = await temporal.get_workflow_handle(id).query(Recorder.all_heard)
    return [m[what] for m in found if what in m]


def body(name: str | None = "chat", **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {k: more.pop(k) for k in ("in_place", "canary_percent") if k in more}
    return {"config": {"applications": [APP], **({"name": name} if name else {}), **more}, **options}


async def deployed(http: httpx.AsyncClient, name: str = "chat", **more: Any) -> dict[str, Any]:
    answer = await http.post("/v1/services", json=body(name, **more))
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def write(
    world: World,
    id: str,
    state: ServiceState,
    versions: dict[str, ServiceVersionState] | None = None,
    *,
    change: Callable[[ServiceVersion], None] = lambda v: None,
    **more: Any,
) -> None:
    """As its workflow writes. ``versions``: by name."""
    row = await store.load_service(world.db, id)
    assert row is not None
    now = utcnow()
    fields = {"state": state, "revision": row.revision + 1, "ended_at": now if state.settled else None} | more
    async with world.db.read() as conn:
        rows = await store.versions_of(conn, id)
    changed = []
    for found in rows:
        if found.name in (versions or {}):
            became = (versions or {})[found.name]
            ended = now if became == ServiceVersionState.TERMINATED else None
            version = found.version.model_copy(update={"state": became, "ended_at": ended})
            change(version)
            changed.append(version)
    assert await store.write_service(world.db, row.service.model_copy(update=fields), changed, [])


RUNNING = {"v1": ServiceVersionState.RUNNING}


# --- accepting ----------------------------------------------------------------------------------------------


async def test_a_service_is_written_and_its_workflow_is_told(world: World, temporal: Client, worker: None) -> None:
    apps = [
        {**APP, "name": "a", "route_prefix": "/a", "probe": {"method": "POST", "body": "{}"}},
        {**APP, "name": "b", "route_prefix": "/b", "probe": {"path": "/b/ping"}},
        {**APP, "name": "c", "route_prefix": None},
        {**APP, "name": "d", "route_prefix": "/d", "probe": None},
    ]
    async with world.ada as http:
        answer = await http.post(
            "/v1/services",
            json=body(applications=apps, tags={"team": "ml"}, cluster_replicas=2, canary_percent=100),
        )
        assert answer.status_code == 201, answer.text
        service = answer.json()
        assert (service["state"], service["name"], service["project"], service["cloud"]) == (
            "STARTING", "chat", "team", "local",
        )  # fmt: skip
        assert [(v["name"], v["number"], v["state"]) for v in service["versions"]] == [("v1", 1, "STARTING")]
        for ref in (service["id"], "chat"):
            assert (await http.get(f"/v1/services/{ref}")).json() == service
        events = (await http.get("/v1/services/chat/events")).json()["items"]
    assert [(e["kind"], e["actor"]) for e in events] == [("accepted", "user:ada")]
    token = service["query_auth_token"]
    assert len(token) >= 43
    assert [(t["token"], t["primary"], t["active"]) for t in service["query_auth_tokens"]] == [(token, True, False)]

    (arg,) = await heard(temporal, service["id"], "started")
    assert (arg["name"], arg["revision"], arg["cloud_id"]) == ("chat", 0, world.cloud_id)
    (request,) = await heard(temporal, service["id"], "deploy")
    assert request["gate"] == {"enabled": True, "hashes": [hashlib.sha256(token.encode()).hexdigest()]}
    assert (request["canary_percent"], request["in_place"], request["actor"]) == (100, False, "user:ada")
    (spec,) = request["versions"]
    assert {a: p["path"] for a, p in spec["probes"].items()} == {"a": "/a", "b": "/b/ping"}
    assert (spec["cluster_replicas"], spec["grpc"], spec["tags"]) == (2, False, {"team": "ml"})
    assert spec["id"] == service["versions"][0]["id"]


async def test_secrets_are_sealed_and_shown_to_nobody(world: World, temporal: Client, worker: None) -> None:
    app = {**APP, "runtime_env": {"env_vars": {"APP": "hunter3"}}}
    async with world.ada as http:
        service = await deployed(http, applications=[app], env_vars={"PASSWORD": "hunter2"})
        token = service["query_auth_token"]
        listed = await http.get("/v1/services")
        got = await http.get("/v1/services/chat")
        versions = await http.get("/v1/services/chat/versions")
    config = service["versions"][0]["config"]
    assert config["env_vars"] == {"PASSWORD": MASK}
    assert config["applications"][0]["runtime_env"]["env_vars"] == {"APP": MASK}
    for text in (got.text, listed.text, versions.text):
        assert "hunter" not in text
    assert token not in listed.text + versions.text
    row = await store.load_version(world.db, service["versions"][0]["id"])
    assert row is not None
    assert row.env_ref is not None
    assert await encrypted_values.read_sealed(world.db, world.keys, row.env_ref) == {
        "env_vars.PASSWORD": "hunter2",
        "applications.0.env_vars.APP": "hunter3",
    }
    history = (await temporal.get_workflow_handle(service["id"]).fetch_history()).to_json()
    for secret in ("hunter2", "hunter3", token):
        assert secret not in history
        for path in world.settings.home.glob("records.db*"):
            assert secret.encode() not in path.read_bytes()


async def test_a_second_deploy_is_a_version_of_the_same_service(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        first = await deployed(http)
        await write(world, first["id"], ServiceState.RUNNING, RUNNING)
        second = await deployed(http, version_name="blue")
        assert (second["id"], second["query_auth_token"]) == (first["id"], first["query_auth_token"])
        assert [(v["name"], v["number"]) for v in second["versions"]] == [("blue", 2), ("v1", 1)]
        taken = await http.post("/v1/services", json=body(version_name="v1"))
        assert (taken.status_code, taken.json()["field"]) == (409, "config.version_name")
        assert [v["name"] for v in (await http.get("/v1/services/chat/versions")).json()["items"]] == ["blue", "v1"]
        events = (await http.get("/v1/services/chat/events")).json()["items"]
        assert [e["message"] for e in events][1:] == ["version blue deployed"]
    one, two = await heard(temporal, first["id"], "deploy")
    assert one["gate"] == two["gate"]  # either may be what starts the workflow


async def test_the_same_key_and_body_give_the_same_deploy(world: World, worker: None) -> None:
    headers = {"idempotency-key": "k1"}
    async with world.ada as http:
        first = await http.post("/v1/services", json=body(), headers=headers)
        later = await deployed(http)
        again = await http.post("/v1/services", json=body(), headers=headers)
        assert (first.status_code, again.status_code) == (201, 201)
        assert [v["number"] for v in later["versions"]] == [2, 1]
        assert [v["number"] for v in again.json()["versions"]] == [1]  # its own is the newest that it tells
        other = await http.post("/v1/services", json=body(version_name="x"), headers=headers)
        assert (other.status_code, other.json()["code"]) == (409, "conflict")


async def test_deploys_at_the_same_moment_all_count(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        answers = await asyncio.gather(*(http.post("/v1/services", json=body()) for _ in range(6)))
        assert {a.status_code for a in answers} == {201}, [a.text for a in answers]
        assert len({a.json()["id"] for a in answers}) == 1
        assert sorted(a.json()["versions"][0]["number"] for a in answers) == [1, 2, 3, 4, 5, 6]
        one_key = await asyncio.gather(
            *(http.post("/v1/services", json=body("other"), headers={"idempotency-key": "k"}) for _ in range(5))
        )
        assert {a.status_code for a in one_key} == {201}, [a.text for a in one_key]
        versions = (await http.get("/v1/services/other/versions")).json()["items"]
    assert len(versions) == 1
    assert len(await heard(temporal, answers[0].json()["id"], "deploy")) == 6


async def test_temporal_away_is_a_no_that_stays_a_no(
    world: World, absent: Client, temporal: Client, worker: None
) -> None:
    headers = {"idempotency-key": "k"}
    world.app.state.temporal = absent
    async with world.ada as http:
        refused = await http.post("/v1/services", json=body(env_vars={"A": "b"}), headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert (await http.get("/v1/services")).json()["items"] == []
        assert (await http.get("/v1/services/chat")).status_code == 404
        assert not await store.claim_deploy(world.db, refused.json()["resource"])
        assert await store.unstarted_deploys(world.db, 0) == []
        async with world.db.read() as conn:
            assert await conn.scalar(select(func.count()).select_from(sealed)) == 0
            assert await conn.scalar(select(func.count()).select_from(service_versions)) == 0
        world.app.state.temporal = temporal
        now = await http.post("/v1/services", json=body(env_vars={"A": "b"}), headers=headers)
        assert now.status_code == 201
        await write(world, now.json()["id"], ServiceState.RUNNING, RUNNING)
        world.app.state.temporal = absent
        second = await http.post("/v1/services", json=body(version_name="two"))
        assert second.status_code == 503
        service = (await http.get("/v1/services/chat")).json()
    assert (service["state"], [v["name"] for v in service["versions"]]) == ("RUNNING", ["v1"])


async def test_a_deploy_that_arrived_in_spite_of_a_lost_answer_is_accepted(world: World) -> None:
    class Lost:
        async def start_workflow(self, *_: Any, start_signal_args: list[DeployRequest], **__: Any) -> None:
            assert await store.claim_deploy(world.db, start_signal_args[0].id)
            raise TimeoutError

    world.app.state.temporal = Lost()
    async with world.ada as http:
        service = await deployed(http)
        assert (await http.get(f"/v1/services/{service['id']}")).status_code == 200


async def test_a_process_that_died_left_a_deploy_that_is_told_later(
    world: World, temporal: Client, worker: None
) -> None:
    class Died(BaseException):
        pass

    class Dying:
        async def start_workflow(self, *_: Any, **__: Any) -> None:
            raise Died

    world.app.state.temporal = Dying()
    async with world.ada as http:
        for key in ("k", "l"):
            with pytest.raises(Died):
                await http.post("/v1/services", json=body(), headers={"idempotency-key": key})
        left = await store.unstarted_deploys(world.db, 0)
        assert [request.versions[0].number for _, request in left] == [1, 2]
        world.app.state.temporal = temporal
        again = await http.post("/v1/services", json=body(), headers={"idempotency-key": "k"})
        assert (again.status_code, again.json()["id"]) == (201, left[0][0].service_id)
        assert len(await store.unstarted_deploys(world.db, 0)) == 1
        # Nor is what else is said to the service said before its deploys.
        assert (await http.post("/v1/services/chat/terminate")).status_code == 200
    said = [next(iter(m)) for m in await temporal.get_workflow_handle(left[0][0].service_id).query(Recorder.all_heard)]
    assert said == ["started", "deploy", "deploy", "terminate"]
    assert await store.unstarted_deploys(world.db, 0) == []


async def test_a_terminated_service_starts_again_as_itself(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        first = await deployed(http)
        await write(world, first["id"], ServiceState.TERMINATING)
        ending = await http.post("/v1/services", json=body())
        assert (ending.status_code, "TERMINATING" in ending.json()["detail"]) == (409, True)
        over = {"v1": ServiceVersionState.TERMINATED}
        await write(world, first["id"], ServiceState.TERMINATED, over, query_url="http://127.0.0.1:1")
        await temporal.get_workflow_handle(first["id"]).signal(Recorder.end)
        await temporal.get_workflow_handle(first["id"]).result()
        again = await deployed(http, tags={"a": "b"})
    assert (again["id"], again["state"], again["ended_at"], again["tags"]) == (
        first["id"], "STARTING", None, {"a": "b"},
    )  # fmt: skip
    assert (again["query_url"], again["query_auth_token"]) == ("http://127.0.0.1:1", first["query_auth_token"])
    (arg,) = await heard(temporal, first["id"], "started")
    assert arg["revision"] == again["revision"] == 3
    (request,) = await heard(temporal, first["id"], "deploy")
    assert len(request["gate"]["hashes"]) == 1
    assert request["life"] == arg["revision"]
    assert request["versions"][0]["number"] == 2
    # What the workflow before may still have on its way changes nothing.
    row = await store.load_service(world.db, first["id"])
    assert row is not None
    late = row.service.model_copy(update={"state": ServiceState.TERMINATED, "revision": 2, "ended_at": utcnow()})
    assert await store.write_service(world.db, late, [], [])
    async with world.ada as http:
        assert (await http.get("/v1/services/chat")).json()["state"] == "STARTING"


async def test_a_restart_that_is_refused_leaves_it_terminated(world: World, absent: Client, worker: None) -> None:
    async with world.ada as http:
        first = await deployed(http)
        await write(world, first["id"], ServiceState.TERMINATED, {"v1": ServiceVersionState.TERMINATED})
        temporal, world.app.state.temporal = world.app.state.temporal, absent
        assert (await http.post("/v1/services", json=body())).status_code == 503
        service = (await http.get("/v1/services/chat")).json()
        assert (service["state"], service["ended_at"] is None, len(service["versions"])) == ("TERMINATED", False, 1)
        world.app.state.temporal = temporal
        assert (await deployed(http))["state"] == "STARTING"


# --- static weights and in place --------------------------------------------------------------------------


async def test_weights_of_versions_that_live_and_of_new_ones(world: World, temporal: Client, worker: None) -> None:
    def weighted(*versions: tuple[str, int], configs: list[str] = [], **more: Any) -> dict[str, Any]:  # noqa: B006
        return {
            "versions": [{"name": n, "traffic_percent": p} for n, p in versions],
            "configs": [{"applications": [APP], "version_name": n} for n in configs],
            "name": "chat",
            **more,
        }

    async with world.ada as http:
        absent = await http.post("/v1/services", json=weighted(("a", 100)))
        assert (absent.status_code, absent.json()["field"]) == (404, "name")
        made = await http.post("/v1/services", json=weighted(("a", 60), ("b", 40), configs=["a", "b"]))
        assert made.status_code == 201, made.text
        service = made.json()
        assert {v["name"]: v["number"] for v in service["versions"]} == {"a": 1, "b": 2}
        states = dict.fromkeys(("a", "b"), ServiceVersionState.RUNNING)
        await write(world, service["id"], ServiceState.RUNNING, states)
        for wrong, field, status in (
            (weighted(("a", 50), ("c", 50)), "versions.1.name", 422),
            (weighted(("a", 100), ("c", 0), configs=["c"]), "versions.1.traffic_percent", 422),
            (weighted(("a", 100), configs=["b"]), None, 422),
            (weighted(("a", 99)), None, 422),
        ):
            answer = await http.post("/v1/services", json=wrong)
            assert (answer.status_code, answer.json().get("field")) == (status, field), answer.text
        only = await http.post("/v1/services", json=weighted(("a", 10), ("b", 90)))
        assert only.status_code == 201, only.text
        ids = {v["name"]: v["id"] for v in service["versions"]}
    first, second = await heard(temporal, service["id"], "deploy")
    assert first["weights"] == {ids["a"]: 60, ids["b"]: 40}
    assert [v["name"] for v in first["versions"]] == ["a", "b"]
    assert (second["weights"], second["versions"]) == ({ids["a"]: 10, ids["b"]: 90}, [])


async def test_in_place_needs_a_running_version_that_it_can_replace(
    world: World, temporal: Client, worker: None
) -> None:
    grpc = {"grpc_options": {"grpc_servicer_functions": ["pb:add"]}}
    shape = {"compute_config": {"head_node": {"resources": {"CPU": 1}}}}

    async def refused(**more: Any) -> tuple[int, str]:
        answer = await http.post("/v1/services", json=body(in_place=True, **more))
        return answer.status_code, answer.json().get("field")

    async with world.ada as http:
        assert await refused() == (409, "in_place")
        id = (await deployed(http))["id"]
        assert await refused() == (409, "in_place")  # STARTING
        await write(world, id, ServiceState.RUNNING, RUNNING)
        assert await refused(cluster_replicas=2) == (422, "config.cluster_replicas")
        assert await refused(**shape) == (422, "config.compute_config")
        assert await refused(**grpc) == (422, "config.grpc_options.grpc_servicer_functions")
        for part, name in (
            ("http_options", "request_timeout_s"), ("http_options", "keep_alive_timeout_s"),
            ("grpc_options", "request_timeout_s"),
        ):  # fmt: skip
            assert await refused(**{part: {name: 100}}) == (422, f"config.{part}.{name}")
        now = utcnow()
        await write(world, id, ServiceState.RUNNING, rollout=Rollout(version_id="sv_x", since=now))
        assert await refused() == (409, "in_place")
        await write(world, id, ServiceState.RUNNING, rollout=None)
        as_it_is = {"request_timeout_s": None, "keep_alive_timeout_s": 90}
        accepted_now = await deployed(http, in_place=True, http_options=as_it_is)
        assert accepted_now["versions"][0]["number"] == 2
        assert await refused() == (409, "in_place")  # that one is under way
    assert [d["in_place"] for d in await heard(temporal, id, "deploy")] == [False, True]


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
    (with_env(conda="x"), 422, f"{APPS}.runtime_env.conda", "not honoured"),
    (with_env(image_uri="x"), 422, f"{APPS}.runtime_env.image_uri", "images come with"),
    (with_env(container={}), 422, f"{APPS}.runtime_env.container", "images come with"),
    (with_env(env_vars={"A B": "x"}), 422, f"{APPS}.runtime_env.env_vars", "environment variable"),
    (with_env(env_vars={"A": 1}), 422, f"{APPS}.runtime_env.env_vars", "object of strings"),
    (with_env(env_vars={"A": MASK}), 422, f"{APPS}.runtime_env.env_vars.A", "mask"),
    (with_env(env_vars=["A"]), 422, f"{APPS}.runtime_env.env_vars", "object of strings"),
    (with_env(working_dir="./x"), 422, f"{APPS}.runtime_env.working_dir", "neither an upload"),
    (with_env(working_dir=3), 422, f"{APPS}.runtime_env.working_dir", "is a string"),
    (with_env(py_modules=["x"]), 422, f"{APPS}.runtime_env.py_modules.0", "neither an upload"),
    (with_env(pip="reqs.txt"), 422, f"{APPS}.runtime_env.pip", "list of requirement lines"),
    (with_env(working_dir="upload:" + "0" * 64), 404, f"{APPS}.runtime_env.working_dir", "not in the bucket"),
    (body(working_dir="https://me:pw@x/y.zip"), 422, "config.working_dir", "password"),
    (body(excludes=["x"]), 422, "config.excludes", "service uploads nothing"),
    (body(env_vars={"A": "x" * 300_000}), 422, "config.env_vars", "bytes"),
    (body(tags={"": "x"}), 422, "config.tags", "refused"),
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
    (with_deployment("autoscaling_config", "auto"), 422, f"{DEPLOYMENT}.autoscaling_config", "is an object"),
    (with_deployment("logging_config", {"log_level": 3}), 422, f"{DEPLOYMENT}.logging_config.log_level", "DEBUG"),
    (
        with_deployment("ray_actor_options", {"runtime_env": {"env_vars": {"A": "hunter2"}}}), 422,
        f"{DEPLOYMENT}.ray_actor_options.runtime_env", "sealed",
    ),
    (
        with_deployment("deployment_actors", [{"name": "a", "actor_options": {"runtime_env": {"conda": "x"}}}]), 422,
        f"{DEPLOYMENT}.deployment_actors.0.actor_options.runtime_env", "sealed",
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
    (with_header("aUTHORIZATION"), 422, f"{PROBE}.aUTHORIZATION", "token of its own"),
    (with_header("Host"), 422, f"{PROBE}.Host", "can't be set"),
    (with_header("content-length"), 422, f"{PROBE}.content-length", "can't be set"),
    (with_header("Transfer-Encoding"), 422, f"{PROBE}.Transfer-Encoding", "can't be set"),
    (with_header("Connection"), 422, f"{PROBE}.Connection", "can't be set"),
    (with_header("x-heliostat-Backend"), 422, f"{PROBE}.x-heliostat-Backend", "Heliostat's own"),
    (with_header("X A"), 422, PROBE, "no name of a header"),
    (with_header("X-A\nB"), 422, PROBE, "no name of a header"),
    (with_header("X-A", "1\r\nHost: x"), 422, f"{PROBE}.X-A", "one line"),
    (with_header("X-A", "\u20ac"), 422, f"{PROBE}.X-A", "ASCII"),
    (body(canary_percent=20), 422, "canary_percent", "nothing to be the canary of"),
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


async def test_a_canary_needs_a_version_that_serves(world: World, worker: None) -> None:
    async with world.ada as http:
        id = (await deployed(http))["id"]
        early = await http.post("/v1/services", json=body(canary_percent=0))
        assert (early.status_code, early.json()["field"]) == (422, "canary_percent")
        await write(world, id, ServiceState.RUNNING, RUNNING, primary_version="sv_1")
        await deployed(http, canary_percent=0)


async def test_a_service_has_the_tags_of_its_newest_version(
    world: World, absent: Client, temporal: Client, worker: None
) -> None:
    async def found(tag: str) -> list[str]:
        return [s["id"] for s in (await http.get("/v1/services", params={"tag": tag})).json()["items"]]

    async with world.ada as http:
        id = (await deployed(http, tags={"team": "ml"}))["id"]
        await write(world, id, ServiceState.RUNNING, RUNNING, tags={"team": "ml"})
        later = await deployed(http, tags={"team": "web"})
        assert later["tags"] == {"team": "web"}
        await write(world, id, ServiceState.ROLLING_OUT, tags={"team": "ml"})  # as its workflow knows them
        assert (await http.get("/v1/services/chat")).json()["tags"] == {"team": "web"}
        assert (await found("team:web"), await found("team:ml")) == ([id], [])
        world.app.state.temporal = absent
        assert (await http.post("/v1/services", json=body(tags={"team": "none"}))).status_code == 503
        assert await found("team:web") == [id]
        world.app.state.temporal = temporal


async def test_what_a_service_is_fixed_to(world: World, worker: None) -> None:
    async with world.admin as http:
        await deployed(http)
        answer = await http.post("/v1/services", json=body(query_auth_token_enabled=False))
        assert (answer.status_code, answer.json()["field"]) == (409, "config.query_auth_token_enabled")


async def test_others_do_not_see_it(world: World, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http)
    calls = [
        ("GET", ""), ("GET", "/versions"), ("GET", "/events"), ("GET", "/logs"), ("POST", "/terminate"),
        ("POST", "/rollback"), ("POST", "/rollout"), ("POST", "/tokens"), ("DELETE", "/tokens"), ("DELETE", ""),
    ]  # fmt: skip
    order = {"action": "pause"}
    async with world.eve as eve, world.client(None) as nobody:
        for method, path in calls:
            json = order if path == "/rollout" else None
            for ref in (service["id"], "chat"):
                answer = await eve.request(method, f"/v1/services/{ref}{path}", json=json)
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, path)
            refused = await nobody.request(method, f"/v1/services/{service['id']}{path}", json=json)
            assert refused.status_code == 401, (method, path)
        assert (await nobody.post("/v1/services", json=body())).status_code == 401
        assert (await eve.get("/v1/services")).json()["items"] == []
        assert (await eve.post("/v1/services", json=body(project="team"))).status_code == 404
        mine = await deployed(eve)  # the name is another project's there
        assert mine["id"] != service["id"]


async def test_pages_and_filters(world: World, worker: None) -> None:
    async with world.ada as http:
        made = [(await deployed(http, f"s{n}", tags={"n": str(n)}))["id"] for n in range(5)]
        await write(world, made[0], ServiceState.RUNNING, gate_hashes=["0" * 64])
        first = (await http.get("/v1/services", params={"limit": 3})).json()
        rest = (await http.get("/v1/services", params={"limit": 3, "cursor": first["next_cursor"]})).json()
        assert [s["id"] for s in first["items"] + rest["items"]] == made[::-1]
        assert all(s["query_auth_token"] is None and not s["gate_hashes"] for s in first["items"] + rest["items"])
        filters: list[tuple[dict[str, Any], list[str]]] = [
            ({"name": "s1"}, [made[1]]),
            ({"tag": "n:2"}, [made[2]]),
            ({"state": "RUNNING"}, [made[0]]),
            ({"project": "team", "state": ["STARTING", "RUNNING"]}, made[::-1]),
            ({"cloud": "local", "limit": 1}, [made[4]]),
        ]
        for params, ids in filters:
            found = (await http.get("/v1/services", params=params)).json()["items"]
            assert [s["id"] for s in found] == ids, params


# --- steering, ending -------------------------------------------------------------------------------------


async def test_orders_reach_the_workflow_and_its_refusals_come_back(
    world: World, temporal: Client, absent: Client, worker: None
) -> None:
    async with world.ada as http:
        id = (await deployed(http))["id"]
        moved = await http.post("/v1/services/chat/rollout", json={"action": "promote", "percent": 50})
        assert (moved.status_code, moved.json()["id"]) == (200, id)
        wrong = await http.post("/v1/services/chat/rollout", json={"action": "jump"})
        assert (wrong.status_code, wrong.json()["field"]) == (422, "action")
        ignored = await http.post("/v1/services/chat/rollout", json={"action": "pause", "percent": 50})
        assert (ignored.status_code, "not with pause" in ignored.json()["detail"]) == (422, True)
        back = await http.post("/v1/services/chat/rollback", json={"reason": "slow"})
        assert (back.status_code, back.json()["detail"]) == (409, "There is no version to roll back to.")
        for _ in range(2):
            key = {"idempotency-key": "t"}
            ended = await http.post("/v1/services/chat/terminate", json={"reason": "done"}, headers=key)
            assert ended.status_code == 200
        world.app.state.temporal = absent
        assert (await http.post("/v1/services/chat/terminate")).status_code == 503
    assert await heard(temporal, id, "rollout") == [{"actor": "user:ada", "action": "promote", "percent": 50}]
    assert await heard(temporal, id, "terminate") == [{"actor": "user:ada", "reason": "done"}]


async def test_a_key_of_an_order_is_for_that_order_alone(world: World, temporal: Client, worker: None) -> None:
    async def say(path: str, **json: Any) -> tuple[int, str | None]:
        answer = await http.post(f"/v1/services/chat/{path}", json=json, headers={"idempotency-key": "k"})
        return answer.status_code, answer.json().get("field")

    async with world.ada as http:
        id = (await deployed(http))["id"]
        for _ in range(2):
            assert await say("rollout", action="promote", percent=50) == (200, None)
        assert await say("rollout", action="promote", percent=60) == (409, "Idempotency-Key")
        assert await say("rollback") == (409, "Idempotency-Key")
        assert await say("terminate") == (409, "Idempotency-Key")
        again = await http.post("/v1/services", json=body(), headers={"idempotency-key": "k"})
        assert (again.status_code, again.json()["field"]) == (409, "Idempotency-Key")
    assert [m["percent"] for m in await heard(temporal, id, "rollout")] == [50]
    assert await heard(temporal, id, "terminate") == []


async def test_what_has_ended_takes_no_orders_and_ends_again(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        id = (await deployed(http))["id"]
        await asyncio.gather(*world.app.state.background)
        await temporal.get_workflow_handle(id).terminate()
        lost = await http.post("/v1/services/chat/terminate")
        assert (lost.status_code, "gone" in lost.json()["detail"]) == (409, True)
        await write(world, id, ServiceState.TERMINATED)
        assert (await http.post("/v1/services/chat/terminate")).json()["state"] == "TERMINATED"
        for path, json in (("rollback", None), ("rollout", {"action": "pause"})):
            answer = await http.post(f"/v1/services/chat/{path}", json=json)
            assert (answer.status_code, "TERMINATED" in answer.json()["detail"]) == (409, True), answer.text


async def test_a_terminated_service_is_deleted_and_its_name_is_free_at_once(world: World, worker: None) -> None:
    async with world.ada as http:
        old = await deployed(http, env_vars={"A": "b"})
        for state in (ServiceState.RUNNING, ServiceState.ROLLING_OUT, ServiceState.TERMINATING):
            await write(world, old["id"], state, RUNNING)
            busy = await http.delete("/v1/services/chat")
            assert (busy.status_code, "Terminate it first" in busy.json()["remedy"]) == (409, True)
        await write(world, old["id"], ServiceState.TERMINATED)
        assert (await http.delete("/v1/services/chat")).status_code == 204
        assert (await http.get(f"/v1/services/{old['id']}")).status_code == 404
        assert (await http.get("/v1/services")).json()["items"] == []
        async with world.db.read() as conn:
            assert await conn.scalar(select(func.count()).select_from(sealed)) == 0
        new = await deployed(http)
        assert new["id"] != old["id"]
        assert new["query_auth_token"] != old["query_auth_token"]
        assert [v["number"] for v in new["versions"]] == [1]


# --- tokens -----------------------------------------------------------------------------------------------


def sha(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


async def test_tokens_are_rotated(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http)
        id, first = service["id"], service["query_auth_token"]
        only = await http.delete("/v1/services/chat/tokens")
        assert (only.status_code, "only token" in only.json()["detail"]) == (409, True)
        key = {"idempotency-key": "k"}
        added = [(await http.post("/v1/services/chat/tokens", headers=key)) for _ in range(2)]
        assert [a.status_code for a in added] == [201, 201], added[0].text
        assert added[0].json() == added[1].json()
        second = added[0].json()["token"]
        assert (added[0].json()["primary"], added[0].json()["active"]) == (False, False)
        third = await http.post("/v1/services/chat/tokens")
        assert (third.status_code, "2 tokens already" in third.json()["detail"]) == (409, True)
        await write(world, id, ServiceState.RUNNING, RUNNING, gate_hashes=[sha(first), sha(second)])
        both = (await http.get("/v1/services/chat")).json()
        assert [(t["token"], t["primary"], t["active"]) for t in both["query_auth_tokens"]] == [
            (first, True, True), (second, False, True),
        ]  # fmt: skip
        assert both["gate_hashes"] == []
        unknown = await http.delete("/v1/services/chat/tokens", params={"id": "qt_x"})
        assert unknown.status_code == 404
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 204
        after = (await http.get("/v1/services/chat")).json()
        assert (after["query_auth_token"], len(after["query_auth_tokens"])) == (second, 1)
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 409
    gates = [o["gate"]["hashes"] for o in await heard(temporal, id, "set_gate")]
    assert gates == [[sha(first), sha(second)], [sha(second)]]
    row = await store.load_service(world.db, id)
    assert row is not None
    assert [(t.sha256, t.told, t.deleted) for t in row.tokens] == [(sha(second), True, False)]
    async with world.db.read() as conn:
        assert await conn.scalar(select(func.count()).select_from(sealed)) == 1


async def test_a_change_of_tokens_that_was_not_told_is_told_later(
    world: World, temporal: Client, absent: Client, worker: None
) -> None:
    async with world.ada as http:
        service = await deployed(http)
        id, first = service["id"], service["query_auth_token"]
        await asyncio.gather(*world.app.state.background)
        world.app.state.temporal = absent
        assert (await http.post("/v1/services/chat/tokens")).status_code == 503
        world.app.state.temporal = temporal
        added = await http.post("/v1/services/chat/tokens")  # the same again: no third one
        assert added.status_code == 201, added.text
        second = added.json()["token"]
        world.app.state.temporal = absent
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 503
        assert len((await http.get("/v1/services/chat")).json()["query_auth_tokens"]) == 1
        world.app.state.temporal = temporal
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 204  # the same again
        after = (await http.get("/v1/services/chat")).json()
    assert after["query_auth_token"] == second
    gates = [o["gate"]["hashes"] for o in await heard(temporal, id, "set_gate")]
    assert gates == [[sha(first), sha(second)], [sha(second)]]


async def test_an_api_that_starts_tells_what_the_one_before_did_not(settings: Any, temporal: Client) -> None:
    class Died(BaseException):
        pass

    class Dying:
        def get_workflow_handle(self, *_: Any) -> Any:
            raise Died

    async with Worker(temporal, task_queue=settings.task_queue, workflows=[Recorder]):
        async with opened(settings, temporal) as first:
            async with first.admin as http:
                service = await deployed(http)
                await asyncio.gather(*first.app.state.background)
                first.app.state.temporal = Dying()
                with pytest.raises(Died):
                    await http.post("/v1/services/chat/tokens")
        async with opened(settings, temporal) as second:
            await asyncio.gather(*second.app.state.background)
            orders = await heard(temporal, service["id"], "set_gate")
            assert [len(o["gate"]["hashes"]) for o in orders] == [2]
            row = await store.load_service(second.db, service["id"])
            assert row is not None
            assert all(t.told for t in row.tokens)


async def test_a_service_without_tokens(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http, query_auth_token_enabled=False)
        assert (service["query_auth_token"], service["query_auth_tokens"]) == (None, [])
        assert (await http.post("/v1/services/chat/tokens")).status_code == 409
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 404
    (request,) = await heard(temporal, service["id"], "deploy")
    assert request["gate"] == {"enabled": False, "hashes": []}


# --- what is seen -----------------------------------------------------------------------------------------


async def a_head(world: World, service: dict[str, Any], cluster_id: str, at: Any, **serve: Any) -> None:
    """A cluster of the service whose head has reported this."""
    now = utcnow()
    row = await store.load_service(world.db, service["id"])
    assert row is not None
    cluster = Cluster(
        id=cluster_id, name=cluster_id, project="team", cloud="local", state=ClusterState.RUNNING,
        compute_config=ComputeConfig(), created_by="ada", created_at=now, state_since=now, revision=1,
    )  # fmt: skip
    arg = ClusterInput(
        cluster_id=cluster_id, name=cluster_id, project_id=row.project_id, project="team", cloud_id=world.cloud_id,
        cloud="local", config=ComputeConfig(), created_by="ada", created_at=now, service_id=row.id,
    )  # fmt: skip
    await cluster_records.insert_made_cluster(world.db, cluster, arg)
    node = Node(
        id=f"nd_{cluster_id}", cluster_id=cluster_id, role=NodeRole.HEAD, group="head", slot=0, generation=1,
        state=NodeState.RUNNING, created_at=now,
    )  # fmt: skip
    assert await cluster_records.write_cluster(world.db, cluster, [node], {}, [])
    async with world.db.begin() as conn:
        await conn.execute(
            reports.insert().values(
                node_id=node.id,
                cluster_id=cluster_id,
                is_head=True,
                seq=1,
                activity="busy",
                doc={"serve": serve},
                at=at,
            )
        )


async def test_traffic_is_summed_over_a_versions_clusters(world: World, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http)
        version = service["versions"][0]["id"]
        now = utcnow()
        fast, slow = [0] * BUCKETS, [0] * BUCKETS
        fast[3], slow[9] = 90, 10
        common = {"version_id": version, "window_s": 60}
        await a_head(
            world, service, "cl_a", now, requests=100, errors=1, ongoing=2, connections=5, window_requests=90,
            window_buckets=fast, last_request_at=(now - timedelta(seconds=5)).isoformat(), **common,
        )  # fmt: skip
        await a_head(
            world, service, "cl_b", now, requests=50, ongoing=1, window_requests=30, window_errors=6,
            window_buckets=slow, last_request_at=now.isoformat(), **common,
        )  # fmt: skip
        await a_head(
            world, service, "cl_c", now - timedelta(minutes=5), requests=7, ongoing=9, window_requests=1, **common
        )
        await a_head(world, service, "cl_d", now, version_id="sv_other", requests=1000)

        def on_clusters(found: ServiceVersion) -> None:
            found.clusters = [ServiceCluster(cluster_id=f"cl_{c}", state="RUNNING") for c in "abcd"]

        await write(world, service["id"], ServiceState.RUNNING, RUNNING, change=on_clusters)
        seen = (await http.get("/v1/services/chat")).json()["versions"][0]["traffic"]
    assert (seen["requests"], seen["errors"], seen["ongoing"], seen["connections"]) == (157, 1, 3, 5)
    assert (seen["requests_per_s"], seen["errors_per_s"], seen["window_s"]) == (2.0, 0.1, 60)
    assert (3 < seen["p50_ms"] <= 5, 30 < seen["p95_ms"] <= 50, seen["last_request_at"][:19]) == (
        True, True, now.isoformat()[:19],
    )  # fmt: skip


async def test_ended_versions_are_shown_a_few_and_listed_all(world: World, worker: None) -> None:
    async with world.ada as http:
        for _ in range(8):
            service = await deployed(http)
        over = {f"v{n}": ServiceVersionState.TERMINATED for n in range(1, 8)}
        await write(world, service["id"], ServiceState.RUNNING, over | {"v8": ServiceVersionState.RUNNING})
        shown = (await http.get("/v1/services/chat")).json()["versions"]
        assert [v["number"] for v in shown] == [8, 7, 6, 5, 4, 3]
        page = (await http.get("/v1/services/chat/versions", params={"limit": 5})).json()
        rest = (await http.get("/v1/services/chat/versions", params={"cursor": page["next_cursor"]})).json()
        assert [v["number"] for v in page["items"] + rest["items"]] == [8, 7, 6, 5, 4, 3, 2, 1]


async def test_the_logs_of_a_versions_replicas(world: World, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http)
        await deployed(http)
        for cluster in ("cl_a", "cl_b"):
            await a_head(world, service, cluster, utcnow())
            for stream in ("ray/worker-1.out", "ray/serve/replica.log", "ray/raylet.out", "node/agent.log"):
                async with world.db.begin() as conn:
                    await conn.execute(
                        log_streams.insert().values(
                            cluster_id=cluster, node_id="nd_1", stream=stream, complete=False, created_at=utcnow()
                        )
                    )
                world.bucket.put(f"logs/{cluster}/nd_1/{stream}/{0:020d}", b"text")

        def on_a(version: ServiceVersion) -> None:
            version.clusters = [ServiceCluster(cluster_id="cl_a", state="RUNNING")]

        await write(world, service["id"], ServiceState.RUNNING, RUNNING, change=on_a)

        async def streams(**params: Any) -> list[str]:
            page = await http.get("/v1/services/chat/logs", params=params)
            assert (page.status_code, page.json()["complete"]) == (200, False), page.text
            return [c["stream"] for c in page.json()["chunks"]]

        one = ["nd_1/ray/serve/replica.log", "nd_1/ray/worker-1.out"]
        assert await streams() == one * 2
        for version in ("v1", "1", service["versions"][0]["id"]):
            assert await streams(version=version, follow=True) == one
        assert await streams(version="v2") == []
        absent = await http.get("/v1/services/chat/logs", params={"version": "v9"})
        assert (absent.status_code, absent.json()["field"]) == (404, "version")


async def test_uploads_of_services_are_looked_for(world: World, worker: None) -> None:
    digest = "a" * 64
    config: dict[str, Any] = {"working_dir": f"upload:{digest}", "excludes": ["data"]}
    async with world.ada as http:
        missing = await http.post("/v1/services", json=body(**config))
        assert (missing.status_code, missing.json()["field"]) == (404, "config.working_dir")
        project = (await http.get("/v1/projects")).json()["items"][0]["id"]
        world.bucket.put(upload_key(project, digest), b"zip")
        await deployed(http, **config)


def a_service(id: str = "") -> Service:
    now = utcnow()
    return Service(
        id=id or new_id("svc"), name="s", project="team", cloud="local", state=ServiceState.STARTING,
        created_by="ada", created_at=now, state_since=now,
    )  # fmt: skip


async def test_a_write_to_what_is_not_there_is_told(world: World) -> None:
    assert not await store.write_service(world.db, a_service(), [], [])
    assert not await store.claim_deploy(world.db, "dp_none")
