"""``heliostat cloud``, run in this process against a fake API."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.cli import live
from heliostat.client.client import AsyncClient
from heliostat.models.clouds import Check, CheckState, CloudSetup, Provider
from heliostat.models.clusters import ClusterState
from tests.heliostat.cli.test_cli import run  # noqa: F401 - a fixture
from tests.heliostat.fake_api import TOKEN, FakeApi

CLOUD: dict[str, Any] = {
    "name": "prod",
    "provider": "aws",
    "config": {
        "region": "us-west-2",
        "role_arn": "arn:aws:iam::123456789012:role/heliostat",
        "external_id": "heliostat-1",
        "vpc_id": "vpc-0123456789abcdef0",
        "subnets": [{"id": "subnet-0123456789abcdef0", "zone": "us-west-2a"}],
        "security_groups": ["sg-0123456789abcdef0"],
        "instance_profile": "heliostat-node",
        "bucket": "acme-heliostat",
    },
}
MISSING = Check(
    name="right ec2:RunInstances",
    state=CheckState.FAILED,
    detail="denied",
    remedy='Add to the role:\n"ec2:RunInstances"',
)


def file(tmp_path: Path, content: dict[str, Any]) -> str:
    path = tmp_path / "cloud.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_cloud_is_registered_and_looked_at(api: FakeApi, run: Any, tmp_path: Path) -> None:  # noqa: F811
    ran = run("cloud", "register", "-f", file(tmp_path, CLOUD))
    assert ran.code == 0, ran.err
    assert api.clouds["prod"].config.bucket == "acme-heliostat"  # type: ignore[union-attr]
    assert "✓ home  it can be written" in ran.out
    assert "heliostat cloud verify prod --launch" in ran.out
    assert "us-west-2" in run("cloud", "list").out
    got = run("cloud", "get", "prod").out
    assert "role_arn: arn:aws:iam::123456789012:role/heliostat" in got
    assert run("cloud", "get", "prod", "-o", "json").json["config"]["external_id"] == "heliostat-1"


def test_what_fails_is_said_with_its_remedy_and_exit_code_1(api: FakeApi, run: Any, tmp_path: Path) -> None:  # noqa: F811
    api.checks = [
        Check(name="role", state=CheckState.OK),
        MISSING,
        Check(name="subnet", state=CheckState.WARNING, detail="12 addresses free", remedy="Use a larger one."),
        Check(name="launch", state=CheckState.SKIPPED, detail="a right is missing"),
    ]
    ran = run("cloud", "register", "-f", file(tmp_path, CLOUD))
    assert (ran.code, "prod" in api.clouds) == (1, True)
    assert ran.out.splitlines()[:7] == [
        "✓ role",
        "✗ right ec2:RunInstances  denied",
        "    Add to the role:",
        '    "ec2:RunInstances"',
        "! subnet                  12 addresses free",
        "    Use a larger one.",
        "– launch                  a right is missing",
    ]
    ran = run("cloud", "verify", "prod", "-o", "json")
    assert (ran.code, ran.json["ok"], ran.json["checks"][1]["state"]) == (1, False, "failed")
    assert run("cloud", "register", "--no-verify", "-n", "two", "-f", file(tmp_path, CLOUD)).code == 0
    assert "two" in api.clouds


def test_a_changed_file_changes_the_cloud_and_is_looked_at(api: FakeApi, run: Any, tmp_path: Path) -> None:  # noqa: F811
    run("cloud", "register", "--no-verify", "-f", file(tmp_path, CLOUD))
    changed = {
        **CLOUD,
        "config": {**CLOUD["config"], "container_image": "rayproject/ray:2.60.0", "image": "ami-12345678"},
    }
    ran = run("cloud", "update", "prod", "-f", file(tmp_path, changed))
    assert ran.code == 0, ran.err
    assert "changed config.container_image, config.image." in ran.err
    assert "✓ home  it can be written" in ran.out
    assert api.clouds["prod"].config.container_image == "rayproject/ray:2.60.0"  # type: ignore[union-attr]
    del changed["name"], changed["provider"]
    again = run("cloud", "update", "prod", "--no-verify", "-o", "json", "-f", file(tmp_path, changed))
    assert (again.code, again.json["changed"], again.json["verification"]) == (0, [], None), "they are the cloud's own"
    api.checks = [MISSING]
    failed = run("cloud", "update", "prod", "-f", file(tmp_path, CLOUD))
    assert (failed.code, "✗ right ec2:RunInstances  denied" in failed.out) == (1, True)
    refused = run("cloud", "update", "prod", "-f", file(tmp_path, {**CLOUD, "name": "other"}))
    assert (refused.code, "another name" in refused.err) == (1, True)
    assert "no cloud 'none'" in run("cloud", "update", "none", "-f", file(tmp_path, CLOUD)).err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"provider": "azure"}, "aws or gcp"),
        ({"provider": None}, "provider"),
        ({"config": {**CLOUD["config"], "secret_key": "s3cret"}}, "secret_key"),
        ({"config": {**CLOUD["config"], "sub_nets": []}}, "Did you mean 'subnets'?"),
        ({"config": {**CLOUD["config"], "role_arn": "heliostat"}}, "config.role_arn"),
        ({"nmae": "x"}, "Did you mean 'name'?"),
    ],
)
def test_a_bad_file_is_refused_by_field(
    api: FakeApi,
    run: Any,  # noqa: F811
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
) -> None:
    content = {k: v for k, v in {**CLOUD, **change}.items() if v is not None}
    ran = run("cloud", "register", "-f", file(tmp_path, content))
    assert (ran.code, said in ran.err, "s3cret" in ran.err) == (1, True, False), ran.err
    assert list(api.clouds) == ["local"]


def test_setup_writes_files_and_never_over_others(api: FakeApi, run: Any, tmp_path: Path) -> None:  # noqa: F811
    words = ["cloud", "setup", "--provider", "aws", "--region", "us-west-2", "--name", "prod", "--dir", "made"]
    ran = run(*words)
    assert ran.code == 0, ran.err
    assert (tmp_path / "made" / "prod.aws").read_text() == "region: us-west-2\n"
    assert "heliostat cloud register -f cloud.yaml" in ran.out
    (tmp_path / "made" / "prod.aws").write_text("mine")
    again = run(*words)
    assert (again.code, "--force" in again.err) == (1, True)
    assert (tmp_path / "made" / "prod.aws").read_text() == "mine"
    assert run(*words, "--force", "-o", "json").json["files"] == ["made/prod.aws"]
    assert run("cloud", "setup", "--provider", "gcp", "--region", "us-central1", "--name", "g").code == 1, "no project"


def test_the_default_and_the_end(api: FakeApi, run: Any, tmp_path: Path) -> None:  # noqa: F811
    run("cloud", "register", "--no-verify", "-f", file(tmp_path, CLOUD))
    assert "prod" in run("cloud", "set-default", "prod").out
    assert api.clouds["prod"].is_default
    assert not api.clouds["local"].is_default
    assert run("cloud", "delete", "prod").code == 1
    run("cloud", "set-default", "local")
    api.held = ["i-1"]
    assert run("cloud", "delete", "prod").code == 1
    assert run("cloud", "delete", "prod", "--force").code == 0
    assert run("cloud", "delete", "prod").code == 1, "there is none"


@contextmanager
def clusters_become(api: FakeApi, state: ClusterState) -> Iterator[None]:
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for cluster in list(api.clusters.values()):
                if cluster.state is ClusterState.STARTING:
                    api.clusters[cluster.id] = cluster.model_copy(update={"state": state, "reason": "because"})
            time.sleep(0.005)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_launch_runs_a_real_cluster_and_ends_it(api: FakeApi, run: Any) -> None:  # noqa: F811
    with clusters_become(api, ClusterState.RUNNING):
        ran = run("cloud", "verify", "local", "--launch")
    assert ran.code == 0, ran.err
    assert "✓ launch  a cluster was ready after" in ran.out
    (cluster,) = api.clusters.values()
    assert cluster.state is ClusterState.TERMINATED
    assert cluster.compute_config.idle_termination_minutes == 5


def test_a_launch_that_fails_or_is_left_is_ended_too(
    api: FakeApi,
    run: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with clusters_become(api, ClusterState.FAILED):
        ran = run("cloud", "verify", "local", "--launch")
    assert (ran.code, "because" in ran.err) == (2, True)
    api.clusters.clear()

    def interrupted(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "cluster_line", interrupted)
    assert run("cloud", "verify", "local", "--launch").code == 130
    (cluster,) = api.clusters.values()
    assert cluster.state is ClusterState.TERMINATED


def test_nothing_is_launched_where_a_check_fails(api: FakeApi, run: Any) -> None:  # noqa: F811
    api.checks = [MISSING]
    ran = run("cloud", "verify", "local", "--launch")
    assert (ran.code, "Not launched" in ran.err, api.clusters) == (1, True, {})


async def test_the_asynchronous_client_has_it_all(api: FakeApi) -> None:
    async with AsyncClient(api.url, TOKEN) as client:
        assert (await client.clouds.trust()).external_id == "heliostat-1"
        request = CloudSetup(provider=Provider.AWS, region="us-west-2", name="prod")
        assert list((await client.clouds.setup(request)).files) == ["prod.aws"]
        assert (await client.clouds.verify("local")).ok
        assert (await client.clouds.set_default("local")).is_default
