"""Worker Deployment Versioning as a setting: a version works once the operator has made it current."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from embedded.parts import TEMPORAL
from tests.embedded.conftest import StackUnderTest, eventually


def temporal(stack: StackUnderTest, *command: str) -> Any:
    argv = [TEMPORAL, *command, "--address", stack.state["temporal_address"], "-o", "json"]
    done = subprocess.run(argv, env=stack.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout.strip() else None


@pytest.mark.long
def test_a_version_works_once_it_is_current(make_stack: Callable[..., StackUnderTest]) -> None:
    stack = make_stack(HELIOSTAT_WORKER_VERSIONING="build-1").up()
    cluster = stack.api("POST", "/v1/clusters", json={"name": "c"}).json()

    def is_known() -> bool:
        found = temporal(stack, "worker", "deployment", "list")
        return any(row["name"] == "heliostat" for row in found or [])

    eventually(is_known)
    assert stack.api("GET", f"/v1/clusters/{cluster['id']}/nodes").json()["items"] == [], "nobody may work yet"
    version = ("--deployment-name", "heliostat", "--build-id", "build-1", "--yes")
    temporal(stack, "worker", "deployment", "set-current-version", *version)
    eventually(lambda: stack.api("GET", f"/v1/clusters/{cluster['id']}/nodes").json()["items"])
    described = temporal(stack, "workflow", "describe", "--workflow-id", cluster["id"])
    info = described["workflowExecutionInfo"]["versioningInfo"]
    assert "build-1" in json.dumps(info)
    assert "AUTO_UPGRADE" in info["behavior"]
