"""Every time and size that the agent works by, with its reason. ``heliostat-boot.json`` may override any of
them in an object ``constants`` (the tests shorten times so)."""

from __future__ import annotations

from dataclasses import dataclass

PROTOCOL = 1


@dataclass(frozen=True)
class Constants:
    register_timeout_s: float = 1800.0
    """A machine that nobody answers for so long stops itself: it can't be of use and costs money."""
    backoff_base_s: float = 0.2
    backoff_cap_s: float = 15.0
    """Between calls while the API is away; jittered, so that a thousand nodes do not come back at once."""
    batch_s: float = 0.02
    """A fact waits so long for others before its report goes out."""
    facts_max: int = 2000
    """Facts kept while the API is away; beyond it the oldest of the kind that is superseded goes first."""

    head_ready_timeout_s: float = 240.0
    """Ray on this node must be up by then, else NODE_FAILED. Below the control plane's own 300 s, whose
    reason would be only "never became ready"."""
    ready_poll_s: float = 0.05
    """A refused connection costs 0.1 ms; an answer tells the cluster that it may go on."""
    members_fast_s: float = 0.2
    """Between looks at Ray's node list while a registered worker is not alive yet (4 ms of the dashboard each)."""
    members_slow_s: float = 1.0
    ray_stop_s: float = 8.0
    """Ray gets so long to end by itself after SIGTERM (2-6 s measured), then SIGKILL."""
    drain_s: int = 2
    """RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S; a head with Serve actors would use up the whole default of 30 s."""
    local_object_store_bytes: int = 100_000_000
    """Nodes of the local cloud share one machine's /dev/shm."""
    idle_drain_grace_s: float = 30.0
    """A worker that Ray's autoscaler drained waits so long for its end by the control plane, then ends itself."""

    run_poll_young_s: float = 0.1
    """Between looks at a run that is younger than ``run_young_s``: short programs end soon after they start."""
    run_young_s: float = 15.0
    run_poll_s: float = 0.5
    """And later. One look costs Ray's dashboard about 4 ms."""
    run_poll_old_s: float = 1.0
    """After ``run_old_s``."""
    run_old_s: float = 300.0
    driver_scan_s: float = 5.0
    driver_lost_scans: int = 3
    """So many scans in a row without any process of a run that Ray calls RUNNING: its driver is lost."""
    stop_kill_s: float = 15.0
    """After a stop that Ray has accepted (it sends SIGKILL after 3 s itself) the agent kills what is left."""
    run_log_flush_s: float = 10.0
    """RUN_ENDED waits at most so long for the run's log to be in the bucket."""
    message_max_chars: int = 4000

    activity_s: float = 2.0
    """Between looks at Ray for activity. Idleness is counted in minutes, so 2 s is exact enough; it costs the
    dashboard about 8 ms (two requests), 0.4 % of a core, and nothing at all while a run of ours is under way."""
    idle_observations: int = 2
    """So many in a row make idle; one makes busy."""

    idle_timeout_minutes: float = 1.0
    """Ray's autoscaler ends a worker that has been idle for so long (its ``idle_timeout_minutes``)."""
    upscaling_speed: float = 100.0
    """Ray launches at most ``speed x running`` nodes of a type a round: without it one a second."""
    autoscaler_interval_s: int = 1
    desired_hold_s: float = 10.0
    """After a DESIRED fact is acknowledged, the control plane's count replaces ours only when it has caught up,
    or after so long: the acknowledgement only says that the fact is safe."""
    spare_s: float = 10.0
    """For so long after the end of a node that its cloud took back Ray's maximum stays raised by it; more than two
    rounds of the autoscaler. It costs nothing: the real maximum is kept where Ray's wishes arrive."""
    launch_request_ttl_s: float = 660.0
    """Ray gives a launch request up after 600 s."""
    validate_timeout_s: float = 60.0

    serve_put_s: float = 120.0
    """Serve must have taken a config by then, tries included: the first one starts its controller and proxy (1.4-2.8 s
    on an idle machine). Then the command is told as retryable."""
    serve_look_fast_s: float = 0.5
    """Between looks at Serve while what was deployed is not healthy yet."""
    serve_look_slow_s: float = 1.5
    """And while it is. One look costs the dashboard and Serve's controller about 10 ms."""
    serve_away_s: float = 5.0
    """Serve's status is told as unknown when it could not be asked for so long."""
    serve_traffic_s: float = 1.0
    """Between questions to the proxy for its counters, and how long it may take to answer one."""
    serve_gate_s: float = 15.0
    """The proxy must go by a new gate file by then; it looks at its file every fraction of a second."""
    serve_probe_pause_s: float = 0.2
    serve_probes_good: int = 3
    """So many in a row are enough."""
    serve_quiet_s: float = 1.0
    """Drained is a proxy without request and connection for so long: a client may be between two of them."""

    notice_poll_s: float = 2.0
    """Between two looks at what the cloud announces for this machine. AWS gives two minutes and advises 5 s; Google
    gives half a minute, and holds each question until there is news."""
    leave_before_s: float = 10.0
    """So long before its cloud takes it, a worker ends Ray in order (2-6 s) and goes. Of a machine that loses its power
    no connection is closed: whoever waits for its answer waits until the keep-alive gives up (``ray_node``)."""
    metadata_url: str = ""
    """Of the machine's metadata service; "": the link-local address that AWS and Google have."""
    drain_command_s: float = 30.0
    """`ray drain-node` takes 2 s on an idle machine."""

    log_interval_s: float = 5.0
    log_follow_s: float = 1.0
    log_chunk_bytes: int = 2**20
    worker_streams_max: int = 100
    """Files of Ray workers that are shipped per node; each is one object at least."""
    stream_max_bytes: int = 2**30
    """Of a stream that is not a run's."""
    final_flush_s: float = 5.0

    package_max_bytes: int = 8 * 2**30
    package_timeout_s: float = 60.0
    """Of one read of a package's download, not of the whole."""


def constants(overrides: dict[str, object]) -> Constants:
    """Raises TypeError for a name that does not exist."""
    return Constants(**overrides)  # type: ignore[arg-type]


LATENCY_BOUNDS_MS = (
    1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700,
    1000, 1500, 2000, 3000, 5000, 7000, 10000, 20000, 30000, 60000,
)  # fmt: skip
"""Upper bounds of the buckets of a head's latency histogram; as in ``agent.gate.stats``, which may import nothing
of the agent's, and in ``heliostat.models.services.resource`` (a test compares)."""
