from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from agent.boot import Boot, Ports
from agent.constants import Constants
from agent.gate_install import install_gate

SOURCE = Path(__file__).parents[2] / "agent" / "gate"
LOADS = """
import sys
from heliostat_serve_gate import guard_grpc, middlewares
import heliostat_serve_gate
assert heliostat_serve_gate.__file__ == sys.argv[1], heliostat_serve_gate.__file__
loaded = {m.partition(".")[0] for m in sys.modules}
assert not loaded & {"agent", "grpc", "starlette", "ray"}, loaded
"""


def boot(folder: Path) -> Boot:
    return Boot("http://127.0.0.1:1", "nd_1", 1, "t", "127.0.0.1", Ports.of(None), folder, Constants())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.py")}


def loads(folder: Path) -> None:
    """As Ray Serve's processes load it: nothing of ours, grpc or starlette comes along."""
    package = folder / "provider" / "heliostat_serve_gate" / "__init__.py"
    subprocess.run(
        [sys.executable, "-c", LOADS, str(package)], env={"PYTHONPATH": str(folder / "provider")}, check=True
    )


def test_the_whole_package_is_copied_and_loads_alone(tmp_path: Path) -> None:
    install_gate(boot(tmp_path))
    assert files(tmp_path / "provider" / "heliostat_serve_gate") == files(SOURCE)
    assert [p.name for p in (tmp_path / "provider").iterdir()] == ["heliostat_serve_gate"]
    loads(tmp_path)


def test_what_an_older_agent_or_a_broken_off_start_left_is_replaced(tmp_path: Path) -> None:
    provider = tmp_path / "provider"
    for name in ("heliostat_serve_gate", "heliostat_serve_gate.new", "heliostat_serve_gate.old"):
        (provider / name).mkdir(parents=True)
        (provider / name / "stale.py").write_text("raise RuntimeError")
    (provider / "heliostat_serve_gate.py").write_text("raise RuntimeError")  # one file, as it was at first
    (provider / "heliostat_grpc.py").write_text("")
    for _ in range(2):
        install_gate(boot(tmp_path))
        assert files(provider / "heliostat_serve_gate") == files(SOURCE)
        assert {p.name for p in provider.iterdir()} - {"__pycache__"} == {"heliostat_serve_gate", "heliostat_grpc.py"}
        loads(tmp_path)
