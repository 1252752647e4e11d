"""The lab itself: hosts that boot from user-data, on both vendors, and what may happen to them. The short ones are a
tour of it in ``make test``."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from clouds.contract.machines import MachineSpec
from clouds.gcp.machines.compute_engine import GcpMachines
from heliostat.models.clusters import NodeRole
from tests.clouds.gcp import support as gcp
from tests.clouds.support import OURS
from tests.lab import network
from tests.lab.host import Host
from tests.lab.lab import Lab, until

pytestmark = [pytest.mark.lab, pytest.mark.ray, pytest.mark.timeout(120)]

USER_DATA = """\
#!/bin/sh
mkdir /tmp/www; cd /tmp/www
T=$(curl -sX PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 300" http://169.254.169.254/latest/api/token)
curl -sH "X-aws-ec2-metadata-token: $T" http://169.254.169.254/latest/meta-data/local-ipv4 >ip
hostname >name
echo hello from user-data
exec python3 -m http.server 8000
"""


def launch(lab: Lab, user_data: str = USER_DATA, **more: Any) -> dict[str, Any]:
    config = lab.aws.account.config
    given = {"ImageId": config.image, "InstanceType": "m6i.large", "MinCount": 1, "MaxCount": 1, "UserData": user_data}
    given |= {"SubnetId": config.subnets[0].id, "InstanceInitiatedShutdownBehavior": "terminate"}
    return dict(lab.aws.account.client("ec2").run_instances(**given | more)["Instances"][0])


def state(lab: Lab, instance: dict[str, Any]) -> dict[str, Any]:
    found = lab.aws.account.client("ec2").describe_instances(InstanceIds=[instance["InstanceId"]])
    return dict(found["Reservations"][0]["Instances"][0])


def fetch(host: Host, name: str = "name", timeout: float = 1) -> str | None:
    try:
        with urllib.request.urlopen(f"http://{host.ip}:8000/{name}", timeout=timeout) as answer:
            return str(answer.read().decode().strip())
    except OSError:
        return None


@pytest.fixture
def served(lab: Lab) -> Host:
    """A host of EC2 whose user-data serves."""
    host = lab.host(launch(lab)["InstanceId"])
    until("its server", lambda: fetch(host))
    return host


def test_an_instance_is_a_machine_of_its_own(lab: Lab, served: Host) -> None:
    other = lab.host(launch(lab)["InstanceId"])
    until("the other's server", lambda: fetch(other))

    assert fetch(served) == served.name
    assert fetch(served, "ip") == served.ip  # by its metadata service
    assert served.ip != other.ip
    assert other.run("curl", "-s", f"http://{served.ip}:8000/name").strip() == served.name
    served.run("touch", "/tmp/mine", "/run/mine", "/dev/shm/mine", "/var/lib/mine", "/usr/mine")
    for folder in ("/tmp", "/run", "/dev/shm", "/var/lib", "/usr"):
        assert "mine" in served.run("ls", folder)
        assert "mine" not in other.run("ls", folder)
    assert "http.server" in served.run("ps", "ax")
    assert served.run("ps", "ax").count("http.server") == 1  # not the other's
    assert "hello from user-data" in served.console()
    output = lab.aws.account.client("ec2").get_console_output(InstanceId=served.identity.id)["Output"]
    assert "hello from user-data" in output


@pytest.mark.long
def test_there_is_no_way_out(served: Host) -> None:
    for address in ("192.0.2.1", "10.0.0.1", "8.8.8.8"):
        ask = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "1", f"http://{address}/"]
        shown = served.run(*ask, check=False)
        assert shown == "000"


def test_a_terminated_instance_is_a_power_cut(lab: Lab, served: Host) -> None:
    instance = {"InstanceId": served.identity.id}
    processes = served.processes()
    assert len(processes) >= 2
    began = time.monotonic()
    lab.aws.account.client("ec2").terminate_instances(InstanceIds=[served.identity.id])
    until("the power cut", lambda: not served.alive, every_s=0.01)
    assert time.monotonic() - began < 5
    # Killed they all are by then; the kernel takes them in one by one.
    until("the last of its processes to be gone", lambda: not served.processes(), within_s=10)
    assert served.cable not in network.cables()
    ended = until("its end", lambda: (i := state(lab, instance))["State"]["Name"] == "terminated" and i)
    assert ended["StateReason"]["Code"] == "Client.UserInitiatedShutdown"


def test_shutdown_inside_ends_the_instance(lab: Lab, served: Host) -> None:
    served.run("shutdown", "-h", "now", check=False)
    instance = {"InstanceId": served.identity.id}
    ended = until("its end", lambda: (i := state(lab, instance))["State"]["Name"] == "terminated" and i)
    assert ended["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
    assert not served.alive


@pytest.mark.long
def test_a_network_may_fail(served: Host) -> None:
    served.partition()
    assert fetch(served) is None
    assert served.alive
    served.heal()
    until("it to be reached again", lambda: fetch(served))

    served.part_from(network.GATEWAY)
    assert fetch(served) is None
    served.heal()
    assert fetch(served, timeout=5)

    served.lose_packets(1)
    assert fetch(served) is None
    served.lose_packets(0.15)
    assert fetch(served, timeout=15) == served.name  # TCP gets through, by repeating
    served.heal()


@pytest.mark.long
def test_memory_has_an_end(served: Host) -> None:
    served.limit_memory(200 * 2**20)
    done = served.run("python3", "-c", "x = b'1' * (600 * 2**20); print('had it')", check=False)
    assert "had it" not in done
    assert served.alive


@pytest.mark.long
def test_a_spot_machine_is_taken_back_after_its_notice(lab: Lab) -> None:
    instance = launch(lab, InstanceMarketOptions={"MarketType": "spot"})
    host = lab.host(instance["InstanceId"])
    ask = "T=$(curl -sX PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token); "
    ask += "curl -s -w ' %{http_code}' -H \"X-aws-ec2-metadata-token: $T\" http://169.254.169.254/latest/meta-data/"

    def metadata(path: str) -> tuple[str, str]:
        body, _, code = host.run("sh", "-c", ask + path).rpartition(" ")
        return code, body

    assert metadata("instance-life-cycle") == ("200", "spot")
    assert metadata("spot/instance-action")[0] == "404"
    lab.aws.rebalance(host)
    assert json.loads(metadata("events/recommendations/rebalance")[1])["noticeTime"]
    lab.aws.spot_notice(host, in_s=2)
    assert json.loads(metadata("spot/instance-action")[1])["action"] == "terminate"
    assert host.alive
    ended = until("its end", lambda: (i := state(lab, instance))["State"]["Name"] == "terminated" and i)
    assert ended["StateReason"]["Code"] == "Server.SpotInstanceTermination"
    assert not host.alive


def test_ec2_refuses_throttles_and_loses_answers(lab: Lab) -> None:
    lab.aws.no_capacity(instance_type="m6i.large", times=5)  # botocore asks again
    with pytest.raises(ClientError, match="InsufficientInstanceCapacity"):
        launch(lab)
    lab.aws.heal()
    lab.aws.throttle("RunInstances")
    assert launch(lab, ClientToken="t-throttled")["InstanceId"]
    before = len(lab.aws.instances())
    lab.aws.lose_answer("RunInstances")
    again = launch(lab, ClientToken="t-lost")  # botocore asks again, and it is the same machine
    assert len(lab.aws.instances()) == before + 1
    assert launch(lab, ClientToken="t-lost")["InstanceId"] == again["InstanceId"]
    assert len(lab.aws.account.client("ec2").run_instances(
        ImageId=lab.aws.account.config.image, InstanceType="m6i.large", MinCount=1, MaxCount=2,
        SubnetId=lab.aws.account.config.subnets[0].id, UserData="#!/bin/sh\n",
    )["Instances"]) == 2  # fmt: skip


@pytest.fixture
def google(lab: Lab) -> Iterator[GcpMachines]:
    """Ours, as nobody."""
    trusted, lab.gcp.fake.auth.jwks = lab.gcp.fake.auth.jwks, None
    yield gcp.machines(lab.gcp.url)
    lab.gcp.fake.auth.jwks = trusted


def test_a_machine_of_google(lab: Lab, google: GcpMachines) -> None:
    names = {"token": "t-gce", "cluster_id": "clu_1", "node_id": "nod_1", "installation_id": OURS}
    made = google.launch(MachineSpec(**names, generation=1, role=NodeRole.HEAD, user_data=USER_DATA))
    host = lab.host(made.machine_id)
    assert made.ip == host.ip
    until("its server", lambda: fetch(host))
    url = "http://metadata.google.internal/computeMetadata/v1/instance/"
    metadata = lambda path: host.run("curl", "-s", "-H", "Metadata-Flavor: Google", url + path)  # noqa: E731
    assert metadata("name") == made.machine_id
    assert metadata("attributes/startup-script") == USER_DATA
    assert metadata("preempted") == "FALSE"
    assert "hello from user-data" in google.console_output(made.machine_id)

    host.run("shutdown", "-h", "now", check=False)
    until("it to be stopped", lambda: [i for i in lab.gcp.instances() if i["status"] == "TERMINATED"])
    assert not host.alive
    google.terminate([made.machine_id])
    until("it to be deleted", lambda: not lab.gcp.instances())


def test_nothing_is_left(lab: Lab) -> None:
    """Last here: all that the tests above have launched."""
    ids = [i.id for i in lab.aws.instances()]
    assert ids
    lab.aws.account.client("ec2").terminate_instances(InstanceIds=ids)
    until("all to be gone", lambda: not lab.hosts() and not network.cables())
    assert not lab.fleet.problems
