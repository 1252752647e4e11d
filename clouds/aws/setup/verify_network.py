"""Subnets, routes and security groups: whether machines go up there, and reach each other and us."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from clouds.aws.account.session import AwsSession
from clouds.checklist import SERVE_PORTS, Checklist, address_of
from heliostat.models.clouds import AwsConfig

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import (
        FilterTypeDef,
        IpPermissionOutputTypeDef,
        RouteTableTypeDef,
        RouteTypeDef,
        SecurityGroupTypeDef,
        SubnetTypeDef,
    )

FEW_ADDRESSES = 16
BALANCER_ADDRESSES = 8
"""That ELB needs free in each subnet of an ALB."""
EVERYWHERE = "0.0.0.0/0"
_TARGETS = (
    "NatGatewayId", "TransitGatewayId", "GatewayId", "NetworkInterfaceId", "InstanceId", "VpcPeeringConnectionId",
    "LocalGatewayId", "CarrierGatewayId", "CoreNetworkArn", "EgressOnlyInternetGatewayId",
)  # fmt: skip
"""Of a route: one of these says where it leads."""


def looked_at(found: Checklist, session: AwsSession, config: AwsConfig, api_url: str) -> None:
    """Filters, not ids: by id, one unknown to EC2 would fail the whole call."""
    ids = sorted({*(s.id for s in config.subnets), *config.balancer_subnets})
    groups = sorted({*config.security_groups, *config.balancer_security_groups})

    def ask_subnets() -> dict[str, SubnetTypeDef]:
        answer = session.pages("ec2", "DescribeSubnets", "Subnets", Filters=[_filter("subnet-id", *ids)])
        return {subnet["SubnetId"]: subnet for subnet in answer}

    def ask_routes() -> list[RouteTableTypeDef]:
        return list(
            session.pages("ec2", "DescribeRouteTables", "RouteTables", Filters=[_filter("vpc-id", config.vpc_id)])
        )

    def ask_groups() -> dict[str, SecurityGroupTypeDef]:
        answer = session.pages(
            "ec2", "DescribeSecurityGroups", "SecurityGroups", Filters=[_filter("group-id", *groups)]
        )
        return {group["GroupId"]: group for group in answer}

    subnets = found.ask("subnets", ask_subnets, needed=False)
    if subnets is not None:
        tables = found.ask("routes", ask_routes, needed=False)
        for wanted in config.subnets:
            _subnet(found, config, wanted.id, wanted.zone, subnets.get(wanted.id), tables, api_url)
        if config.balancer_subnets:
            _balancer_subnets(found, config, subnets, tables)
    held = found.ask("security groups", ask_groups, needed=False)
    if held is not None:
        _groups(found, config, held)


def _filter(name: str, *values: str) -> FilterTypeDef:
    return {"Name": name, "Values": list(values)}


# -- subnets


def _subnet(
    found: Checklist,
    config: AwsConfig,
    subnet_id: str,
    zone: str,
    subnet: SubnetTypeDef | None,
    tables: list[RouteTableTypeDef] | None,
    api_url: str,
) -> None:
    name = f"subnet {subnet_id}"
    wrong = _not_as_written(config, subnet)
    if subnet is None or wrong:
        found.fail(name, wrong, "Correct the cloud's subnets.")
        return
    if subnet["AvailabilityZone"] != zone:
        found.fail(
            name, f"It is in {subnet['AvailabilityZone']}, not in {zone}.", f"Write zone: {subnet['AvailabilityZone']}."
        )
        return
    free = subnet["AvailableIpAddressCount"]
    if free == 0:
        found.fail(name, "It is full: no address is free.", "End what is not needed there, or name another subnet.")
        return
    said = f"{zone}, {subnet['CidrBlock']}, {free} addresses free"
    if tables is not None:
        out, problem, remedy = way_out(subnet, _routes(tables, subnet_id), api_url)
        if problem:
            found.fail(name, problem, remedy)
            return
        said += f", out {out}"
    if free < FEW_ADDRESSES:
        found.warn(name, f"{said}: room for that many machines.", "Name a larger subnet beside it.")
    else:
        found.ok(name, f"{said}.")


def _not_as_written(config: AwsConfig, subnet: SubnetTypeDef | None) -> str:
    if subnet is None:
        return f"There is no such subnet in region {config.region}, or it is another account's."
    if subnet["VpcId"] != config.vpc_id:
        return f"It is of {subnet['VpcId']}, not of {config.vpc_id}."
    return "" if subnet["State"] == "available" else f"It is {subnet['State']}."


def _routes(tables: list[RouteTableTypeDef], subnet_id: str) -> list[RouteTypeDef]:
    """Of its own table, or of the VPC's main one."""
    tied = [(a, table) for table in tables for a in table.get("Associations", [])]
    own = next((table for a, table in tied if a.get("SubnetId") == subnet_id), None)
    main = next((table for a, table in tied if a.get("Main")), None)
    table = own or main
    return table.get("Routes", []) if table is not None else []


def way_out(subnet: SubnetTypeDef, routes: list[RouteTypeDef], api_url: str) -> tuple[str, str, str]:
    """How its machines reach the API: (by what, "", ""), or ("", why not, what to do)."""
    default = next((r for r in routes if r.get("DestinationCidrBlock") == EVERYWHERE), None)
    if default is None:
        private = _private_way(routes, api_url)
        if private:
            return private, "", ""
        return (
            "",
            f"Its machines have no route to the control plane ({api_url}): no default route, and none to that address.",
            f"Route {EVERYWHERE} to a NAT gateway or transit gateway, or give the API an endpoint in the VPC.",
        )
    given = {key: str(value) for key, value in default.items() if value}
    target = next((given[key] for key in _TARGETS if key in given), "")
    if default.get("State") == "blackhole":
        return "", f"Its default route leads to {target}, which is gone (a black hole).", "Fix the route."
    if target.startswith("igw-") and not subnet.get("MapPublicIpOnLaunch"):
        return (
            "",
            f"Its default route leads to {target}, but machines get no public address there: "
            "no answer can return to the control plane.",
            "Turn on auto-assignment of public addresses in the subnet, or route through a NAT gateway.",
        )
    return f"by {target}", "", ""


def _private_way(routes: list[RouteTypeDef], api_url: str) -> str:
    """The route that holds the API's address."""
    for address in _addresses(api_url):
        for route in routes:
            block = route.get("DestinationCidrBlock")
            if block and route.get("State") != "blackhole" and address in ipaddress.ip_network(block):
                return f"to us by {block}"
    return ""


def _addresses(url: str) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses of the URL's host, as this host resolves it; a name may mean another address in the VPC."""
    given = address_of(url)
    try:
        addresses = [given] if given else [info[4][0] for info in socket.getaddrinfo(urlsplit(url).hostname, None)]
    except OSError:
        return []
    return [a for a in (ipaddress.ip_address(str(one)) for one in addresses) if isinstance(a, ipaddress.IPv4Address)]


def _balancer_subnets(
    found: Checklist, config: AwsConfig, subnets: dict[str, SubnetTypeDef], tables: list[RouteTableTypeDef] | None
) -> None:
    name, remedy = "load balancers' subnets", "Correct the cloud's balancer_subnets."
    wrong = [f"{i}: {why}" for i in config.balancer_subnets if (why := _not_as_written(config, subnets.get(i)))]
    if wrong:
        found.fail(name, " ".join(wrong), remedy)
        return
    zones = sorted({subnets[i]["AvailabilityZone"] for i in config.balancer_subnets})
    full = [i for i in config.balancer_subnets if subnets[i]["AvailableIpAddressCount"] < BALANCER_ADDRESSES]
    inside = [
        i
        for i in config.balancer_subnets
        if tables is not None and not config.balancer_internal and not _to_the_internet(_routes(tables, i))
    ]
    if len(zones) < 2 or len(zones) < len(config.balancer_subnets):
        found.fail(name, f"They are in {', '.join(zones)}: an ALB needs two zones, and one subnet in each.", remedy)
    elif full:
        found.fail(name, f"Fewer than {BALANCER_ADDRESSES} addresses are free in {', '.join(full)}.", remedy)
    elif inside:
        found.fail(
            name,
            f"{', '.join(inside)}: no route to an internet gateway, so endpoints could not be reached.",
            "Name public subnets, or set balancer_internal.",
        )
    else:
        found.ok(name, f"In {', '.join(zones)}.")


def _to_the_internet(routes: list[RouteTypeDef]) -> bool:
    return any(
        r.get("DestinationCidrBlock") == EVERYWHERE and str(r.get("GatewayId", "")).startswith("igw-") for r in routes
    )


# -- security groups


def _groups(found: Checklist, config: AwsConfig, held: dict[str, SecurityGroupTypeDef]) -> None:
    for group_id in dict.fromkeys([*config.security_groups, *config.balancer_security_groups]):
        name, group = f"security group {group_id}", held.get(group_id)
        if group is None:
            found.fail(name, f"There is no such group in region {config.region}.", "Correct the cloud's config.")
        elif group["VpcId"] != config.vpc_id:
            found.fail(name, f"It is of {group['VpcId']}, not of {config.vpc_id}.", "Name a group of the cloud's VPC.")
        else:
            found.ok(name, group.get("GroupName", ""))
    machines = [held[i] for i in config.security_groups if i in held]
    if len(machines) < len(config.security_groups):
        found.behind("security group", "machines among themselves", "machines outwards", "machines from outside")
        return
    ours = set(config.security_groups)
    _among_themselves(found, machines, ours)
    _outwards(found, machines)
    _from_outside(found, machines)
    if config.balancer_subnets:
        _from_balancers(found, machines, set(config.balancer_security_groups))


def _among_themselves(found: Checklist, machines: list[SecurityGroupTypeDef], ours: set[str]) -> None:
    name = "machines among themselves"
    if any(rule["IpProtocol"] == "-1" and ours & _sources(rule) for rule in _inbound(machines)):
        found.ok(name, "All traffic.")
    else:
        found.fail(
            name,
            "No group of the machines allows all traffic from the machines: Ray's nodes cannot join their head.",
            f"Add to {sorted(ours)[0]} an inbound rule for all traffic from itself.",
        )


def _outwards(found: Checklist, machines: list[SecurityGroupTypeDef]) -> None:
    name = "machines outwards"
    rules = [rule for group in machines for rule in group.get("IpPermissionsEgress", [])]
    if any(_covers(rule, 443) and _blocks(rule) for rule in rules):
        found.ok(name, "HTTPS, at least.")
    else:
        found.fail(
            name,
            "No group of the machines lets HTTPS out to any address.",
            "Add an outbound rule for TCP 443 to the API, the bucket and where images and packages come from.",
        )


def _from_outside(found: Checklist, machines: list[SecurityGroupTypeDef]) -> None:
    """Nothing of ours calls a machine; load balancers come by their group."""
    name = "machines from outside"
    opened = [r for r in _inbound(machines) if {EVERYWHERE, "::/0"} & _blocks(r)]
    if opened:
        ports = ", ".join(sorted({_ports(rule) for rule in opened}))
        found.warn(
            name, f"Machines are open to the internet ({ports}).", "Remove the rule: Heliostat does not need it."
        )
    else:
        found.ok(name, "Not open to the internet.")


def _from_balancers(found: Checklist, machines: list[SecurityGroupTypeDef], balancers: set[str]) -> None:
    name = "load balancers to machines"
    if not balancers:
        found.fail(name, "The cloud has no balancer_security_groups.", "Name one, and let it reach the machines.")
        return
    lacking = [
        port
        for port in SERVE_PORTS
        if not any(_covers(rule, port) and balancers & _sources(rule) for rule in _inbound(machines))
    ]
    if lacking:
        found.fail(
            name,
            f"No rule lets the load balancers reach the machines' ports {', '.join(map(str, lacking))}.",
            f"Add to the machines' group an inbound rule for TCP {SERVE_PORTS[0]}-{SERVE_PORTS[-1]} from "
            f"{sorted(balancers)[0]}.",
        )
    else:
        found.ok(name, f"TCP {' and '.join(map(str, SERVE_PORTS))}.")


def _inbound(groups: list[SecurityGroupTypeDef]) -> list[IpPermissionOutputTypeDef]:
    return [rule for group in groups for rule in group.get("IpPermissions", [])]


def _sources(rule: IpPermissionOutputTypeDef) -> set[str]:
    return {pair["GroupId"] for pair in rule.get("UserIdGroupPairs", [])}


def _blocks(rule: IpPermissionOutputTypeDef) -> set[str]:
    return {r["CidrIp"] for r in rule.get("IpRanges", [])} | {r["CidrIpv6"] for r in rule.get("Ipv6Ranges", [])}


def _covers(rule: IpPermissionOutputTypeDef, port: int) -> bool:
    protocol = str(rule["IpProtocol"])
    return protocol == "-1" or (protocol == "tcp" and port in range(rule.get("FromPort", 0), rule["ToPort"] + 1))


def _ports(rule: IpPermissionOutputTypeDef) -> str:
    if rule["IpProtocol"] == "-1":
        return "all ports"
    first, last = rule.get("FromPort"), rule.get("ToPort")
    return f"{rule['IpProtocol']} {first if first == last else f'{first}-{last}'}"
