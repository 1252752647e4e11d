"""What the suites of clouds share: one moto for all of them, and an account in it."""

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


@pytest.fixture(scope="session")
def _aws_account(moto_url: str) -> Account:
    from tests.clouds.aws.support import make_account

    return make_account(moto_url)


@pytest.fixture
def aws_account(_aws_account: Account) -> Iterator[Account]:
    """One for all, since its clients take longer than most tests; nothing of an earlier test is in it."""
    from tests.clouds.aws import moto_plus

    _aws_account.clear()
    yield _aws_account
    moto_plus.KNOBS.faults.clear()
