"""What `make setup` and CI rest on."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def locked() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)", text)}


def test_the_lock_satisfies_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + [r for g in project["dependency-groups"].values() for r in g]
    pins = locked()
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} is not locked: run `make lock`"
        assert requirement.specifier.contains(pin, prereleases=True), f"{requirement}, locked {pin}: run `make lock`"


def test_the_lock_names_no_host_and_hashes_everything() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    entries = re.split(r"(?m)^(?=[\w.-]+==)", text)[1:]
    assert len(entries) >= len(locked()) > 100  # some have one version a platform
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_ci_runs_the_developers_recipes_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -eu", 'cd "$(dirname "$0")/.."', "make check", "make test"]


def test_every_recipe_parses() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"(?m)^\.PHONY: (.+)$", makefile)
    assert phony is not None
    for target in phony[1].split():
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    help_text = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert [target for target in phony[1].split() if target != "help" and f"make {target}" not in help_text] == []
