"""Catalogues of an operator's own: made by the refresh commands, and used instead of those that ship."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from google.cloud import compute_v1

from clouds.aws.machines import catalogue as aws
from clouds.contract.errors import BadConfig
from clouds.gcp.machines import catalogue as gcp
from clouds.offers import offers
from heliostat.errors import Unavailable

NEW_TYPE = {
    "InstanceType": "m99i.large",
    "ProcessorInfo": {"SupportedArchitectures": ["x86_64"]},
    "VCpuInfo": {"DefaultVCpus": 2},
    "MemoryInfo": {"SizeInMiB": 8192},
    "Hypervisor": "nitro",
    "BareMetal": False,
    "BurstablePerformanceSupported": False,
    "SupportedUsageClasses": ["on-demand", "spot"],
}


def test_those_that_ship_are_used_where_there_is_no_other(tmp_path: Path) -> None:
    found = offers(tmp_path)
    assert found["aws"].catalogue is aws.shipped()
    assert found["gcp"].catalogue is gcp.shipped()
    for provider in ("aws", "gcp"):
        found[provider].check_advanced({}, None)
        with pytest.raises(BadConfig, match="no such field"):
            found[provider].check_advanced({"nothing": 1}, None)


def test_aws_is_asked_region_by_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def client(service: str, region_name: str) -> Any:
        asked.append(region_name)
        name = {"us-west-2": "m99i.large", "eu-west-1": "m98i.large"}[region_name]
        page = {"InstanceTypes": [{**NEW_TYPE, "InstanceType": name}]}
        return SimpleNamespace(get_paginator=lambda _what: SimpleNamespace(paginate=lambda: [page]))

    monkeypatch.setattr(boto3, "client", client)
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["catalogue", "refresh", "--region", "us-west-2", "--region", "eu-west-1"])
    aws.main()
    assert asked == ["us-west-2", "eu-west-1"]
    assert set(offers(tmp_path)["aws"].catalogue.types) == {"m98i.large", "m99i.large"}


def test_google_is_asked_zone_by_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = compute_v1.MachineType(name="n99-standard-4", guest_cpus=4, memory_mb=16384, architecture="X86_64")

    class Client:
        def __init__(self, credentials: Any) -> None:
            assert credentials.token == "short-lived"

        def list(self, project: str, zone: str) -> list[Any]:
            assert (project, zone) == ("acme", "us-central1-a")
            return [said]

    monkeypatch.setattr(compute_v1, "MachineTypesClient", Client)
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["catalogue", "refresh", "--project", "acme", "--zone", "us-central1-a"])
    monkeypatch.delenv("GOOGLE_OAUTH_ACCESS_TOKEN", raising=False)
    with pytest.raises(SystemExit):
        gcp.main()
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "short-lived")
    gcp.main()
    assert [t.name for t in offers(tmp_path)["gcp"].catalogue.candidates(cpu=2)] == ["n99-standard-4"]


@pytest.mark.parametrize("name", [aws.OWN, gcp.OWN])
@pytest.mark.parametrize("text", ["name,cpu\nm6i.large,2\n", "name,cpu,memory,gpu\nm6i.large,two,1,0\n"])
def test_one_that_can_not_be_read_is_told_by_its_path(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(Unavailable, match=name) as caught:
        offers(tmp_path)
    assert "refresh" in caught.value.remedy
