"""Query tokens: added, replaced, deleted, and delivered to the workflow."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select
from temporalio.client import Client
from temporalio.worker import Worker

from heliostat.models.services import (
    ServiceState,
)
from store.services import rows as store
from store.tables import sealed
from tests.api.conftest import World, opened
from tests.api.services.support import RUNNING, Recorder, deployed, heard, sha, write

pytestmark = pytest.mark.timeout(90)


async def test_tokens_are_rotated(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http)
        id, first = service["id"], service["query_auth_token"]
        only = await http.delete("/v1/services/chat/tokens")
        assert (only.status_code, "only token" in only.json()["detail"]) == (409, True)
        key = {"idempotency-key": "k"}
        added = [(await http.post("/v1/services/chat/tokens", headers=key)) for _ in range(2)]
        assert [a.status_code for a in added] == [201, 201], added[0].text
        assert added[0].json() == added[1].json()
        second = added[0].json()["token"]
        assert (added[0].json()["primary"], added[0].json()["active"]) == (False, False)
        third = await http.post("/v1/services/chat/tokens")
        assert (third.status_code, "2 tokens already" in third.json()["detail"]) == (409, True)
        await write(world, id, ServiceState.RUNNING, RUNNING, gate_hashes=[sha(first), sha(second)])
        both = (await http.get("/v1/services/chat")).json()
        assert [(t["token"], t["primary"], t["active"]) for t in both["query_auth_tokens"]] == [
            (first, True, True), (second, False, True),
        ]  # fmt: skip
        assert both["gate_hashes"] == []
        unknown = await http.delete("/v1/services/chat/tokens", params={"id": "qt_x"})
        assert unknown.status_code == 404
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 204
        after = (await http.get("/v1/services/chat")).json()
        assert (after["query_auth_token"], len(after["query_auth_tokens"])) == (second, 1)
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 409
    gates = [o["gate"]["hashes"] for o in await heard(temporal, id, "set_gate")]
    assert gates == [[sha(first), sha(second)], [sha(second)]]
    row = await store.load_service(world.db, id)
    assert row is not None
    assert [(t.sha256, t.told, t.deleted) for t in row.tokens] == [(sha(second), True, False)]
    async with world.db.read() as conn:
        assert await conn.scalar(select(func.count()).select_from(sealed)) == 1


async def test_a_change_of_tokens_that_was_not_told_is_told_later(
    world: World, temporal: Client, absent: Client, worker: None
) -> None:
    async with world.ada as http:
        service = await deployed(http)
        id, first = service["id"], service["query_auth_token"]
        await world.context.tasks.wait()
        world.change(temporal=absent)
        assert (await http.post("/v1/services/chat/tokens")).status_code == 503
        world.change(temporal=temporal)
        added = await http.post("/v1/services/chat/tokens")  # the same again: no third one
        assert added.status_code == 201, added.text
        second = added.json()["token"]
        world.change(temporal=absent)
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 503
        assert len((await http.get("/v1/services/chat")).json()["query_auth_tokens"]) == 1
        world.change(temporal=temporal)
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 204  # the same again
        after = (await http.get("/v1/services/chat")).json()
    assert after["query_auth_token"] == second
    gates = [o["gate"]["hashes"] for o in await heard(temporal, id, "set_gate")]
    assert gates == [[sha(first), sha(second)], [sha(second)]]


async def test_an_api_that_starts_tells_what_the_one_before_did_not(settings: Any, temporal: Client) -> None:
    class Died(BaseException):
        pass

    class Dying:
        def get_workflow_handle(self, *_: Any) -> Any:
            raise Died

    async with Worker(temporal, task_queue=settings.task_queue, workflows=[Recorder]):
        async with opened(settings, temporal) as first:
            async with first.admin as http:
                service = await deployed(http)
                await first.context.tasks.wait()
                first.change(temporal=Dying())
                with pytest.raises(Died):
                    await http.post("/v1/services/chat/tokens")
        async with opened(settings, temporal) as second:
            await second.context.tasks.wait()
            orders = await heard(temporal, service["id"], "set_gate")
            assert [len(o["gate"]["hashes"]) for o in orders] == [2]
            row = await store.load_service(second.db, service["id"])
            assert row is not None
            assert all(t.told for t in row.tokens)


async def test_a_service_without_tokens(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        service = await deployed(http, query_auth_token_enabled=False)
        assert (service["query_auth_token"], service["query_auth_tokens"]) == (None, [])
        assert (await http.post("/v1/services/chat/tokens")).status_code == 409
        assert (await http.delete("/v1/services/chat/tokens")).status_code == 404
    (request,) = await heard(temporal, service["id"], "deploy")
    assert request["gate"] == {"enabled": False, "hashes": []}
