"""The records: a projection of what workflows own, and a catalogue of what they don't.

Rows of clusters, nodes, jobs and runs are written by activities under the workflow's ``revision``: a
write with a smaller one changes nothing, so a late write never undoes a newer one. Documents (``doc``)
are the pydantic resource as JSON; the other columns exist to filter and sort by.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UTCDateTime(TypeDecorator[datetime]):
    """Aware UTC in and out on both databases; SQLite has no zone of its own."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _id() -> Column[str]:
    return Column("id", String(40), primary_key=True)


def _project() -> Column[str]:
    return Column("project_id", String(40), ForeignKey("projects.id"), nullable=False)


def _when(name: str, **kw: Any) -> Column[datetime]:
    return Column(name, UTCDateTime, **kw)


organizations = Table(
    "organizations", metadata, _id(),
    Column("name", String(63), unique=True, nullable=False),
    _when("created_at"),
)  # fmt: skip

projects = Table(
    "projects", metadata, _id(),
    Column("organization_id", String(40), ForeignKey("organizations.id"), nullable=False),
    Column("name", String(63), nullable=False),
    _when("created_at"),
    UniqueConstraint("organization_id", "name"),
)  # fmt: skip

users = Table(
    "users", metadata, _id(),
    Column("organization_id", String(40), ForeignKey("organizations.id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("role", String(20), nullable=False),
    _when("created_at"),
    UniqueConstraint("organization_id", "name"),
)  # fmt: skip

memberships = Table(
    "memberships", metadata,
    Column("user_id", String(40), ForeignKey("users.id"), primary_key=True),
    Column("project_id", String(40), ForeignKey("projects.id"), primary_key=True),
)  # fmt: skip

tokens = Table(
    "tokens", metadata, _id(),
    Column("user_id", String(40), ForeignKey("users.id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("sha256", String(64), unique=True, nullable=False),  # of 256 random bits: no salt needed
    _when("created_at"), _when("expires_at"), _when("revoked_at"), _when("last_used_at"),
)  # fmt: skip

clouds = Table(
    # A deleted one stays, for what ran there; its name is changed, so that another one may have it.
    "clouds", metadata, _id(),
    Column("organization_id", String(40), ForeignKey("organizations.id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("provider", String(20), nullable=False),
    Column("is_default", Boolean, nullable=False, default=False),
    Column("capabilities", JSON, nullable=False),
    Column("config", JSON(none_as_null=True)),  # AwsConfig or GcpConfig; NULL: the control plane's own machine
    _when("created_at"), _when("deleted_at"),
    UniqueConstraint("organization_id", "name"),
)  # fmt: skip

compute_configs = Table(
    "compute_configs", metadata, _id(), _project(),
    Column("name", String(63)),  # NULL: anonymous
    Column("version", Integer, nullable=False),
    Column("config", JSON, nullable=False),
    Column("created_by", String(63), nullable=False),
    _when("created_at"), _when("archived_at"),
    UniqueConstraint("project_id", "name", "version"),
)  # fmt: skip

accepted = Table(
    # One row per accepted POST: (project, key) fixes the resource id for ever; another body under the same key is 409.
    "accepted", metadata,
    Column("project_id", String(40), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("resource_id", String(40), nullable=False),
    _when("created_at"),
)  # fmt: skip

clusters = Table(
    "clusters", metadata, _id(), _project(),
    Column("cloud_id", String(40), ForeignKey("clouds.id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("state", String(20), nullable=False),
    Column("live_name", String(63)),  # the name while not ended, NULL afterwards: unique names among the living
    # Its workflow is known to exist; False: the monitor starts it.
    Column("started", Boolean, nullable=False, default=False),
    # Refused after all (Temporal away): its workflow, if any, does nothing.
    Column("withdrawn", Boolean, nullable=False, default=False),  # words: ok
    Column("revision", Integer, nullable=False, default=0),
    Column("doc", JSON, nullable=False),
    # runtime.messages.clusters.ClusterInput as accepted: whoever starts the workflow starts it with this.
    Column("input", JSON, nullable=False),
    Column("job_id", String(40)),  # made for this job
    Column("service_id", String(40)),  # made for this service
    _when("created_at", nullable=False), _when("ended_at"),
    UniqueConstraint("project_id", "live_name"),
)  # fmt: skip
Index("ix_clusters_project_state", clusters.c.project_id, clusters.c.state)
Index("ix_clusters_started", clusters.c.started)

nodes = Table(
    "nodes", metadata, _id(),
    Column("cluster_id", String(40), ForeignKey("clusters.id"), nullable=False),
    Column("role", String(10), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("revision", Integer, nullable=False, default=0),
    Column("doc", JSON, nullable=False),
    Column("config", JSON),  # GroupConfig: resources and labels that Ray on it gets
    Column("token_sha256", String(64)),  # node token; NULL until registered
    Column("authenticated", Boolean, nullable=False, default=False),  # its first report came: registration is closed
    Column("boot_id", String(64)),
    Column("gcs_address", String(100)),
    _when("created_at", nullable=False), _when("ended_at"),
)  # fmt: skip
Index("ix_nodes_cluster", nodes.c.cluster_id)
Index("ix_nodes_token", nodes.c.token_sha256)

reports = Table(
    # The newest report of each node: narrow, flushed in batches, never in a history.
    "reports", metadata,
    Column("node_id", String(40), primary_key=True),
    Column("cluster_id", String(40), nullable=False),
    Column("is_head", Boolean, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("activity", String(10), nullable=False),
    Column("doc", JSON, nullable=False),
    _when("at", nullable=False),
)  # fmt: skip
Index("ix_reports_head_at", reports.c.is_head, reports.c.at)

hearing = Table(
    # Since when the API has received without a gap: silence before `since` counts for nothing.
    "hearing", metadata,  # words: ok
    Column("id", Integer, primary_key=True),  # always 1
    _when("since", nullable=False), _when("last", nullable=False),
)  # fmt: skip

commands = Table(
    "commands", metadata,
    Column("id", String(100), primary_key=True),
    Column("cluster_id", String(40), nullable=False),
    Column("node_id", String(40), nullable=False),
    Column("kind", String(30), nullable=False),
    Column("args", JSON, nullable=False),  # no secret: env values by reference, URLs are signed at delivery
    Column("task_token", LargeBinary),  # Temporal's, of the activity that waits
    Column("done", Boolean, nullable=False, default=False),
    Column("result", JSON),
    _when("created_at", nullable=False), _when("done_at"),
)  # fmt: skip
Index("ix_commands_open", commands.c.done, commands.c.node_id)

jobs = Table(
    "jobs", metadata, _id(), _project(),
    Column("cloud_id", String(40), ForeignKey("clouds.id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("state", String(20), nullable=False),
    Column("started", Boolean, nullable=False, default=False),
    Column("withdrawn", Boolean, nullable=False, default=False),  # words: ok
    Column("revision", Integer, nullable=False, default=0),
    Column("doc", JSON, nullable=False),
    # runtime.messages.jobs.JobInput as accepted: whoever starts the workflow starts it with this.
    Column("input", JSON, nullable=False),
    Column("schedule_id", String(40)),
    _when("created_at", nullable=False), _when("ended_at"),
)  # fmt: skip
Index("ix_jobs_project_name", jobs.c.project_id, jobs.c.name)
Index("ix_jobs_started", jobs.c.started)
Index("ix_jobs_schedule", jobs.c.schedule_id)

services = Table(
    "services", metadata, _id(), _project(),
    Column("cloud_id", String(40), ForeignKey("clouds.id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("live_name", String(63)),  # the name until it is deleted: a terminated service keeps its name
    Column("state", String(20), nullable=False),
    Column("withdrawn", Boolean, nullable=False, default=False),  # words: ok
    Column("revision", Integer, nullable=False, default=0),
    Column("doc", JSON, nullable=False),  # heliostat.models.services.resource.Service without versions, tokens and tags
    # runtime.messages.services.ServiceInput: whoever starts the workflow starts it with this, at the row's
    # revision. Its tags
    # are the service's.
    Column("input", JSON, nullable=False),
    # [{id, created_at, `sealed`: row of `sealed` that holds {"token": …}, sha256}], the primary one first.
    Column("tokens", JSON, nullable=False),
    _when("created_at", nullable=False), _when("ended_at"),
    UniqueConstraint("project_id", "live_name"),
)  # fmt: skip
Index("ix_services_project_state", services.c.project_id, services.c.state)

service_versions = Table(
    "service_versions", metadata, _id(), _project(),
    Column("service_id", String(40), ForeignKey("services.id"), nullable=False),
    Column("deploy_id", String(40), nullable=False),
    Column("number", Integer, nullable=False),
    Column("name", String(63), nullable=False),
    Column("state", String(20), nullable=False),
    Column("config", JSON, nullable=False),  # ServiceConfig, env values masked
    Column("env_ref", String(40)),  # row of `sealed`: ServiceConfig.secrets()
    Column("spec", JSON, nullable=False),  # runtime.messages.services.VersionSpec
    Column("revision", Integer, nullable=False, default=0),
    Column("doc", JSON, nullable=False),  # heliostat.models.services.resource.ServiceVersion without config
    _when("created_at", nullable=False), _when("ended_at"),
    UniqueConstraint("service_id", "number"),
    UniqueConstraint("service_id", "name", name="uq_service_versions_name"),
)  # fmt: skip

service_deploys = Table(
    # Each accepted deploy, until its service's workflow has taken it up.
    "service_deploys", metadata, _id(), _project(),
    Column("service_id", String(40), ForeignKey("services.id"), nullable=False),
    Column("started", Boolean, nullable=False, default=False),  # its workflow has it; False: the monitor tells it
    Column("withdrawn", Boolean, nullable=False, default=False),  # words: ok; the workflow skips it
    Column("request", JSON, nullable=False),  # runtime.messages.services.DeployRequest
    _when("created_at", nullable=False),
)  # fmt: skip
Index("ix_service_deploys_started", service_deploys.c.started)

log_streams = Table(
    # Which node shipped a stream, so that a run's log is found without listing the bucket of every node.
    "log_streams", metadata,
    Column("cluster_id", String(40), primary_key=True),
    Column("node_id", String(40), primary_key=True),
    Column("stream", String(200), primary_key=True),
    Column("job_id", String(40)),
    Column("complete", Boolean, nullable=False, default=False),
    _when("created_at", nullable=False),
)  # fmt: skip
Index("ix_log_streams_job", log_streams.c.job_id)

followers = Table(
    # Somebody reads a cluster's logs now: its agents ship every second until `until`.
    "followers", metadata,
    Column("cluster_id", String(40), primary_key=True),
    _when("until", nullable=False),
)  # fmt: skip

schedules = Table(
    "schedules", metadata, _id(), _project(),
    Column("name", String(63), nullable=False),
    Column("config", JSON, nullable=False),
    # runtime.messages.jobs.JobInput of a turn, all resolved when the schedule was applied; ids and times are
    # the turn's.
    Column("input", JSON, nullable=False),
    Column("env_ref", String(40)),
    Column("paused", Boolean, nullable=False, default=False),
    Column("created_by", String(63), nullable=False),
    _when("created_at", nullable=False), _when("updated_at", nullable=False),
    UniqueConstraint("project_id", "name"),
)  # fmt: skip

sealed = Table(
    # Users' env values: Fernet over JSON, opened only where a command is handed to an agent.
    "sealed", metadata, _id(), _project(),  # words: ok
    Column("ciphertext", LargeBinary, nullable=False),
    _when("created_at", nullable=False),
)  # fmt: skip

events = Table(
    "events", metadata, _id(),
    Column("resource_id", String(40), nullable=False),
    Column("level", String(10), nullable=False),
    Column("kind", String(60), nullable=False),
    Column("actor", String(120), nullable=False),
    Column("message", Text, nullable=False),
    _when("at", nullable=False),
)  # fmt: skip
Index("ix_events_resource", events.c.resource_id, events.c.id)

sweeps = Table(
    "sweeps", metadata, _id(),
    Column("cloud", String(63), nullable=False),
    Column("found", Integer, nullable=False),
    Column("ended", JSON, nullable=False),
    Column("seconds", Float, nullable=False),
    _when("at", nullable=False),
)  # fmt: skip
