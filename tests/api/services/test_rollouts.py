"""Commands to a service's workflow: terminate, roll back, roll out."""

from __future__ import annotations

from typing import Any

import pytest
from temporalio.client import Client

from heliostat.models.services import (
    ServiceState,
)
from tests.api.conftest import World
from tests.api.services.support import body, deployed, heard, write

pytestmark = pytest.mark.timeout(90)


# --- steering, ending -------------------------------------------------------------------------------------


async def test_orders_reach_the_workflow_and_its_refusals_come_back(
    world: World, temporal: Client, absent: Client, worker: None
) -> None:
    async with world.ada as http:
        id = (await deployed(http))["id"]
        moved = await http.post("/v1/services/chat/rollout", json={"action": "promote", "percent": 50})
        assert (moved.status_code, moved.json()["id"]) == (200, id)
        wrong = await http.post("/v1/services/chat/rollout", json={"action": "jump"})
        assert (wrong.status_code, wrong.json()["field"]) == (422, "action")
        ignored = await http.post("/v1/services/chat/rollout", json={"action": "pause", "percent": 50})
        assert (ignored.status_code, "not with pause" in ignored.json()["detail"]) == (422, True)
        back = await http.post("/v1/services/chat/rollback", json={"reason": "slow"})
        assert (back.status_code, back.json()["detail"]) == (409, "There is no version to roll back to.")
        for _ in range(2):
            key = {"idempotency-key": "t"}
            ended = await http.post("/v1/services/chat/terminate", json={"reason": "done"}, headers=key)
            assert ended.status_code == 200
        world.change(temporal=absent)
        assert (await http.post("/v1/services/chat/terminate")).status_code == 503
    assert await heard(temporal, id, "rollout") == [{"actor": "user:ada", "action": "promote", "percent": 50}]
    assert await heard(temporal, id, "terminate") == [{"actor": "user:ada", "reason": "done"}]


async def test_a_key_of_an_order_is_for_that_order_alone(world: World, temporal: Client, worker: None) -> None:
    async def say(path: str, **json: Any) -> tuple[int, str | None]:
        answer = await http.post(f"/v1/services/chat/{path}", json=json, headers={"idempotency-key": "k"})
        return answer.status_code, answer.json().get("field")

    async with world.ada as http:
        id = (await deployed(http))["id"]
        for _ in range(2):
            assert await say("rollout", action="promote", percent=50) == (200, None)
        assert await say("rollout", action="promote", percent=60) == (409, "Idempotency-Key")
        assert await say("rollback") == (409, "Idempotency-Key")
        assert await say("terminate") == (409, "Idempotency-Key")
        again = await http.post("/v1/services", json=body(), headers={"idempotency-key": "k"})
        assert (again.status_code, again.json()["field"]) == (409, "Idempotency-Key")
    assert [m["percent"] for m in await heard(temporal, id, "rollout")] == [50]
    assert await heard(temporal, id, "terminate") == []


async def test_what_has_ended_takes_no_orders_and_ends_again(world: World, temporal: Client, worker: None) -> None:
    async with world.ada as http:
        id = (await deployed(http))["id"]
        await world.context.tasks.wait()
        await temporal.get_workflow_handle(id).terminate()
        lost = await http.post("/v1/services/chat/terminate")
        assert (lost.status_code, "has ended" in lost.json()["detail"]) == (409, True)
        await write(world, id, ServiceState.TERMINATED)
        assert (await http.post("/v1/services/chat/terminate")).json()["state"] == "TERMINATED"
        for path, json in (("rollback", None), ("rollout", {"action": "pause"})):
            answer = await http.post(f"/v1/services/chat/{path}", json=json)
            assert (answer.status_code, "TERMINATED" in answer.json()["detail"]) == (409, True), answer.text
