"""What a compute config becomes in a cloud of AWS or Google Cloud; what is refused, with the nearest names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api.compute_configs.placement import ALTERNATIVES, default_config, placed
from clouds.offers import offers
from heliostat.errors import InvalidRequest
from heliostat.models.clouds import AwsConfig, Capabilities, Cloud, GcpConfig, Market, Provider
from heliostat.models.common import utcnow
from heliostat.models.compute_configs import ComputeConfig

OFFERS = offers(Path("/nonexistent"))
AWS_CONFIG = AwsConfig.model_validate(
    {
        "region": "us-west-2",
        "role_arn": "arn:aws:iam::123456789012:role/heliostat",
        "external_id": "heliostat-1",
        "vpc_id": "vpc-0123abcd",
        "subnets": [{"id": f"subnet-0123abc{z}", "zone": f"us-west-2{z}"} for z in "ba"],
        "security_groups": ["sg-0123abcd"],
        "instance_profile": "node",
        "bucket": "acme-heliostat",
    }
)
GCP_CONFIG = GcpConfig.model_validate(
    {
        "project": "acme-prod-1",
        "region": "us-central1",
        "zones": ["us-central1-a", "us-central1-b"],
        "workload_identity_provider": "projects/1/locations/global/workloadIdentityPools/heliostat/providers/control",
        "service_account": "heliostat@acme-prod-1.iam.gserviceaccount.com",
        "bucket": "acme-heliostat",
    }
)


def cloud(provider: Provider, **can: Any) -> Cloud:
    config = AWS_CONFIG if provider is Provider.AWS else GCP_CONFIG
    zones = ["us-west-2b", "us-west-2a"] if provider is Provider.AWS else GCP_CONFIG.zones
    catalogue = OFFERS[provider].catalogue
    capabilities = {
        "markets": list(Market),
        "zones": zones,
        "max_cpu_per_node": catalogue.max_cpu,  # type: ignore[attr-defined]
        "max_memory_per_node": catalogue.max_memory,  # type: ignore[attr-defined]
        "max_gpu_per_node": catalogue.max_gpu,  # type: ignore[attr-defined]
        "keeps": True,
    }
    return Cloud(
        id="cld_1",
        name="prod",
        provider=provider,
        capabilities=Capabilities.model_validate(capabilities | can),
        config=config,
        created_at=utcnow(),
    )


AWS, GCP = cloud(Provider.AWS), cloud(Provider.GCP)


def head(where: Cloud = AWS, **node: Any) -> Any:
    return placed(ComputeConfig.model_validate({"head_node": node}), where, OFFERS).head_node


def test_nothing_asked_is_the_clouds_own_default_in_all_of_its_zones() -> None:
    config = placed(ComputeConfig(), AWS, OFFERS)
    assert config.zones == ["us-west-2b", "us-west-2a"], "in the cloud's order"
    assert (config.head_node.instance_types, config.head_node.resources) == (["m6i.large"], {"CPU": 2})
    assert head(GCP).instance_types == ["e2-standard-4"]


@pytest.mark.parametrize(
    ("where", "asked", "first"),
    [
        (AWS, {"CPU": 4}, "m6i.xlarge"),
        (AWS, {"CPU": 4, "memory": "60Gi"}, "r6i.2xlarge"),
        (AWS, {"CPU": 4, "cpu_architecture": "arm64"}, "m6g.xlarge"),
        (AWS, {"CPU": 4, "GPU": 1}, "g4dn.xlarge"),
        (AWS, {"CPU": 4, "GPU": 1, "accelerator": "A10G"}, "g5.xlarge"),
        (AWS, {"CPU": 4, "GPU": 8, "accelerator": "h100"}, "p5.48xlarge"),
        (GCP, {"CPU": 3}, "e2-standard-4"),
        (GCP, {"CPU": 4, "cpu_architecture": "arm64"}, "c4a-standard-4"),
        (GCP, {"CPU": 4, "GPU": 1, "accelerator": "L4"}, "g2-standard-4"),
        (GCP, {"CPU": 4, "GPU": 1, "accelerator": "nvidia-tesla-t4"}, "n1-standard-4/nvidia-tesla-t4:1"),
        (GCP, {"CPU": 4, "GPU": 8, "accelerator": "H100"}, "a3-highgpu-8g"),
    ],
)
def test_required_resources_pick_types(where: Cloud, asked: dict[str, Any], first: str) -> None:
    found = head(where, required_resources=asked).instance_types
    assert found[0] == first
    assert len(found) <= ALTERNATIVES
    types = OFFERS[where.provider].catalogue.types
    assert all(types[t].cpu >= asked["CPU"] and types[t].gpu >= asked.get("GPU", 0) for t in found)


def test_what_ray_is_told_is_what_the_machine_has() -> None:
    assert head(instance_type="m6i.2xlarge").resources == {"CPU": 8}
    assert head(instance_types=["g5.2xlarge", "g5.xlarge"]).resources == {"CPU": 4, "GPU": 1}, "the least of them"
    assert head(instance_type="m6i.2xlarge", resources={"CPU": 16, "db": 1}).resources == {"CPU": 16, "db": 1}
    assert head(required_resources={"CPU": 3}).resources is None, "what was asked for"


def test_logical_resources_alone_pick_a_machine_that_has_them() -> None:
    found = head(resources={"CPU": 16, "GPU": 1})
    assert found.instance_types[0] == "g4dn.4xlarge"
    assert found.resources == {"CPU": 16, "GPU": 1}


def test_what_was_placed_is_placed_as_it_is() -> None:
    config = ComputeConfig.model_validate(
        {
            "advanced_instance_config": {"Monitoring": {"Enabled": True}},
            "head_node": {"required_resources": {"CPU": 4}},
            "worker_nodes": [{"advanced_instance_config": {"EbsOptimized": True}, "market_type": "PREFER_SPOT"}],
        }
    )
    once = placed(config, AWS, OFFERS)
    assert once.worker_nodes[0].advanced_instance_config == {"Monitoring": {"Enabled": True}, "EbsOptimized": True}
    assert placed(ComputeConfig.model_validate(once.model_dump(mode="json")), AWS, OFFERS) == once


def test_only_what_the_cloud_may_use() -> None:
    some = cloud(Provider.GCP, instance_types=["n2-standard-8", "c2-standard-8"])
    assert head(some, required_resources={"CPU": 4}).instance_types == ["n2-standard-8", "c2-standard-8"]
    with pytest.raises(InvalidRequest, match="no instance type that this cloud may use has that"):
        head(some, required_resources={"CPU": 4, "GPU": 1})


NODE: list[tuple[Cloud, dict[str, Any], str, str, str]] = [
    # cloud, head node, field, words of the message, words of the remedy
    (AWS, {"instance_type": "m6i.lrge"}, "instance_type", "no instance type 'm6i.lrge'", "'m6i.large'"),
    (AWS, {"instance_types": ["m6i.large", "m9z.large"]}, "instance_types.1", "'m9z.large'", "Did you mean"),
    (GCP, {"instance_type": "e2-standart-4"}, "instance_type", "gcp's catalogue", "'e2-standard-4'"),
    (
        AWS, {"required_resources": {"CPU": 1, "GPU": 1, "accelerator": "A10"}}, "required_resources.accelerator",
        "no accelerator 'A10'", "'A10G'",
    ),
    (
        GCP, {"required_resources": {"CPU": 1, "GPU": 1, "accelerator": "H10"}}, "required_resources.accelerator",
        "gcp has no accelerator", "H100",
    ),
    (AWS, {"required_resources": {"CPU": 4, "GPU": 1, "accelerator": "T4G"}}, "required_resources", "(x86_64)", "cpu_"),
    (AWS, {"required_resources": {"CPU": 4, "memory": "99Ti"}}, "required_resources.memory", "101376.0 GiB", "memory"),
    (AWS, {"required_resources": {"CPU": 4, "GPU": 9}}, "required_resources.GPU", "9 GPUs", "GPU"),
    (
        AWS, {"required_resources": {"CPU": 4}, "instance_types": ["m6i.xlarge", "m6i.large"]}, "instance_types.1",
        "m6i.large has 2 CPUs", "required_resources",
    ),
    (
        AWS, {"required_resources": {"CPU": 4}, "instance_types": ["m6g.xlarge"]}, "instance_types.0",
        "is arm64, not x86_64", "required_resources",
    ),
    (
        AWS, {"required_resources": {"CPU": 4, "GPU": 1, "accelerator": "T4"}, "instance_types": ["g5.xlarge"]},
        "instance_types.0", "has A10G, not T4", "required_resources",
    ),
    (AWS, {"advanced_instance_config": {"UserData": "x"}}, "advanced_instance_config.UserData", "UserData", "UserData"),
    (
        AWS, {"advanced_instance_config": {"Placement": {"AvailabilityZone": "a"}}},
        "advanced_instance_config.Placement.AvailabilityZone", "set zones", "AvailabilityZone",
    ),
    (
        AWS, {"advanced_instance_config": {"EbsOptimised": True}}, "advanced_instance_config.EbsOptimised",
        "EbsOptimised", "correct",
    ),
    (
        AWS, {"advanced_instance_config": {"BlockDeviceMappings": [{"DeviceName": "x", "Ebs": {"Encrypted": False}}]}},
        "advanced_instance_config.BlockDeviceMappings.0.Ebs.Encrypted", "always True", "Encrypted",
    ),
    (
        GCP, {"advanced_instance_config": {"serviceAccounts": []}}, "advanced_instance_config.service_accounts",
        "service account", "service_accounts",
    ),
    (
        GCP, {"advanced_instance_config": {"min_cpu_plattform": "x"}}, "advanced_instance_config.min_cpu_plattform",
        "no such field", "correct",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("where", "node", "field", "words", "remedy"), NODE, ids=lambda v: v if type(v) is str else "")
def test_what_can_not_be_is_refused_by_field(
    where: Cloud, node: dict[str, Any], field: str, words: str, remedy: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        head(where, **node)
    at = f"compute_config.head_node.{field}"
    if where is GCP and "serviceAccounts" in str(node):
        at = "compute_config.advanced_instance_config.service_accounts"  # by the name that it has there
    assert caught.value.field == at
    assert words in caught.value.message
    assert remedy in caught.value.remedy


def test_zones_and_markets_of_the_cloud() -> None:
    with pytest.raises(InvalidRequest) as caught:
        placed(ComputeConfig(zones=["us-west-2c"]), AWS, OFFERS)
    assert caught.value.field == "compute_config.zones"
    assert "'us-west-2a'" in caught.value.remedy
    spot = ComputeConfig.model_validate({"worker_nodes": [{"market_type": "SPOT"}]})
    with pytest.raises(InvalidRequest) as caught:
        placed(spot, cloud(Provider.AWS, markets=["ON_DEMAND"]), OFFERS)
    assert caught.value.field == "compute_config.worker_nodes.0.market_type"


def test_what_is_wrong_for_the_whole_cluster_is_named_there() -> None:
    with pytest.raises(InvalidRequest) as caught:
        placed(ComputeConfig(advanced_instance_config={"ClientToken": "x"}), AWS, OFFERS)
    assert caught.value.field == "compute_config.advanced_instance_config.ClientToken"


def test_a_cloud_without_types_refuses_what_chooses_among_them() -> None:
    local = AWS.model_copy(update={"provider": Provider.LOCAL, "config": None})
    assert placed(ComputeConfig(zones=["us-west-2a"]), local, {}).head_node == ComputeConfig().head_node
    for node, field in (
        ({"required_resources": {"CPU": 1, "cpu_architecture": "arm64"}}, "required_resources.cpu_architecture"),
        ({"required_resources": {"CPU": 1, "GPU": 1, "accelerator": "T4"}}, "required_resources.accelerator"),
        ({"advanced_instance_config": {"EbsOptimized": True}}, "advanced_instance_config"),
    ):
        with pytest.raises(InvalidRequest, match="no instance types") as caught:
            placed(ComputeConfig.model_validate({"head_node": node}), local, {})
        assert caught.value.field == f"compute_config.head_node.{field}"


KEPT = {"retained_volume": {"size": "100Gi"}, "fixed_address": True}


def test_what_heads_keep_goes_through_or_is_refused_before_anything_is_made() -> None:
    for where in (AWS, GCP):
        assert head(where, **KEPT).keeps == "a disk of 100 GiB at /mnt/head and its private address"
    local = cloud(Provider.AWS, keeps=False).model_copy(update={"provider": Provider.LOCAL, "config": None})
    for node, field in ((KEPT, "retained_volume"), ({"fixed_address": True}, "fixed_address")):
        with pytest.raises(InvalidRequest, match="neither disk nor address") as caught:
            placed(ComputeConfig.model_validate({"head_node": node}), local, {})
        assert caught.value.field == f"compute_config.head_node.{field}"
        assert f"Leave {field} out" in caught.value.remedy


@pytest.mark.parametrize(
    ("where", "advanced", "field"),
    [
        (AWS, {"SecurityGroupIds": ["sg-0123abcd"]}, "SecurityGroupIds"),
        (AWS, {"PrivateIpAddress": "10.0.0.9"}, "PrivateIpAddress"),
        (AWS, {"NetworkInterfaces": []}, "NetworkInterfaces"),
        (AWS, {"BlockDeviceMappings": [{"DeviceName": "/dev/sdp"}]}, "BlockDeviceMappings.0.DeviceName"),
        (GCP, {"networkInterfaces": []}, "network_interfaces"),
        (GCP, {"disks": [{"deviceName": "heliostat-kept"}]}, "disks.0.device_name"),
    ],
)
def test_a_request_of_ones_own_does_not_take_the_place_of_what_is_kept(
    where: Cloud, advanced: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        head(where, advanced_instance_config=advanced, **KEPT)
    assert caught.value.field is not None
    assert caught.value.field.endswith(f"advanced_instance_config.{field}")
    others = {"SecurityGroupIds": ["sg-0123abcd"]} if where is AWS else {"disks": [{"deviceName": "more"}]}
    assert head(where, advanced_instance_config=others, retained_volume={"size": "1Gi"}).advanced_instance_config


def test_the_configs_that_every_cloud_has() -> None:
    gpu, cpu = default_config("default-gpu"), default_config("default-cpu")
    assert gpu is not None
    assert cpu is not None
    assert placed(gpu, AWS, OFFERS).head_node.instance_types[0] == "g4dn.xlarge"
    assert placed(gpu, GCP, OFFERS).head_node.instance_types[0] == "n1-standard-4/nvidia-tesla-t4:1"
    assert placed(cpu, AWS, OFFERS).head_node.instance_types == ["m6i.large"]
    assert default_config("mine") is None
