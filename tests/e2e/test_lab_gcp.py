"""Google Cloud in the lab: real google-cloud-compute against our fake, real Ray on hosts that booted from their
start-up script."""

from __future__ import annotations

import pytest

from tests.lab.gcp import Gcp
from tests.lab.scenarios import OnACloud

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(600)]


class TestGcp(OnACloud):
    cloud = "gcp"

    @property
    def vendor(self) -> Gcp:
        return self.lab.gcp

    def test_a_token_for_another_organization_is_refused(self) -> None:
        auth = self.lab.gcp.fake.auth
        right, auth.organization = auth.organization, "another-organization"
        try:
            found = self.site.verify("gcp")
        finally:
            auth.organization = right
        assert not found["ok"]
