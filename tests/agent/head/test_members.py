from __future__ import annotations

from typing import Any

from agent.constants import Constants
from agent.events import Events
from agent.head.members import Members
from tests.agent.scripted_ray import Ray, told


def member(ray_id: str, name: str, state: str = "ALIVE", message: str | None = None) -> dict[str, Any]:
    return {"node_id": ray_id, "node_name": name, "is_head_node": name == "head", "state": state,
            "state_message": message, "resources_total": {"CPU": 2.0, "node:1.2.3.4": 1.0}}  # fmt: skip


def test_workers_that_come_and_go_are_told_once(events: Events) -> None:
    ray = Ray()
    members = Members(ray, events, None, Constants(idle_drain_grace_s=0.0))
    ray.members = [member("h", "head")]
    members.refresh()
    assert events.pending() == []
    ray.members.append(member("a", "w1"))
    members.refresh()
    members.refresh()
    assert told(events, "ray_ready") == [{"node_id": "w1", "ray_node_id": "a"}]
    assert members.workers_alive == ["w1"]
    assert members.resources == {"total": {"CPU": 4.0}, "nodes_alive": 2}
    ray.members[1] = member("a", "w1", "DEAD", "Unexpected termination: health check failed")
    members.refresh()
    members.refresh()
    assert [f["node_id"] for f in told(events, "node_lost")] == ["w1"]
    assert members.workers_alive == []
    ray.members.append(member("b", "w1"))  # the same node again, another life
    members.refresh()
    assert len(told(events, "ray_ready")) == 2


def test_a_drained_worker_is_not_lost_until_its_grace_is_over(events: Events) -> None:
    ray = Ray()
    members = Members(ray, events, None, Constants(idle_drain_grace_s=1000.0))
    ray.members = [member("a", "w1")]
    members.refresh()
    ray.members = [member("a", "w1", "DEAD", "Terminated due to idle (no Ray activity).")]
    members.refresh()
    assert told(events, "node_lost") == []
    hasty = Members(ray, events, None, Constants(idle_drain_grace_s=-1.0))
    hasty.refresh()
    assert [f["node_id"] for f in told(events, "node_lost")] == ["w1"]
