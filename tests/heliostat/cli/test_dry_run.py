"""``--dry-run``: the plan as a table and as JSON, nothing uploaded, nothing made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heliostat import Client, JobConfig
from heliostat.cli.dry_run import text
from heliostat.models.clouds import Market, Provider
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.plans import Plan, PlannedNodes, PlannedType
from tests.heliostat.cli.test_cli import run
from tests.heliostat.fake_api import TOKEN, FakeApi

__all__ = ["run"]  # a fixture


def planned(**fields: Any) -> Plan:
    small = PlannedType(name="m6i.large", cpu=2, memory=8 * 2**30, gpu=0, usd_per_hour={Market.ON_DEMAND: 0.096})
    a10g = PlannedType(name="g5.xlarge", cpu=4, memory=16 * 2**30, gpu=1, accelerator="A10G")
    zones = ["us-west-2b", "us-west-2a"]
    head = PlannedNodes(
        group="head", min_nodes=1, max_nodes=1, markets=[Market.ON_DEMAND], zones=zones, types=[small],
        usd_per_hour=0.096, dearest_usd_per_hour=0.096,
    )  # fmt: skip
    gpus = PlannedNodes(
        group="gpus", min_nodes=0, max_nodes=4, markets=[Market.SPOT, Market.ON_DEMAND], zones=zones,
        types=[a10g, PlannedType(name="g5.2xlarge")], usd_per_hour=0.4, dearest_usd_per_hour=1.2,
    )  # fmt: skip
    values: dict[str, Any] = {
        "kind": "cluster", "name": "c", "project": "default", "cloud": "prod", "provider": Provider.AWS,
        "region": "us-west-2", "nodes": [head, gpus], "min_nodes": 1, "max_nodes": 5, "min_usd_per_hour": 0.096,
        "max_usd_per_hour": 4.896, "price_table": "/x/prices.csv", "compute_config": ComputeConfig(),
    }  # fmt: skip
    return Plan(**(values | fields))


def test_a_cluster(api: FakeApi, run: Any) -> None:
    api.plan = planned()
    ran = run("cluster", "create", "-n", "c", "--dry-run")
    assert ran.code == 0, ran.err
    for part in (
        "Nothing was created.", "prod (aws, us-west-2)", "m6i.large (2 CPUs, 8 GiB)", "us-west-2b then us-west-2a",
        "SPOT then ON_DEMAND", "g5.xlarge (4 CPUs, 16 GiB, 1 A10G); then g5.2xlarge", "0.4000 to 1.2000",
        "1 to 5 nodes", "0.10 to 4.90 USD an hour",
    ):  # fmt: skip
        assert part in ran.out
    assert api.planned_for[0].name == "c"
    assert not api.clusters
    assert Plan.model_validate(run("cluster", "create", "--dry-run", "-o", "json").json) == planned()


def test_what_heads_keep_is_in_the_plan() -> None:
    head = {"retained_volume": {"size": "99.5Gi", "mount_path": "/mnt/head"}, "fixed_address": True}
    config = ComputeConfig.model_validate({"head_node": head})
    assert "a disk of 100 GiB at /mnt/head and its private address" in text(planned(compute_config=config))
    assert "keep" not in text(planned())


def test_a_job_whose_code_is_packed_and_stays_here(api: FakeApi, run: Any, tmp_path: Path) -> None:
    api.plan = planned(kind="job")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.py").write_text("1\n")
    ran = run(
        "job", "submit", "--dry-run", "--working-dir", "code", "-e", "*.csv", "-n", "j", "--", "python", "main.py"
    )
    assert ran.code == 0, ran.err
    (asked,) = api.planned_for
    assert (asked.entrypoint, asked.working_dir, asked.excludes) == ("python main.py", None, [])
    assert not api.jobs
    assert not api.bucket
    assert not api.sent("POST", "/v1/uploads")
    missing = run("job", "submit", "--dry-run", "--working-dir", "none", "--", "true")
    assert missing.code == 1
    assert "none" in missing.err


def test_the_client_gives_the_plan(api: FakeApi) -> None:
    api.plan = planned()
    with Client(api.url, TOKEN) as client:
        assert client.clusters.plan() == planned()
        url = "s3://bucket/code.zip"
        assert client.jobs.plan(JobConfig(entrypoint="true", working_dir=url)).max_nodes == 5
    assert api.planned_for[1].working_dir == url, "what is remote is checked where it is"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"price_table": ""}, "there is no price table (HELIOSTAT_PRICES)"),
        ({"max_usd_per_hour": None}, "0.10 USD an hour at least; maximum unknown"),
        ({"min_usd_per_hour": None}, "4.90 USD an hour at most"),
        ({"min_usd_per_hour": None, "max_usd_per_hour": None}, "Price   unknown"),
        ({"min_usd_per_hour": 2.0, "max_usd_per_hour": 2.0}, "2.00 USD an hour"),
        ({"unpriced": ["g5.xlarge SPOT"]}, "No price for  g5.xlarge SPOT"),
        ({"kind": "job", "cluster_id": "cl_1", "nodes": []}, "It would run on cluster cl_1 and needs no more nodes."),
        ({"kind": "job", "name": None}, "A job in project default"),
    ],
)
def test_what_is_not_known_is_said(fields: dict[str, Any], words: str) -> None:
    assert " ".join(words.split()) in " ".join(text(planned(**fields)).split())


def test_a_refused_dry_run_is_exit_1(api: FakeApi, run: Any) -> None:
    api.trouble = [422]
    assert run("cluster", "create", "--dry-run").code == 1
