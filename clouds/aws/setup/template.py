"""The CloudFormation template of ``cloud setup``: ``cloudformation.yaml`` of this folder, with the policies of
``clouds.aws.setup.rights`` in it, word by word.

A policy is written for a config whose ids are stand-ins, which then become references to the stack's resources.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from clouds.aws.setup import rights
from clouds.checklist import SERVE_PORTS
from heliostat.models.clouds import AwsConfig, AwsSubnet, Trust

FILE = Path(__file__).with_name("cloudformation.yaml")
_ACCOUNT, _REGION = "000000000001", "zz-standin-1"
_ROLE, _MACHINE_ROLE = f"arn:aws:iam::{_ACCOUNT}:role/control-plane", f"arn:aws:iam::{_ACCOUNT}:role/machines"
_CERTIFICATE = f"arn:aws:acm:{_REGION}:{_ACCOUNT}:certificate/stand-in"
_PRINCIPAL = f"arn:aws:iam::{_ACCOUNT}:role/principal"
_SUBNETS = ("subnet-0000000a", "subnet-0000000b")
_REFERENCES = {  # longer ones first: the first three have the others in them
    _ROLE: "${ControlPlaneRole.Arn}",
    _MACHINE_ROLE: "${MachineRole.Arn}",
    _PRINCIPAL: "${ControlPlanePrincipal}",
    _CERTIFICATE: "${CertificateArn}",
    "arn:aws:": "arn:${AWS::Partition}:",
    _ACCOUNT: "${AWS::AccountId}",
    _REGION: "${AWS::Region}",
    _SUBNETS[0]: "${MachinesAId}",
    _SUBNETS[1]: "${MachinesBId}",
    "sg-00000000": "${MachineGroup.GroupId}",
    "stand-in-profile": "${MachineProfile}",
    "stand-in-bucket": "${Bucket}",
}
_CHOSEN = {  # made by the stack, or named to it
    "MachinesAId": {"Fn::If": ["OwnVpc", {"Ref": "MachinesA"}, {"Ref": "ExistingMachinesA"}]},
    "MachinesBId": {"Fn::If": ["OwnVpc", {"Ref": "MachinesB"}, {"Ref": "ExistingMachinesB"}]},
}


def cloudformation(trust: Trust, region: str, name: str) -> str:
    """YAML for a person to read and deploy. Its output ``CloudYaml`` is what ``cloud register -f`` takes.

    Args:
        trust: whom the role trusts; without ``aws_principal`` it is a parameter that must be given.
        region: for the defaults of zones; the stack may be elsewhere.
        name: of the cloud.
    """
    full = _config(trust)
    bare = full.model_copy(update={"balancer_subnets": [], "balancer_certificate": None})
    always = {s["Sid"] for s in rights.role_policy(bare, trust.installation_id, _MACHINE_ROLE)["Statement"]}
    policy = rights.role_policy(full, trust.installation_id, _MACHINE_ROLE)
    policy = policy | {"Statement": [_only_if_wanted(s, always) for s in policy["Statement"]]}
    default = "" if trust.aws_principal is None else f'    Default: "{trust.aws_principal}"'
    values = {
        "NAME": name,
        "STACK": stack_name(name),
        "REGION": region,
        "EXTERNAL_ID": trust.external_id,
        "SERVE_HTTP": str(SERVE_PORTS[0]),
        "SERVE_GRPC": str(SERVE_PORTS[1]),
        "PRINCIPAL_DEFAULT": default,
        "MACHINE_POLICY": _yaml(rights.node_policy(full), 8),
        "CONTROL_PLANE_POLICY": _yaml(policy, 8),
        "TRUST_POLICY": _yaml(rights.trust_policy(_PRINCIPAL, trust.external_id), 8),
    }
    text = re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], FILE.read_text())
    return re.sub(r"\n\n\n+", "\n\n", text)


def stack_name(name: str) -> str:
    """Of a cloud's stack: letters, digits and dashes."""
    return f"heliostat-{re.sub('[^A-Za-z0-9-]', '-', name)}"


def _config(trust: Trust) -> AwsConfig:
    return AwsConfig(
        region=_REGION,
        role_arn=_ROLE,
        external_id=trust.external_id,
        vpc_id="vpc-00000000",
        subnets=[AwsSubnet(id=subnet, zone="stand-in") for subnet in _SUBNETS],
        security_groups=["sg-00000000"],
        instance_profile="stand-in-profile",
        bucket="stand-in-bucket",
        balancer_subnets=["of", "balancers"],
        balancer_certificate=_CERTIFICATE,
    )


def _only_if_wanted(statement: dict[str, Any], always: set[str]) -> dict[str, Any]:
    if statement["Sid"] in always:
        return statement
    condition = "WithCertificate" if statement["Sid"] == "LookAtCertificate" else "WithServices"
    return {"Fn::If": [condition, statement, {"Ref": "AWS::NoValue"}]}


def _yaml(policy: rights.Policy, indent: int) -> str:
    lines = yaml.safe_dump(_referring(policy), sort_keys=False, width=110).splitlines()
    return "\n".join(" " * indent + line for line in lines)


def _referring(value: Any) -> Any:
    """The same with references in place of stand-ins."""
    if isinstance(value, dict):
        return {key: _referring(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_referring(inner) for inner in value]
    if not isinstance(value, str):
        return value
    text = value
    for stand_in, reference in _REFERENCES.items():
        text = text.replace(stand_in, reference)
    if text == value:
        return value
    chosen = {name: choice for name, choice in _CHOSEN.items() if f"${{{name}}}" in text}
    return {"Fn::Sub": [text, chosen]} if chosen else {"Fn::Sub": text}
