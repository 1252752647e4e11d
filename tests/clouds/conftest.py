"""What the suites of clouds share: one moto for all of them, and an account for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.clouds.aws.support import Account


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    from tests.clouds.aws import moto_plus  # patches moto; of the tests that ask for it alone

    with moto_plus.serving() as url:
        yield url


@pytest.fixture
def aws_account(moto_url: str) -> Iterator[Account]:
    from tests.clouds.aws import moto_plus
    from tests.clouds.aws.support import make_account

    yield make_account(moto_url)
    moto_plus.KNOBS.faults.clear()
