from __future__ import annotations

from typing import Any

import pytest

from agent.constants import Constants
from agent.events import Events
from agent.head.activity import Activity
from tests.agent.scripted_ray import Ray, told

SERVE = {"class_name": "ServeController", "ray_namespace": "serve", "name": "SERVE_CONTROLLER_ACTOR"}
JOB = {
    "class_name": "JobSupervisor",
    "ray_namespace": "SUPERVISOR_ACTOR_RAY_NAMESPACE",
    "name": "_ray_internal_job_actor_x",
}
STATS = {"class_name": "_StatsActor", "ray_namespace": "_dataset_stats_actor", "name": "datasets_stats_actor"}


def test_idle_needs_two_polls_busy_one_and_only_changes_are_told(events: Events) -> None:
    ray, own = Ray(), [""]
    activity = Activity(ray, events, Constants(), lambda: own[0])
    assert activity.state == "unknown"
    activity.refresh()
    assert activity.state == "unknown"
    activity.refresh()
    activity.refresh()
    assert [f["activity"] for f in told(events, "activity")] == ["idle"]
    own[0] = "run r"
    activity.refresh()
    activity.refresh()
    own[0] = ""
    activity.refresh()  # one idle look between two busy ones is no change
    own[0] = "run s"
    activity.refresh()
    assert [f["activity"] for f in told(events, "activity")] == ["idle", "busy"]


@pytest.mark.parametrize(
    ("ray", "state", "word"),
    [
        ({"driver": "Number of active drivers: 1"}, "busy", "drivers"),
        ({"alive": [JOB]}, "busy", "Ray job x"),
        ({"alive": [SERVE], "applications": ["chat"]}, "busy", "chat"),
        ({"alive": [SERVE]}, "idle", ""),
        ({"alive": [STATS]}, "idle", ""),
        ({"away": True}, "unknown", "does not answer"),
    ],
)
def test_what_counts_as_work(events: Events, ray: dict[str, Any], state: str, word: str) -> None:
    asked = Ray()
    for name, value in ray.items():
        setattr(asked, name, value)
    found, reason = Activity(asked, events, Constants(), lambda: "").refresh()
    assert found == state
    assert word in reason


def test_a_question_without_answer_does_not_wake_an_idle_cluster_two_do(events: Events) -> None:
    ray = Ray()
    activity = Activity(ray, events, Constants(), lambda: "")
    activity.refresh()
    activity.refresh()
    ray.away = True
    activity.refresh()
    assert activity.state == "idle"
    activity.refresh()
    assert activity.state == "unknown"
    ray.away = False
    activity.refresh()
    activity.refresh()
    assert [f["activity"] for f in told(events, "activity")] == ["idle", "unknown", "idle"]


def test_a_busy_cluster_that_falls_silent_is_unknown(events: Events) -> None:
    ray = Ray()
    ray.driver = "1"
    activity = Activity(ray, events, Constants(), lambda: "")
    activity.refresh()
    ray.away = True
    activity.refresh()
    activity.refresh()
    assert activity.state == "unknown"
