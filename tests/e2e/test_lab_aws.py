"""AWS in the lab: real boto3 against moto, real Ray on hosts that booted from user-data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.clouds.aws.setup.test_template import parsed
from tests.clouds.aws.support import REGION
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

    def test_setup_register_verify_and_submit(self, tmp_path: Path) -> None:
        """From an empty account to a job, as docs/clouds.md says, with CloudFormation and verify --launch."""
        setup = ("cloud", "setup", "--provider", "aws", "--region", REGION, "--name", "prod", "--dir", str(tmp_path))
        told = self.stack.ask(*setup)
        (template,) = told["files"]
        account = self.lab.aws.account
        a, b = (subnet.id for subnet in account.config.subnets)
        # In the VPC whose addresses the lab has.
        given = {"ExistingVpc": account.config.vpc_id, "ExistingMachinesA": a, "ExistingMachinesB": b}
        given |= {"ExistingPublicA": a, "ExistingPublicB": b}
        client = account.client("cloudformation")
        client.create_stack(
            StackName="heliostat-prod",
            TemplateBody=json.dumps(parsed(Path(template).read_text())),  # moto misreads YAML's short forms
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
        )
        (made,) = client.describe_stacks(StackName="heliostat-prod")["Stacks"]
        cloud = yaml.safe_load(made["Outputs"][0]["OutputValue"])
        cloud["config"]["image"] = account.config.image  # moto has no Amazon Linux here
        file = tmp_path / "cloud.yaml"
        file.write_text(yaml.safe_dump(cloud))

        registered = self.stack.cli("cloud", "register", "-f", str(file))
        assert registered.returncode == 0, registered.stdout + registered.stderr
        verified = self.stack.cli("cloud", "verify", "prod", "--launch", timeout=240)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        print(verified.stdout)
        job = self.stack.submit("echo hello from prod", options=("--cloud", "prod"))
        self.stack.await_job(job, "SUCCEEDED", timeout=240)
        assert "hello from prod" in self.stack.log(job)
        self.await_nothing()
        self.stack.cli("cloud", "delete", "prod")

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
