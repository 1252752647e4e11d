"""The bare workflow that ``lifecycles`` measures against, and its worker: ``python -m benchmarks.bare_workflow
ADDRESS TASK_QUEUE``."""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

TIMEOUT = timedelta(seconds=60)


@activity.defn
async def nothing() -> None:
    pass


@workflow.defn
class Bare:
    @workflow.run
    async def run(self, remote: int, local: int) -> None:
        for _ in range(remote):
            await workflow.execute_activity(nothing, start_to_close_timeout=TIMEOUT)
        for _ in range(local):
            await workflow.execute_local_activity(nothing, start_to_close_timeout=TIMEOUT)


async def main(address: str, queue: str) -> None:
    client = await Client.connect(address)
    async with Worker(client, task_queue=queue, workflows=[Bare], activities=[nothing]):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
