"""The agents' API on real HTTP, real records and a real Temporal server; the workflows are recorders under
the ids of clusters and jobs, so that what was delivered can be read back."""

from __future__ import annotations

import asyncio
import secrets
import sys
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from temporalio import workflow
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from api import errors
from api.agents.routes import router
from api.kit.context import Context
from clouds.contract.bucket import StoredObject
from clouds.contract.errors import Gone
from heliostat.models.agents import PROTOCOL
from heliostat.models.clusters import Cluster, ClusterState, Node, NodeRole, NodeState
from heliostat.models.common import new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from runtime.keys import Keys
from runtime.messages.clusters import ClusterInput, NodeFact, NodeRegistered
from runtime.settings import Settings
from store.clusters import insert_cluster, write_cluster
from store.commands import put_command
from store.database import Database, migrate
from store.tables import clouds, organizations, projects
from tests.store.conftest import fresh_database

TEMPORAL = Path(sys.executable).parent / "temporal"


@workflow.defn(sandboxed=False)
class Recorder:
    """Stands for a cluster's, a job's or a service's workflow: writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.data: list[dict[str, Any]] = []
        self.messages = 0
        """That were of several at once."""
        self.ended = False

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: self.ended)

    @workflow.signal
    def fact(self, message: NodeFact) -> None:
        self.heard.append(f"fact {message.event_id} {message.kind}")
        self.data.append(message.data)

    @workflow.signal
    def run_fact(self, message: NodeFact) -> None:
        self.heard.append(f"run_fact {message.event_id} {message.kind}")
        self.data.append(message.data)

    @workflow.signal
    def serve_fact(self, message: NodeFact) -> None:
        self.heard.append(f"serve_fact {message.event_id} {message.cluster_id}")
        self.data.append(message.data)

    @workflow.signal
    def node_registered(self, message: NodeRegistered) -> None:
        self.heard.append(f"registered {message.node_id} {message.generation} {message.ip}")

    @workflow.signal
    def nodes_registered(self, messages: list[NodeRegistered]) -> None:
        self.messages += 1
        for message in messages:
            self.node_registered(message)

    @workflow.signal
    def facts(self, messages: list[NodeFact]) -> None:
        self.messages += 1
        for message in messages:
            self.fact(message)

    @workflow.signal
    def end(self) -> None:
        self.ended = True

    @workflow.query
    def all_heard(self) -> list[str]:
        return self.heard

    @workflow.query
    def of_several(self) -> int:
        return self.messages

    @workflow.query
    def all_data(self) -> list[dict[str, Any]]:
        return self.data


class DictBucket:
    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise Gone(f"no object {key}")
        return self.objects[key]

    def stat(self, key: str) -> StoredObject | None:
        data = self.objects.get(key)
        return None if data is None else StoredObject(key=key, size=len(data), modified_at=utcnow())

    def list(self, prefix: str, start_after: str = "") -> list[StoredObject]:
        found = [self.stat(k) for k in sorted(self.objects) if k.startswith(prefix) and k > start_after]
        return [s for s in found if s is not None]

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.objects.pop(key, None)

    def presign_get(self, key: str, expires_in_s: int) -> str:
        return f"http://bucket/{key}?get&expires={expires_in_s}"

    def presign_put(self, key: str, expires_in_s: int, *, size: int | None = None, sha256: str | None = None) -> str:
        return f"http://bucket/{key}?put&expires={expires_in_s}"


@dataclass
class Agent:
    """The protocol as an agent speaks it, call by call."""

    node: Node
    http: httpx.AsyncClient
    bootstrap: str
    boot_id: str = field(default_factory=lambda: secrets.token_hex(16))
    token: str = ""
    seq: int = 0
    protocol: int = PROTOCOL

    async def register(self, **changes: Any) -> httpx.Response:
        body = {
            "protocol": self.protocol,
            "node_id": self.node.id,
            "generation": self.node.generation,
            "bootstrap_token": self.bootstrap,
            "ip": "127.0.9.1",
            "boot_id": self.boot_id,
        } | changes
        answer = await self.http.post("/agent/v1/register", json=body)
        if answer.status_code == 200:
            self.token = answer.json()["node_token"]
        return answer

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    async def report(self, *facts: dict[str, Any], **more: Any) -> httpx.Response:
        self.seq += 1
        body = {
            "protocol": self.protocol,
            "seq": self.seq,
            "sent_at": utcnow().isoformat(),
            "boot_id": self.boot_id,
            "facts": list(facts),
        } | more
        return await self.http.post("/agent/v1/report", json=body, headers=self.headers)

    async def get(self, path: str, **params: Any) -> httpx.Response:
        return await self.http.get(f"/agent/v1{path}", params=params, headers=self.headers, timeout=40)

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(f"/agent/v1{path}", json=body, headers=self.headers)


def fact(kind: str, **data: Any) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "kind": kind, "at": utcnow().isoformat(), "data": data}


@dataclass
class World:
    db: Database
    temporal: Client
    keys: Keys
    settings: Settings
    queue: str
    bucket: DictBucket = field(default_factory=DictBucket)
    bundles: dict[str, bytes] = field(default_factory=dict)

    def app(self, temporal: Client | None = None, db: Database | None = None) -> FastAPI:
        app = FastAPI()
        app.state.context = Context.of(
            self.settings,
            db or self.db,
            self.keys,
            temporal or self.temporal,
            buckets={"cloud_1": self.bucket},
            bundles=self.bundles,
        )
        app.include_router(router)
        errors.install(app)
        return app

    @asynccontextmanager
    async def api(self, temporal: Client | None = None, db: Database | None = None) -> AsyncIterator[httpx.AsyncClient]:
        """One API process's worth of it, on a port of its own."""
        app = self.app(temporal, db)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
        task = asyncio.create_task(server.serve())
        while not server.started:
            assert not task.done(), task.result()
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, limits=limits) as http:
            http.app = app  # type: ignore[attr-defined]
            yield http
        server.should_exit = True
        await task

    async def cluster(
        self, config: ComputeConfig | None = None, *, record: bool = True, service_id: str | None = None
    ) -> Cluster:
        cluster = Cluster(
            id=new_id("cl"),
            name=f"c-{secrets.token_hex(6)}",
            project="default",
            cloud="local",
            state=ClusterState.STARTING,
            compute_config=config
            or ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(name="small", min_nodes=0, max_nodes=3)]),
            created_by="ann",
            created_at=utcnow(),
            state_since=utcnow(),
            desired={"small": 1},
        )
        async with self.db.begin() as conn:
            await insert_cluster(conn, cluster, cluster_input(cluster).model_copy(update={"service_id": service_id}))
        if record:
            await self.record(cluster.id)
        return cluster

    async def record(self, workflow_id: str) -> None:
        await self.temporal.start_workflow(Recorder.run, id=workflow_id, task_queue=self.queue)

    async def node(self, cluster: Cluster, role: NodeRole, *, generation: int = 1, group: str = "small") -> Node:
        node = Node(
            id=new_id("nd"),
            cluster_id=cluster.id,
            role=role,
            group="head" if role == NodeRole.HEAD else group,
            slot=0 if role == NodeRole.HEAD else 1,
            generation=generation,
            state=NodeState.LAUNCHED,
            created_at=utcnow(),
        )
        await self.change(cluster, node)
        return node

    async def change(self, cluster: Cluster, *nodes: Node) -> None:
        """As the cluster's workflow writes: with its next revision."""
        cluster.revision += 1
        configs = {n.id: {"name": n.group, "resources": {"CPU": 2.0}, "labels": {"a": "b"}} for n in nodes}
        assert await write_cluster(self.db, cluster, list(nodes), configs, [])

    def agent(self, node: Node, http: httpx.AsyncClient) -> Agent:
        return Agent(node, http, self.keys.bootstrap_token(node.id, node.generation))

    async def joined(self, cluster: Cluster, role: NodeRole, http: httpx.AsyncClient) -> Agent:
        """A node of the cluster that has registered and reported."""
        agent = self.agent(await self.node(cluster, role), http)
        assert (await agent.register()).status_code == 200
        assert (await agent.report()).status_code == 200
        return agent

    async def submitted(self, cluster: Cluster, head: Node) -> str:
        """A run that the cluster was given; its job's workflow is a recorder. Returns the run's id."""
        run_id = f"{new_id('job')}-1"
        await self.record(run_id.rpartition("-")[0])
        args = {"run_id": run_id, "entrypoint": "true"}
        await put_command(self.db, f"{run_id}/submit", cluster.id, head.id, "submit_run", args, b"no activity")
        return run_id

    async def heard(self, workflow_id: str) -> list[str]:
        answer: list[str] = await self.temporal.get_workflow_handle(workflow_id).query(Recorder.all_heard)
        return answer


def cluster_input(cluster: Cluster) -> ClusterInput:
    return ClusterInput(
        cluster_id=cluster.id,
        name=cluster.name,
        project_id="prj_1",
        project=cluster.project,
        cloud_id="cloud_1",
        cloud=cluster.cloud,
        config=cluster.compute_config,
        created_by=cluster.created_by,
        created_at=cluster.created_at,
    )


@pytest.fixture(scope="session")
async def temporal() -> AsyncIterator[Client]:
    env = await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=str(TEMPORAL),
        dev_server_log_level="error",
        dev_server_startup_timeout=timedelta(seconds=60),  # 5 s by default, which three at once exceed
        dev_server_extra_args=["--dynamic-config-value", "history.transferProcessorMaxPollRPS=1000"],
    )
    yield env.client
    await env.shutdown()


async def seed(db: Database) -> None:
    now = utcnow()
    async with db.begin() as conn:
        await conn.execute(organizations.insert().values(id="org_1", name="default", created_at=now))
        await conn.execute(
            projects.insert().values(id="prj_1", organization_id="org_1", name="default", created_at=now)
        )
        await conn.execute(
            clouds.insert().values(
                id="cloud_1", organization_id="org_1", name="local", provider="local", capabilities={}, created_at=now
            )
        )


@asynccontextmanager
async def world_on(url: str, home: Path, temporal: Client) -> AsyncIterator[World]:
    await migrate(url)
    db = Database(url)
    await seed(db)
    queue = uuid.uuid4().hex
    settings = Settings(home=home, database_url=url, task_queue=queue)
    async with Worker(temporal, task_queue=queue, workflows=[Recorder]):
        yield World(db, temporal, Keys(secrets.token_bytes(32)), settings, queue)
    await db.dispose()


@pytest.fixture
async def world(tmp_path: Path, temporal: Client) -> AsyncIterator[World]:
    async with world_on(f"sqlite+aiosqlite:///{tmp_path / 'records.db'}", tmp_path, temporal) as found:
        yield found


@pytest.fixture
async def postgres_world(tmp_path: Path, postgres: str, temporal: Client) -> AsyncIterator[World]:
    """Records on a PostgreSQL server of our own."""
    with fresh_database(postgres) as url:
        async with world_on(url, tmp_path, temporal) as found:
            yield found


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    api: AbstractAsyncContextManager[httpx.AsyncClient] = world.api()
    async with api as client:
        yield client
