"""How long machines have to call, by what they boot into and what the operator has set."""

from __future__ import annotations

from typing import Any

import pytest

from api.kit.limits import limits
from heliostat.models.clouds import Cloud, Provider
from heliostat.models.common import utcnow
from runtime.settings import SLOW_REGISTER_S, Settings
from tests.api.clouds.test_routes import GCP

IMAGE = {"container_image": "rayproject/ray:2.60.0-py311-gpu"}
PYTHON = {"python": "/opt/ray/bin/python"}


def registers(config: dict[str, str] | None, **settings: Any) -> float | None:
    given = None if config is None else {**GCP, **config}
    provider = Provider.LOCAL if config is None else Provider.GCP
    cloud = Cloud.model_validate(
        {"id": "cld_1", "name": "c", "provider": provider, "config": given, "created_at": utcnow()}
    )
    return limits(Settings(**settings), cloud).register_timeout_s


@pytest.mark.parametrize("config", [IMAGE, IMAGE | PYTHON, {}])
def test_machines_that_make_what_they_run_in_have_longer(config: dict[str, str]) -> None:
    assert registers(config) == SLOW_REGISTER_S


@pytest.mark.parametrize("config", [None, PYTHON])
def test_others_have_their_nodes_start(config: dict[str, str] | None) -> None:
    assert registers(config) is None


def test_the_operators_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registers(IMAGE, register_timeout_s=1500) == registers(PYTHON, register_timeout_s=1500) == 1500
    assert registers(IMAGE, head_start_timeout_s=600) is None, "it counts from the launch, too"
    assert registers(IMAGE, worker_start_timeout_s=600) is None
    monkeypatch.setenv("HELIOSTAT_REGISTER_TIMEOUT_S", "60")
    assert registers(IMAGE) == 60
