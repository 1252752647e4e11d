"""AWS and Google Cloud as this installation uses them: what is registered becomes machines, bucket and load balancer.

With ``installation.py`` the only place that joins them. Their libraries are loaded when the first cloud of theirs
is opened: they cost 150 MB and seconds, and most processes need none or one of them.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from clouds.aws.machines.catalogue import of as aws_types  # load no vendor's library
from clouds.gcp.machines.catalogue import of as gcp_types
from clouds.registry import OpenCloud, Registered
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig, Capabilities, Check, CloudSetup, GcpConfig, Provider, SetupFiles, Trust
from runtime.keys import Keys
from runtime.settings import Settings
from runtime.telemetry import traced

if TYPE_CHECKING:
    from clouds.aws.account.identity import Principal
    from clouds.aws.account.session import AwsSession
    from clouds.gcp.account.oidc import Issuer
    from clouds.gcp.account.session import Sessions

log = structlog.get_logger(__name__)

ORGANIZATION_TAG = "heliostat-organization"


class InstalledVendors:
    """``clouds.registry.Vendors``, and what opens registered clouds. Safe between threads.

    Args:
        settings: ``home`` holds the issuer's key (``oidc.key``, 0600); ``public_api_url`` is the issuer's URL.
        keys: make the external ids and the installation's id.
    """

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings, self._keys = settings, keys
        self._installation_id, self._api_url = keys.installation_id(), settings.public_api_url
        self._lock = threading.Lock()
        self._aws_sessions: dict[tuple[str, str, str], AwsSession] = {}

    def open(self, registered: Registered) -> OpenCloud:
        """Calls nobody. Raises whatever the vendor's classes raise for a config that they cannot use."""
        assert registered.cloud is not None
        config = registered.cloud.config
        if isinstance(config, AwsConfig):
            return self._aws(registered, config)
        if isinstance(config, GcpConfig):
            return self._gcp(registered, config)
        raise CloudError(f"Cloud {registered.name} is not one of a vendor.")

    def trust(self, organization_id: str) -> Trust:
        us = self._aws_principal()
        return Trust(
            installation_id=self._installation_id,
            external_id=self._keys.external_id(organization_id),
            aws_principal=None if us is None else us.arn,
            aws_principal_whole=us is None or us.whole,
            issuer=self._api_url.rstrip("/"),
            subject=f"heliostat:{self._installation_id}:{organization_id}",
        )

    def setup(self, organization_id: str, request: CloudSetup) -> SetupFiles:
        trust = self.trust(organization_id)
        if request.provider is Provider.AWS:
            from clouds.aws.setup.template import cloudformation

            return _aws_files(request, trust, cloudformation(trust, request.region, request.name))
        from clouds.gcp.setup.template import terraform

        assert request.project is not None
        return _gcp_files(request, terraform(trust, project=request.project, region=request.region, name=request.name))

    def capabilities(self, config: AwsConfig | GcpConfig) -> Capabilities:
        if isinstance(config, AwsConfig):
            from clouds.aws.machines.ec2 import AwsMachines

            aws = aws_types(self._settings.home)
            return AwsMachines(config, self._aws_session(config), self._installation_id, types=aws).capabilities()
        from clouds.gcp.machines.compute_engine import GcpMachines

        session = self._gcp_sessions.get(config, "")
        gcp = gcp_types(self._settings.home)
        return GcpMachines(config, session, self._installation_id, types=gcp).capabilities()

    def openid_configuration(self) -> dict[str, Any]:
        return self._issuer.discovery()

    def jwks(self) -> dict[str, Any]:
        return self._issuer.jwks()

    # -- AWS

    def _aws(self, registered: Registered, config: AwsConfig) -> OpenCloud:
        from clouds.aws.balancer.alb import AwsBalancer
        from clouds.aws.bucket import AwsBucket
        from clouds.aws.machines.ec2 import AwsMachines

        session, organization = self._aws_session(config), registered.organization_id
        tags, types = {ORGANIZATION_TAG: organization}, aws_types(self._settings.home)
        machines = AwsMachines(config, session, self._installation_id, tags=tags, types=types)

        def check() -> list[Check]:
            from clouds.aws.setup.verify import checks

            return checks(session, config, installation_id=self._installation_id, api_url=self._api_url)

        return OpenCloud(
            name=registered.name,
            machines=traced(machines, registered.name, self._settings),
            bucket=AwsBucket(config, session, f"{organization}/"),
            balancer=traced(AwsBalancer(config, session), registered.name, self._settings),
            verify=check,
        )

    def _aws_session(self, config: AwsConfig) -> AwsSession:
        """One for each role and region: they cost memory, and share the role's credentials."""
        from clouds.aws.account.session import AwsSession

        key = (config.role_arn, config.external_id, config.region)
        with self._lock:
            if key not in self._aws_sessions:
                endpoint = self._settings.aws_endpoint_url or None
                self._aws_sessions[key] = AwsSession(config, self._installation_id, endpoint_url=endpoint)
            return self._aws_sessions[key]

    def _aws_principal(self) -> Principal | None:
        from clouds.aws.account.identity import principal

        return principal(self._settings.aws_endpoint_url or None)

    # -- Google

    def _gcp(self, registered: Registered, config: GcpConfig) -> OpenCloud:
        from clouds.gcp.balancer.load_balancing import GcpBalancer
        from clouds.gcp.bucket.bucket import GcpBucket
        from clouds.gcp.machines.compute_engine import GcpMachines

        organization = registered.organization_id
        session = self._gcp_sessions.get(config, organization)
        tags, types = {ORGANIZATION_TAG: organization}, gcp_types(self._settings.home)
        machines = GcpMachines(config, session, self._installation_id, tags=tags, types=types)
        bucket = GcpBucket(config, session, f"{organization}/")

        def check() -> list[Check]:
            from clouds.gcp.setup.verify import checks

            return checks(session, config, installation_id=self._installation_id, api_url=self._api_url)

        return OpenCloud(
            name=registered.name,
            machines=traced(machines, registered.name, self._settings),
            bucket=bucket,
            balancer=traced(GcpBalancer(config, session), registered.name, self._settings),
            verify=check,
        )

    @functools.cached_property
    def _gcp_sessions(self) -> Sessions:
        from clouds.gcp.account.session import Endpoints, Sessions

        url = self._settings.gcp_endpoint_url
        return Sessions(self._issuer, self._installation_id, Endpoints.fake(url.rstrip("/")) if url else Endpoints())

    @functools.cached_property
    def _issuer(self) -> Issuer:
        from clouds.gcp.account.oidc import Issuer, load_or_create_key

        home: Path = self._settings.home
        return Issuer(self._api_url, load_or_create_key(home / "oidc.key"))


def _aws_files(request: CloudSetup, trust: Trust, template: str) -> SetupFiles:
    from clouds.aws.setup.template import stack_name

    file, stack = f"heliostat-{request.name}.cloudformation.yaml", stack_name(request.name)
    query = "Stacks[0].Outputs[?OutputKey=='CloudYaml'].OutputValue"
    step = f"""\
Read {file}, then make its stack and register what it made:

  aws cloudformation deploy --region {request.region} --stack-name {stack} \\
    --template-file {file} --capabilities CAPABILITY_NAMED_IAM
  aws cloudformation describe-stacks --region {request.region} --stack-name {stack} \\
    --query "{query}" --output text > cloud.yaml
  heliostat cloud register -f cloud.yaml"""
    if not trust.aws_principal_whole:
        role = str(trust.aws_principal).rpartition("/")[2]
        step += f"""

Check one thing first: the template trusts {trust.aws_principal}, the control plane's own role.
AWS did not tell its path, and takes no policy that names a role without it. In the control plane's account

  aws iam get-role --role-name {role} --query Role.Arn --output text

tells it; if it is another one, add --parameter-overrides ControlPlanePrincipal=<that ARN> to the deploy. (The right
iam:GetRole on its own role lets the control plane see for itself.)"""
    elif trust.aws_principal is None:
        step += """

The control plane has no credentials of AWS yet, so the template does not say whom it trusts: add
--parameter-overrides ControlPlanePrincipal=<ARN of the identity that it will run as> to the deploy."""
    return SetupFiles(files={file: template}, next_step=step)


def _gcp_files(request: CloudSetup, template: str) -> SetupFiles:
    step = """\
Read main.tf, then apply it and register what it made:

  terraform init && terraform apply
  terraform output -raw cloud_yaml > cloud.yaml
  heliostat cloud register -f cloud.yaml"""
    return SetupFiles(files={"main.tf": template}, next_step=step)
