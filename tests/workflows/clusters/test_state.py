"""The state of a cluster's workflow, as an older release may have left it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from workflows.clusters.state import REWORDED, ClusterData

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(("old", "new"), REWORDED.items())
def test_a_text_of_an_older_release_is_no_change(old: str, new: str) -> None:
    state = ClusterData.model_validate({"state_since": AT, "started_at": AT, "waits_for": old})
    assert state.waits_for == new
    assert ClusterData.model_validate(state.model_dump(mode="json")).waits_for == new


def test_todays_text_of_a_cluster_without_a_head_is_the_new_one() -> None:
    assert ClusterData(state_since=AT, started_at=AT).waiting_text(AT) in REWORDED.values()
