"""The projection: what workflows tell the records. Each write carries the workflow's revision."""

from __future__ import annotations

from temporalio import activity

from activities.nodes import BootFacts
from heliostat.models.clusters import Cluster, Node
from heliostat.models.common import Event, Model
from heliostat.models.jobs import Job
from heliostat.models.services import Service, ServiceVersion
from runtime.telemetry import CLUSTER_READY_SECONDS, RUNS
from store import projection, services
from store.database import Database


class ClusterRecord(Model):
    cluster: Cluster
    nodes: list[Node] = []
    """Only those that changed."""
    node_configs: dict[str, dict[str, object]] = {}
    """Node id → GroupConfig of a new node: what Ray on it gets."""
    events: list[Event] = []


class JobRecord(Model):
    job: Job
    events: list[Event] = []


class ServiceRecord(Model):
    service: Service
    """Without versions and tokens."""
    versions: list[ServiceVersion] = []
    """Only those that changed; their config stands in the records."""
    events: list[Event] = []


class Recorded(Model):
    """``wanted`` is False when the API took the acceptance back: the workflow ends without doing anything."""

    wanted: bool
    boot: BootFacts | None = None


class RecordActivities:
    def __init__(self, db: Database, boot: BootFacts) -> None:
        self._db = db
        self._boot = boot

    @activity.defn
    async def record_cluster(self, record: ClusterRecord) -> Recorded:
        wanted = await projection.write_cluster(
            self._db, record.cluster, record.nodes, record.node_configs, record.events
        )
        cluster = record.cluster
        if any(event.kind == "cluster_ready" for event in record.events):
            CLUSTER_READY_SECONDS.labels(cloud=cluster.cloud).observe(sum(cluster.phase_seconds.values()))
        return Recorded(wanted=wanted, boot=self._boot)

    @activity.defn
    async def record_job(self, record: JobRecord) -> Recorded:
        wanted = await projection.write_job(self._db, record.job, record.events)
        for event in record.events:
            if event.kind == "run_ended" and record.job.runs:
                run = record.job.runs[-1]
                RUNS.labels(state=run.state, cause=run.cause or "").inc()
        return Recorded(wanted=wanted)

    @activity.defn
    async def record_service(self, record: ServiceRecord) -> Recorded:
        return Recorded(wanted=await services.write_service(self._db, record.service, record.versions, record.events))

    @activity.defn
    async def claim_deploy(self, deploy_id: str) -> bool:
        """Before anything is made for it: False when the API has taken its acceptance back."""
        return await services.claim_deploy(self._db, deploy_id)
