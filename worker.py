"""The worker: carries out workflows and activities. The composition root: the one place that joins settings,
records, Temporal and concrete clouds.

    python worker.py

SIGTERM ends it gracefully; kill -9 loses nothing. Any number of workers may share a task queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import structlog
from prometheus_client import start_http_server
from temporalio.client import Client
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.worker import Worker, WorkerDeploymentConfig
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from activities.commands import CommandActivities
from activities.leases import LeaseActivities
from activities.monitor import MonitorActivities
from activities.nodes import NodeActivities
from activities.records import BootFacts, RecordActivities
from activities.schedules import ScheduleActivities
from activities.sweep import SweepActivities
from clouds.base import Bucket, Machines
from clouds.bootstrap import Bundles
from clouds.local.bucket import LocalBucket
from clouds.local.machines import LocalMachines
from heliostat.errors import HeliostatError, Unavailable
from heliostat.models.clouds import Provider
from runtime import telemetry
from runtime.home import free_port
from runtime.keys import Keys, load_or_create
from runtime.settings import Settings
from runtime.temporal import connect, ensure_namespace_ready
from store.clouds import register_cloud
from store.database import Database, latest_revision
from workflows.clusters import ClusterWorkflow
from workflows.jobs import JobWorkflow
from workflows.monitor import MonitorWorkflow
from workflows.schedules import ScheduledRunWorkflow
from workflows.sweep import SweepWorkflow

log = structlog.get_logger("worker")

WORKFLOWS: list[type] = [ClusterWorkflow, JobWorkflow, ScheduledRunWorkflow, SweepWorkflow, MonitorWorkflow]

DEPLOYMENT = "heliostat"

PASSED_THROUGH = ("heliostat", "runtime", "store", "clouds", "activities", "workflows.ids", "workflows.policies")
"""Not loaded anew for each workflow's sandbox: they hold no state that a workflow may change, and their
imports (SQLAlchemy among them) would cost megabytes and a second each."""


async def main() -> None:
    settings = Settings()
    telemetry.setup(settings, "heliostat-worker")
    keys = load_or_create(settings.home, settings.secret_key)
    db = Database(settings.records_url)
    try:
        await require_current_schema(db)
        sdk_port = settings.sdk_metrics_port or free_port()
        client = await connect(settings, runtime=telemetry.temporal_runtime(f"{settings.metrics_host}:{sdk_port}"))
        await ensure_namespace_ready(client, settings)
        machines, buckets = await open_clouds(settings, keys, db)
        with ThreadPoolExecutor(settings.worker_threads, thread_name_prefix="activity") as threads:
            worker = make_worker(client, settings, keys, db, machines, buckets, threads)
            await run(worker, settings, sdk_port)
    finally:
        await db.dispose()


async def run(worker: Worker, settings: Settings, sdk_port: int) -> None:
    """Until SIGTERM or SIGINT; then running activities get ``worker_shutdown_s`` to end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with worker:
        port = settings.metrics_port or free_port()
        server, _ = start_http_server(port, addr=settings.metrics_host)  # its answer says that this worker polls
        log.info("working", queue=settings.task_queue, metrics_port=port, sdk_metrics_port=sdk_port)
        await stop.wait()
        log.info("stopping", grace_s=settings.worker_shutdown_s)
    server.shutdown()
    log.info("stopped")


def make_worker(
    client: Client,
    settings: Settings,
    keys: Keys,
    db: Database,
    machines: Mapping[str, Machines],
    buckets: Mapping[str, Bucket],
    threads: ThreadPoolExecutor,
) -> Worker:
    """Everything that this installation can do, listed by hand. Tests and benchmarks make theirs here too."""
    boot = BootFacts(api_url=settings.public_api_url, bundle_sha256=Bundles(settings.bundles_dir).keep())
    installation = keys.installation_id()
    commands = CommandActivities(db)
    leases = LeaseActivities(db, client, settings.task_queue)
    monitor = MonitorActivities(db, client, settings)
    nodes = NodeActivities(machines, keys, installation)
    records = RecordActivities(db, boot)
    schedules = ScheduleActivities(db)
    sweep = SweepActivities(db, client, machines, buckets, settings, installation)
    activities: list[Callable[..., Any]] = [
        commands.run_command,
        commands.drop_command,
        leases.start_job_cluster,
        leases.acquire_lease,
        leases.release_lease,
        leases.ended_holders,
        monitor.watch,
        nodes.launch_node,
        nodes.describe_machines,
        nodes.console_output,
        nodes.end_machines,
        records.record_cluster,
        records.record_job,
        schedules.accept_scheduled_job,
        sweep.list_clouds,
        sweep.sweep_cloud,
        sweep.settle_orphans,
        sweep.keep_house,
    ]
    return Worker(
        client,
        task_queue=settings.task_queue,
        workflows=WORKFLOWS,
        activities=activities,
        activity_executor=threads,
        # Threads bound the sync ones; the async ones wait for the records or for Temporal, not for a CPU.
        max_concurrent_activities=settings.worker_threads * 4,
        max_cached_workflows=settings.worker_max_cached_workflows,
        workflow_runner=SandboxedWorkflowRunner(SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH)),
        graceful_shutdown_timeout=timedelta(seconds=settings.worker_shutdown_s),
        # The default throttle of 30 s would hide a dead worker's monitor from its 20 s heartbeat timeout.
        max_heartbeat_throttle_interval=timedelta(seconds=5),
        deployment_config=_deployment(settings),
    )


def _deployment(settings: Settings) -> WorkerDeploymentConfig | None:
    if not settings.worker_versioning:
        return None
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(deployment_name=DEPLOYMENT, build_id=settings.worker_versioning),
        use_worker_versioning=True,
        default_versioning_behavior=VersioningBehavior.AUTO_UPGRADE,
    )


async def open_clouds(settings: Settings, keys: Keys, db: Database) -> tuple[dict[str, Machines], dict[str, Bucket]]:
    """The clouds of this worker by id, registered in the records: the machines of this host, or with
    ``HELIOSTAT_FAKE_CLOUD`` set none that are real."""
    provider = Provider.FAKE if os.environ.get("HELIOSTAT_FAKE_CLOUD") else Provider.LOCAL
    machines: Machines
    if provider is Provider.FAKE:
        from clouds.fake import FakeMachines

        machines = FakeMachines()
    else:
        machines = LocalMachines(settings.home, settings.local_isolation, sys.executable)
    bucket = LocalBucket(settings.home / "bucket", settings.public_bucket_url, keys.bucket_key())
    capabilities = await asyncio.to_thread(machines.capabilities)
    # The API makes the first organization when it starts; both may start at the same time.
    for _ in range(300):
        cloud_id = await register_cloud(db, provider.value, provider, capabilities)
        if cloud_id is not None:
            return {cloud_id: telemetry.traced(machines, provider.value, settings)}, {cloud_id: bucket}
        await asyncio.sleep(0.2)
    raise Unavailable("The records hold no organization.", remedy="Start the API: it makes the first one.")


async def require_current_schema(db: Database) -> None:
    """Raises Unavailable when the records are at another schema than this code's."""
    there, ours = await db.schema_revision(), latest_revision()
    if there != ours:
        raise Unavailable(
            f"The records are at schema {there or 'none'}; this code needs {ours}.",
            remedy="Run `python -m store.migrate` (`make up` does), or start the code that they belong to.",
        )


if __name__ == "__main__":
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(main())
    except HeliostatError as error:
        log.error("the worker can't start", error=str(error))
        sys.exit(error.exit_code)
    # Threads of the SDK's core may abort at interpreter exit (sdk-python#300); all is done and flushed.
    sys.stderr.flush()
    os._exit(0)
