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
    # Throttling and passing errors are retried with back-off; after this the cluster decides what comes next.
    "schedule_to_close_timeout": timedelta(minutes=15),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=60)),
}

DESCRIBE: dict[str, Any] = {
    "start_to_close_timeout": timedelta(seconds=30),
    "schedule_to_close_timeout": timedelta(minutes=5),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30)),
}

END_MACHINES: dict[str, Any] = {
    # Terminate, and wait until the cloud says that they have ended; EC2 needs a minute or two for large instances.
    "start_to_close_timeout": timedelta(minutes=5),
    # Retried for ever: Temporal needs a limit, and a year is one.
    "schedule_to_close_timeout": timedelta(days=365),
    "heartbeat_timeout": timedelta(seconds=30),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=5)),
}

HAND_OVER: dict[str, Any] = {
    # A few calls. They fail for as long as the machine does not run (EC2: half a minute) or the one before still holds
    # the disk. A head without its disk fails at its own deadline, or after this.
    "start_to_close_timeout": timedelta(minutes=1),
    "schedule_to_close_timeout": timedelta(minutes=15),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=5)),
}

RELEASE_KEPT: dict[str, Any] = {
    # Retried for ever, see END_MACHINES. Google's operations on disks take seconds.
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
"""From the submission of a run to the head until Ray has it: includes the download of a package of 2 GiB."""

STOP_TIMEOUT = timedelta(seconds=90)
"""Ray gives a stopped driver a few seconds, then kills it; the agent kills what is left. A head that has not answered
by then counts as lost."""

FENCE_TIMEOUT = timedelta(seconds=60)
"""A head that does not answer the fence may not be idle: unknown counts as busy."""

COMMAND: dict[str, Any] = {
    # One attempt only stores where the answer goes (store.commands.put_command); the agent's work outlives attempts.
    # A worker that dies before it has stored the command costs this long, not the whole limit.
    "start_to_close_timeout": timedelta(seconds=20),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=5)),
}

TIMEOUT_BACKSTOP = timedelta(seconds=120)
"""The agent enforces ``timeout_s``. The workflow does it when the agent is silent for this long after that."""

LEASE_RECHECK = timedelta(minutes=15)
"""How often a job that waits asks its cluster again, in case somebody terminated the cluster's workflow."""

HEAD_SILENCE = timedelta(seconds=120)
"""A head counts as lost when its agent is silent for this long, though its machine runs and the API is up."""

BACKOFF_MAX = timedelta(minutes=5)
"""The longest wait between two launches for one slot."""

RECOVERIES_MAX = 3
RECOVERIES_WITHIN = timedelta(minutes=30)
"""A cluster that loses its head more often than this fails: something kills it."""


YOUNG = timedelta(seconds=60)
"""A node that dies sooner than this after it started is replaced with back-off: something on it may kill it."""


def longer_boot_s(limits: Limits) -> float:
    """For machines that build their environment at boot: what that adds to every limit for a start."""
    if limits.register_timeout_s is None:
        return 0
    return max(limits.register_timeout_s - min(limits.head_start_timeout_s, limits.worker_start_timeout_s), 0)


def rewrite_after(failures: int) -> timedelta:
    """After that number of failed writes in a row: write again after 1, 2, 4 … 60 s."""
    return timedelta(seconds=min(2 ** (failures - 1), 60))


def backoff(failures: int) -> timedelta:
    """Before attempt number ``failures`` + 1: 0, 2, 4, 8 … s. A bad image must not be launched every second."""
    if failures <= 0:
        return timedelta(0)
    return min(timedelta(seconds=2 ** min(failures, 9)), BACKOFF_MAX)


UNRECOVERABLE = ("bad_config", "denied")
"""Error codes after which another machine, or another cluster, of the same config would fail the same way."""

NO_SECOND_CLUSTER = (*UNRECOVERABLE, "terminated")
"""Ends of a job's own cluster after which the job makes no other: it would fail the same way, or a person ended it."""


COOL_DOWN_MAX = timedelta(minutes=10)


def cool_down(times: int) -> timedelta:
    """For how long a placement that had no machine ``times`` times in a row comes after the others: 1, 2, 4, 8, 10 min.
    AWS says that a lack of capacity may pass within minutes; spot capacity comes and goes in that time."""
    return min(timedelta(minutes=2 ** min(times - 1, 9)), COOL_DOWN_MAX)


ENDPOINT: dict[str, Any] = {
    # The local load balancer is a process that starts within a second or two; ALB's calls take seconds. A failure that
    # lasts ten minutes is shown, and the workflow tries again.
    "start_to_close_timeout": timedelta(seconds=60),
    "schedule_to_close_timeout": timedelta(minutes=10),
    "retry_policy": RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_interval=timedelta(seconds=15)),
}

REMOVE_ENDPOINT: dict[str, Any] = {
    # Retried for ever, see END_MACHINES.
    "start_to_close_timeout": timedelta(minutes=2),
    "schedule_to_close_timeout": timedelta(days=365),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=5)),
}

TERMINATE_UNTOLD = timedelta(seconds=60)
"""How long a service that ends waits for a load balancer that does not answer; the endpoint's end removes the rest."""

DEPLOY_TIMEOUT = SUBMIT_TIMEOUT
"""From the submission of a config to the head until Serve has it: includes the download of packages."""

PROBE_TIMEOUT = timedelta(seconds=60)
"""How long one probe command tries. The next one follows, until the version's own deadline."""

GRPC_PROBE_S = 10.0
"""For one call of Serve's own gRPC method, which asks no replica."""

PROBE_ANSWER = timedelta(seconds=30)
"""Added to that for the answer."""

GATE_TIMEOUT = timedelta(seconds=60)
"""Proxies read their gate's file ten times a second; the rest is for a head that is busy or being replaced."""

DRAIN_ANSWER = timedelta(seconds=60)
"""Added to a drain's own deadline for the answer. Then the cluster is released in any case."""

WATCH_BEYOND = timedelta(minutes=5)
"""Added to a step's hold for the watch of its canary: a worker that dies costs one heartbeat timeout, and requests
without an answer prolong it."""

PAUSED_WATCH = timedelta(days=1)
"""The canary of a paused rollout is watched all the time; one activity lasts so long, then the next one starts."""

PAUSED_WINDOW_S = 300.0
"""Then only the answers of the last minutes count, so that hours of good ones hide nothing."""

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
"""Without surge capacity, the old clusters give up so much of theirs at once: their load grows by that."""

STEP_AGAIN = timedelta(seconds=5)
STEP_AGAIN_MAX = timedelta(seconds=60)
"""A step of a service that failed is started again after 5, 10, 20 … 60 s."""


def step_retry_after(failures: int) -> timedelta:
    """After a step that had failed ``failures`` times in a row before."""
    return min(STEP_AGAIN * (1 << min(failures, 9)), STEP_AGAIN_MAX)


FAILED_AGAIN = timedelta(seconds=60)
"""When Serve gives up a running version on one cluster, the version is submitted again so much later."""

TERMINATE_DRAIN = timedelta(seconds=30)
"""How long a service that is terminated drains at most: its end does not wait for an open websocket."""

ASK_CLOUD: dict[str, Any] = {
    # The caller waits a minute (api.clouds.routes.ASK_S). A verification is some forty calls, in parallel where that is
    # possible. A failed check is an answer: the second attempt is for a worker that died.
    "start_to_close_timeout": timedelta(seconds=45),
    "schedule_to_close_timeout": timedelta(seconds=50),
    "retry_policy": RetryPolicy(initial_interval=timedelta(seconds=1), maximum_attempts=2),
}
