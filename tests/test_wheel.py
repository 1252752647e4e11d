"""The wheel that users install: ``heliostat/`` alone, with the client's dependencies alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_it_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "heliostat",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "heliostat").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == there
    assert "heliostat/py.typed" in names


def test_it_needs_the_clients_packages_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = Parser().parsestr(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode())
    needs = {re.split(r"[^A-Za-z0-9_-]", need)[0] for need in metadata.get_all("Requires-Dist", [])}
    assert needs == {"httpx", "pydantic", "typer", "rich", "pyyaml", "pathspec"}
    entry_points = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "heliostat = heliostat.cli.app:main" in entry_points


def test_it_works_without_the_rest_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys, heliostat; from heliostat.cli.app import main\n"
        "[getattr(heliostat, name) for name in heliostat.__all__]\n"
        "assert not {'api', 'store', 'runtime', 'temporalio', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(main(['version']))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path), "HELIOSTAT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("client ")
