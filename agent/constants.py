"""The agent's times and sizes, with their reasons. An object ``constants`` in ``heliostat-boot.json`` overrides them
(the tests shorten times with it)."""

from __future__ import annotations

from dataclasses import dataclass

PROTOCOL = 1


@dataclass(frozen=True)
class Constants:
    register_timeout_s: float = 1800.0
    """A machine without any answer for this long stops itself: it is of no use and costs money."""
    backoff_base_s: float = 0.2
    backoff_cap_s: float = 15.0
    """Between calls while the API is unavailable; with jitter, so that a thousand nodes do not come back at once."""
    batch_s: float = 0.02
    """An event waits this long for others before its report goes out."""
    events_max: int = 2000
    """Pending events while the API is unavailable; beyond it the oldest superseded one is dropped first."""

    head_ready_timeout_s: float = 240.0
    """Ray on this node must be up by then, else the node fails. Below the control plane's own 300 s, whose reason would
    only be "never became ready"."""
    ready_poll_s: float = 0.05
    """A refused connection costs 0.1 ms, and the cluster waits for the first answer."""
    members_fast_s: float = 0.2
    """Between polls of Ray's node list while a registered worker is not alive yet (4 ms of the dashboard each)."""
    members_slow_s: float = 1.0
    ray_stop_s: float = 8.0
    """Ray has this long to end after SIGTERM (2-6 s measured), then SIGKILL."""
    drain_s: int = 2
    """RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S; a head with Serve actors would use up the whole default of 30 s."""
    local_object_store_bytes: int = 100_000_000
    """Nodes of the local cloud share one machine's /dev/shm."""
    idle_drain_grace_s: float = 30.0
    """A worker that Ray's autoscaler has drained waits this long for the control plane to end it, then ends itself."""

    run_poll_young_s: float = 0.1
    """Between polls of a run younger than ``run_young_s``: short programs end soon after they start."""
    run_young_s: float = 15.0
    run_poll_s: float = 0.5
    """And later. One poll costs Ray's dashboard about 4 ms."""
    run_poll_old_s: float = 1.0
    """After ``run_old_s``."""
    run_old_s: float = 300.0
    driver_scan_s: float = 5.0
    driver_lost_scans: int = 3
    """A run that Ray calls RUNNING has lost its driver after this many scans in a row without a process of it."""
    stop_kill_s: float = 15.0
    """After an accepted stop (Ray itself sends SIGKILL after 3 s) the agent kills the remaining processes."""
    run_log_flush_s: float = 10.0
    """``run_ended`` waits at most this long for the run's log to be in the bucket."""
    message_max_chars: int = 4000

    activity_s: float = 2.0
    """Between polls of Ray's activity. Idle timeouts are minutes, so 2 s is exact enough. A poll costs the dashboard
    about 8 ms (two requests), 0.4 % of a core, and there is none while a run is under way."""
    idle_observations: int = 2
    """This many in a row make idle; one makes busy."""

    idle_timeout_minutes: float = 1.0
    """Ray's autoscaler ends a worker after this idle time (its ``idle_timeout_minutes``)."""
    upscaling_speed: float = 100.0
    """Ray launches at most ``speed x running`` nodes of a type a round: without it one a second."""
    autoscaler_interval_s: int = 1
    desired_hold_s: float = 10.0
    """After the acknowledgement of a ``desired`` event the control plane's count replaces the agent's once both are
    equal, or after this time: the acknowledgement only means that the event is safe."""
    headroom_s: float = 10.0
    """Ray's maximum stays raised this long after the end of an interrupted node: more than two rounds of the
    autoscaler. It costs nothing: the agent enforces the real maximum on Ray's requests."""
    launch_request_ttl_s: float = 660.0
    """Ray gives up a launch request after 600 s."""
    validate_timeout_s: float = 60.0

    serve_put_s: float = 120.0
    """Serve must have accepted a config by then, retries included, else the command is retryable. The first one starts
    Serve's controller and proxy (1.4-2.8 s on an idle machine)."""
    serve_poll_fast_s: float = 0.5
    """Between polls of Serve while the deploy is not healthy yet."""
    serve_poll_slow_s: float = 1.5
    """And while it is. One poll costs the dashboard and Serve's controller about 10 ms."""
    serve_away_s: float = 5.0
    """Without an answer for this long, the reported status says that Ray's dashboard does not answer."""
    serve_traffic_s: float = 1.0
    """Between polls of the proxy's counters, and the time limit of one."""
    serve_gate_s: float = 15.0
    """The proxy must follow a new gate file by then; it checks its file ten times a second."""
    serve_probe_pause_s: float = 0.2
    serve_probes_good: int = 3
    """This many in a row are enough."""
    serve_quiet_s: float = 1.0
    """A proxy is drained after this long without a request or connection: a client may be between two of them."""

    notice_poll_s: float = 2.0
    """Between polls of the cloud's notices for this machine. AWS gives two minutes and recommends 5 s; Google gives
    half a minute, and holds each request until there is a change."""
    leave_before_s: float = 10.0
    """A worker ends Ray in order (2-6 s) this long before its cloud takes the machine. A machine that loses its power
    closes no connection: its peers wait until the keep-alive gives up (``ray_node.process``)."""
    metadata_url: str = ""
    """Of the machine's metadata service; "": the link-local address of AWS and Google."""
    drain_command_s: float = 30.0
    """`ray drain-node` takes 2 s on an idle machine."""

    log_interval_s: float = 5.0
    log_follow_s: float = 1.0
    log_chunk_bytes: int = 2**20
    worker_streams_max: int = 100
    """Files of Ray workers shipped per node; each is at least one object."""
    stream_max_bytes: int = 2**30
    """Of a stream other than a run's."""
    final_flush_s: float = 5.0

    package_max_bytes: int = 8 * 2**30
    package_timeout_s: float = 60.0
    """Of one read of a download, not of the whole download."""


def constants(overrides: dict[str, object]) -> Constants:
    """Raises TypeError for a name that does not exist."""
    return Constants(**overrides)  # type: ignore[arg-type]


LATENCY_BOUNDS_MS = (
    1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700,
    1000, 1500, 2000, 3000, 5000, 7000, 10000, 20000, 30000, 60000,
)  # fmt: skip
"""Upper bounds of the buckets of a head's latency histogram; as in ``agent.gate.stats``, which may import nothing
of the agent's, and in ``heliostat.models.services.resource`` (a test compares)."""
