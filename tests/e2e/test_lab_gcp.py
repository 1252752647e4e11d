"""Google Cloud in the lab: real google-cloud-compute against our fake, real Ray on hosts that booted from their
start-up script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.docs.test_run import run_page
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

    def test_the_commands_of_its_page(self) -> None:
        """From an empty project to a job and back, with ``verify --launch``."""
        try:
            run_page("how-to/gcp.md", self.stack.env, self._apply)
            self.await_nothing()
        finally:
            self.stack.cli("cloud", "delete", "prod-gcp")

    def _apply(self, folder: Path) -> None:
        """In place of ``terraform apply`` and ``output``: the lab has no Terraform. Its project already has a network,
        accounts and a bucket. It trusts whom the template names."""
        defaults = r'variable "(\w+)" \{(?:(?!\n\}).)*?\n  default +=\s"(.*?)"\n'
        told = dict(re.findall(defaults, (folder / "main.tf").read_text(), re.DOTALL))
        config = self.lab.gcp.config
        assert (told["project"], told["region"], told["name"]) == (config["project"], config["region"], "prod-gcp")
        keys = self.site.call("GET", "/.well-known/jwks.json").json()
        self.lab.gcp.trust(told["issuer"], told["subject"].rpartition(":")[2], keys)
        cloud = {"name": "prod-gcp", "provider": "gcp", "config": config}
        (folder / "cloud.yaml").write_text(yaml.safe_dump(cloud))
