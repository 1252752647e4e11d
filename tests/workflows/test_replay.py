"""Workflows that run now were begun by older code. Saved histories replay, and no command is added, removed or moved
without somebody having thought of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from temporalio.client import WorkflowHistory
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Replayer
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from tests.workflows import fingerprints
from tests.workflows.record import FOLDER, SCENARIOS
from worker import PASSED_THROUGH, WORKFLOWS

HISTORIES = sorted(FOLDER.glob("*.json"))

HOW_TO_GO_ON = """
{what}

Clusters and jobs that run now were begun by the older code and go on under this one.
1. Put the new behaviour behind `if workflow.patched("<what changed>"):`, and keep the old one in `else:`. Only what
   can't be reached by a running workflow (a workflow that is new in this release) needs no patch.
2. Run the replay tests: `pytest tests/workflows/test_replay.py`. The old histories stay as they are.
3. Record what the new behaviour writes under a new name: `python -m tests.workflows.record <scenario>`.
4. Write the fingerprints anew: `python -m tests.workflows.fingerprints`, and commit both with the change.
"""


def replayer() -> Replayer:
    return Replayer(
        workflows=WORKFLOWS,
        data_converter=pydantic_data_converter,
        workflow_runner=SandboxedWorkflowRunner(SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH)),
    )


def test_every_scenario_was_recorded() -> None:
    assert {p.name.split(".")[0] for p in HISTORIES} >= {s.__name__ for s in SCENARIOS}


@pytest.mark.parametrize("path", HISTORIES, ids=lambda p: p.stem)
async def test_saved_histories_replay(path: Path) -> None:
    text = path.read_text()
    result = await replayer().replay_workflow(
        WorkflowHistory.from_json(json.loads(text)["id"], text), raise_on_replay_failure=False
    )
    if result.replay_failure is not None:
        pytest.fail(HOW_TO_GO_ON.format(what=f"{path.name} does not replay: {result.replay_failure}"))


async def test_the_replay_would_notice_another_order() -> None:
    """The gate itself: a history with a step of another name does not replay."""
    path = next(p for p in HISTORIES if p.stem == "job_on_a_given_cluster.job")
    text = path.read_text().replace("acquire_lease", "another_step")
    result = await replayer().replay_workflow(
        WorkflowHistory.from_json(json.loads(text)["id"], text), raise_on_replay_failure=False
    )
    assert result.replay_failure is not None


def test_no_command_changed_unseen() -> None:
    kept, now = json.loads(fingerprints.FILE.read_text()), fingerprints.fingerprints()
    for name in sorted({*kept, *now}):
        before, after = kept.get(name, []), now.get(name, [])
        gone = [c for c in before if c not in after]
        new = [c for c in after if c not in before]
        moved = "" if gone or new else " They are the same ones in another order."
        if before != after:
            what = f"The commands of {name} are not those that were committed: gone {gone}, new {new}.{moved}"
            pytest.fail(HOW_TO_GO_ON.format(what=what))


def test_every_workflow_has_a_fingerprint() -> None:
    assert set(fingerprints.fingerprints()) >= {w.__name__ for w in WORKFLOWS}


def test_histories_tell_nothing_of_the_machine_that_recorded_them() -> None:
    root = str(fingerprints.ROOT)
    for path in HISTORIES:
        text = path.read_text()
        assert root not in text, path.name
        assert "stackTrace" not in text, path.name
