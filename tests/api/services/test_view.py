"""A service as answers show it: traffic and versions."""

from __future__ import annotations

from datetime import timedelta

import pytest

from heliostat.models.common import utcnow
from heliostat.models.services import (
    ServiceCluster,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
)
from tests.api.conftest import World
from tests.api.services.support import BUCKETS, RUNNING, a_head, deployed, write

pytestmark = pytest.mark.timeout(90)


# --- what is seen -----------------------------------------------------------------------------------------


async def test_traffic_is_summed_over_a_versions_clusters(world: World, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http)
        version = service["versions"][0]["id"]
        now = utcnow()
        fast, slow = [0] * BUCKETS, [0] * BUCKETS
        fast[3], slow[9] = 90, 10
        common = {"version_id": version, "window_s": 60}
        await a_head(
            world, service, "cl_a", now, requests=100, errors=1, ongoing=2, connections=5, window_requests=90,
            window_buckets=fast, last_request_at=(now - timedelta(seconds=5)).isoformat(), **common,
        )  # fmt: skip
        await a_head(
            world, service, "cl_b", now, requests=50, ongoing=1, window_requests=30, window_errors=6,
            window_buckets=slow, last_request_at=now.isoformat(), **common,
        )  # fmt: skip
        await a_head(
            world, service, "cl_c", now - timedelta(minutes=5), requests=7, ongoing=9, window_requests=1, **common
        )
        await a_head(world, service, "cl_d", now, version_id="sv_other", requests=1000)

        def on_clusters(found: ServiceVersion) -> None:
            found.clusters = [ServiceCluster(cluster_id=f"cl_{c}", state="RUNNING") for c in "abcd"]

        await write(world, service["id"], ServiceState.RUNNING, RUNNING, change=on_clusters)
        seen = (await http.get("/v1/services/chat")).json()["versions"][0]["traffic"]
    assert (seen["requests"], seen["errors"], seen["ongoing"], seen["connections"]) == (157, 1, 3, 5)
    assert (seen["requests_per_s"], seen["errors_per_s"], seen["window_s"]) == (2.0, 0.1, 60)
    assert (3 < seen["p50_ms"] <= 5, 30 < seen["p95_ms"] <= 50, seen["last_request_at"][:19]) == (
        True, True, now.isoformat()[:19],
    )  # fmt: skip


async def test_ended_versions_are_shown_a_few_and_listed_all(world: World, worker: None) -> None:
    async with world.ada as http:
        for _ in range(8):
            service = await deployed(http)
        over = {f"v{n}": ServiceVersionState.TERMINATED for n in range(1, 8)}
        await write(world, service["id"], ServiceState.RUNNING, over | {"v8": ServiceVersionState.RUNNING})
        shown = (await http.get("/v1/services/chat")).json()["versions"]
        assert [v["number"] for v in shown] == [8, 7, 6, 5, 4, 3]
        page = (await http.get("/v1/services/chat/versions", params={"limit": 5})).json()
        rest = (await http.get("/v1/services/chat/versions", params={"cursor": page["next_cursor"]})).json()
        assert [v["number"] for v in page["items"] + rest["items"]] == [8, 7, 6, 5, 4, 3, 2, 1]
