"""What the API makes of Temporal's refusals."""

from __future__ import annotations

from typing import Any, cast

import pytest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from api.kit import temporal
from heliostat.errors import Unavailable
from runtime.messages.common import TerminateRequest


class Refusing:
    """A client whose updates are refused ``times`` times: the workflow's task failed beneath them."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.ids: list[str] = []

    def get_workflow_handle(self, _: str) -> Refusing:
        return self

    async def execute_update(self, _name: str, _arg: Any, *, id: str, **_: Any) -> None:
        self.ids.append(id)
        if self.left:
            self.left -= 1
            raise RPCError("unexpected workflow task failure", RPCStatusCode.FAILED_PRECONDITION, b"")


async def test_an_update_over_which_a_workflow_task_failed_is_said_again_under_the_same_id() -> None:
    client = Refusing(2)
    await temporal.update(cast(Client, client), "job_1", "terminate", TerminateRequest(actor="user:ann"), None, "job")
    assert len(client.ids) == 3
    assert len(set(client.ids)) == 1, "else it could be carried out twice"


async def test_a_workflow_that_stays_unready_is_said_to_be_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporal, "UPDATE_S", -1.5)
    with pytest.raises(Unavailable):
        await temporal.update(
            cast(Client, Refusing(10**6)), "job_1", "terminate", TerminateRequest(actor="user:ann"), "key", "job"
        )
