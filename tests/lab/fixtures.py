"""The lab for tests of pytest. Heavy imports come with the first test that has a lab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.e2e.support import Stack
from tests.lab import namespaces

if TYPE_CHECKING:
    from tests.lab.lab import Lab
    from tests.lab.site import Site


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    if not namespaces.inside():
        pytest.skip(f"NOT RUN, the lab can't be built on this machine: {namespaces.missing()}")
    from tests.lab.lab import Lab

    lab = Lab()
    yield lab
    left = lab.close()
    assert not left, left


@pytest.fixture(scope="session")
def site(lab: Lab) -> Iterator[Site]:
    """Clouds ``aws`` and ``gcp`` are registered."""
    from tests.lab.site import Site

    stack = Stack(namespaces.ROOM / "home", Site.settings(lab))
    try:
        stack.up()
        site = Site(lab, stack)
        site.register_aws("aws")
        site.register_gcp("gcp")
        yield site
    finally:
        left = stack.dispose()
    assert not left, left
