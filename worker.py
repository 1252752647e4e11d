"""The worker process: runs the workflows and activities, which are listed by hand, with the settings, the records,
Temporal and the clouds of this installation.

    python worker.py

SIGTERM ends it gracefully; kill -9 loses nothing. Any number of workers may share a task queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import structlog
import uvloop
from prometheus_client import start_http_server
from temporalio.client import Client
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.worker import UnsandboxedWorkflowRunner, Worker, WorkerDeploymentConfig
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from activities.canaries import CanaryActivities
from activities.clouds import CloudActivities
from activities.commands import CommandActivities
from activities.endpoints import EndpointActivities
from activities.leases import LeaseActivities
from activities.monitor.endpoints import EndpointWatch
from activities.monitor.loop import MonitorActivities
from activities.nodes import BootFacts, NodeActivities
from activities.records import RecordActivities
from activities.schedules import ScheduleActivities
from activities.sweep.machines import MachineSweepActivities
from activities.sweep.records import RecordSweepActivities
from activities.sweep.retention import RetentionActivities
from activities.sweep.services import ServiceSweepActivities
from heliostat.errors import HeliostatError
from installation import Installation, open_installation
from runtime import telemetry
from runtime.home import free_port
from runtime.settings import Settings
from runtime.temporal import connect, ensure_namespace_ready
from workflows.clouds import HeldByCloudWorkflow, VerifyCloudWorkflow
from workflows.clusters.workflow import ClusterWorkflow
from workflows.jobs.workflow import JobWorkflow
from workflows.monitor import MonitorWorkflow
from workflows.schedules import ScheduledRunWorkflow
from workflows.services.workflow import ServiceWorkflow
from workflows.sweep import SweepWorkflow

log = structlog.get_logger("worker")

WORKFLOWS: list[type] = [
    ClusterWorkflow, JobWorkflow, ServiceWorkflow, ScheduledRunWorkflow, SweepWorkflow, MonitorWorkflow,
    VerifyCloudWorkflow, HeldByCloudWorkflow,
]  # fmt: skip

DEPLOYMENT = "heliostat"

PASSED_THROUGH = ("heliostat", "runtime", "store", "clouds", "activities", "workflows.ids", "workflows.policies")
"""Not loaded anew for each workflow's sandbox: they hold no state that a workflow may change, and their
imports (SQLAlchemy among them) would cost megabytes and a second each."""


async def main() -> None:
    settings = Settings()
    telemetry.setup(settings, "heliostat-worker")
    async with open_installation(settings) as installation:
        sdk_port = settings.sdk_metrics_port or free_port()
        client = await connect(settings, runtime=telemetry.temporal_runtime(f"{settings.metrics_host}:{sdk_port}"))
        await ensure_namespace_ready(client, settings)
        with ThreadPoolExecutor(settings.worker_threads, thread_name_prefix="activity") as threads:
            await run(make_worker(client, installation, threads, sandboxed=settings.worker_sandbox), settings, sdk_port)


async def run(worker: Worker, settings: Settings, sdk_port: int) -> None:
    """Until SIGTERM or SIGINT; then running activities get ``worker_shutdown_s`` to end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with worker:
        port = settings.metrics_port or free_port()
        server, _ = start_http_server(port, addr=settings.metrics_host)  # its answer means that this worker polls
        log.info("working", queue=settings.task_queue, metrics_port=port, sdk_metrics_port=sdk_port)
        await stop.wait()
        log.info("stopping", grace_s=settings.worker_shutdown_s)
    server.shutdown()
    log.info("stopped")


def make_worker(
    client: Client, installation: Installation, threads: ThreadPoolExecutor, *, sandboxed: bool = True
) -> Worker:
    """Everything that this installation can do, listed by hand.

    Args:
        sandboxed: load each workflow's module anew and refuse it what is not deterministic (``worker_sandbox``).
    """
    settings, db = installation.settings, installation.db
    ca = installation.bundles.keep_ca(settings.api_ca_file) if settings.api_ca_file else ""
    boot = BootFacts(api_url=settings.public_api_url, bundle_sha256=installation.bundles.keep(), ca_sha256=ca)
    installation_id = installation.keys.installation_id()
    commands = CommandActivities(db)
    endpoints = EndpointActivities(installation.balancers, installation_id)
    canaries = CanaryActivities(db)
    clouds = CloudActivities(db, installation.verifies, installation.machines, installation.balancers, installation_id)
    leases = LeaseActivities(db, client, settings.task_queue)
    monitor = MonitorActivities(
        db, client, settings, EndpointWatch(db, client, installation.balancers, installation_id)
    )
    nodes = NodeActivities(installation.machines, installation.keys, installation_id, installation.cloud_names)
    records = RecordActivities(db, boot)
    schedules = ScheduleActivities(db)
    grace_s = settings.newborn_grace_s
    machine_sweep = MachineSweepActivities(
        db, client, installation.machines, installation_id, grace_s, installation.cloud_names
    )
    record_sweep = RecordSweepActivities(db, client, grace_s)
    service_sweep = ServiceSweepActivities(db, client, installation.balancers, installation_id, grace_s)
    retention = RetentionActivities(db, installation.machines, installation.buckets, settings, installation.cloud_names)
    activities: list[Callable[..., Any]] = [
        commands.run_command,
        leases.start_job_cluster,
        leases.start_service_cluster,
        leases.acquire_lease,
        leases.release_lease,
        leases.ended_holders,
        monitor.watch,
        nodes.launch_node,
        nodes.describe_machines,
        nodes.console_output,
        nodes.end_machines,
        nodes.hand_over,
        records.record_cluster,
        records.record_job,
        records.record_service,
        records.claim_deploy,
        endpoints.ensure_endpoint,
        endpoints.set_backends,
        endpoints.remove_endpoint,
        canaries.watch_canary,
        canaries.last_traffic,
        clouds.verify_cloud,
        clouds.held_by_cloud,
        schedules.accept_scheduled_job,
        machine_sweep.list_clouds,
        machine_sweep.sweep_cloud,
        record_sweep.settle_orphans,
        service_sweep.sweep_services,
        retention.apply_retention,
    ]
    return Worker(
        client,
        task_queue=settings.task_queue,
        workflows=WORKFLOWS,
        activities=activities,
        activity_executor=threads,
        # One slot a thread. A command to an agent holds none while it waits: it is completed from outside.
        max_concurrent_activities=settings.worker_threads,
        max_cached_workflows=settings.worker_max_cached_workflows,
        workflow_runner=(
            SandboxedWorkflowRunner(SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH))
            if sandboxed
            else UnsandboxedWorkflowRunner()
        ),
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


if __name__ == "__main__":
    try:
        with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    except HeliostatError as error:
        log.error("the worker can't start", error=str(error))
        sys.exit(error.exit_code)
    # Threads of the SDK's core may abort at interpreter exit (sdk-python#300); all is done and flushed.
    sys.stderr.flush()
    os._exit(0)
