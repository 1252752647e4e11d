"""Decisions of a service's workflow that need no Temporal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from heliostat.models.compute_configs import ComputeConfig
from runtime.messages.common import TerminateRequest
from runtime.messages.services import VersionSpec
from workflows.services.progress import refresh
from workflows.services.rollout_state import RolloutData, RolloutKind, shares
from workflows.services.state import ServiceData, Slot, VersionData

BEGAN = datetime(2026, 11, 26, 12, tzinfo=UTC)


def rollout(**more: Any) -> RolloutData:
    values: dict[str, Any] = {
        "kind": RolloutKind.STEPS,
        "deploy_id": "dp_1",
        "actor": "user:ann",
        "version_ids": ["new"],
        "base": {"old": 100},
        "since": BEGAN,
        "health_deadline": BEGAN + timedelta(minutes=10),
        "deadline": BEGAN + timedelta(hours=1),
    }
    return RolloutData(**(values | more))


def test_its_own_time_stands_still_while_it_is_paused() -> None:
    r = rollout(paused=True, paused_at=BEGAN + timedelta(minutes=5))
    r.resume(BEGAN + timedelta(hours=7, minutes=5))
    assert (r.paused, r.paused_at) == (False, None)
    assert r.deadline == BEGAN + timedelta(hours=8)
    assert r.health_deadline == BEGAN + timedelta(hours=7, minutes=10)
    r.resume(BEGAN + timedelta(hours=9))
    assert r.deadline == BEGAN + timedelta(hours=8), "it was not paused"


@pytest.mark.parametrize(
    ("percent", "stop_at", "step"),
    [(0, None, 5), (5, None, 50), (7, None, 50), (50, None, 100), (100, None, None), (5, 30, 30), (30, 30, None),
     (0, 3, 3)],
)  # fmt: skip
def test_the_next_step(percent: int, stop_at: int | None, step: int | None) -> None:
    assert rollout(steps=[5, 50, 100], percent=percent, stop_at=stop_at).next_step() == step


@pytest.mark.parametrize(
    ("more", "canaried"),
    [
        ({"percent": 25}, True),
        ({"percent": 0}, False),
        ({"percent": 100}, False),
        ({"percent": 25, "back": True}, False),
        ({"percent": 25, "base": {}}, False),
        ({"percent": 50, "kind": RolloutKind.IN_PLACE}, False),
    ],
)
def test_what_is_measured_against_the_versions_before(more: dict[str, Any], canaried: bool) -> None:
    assert rollout(**more).canaried is canaried


def test_a_replacement_is_a_backend_without_traffic_and_a_replaced_cluster_is_none() -> None:
    def slot(number: int, **more: Any) -> Slot:
        up: dict[str, Any] = {"ready": True, "taken": True, "http": f"10.0.0.{number}:8000", "head_node_id": "nd"}
        return Slot(number=number, cluster_id=f"cl_{number}", open_on="nd", **(up | more))

    spec = VersionSpec(id="sv", name="v1", number=1, compute_config=ComputeConfig(), created_by="ann", created_at=BEGAN)
    version = VersionData(spec=spec, state_since=BEGAN, slots=[slot(2)], relief=[slot(3, relieves=2)])
    version.leaving.append(slot(1))
    held = ServiceData(state_since=BEGAN, versions={"sv": version}, weights={"sv": 100})
    held = ServiceData.model_validate(held.model_dump(mode="json"))  # as continue-as-new carries it
    assert {b.id: b.weight for b in held.wanted_backends()} == {"cl_2": 100, "cl_3": 0}
    assert [held.slot_of(f"cl_{n}") is not None for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert held.versions["sv"].serves is False, "by the slots alone"


def older_state(**more: Any) -> ServiceData:
    """Of a release that said the same in other words."""
    spec = VersionSpec(id="sv", name="v1", number=1, compute_config=ComputeConfig(), created_by="ann", created_at=BEGAN)
    version = VersionData(spec=spec, state_since=BEGAN, slots=[Slot(number=1)])
    version.condition("Cluster", False, BEGAN, "Waiting", "a cluster")
    return ServiceData(state_since=BEGAN, versions={"sv": version}, rollout=rollout(version_ids=["sv"]), **more)


def test_a_text_of_an_older_release_is_rewritten_without_a_change_of_state() -> None:
    held = older_state(waits_for="v1: a cluster")
    refresh(held, BEGAN + timedelta(hours=1))
    line = held.versions["sv"].checklist["Cluster"]
    assert (line.status, line.reason, line.since) == (False, "Waiting", BEGAN)
    assert line.message.startswith("its cluster to be ready")
    assert held.waits_for == f"v1: {line.message}"


@pytest.mark.parametrize(
    "more",
    [
        {"waits_for": "the load balancer: port 8443 is taken"},
        {"waits_for": "its clusters", "terminate": TerminateRequest(actor="user:ann", reason="")},
    ],
    ids=["an-error-that-is-not-in-the-state", "a-termination"],
)
def test_what_a_service_waits_for_is_kept_where_the_state_cannot_tell(more: dict[str, Any]) -> None:
    held = older_state(**more)
    refresh(held, BEGAN)
    assert held.waits_for == more["waits_for"]


def test_weights_sum_to_the_whole() -> None:
    assert rollout(base={"a": 60, "b": 30, "c": 10}, percent=7).weights() == {"a": 56, "b": 28, "c": 9, "new": 7}
    assert shares({"a": 1, "b": 1, "c": 1}, 100) == {"a": 34, "b": 33, "c": 33}
    assert shares({"a": 0}, 100) == {"a": 0}
