"""Services' rows on both databases: the revision rule, deploys claimed or taken back, what retention leaves."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update

from heliostat.models.clusters import NodeRole
from heliostat.models.common import new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.services import (
    Service,
    ServiceConfig,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
)
from runtime.keys import Keys
from runtime.messages.clusters import ClusterInput
from runtime.messages.services import DeployRequest, GateTokens, ServiceInput, VersionSpec
from store import clusters as cluster_records
from store import encrypted_values, outbox, retention
from store.database import Database
from store.services import deploys as service_deploys
from store.services import rows as services
from store.services import tokens as token_records
from store.services import traffic
from store.services.rows import StoredToken
from store.tables import accepted, reports, sealed, service_versions
from store.tables import service_deploys as deploys_table
from tests.store.test_revisions import a_cluster, a_node, an_event, put_cluster

NOW = utcnow()
KEYS = Keys(b"k" * 32)


def a_service(id: str = "svc_1", *, state: ServiceState = ServiceState.STARTING, revision: int = 0) -> Service:
    return Service(
        id=id, name=id, project="default", cloud="local", state=state, created_by="ada", created_at=NOW,
        state_since=NOW, revision=revision, ended_at=NOW if state.settled else None, query_auth_token="secret",
        gate_hashes=["h"],
    )  # fmt: skip


def a_token(id: str, **more: Any) -> StoredToken:
    return StoredToken(id=id, created_at=NOW, sha256=f"sha-{id}", **more)


async def put_service(db: Database, project: str, id: str = "svc_1", *tokens: StoredToken) -> bool:
    arg = ServiceInput(
        service_id=id, name=id, project_id=project, project="default", cloud_id="cloud_1", cloud="local",
        created_by="ada", created_at=NOW,
    )  # fmt: skip
    async with db.begin() as conn:
        for token in tokens:
            await encrypted_values.write_sealed(conn, KEYS, token.id, project, {"token": "x"})
        return await service_deploys.insert_service(conn, a_service(id), arg, list(tokens))


def a_version(id: str, service: str, number: int, state: ServiceVersionState, config: ServiceConfig) -> ServiceVersion:
    over = state == ServiceVersionState.TERMINATED
    return ServiceVersion(
        id=id, service_id=service, name=f"v{number}", number=number, state=state, config=config, created_by="ada",
        created_at=NOW, state_since=NOW, ended_at=NOW if over else None,
    )  # fmt: skip


def a_config(**more: Any) -> ServiceConfig:
    return ServiceConfig(applications=[{"import_path": "main:app"}], **more)


async def put_deploy(db: Database, project: str, service: str = "svc_1", **config: Any) -> tuple[str, str]:
    """Ids of a deploy and its version, numbered as the API does."""
    deploy_id, version_id = new_id("dp"), new_id("sv")
    async with db.begin() as conn:
        row = await services.lock_service(conn, service)
        assert row is not None
        number = await service_deploys.next_number(conn, service)
        version = a_version(version_id, service, number, ServiceVersionState.STARTING, a_config(**config))
        spec = VersionSpec(
            id=version_id, name=version.name, number=number, compute_config=ComputeConfig(), created_by="ada",
            created_at=NOW,
        )  # fmt: skip
        env_ref = new_id("env")
        await encrypted_values.write_sealed(conn, KEYS, env_ref, project, {"env_vars.A": version_id})
        await service_deploys.insert_version(conn, project, deploy_id, spec, version, env_ref)
        request = DeployRequest(id=deploy_id, actor="user:ada", versions=[spec])
        await service_deploys.insert_deploy(conn, project, service, request)
    return deploy_id, version_id


async def withdraw(db: Database, deploy_id: str) -> bool:
    async with db.begin() as conn:
        return await service_deploys.withdraw_deploy(conn, deploy_id)


async def test_a_late_write_changes_nothing_and_a_repeat_is_no_harm(db: Database, project: str) -> None:
    assert await put_service(db, project, "svc_1", a_token("qt_1"))
    assert not await put_service(db, project)  # the name is taken
    _, version_id = await put_deploy(db, project)
    running = a_service(state=ServiceState.RUNNING, revision=2)
    version = a_version(version_id, "svc_1", 1, ServiceVersionState.RUNNING, a_config(version_name="other"))
    for _ in range(2):
        assert await services.write_service(db, running, [version], [an_event("e2", "svc_1")])
    late = a_version(version_id, "svc_1", 1, ServiceVersionState.STARTING, a_config())
    assert await services.write_service(db, a_service(revision=1), [late], [an_event("e1", "svc_1")])
    row, found = await services.load_service(db, "svc_1"), await services.load_version(db, version_id)
    assert row is not None
    assert found is not None
    assert (row.state, row.revision, row.input.revision, row.told_revision) == (ServiceState.RUNNING, 2, 2, 0)
    assert (row.service.query_auth_token, row.service.gate_hashes) == (None, ["h"])
    assert [t.id for t in row.tokens] == ["qt_1"]
    assert (found.state, found.version.state) == (ServiceVersionState.RUNNING, ServiceVersionState.RUNNING)
    assert found.version.config.version_name is None  # the config is the API's
    (named,) = await services.names(db)
    assert (named.name, named.project, named.cloud_id, named.versions) == (
        "svc_1", "default", "cloud_1", {version_id: "v1"},
    )  # fmt: skip
    foreign = a_version(version_id, "svc_2", 1, ServiceVersionState.TERMINATED, a_config())
    await put_service(db, project, "svc_2")
    assert await services.write_service(db, a_service("svc_2", revision=9), [foreign], [])
    assert (await services.load_version(db, version_id)) == found


async def test_a_deploy_is_claimed_or_taken_back_never_both(db: Database, project: str) -> None:
    await put_service(db, project, "svc_1", a_token("qt_1"))
    deploys = [(await put_deploy(db, project))[0] for _ in range(6)]
    left = await services.unstarted_deploys(db, 0)
    assert [request.id for _, request in left] == deploys
    assert {arg.service_id for arg, _ in left} == {"svc_1"}
    assert await services.unstarted_deploys(db, 3600) == []
    for deploy in deploys:
        claimed, withdrawn = await asyncio.gather(services.claim_deploy(db, deploy), withdraw(db, deploy))
        assert claimed != withdrawn, deploy
        assert await services.claim_deploy(db, deploy) == claimed  # repeatable
        assert await withdraw(db, deploy) is False
    assert await services.unstarted_deploys(db, 0) == []


async def test_a_new_service_goes_with_its_last_deploy(db: Database, project: str) -> None:
    await put_service(db, project, "svc_1", a_token("qt_1"))
    (one, _), (two, version) = await put_deploy(db, project), await put_deploy(db, project)
    assert await withdraw(db, one)
    assert not await outbox.is_cancelled(db, "service", "svc_1")
    assert await withdraw(db, two)
    assert await outbox.is_cancelled(db, "service", "svc_1")
    assert not await services.write_service(db, a_service(revision=1), [], [an_event("e", "svc_1")])
    assert await services.load_version(db, version) is None
    async with db.read() as conn:
        assert await conn.scalar(select(func.count()).select_from(sealed)) == 0
    assert await put_service(db, project, "svc_1b")


async def test_a_service_that_its_workflow_has_written_stays(db: Database, project: str) -> None:
    await put_service(db, project)
    first, _ = await put_deploy(db, project)
    assert await services.claim_deploy(db, first)
    assert await services.write_service(db, a_service(state=ServiceState.RUNNING, revision=1), [], [])
    second, version = await put_deploy(db, project)
    assert await withdraw(db, second)
    row = await services.load_service(db, "svc_1")
    assert row is not None
    assert (row.withdrawn, row.state) == (False, ServiceState.RUNNING)
    assert await services.load_version(db, version) is None


async def test_a_terminated_service_has_no_use_for_a_deploy_that_is_told_late(db: Database, project: str) -> None:
    """By a monitor that had found it not started, while somebody else told it and terminated the service."""
    await put_service(db, project)
    deploy, _ = await put_deploy(db, project)
    assert await services.write_service(db, a_service(state=ServiceState.TERMINATED, revision=7), [], [])
    assert not await services.claim_deploy(db, deploy)
    assert await services.unstarted_deploys(db, 0) == [], "it is told no more"


async def test_a_service_that_starts_again_goes_on_from_its_revision(db: Database, project: str) -> None:
    await put_service(db, project)
    first, _ = await put_deploy(db, project)
    assert await services.claim_deploy(db, first)
    over = a_service(state=ServiceState.TERMINATED, revision=7)
    assert await services.write_service(db, over, [], [])
    async with db.begin() as conn:
        row = await services.lock_service(conn, "svc_1")
        assert row is not None
        row = await service_deploys.reopen_service(conn, row, utcnow())
    assert (row.state, row.revision, row.told_revision, row.input.revision) == (ServiceState.STARTING, 8, 8, 8)
    loaded = await services.load_service(db, "svc_1")
    assert loaded == row
    assert await services.write_service(db, over, [], [])  # late: of the workflow before
    second, _ = await put_deploy(db, project)
    ((arg, _),) = await services.unstarted_deploys(db, 0, "svc_1")
    assert arg.revision == 8
    assert await withdraw(db, second)
    back = await services.load_service(db, "svc_1")
    assert back is not None
    assert (back.state, back.service.ended_at is not None) == (ServiceState.TERMINATED, True)


async def test_two_transactions_get_two_numbers(db: Database, project: str) -> None:
    await put_service(db, project)
    await asyncio.gather(*(put_deploy(db, project) for _ in range(8)))
    async with db.read() as conn:
        assert sorted(await conn.scalars(select(service_versions.c.number))) == list(range(1, 9))
        assert [v.number for v in await services.versions_of(conn, "svc_1")] == list(range(8, 0, -1))


async def test_tokens_are_pending_until_exactly_they_are_acknowledged(db: Database, project: str) -> None:
    tokens = (a_token("qt_1", told=True, deleted=True), a_token("qt_2"), a_token("qt_3", told=True))
    await put_service(db, project, "svc_1", *tokens)
    (id,) = await token_records.pending_tokens(db)
    told = await services.load_service(db, id)
    assert told is not None
    gate = told.gate
    assert (id, gate) == ("svc_1", GateTokens(hashes=["sha-qt_2", "sha-qt_3"]))
    await token_records.acknowledge_tokens(db, "svc_1", GateTokens(hashes=["sha-qt_1", "sha-qt_3"]))  # an older set
    assert await token_records.pending_tokens(db) == [id]
    await token_records.acknowledge_tokens(db, "svc_1", gate)
    assert await token_records.pending_tokens(db) == []
    row = await services.load_service(db, "svc_1")
    assert row is not None
    assert [(t.id, t.told) for t in row.tokens] == [("qt_2", True), ("qt_3", True)]
    assert await encrypted_values.read_sealed(db, KEYS, "qt_1") is None
    assert await encrypted_values.read_sealed(db, KEYS, "qt_2") is not None
    await token_records.acknowledge_tokens(db, "svc_none", gate)


async def test_the_newest_heads_word_on_traffic_counts(db: Database, project: str) -> None:
    for number in (1, 2, 3):
        id = f"clu_{number}"
        await put_cluster(db, project, a_cluster(id, name=id))
        heads = [a_node(f"{id}_head{g}", cluster=id, generation=g) for g in (1, 2)]
        worker = a_node(f"{id}_worker", cluster=id, generation=9).model_copy(update={"role": NodeRole.WORKER})
        if number == 3:
            heads = heads[:1]
        written = a_cluster(id, name=id, revision=1)
        assert await cluster_records.write_cluster(db, written, [*heads[::-1], worker], {}, [])
        async with db.begin() as conn:
            for node, doc in (
                (heads[0], {"serve": {"version_id": "sv_1", "requests": 1}}),
                (heads[-1], {"serve": {"version_id": "sv_1", "requests": 10 * number}} if number != 2 else {}),
                (worker, {"serve": {"version_id": "sv_1", "requests": 999}}),
            ):
                if number == 3 and node is heads[0] and doc["serve"]["requests"] == 1:
                    continue
                await conn.execute(
                    reports.insert().values(
                        node_id=node.id, cluster_id=id, is_head=node.role == NodeRole.HEAD, seq=1, activity="busy",
                        doc=doc, at=NOW,
                    )
                )  # fmt: skip
    found = await traffic.latest_traffic(db, ["clu_1", "clu_2", "clu_3", "clu_none"])
    assert {c: (t.requests, at) for c, (t, at) in found.items()} == {"clu_1": (10, NOW), "clu_3": (30, NOW)}
    assert await traffic.latest_traffic(db, []) == {}


async def test_clusters_made_for_a_service_say_so(db: Database, project: str) -> None:
    cluster = a_cluster()
    arg = ClusterInput(
        cluster_id=cluster.id, name=cluster.name, project_id=project, project="default", cloud_id="cloud_1",
        cloud="local", config=cluster.compute_config, created_by="ada", created_at=NOW, service_id="svc_1",
    )  # fmt: skip
    for _ in range(2):
        await cluster_records.insert_made_cluster(db, cluster, arg)
    row = await cluster_records.load_cluster(db, cluster.id)
    assert row is not None
    assert (row.service_id, row.job_id) == ("svc_1", None)


async def test_retention_leaves_a_service_that_is_not_deleted(db: Database, project: str) -> None:
    later = NOW + timedelta(days=1)
    for id in ("svc_1", "svc_2", "svc_3"):
        await put_service(db, project, id, a_token(f"qt_{id}", told=True))
        for number in range(1, 14):
            deploy_id, version_id = await put_deploy(db, project, id, working_dir=f"upload:{id}-{number}")
            assert await services.claim_deploy(db, deploy_id)
            over = a_version(version_id, id, number, ServiceVersionState.TERMINATED, a_config())
            state = ServiceState.RUNNING if id == "svc_1" or number < 13 else ServiceState.TERMINATED
            written = a_service(id, state=state, revision=number)
            assert await services.write_service(db, written, [over] if number < 13 else [], [an_event(f"e{id}", id)])
    async with db.begin() as conn:
        row = await services.lock_service(conn, "svc_3")
        assert row is not None
        await service_deploys.delete_service(conn, row)
        for key in (deploy_id, "qt_svc_1", "od_1"):
            await conn.execute(
                accepted.insert().values(project_id=project, key=key, body_sha256="x", resource_id=key, created_at=NOW)
            )
    assert await retention.uploads_in_use(db) == {f"svc_1-{n}" for n in range(1, 14)}
    await retention.delete_old(db, records_before=NOW - timedelta(days=1), events_before=later)
    assert await _count(db, service_versions) == 39
    assert await _count(db, sealed) == 13 + 2  # env of the one that lives; tokens of the two that are there
    while any((await retention.delete_old(db, records_before=later, events_before=later)).values()):
        pass
    assert await services.load_service(db, "svc_3") is None
    terminated = await services.load_service(db, "svc_2")
    assert terminated is not None
    assert (terminated.state, len(terminated.tokens)) == (ServiceState.TERMINATED, 1)
    async with db.read() as conn:
        for id in ("svc_1", "svc_2"):
            kept = [v.number for v in await services.versions_of(conn, id)]
            assert kept == [13, *range(12, 12 - retention.VERSIONS_KEPT, -1)]
    assert await _count(db, deploys_table) == 0
    assert await _count(db, accepted) == 0
    assert await encrypted_values.read_sealed(db, KEYS, "qt_svc_2") is not None


async def test_an_undelivered_deploy_is_not_forgotten(db: Database, project: str) -> None:
    await put_service(db, project)
    await put_deploy(db, project)
    async with db.begin() as conn:
        await conn.execute(update(deploys_table).values(created_at=NOW - timedelta(days=9)))
    await retention.delete_old(db, records_before=NOW, events_before=NOW)
    assert len(await services.unstarted_deploys(db, 0)) == 1


async def _count(db: Database, table: Any) -> int:
    async with db.read() as conn:
        return await conn.scalar(select(func.count()).select_from(table)) or 0
