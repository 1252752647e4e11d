"""What users may rely on is declared, and what is declared exists."""

from __future__ import annotations

import subprocess
import sys

import heliostat


def test_all_is_sorted_complete_and_importable() -> None:
    assert heliostat.__all__ == sorted(heliostat.__all__)
    assert dir(heliostat) == heliostat.__all__
    for name in heliostat.__all__:
        assert getattr(heliostat, name) is not None
    assert set(heliostat.__all__) - {"__version__"} == {n for names in heliostat._HOME.values() for n in names}
    assert not hasattr(heliostat, "nonsense")


def test_importing_the_package_loads_no_client() -> None:
    code = "import heliostat, sys; print('httpx' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert done.stdout.split() == ["False", "False"]


def test_the_version_is_the_projects() -> None:
    import tomllib

    project = tomllib.loads((_root() / "pyproject.toml").read_text())["project"]
    assert heliostat.__version__ == project["version"]


def _root():  # type: ignore[no-untyped-def]
    from pathlib import Path

    return Path(heliostat.__file__).parents[1]
