"""Every timeout and retry policy of the workflows, with the reason for its number."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from temporalio.common import RetryPolicy

from runtime.messages.common import Limits

RECORD: dict[str, Any] = {
    # A row or two in our own database: 10 s covers a busy SQLite writer. Local, so that it costs one marker.
    "start_to_close_timeout": timedelta(seconds=10),
    # A local activity is tried again for ever whatever its schedule_to_close says (temporalio 1.35), and each 8 s of
    # that cost three events: so few tries here, and the workflow's own timer (``rewrite_after``) for a real outage.
    # Its failure comes as ActivityError or, after a workflow task that was given twice, as the bare ApplicationError
    # in it: catch FailureError, the base of both.
    "schedule_to_close_timeout": timedelta(minutes=1),
    "retry_policy": RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=3),
}

LAUNCH: dict[str, Any] = {
    # One API call. EC2's RunInstances takes up to tens of seconds when busy; the token makes a repeat safe. A worker
    # that is killed in the middle costs this long.
    "start_to_close_timeout": timedelta(minutes=1),
    # Throttling and passing errors are met with back-off; what outlives this is the cluster's to decide.
    "schedule_to_close_timeout": timedelta(minutes=15),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=60)),
}

DESCRIBE: dict[str, Any] = {
    "start_to_close_timeout": timedelta(seconds=30),
    "schedule_to_close_timeout": timedelta(minutes=5),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30)),
}

END_MACHINES: dict[str, Any] = {
    # Terminate and wait until the cloud says gone; EC2 needs a minute or two for large instances.
    "start_to_close_timeout": timedelta(minutes=5),
    # We never give up on ending a machine: a year is Temporal's way to say so with a bound.
    "schedule_to_close_timeout": timedelta(days=365),
    "heartbeat_timeout": timedelta(seconds=30),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=5)),
}

HAND_OVER: dict[str, Any] = {
    # A few calls. It is too early for as long as the machine does not run (EC2: half a minute) or the one before still
    # holds the disk; a head without its disk is given up by its own deadline, or after this.
    "start_to_close_timeout": timedelta(minutes=1),
    "schedule_to_close_timeout": timedelta(minutes=15),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=5)),
}

RELEASE_KEPT: dict[str, Any] = {
    # Never given up, as machines are not: see END_MACHINES. Google's operations on disks take seconds.
    "start_to_close_timeout": timedelta(minutes=5),
    "schedule_to_close_timeout": timedelta(days=365),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=5)),
}

LEASE: dict[str, Any] = {
    # An update that is answered at once; 30 s covers a worker that must first replay the cluster's history.
    "start_to_close_timeout": timedelta(seconds=30),
    "schedule_to_close_timeout": timedelta(minutes=30),
    "retry_policy": RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(seconds=30)),
}

MESSAGE: dict[str, Any] = LEASE

RELEASE: dict[str, Any] = {
    # A signal. Local; see RECORD for the number of tries.
    "start_to_close_timeout": timedelta(seconds=10),
    "schedule_to_close_timeout": timedelta(minutes=1),
    "retry_policy": RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=3),
}

SUBMIT_TIMEOUT = timedelta(minutes=15)
"""From giving a run to the head until Ray has it: a package of 2 GiB is fetched in it."""

STOP_TIMEOUT = timedelta(seconds=90)
"""Ray gives a stopped driver a few seconds, then kills it; the agent kills what is left. After that the
head is as good as lost."""

FENCE_TIMEOUT = timedelta(seconds=60)
"""A head that does not answer to the fence is not known to be idle: unknown counts as busy."""

COMMAND: dict[str, Any] = {
    # One attempt only says where the answer is to go (store.commands.put_command); the agent works on through many.
    # A worker that dies between taking the task and writing the command down costs this long, not the whole limit.
    "start_to_close_timeout": timedelta(seconds=20),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=5)),
}

TIMEOUT_BACKSTOP = timedelta(seconds=120)
"""The agent enforces ``timeout_s``; we step in when it has said nothing for this long after that."""

LEASE_RECHECK = timedelta(minutes=15)
"""A job that waits asks its cluster again so often, in case the workflow was terminated by hand."""

HEAD_SILENCE = timedelta(seconds=120)
"""A machine that runs, but whose agent has been silent for so long while we could hear, is taken for lost."""

BACKOFF_MAX = timedelta(minutes=5)
"""Between two tries for one slot, at most."""

RECOVERIES_MAX = 3
RECOVERIES_WITHIN = timedelta(minutes=30)
"""A cluster that loses its head more often than this is not brought back: something kills it."""


YOUNG = timedelta(seconds=60)
"""A node that dies sooner than this after it was up is replaced with back-off: something on it may kill it."""


def longer_boot_s(limits: Limits) -> float:
    """What machines that make what they run in at boot add to every limit in which one must have come up."""
    if limits.register_timeout_s is None:
        return 0
    return max(limits.register_timeout_s - min(limits.head_start_timeout_s, limits.worker_start_timeout_s), 0)


def rewrite_after(failures: int) -> timedelta:
    """When the records were out of reach so many times in a row: write again after 1, 2, 4 … 60 s."""
    return timedelta(seconds=min(2 ** (failures - 1), 60))


def backoff(failures: int) -> timedelta:
    """Before try number ``failures`` + 1: 0, 2, 4, 8 … s. A bad image must not be launched every second for ever."""
    if failures <= 0:
        return timedelta(0)
    return min(timedelta(seconds=2 ** min(failures, 9)), BACKOFF_MAX)


UNRECOVERABLE = ("bad_config", "denied")
"""Error codes after which another machine, or another cluster, of the same config would fail the same way."""

NO_SECOND_CLUSTER = (*UNRECOVERABLE, "terminated")
"""Ends of a job's own cluster after which the job makes no other: it would fail the same way, or a person ended it."""


COOL_DOWN_MAX = timedelta(minutes=10)


def cool_down(times: int) -> timedelta:
    """For so long a place that had no machine ``times`` times in a row is asked after the others: 1, 2, 4, 8, 10 min.
    AWS says of a lack of capacity that it may pass within minutes; spot capacity comes and goes so."""
    return min(timedelta(minutes=2 ** min(times - 1, 9)), COOL_DOWN_MAX)


ENDPOINT: dict[str, Any] = {
    # The local load balancer is a process that is up within a second or two; ALB's calls take seconds. What outlives
    # ten minutes is shown and tried again by the workflow.
    "start_to_close_timeout": timedelta(seconds=60),
    "schedule_to_close_timeout": timedelta(minutes=10),
    "retry_policy": RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(seconds=15)),
}

REMOVE_ENDPOINT: dict[str, Any] = {
    # Never given up, as machines are not: see END_MACHINES.
    "start_to_close_timeout": timedelta(minutes=2),
    "schedule_to_close_timeout": timedelta(days=365),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=5)),
}

TERMINATE_UNTOLD = timedelta(seconds=60)
"""A service that ends waits so long for a load balancer that can't be told; its endpoint's end takes the rest away."""

DEPLOY_TIMEOUT = SUBMIT_TIMEOUT
"""From giving a config to the head until Serve has taken it: packages are fetched in it, as for a run."""

PROBE_TIMEOUT = timedelta(seconds=60)
"""One probe command tries for so long; the next one follows until the version's own deadline."""

GRPC_PROBE_S = 10.0
"""For one call of Serve's own gRPC method, which asks no replica."""

PROBE_ANSWER = timedelta(seconds=30)
"""Beyond that, for the answer to come."""

GATE_TIMEOUT = timedelta(seconds=60)
"""Proxies look at their gate's file ten times a second; the rest is for a head that is busy or being replaced."""

DRAIN_ANSWER = timedelta(seconds=60)
"""Beyond a drain's own deadline, for the answer to come. Then the cluster is released all the same."""

WATCH_BEYOND = timedelta(minutes=5)
"""A watch ends with its step's hold; a worker that dies costs it one heartbeat timeout, unanswered requests may prolong
it."""

PAUSED_WATCH = timedelta(days=1)
"""A rollout that waits for a person is watched all the while; one activity for so long, then the next one."""

PAUSED_WINDOW_S = 300.0
"""What it is judged by then: its answers of the last minutes at most, so that hours of good ones hide nothing."""

WATCH: dict[str, Any] = {
    "heartbeat_timeout": timedelta(seconds=10),
    "retry_policy": RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(seconds=5)),
}

TRAFFIC: dict[str, Any] = {
    # One query of our own records.
    "start_to_close_timeout": timedelta(seconds=10),
    "schedule_to_close_timeout": timedelta(minutes=5),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=10)),
}

GIVE_PERCENT = 10
"""Of their capacity, at once, what the old clusters give where nothing extra may exist: their load grows by so much."""

STEP_AGAIN = timedelta(seconds=5)
STEP_AGAIN_MAX = timedelta(seconds=60)
"""A step of a service that failed is tried again after 5, 10, 20 … 60 s."""


def step_retry_after(failures: int) -> timedelta:
    """After a step that had failed ``failures`` times in a row before."""
    return min(STEP_AGAIN * (1 << min(failures, 9)), STEP_AGAIN_MAX)


FAILED_AGAIN = timedelta(seconds=60)
"""A running version that Serve has given up on one cluster is given to it again so much later."""

TERMINATE_DRAIN = timedelta(seconds=30)
"""A service that is terminated drains for so long at most: whoever ends it does not wait for an open websocket."""

ASK_CLOUD: dict[str, Any] = {
    # Who asked waits a minute (api.clouds.routes.ASK_S). To verify is some forty calls, side by side where
    # they may be; a
    # failed check is an answer, so a second try is for a worker that died.
    "start_to_close_timeout": timedelta(seconds=45),
    "schedule_to_close_timeout": timedelta(seconds=50),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_attempts=2),
}
