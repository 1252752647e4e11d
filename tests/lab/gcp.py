"""Google Cloud in the lab: our fake of Compute Engine, Cloud Storage, STS and IAM, and a host for each instance."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tests.lab import network
from tests.lab.balancers import Balancers
from tests.lab.fleet import Fleet
from tests.lab.fronts import Front, googles
from tests.lab.gce import GceFake, Stage, start
from tests.lab.gce_filter import Resource
from tests.lab.gce_project import furnish
from tests.lab.host import Host, Identity
from tests.lab.network import GATEWAY

T = TypeVar("T")

PORT = 5899
ACCOUNT, NODE_ACCOUNT = (f"{name}@acme-prod-1.iam.gserviceaccount.com" for name in ("heliostat", "heliostat-node"))
PROVIDER = "projects/123456789/locations/global/workloadIdentityPools/heliostat/providers/control-plane"
NETWORK = "10.77"
FIRST_ADDRESS = 128 * 256 + 4
BOOT_S, TICK_S = 0.5, 0.05
PREEMPTION_S = 30.0
"""https://cloud.google.com/compute/docs/instances/spot#preemption-process"""


class Gcp:
    """``fake``: its knobs and faults may be turned at any time. ``LAUNCH``: of faults, the method that launches."""

    LAUNCH = "insert"

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.fake = GceFake(network=NETWORK, first_address=FIRST_ADDRESS, boot_s=BOOT_S, op_s=0.2, delete_s=0.5)
        self.fake.boot = self._boot
        self.fake.console = self._console
        self._stage = Stage(self.fake, tick_s=TICK_S)
        self.fake.auth.audience = f"//iam.googleapis.com/{PROVIDER}"
        self.fake.auth.add_account(ACCOUNT)
        self.fake.auth.add_account(NODE_ACCOUNT)
        furnish(self.fake)
        self.url, self._stop = start(self._stage, GATEWAY, PORT)
        self._addresses: set[str] = set()
        self.balancers = Balancers(self._fronts, self._targets_down)
        self.config: dict[str, Any] = {
            "project": self.fake.project,
            "region": self.fake.region,
            "zones": list(self.fake.zones[:2]),
            "workload_identity_provider": PROVIDER,
            "service_account": ACCOUNT,
            "node_service_account": NODE_ACCOUNT,
            "bucket": self.fake.storage.bucket,
        }
        """Of a ``GcpConfig``, for registration."""

    def close(self) -> None:
        self.balancers.close()
        self._stop()

    def trust(self, issuer: str, organization: str, jwks: dict[str, Any]) -> None:
        """The pool's provider believes this issuer, of tokens for this organization alone."""
        auth = self.fake.auth
        auth.jwks, auth.issuer, auth.organization = jwks, issuer, organization

    @property
    def environment(self) -> dict[str, str]:
        """Of a control plane in the lab."""
        return {"HELIOSTAT_GCP_ENDPOINT_URL": self.url}

    def instances(self) -> list[Resource]:
        """That are there, stopped ones included: they cost a disk."""
        return self._in_loop(lambda: [dict(r) for k, r in self.fake.resources.items() if k[1] == "instances"])

    def living(self) -> list[str]:
        """Names of machines that cost money."""
        return [i["name"] for i in self.instances() if i["status"] != "STOPPING"]

    # -- what may go wrong

    def no_capacity(self, *, times: float = 1, zone: str | None = None) -> None:
        self.fake.fail("stockout", "insert", times=times, zone=zone)

    def throttle(self, method: str, *, times: float = 1) -> None:
        self.fake.fail("429", method, times=times)

    def lose_answer(self, method: str, *, times: float = 1) -> None:
        """The call is carried out, then answered with 502."""
        self.fake.fail("lost", method, times=times)

    def heal(self) -> None:
        self.fake.heal()

    def preempt(self, host: Host, in_s: float = PREEMPTION_S) -> None:
        """Google takes the machine back: announced now, carried out in ``in_s``."""
        host.notices.set(preempted=True)

        def reclaim() -> None:
            if host.alive:
                self._in_loop(lambda: self.fake.preempt(host.identity.id))

        timer = threading.Timer(in_s, reclaim)
        timer.daemon = True
        timer.start()

    def take_back(self, host: Host, in_s: float = PREEMPTION_S) -> None:
        """As Google takes spot machines back."""
        self.preempt(host, in_s)

    def lose(self, host: Host) -> None:
        """Its power is cut, and Compute Engine knows: the hardware below it has failed."""
        key = (f"zones/{host.identity.zone}", "instances", host.identity.id)
        self._in_loop(lambda: self.fake.end(key, "compute.instances.hostError"))

    # -- machines

    def _in_loop(self, do: Callable[[], T]) -> T:
        """In the server's thread, which alone touches the fake."""

        async def done() -> T:
            return do()

        assert self._stage.loop is not None
        return asyncio.run_coroutine_threadsafe(done(), self._stage.loop).result(30)

    def _boot(self, instance: Resource) -> Callable[[], None]:
        identity = self._identity(instance)
        self._fleet.boot(identity, self._ended)

        def off() -> None:
            # In a thread, for it waits for the kernel, and the server has others to serve.
            threading.Thread(target=self._fleet.power_cut, args=(identity.id,), daemon=True).start()

        return off

    def _identity(self, instance: Resource) -> Identity:
        items: list[dict[str, Any]] = instance.get("metadata", {}).get("items", [])
        attributes = {item["key"]: item["value"] for item in items}
        accounts = instance.get("serviceAccounts") or [{}]
        return Identity(
            vendor="gcp",
            id=instance["name"],
            ip=instance["networkInterfaces"][0]["networkIP"],
            zone=instance["zone"].rpartition("/")[2],
            machine_type=instance["machineType"].rpartition("/")[2],
            user_data=attributes.get("startup-script", "").encode(),
            account=self.fake.project,
            role=accounts[0].get("email", ""),
            spot=instance.get("scheduling", {}).get("provisioningModel") == "SPOT",
            attributes=attributes,
        )

    def _ended(self, host: Host) -> None:
        """It has shut itself down: stopped, with its disk, until somebody deletes it."""

        def stop() -> None:
            if any(key[1:] == ("instances", host.identity.id) for key in self.fake.resources):
                self.fake.stop_itself(host.identity.id)

        self._in_loop(stop)

    def _fronts(self) -> list[Front]:
        fronts = self._in_loop(lambda: googles(self.fake))
        for front in fronts:
            if front.address not in self._addresses:
                self._addresses.add(front.address)
                network.add_address(front.address)
        return fronts

    def _targets_down(self, targets: set[str]) -> None:
        self.fake.traffic.down = targets

    def _console(self, name: str) -> str:
        host = self._fleet.get(name)
        return "" if host is None else host.console()
