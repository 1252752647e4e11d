"""Validates an autoscaling config before Ray's monitor reads it, in a process of its own
(``agent.ray_node.validate_config``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from agent.ray_node.process import RayFailed


class ValidationIncomplete(RayFailed):
    """Ray's reader gave no verdict in time."""


def _lower_priority() -> None:
    """The validation takes a second of CPU, which Ray, starting beside it, needs more. A little only: the head waits
    for it in the end."""
    os.nice(5)


def start_validation(config: Path, provider_dir: Path) -> subprocess.Popen[bytes]:
    env = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if k in os.environ}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, "-m", "agent.ray_node.validate_config", str(config), str(provider_dir)],
        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=_lower_priority,
    )  # fmt: skip


def validation_result(validation: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Waits for it. Raises RayFailed with Ray's reason for a bad config, ValidationIncomplete after ``timeout_s``."""
    try:
        _, errors = validation.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        validation.kill()
        validation.communicate()
        raise ValidationIncomplete("the autoscaling config is not validated: Ray's reader took too long") from None
    if validation.returncode != 0:
        reason = (errors.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise RayFailed(f"the worker groups give an autoscaling config that Ray refuses: {reason[:500]}")
