"""Accepts a cluster: resolves its config, writes its row, starts its workflow."""

from __future__ import annotations

from dataclasses import dataclass, field

from api.compute_configs.resolve import resolve_compute_config
from api.kit.acceptance import accepted_event, deleted_by_retention, ensure_started
from api.kit.callers import Caller, Project
from api.kit.context import Context
from api.kit.limits import limits
from heliostat.errors import Conflict
from heliostat.models.clusters import Cluster, ClusterCreate, ClusterState
from heliostat.models.common import new_id, utcnow
from runtime.messages.clusters import ClusterInput, start_cluster
from store.acceptance import Kind, cancel_accepted
from store.clusters import cluster_with_name, insert_cluster, load_cluster
from store.database import AsyncConnection


@dataclass
class NewCluster:
    """See ``api.kit.acceptance.Acceptable``."""

    ctx: Context
    me: Caller
    project: Project
    body: ClusterCreate
    kind: Kind = field(default="cluster", init=False)
    arg: ClusterInput = field(init=False)

    @property
    def id(self) -> str:
        return self.arg.cluster_id

    @property
    def project_id(self) -> str:
        return self.project.id

    async def check(self, conn: AsyncConnection) -> None:
        config, cloud = await resolve_compute_config(
            conn, self.me, self.project, self.body.compute_config, self.body.cloud, offers=self.ctx.offers
        )
        id = new_id("cl")
        self.arg = ClusterInput(
            cluster_id=id,
            name=self.body.name or f"cluster-{id[-6:]}",
            project_id=self.project.id,
            project=self.project.name,
            cloud_id=cloud.id,
            cloud=cloud.name,
            config=config,
            created_by=self.me.name,
            created_at=utcnow(),
            tags=self.body.tags,
            limits=limits(self.ctx.settings, cloud),
        )

    async def check_code(self) -> None:
        """A cluster names none."""

    async def write(self, conn: AsyncConnection) -> None:
        name = self.arg.name
        if not await insert_cluster(conn, self._cluster(), self.arg):
            await check_name_is_free(conn, self.project_id, name)
            raise Conflict(
                f"The name {name!r} was taken a moment ago.", remedy="Try again.", resource=name, field="name"
            )
        await accepted_event(conn, self.id, self.me.actor, f"cluster {name} requested on cloud {self.arg.cloud}")

    async def start(self) -> None:
        await start_cluster(self.ctx.temporal, self.ctx.settings.task_queue, self.arg)

    async def cancel(self, conn: AsyncConnection) -> bool:
        return await cancel_accepted(conn, self.kind, self.id)

    async def answer(self) -> Cluster:
        return self._cluster()

    async def repeat(self, id: str) -> Cluster:
        row = await load_cluster(self.ctx.db, id)
        if row is None:
            raise deleted_by_retention("Cluster", id)
        if not row.started:
            await ensure_cluster_started(self.ctx, row.input)
        return row.cluster

    def _cluster(self) -> Cluster:
        arg = self.arg
        return Cluster(
            id=arg.cluster_id,
            name=arg.name,
            project=arg.project,
            cloud=arg.cloud,
            state=ClusterState.STARTING,
            compute_config=arg.config,
            tags=arg.tags,
            created_by=arg.created_by,
            created_at=arg.created_at,
            state_since=arg.created_at,
        )


async def ensure_cluster_started(ctx: Context, arg: ClusterInput) -> None:
    await ensure_started(ctx, "cluster", arg.cluster_id, start_cluster(ctx.temporal, ctx.settings.task_queue, arg))


async def check_name_is_free(conn: AsyncConnection, project_id: str, name: str) -> None:
    other = await cluster_with_name(conn, project_id, name)
    if other is not None:
        raise Conflict(
            f"The name {name!r} is taken by cluster {other}, which has not ended.",
            remedy="Choose another name, or terminate that cluster first.",
            resource=name,
            field="name",
        )
