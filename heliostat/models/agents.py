"""The messages between a node's agent and the API: protocol version 1, see docs/agent-protocol.md. The agent does not
import these models (it uses only the standard library, and JSON); the API validates with them.
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
"""The control plane supports the last two, because clusters outlive releases. Protocol 0 is version 1 without
``follow`` in the report's answer; only tests use it."""


class RegisterRequest(Result):
    protocol: int
    node_id: str
    generation: int
    bootstrap_token: str
    ip: str
    """Address of this node for the other nodes of the cluster."""
    hostname: str = ""
    boot_id: str = ""
    """Random per agent process. After the first authenticated report the API refuses another one."""
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
    """Everything that a node needs to start Ray. Secret: contains the cluster's Ray token."""

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
    """Heads only: desired workers by group."""
    deadman_s: float
    """Dead-man switch: seconds without contact to the API and without work after which the agent stops the machine."""
    maximum_uptime_at: datetime | None = None
    report_interval_s: float = 2.0
    log_prefix: str = ""
    service_id: str = ""
    """Service of this cluster, if any: then Serve's proxies get the gate."""


class HeadAddress(Result):
    """``GET /agent/v1/head``: the head's address for workers; 404 ``head_not_ready`` until the head has reported it."""

    generation: int
    gcs_address: str
    """``ip:port``."""


class FactKind(StrEnum):
    """Events that become messages to a workflow. Everything else stays in the report."""

    RAY_READY = "ray_ready"
    """This node's Ray is up: a head answers ``/api/version``, the head sees a worker's raylet alive.
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
    SPOT_NOTICE = "spot_notice"
    """The cloud will reclaim this node's machine: ``data.kind`` (``interruption``|``rebalance``|``maintenance``),
    ``data.deadline`` (ISO 8601, or null: unknown), ``data.reason``. A worker is replaced at once and drained."""
    NODE_FAILED = "node_failed"
    """This node can't start Ray: ``data.reason``. Then it ends."""
    SERVE = "serve"
    """Heads of a service's cluster, on change: ``data`` is a dumped :class:`ServeStatus`. Goes to the service."""
    STOPPING = "stopping"
    """The dead-man switch or maximum uptime ends this machine: ``data.reason``."""


class ServeDeployment(Result):
    status: str
    """Serve's: ``UPDATING HEALTHY UNHEALTHY DEPLOY_FAILED UPSCALING DOWNSCALING``."""
    message: str = ""
    replicas: int = 0
    """RUNNING ones."""


class ServeApplication(Result):
    status: str
    """Serve's: ``NOT_STARTED DEPLOYING RUNNING DEPLOY_FAILED DELETING UNHEALTHY``."""
    message: str = ""
    """Serve's own; where that is empty or general, the deployments' messages."""
    deployments: dict[str, ServeDeployment] = {}


class ServeStatus(Result):
    """Serve's status on a head, for the last deploy."""

    version_id: str = ""
    """Version of the last ``serve_deploy`` that Serve accepted."""
    deploy: str = ""
    """Id of that command: a status with an earlier id is outdated."""
    healthy: bool = False
    """Every application of that deploy is RUNNING and the head's proxy is HEALTHY."""
    failed: bool = False
    """An application is DEPLOY_FAILED: Serve does not retry it."""
    message: str = ""
    """Why it is not healthy: application, deployment and Serve's message."""
    applications: dict[str, ServeApplication] = {}
    http: str = ""
    """``ip:port`` of the head's proxy."""
    grpc: str = ""
    """The same for gRPC; "" when it is off."""


class ServeTraffic(Result):
    """Traffic at the gate in a head's proxies, HTTP and gRPC together. Counters grow from the proxy's start on; a
    smaller counter means that the proxy has restarted."""

    version_id: str = ""
    requests: int = 0
    """Requests whose answer has ended, without probes."""
    errors: int = 0
    """Requests that were answered 5xx or aborted by the application."""
    refused: int = 0
    """Requests that the gate answered 401 or 403; not in ``requests``."""
    probes: int = 0
    buckets: list[int] = []
    """Histogram of the time until the answer began, by ``LATENCY_BOUNDS_MS`` and one more."""
    ongoing: int = 0
    oldest_s: float = 0
    """Age of the oldest request without any byte of an answer, in seconds."""
    connections: int = 0
    """Open TCP connections to the proxy's ports, without those of its own process and the agent."""
    draining: bool = False
    last_request_at: datetime | None = None
    window_s: float = 0
    """Window of the three below: the last 60 s, or since the proxy's start."""
    window_requests: int = 0
    window_errors: int = 0
    window_buckets: list[int] = []
    alive: bool = True
    """False: the proxy did not answer the agent; the other fields are from its last answer."""


class Fact(Result):
    id: str
    """Unique per node; delivered at least once, processed once."""
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
    """Heads: ``ip:port`` of this head's GCS, in every report, also before Ray answers there: workers get it at once and
    their Ray waits for it."""
    activity: Activity = Activity.UNKNOWN
    activity_since: datetime | None = None
    activity_reason: str = ""
    workers_alive: list[str] = []
    """Heads: node ids that Ray says are alive."""
    resources: dict[str, Any] = {}
    """Heads: totals and usage, for display only."""
    serve: ServeTraffic | None = None
    """Heads of a service's cluster."""
    facts: list[Fact] = []
    log_bytes_pending: int = 0


class NodeBrief(Result):
    id: str
    group: str
    state: NodeState
    ip: str | None = None
    leaving: bool = False
    """Its cloud reclaims it, and a replacement is requested."""


class ReportAnswer(Result):
    interval_s: float
    """When to report next, seconds."""
    acked: list[str] = []
    """Ids of stored facts; the agent deletes them."""
    nodes: list[NodeBrief] | None = None
    """Heads: every requested worker that has not ended (the autoscaler's node list)."""
    desired: dict[str, int] | None = None
    """Heads: desired workers by group, within the limits."""
    groups: list[GroupConfig] | None = None
    """Heads: the worker groups with their current limits, for the autoscaling config. The head compares them."""
    follow: bool = False
    """A client follows a log: ship at least every second."""
    maximum_uptime_at: datetime | None = None


class CommandKind(StrEnum):
    SUBMIT_RUN = "submit_run"
    """Heads. args: ``run_id entrypoint working_dir{url,sha256}|{remote} py_modules[…] requirements[] env_vars{}
    timeout_s metadata{}``. Result ``{"accepted": true}`` once Ray has it. A run id that Ray already has is a
    success."""
    STOP_RUN = "stop_run"
    """Heads. args: ``run_id``. Result when the run has ended and no process of its driver is left:
    ``{"status": …, "exit_code": …}``; unknown run: ``{"status": "UNKNOWN"}``; it is never started afterwards."""
    FENCE = "fence"
    """Heads. From now on no new run is accepted; the answer is the current activity:
    ``{"activity": "idle|busy|unknown", "reason": …}``."""
    UNFENCE = "unfence"
    SERVE_DEPLOY = "serve_deploy"
    """Heads of a service's cluster. args: ``version_id``, ``target_capacity`` (percent or null), ``gate`` and
    ``config``, which the API adds at delivery: Serve's multi-application config without host and port, in which
    ``working_dir`` and ``py_modules`` are packages as in SUBMIT_RUN. Replaces everything that is deployed. Result when
    Serve has accepted it: ``{"http": "ip:port", "grpc": "ip:port"|""}``; SERVE facts report the outcome."""
    SERVE_PROBE = "serve_probe"
    """args: ``url`` (the endpoint's), ``cluster_id``, ``version_id``, ``probes`` [{application, path, method, body,
    headers, expected_status, timeout_s}, or {application, grpc: true, timeout_s} for a call of Serve's own gRPC method
    ``ListApplications``], ``give_up_s``. Sends each through the load balancer with the agent's token, and with
    BACKEND_HEADER, which routes it back to this cluster, until each has had the expected answer three times in a row or
    ``give_up_s`` is over. Result: ``{"healthy": bool, "message": str, "applications": {name: {"status": int|null,
    "ms": float, "message": str}}}``; ``status`` is HTTP's or gRPC's. ``application`` is a unique label."""
    SERVE_GATE = "serve_gate"
    """args: ``gate`` {"enabled": bool, "hashes": [sha256 hex]}, ``draining`` (false cancels a drain). Result ``{}``
    when the proxies apply it. The head stores it on its disk."""
    SERVE_DRAIN = "serve_drain"
    """args: ``timeout_s``. The proxies send ``Connection: close`` with each answer from now on. Result when no request
    is ongoing and no connection open for one second, or at the timeout: ``{"drained": bool, "ongoing": int,
    "connections": int, "seconds": float}``. It ends nothing: the end of the cluster does."""


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
    """The agent could not try (Ray is starting, disk full): the caller may send the same command again."""


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
    """Presigned PUT URLs, in the order of the request."""
