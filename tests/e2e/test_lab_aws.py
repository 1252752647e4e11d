"""AWS in the lab: real boto3 against moto, real Ray on hosts that booted from user-data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.clouds.aws.setup.test_template import parsed
from tests.docs.test_run import run_page
from tests.lab.aws import Aws
from tests.lab.scenarios import OnACloud, one_node

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(600)]


class TestAws(OnACloud):
    cloud = "aws"

    @property
    def vendor(self) -> Aws:
        return self.lab.aws

    def test_a_wrong_external_id_is_refused(self) -> None:
        right = self.site.trust()["external_id"]
        config = self.lab.aws.account.config.model_dump(mode="json") | {"external_id": f"{right}-wrong"}
        answer = self.site.call("POST", "/v1/clouds", {"name": "theirs", "provider": "aws", "config": config})
        assert answer.status_code == 422
        assert answer.json()["field"] == "config.external_id"

        self.lab.aws.trust("another-organization")  # the account's owner has changed the role
        try:
            found = self.site.verify("aws")
        finally:
            self.lab.aws.trust(right)
        assert not found["ok"]
        failed = [c for c in found["checks"] if c["state"] == "failed"]
        assert any("external id" in f"{c['detail']} {c['remedy']}" for c in failed), failed

    def test_the_commands_of_its_page(self) -> None:
        """From an empty account to a job and back, with CloudFormation and ``verify --launch``."""
        try:
            run_page("how-to/aws.md", self.stack.env, self._deploy)
            self.await_nothing()
        finally:
            self.stack.cli("cloud", "set-default", "local")
            self.stack.cli("cloud", "delete", "prod")

    def _deploy(self, folder: Path) -> None:
        """As ``aws cloudformation deploy`` and ``describe-stacks`` do."""
        template = folder / "heliostat-prod.cloudformation.yaml"
        account = self.lab.aws.account
        a, b = (subnet.id for subnet in account.config.subnets)
        # In the VPC whose addresses the lab has.
        given = {"ExistingVpc": account.config.vpc_id, "ExistingMachinesA": a, "ExistingMachinesB": b}
        given |= {"ExistingPublicA": a, "ExistingPublicB": b}
        client = account.client("cloudformation")
        client.create_stack(
            StackName="heliostat-prod",
            TemplateBody=json.dumps(parsed(template.read_text())),  # moto misreads YAML's short forms
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
        )
        (made,) = client.describe_stacks(StackName="heliostat-prod")["Stacks"]
        cloud = yaml.safe_load(made["Outputs"][0]["OutputValue"])
        cloud["config"]["image"] = account.config.image  # moto has no Amazon Linux here
        (folder / "cloud.yaml").write_text(yaml.safe_dump(cloud))

    def test_a_container_image_is_run_by_docker(self) -> None:
        """By the lab's shim, which runs what it is told to on the host."""
        cloud = self.site.register_aws("aws-image", container_image="rayproject/ray:2.60.0-py311")
        try:
            made = self.stack.ask(
                *("cluster", "create", "-n", "in-docker"),
                *("-f", self.stack.config_file(one_node() | {"cloud": "aws-image"})),
            )
            self.stack.await_cluster(made["id"], "RUNNING", timeout=240)
            (head,) = self.hosts_of(made["id"])
            assert "docker run --rm --network host" in head.console()
            self.stack.cli("cluster", "terminate", "in-docker", "--wait")
            self.await_nothing()
        finally:
            self.site.call("DELETE", f"/v1/clouds/{cloud['id']}")
