"""A job on a warm cluster, from POST until the client sees SUCCEEDED. Compared with ``ray job submit`` of the same
entry point on the same cluster, as a person types it, and with Ray's bare HTTP API, which is the stricter
comparison."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from benchmarks.stack import POLL_S, Stack, running
from benchmarks.stats import median, ratios, spread, table
from runtime.keys import load_or_create

ENTRYPOINT = "echo done"
GOAL = 1.15


async def run(pairs: int, **_: Any) -> dict[str, Any]:
    found: dict[str, list[float]] = {"ours_s": [], "bare_s": [], "rest_s": []}
    async with running() as (stack, _fleet):
        cluster = await stack.cluster("warm", workers=1)
        dashboard, token = ray_access(stack, cluster)
        for number in range(pairs + 1):
            by_cli = await _ray_job_submit(dashboard, token)
            ours = await _job(stack, cluster, number)
            by_rest = await _rest(dashboard, token)
            if number:
                for key, value in (("ours_s", ours), ("bare_s", by_cli), ("rest_s", by_rest)):
                    found[key].append(value)
                print(
                    f"  {number}: `ray job submit` {by_cli:.2f} s, HTTP {by_rest:.2f} s, ours {ours:.2f} s", flush=True
                )
    return found | {
        "ratios": ratios(found["ours_s"], found["bare_s"]),
        "rest_ratios": ratios(found["ours_s"], found["rest_s"]),
        "entrypoint": ENTRYPOINT,
    }


async def _job(stack: Stack, cluster: str, number: int) -> float:
    began = time.monotonic()
    job = await stack.post("/v1/jobs", {"name": f"warm-{number}", "entrypoint": ENTRYPOINT, "cluster": cluster})
    await stack.until(f"/v1/jobs/{job['id']}", "SUCCEEDED")
    return time.monotonic() - began


async def _ray_job_submit(dashboard: str, token: str) -> float:
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    ray = Path(sys.executable).parent / "ray"
    began = time.monotonic()
    submitted = await asyncio.create_subprocess_exec(
        str(ray), "job", "submit", "--address", dashboard, "--", *ENTRYPOINT.split(),
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await submitted.communicate()
    if submitted.returncode or b"succeeded" not in said:
        raise RuntimeError(said.decode()[-2000:])
    return time.monotonic() - began


async def _rest(dashboard: str, token: str) -> float:
    async with httpx.AsyncClient(
        base_url=dashboard, headers={"authorization": f"Bearer {token}"}, trust_env=False, timeout=60
    ) as http:
        began = time.monotonic()
        answer = await http.post("/api/jobs/", json={"entrypoint": ENTRYPOINT})
        answer.raise_for_status()
        path = f"/api/jobs/{answer.json()['submission_id']}"
        while (status := (await http.get(path)).json()["status"]) != "SUCCEEDED":
            if status in ("FAILED", "STOPPED"):
                raise RuntimeError(f"the bare job is {status}")
            await asyncio.sleep(POLL_S)
        return time.monotonic() - began


def ray_access(stack: Stack, cluster: str) -> tuple[str, str]:
    """Ray's own address and token, which no user of ours has."""
    with closing(sqlite3.connect(f"file:{stack.home.records_db}?mode=ro", uri=True)) as records:
        (address,) = records.execute(
            "SELECT gcs_address FROM nodes WHERE cluster_id = ? AND role = 'head'", (cluster,)
        ).fetchone()
    ip, _, port = address.rpartition(":")
    return f"http://{ip}:{int(port) + 1}", load_or_create(stack.home.path).ray_token(cluster)


def show(found: dict[str, Any]) -> str:
    return table(
        ["against", "ours", "bare", "ratio of pairs, median", "goal"],
        [
            ["`ray job submit`", spread(found["ours_s"]), spread(found["bare_s"]),
             f"{median(found['ratios']):.2f} ×", f"≤ {GOAL} ×"],
            ["Ray's HTTP, polled every 50 ms", spread(found["ours_s"]), spread(found["rest_s"]),
             f"{median(found['rest_ratios']):.2f} ×", "—"],
        ],
    )  # fmt: skip
