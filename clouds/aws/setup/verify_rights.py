"""Rights of the assumed role, checked without using them: simulated, or by a dry run of a launch."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

from clouds.aws.account.session import AwsSession
from clouds.aws.machines import instances
from clouds.aws.machines.images import Image
from clouds.aws.machines.retained import RetainedStore
from clouds.aws.setup import rights
from clouds.checklist import Checklist
from clouds.contract.machines import MachineSpec
from clouds.contract.retained import RetainedResources
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig, AwsSubnet
from heliostat.models.clusters import NodeRole

SIMULATED = (
    "EndOurs",
    "ServiceLinkedRoles",
    "MakeBalancers",
    "TagBalancersAsTheyAreMade",
    "ChangeBalancers",
    "ChangeRules",
)
"""Statements of ``rights.role_policy`` that nothing harmless tries."""


_RETAINED = RetainedResources(volume_gib=1, mount_path="/mnt/head", address=True)


def add_to_role(statements: list[dict[str, Any]]) -> str:
    lines = " and ".join(json.dumps(statement) for statement in statements)
    return f"Add to the policy of the role that the control plane assumes: {lines}"


def looked_at(found: Checklist, session: AwsSession, config: AwsConfig, policy: rights.Policy) -> None:
    """Those that describe are used; those that change are simulated."""
    _describes(found, session, config)
    _simulated(found, session, policy)


def _describes(found: Checklist, session: AwsSession, config: AwsConfig) -> None:
    asked: list[tuple[str, Any]] = [
        ("ec2:DescribeInstances", lambda: session.call("ec2", "DescribeInstances", MaxResults=5)),
    ]
    if config.balancer_subnets:
        asked += [
            (
                "elasticloadbalancing:DescribeLoadBalancers",
                lambda: session.call("elbv2", "DescribeLoadBalancers", PageSize=1),
            ),
            (
                "elasticloadbalancing:DescribeTargetGroups",
                lambda: session.call("elbv2", "DescribeTargetGroups", PageSize=1),
            ),
        ]
        asked += [(action, _pretend(session, action)) for action in rights.ASKED_BY_ELB]
    for action, ask in asked:
        if found.ask(f"right {action}", ask) is not None:
            found.ok(f"right {action}")


def _pretend(session: AwsSession, action: str) -> Callable[[], bool]:
    service, _, operation = action.partition(":")
    return lambda: _pretended(lambda: session.call(service, operation, None, DryRun=True))


def _simulated(found: Checklist, session: AwsSession, policy: rights.Policy) -> None:
    """One line for each action, of all statements that grant it together."""
    missing: dict[str, list[dict[str, Any]]] = {}
    for statement in policy["Statement"]:
        if statement["Sid"] not in SIMULATED:
            continue
        try:
            refused = _refused(session, statement)
        except CloudError as e:
            remedy = add_to_role(rights.granting(policy, "iam:SimulatePrincipalPolicy"))
            names = sorted({a for s in policy["Statement"] if s["Sid"] in SIMULATED for a in s["Action"]})
            for action in names:
                found.skip(f"right {action}", f"It cannot be simulated: {e.message}", remedy)
            return
        for action in statement["Action"]:
            missing.setdefault(action, [])
            if action in refused:
                missing[action].append({**statement, "Action": [action]})
    for action, statements in sorted(missing.items()):
        if statements and statements[0]["Sid"] == "ServiceLinkedRoles":
            found.warn(
                f"right {action}",
                "An account's first spot machine and load balancer want roles of AWS's own; this one cannot make them.",
                add_to_role(statements),
            )
        elif statements:
            found.fail(f"right {action}", f"The role's policies do not allow {action}.", add_to_role(statements))
        else:
            found.ok(f"right {action}", "By simulation.")


def _refused(session: AwsSession, statement: dict[str, Any]) -> set[str]:
    """Actions of a statement that the role may not do on its resources, with the tags of its condition."""
    resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
    conditions = statement.get("Condition", {})
    context = [
        {
            "ContextKeyName": key,
            "ContextKeyType": "string",
            "ContextKeyValues": [value[0] if isinstance(value, list) else value],
        }
        for tests in conditions.values()
        for key, value in tests.items()
    ]
    results = session.pages(
        "iam",
        "SimulatePrincipalPolicy",
        "EvaluationResults",
        session.role_arn,
        PolicySourceArn=session.role_arn,
        ActionNames=statement["Action"],
        ResourceArns=[resource.replace("*", "0") for resource in resources],
        ContextEntries=context,
    )
    return {
        result["EvalActionName"]
        for result in results
        if result["EvalDecision"] != "allowed"
        or any(one["EvalResourceDecision"] != "allowed" for one in result.get("ResourceSpecificResults", []))
    }


def launches(
    found: Checklist, session: AwsSession, config: AwsConfig, installation_id: str, image: Image | None
) -> None:
    """A launch into each subnet, as a node's would be, which EC2 only pretends: that takes the rights to run, tag and
    pass the machines' role, and the things that it names."""
    for subnet in config.subnets:
        name = f"launch in {subnet.id}"
        if image is None:
            found.behind("image", name)
            continue
        if found.failed(f"subnet {subnet.id}"):
            found.behind(f"subnet {subnet.id}", name)
            continue
        request = instances.request(config, _spec(installation_id), subnet.id, image, config.instance_type, {})

        def ask(request: dict[str, Any] = request) -> bool:
            return _pretended(lambda: session.call("ec2", "RunInstances", None, DryRun=True, **request))

        if found.ask(name, ask):
            found.ok(name, f"EC2 would launch a {config.instance_type} with our tags and the machines' role.")
        _keeps(found, session, config, installation_id, subnet)


def _keeps(found: Checklist, session: AwsSession, config: AwsConfig, installation_id: str, subnet: AwsSubnet) -> None:
    """What heads may keep there."""
    retained, spec = RetainedStore(config, session, installation_id, {}), _spec(installation_id)
    name = f"volume and address of a head in {subnet.id}"

    def pretended() -> bool:
        for ask in (
            lambda: session.call(
                "ec2", "CreateVolume", None, DryRun=True, **retained.volume_request(spec, _RETAINED, subnet)
            ),
            lambda: session.call(
                "ec2", "CreateNetworkInterface", None, DryRun=True, **retained.interface_request(spec, subnet)
            ),
        ):
            _pretended(ask)
        return True

    if found.ask(name, pretended):
        found.ok(name, "EC2 would make them with our tags.")


def _pretended(ask: Callable[[], Any]) -> bool:
    """That EC2 would do it, which it says by an error."""
    try:
        ask()
    except CloudError as e:
        if e.details.get("code") != "DryRunOperation":
            raise
    return True


def _spec(installation_id: str) -> MachineSpec:
    return MachineSpec(
        token=str(uuid.uuid4()),
        cluster_id="heliostat-verify",
        node_id="heliostat-verify",
        generation=0,
        role=NodeRole.HEAD,
        installation_id=installation_id,
        user_data="#!/bin/sh\n",
    )
