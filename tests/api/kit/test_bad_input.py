"""Bad input: each gets an error that names the field and the remedy, and nothing is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from temporalio.client import Client

from clouds.local.bucket.bucket import LocalBucket
from store.tables import accepted, clusters, events, jobs, schedules, sealed
from tests.api.conftest import World

JOB = {"entrypoint": "true"}
W = "compute_config.worker_nodes.0"
UPLOAD = {"sha256": "a" * 64}


def group(**more: Any) -> dict[str, Any]:
    return {"compute_config": {"worker_nodes": [{"name": "w", **more}]}}


CASES: list[tuple[str, dict[str, Any], int, str, str | None, str]] = [
    # path, body, status, code, field, a word of the message
    ("jobs", {**JOB, "entrypont": "x"}, 422, "invalid_request", "entrypont", "no such field"),
    ("jobs", {}, 422, "invalid_request", "entrypoint", "required"),
    ("jobs", {**JOB, "name": "no spaces"}, 422, "invalid_request", "name", "pattern"),
    ("jobs", {**JOB, "max_retries": -1}, 422, "invalid_request", "max_retries", "greater"),
    ("jobs", {**JOB, "timeout_s": 0}, 422, "invalid_request", "timeout_s", "greater"),
    ("jobs", {**JOB, "image_uri": "x/y"}, 422, "not_honoured", "image_uri", "sets the image"),
    ("jobs", {**JOB, "requirements": "req.txt"}, 422, "invalid_request", "requirements", "list"),
    ("jobs", {**JOB, "working_dir": "./code"}, 422, "invalid_request", "working_dir", "neither an upload"),
    ("jobs", {**JOB, "working_dir": "https://x/y.tar"}, 422, "invalid_request", "working_dir", "zip"),
    ("jobs", {**JOB, "working_dir": "https://me:pw@x/y.zip"}, 422, "invalid_request", "working_dir", "password"),
    ("jobs", {**JOB, "working_dir": "upload:" + "0" * 64}, 404, "not_found", "working_dir", "not in the bucket"),
    ("jobs", {**JOB, "py_modules": ["s3://b/a.zip", "mod"]}, 422, "invalid_request", "py_modules.1", "neither"),
    ("jobs", {**JOB, "excludes": ["data"]}, 422, "not_honoured", "excludes", "uploads nothing"),
    ("jobs", {**JOB, "working_dir": "s3://b/a.zip", "excludes": ["x"]}, 422, "not_honoured", "excludes", "nothing"),
    (
        "jobs", {**JOB, **group(required_resources={"CPU": 1, "accelerator": "T4"})}, 422, "invalid_request",
        f"{W}.required_resources", "accelerator needs GPU",
    ),
    (
        "jobs", {**JOB, **group(required_resources={"CPU": 1, "cpu_architecture": "arm64"})}, 422, "invalid_request",
        f"{W}.required_resources.cpu_architecture", "no instance types",
    ),
    ("jobs", {**JOB, **group(required_resources={"CPU": 1, "cpu_architecture": "mips"})}, 422, "invalid_request",
     f"{W}.required_resources.cpu_architecture", "'x86_64' or 'arm64'"),
    ("clusters", group(instance_types=["a", "a"]), 422, "invalid_request", f"{W}.instance_types", "duplicates: a"),
    ("clusters", group(instance_type="a", instance_types=["b"]), 422, "invalid_request", W, "not both"),
    ("clusters", group(advanced_instance_config={"A": "x" * 9000}), 422, "invalid_request",
     f"{W}.advanced_instance_config", "the maximum is 8192"),
    ("clusters", group(retained_volume={"size": "10Gi"}), 422, "not_honoured", f"{W}.retained_volume", "only the head"),
    ("jobs", {**JOB, **group(fixed_address=True)}, 422, "not_honoured", f"{W}.fixed_address", "only the head"),
    ("clusters", {"compute_config": {"head_node": {"fixed_address": True}}}, 422, "invalid_request",
     "compute_config.head_node.fixed_address", "its private address"),
    *(
        ("clusters", {"compute_config": {"head_node": {"retained_volume": volume}}}, 422, "invalid_request",
         f"compute_config.head_node.retained_volume{field}", words)
        for volume, field, words in (
            ({"size": "10Gi"}, "", "a disk of 10 GiB at /mnt/head"),
            ({"size": "10Mi"}, ".size", "1073741824"),
            ({"size": "17Ti"}, ".size", "17592186044416"),
            ({"size": "much"}, ".size", "is not a size"),
            ({}, ".size", "required"),
            *(({"size": "1Gi", "mount_path": path}, ".mount_path", "not a valid mount path")
              for path in ("/", "/usr/data", "mnt", "/mnt/../etc", "/mnt/a b", "/mnt/", "/proc", "")),
        )
    ),
    ("clusters", {"compute_config": {"advanced_instance_config": {"A": 1}}}, 422, "invalid_request",
     "compute_config.head_node.advanced_instance_config", "no instance types"),
    (
        "clusters", {"compute_config": {"head_node": {"resources": {"system_reserved_memory_bytes": 1}}}}, 422,
        "invalid_request", "compute_config.head_node.resources", "Ray decides",
    ),
    ("jobs", {**JOB, "cluster": "none"}, 404, "not_found", "cluster", "no cluster"),
    ("jobs", {**JOB, "cloud": "mars"}, 404, "not_found", "cloud", "mars"),
    ("jobs", {**JOB, "project": "mars"}, 404, "not_found", "project", "mars"),
    ("jobs", {**JOB, "compute_config": "mars:2"}, 404, "not_found", "compute_config", "mars:2"),
    ("jobs", {**JOB, "env_vars": {"A B": "x"}}, 422, "invalid_request", "env_vars", "environment variable"),
    ("jobs", {**JOB, "env_vars": {"A": "********"}}, 422, "invalid_request", "env_vars.A", "mask"),
    ("jobs", {**JOB, "env_vars": {"A": 1}}, 422, "invalid_request", "env_vars.A", "string"),
    ("jobs", {**JOB, "env_vars": {"A": "x" * 300_000}}, 422, "invalid_request", "env_vars", "bytes"),
    ("jobs", {**JOB, "tags": {"": "x"}}, 422, "invalid_request", "tags", "refused"),
    ("jobs", {**JOB, **group(region="x")}, 422, "invalid_request", "compute_config.worker_nodes.0.region", "no such"),
    ("jobs", {**JOB, **group(flags={})}, 422, "not_honoured", "compute_config.worker_nodes.0.flags", "not supported"),
    ("jobs", {**JOB, "compute_config": {"flags": {}}}, 422, "not_honoured", "compute_config.flags", "fields of"),
    ("jobs", {**JOB, "compute_config": {"zones": ["x"]}}, 422, "invalid_request", "compute_config.zones", "zone"),
    (
        "jobs", {**JOB, **group(required_resources={"CPU": 64})}, 422, "invalid_request",
        "compute_config.worker_nodes.0.required_resources.CPU", "64 CPUs; cloud local has 2",
    ),
    (
        "clusters", group(required_resources={"CPU": 1, "memory": "64Gi"}), 422, "invalid_request",
        "compute_config.worker_nodes.0.required_resources.memory", "64.0 GiB of memory; cloud local has 4.0 GiB",
    ),
    (
        "clusters", {"compute_config": {"head_node": {"resources": {"GPU": 1}}}}, 422, "invalid_request",
        "compute_config.head_node.resources.GPU", "1 GPUs; cloud local has 0",
    ),
    ("clusters", group(resources={"CPU": 0.5}), 422, "invalid_request", f"{W}.resources", "whole number"),
    ("clusters", group(resources={"object_store_memory": 1}), 422, "invalid_request", f"{W}.resources", "75Mi"),
    ("clusters", group(labels={"a": "b,c=d"}), 422, "invalid_request", f"{W}.labels", "label 'a'"),
    ("clusters", group(market_type="SPOT"), 422, "invalid_request", f"{W}.market_type", "SPOT"),
    ("clusters", group(min_nodes=3, max_nodes=2), 422, "invalid_request", W, "min_nodes (3)"),
    ("clusters", {"compute_config": {"head_node": 3}}, 422, "invalid_request", "compute_config.head_node", ""),
    ("clusters", {"compute_config": 3}, 422, "invalid_request", "compute_config", "give a name"),
    ("compute-configs", {"name": "c", "config": {"cloud": "mars"}}, 404, "not_found", "cloud", "mars"),
    ("compute-configs", {"config": {"region": "x"}}, 422, "not_honoured", "config.region", "determines the region"),
    ("uploads", {**UPLOAD, "size": 3 * 2**30}, 413, "too_large", "size", "3072 MiB; uploads may have 2048 MiB"),
    ("uploads", {"sha256": "x", "size": 1}, 422, "invalid_request", "sha256", "pattern"),
    ("uploads", {**UPLOAD, "size": 1, "cloud": "mars"}, 404, "not_found", "cloud", "mars"),
]  # fmt: skip

CRONS = {
    "0 0 * * * *": "6 fields; seconds and years are not supported",
    "* * * *": "4 fields instead of 5",
    "60 * * * *": "'60' is no minute (0 to 59)",
    "* * * foo *": "'foo' is no month (1 to 12 or jan…dec)",
    "* 5-1 * * *": "wrong way round",
    "*/0 * * * *": "'0' is no step of minute",
    "0 0 31 2,4 *": "such a day never comes",
    "0 0 L * *": "'l' is no day of month",
    "@reboot": "@reboot is not known",
    "@every 0s": "@every is not known",
}


async def nothing_was_made(world: World) -> None:
    async with world.db.read() as conn:
        for table in (jobs, clusters, schedules, sealed, events):
            assert await conn.scalar(select(func.count()).select_from(table)) == 0, table.name


async def test_bad_input_is_refused_by_field_and_leaves_nothing(world: World) -> None:
    async with world.ada as http:
        for path, body, status, code, field, words in CASES:
            answer = await http.post(f"/v1/{path}", json=body, headers={"idempotency-key": f"{path}{body}"[:250]})
            problem = answer.json()
            case = (path, body, problem)
            assert answer.headers["content-type"] == "application/problem+json", case
            assert (answer.status_code, problem["code"], problem.get("field")) == (status, code, field), case
            assert (words in problem["detail"], bool(problem["remedy"])) == (True, True), case
            assert problem["status"] == status
    await nothing_was_made(world)
    async with world.db.read() as conn:
        used = await conn.scalar(select(func.count()).select_from(accepted))
    assert used == 0


MISSPELT: list[tuple[str, dict[str, Any], str, str]] = [
    ("jobs", {**JOB, "max_retrys": 1}, "max_retrys", "Did you mean 'max_retries'?"),
    ("jobs", {**JOB, **group(min_node=1)}, f"{W}.min_node", "Did you mean 'min_nodes'?"),
    ("clusters", {"compute_config": {"work_nodes": []}}, "compute_config.work_nodes", "Did you mean 'worker_nodes'?"),
    ("clusters", {"zebra": 1}, "zebra", "The fields are: name, compute_config, cloud, project, tags."),
    (
        "schedules/s", {"cron_expression": "@daily", "job_config": {**JOB, "entrypont": ""}}, "job_config.entrypont",
        "Did you mean 'entrypoint'?",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "field", "remedy"), MISSPELT)
async def test_an_unknown_field_is_answered_with_the_one_that_was_meant(
    world: World, path: str, body: dict[str, Any], field: str, remedy: str
) -> None:
    async with world.ada as http:
        method = "PUT" if path.startswith("schedules") else "POST"
        problem = (await http.request(method, f"/v1/{path}", json=body)).json()
    assert (problem["code"], problem["field"], problem["remedy"]) == ("invalid_request", field, remedy)


async def test_an_error_never_repeats_a_value(world: World) -> None:
    async with world.ada as http:
        answer = await http.post("/v1/jobs", json={"env_vars": {"A": "hunter2", "B": 4711}, "nope": "hunter2"})
        assert answer.status_code == 422
        assert "hunter2" not in answer.text
        assert "4711" not in answer.text
        assert len(answer.json()["details"]["errors"]) == 3


@pytest.mark.parametrize("cron", CRONS)
async def test_a_bad_cron_expression_is_refused_with_the_reason(world: World, cron: str) -> None:
    async with world.ada as http:
        answer = await http.put("/v1/schedules/s", json={"cron_expression": cron, "job_config": JOB})
    assert (answer.status_code, answer.json()["field"]) == (422, "cron_expression")
    assert CRONS[cron] in answer.json()["detail"]
    await nothing_was_made(world)


async def test_a_schedule_is_checked_like_a_job(world: World) -> None:
    async with world.ada as http:
        for config, field in (
            ({"name": "other"}, "job_config.name"),
            ({"image_uri": "x"}, "job_config.image_uri"),
            ({"cluster": "none"}, "job_config.cluster"),
            ({"working_dir": "upload:" + "0" * 64}, "job_config.working_dir"),
            (group(required_resources={"CPU": 64}), "job_config.compute_config.worker_nodes.0.required_resources.CPU"),
        ):
            body = {"cron_expression": "@daily", "job_config": {**JOB, **config}}
            answer = await http.put("/v1/schedules/s", json=body)
            assert answer.json().get("field") == field, answer.text
        body = {"cron_expression": "@daily", "timezone": "Mars/Base", "job_config": JOB}
        assert (await http.put("/v1/schedules/s", json=body)).json()["field"] == "timezone"
    await nothing_was_made(world)


async def test_what_is_not_http_as_we_speak_it(world: World) -> None:
    async with world.ada as http:
        assert (await http.get("/v1/nothing")).json()["code"] == "not_found"
        wrong = await http.delete("/v1/jobs")
        assert (wrong.status_code, wrong.json()["status"], "allow" in wrong.headers) == (405, 405, True)
        text = await http.post("/v1/jobs", content=b"{", headers={"content-type": "application/json"})
        assert (text.status_code, text.json()["detail"]) == (422, "The body is not JSON.")
        for content in (b"x" * (2**20 + 1), _in_pieces()):
            large = await http.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
            assert (large.status_code, large.json()["code"]) == (413, "too_large")
        for key in ("", "k" * 256, "a\x01b"):
            bad = await http.post("/v1/jobs", json=JOB, headers={"idempotency-key": key})
            assert (bad.status_code, bad.json()["field"]) == (422, "Idempotency-Key")


async def _in_pieces() -> Any:
    for _ in range(40):
        yield b" " * 2**15


async def test_what_we_did_not_foresee_has_an_id_and_no_detail(world: World) -> None:
    async with world.ada as http:
        await http.get("/v1/jobs")
        world.app.state.buckets = None
        answer = await http.post("/v1/uploads", json={**UPLOAD, "size": 1})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (500, "internal_error")
    assert problem["resource"].startswith("err_")
    assert problem["resource"] in problem["remedy"]
    assert "NoneType" not in answer.text


async def test_a_bucket_that_fails_is_an_infrastructure_error(world: World, tmp_path: Path) -> None:
    class Broken(LocalBucket):
        def stat(self, key: str) -> Any:
            raise OSError(28, "No space left on device")

    world.app.state.buckets[world.cloud_id] = Broken(tmp_path / "b", "http://x", b"k")
    async with world.ada as http:
        answer = await http.post("/v1/uploads", json={**UPLOAD, "size": 1})
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        job = await http.post("/v1/jobs", json={**JOB, "working_dir": "upload:" + "0" * 64})
        assert (job.status_code, job.json()["code"]) == (503, "unavailable")
    await nothing_was_made(world)


async def test_everything_says_so_while_temporal_is_away(world: World, absent: Client) -> None:
    world.app.state.temporal = absent
    async with world.ada as http:
        tried: list[httpx.Response] = [
            await http.post("/v1/jobs", json=JOB),
            await http.post("/v1/clusters", json={"name": "c"}),
            await http.put("/v1/schedules/s", json={"cron_expression": "@daily", "job_config": JOB}),
        ]
        for answer in tried:
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), answer.text
            assert answer.json()["remedy"]
        for noun in ("jobs", "clusters", "schedules"):
            assert (await http.get(f"/v1/{noun}")).json()["items"] == []
        assert (await http.get("/readyz")).json()["checks"]["temporal"].startswith("Temporal does not answer")
