"""What an open project owes its readers: a licence with its text, and files for GitHub that it can read."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""sha256 of LICENSE-2.0.txt as the Apache Software Foundation publishes it."""


def build(kind: str, target: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


def test_the_licence_is_whole() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_the_wheel_carries_the_licence(tmp_path: Path) -> None:
    archive = zipfile.ZipFile(build("wheel", tmp_path))
    (held,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert archive.read(held) == (ROOT / "LICENSE").read_bytes()
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "License-File: LICENSE" in metadata


def test_the_source_archive_carries_the_licence(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        assert [name.split("/", 1)[1] for name in archive.getnames()].count("LICENSE") == 1


def test_the_pipeline_runs_the_recipe_of_a_developers_desk() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert "bash .ci/run" in [step.get("run") for step in steps]
    assert workflow["permissions"] == {"contents": "read"}


def test_hooks_run_what_make_check_runs() -> None:
    """None is downloaded: each is a command of .venv or the Makefile."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert "make check" in [hook["entry"] for hook in hooks]


def test_forms_can_be_read() -> None:
    for file in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert isinstance(yaml.safe_load(file.read_text()), dict), file
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        if form.name != "config.yml":
            content = yaml.safe_load(form.read_text())
            assert content.keys() >= {"name", "description", "body"}, form
            ids = [part["id"] for part in content["body"] if part["type"] != "markdown"]
            assert len(set(ids)) == len(ids), form


def test_coverage_measures_the_packages_that_are_type_checked() -> None:
    """A folder that is new would else be left out of the figure, unseen."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert sorted(tool["coverage"]["run"]["source"]) == sorted(tool["mypy"]["packages"])
