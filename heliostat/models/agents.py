"""What a node's agent and the API say to each other: protocol version 1, see docs/agent-protocol.md.
The agent itself imports nothing of this (it is standard library only and speaks JSON); the API
validates what comes in with these models.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import Field

from heliostat.models.clusters import Activity, NodeRole, NodeState
from heliostat.models.common import Result

PROTOCOL = 1
SUPPORTED_PROTOCOLS = (0, 1)
"""The control plane serves the last two, because clusters outlive releases. Protocol 0 is version 1
without ``follow`` in the report's answer; no released agent speaks it, the tests do."""


class RegisterRequest(Result):
    protocol: int
    node_id: str
    generation: int
    bootstrap_token: str
    ip: str
    """Address at which the other nodes of the cluster reach this one."""
    hostname: str = ""
    boot_id: str = ""
    """Random per agent process. Another one after the first authenticated report is refused."""
    ray_version: str = ""
    python_version: str = ""


class GroupConfig(Result):
    """One node type of the autoscaling config."""

    name: str
    resources: dict[str, float]
    labels: dict[str, str] = {}
    min_nodes: int = 0
    max_nodes: int = 0


class NodeConfigAnswer(Result):
    """All that a node needs to start Ray. Secret: holds the cluster's Ray token."""

    node_token: str
    node_id: str
    cluster_id: str
    cluster_name: str
    role: NodeRole
    group: str
    resources: dict[str, float]
    labels: dict[str, str]
    ray_token: str
    head_generation: int = 1
    groups: list[GroupConfig] = []
    """Heads only: the worker groups, for the autoscaling config."""
    desired: dict[str, int] = {}
    """Heads only: workers wanted now, by group."""
    deadman_s: float
    """Without contact to us and without work for so long: stop the machine."""
    maximum_uptime_at: datetime | None = None
    report_interval_s: float = 2.0
    log_prefix: str = ""


class HeadAddress(Result):
    """``GET /agent/v1/head``: where workers find their head; 404 ``head_not_ready`` until it has reported one."""

    generation: int
    gcs_address: str
    """``ip:port``."""


class FactKind(StrEnum):
    """Changes that become messages to a workflow. Everything else stays in the report."""

    RAY_READY = "ray_ready"
    """This node's Ray is up: a head answers ``/api/version``, a worker's raylet is alive in the head's eyes.
    Sent by the head for itself (``data.gcs_address``, ``data.ray_version``) and for workers (``data.node_id``)."""
    NODE_LOST = "node_lost"
    """Sent by the head: Ray says the worker ``data.node_id`` is dead. ``data.reason``."""
    ACTIVITY = "activity"
    """``data.activity`` (busy|idle|unknown), ``data.since``, ``data.reason``; damped by the agent."""
    DESIRED = "desired"
    """From Ray's autoscaler: ``data.desired`` {group: count}, absolute, and ``data.remove`` [node id]: those to end."""
    RUN_RUNNING = "run_running"
    """``data.run_id``."""
    RUN_ENDED = "run_ended"
    """``data.run_id``, ``data.status`` (SUCCEEDED|FAILED|STOPPED), ``data.exit_code``, ``data.message``,
    ``data.error`` (``runtime_env``|``entrypoint``|``supervisor``|``driver_lost``|""), ``data.timed_out``."""
    NODE_FAILED = "node_failed"
    """This node can't start Ray: ``data.reason``. Followed by its end."""
    STOPPING = "stopping"
    """The dead-man switch or maximum uptime ends this machine: ``data.reason``."""


class Fact(Result):
    id: str
    """Unique per node; delivered at least once, acted on once."""
    kind: FactKind
    at: datetime
    data: dict[str, Any] = {}


class ReportRequest(Result):
    protocol: int = PROTOCOL
    seq: int
    sent_at: datetime
    boot_id: str = ""
    ray_up: bool = False
    gcs_address: str = ""
    """Heads: ``ip:port`` of this head's GCS, in every report from the moment that the agent has chosen it, before
    Ray answers there: workers are given it at once and their Ray waits for it."""
    activity: Activity = Activity.UNKNOWN
    activity_since: datetime | None = None
    activity_reason: str = ""
    workers_alive: list[str] = []
    """Heads: node ids that Ray says are alive."""
    resources: dict[str, Any] = {}
    """Heads: totals and usage for people; never decided on."""
    facts: list[Fact] = []
    log_bytes_pending: int = 0


class NodeBrief(Result):
    id: str
    group: str
    state: NodeState
    ip: str | None = None


class ReportAnswer(Result):
    interval_s: float
    """When to report next, seconds."""
    acked: list[str] = []
    """Fact ids that are safe with us; the agent forgets them."""
    nodes: list[NodeBrief] | None = None
    """Heads: every worker that is asked for and not ended (the autoscaler's node list)."""
    desired: dict[str, int] | None = None
    """Heads: workers wanted now by group, after our bounds."""
    groups: list[GroupConfig] | None = None
    """Heads: the worker groups with their bounds of now, for the autoscaling config. A head compares."""
    follow: bool = False
    """Somebody follows a log: ship at least every second."""
    maximum_uptime_at: datetime | None = None


class CommandKind(StrEnum):
    SUBMIT_RUN = "submit_run"
    """Heads. args: ``run_id entrypoint working_dir{url,sha256}|{remote} py_modules[…] requirements[] env_vars{}
    timeout_s metadata{}``. Result ``{"accepted": true}`` once Ray has it. A run id that Ray has already is success."""
    STOP_RUN = "stop_run"
    """Heads. args: ``run_id``. Result once the run has ended and no process of its driver is left:
    ``{"status": …, "exit_code": …}``; unknown run: ``{"status": "UNKNOWN"}``; it is never started afterwards."""
    FENCE = "fence"
    """Heads. From now on no new run is accepted; the answer is the activity asked afresh:
    ``{"activity": "idle|busy|unknown", "reason": …}``."""
    UNFENCE = "unfence"


class Command(Result):
    id: str
    kind: CommandKind
    args: dict[str, Any] = {}


class CommandList(Result):
    commands: list[Command]


class CommandResult(Result):
    ok: bool
    result: dict[str, Any] = {}
    error: str = ""
    retryable: bool = False
    """The agent could not even try (Ray is starting, disk full): the caller may give the same command again."""


class LogSignRequest(Result):
    """Chunks that the agent is about to PUT: ``stream`` is a path such as ``runs/<run id>.log``,
    ``node/agent.log`` or ``ray/raylet.out``; ``offset`` the first byte's position in the stream."""

    class Item(Result):
        stream: str = Field(
            pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*){0,3}$", max_length=200
        )
        offset: int = Field(ge=0)

    items: list[Item] = Field(max_length=64)


class LogSignAnswer(Result):
    urls: list[str]
    """Presigned PUT URLs, in the order asked."""
