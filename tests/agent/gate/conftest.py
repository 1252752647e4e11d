from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.gate.support import GateWriter


@pytest.fixture
def writer(tmp_path: Path) -> GateWriter:
    return GateWriter(tmp_path / "gate.json")
