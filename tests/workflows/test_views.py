"""What the Temporal UI shows: Markdown that fits its panel, whatever the reasons hold."""

from __future__ import annotations

from datetime import UTC, datetime

from heliostat.models.clusters import NodeRole, NodeState
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import Job, JobConfig, JobState, Run, RunCause, RunState
from heliostat.models.services import ServiceVersionState
from runtime.messages.clusters import ClusterInput
from runtime.messages.services import ServiceInput, VersionSpec
from workflows.clusters.state import ClusterData, NodeEntry
from workflows.clusters.view import cluster_details
from workflows.jobs.view import job_details
from workflows.services.state import ServiceData, Slot, VersionData
from workflows.services.view import service_details

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_a_job_shows_its_runs_and_why_they_ended() -> None:
    runs = [
        Run(
            id="job_1-1", number=1, state=RunState.FAILED, cause=RunCause.APPLICATION, reason="a | b\nc", exit_code=3,
            cluster_id="cl_1", started_at=AT, ended_at=AT,
        ),
        Run(id="job_1-2", number=2, state=RunState.RUNNING, cluster_id="cl_1", started_at=AT),
    ]  # fmt: skip
    text = job_details(
        Job(
            id="job_1",
            name="j",
            project="p",
            state=JobState.RUNNING,
            waits_for="nothing",
            cluster_id="cl_1",
            config=JobConfig(entrypoint="python a.py"),
            runs=runs,
            created_by="ada",
            created_at=AT,
            state_since=AT,
        )
    )
    assert "- cluster `cl_1`" in text
    assert text.splitlines()[-2:] == [
        "- run 1 **FAILED**, exit code 3, from 03:04:05 to 03:04:05: application: a | b c",
        "- run 2 **RUNNING**, from 03:04:05",
    ]


def test_a_cluster_shows_its_nodes_and_what_became_of_them() -> None:
    request = ClusterInput(
        cluster_id="cl_1", name="c", project_id="p", project="p", cloud_id="c", cloud="local", config=ComputeConfig(),
        created_by="ada", created_at=AT,
    )  # fmt: skip
    data = ClusterData(state_since=AT, started_at=AT, waits_for="the cloud")
    common = {"role": NodeRole.WORKER, "group": "w", "token": "t", "created_at": AT}
    data.nodes = {
        "a": NodeEntry(
            id="a", slot=1, generation=2, state=NodeState.TERMINATING, reason="its\nraylet | died", **common
        ),
        "b": NodeEntry(id="b", slot=2, generation=1, state=NodeState.RUNNING, ip="127.0.1.1", machine_id="m", **common),
    }
    text = cluster_details(request, data)
    assert "**Waiting on** the cloud" in text
    assert text.splitlines()[-2:] == [
        "- w 1.2 **TERMINATING**: its raylet | died",
        "- w 2.1 **RUNNING**, 127.0.1.1, machine `m`",
    ]


def test_a_service_shows_each_version_with_its_checklist() -> None:
    request = ServiceInput(
        service_id="svc_1", name="s", project_id="p", project="p", cloud_id="c", cloud="local", created_by="ada",
        created_at=AT,
    )  # fmt: skip
    specs = [
        VersionSpec(id=f"sv_{n}", name=f"v{n}", number=n, compute_config=ComputeConfig(), created_by="a", created_at=AT)
        for n in (1, 2)
    ]
    old = VersionData(spec=specs[0], state=ServiceVersionState.TERMINATED, state_since=AT, ended_at=AT)
    old.reason = "a traceback:\n  line 1"
    new = VersionData(spec=specs[1], state=ServiceVersionState.RUNNING, state_since=AT, reason="serves")
    new.slots = [Slot(number=1, cluster_id="cl_1")]
    new.condition("Cluster", True, AT, "Up", "up")
    new.condition("Weight", False, AT, "Share", "0 % of\nthe traffic")
    data = ServiceData(state_since=AT, versions={"sv_1": old, "sv_2": new}, weights={"sv_2": 100})
    assert service_details(request, data).splitlines()[5:] == [
        "",
        "#### v2 RUNNING, 100 % of the traffic",
        "",
        "serves",
        "",
        "- cluster `cl_1` STARTING",
        "- ✓ Cluster since 03:04:05: up",
        "- … Weight since 03:04:05: 0 % of the traffic",
        "",
        "#### Ended",
        "",
        "- v1 **TERMINATED** at 03:04:05: a traceback: line 1",
    ]
