"""Clusters and messages to workflows: the workflows here are stand-ins that answer what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from temporalio import workflow
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

from heliostat.models.clusters import ClusterState, Node, NodeRole, NodeState
from heliostat.models.common import utcnow
from heliostat.models.jobs import JobState
from runtime.messages.clusters import ClusterInput, LimitsUpdate
from runtime.messages.common import TerminateRequest
from runtime.messages.jobs import JobInput
from store import clusters as cluster_records
from store import jobs as job_records
from tests.api.conftest import World

pytestmark = pytest.mark.timeout(90)
JOB = {"entrypoint": "true"}


@workflow.defn(name="ClusterWorkflow", sandboxed=False)
class StandInCluster:
    """Tells what it heard by a query; a terminate with reason "now" ends it."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.ended = False

    @workflow.run
    async def run(self, arg: ClusterInput) -> None:
        await workflow.wait_condition(lambda: self.ended)

    @workflow.update
    def terminate(self, message: TerminateRequest) -> None:
        self.heard.append(f"terminate by {message.actor}: {message.reason}")
        self.ended = message.reason == "now"

    @workflow.update
    def set_limits(self, message: LimitsUpdate) -> None:
        if message.group != "workers":
            raise ApplicationError(f"cluster has no worker group {message.group!r}", type="not_found")
        self.heard.append(f"{message.group} {message.min_nodes} {message.max_nodes}")

    @workflow.query
    def all_heard(self) -> list[str]:
        return self.heard


@workflow.defn(name="JobWorkflow", sandboxed=False)
class StandInJob:
    def __init__(self) -> None:
        self.heard: list[str] = []

    @workflow.run
    async def run(self, arg: JobInput) -> None:
        await workflow.wait_condition(lambda: bool(self.heard))

    @workflow.update
    def terminate(self, message: TerminateRequest) -> None:
        self.heard.append(message.reason)


@pytest.fixture
async def worker(world: World, temporal: Client) -> AsyncIterator[None]:
    async with Worker(temporal, task_queue=world.settings.task_queue, workflows=[StandInCluster, StandInJob]):
        yield


async def test_a_cluster_is_written_and_started(world: World, temporal: Client) -> None:
    shape = {
        "worker_nodes": [{"min_nodes": 1, "max_nodes": 2, "required_resources": {"CPU": 1}}],
        "idle_termination_minutes": 5,
    }
    async with world.ada as http:
        answer = await http.post("/v1/clusters", json={"name": "c", "compute_config": shape, "tags": {"a": "b"}})
        assert answer.status_code == 201
        cluster = answer.json()
        assert (cluster["state"], cluster["name"], cluster["cloud"]) == ("STARTING", "c", "local")
        assert cluster["compute_config"]["idle_termination_minutes"] == 5
        for ref in ("c", cluster["id"]):
            assert (await http.get(f"/v1/clusters/{ref}")).json() == cluster
        unnamed = (await http.post("/v1/clusters")).status_code
        assert unnamed == 422  # a body is asked for: {} is one
        assert (await http.post("/v1/clusters", json={})).json()["name"].startswith("cluster-")
        assert (await http.get("/v1/clusters", params={"tag": "a:b"})).json()["items"] == [cluster]
        assert (await http.get("/v1/clusters", params={"cloud": "local", "state": "STARTING"})).json()["items"]
    assert (await temporal.get_workflow_handle(cluster["id"]).describe()).workflow_type == "ClusterWorkflow"


async def test_a_living_clusters_name_is_taken(world: World, worker: None) -> None:
    async with world.ada as http:
        first = (await http.post("/v1/clusters", json={"name": "c"}, headers={"idempotency-key": "k"})).json()
        taken = await http.post("/v1/clusters", json={"name": "c"}, headers={"idempotency-key": "other"})
        assert (taken.status_code, taken.json()["field"]) == (409, "name")
        assert first["id"] in taken.json()["detail"]
        again = await http.post("/v1/clusters", json={"name": "c"}, headers={"idempotency-key": "k"})
        assert again.json()["id"] == first["id"]
        await _settle(world, first["id"])
        second = await http.post("/v1/clusters", json={"name": "c"}, headers={"idempotency-key": "other"})
        assert second.status_code == 201
        assert (await http.get("/v1/clusters/c")).json()["id"] == second.json()["id"]  # the living one
    async with world.eve as http:
        assert (await http.post("/v1/clusters", json={"name": "c"})).status_code == 201


async def test_a_refused_clusters_name_is_free_again(world: World, absent: Client, temporal: Client) -> None:
    async with world.ada as http:
        world.change(temporal=absent)
        assert (await http.post("/v1/clusters", json={"name": "c"})).status_code == 503
        world.change(temporal=temporal)
        assert (await http.post("/v1/clusters", json={"name": "c"})).status_code == 201


async def test_terminate_reaches_the_workflow_once_per_key(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        id = (await http.post("/v1/clusters", json={"name": "c"})).json()["id"]
        for _ in range(2):
            headers = {"idempotency-key": "k"}
            told = await http.post("/v1/clusters/c/terminate", json={"reason": "enough"}, headers=headers)
            assert (told.status_code, told.json()["id"]) == (200, id)
        other = await http.post("/v1/clusters/c/terminate", json={"reason": "more"}, headers={"idempotency-key": "k"})
        assert (other.status_code, other.json()["field"]) == (409, "Idempotency-Key")
        assert await temporal.get_workflow_handle(id).query("all_heard") == ["terminate by user:ada: enough"]
        assert (await http.post("/v1/clusters/c/terminate")).status_code == 200
        await _settle(world, id)
        after = await http.post(f"/v1/clusters/{id}/terminate")
        assert (after.status_code, after.json()["state"]) == (200, "TERMINATED")


async def test_a_workflow_that_is_gone_is_said_to_be_gone(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        id = (await http.post("/v1/clusters", json={"name": "c"})).json()["id"]
        await temporal.get_workflow_handle(id).terminate("by the operator")
        answer = await http.post("/v1/clusters/c/terminate")
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        assert "sweep" in answer.json()["remedy"]
        job = (await http.post("/v1/jobs", json=JOB)).json()["id"]
        await temporal.get_workflow_handle(job).terminate("by the operator")
        assert (await http.post(f"/v1/jobs/{job}/terminate")).status_code == 409


async def test_limits_are_the_workflows_to_refuse(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        id = (await http.post("/v1/clusters", json={"name": "c"})).json()["id"]
        answer = await http.patch("/v1/clusters/c/limits", json={"group": "workers", "min_nodes": 1, "max_nodes": 4})
        assert answer.status_code == 200
        assert await temporal.get_workflow_handle(id).query("all_heard") == ["workers 1 4"]
        refused = await http.patch("/v1/clusters/c/limits", json={"group": "none", "max_nodes": 4})
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
        assert refused.json()["detail"] == "Cluster has no worker group 'none'."
        assert (await http.patch("/v1/clusters/c/limits", json={"group": "w", "max_nodes": -1})).status_code == 422
        await _settle(world, id)
        ended = await http.patch(f"/v1/clusters/{id}/limits", json={"group": "workers", "max_nodes": 4})
        assert (ended.status_code, ended.json()["code"]) == (409, "conflict")


async def test_terminating_a_job_that_nobody_started_yet_starts_and_ends_it(
    world: World, temporal: Client, worker: None
) -> None:
    async with world.ada as http:
        job = (await http.post("/v1/jobs", json=JOB)).json()["id"]
        await world.context.tasks.wait()
        assert (await http.post(f"/v1/jobs/{job}/terminate", json={"reason": "x"})).status_code == 200
        await temporal.get_workflow_handle(job).result()
        row = await job_records.load_job(world.db, job)
        assert row is not None
        done = row.job.model_copy(update={"state": JobState.TERMINATED, "ended_at": utcnow(), "revision": 1})
        await job_records.write_job(world.db, done, [])
        again = await http.post(f"/v1/jobs/{job}/terminate")
        assert (again.status_code, again.json()["state"]) == (200, "TERMINATED")


async def test_without_a_worker_a_message_does_not_hang(
    world: World, temporal: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.kit.temporal.UPDATE_S", 0.3)
    async with world.ada as http:
        await http.post("/v1/clusters", json={"name": "c"})
        async with asyncio.timeout(20):
            answer = await http.post("/v1/clusters/c/terminate")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "worker" in answer.json()["remedy"]


async def test_nodes_and_events_and_logs(world: World) -> None:
    async with world.ada as http:
        id = (await http.post("/v1/clusters", json={"name": "c"})).json()["id"]
        row = await cluster_records.load_cluster(world.db, id)
        assert row is not None
        made = [
            Node(
                id=f"nd_{n}", cluster_id=id, role=NodeRole.HEAD if n == 0 else NodeRole.WORKER, group="g", slot=n,
                generation=1, state=NodeState.RUNNING, created_at=utcnow(),
            )
            for n in range(3)
        ]  # fmt: skip
        await cluster_records.write_cluster(world.db, row.cluster.model_copy(update={"revision": 1}), made, {}, [])
        first = (await http.get("/v1/clusters/c/nodes", params={"limit": 2})).json()
        rest = (await http.get("/v1/clusters/c/nodes", params={"limit": 2, "cursor": first["next_cursor"]})).json()
        assert [n["id"] for n in first["items"] + rest["items"]] == ["nd_0", "nd_1", "nd_2"]
        assert rest["next_cursor"] is None
        assert [e["kind"] for e in (await http.get("/v1/clusters/c/events")).json()["items"]] == ["accepted"]
        assert (await http.get("/v1/clusters/c/logs")).json() == {"chunks": [], "complete": False}


async def _settle(world: World, id: str) -> None:
    row = await cluster_records.load_cluster(world.db, id)
    assert row is not None
    more = {"state": ClusterState.TERMINATED, "ended_at": utcnow(), "revision": row.revision + 1}
    await cluster_records.write_cluster(world.db, row.cluster.model_copy(update=more), [], {}, [])
