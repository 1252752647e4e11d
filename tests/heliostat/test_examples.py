"""The files that we ship are ones that we accept."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliostat import yaml_files
from heliostat.packaging import is_remote, pack_working_dir

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/job.yaml")), ids=lambda p: p.parent.name)
def test_an_example_can_be_submitted_from_its_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    job = yaml_files.job_config(yaml_files.load(path), str(path))
    assert job.working_dir is not None
    assert not is_remote(job.working_dir)
    package = pack_working_dir(job.working_dir, job.excludes)
    package.discard()
    assert package.size < 2**20


def test_there_are_three() -> None:
    assert len(list(EXAMPLES.glob("*/job.yaml"))) >= 3
