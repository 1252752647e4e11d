from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.agent.conftest import AgentNode, Nodes
from tests.agent.serve.support import QUICK


@pytest.fixture
def start(nodes: Nodes, fake_python: list[str]) -> Callable[..., AgentNode]:
    def begin(**more: Any) -> AgentNode:
        constants = QUICK | more.pop("constants", {})
        return nodes.start("nd_head", python=fake_python, service_id="svc_1", constants=constants, **more)

    return begin
