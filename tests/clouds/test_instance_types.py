"""Instance types by the names that people use."""

from __future__ import annotations

import pytest

from clouds.gcp.machines.catalogue import shipped
from clouds.instance_types import accelerators, is_accelerator, nearest


@pytest.mark.parametrize(
    ("wanted", "has", "same"),
    [
        ("T4", "nvidia-tesla-t4", True),
        ("nvidia-tesla-t4", "T4", True),
        ("A100", "nvidia-a100-80gb", True),
        ("A100-80GB", "nvidia-a100-80gb", True),
        ("A100-80GB", "nvidia-tesla-a100", False),
        ("H100", "nvidia-h100-mega-80gb", False),
        ("T4", "T4g", False),
        ("rtx pro 4500", "RTX PRO 4500", True),
        ("T4", "", False),
    ],
)
def test_accelerators_by_the_names_that_people_use(wanted: str, has: str, same: bool) -> None:
    assert is_accelerator(wanted, has) is same


def test_names_that_are_near() -> None:
    assert accelerators(shipped())[:2] == ["A100", "A100-80GB"]
    assert nearest("h10", ["H100", "L4"]) == "Did you mean 'H100'?"
    assert nearest("zzz", ["a", "b"]) == "There are: a, b."
    assert nearest("zzz", [str(n) for n in range(40)]).endswith("and 28 more.")
    assert nearest("x", []) == "There are: none."
