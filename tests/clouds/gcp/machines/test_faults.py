"""What goes wrong on Compute Engine, and what is asked of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clouds.contract.errors import BadConfig, Denied, NoCapacity, QuotaExceeded, Throttled
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, MachineState
from clouds.gcp.machines.instance import name_for
from heliostat.errors import CloudError
from heliostat.models.clouds import Market
from tests.clouds.gcp.support import gcp_cloud, machines
from tests.clouds.support import OURS, Cloud, eventually
from tests.lab.gce import POLICY, GceFake, Stage, serving
from tests.lab.gce_filter import Resource

pytestmark = pytest.mark.long  # hundreds of calls to the fake of the whole cloud

Pair = tuple[Cloud, GceFake]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with gcp_cloud(tmp_path) as found:
        yield found


def instances(fake: GceFake) -> list[Resource]:
    return [r for key, r in fake.resources.items() if key[1] == "instances"]


def test_what_is_asked_for(tmp_path: Path) -> None:
    more = {
        "node_service_account": "nodes@acme-prod-1.iam.gserviceaccount.com",
        "network_tags": ["ray"],
        "kms_key": "projects/acme-prod-1/locations/us-central1/keyRings/r/cryptoKeys/k",
        "max_run_hours": 24,
        "gpu_image": "projects/acme-images/global/images/family/gpu-image",
    }
    with gcp_cloud(tmp_path, **more) as (cloud, fake):
        spec = cloud.spec(instance_type="n1-standard-8/nvidia-tesla-t4:1", market=Market.SPOT, tags={"Team": "Blü/e"})
        machine = cloud.machines.launch(spec)
        (asked,) = instances(fake)
        assert asked["name"] == machine.machine_id == name_for(spec.token)
        assert asked["machineType"] == "zones/us-central1-a/machineTypes/n1-standard-8"
        (accelerator,) = asked["guestAccelerators"]
        assert accelerator["acceleratorCount"] == 1
        assert accelerator["acceleratorType"].endswith("nvidia-tesla-t4")
        assert asked["scheduling"] == {
            "automaticRestart": False,
            "onHostMaintenance": "TERMINATE",
            "provisioningModel": "SPOT",
            "maxRunDuration": {"seconds": "86400"},
            "instanceTerminationAction": "DELETE",
        }
        (disk,) = asked["disks"]
        assert (disk["boot"], disk["autoDelete"]) == (True, True)
        assert disk["diskEncryptionKey"] == {"kmsKeyName": more["kms_key"]}
        assert disk["initializeParams"]["sourceImage"].endswith("gpu-image")
        assert disk["initializeParams"]["labels"] == asked["labels"]
        assert asked["labels"][OWNER_TAG] == OURS
        assert asked["labels"]["team"] == "bl__e"
        assert asked["labels"]["heliostat-generation"] == "1"
        assert asked["labels"]["heliostat-token"] == spec.token
        metadata = {item["key"]: item["value"] for item in asked["metadata"]["items"]}
        assert metadata["startup-script"] == spec.user_data
        assert (metadata["block-project-ssh-keys"], metadata["enable-oslogin"]) == ("TRUE", "FALSE")
        assert "accessConfigs" not in asked["networkInterfaces"][0]
        assert asked["shieldedInstanceConfig"]["enableVtpm"] is True
        assert asked["shieldedInstanceConfig"].get("enableSecureBoot", False) is False
        assert asked["serviceAccounts"][0]["email"] == more["node_service_account"]
        assert asked["tags"] == {"items": ["ray"]}
        tags = {"Team": "Blü/e", OWNER_TAG: OURS, CLUSTER_TAG: "clu_1", NODE_TAG: "nod_1"}
        assert machine.tags == tags, "exactly as given, though labels can't be"


def test_what_fits_is_chosen(pair: Pair) -> None:
    cloud, fake = pair
    asked = [{"cpu": 4.0}, {"cpu": 1.0, "memory": 60 * 2**30}, {"gpu": 1}, {"gpu": 8, "cpu": 90.0}, {}]
    for fields in asked:
        cloud.machines.launch(cloud.spec(**fields))
    chosen = {r["machineType"].rpartition("/")[2] for r in instances(fake)}
    assert chosen == {"e2-standard-4", "e2-highmem-8", "n1-standard-4", "g2-standard-96"}


def test_a_stockout_leads_to_the_next_zone(pair: Pair) -> None:
    cloud, fake = pair
    fake.fail("stockout", "insert", zone="us-central1-a", times=100)
    spec = cloud.spec()
    machine = cloud.launch_and_boot(spec)
    assert instances(fake)[0]["zone"].endswith("us-central1-b")
    fake.heal()
    assert cloud.machines.launch(spec).machine_id == machine.machine_id
    assert fake.calls["insert instances"] == 2, "the zone that had none is not asked again"
    fake.fail("stockout", "insert", zone="us-central1-a")
    with pytest.raises(NoCapacity) as caught:
        cloud.machines.launch(cloud.spec(zone="us-central1-a"))
    assert "us-central1-a" in str(caught.value)
    assert caught.value.details["code"].startswith("ZONE_RESOURCE_POOL_EXHAUSTED")


def test_spot_falls_back_after_all_zones(pair: Pair) -> None:
    cloud, fake = pair
    fake.fail("stockout", "insert", times=2)
    cloud.machines.launch(cloud.spec(market=Market.PREFER_SPOT))
    (made,) = instances(fake)
    assert made["scheduling"]["provisioningModel"] == "STANDARD"
    assert made["zone"].endswith("us-central1-a")


def test_no_capacity_anywhere_and_later_some(pair: Pair) -> None:
    """The same token may be tried again: that is another attempt, under another request id."""
    cloud, fake = pair
    fake.fail("stockout", "insert", times=4)
    spec = cloud.spec()
    for _ in range(2):
        with pytest.raises(NoCapacity) as caught:
            cloud.machines.launch(spec)
        assert caught.value.details == {"attempts": 2}
    assert cloud.machines.find(spec.token) is None
    assert cloud.machines.list_owned(OURS) == []
    cloud.launch_and_boot(spec)
    assert cloud.boot_count() == 1


def test_a_lost_answer_is_no_second_machine(pair: Pair) -> None:
    cloud, fake = pair
    fake.fail("lost", "insert")
    spec = cloud.spec()
    with pytest.raises(CloudError) as caught:
        cloud.machines.launch(spec)
    assert type(caught.value) is CloudError, "it may be tried again"
    found = cloud.machines.find(spec.token)
    assert found is not None
    again = cloud.launch_and_boot(spec)
    assert again.machine_id == found.machine_id
    assert len(instances(fake)) == 1


def test_a_worker_that_died_before_it_saw_the_operation(pair: Pair) -> None:
    """Another one repeats the launch while the operation runs, and while nothing is listed yet."""
    cloud, fake = pair
    fake.op_s = 0.3
    spec = cloud.spec()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cloud.machines.launch, spec)
        eventually(lambda: instances(fake))
        (key,) = [k for k in fake.resources if k[1] == "instances"]
        hidden = fake.resources.pop(key)
        found = cloud.machines.find(spec.token)
        assert found is not None
        assert found.state is MachineState.PENDING
        fake.resources[key] = hidden
        second = pool.submit(cloud.machines.launch, spec)
        assert first.result().machine_id == second.result().machine_id
    assert fake.calls["insert instances"] == 1


def test_an_ended_machine_is_known_when_request_ids_are_forgotten(pair: Pair) -> None:
    cloud, fake = pair
    fake.remembers_s = 0
    spec = cloud.spec()
    machine = cloud.launch_and_boot(spec)
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)
    assert cloud.machines.launch(spec).state is MachineState.GONE
    assert cloud.boot_count() == 1


def test_an_instance_is_known_when_its_operations_are_forgotten(pair: Pair) -> None:
    cloud, fake = pair
    fake.remembers_s = 0
    spec = cloud.spec()
    machine = cloud.launch_and_boot(spec)
    fake.operations.clear()
    assert cloud.machines.launch(spec).machine_id == machine.machine_id
    assert cloud.boot_count() == 1


def test_an_operation_that_fails_late(pair: Pair) -> None:
    cloud, fake = pair
    fake.op_s = 0.1
    fake.fail("late", "insert")
    spec = cloud.spec()
    with pytest.raises(CloudError, match="Internal error") as caught:
        cloud.machines.launch(spec)
    assert type(caught.value) is CloudError
    cloud.launch_and_boot(spec)
    assert cloud.boot_count() == 1


def test_an_operation_that_takes_too_long(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud, fake = pair
    monkeypatch.setattr("clouds.gcp.machines.compute_engine.LAUNCH_WAIT_S", 0.1)
    fake.op_s = 3600
    machine = cloud.machines.launch(cloud.spec())
    assert machine.state is MachineState.PENDING
    assert machine.node_id == "nod_1"
    cloud.machines.terminate([machine.machine_id])
    cloud.wait_for(machine.machine_id, MachineState.GONE)


@pytest.mark.parametrize(
    ("kind", "expected"), [("quota", QuotaExceeded), ("429", Throttled), ("503", CloudError), ("denied", Denied)]
)
def test_refusals(pair: Pair, kind: str, expected: type[CloudError]) -> None:
    cloud, fake = pair
    fake.fail(kind, "insert", times=2 if kind == "quota" else 1)
    with pytest.raises(CloudError) as caught:
        cloud.machines.launch(cloud.spec())
    assert type(caught.value) is expected
    assert caught.value.remedy
    if kind == "denied":
        assert "compute.instances.create" in caught.value.remedy
        assert caught.value.details["permission"] == "compute.instances.create"
    assert instances(fake) == []
    cloud.launch_and_boot(cloud.spec())


def test_what_an_organization_policy_forbids_is_not_tried_again(pair: Pair) -> None:
    """Google says it by the code of a fingerprint that is not the newest, at once or as the operation's end."""
    cloud, fake = pair
    fake.fail("policy", "insert")
    fake.fail("late", "insert", error=("CONDITION_NOT_MET", 412, POLICY))
    for _ in range(2):
        with pytest.raises(BadConfig, match="Secure Boot is not enabled") as caught:
            cloud.machines.launch(cloud.spec())
        assert "organization policy constraints/compute.requireShieldedVm" in caught.value.remedy
    assert instances(fake) == []


def test_a_list_that_fails_is_not_an_empty_one(pair: Pair) -> None:
    cloud, fake = pair
    machine = cloud.launch_and_boot(cloud.spec())
    for kind, expected in (("503", CloudError), ("429", Throttled), ("denied", Denied)):
        for call in (
            lambda: cloud.machines.describe([machine.machine_id]),
            lambda: cloud.machines.list_owned(OURS),
            lambda: cloud.machines.terminate([machine.machine_id]),
        ):
            fake.fail(kind, "aggregatedList")
            with pytest.raises(expected):
                call()
    assert cloud.state(machine.machine_id) is MachineState.RUNNING


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"image": "projects/x/global/images/nope"}, "nope"),
        ({"subnetwork": "nope"}, "nope"),
        ({"zones": ["us-central1-z"]}, "us-central1-z"),
        ({"instance_type": "zz-large-1"}, "zz-large-1"),
        ({"instance_type": "e2-standard-4", "instance_types": ["n2-standard-2"]}, "e2-standard-4"),
    ],
)
def test_what_is_not_there(tmp_path: Path, fields: dict[str, object], word: str) -> None:
    with gcp_cloud(tmp_path, **fields) as (cloud, fake):
        with pytest.raises(BadConfig, match=word):
            cloud.machines.launch(cloud.spec())
        assert instances(fake) == []


def test_a_type_that_a_zone_does_not_offer(pair: Pair) -> None:
    cloud, fake = pair
    fake.machine_types = lambda zone, name: zone.endswith("b") or name != "c3-standard-8"
    cloud.machines.launch(cloud.spec(instance_type="c3-standard-8"))
    assert instances(fake)[0]["zone"].endswith("us-central1-b")
    with pytest.raises(NoCapacity, match="does not offer"):
        cloud.machines.launch(cloud.spec(instance_type="c3-standard-8", zone="us-central1-a"))


def test_how_machines_end_is_told(pair: Pair) -> None:
    cloud, fake = pair
    spot = cloud.launch_and_boot(cloud.spec(market=Market.SPOT))
    idle = cloud.launch_and_boot(cloud.spec())
    fake.preempt(spot.machine_id)
    fake.stop_itself(idle.machine_id)
    reasons = {m.machine_id: (m.state, m.reason) for m in cloud.machines.describe([spot.machine_id, idle.machine_id])}
    assert reasons[spot.machine_id] == (MachineState.GONE, "the cloud reclaimed the machine")
    assert reasons[idle.machine_id] == (MachineState.GONE, "the machine stopped itself")
    assert cloud.machines.list_owned(OURS) == []


@pytest.mark.parametrize("how", ["forget_ended", "terminate"])
def test_a_machine_that_stopped_itself_is_deleted(pair: Pair, how: str) -> None:
    cloud, fake = pair
    machine = cloud.launch_and_boot(cloud.spec())
    other = cloud.machines.launch(cloud.spec(installation_id="another"))
    for one in (machine, other):
        fake.stop_itself(one.machine_id)
    assert len(instances(fake)) == 2, "it still costs money for its disk"
    if how == "forget_ended":
        assert cloud.machines.forget_ended(older_than_s=86400) == [machine.machine_id]
    else:
        cloud.machines.terminate([machine.machine_id])
    eventually(lambda: fake.advance() or [i["name"] for i in instances(fake)] == [other.machine_id])
    assert cloud.one(machine.machine_id).reason == "the machine stopped itself"


def test_the_cloud_ends_it_after_its_maximum_time(tmp_path: Path) -> None:
    with gcp_cloud(tmp_path, max_run_hours=1) as (cloud, fake):
        machine = cloud.launch_and_boot(cloud.spec())
        fake.clock = lambda: time.time() + 3601
        assert cloud.one(machine.machine_id).reason == "the cloud ended it after its maximum run time"


def test_what_is_not_ours_is_not_touched(pair: Pair) -> None:
    cloud, fake = pair
    machine = cloud.launch_and_boot(cloud.spec())
    (found,) = instances(fake)
    found["labels"].pop(OWNER_TAG)
    cloud.machines.terminate([machine.machine_id])
    assert cloud.state(machine.machine_id) is MachineState.RUNNING
    assert fake.calls["delete instances"] == 0


def test_deletes_go_on_after_one_that_fails(pair: Pair) -> None:
    cloud, fake = pair
    ids = [cloud.machines.launch(cloud.spec()).machine_id for _ in range(4)]
    fake.fail("denied", "delete", permission="compute.instances.delete")
    with pytest.raises(Denied, match=r"compute\.instances\.delete"):
        cloud.machines.terminate(ids)
    eventually(lambda: fake.advance() or len(instances(fake)) == 1)
    cloud.machines.terminate(ids)
    eventually(lambda: fake.advance() or instances(fake) == [])


def test_fifty_at_once_cost_fifty_inserts_and_few_lists(tmp_path: Path) -> None:
    with gcp_cloud(tmp_path) as (cloud, fake):
        fake.op_s = 0.5
        specs = [cloud.spec() for _ in range(50)]
        with ThreadPoolExecutor(50) as pool:
            ids = {m.machine_id for m in pool.map(cloud.machines.launch, specs)}
        assert len(ids) == 50
        assert fake.calls["insert instances"] == 50
        lists = fake.calls["aggregatedList operations"] + fake.calls["aggregatedList instances"]
        assert lists < 100, "not each waits by calls of its own"
        before = fake.calls.total()
        assert len(cloud.machines.describe(ids)) == 50
        assert len(cloud.machines.list_owned(OURS)) == 50
        assert fake.calls.total() - before == 3, "50 names are two questions"


def test_no_address_of_the_client_is_google(pair: Pair) -> None:
    """Were one missed, its call would leave for Google's own host."""
    cloud, _ = pair
    cloud.machines.launch(cloud.spec())
    session = cloud.machines._session  # type: ignore[attr-defined]
    assert {c.transport._host.split(":")[1] for c in session._clients.values()} == {"//127.0.0.1"}


def test_nobody_is_there() -> None:
    with serving(Stage(GceFake())) as url:
        pass
    with pytest.raises(CloudError) as caught:
        machines(url).describe([name_for("x")])
    assert type(caught.value) is CloudError


def test_a_walk_through_many_zones_goes_on_where_it_was(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """No place is asked twice, though one call has no time for all of them."""
    cloud, fake = pair
    monkeypatch.setattr("clouds.gcp.machines.compute_engine.LAUNCH_WAIT_S", 0.03)
    fake.op_s = 0.04
    fake.fail("stockout", "insert", times=3)
    spec = cloud.spec(market=Market.PREFER_SPOT)
    for _ in range(20):
        try:
            machine = cloud.machines.launch(spec)
        except CloudError:
            continue
        if any(i["scheduling"]["provisioningModel"] == "STANDARD" for i in instances(fake)):
            break
    assert cloud.wait_for(machine.machine_id, MachineState.RUNNING)
    assert fake.calls["insert instances"] == 4
    assert len(instances(fake)) == 1
