"""What the API makes of Temporal's refusals."""

from __future__ import annotations

from typing import Any, cast

import pytest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from api.kit import temporal
from heliostat.errors import Unavailable
from runtime.messages.common import TerminateRequest
from runtime.messages.jobs import JobHandle


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


async def test_an_update_over_which_a_workflow_task_failed_is_sent_again_under_the_same_id() -> None:
    client = Refusing(2)
    async with temporal.updating("job", "job_1"):
        job = JobHandle(cast(Client, client), "job_1")
        await job.terminate(TerminateRequest(actor="user:ann"), timeout_s=temporal.UPDATE_S)
    assert len(client.ids) == 3
    assert len(set(client.ids)) == 1, "else it could be carried out twice"


async def test_a_repeat_under_the_same_key_is_the_same_update() -> None:
    client = Refusing(0)
    job = JobHandle(cast(Client, client), "job_1")
    for key in ("a", "a", "b", None, None):
        await job.terminate(TerminateRequest(actor="user:ann"), key=key)
    assert client.ids[0] == client.ids[1]
    assert len(set(client.ids)) == 4


async def test_a_workflow_that_stays_unready_is_unavailable() -> None:
    job = JobHandle(cast(Client, Refusing(10**6)), "job_1")
    with pytest.raises(Unavailable):
        async with temporal.updating("job", "job_1"):
            await job.terminate(TerminateRequest(actor="user:ann"), key="key", timeout_s=0.3)
