"""YAML in the platform's shapes: accepted as it is, or refused with the one field named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.client import yaml_files
from heliostat.client.sources import COMMAND_LINE, Source
from heliostat.errors import InvalidRequest, NotHonoured
from heliostat.models.compute_configs import NOT_SUPPORTED, ComputeConfig
from heliostat.models.jobs import NOT_SUPPORTED_JOB, JobConfig
from heliostat.models.services import NOT_SUPPORTED_SERVICE, ServiceConfig

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
    job = yaml_files.job_config(yaml.safe_load(JOB), Source("job.yaml"))
    assert isinstance(job.compute_config, ComputeConfig)
    assert job.compute_config.worker_nodes[0].required_resources.memory == 8 * 2**30  # type: ignore[union-attr]
    assert job.max_retries == 1
    assert job.requirements == ["emoji"]


@pytest.mark.parametrize("field", sorted(NOT_SUPPORTED_JOB))
def test_a_job_field_that_is_not_honoured_is_named_with_the_reason(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.job_config({"entrypoint": "x", field: "y"}, Source("job.yaml"))
    assert caught.value.field == field
    assert NOT_SUPPORTED_JOB[field] in caught.value.message
    assert field not in JobConfig.model_fields


@pytest.mark.parametrize("field", sorted(NOT_SUPPORTED["ComputeConfig"]))
def test_a_compute_field_that_is_not_honoured_is_named(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.compute_config({field: {}}, Source("c.yaml"))
    assert caught.value.field == field
    with pytest.raises(NotHonoured) as caught:
        yaml_files.job_config({"entrypoint": "x", "compute_config": {field: {}}}, Source("job.yaml"))
    assert caught.value.field == f"compute_config.{field}"


@pytest.mark.parametrize("field", sorted(NOT_SUPPORTED["NodeConfig"]))
def test_a_node_field_that_is_not_honoured_is_named(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.compute_config({"worker_nodes": [{"name": "a"}, {"name": "b", field: {}}]}, Source("c.yaml"))
    assert caught.value.field == f"worker_nodes.1.{field}"
    with pytest.raises(NotHonoured) as caught:
        yaml_files.compute_config({"head_node": {field: {}}}, Source("c.yaml"))
    assert caught.value.field == f"head_node.{field}"


@pytest.mark.parametrize("field", sorted(NOT_SUPPORTED["PhysicalResources"]))
def test_a_resource_that_is_not_honoured_is_named(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.compute_config({"head_node": {"required_resources": {"CPU": 1, field: 1}}}, Source("c.yaml"))
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
        yaml_files.job_config(fields, Source("job.yaml"))
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "job.yaml" in caught.value.message


def test_env_values_are_never_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        yaml_files.job_config({"entrypoint": "x", "env_vars": {"KEY": ["s3cret"]}}, Source("job.yaml"))
    assert "s3cret" not in str(caught.value) + repr(caught.value.details)


def test_an_env_name_without_a_value_takes_the_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "here")
    job = yaml_files.job_config({"entrypoint": "x", "env_vars": {"FROM_SHELL": None}}, Source("job.yaml"))
    assert job.env_vars == {"FROM_SHELL": "here"}
    with pytest.raises(InvalidRequest, match="NOT_SET_ANYWHERE"):
        yaml_files.job_config({"entrypoint": "x", "env_vars": {"NOT_SET_ANYWHERE": None}}, Source("job.yaml"))


def test_a_requirements_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("# ours\nnumpy==2.1  # pinned\n\nhttpx[http2]>=0.28 ; python_version > '3.10'\n")
    job = yaml_files.job_config({"entrypoint": "x", "requirements": str(path)}, Source("job.yaml"))
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
    made = yaml_files.schedule_config(fields, Source("s.yaml"))
    assert made.timezone == "Europe/Berlin"
    assert made.job_config.name == "nightly"
    for change, field in [
        ({"job_config": {"entrypoint": "x"}}, "job_config.name"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"cron": "x"}, "cron"),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            yaml_files.schedule_config(fields | change, Source("s.yaml"))
        assert caught.value.field == field
    with pytest.raises(NotHonoured, match=r"job_config\.image_uri"):
        yaml_files.schedule_config(
            fields | {"job_config": {"name": "a", "entrypoint": "x", "image_uri": "y"}}, Source("s.yaml")
        )


# --- where in a file

PLACES = """\
# A comment, and a blank line.

name: train
entrypoint: python main.py
tags: &tags {team: ml}
env_vars:
  A: "1"
compute_config:
  head_node: {resources: {CPU: 1}}
  worker_nodes:
    - name: cpu
      min_nodes: 1
    - name: gpu
      resources:
        GPU: 1
"""


def job_of(path: Path) -> JobConfig:
    document = yaml_files.load(path)
    return yaml_files.job_config(document, document.source)


@pytest.mark.parametrize(
    ("old", "new", "place", "field"),
    [
        ("name: train", "nam: train", "3:1", "nam"),
        ("name: train", "name: a b", "3:1", "name"),
        ("entrypoint: python main.py\n", "", "3:1", "entrypoint"),
        ("tags: &tags {team: ml}", "tags: {team: ml, size: 1}", "5:18", "tags.size"),
        ("name: train", "image_uri: x", "3:1", "image_uri"),
        ('  A: "1"', "  A: 1", "7:3", "env_vars.A"),
        ('  A: "1"', "  NOT_SET_ANYWHERE:", "7:3", "env_vars.NOT_SET_ANYWHERE"),
        ("{resources: {CPU: 1}}", "{resorces: {CPU: 1}}", "9:15", "compute_config.head_node.resorces"),
        ("name: cpu", "name: [cpu]", "11:7", "compute_config.worker_nodes.0.name"),
        ("min_nodes: 1", "min_nodes: one", "12:7", "compute_config.worker_nodes.0.min_nodes"),
        ("        GPU: 1", "        GPU: many", "14:7", "compute_config.worker_nodes.1.resources"),
        ("      resources:", "      cloud_deployment:", "14:7", "compute_config.worker_nodes.1.cloud_deployment"),
        ('  A: "1"', '  A: "1"\n  B: x\n  A: y', "9:3", "env_vars.A"),
        ("min_nodes: 1", "min_nodes: 1\n      name: again", "13:7", "compute_config.worker_nodes.0.name"),
        ("tags: &tags {team: ml}", "tags: {team: [ml}", "5:17", None),
        ("tags: &tags {team: ml}", "tags: *nothing", "5:7", None),
        ("entrypoint:", "\tentrypoint:", "4:1", None),
        ("    - name: gpu\n      resources:", "    - name: gpu\n      resources: *tags\n    - nme: x\n      labels:",
         "15:7", "compute_config.worker_nodes.2.nme"),
    ],
)  # fmt: skip
def test_an_error_names_the_line(tmp_path: Path, old: str, new: str, place: str, field: str | None) -> None:
    assert old in PLACES
    path = tmp_path / "job.yaml"
    path.write_text(PLACES.replace(old, new))
    with pytest.raises((InvalidRequest, NotHonoured)) as caught:
        job_of(path)
    assert caught.value.message.startswith(f"{path}:{place}: "), caught.value.message
    assert caught.value.field == field


def test_services_schedules_and_clouds_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for build, content, place in [
        (yaml_files.service_config, "name: a\napplications:\n  - import_path: m:a\n    probe:\n      pth: /\n", "5:7"),
        (yaml_files.service_config, "applications:\n- import_path: m:a\n- import_path: m.py\n  name: b\n", "3:3"),
        (yaml_files.service_config, "applications: [{import_path: 'm:a'}]\nrollout:\n  steps: [50]\n", "3:3"),
        (yaml_files.schedule_config, "cron_expression: '@daily'\njob_config:\n  entrypoint: x\n", "2:1"),
        (yaml_files.schedule_config, "cron_expression: '@daily'\njob_config:\n  name: x\n  entrypont: x\n", "4:3"),
        (yaml_files.cloud, "name: a\nprovider: azure\n", "2:1"),
        (yaml_files.cloud, "name: a\nprovider: aws\nconfig:\n  regon: us-west-2\n", "4:3"),
        (yaml_files.compute_config, "idle_termination_minutes: 5\nmin_resources: {CPU: 1}\n", "2:1"),
    ]:
        path.write_text(content)
        document = yaml_files.load(path)
        with pytest.raises((InvalidRequest, NotHonoured)) as caught:
            build(document, document.source)
        assert caught.value.message.startswith(f"{path}:{place}: "), caught.value.message


def test_flags_and_files_of_flags_are_named_as_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "compute.yaml").write_text("worker_nodes:\n  - name: cpu\n")
    source = Source("job.yaml", {"name": (3, 1), "compute_config": (4, 1), "": (1, 1)})
    other = yaml_files.load(tmp_path / "compute.yaml")
    replaced = source.replaced({"name": "x", "compute_config": other})
    assert source.at("compute_config.worker_nodes.0.name") == "job.yaml:4:1"
    assert replaced.at("compute_config.worker_nodes.0.name") == f"{tmp_path}/compute.yaml:2:5"
    assert (source.at("name"), replaced.at("name")) == ("job.yaml:3:1", "the command line")
    assert (source.at("entrypoint"), COMMAND_LINE.at("entrypoint")) == ("job.yaml:1:1", "the command line")


def test_anchors_and_merges_are_read_and_an_endless_one_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("base: &base {a: 1}\nuse:\n  <<: *base\n  a: 2\nloop: &loop [*loop]\n")
    document = yaml_files.load(path)
    assert document["use"] == {"a": 2}
    assert document.source.at("use.a") == f"{path}:4:3"


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
    made = yaml_files.service_config(content, Source("service.yaml"))
    assert [a.route_prefix for a in made.applications] == ["/text", None]
    assert made.applications[1].probe is None
    assert made.applications[1].args == {}
    assert isinstance(made.compute_config, ComputeConfig)
    assert (made.rollout.steps, made.rollout.hold_s) == ([5, 100], 15)
    assert "hold_s" not in made.rollout.model_fields_set


@pytest.mark.parametrize("field", sorted(NOT_SUPPORTED_SERVICE))
def test_a_service_field_that_is_not_honoured_is_named_with_the_reason(field: str) -> None:
    with pytest.raises(NotHonoured) as caught:
        yaml_files.service_config({**ONE, field: "y"}, Source("service.yaml"))
    assert caught.value.field == field
    assert NOT_SUPPORTED_SERVICE[field] in caught.value.message
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
        yaml_files.service_config(fields, Source("service.yaml"))
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "service.yaml" in caught.value.message


def test_env_of_services_and_applications_takes_the_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_SHELL", "here")
    app = {"import_path": "m:app", "runtime_env": {"env_vars": {"FROM_SHELL": None}}}
    made = yaml_files.service_config({"applications": [app], "env_vars": {"FROM_SHELL": None}}, Source("s.yaml"))
    assert made.secrets() == {"env_vars.FROM_SHELL": "here", "applications.0.env_vars.FROM_SHELL": "here"}
    assert app["runtime_env"]["env_vars"] == {"FROM_SHELL": None}, "what was read is left as it was"


def test_a_service_s_requirements_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("emoji\n")
    made = yaml_files.service_config({**ONE, "requirements": str(tmp_path / "r.txt")}, Source("s.yaml"))
    assert made.requirements == ["emoji"]
