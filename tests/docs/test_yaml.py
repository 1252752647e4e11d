"""The YAML of the documents is what the client accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import JobConfig
from heliostat.models.schedules import ScheduleConfig
from heliostat.models.services import ServiceConfig
from tests.docs.pages import ROOT, Block, blocks

try:
    from heliostat.client import yaml_files
except ImportError:
    from heliostat import yaml_files  # type: ignore[attr-defined,no-redef]

REQUIRED: dict[str, dict[str, Any]] = {
    "job": {"entrypoint": "python main.py"},
    "service": {"applications": [{"import_path": "main:app"}]},
    "schedule": {},
    "compute": {},
}
"""What a block that shows a part of a file leaves out."""


def kind_of(fields: dict[str, Any]) -> str:
    models = {"schedule": ScheduleConfig, "job": JobConfig, "service": ServiceConfig, "compute": ComputeConfig}
    fits = [kind for kind, model in models.items() if fields.keys() <= model.model_fields.keys()]
    assert fits, f"of no config: {sorted(fields)}"
    return fits[0]


def read(fields: dict[str, Any], source: str) -> object:
    if "provider" in fields:
        return yaml_files.cloud(fields, source)
    kind = kind_of(fields)
    build = getattr(yaml_files, f"{kind}_config")
    return build({**REQUIRED[kind], **fields}, source)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_block_is_accepted(block: Block) -> None:
    read(yaml.safe_load(block.text), str(block))


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_an_example_is_accepted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    read(yaml_files.load(file), file.name)


def test_the_schedules_page_shows_the_shipped_example() -> None:
    """The page leaves out what is explained elsewhere; what it shows is what the file says."""
    shipped = yaml.safe_load((ROOT / "examples/schedule/schedule.yaml").read_text())
    page = next(b for b in blocks("yaml") if b.page.name == "schedules.md" and "cron_expression" in b.text)
    shown = yaml.safe_load(page.text)
    assert shown.pop("job_config").items() <= shipped["job_config"].items()
    assert shown.items() <= shipped.items()
