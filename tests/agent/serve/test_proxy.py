from __future__ import annotations

from typing import Any

from heliostat.models.agents import ServeTraffic
from tests.agent.control_plane import ControlPlane
from tests.agent.serve.support import (
    ask,
    give,
    proxy_says,
)


def test_reports_carry_the_proxys_counters_even_when_it_is_gone(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    reports = plane.nodes["nd_head"]["reports"]
    assert all("serve" not in r for r in reports)
    give(plane, "sv_1")
    proxy_says(head, requests=5, errors=1)
    seen = plane.wait(
        lambda: next((s for r in reports if (s := r.get("serve")) and s["alive"] and s["requests"] == 5), None)
    )
    traffic = ServeTraffic.model_validate(seen)
    assert (traffic.version_id, traffic.errors) == ("sv_1", 1)
    assert "revision" not in seen
    ask(head, "proxy-is-deaf")
    gone = plane.wait(lambda: reports[-1]["serve"] if not reports[-1]["serve"]["alive"] else None)
    assert gone["requests"] == 5
