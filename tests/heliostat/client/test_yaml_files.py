"""YAML in the platform's shapes: accepted as it is, or refused with the one field named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.client import yaml_files
from heliostat.errors import InvalidRequest, NotHonoured
from heliostat.models.compute_configs import NOT_HONOURED, ComputeConfig
from heliostat.models.jobs import NOT_HONOURED_JOB, JobConfig
from heliostat.models.services import NOT_HONOURED_SERVICE, ServiceConfig

JOB = """
name: my-job
entrypoint: python main.py
working_dir: .
excludes: [data]
requirements:
  - emoji
env_vars:
  A: "1"
py_modules: null
compute_config:
  cloud: local
  head_node:
    instance_type: m5.2xlarge
  worker_nodes:
    - name: gpu
      required_resources: {CPU: 4, memory: 8Gi}
      resources: {CPU: 4, custom: 1}
      min_nodes: 1
      max_nodes: 5
      market_type: SPOT
  min_resources: null
max_retries: null
timeout_s: 60
image_uri: null
tags: {team: ml}
"""


def test_a_job_file_of_the_platform_is_accepted() -> None:
    job = yaml_files.job_config(yaml.safe_load(JOB), "job.yaml")
    assert isinstance(job.compute_config, ComputeConfig)
    assert job.compute_config.worker_nodes[0].required_resources.memory == 8 * 2**30  # type: ignore[union-attr]
    assert job.max_retries == 1
    assert job.requirements == ["emoji"]


@pytest.mark.parametrize("field", sorted(NOT_HONOURED_JOB))
def test_a_job_field_that_is_not_honoured_is_named_with_the_reason(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.job_config({"entrypoint": "x", field: "y"}, "job.yaml")
    assert caught.value.field == field
    assert NOT_HONOURED_JOB[field] in caught.value.message
    assert field not in JobConfig.model_fields


@pytest.mark.parametrize("field", sorted(NOT_HONOURED["ComputeConfig"]))
def test_a_compute_field_that_is_not_honoured_is_named(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.compute_config({field: {}}, "c.yaml")
    assert caught.value.field == field
    with pytest.raises(NotHonoured) as caught:
        yaml_files.job_config({"entrypoint": "x", "compute_config": {field: {}}}, "job.yaml")
    assert caught.value.field == f"compute_config.{field}"


@pytest.mark.parametrize("field", sorted(NOT_HONOURED["NodeConfig"]))
def test_a_node_field_that_is_not_honoured_is_named(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.compute_config({"worker_nodes": [{"name": "a"}, {"name": "b", field: {}}]}, "c.yaml")
    assert caught.value.field == f"worker_nodes.1.{field}"
    with pytest.raises(NotHonoured) as caught:
        yaml_files.compute_config({"head_node": {field: {}}}, "c.yaml")
    assert caught.value.field == f"head_node.{field}"


@pytest.mark.parametrize("field", sorted(NOT_HONOURED["PhysicalResources"]))
def test_a_resource_that_is_not_honoured_is_named(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.compute_config({"head_node": {"required_resources": {"CPU": 1, field: 1}}}, "c.yaml")
    assert caught.value.field == f"head_node.required_resources.{field}"


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"entrypoint": "x", "max_retrys": 1}, "max_retrys", "max_retries"),
        ({"entrypoint": "x", "zebra": 1}, "zebra", "entrypoint"),
        ({"name": "x"}, "entrypoint", "missing"),
        (
            {"entrypoint": "x", "compute_config": {"worker_nodes": [{"min_node": 1}]}},
            "compute_config.worker_nodes.0.min_node", "min_nodes",
        ),
        (
            {"entrypoint": "x", "compute_config": {"head_node": {"required_resources": {"CPU": 0}}}},
            "compute_config.head_node.required_resources.CPU", "greater",
        ),
        ({"entrypoint": "x", "max_retries": -1}, "max_retries", "greater"),
        ({"entrypoint": "x", "name": "a b"}, "name", "pattern"),
        ({"entrypoint": "x", "env_vars": {"PORT": 8080}}, "env_vars.PORT", "quotes"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_the_way_out(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        yaml_files.job_config(fields, "job.yaml")
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "job.yaml" in caught.value.message


def test_env_values_are_never_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        yaml_files.job_config({"entrypoint": "x", "env_vars": {"KEY": ["s3cret"]}}, "job.yaml")
    assert "s3cret" not in str(caught.value) + repr(caught.value.details)


def test_an_env_name_without_a_value_takes_the_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "here")
    job = yaml_files.job_config({"entrypoint": "x", "env_vars": {"FROM_SHELL": None}}, "job.yaml")
    assert job.env_vars == {"FROM_SHELL": "here"}
    with pytest.raises(InvalidRequest, match="NOT_SET_ANYWHERE"):
        yaml_files.job_config({"entrypoint": "x", "env_vars": {"NOT_SET_ANYWHERE": None}}, "job.yaml")


def test_a_requirements_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("# ours\nnumpy==2.1  # pinned\n\nhttpx[http2]>=0.28 ; python_version > '3.10'\n")
    job = yaml_files.job_config({"entrypoint": "x", "requirements": str(path)}, "job.yaml")
    assert job.requirements == ["numpy==2.1", "httpx[http2]>=0.28 ; python_version > '3.10'"]
    for line in ("-r other.txt", "-e .", "--constraint=c.txt", "numpy==2.1 \\"):
        path.write_text(f"ok\n{line}\n")
        with pytest.raises(InvalidRequest, match=":2:"):
            yaml_files.read_requirements(path)
    with pytest.raises(InvalidRequest, match="missing"):
        yaml_files.read_requirements(tmp_path / "missing.txt")


def test_a_schedule_file(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"job_config": {"name": "nightly", "entrypoint": "x"}, "cron_expression": "0 3 * * *", "timezone": "local"}
    monkeypatch.setenv("TZ", "Europe/Berlin")
    made = yaml_files.schedule_config(fields, "s.yaml")
    assert made.timezone == "Europe/Berlin"
    assert made.job_config.name == "nightly"
    for change, field in [
        ({"job_config": {"entrypoint": "x"}}, "job_config.name"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"cron": "x"}, "cron"),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            yaml_files.schedule_config(fields | change, "s.yaml")
        assert caught.value.field == field
    with pytest.raises(NotHonoured, match="job_config: image_uri"):
        yaml_files.schedule_config(
            fields | {"job_config": {"name": "a", "entrypoint": "x", "image_uri": "y"}}, "s.yaml"
        )


@pytest.mark.parametrize(("content", "says"), [("a: [", "not valid YAML"), ("- a", "mapping"), (None, "No such file")])
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRequest, match=says) as caught:
        yaml_files.load(path)
    assert "job.yaml" in caught.value.message


# --- services

SERVICE = """
name: my-service
applications:
  - name: text
    import_path: main:app
    route_prefix: /text
    args: {model: small}
    runtime_env:
      working_dir: .
      env_vars: {A: "1"}
    deployments:
      - name: Model
        num_replicas: 2
        ray_actor_options: {num_cpus: 0.5}
  - name: inner
    route_prefix: null
    probe: null
    import_path: main:inner
    args: null
working_dir: .
excludes: null
requirements: [emoji]
env_vars: {B: "2"}
compute_config: {head_node: {resources: {CPU: 1}}, worker_nodes: null}
query_auth_token_enabled: true
http_options: null
grpc_options: null
logging_config: {encoding: JSON}
proxy_location: null
ray_gcs_external_storage_config: null
tracing_config: null
rollout: {steps: [5, 100], hold_s: null}
tags: {team: ml}
"""
ONE = {"applications": [{"import_path": "m:app"}]}


def test_a_service_file_of_the_platform_is_accepted() -> None:
    content = yaml.safe_load(SERVICE)
    del content["compute_config"]["worker_nodes"]
    made = yaml_files.service_config(content, "service.yaml")
    assert [a.route_prefix for a in made.applications] == ["/text", None]
    assert made.applications[1].probe is None
    assert made.applications[1].args == {}
    assert isinstance(made.compute_config, ComputeConfig)
    assert (made.rollout.steps, made.rollout.hold_s) == ([5, 100], 15)
    assert "hold_s" not in made.rollout.model_fields_set


@pytest.mark.parametrize("field", sorted(NOT_HONOURED_SERVICE))
def test_a_service_field_that_is_not_honoured_is_named_with_the_reason(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.service_config({**ONE, field: "y"}, "service.yaml")
    assert caught.value.field == field
    assert NOT_HONOURED_SERVICE[field] in caught.value.message
    assert field not in ServiceConfig.model_fields


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({**ONE, "cluster_replica": 2}, "cluster_replica", "cluster_replicas"),
        ({"name": "x"}, "applications", "missing"),
        ({"applications": []}, "applications", "at least 1"),
        ({"applications": ["m:app"]}, "applications.0", "dictionary"),
        (
            {"applications": [{"import_path": "m:app", "route_prefx": "/"}]},
            "applications.0.route_prefx", "route_prefix",
        ),
        ({"applications": [{"import_path": "m.py"}]}, "applications.0.import_path", "module.sub:app"),
        (
            {"applications": [{"import_path": "m:app", "probe": {"pth": "/"}}]},
            "applications.0.probe.pth", "path",
        ),
        (
            {"applications": [{"import_path": "m:app", "runtime_env": {"env_vars": {"PORT": 80}}}]},
            "applications.0.runtime_env.env_vars.PORT", "quotes",
        ),
        ({**ONE, "rollout": {"step": [100]}}, "rollout.step", "steps"),
        ({**ONE, "rollout": {"steps": [50]}}, "rollout.steps", "end with 100"),
        ({**ONE, "compute_config": {"head_nod": {}}}, "compute_config.head_nod", "head_node"),
        ({**ONE, "http_options": {"port": 1}}, "http_options", "load balancer"),
        ({**ONE, "proxy_location": "EveryNode"}, "proxy_location", "HeadOnly"),
        ({"applications": [{"import_path": "m:a"}, {"import_path": "m:b"}]}, None, "same name"),
    ],
)  # fmt: skip
def test_a_wrong_service_field_is_named_with_the_way_out(fields: dict[str, Any], field: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        yaml_files.service_config(fields, "service.yaml")
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "service.yaml" in caught.value.message


def test_env_of_services_and_applications_takes_the_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "here")
    app = {"import_path": "m:app", "runtime_env": {"env_vars": {"FROM_SHELL": None}}}
    made = yaml_files.service_config({"applications": [app], "env_vars": {"FROM_SHELL": None}}, "s.yaml")
    assert made.secrets() == {"env_vars.FROM_SHELL": "here", "applications.0.env_vars.FROM_SHELL": "here"}
    assert app["runtime_env"]["env_vars"] == {"FROM_SHELL": None}, "what was read is left as it was"


def test_a_service_s_requirements_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("emoji\n")
    made = yaml_files.service_config({**ONE, "requirements": str(tmp_path / "r.txt")}, "s.yaml")
    assert made.requirements == ["emoji"]
