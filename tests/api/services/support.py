"""What the tests of services share: a recorder in place of the workflow, and deploys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import httpx
from temporalio import workflow
from temporalio.client import Client
from temporalio.exceptions import ApplicationError

from heliostat.models.clusters import Cluster, ClusterState, Node, NodeRole, NodeState
from heliostat.models.common import new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import (
    LATENCY_BOUNDS_MS,
    Service,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
)
from runtime.messages.clusters import ClusterInput
from runtime.messages.common import TerminateRequest
from runtime.messages.services import DeployRequest, GateOrder, RollbackOrder, RolloutOrder, ServiceInput
from store import clusters as cluster_records
from store.services import rows as store
from store.tables import reports
from tests.api.conftest import World

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


# --- tokens -----------------------------------------------------------------------------------------------


def sha(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def a_service(id: str = "") -> Service:
    now = utcnow()
    return Service(
        id=id or new_id("svc"), name="s", project="team", cloud="local", state=ServiceState.STARTING,
        created_by="ada", created_at=now, state_since=now,
    )  # fmt: skip


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
