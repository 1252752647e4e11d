"""Deploys: what is written, what the service's workflow gets, what a repeat answers."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from sqlalchemy import func, select
from temporalio.client import Client

from heliostat.models.common import utcnow
from heliostat.models.jobs import MASK
from heliostat.models.services import (
    Rollout,
    ServiceState,
    ServiceVersionState,
)
from heliostat.models.uploads import upload_key
from runtime.messages.services import DeployRequest
from store import encrypted_values
from store.services import rows as store
from store.tables import sealed, service_versions
from tests.api.conftest import World
from tests.api.services.support import APP, RUNNING, Recorder, body, deployed, heard, write

pytestmark = pytest.mark.timeout(90)


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
    world.change(temporal=absent)
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
        world.change(temporal=temporal)
        now = await http.post("/v1/services", json=body(env_vars={"A": "b"}), headers=headers)
        assert now.status_code == 201
        await write(world, now.json()["id"], ServiceState.RUNNING, RUNNING)
        world.change(temporal=absent)
        second = await http.post("/v1/services", json=body(version_name="two"))
        assert second.status_code == 503
        service = (await http.get("/v1/services/chat")).json()
    assert (service["state"], [v["name"] for v in service["versions"]]) == ("RUNNING", ["v1"])


async def test_a_deploy_that_arrived_in_spite_of_a_lost_answer_is_accepted(world: World) -> None:
    class Lost:
        async def start_workflow(self, *_: Any, start_signal_args: list[DeployRequest], **__: Any) -> None:
            assert await store.claim_deploy(world.db, start_signal_args[0].id)
            raise TimeoutError

    world.change(temporal=Lost())
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

    world.change(temporal=Dying())
    async with world.ada as http:
        for key in ("k", "l"):
            with pytest.raises(Died):
                await http.post("/v1/services", json=body(), headers={"idempotency-key": key})
        left = await store.unstarted_deploys(world.db, 0)
        assert [request.versions[0].number for _, request in left] == [1, 2]
        world.change(temporal=temporal)
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
        temporal = world.context.temporal
        world.change(temporal=absent)
        assert (await http.post("/v1/services", json=body())).status_code == 503
        service = (await http.get("/v1/services/chat")).json()
        assert (service["state"], service["ended_at"] is None, len(service["versions"])) == ("TERMINATED", False, 1)
        world.change(temporal=temporal)
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
        world.change(temporal=absent)
        assert (await http.post("/v1/services", json=body(tags={"team": "none"}))).status_code == 503
        assert await found("team:web") == [id]
        world.change(temporal=temporal)


async def test_what_a_service_is_fixed_to(world: World, worker: None) -> None:
    async with world.admin as http:
        await deployed(http)
        answer = await http.post("/v1/services", json=body(query_auth_token_enabled=False))
        assert (answer.status_code, answer.json()["field"]) == (409, "config.query_auth_token_enabled")


async def test_uploads_of_services_are_looked_for(world: World, worker: None) -> None:
    digest = "a" * 64
    config: dict[str, Any] = {"working_dir": f"upload:{digest}", "excludes": ["data"]}
    async with world.ada as http:
        missing = await http.post("/v1/services", json=body(**config))
        assert (missing.status_code, missing.json()["field"]) == (404, "config.working_dir")
        project = (await http.get("/v1/projects")).json()["items"][0]["id"]
        world.bucket.put(upload_key(project, digest), b"zip")
        await deployed(http, **config)
