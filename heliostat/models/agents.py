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
    service_id: str = ""
    """The service that this cluster serves, if any: then Serve's proxies get our gate."""


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
    SPOT_NOTICE = "spot_notice"
    """The cloud will take this node's machine back: ``data.kind`` (``interruption``|``rebalance``|``maintenance``),
    ``data.deadline`` (ISO 8601, or null: not known), ``data.reason``. A worker is replaced at once and drained."""
    NODE_FAILED = "node_failed"
    """This node can't start Ray: ``data.reason``. Followed by its end."""
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
    """What Serve says on a head, of the deploy that was given last."""

    version_id: str = ""
    """Of the last ``serve_deploy`` that Serve took."""
    deploy: str = ""
    """Id of that command: a status that tells of an earlier one is old."""
    healthy: bool = False
    """Every application of that deploy is RUNNING and the head's proxy is HEALTHY."""
    failed: bool = False
    """Some application is DEPLOY_FAILED: Serve has given it up."""
    message: str = ""
    """Why it is not healthy, for people: application, deployment and Serve's words."""
    applications: dict[str, ServeApplication] = {}
    http: str = ""
    """``ip:port`` of the head's proxy."""
    grpc: str = ""
    """The same for gRPC; "" when it is off."""


class ServeTraffic(Result):
    """In the reports of a service's heads: what the gate in the head's proxies has seen, HTTP and gRPC together.
    Counters grow from the proxy's start on; a smaller one than before means that it has started anew."""

    version_id: str = ""
    requests: int = 0
    """Whose answer has ended; probes (``probes`` below) are not counted here."""
    errors: int = 0
    """Of them: answered 5xx, or broken off by the application."""
    refused: int = 0
    """401 and 403 by the gate; not in ``requests``."""
    probes: int = 0
    buckets: list[int] = []
    """Histogram of the time until the answer began, by ``LATENCY_BOUNDS_MS`` and one more."""
    ongoing: int = 0
    oldest_s: float = 0
    """For how long the oldest request that has had no byte of an answer waits."""
    connections: int = 0
    """Open TCP connections to the proxy's ports; its own process' and the agent's not counted."""
    draining: bool = False
    last_request_at: datetime | None = None
    window_s: float = 0
    """Of the three below: the last 60 s, or as far back as the proxy goes."""
    window_requests: int = 0
    window_errors: int = 0
    window_buckets: list[int] = []
    alive: bool = True
    """False: the proxy did not answer the agent; the rest is of the last time that it did."""


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
    """Its cloud takes it back, and another one is asked for in its place."""


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
    SERVE_DEPLOY = "serve_deploy"
    """Heads of a service's cluster. Given as ``version_id``, ``target_capacity`` (percent or null) and ``gate``;
    the API
    fills in ``config`` when it hands it over: Serve's multi-application config without host and port, in which
    ``working_dir`` and ``py_modules`` are packages as in SUBMIT_RUN. Replaces all that is deployed. Result, once Serve
    has taken it: ``{"http": "ip:port", "grpc": "ip:port"|""}``; what becomes of it is told by SERVE facts."""
    SERVE_PROBE = "serve_probe"
    """args: ``url`` (the endpoint's), ``cluster_id``, ``version_id``, ``probes`` [{application, path, method, body,
    headers, expected_status, timeout_s}, or {application, grpc: true, timeout_s} for a call of Serve's own gRPC method
    ``ListApplications``], ``give_up_s``. Sends each through the load balancer, which is told by
    BACKEND_HEADER to come back to this cluster, with a token of the agent's own, again and again until each was
    answered
    as expected three times in a row or ``give_up_s`` passed. Result: ``{"healthy": bool, "message": str,
    "applications": {name:
    {"status": int|null, "ms": float, "message": str}}}``; ``status`` is HTTP's or gRPC's. ``application`` is a label,
    of which each has its own."""
    SERVE_GATE = "serve_gate"
    """args: ``gate`` {"enabled": bool, "hashes": [sha256 hex]}, ``draining`` (false takes a drain back). Result ``{}``
    once the proxies go by it. The head keeps it on its disk."""
    SERVE_DRAIN = "serve_drain"
    """args: ``timeout_s``. The proxies say ``Connection: close`` with each answer from now on. Result when no
    request is
    ongoing and no connection open for one second, or at the timeout: ``{"drained": bool, "ongoing": int,
    "connections": int,
    "seconds": float}``. Nothing is ended here: the cluster's end does."""


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
