"""What idle cached clusters cost a worker."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import psutil
import pytest
from temporalio.client import Client

from heliostat.models.clusters import ClusterState
from tests.workflows.world import make_world

CLUSTERS = 1000
KB_EACH = 250


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_a_thousand_idle_clusters_in_one_worker(temporal: Client, tmp_path: Path) -> None:
    """As a running worker has them, without the sandbox. The fake agents and the cloud in this process are counted
    too, so the budget is a ceiling."""
    async with make_world(temporal, tmp_path, worker_threads=16, sandboxed=False) as world:
        first = await world.running_cluster()
        await world.until_quiet(first)
        gc.collect()
        before = psutil.Process().memory_info().rss
        for _ in range(CLUSTERS // 50):
            found = await asyncio.gather(*(world.start_cluster() for _ in range(50)))
            for cluster_id in found:
                await world.until_cluster(cluster_id, ClusterState.RUNNING, timeout_s=120)
        gc.collect()
        each = (psutil.Process().memory_info().rss - before) / CLUSTERS / 1024
        print(f"BUDGET {CLUSTERS} idle clusters: {each:.0f} KB each")
        assert each < KB_EACH
