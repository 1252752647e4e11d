"""Workflows write their resources to the records. Each write carries the workflow's revision."""

from __future__ import annotations

from temporalio import activity

from activities.nodes import BootFacts
from clouds.boot.user_data import NodeEnvironment
from heliostat.models.clusters import Cluster, Node
from heliostat.models.common import Event, Model
from heliostat.models.jobs import Job
from heliostat.models.services import Service, ServiceVersion
from runtime.telemetry import CLUSTER_READY_SECONDS, RUNS
from store import clusters as cluster_records
from store import jobs as job_records
from store.clouds import load_config
from store.database import Database
from store.services import rows as services


class ClusterRecord(Model):
    cluster: Cluster
    nodes: list[Node] = []
    """Only those that changed."""
    node_configs: dict[str, dict[str, object]] = {}
    """Node id → GroupConfig of a new node: what Ray on it gets."""
    cloud_id: str = ""
    """Whose machines new nodes get; "" in older histories."""
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
    """``wanted`` is False when the API has cancelled the request: the workflow ends without doing anything."""

    wanted: bool
    boot: BootFacts | None = None


class RecordActivities:
    def __init__(self, db: Database, boot: BootFacts) -> None:
        self._db = db
        self._boot = boot

    @activity.defn
    async def record_cluster(self, record: ClusterRecord) -> Recorded:
        wanted = await cluster_records.write_cluster(
            self._db, record.cluster, record.nodes, record.node_configs, record.events
        )
        cluster = record.cluster
        if any(event.kind == "cluster_ready" for event in record.events):
            CLUSTER_READY_SECONDS.labels(cloud=cluster.cloud).observe(sum(cluster.phase_seconds.values()))
        boot = self._boot
        if record.node_configs:
            boot = boot.model_copy(update={"environment": await self._environment(record.cloud_id)})
        return Recorded(wanted=wanted, boot=boot)

    async def _environment(self, cloud_id: str) -> NodeEnvironment | None:
        """What the cloud's machines run in, by its config of now; None on the control plane's own machine."""
        found = await load_config(self._db, cloud_id)
        return None if found is None else NodeEnvironment.of(*found)

    @activity.defn
    async def record_job(self, record: JobRecord) -> Recorded:
        wanted = await job_records.write_job(self._db, record.job, record.events)
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
        """Before anything is made for it: False when the API has cancelled its request."""
        return await services.claim_deploy(self._db, deploy_id)
