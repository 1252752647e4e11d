"""Who may load what. The layers themselves are import-linter's (`make check`)."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
AGENT = sorted((ROOT / "agent").rglob("*.py"))
WORKFLOWS = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in (ROOT / "workflows").rglob("*.py")
    if p.stem != "__init__"
)


def test_no_module_imports_itself_through_others() -> None:
    """Imports for type checkers only may go in circles; import-linter does not count them either."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    graph = grimp.build_graph(*contracts["root_packages"], exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_importing_a_workflow_loads_no_cloud() -> None:
    code = f"import sys, {', '.join(WORKFLOWS)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    sdks = ("boto3", "botocore", "google.cloud", "google.auth", "ray", "clouds.local", "clouds.fake", "clouds.aws")
    sdks += ("clouds.gcp", "google.api_core")
    assert [m for m in loaded if m.startswith(tuple(f"{s}." for s in sdks)) or m in sdks] == []


@pytest.mark.parametrize("path", AGENT, ids=lambda p: "-".join(p.relative_to(ROOT / "agent").with_suffix("").parts))
def test_the_agent_needs_the_standard_library_and_ray_alone(path: Path) -> None:
    # The gate's package runs by another name in the processes of Ray Serve: it imports nothing of the agent's.
    gate = path.parent.name == "gate"
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or (gate and node.level == 1), f"line {node.lineno}"
            if node.level == 0:
                named.add(str(node.module).split(".")[0])
    allowed = {"grpc", "starlette"} if gate else {"agent", "ray"}
    if path.stem == "probe_grpc":
        allowed.add("grpc")  # imported when it is needed
    assert named <= {*sys.stdlib_module_names, *allowed}
