"""A setting is read by somebody, and one that is misspelt is not silently nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embedded.parts import ROOT
from runtime.settings import Settings, misspelt

FOLDERS = ("activities", "api", "clouds", "embedded", "runtime", "store", "workflows")
BY_NAME = {name: f"{name.removesuffix('_port')}" for name in ("temporal_port", "ui_port", "api_port", "bucket_port")}
"""Ports are taken by the part's name, see embedded/stack.py."""


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_read(name: str) -> None:
    files = [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]
    text = "\n".join(Path(p).read_text() for p in files if p != ROOT / "runtime/messages/common.py")
    limit = name.endswith(("_start_timeout_s", "register_timeout_s", "capacity_timeout_s", "infrastructure_retry_s"))
    read = rf"limits\.{name}\b" if limit else rf"(settings|\bs|self)\.{name}\b"
    assert re.search(read, text) or (name in BY_NAME and f'"{BY_NAME[name]}"' in text)


def test_a_misspelt_setting_is_told() -> None:
    found = misspelt({"HELIOSTAT_RETENTION_LOG_DAYS": "1", "HELIOSTAT_HOST": "x", "HELIOSTAT_TOKEN": "x", "PATH": ""})
    assert found == {"HELIOSTAT_RETENTION_LOG_DAYS": "HELIOSTAT_RETENTION_LOGS_DAYS"}
    used = ["HOST", "TOKEN", "PART", "NODE_ID", "NODE_IP", "NODE_DIR", "MACHINE_ID", "JOB_ID", "RUN_ID", "PYTHON"]
    assert misspelt({f"HELIOSTAT_{name}": "" for name in [*used, "FAKE_CLOUD", "PORT_BASE", "BOOT", "VERSION"]}) == {}
