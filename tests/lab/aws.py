"""AWS in the lab: moto as EC2, STS, IAM, S3, ELBv2 and SSM, an account of a customer, and a host for each instance."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from moto.ec2.models.instances import Instance

from clouds.aws.setup import rights
from tests.clouds.aws import moto_plus
from tests.clouds.aws.support import REGION, Account, make_account
from tests.lab import namespaces, network
from tests.lab.balancers import Balancers
from tests.lab.fleet import Fleet
from tests.lab.fronts import albs
from tests.lab.host import Host, Identity
from tests.lab.network import GATEWAY

PORT = 5777
BALANCERS = "10.77.1"
"""The first three bytes of load balancers' addresses."""
NETWORKS = ("10.77.16.0/20", "10.77.32.0/20")
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIACONTROLPLANE0000",
    "AWS_SECRET_ACCESS_KEY": "control-plane",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""The control plane's own, of another account than the customer's."""
BOOT_S, STOP_S = 0.5, 0.5
LOOK_S = 0.05
SPOT_NOTICE_S = 120.0
"""https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html"""


class Aws:
    """``account``: the customer's, with what ``cloud setup`` would have made there."""

    LAUNCH = "RunInstances"

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._serving = moto_plus.serving(GATEWAY, PORT)
        self.url = self._serving.__enter__()
        self.knobs = moto_plus.KNOBS
        self.knobs.boot_s, self.knobs.stop_s, self.knobs.console = BOOT_S, STOP_S, self._console
        self.account: Account = make_account(self.url, NETWORKS)
        moto_plus.s3_backends[self.account.id]["aws"].create_bucket(self.account.config.bucket, REGION)
        self._backend = moto_plus.ec2_backends[self.account.id][REGION]
        self._elb = moto_plus.elbv2_backends[self.account.id][REGION]
        self._addresses: dict[str, str] = {}
        self.balancers = Balancers(lambda: albs(self._elb, self._address), self._targets_down)
        self._seen: set[str] = set()
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def close(self) -> None:
        self._closed.set()
        self._watcher.join()
        self.balancers.close()
        self._serving.__exit__(None, None, None)

    def trust(self, external_id: str, installation_id: str = "") -> None:
        """The customer's role may be assumed by who gives this external id alone, and has the rights that this
        installation needs ("": those it had)."""
        iam = moto_plus.iam_backends[self.account.id]["aws"]
        condition = {"StringEquals": {"sts:ExternalId": external_id}}
        statement = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": "*", "Condition": condition}
        document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.get_role("heliostat").assume_role_policy_document = document
        if installation_id:
            node_role = iam.get_role("heliostat-node").arn
            policy = rights.role_policy(self.account.config, installation_id, node_role)
            iam.put_role_policy("heliostat", "heliostat", json.dumps(policy))

    @property
    def environment(self) -> dict[str, str]:
        """Of a control plane in the lab."""
        return CREDENTIALS | {"HELIOSTAT_AWS_ENDPOINT_URL": self.url}

    def instances(self) -> list[Instance]:
        """That are not terminated."""
        return [i for i in self._backend.all_instances() if i._state.name != "terminated"]

    def living(self) -> list[str]:
        """Ids of machines that cost money."""
        return [i.id for i in self.instances() if i._state.name != "shutting-down"]

    # -- what may go wrong

    def fault(self, action: str, code: str, *, status: int = 400, times: float = 1, **fields: Any) -> None:
        """The next ``times`` calls of this action are refused; see ``moto_faults.Fault``."""
        self.knobs.faults.append(moto_plus.Fault(action, code, status, times=times, **fields))

    def no_capacity(self, *, times: float = 1, instance_type: str = "", zone_subnet: str = "") -> None:
        """RunInstances finds no machine: anywhere, or of a type, or in a subnet."""
        match = {"InstanceType": instance_type, "SubnetId": zone_subnet}
        wanted = {name: value for name, value in match.items() if value}
        self.fault("RunInstances", "InsufficientInstanceCapacity", status=500, times=times, match=wanted)

    def throttle(self, action: str, *, times: float = 1) -> None:
        self.fault(action, "RequestLimitExceeded", status=503, times=times)

    def lose_answer(self, action: str, *, times: float = 1) -> None:
        """The call is carried out, then its connection breaks."""
        self.fault(action, "", times=times, lost=True)

    def heal(self) -> None:
        self.knobs.faults.clear()

    def spot_notice(self, host: Host, in_s: float = SPOT_NOTICE_S) -> None:
        """AWS takes the machine back: announced now, carried out in ``in_s``."""
        host.notices.set(action_at=time.time() + in_s)

        def reclaim() -> None:
            instance = self._backend.get_instance(host.identity.id)
            if instance._state.name in ("pending", "running"):
                moto_plus.ends(instance, "Server.SpotInstanceTermination", "Spot instance termination")

        timer = threading.Timer(in_s, reclaim)
        timer.daemon = True
        timer.start()

    def take_back(self, host: Host, in_s: float = 45) -> None:
        """As AWS takes spot machines back, but for the time, of which it gives less."""
        self.spot_notice(host, in_s)

    def lose(self, host: Host) -> None:
        """Its power is cut, and EC2 knows: somebody has terminated it."""
        moto_plus.ends(self._backend.get_instance(host.identity.id), "Client.UserInitiatedShutdown", "User initiated")

    def rebalance(self, host: Host) -> None:
        """AWS recommends to leave the machine; it may never be taken back."""
        host.notices.set(rebalance_at=time.time())

    # -- machines

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            for instance in self._backend.all_instances():
                state = instance._state.name
                if state == "running" and instance.id not in self._seen:
                    self._seen.add(instance.id)
                    self._fleet.boot(self._identity(instance), self._ended)
                elif state in ("shutting-down", "terminated", "stopping", "stopped"):
                    self._fleet.power_cut(instance.id)

    def _identity(self, instance: Instance) -> Identity:
        profile = next(
            (
                a.iam_instance_profile.name
                for a in self._backend.iam_instance_profile_associations.values()
                if a.instance.id == instance.id
            ),
            "",
        )
        return Identity(
            vendor="aws",
            id=instance.id,
            ip=str(instance.private_ip),
            zone=str(instance._placement.zone),
            machine_type=instance.instance_type,
            user_data=instance.user_data.decode().encode() if instance.user_data else b"",
            account=self.account.id,
            role=profile,
            spot=instance.lifecycle == "spot",
        )

    def _ended(self, host: Host) -> None:
        """It has shut itself down."""
        instance = self._backend.get_instance(host.identity.id)
        if instance._state.name not in ("pending", "running"):
            return
        if instance.instance_initiated_shutdown_behavior == "terminate":
            moto_plus.ends(instance, "Client.InstanceInitiatedShutdown", "Instance initiated shutdown")
        else:
            instance.stop()

    def _address(self, dns_name: str) -> str:
        """Of a load balancer, made when it is new; its name is known to the lab and to hosts."""
        if dns_name not in self._addresses:
            address = f"{BALANCERS}.{len(self._addresses) + 1}"
            network.add_address(address)
            namespaces.name(address, dns_name)
            self._addresses[dns_name] = address
        return self._addresses[dns_name]

    def _targets_down(self, targets: set[str]) -> None:
        self.knobs.unhealthy = targets

    def _console(self, instance: Instance) -> str:
        host = self._fleet.get(instance.id)
        return "" if host is None else host.console()[-65536:]
