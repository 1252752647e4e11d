"""The life of an entity workflow: it ends by its own decision, and may be cut into several runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from runtime.messages.common import TerminateRequest
    from workflows.entity.recorder import Recorder


async def shield(life: Coroutine[Any, Any, None], terminate: Callable[[TerminateRequest], None]) -> None:
    """Runs ``life`` to its end, whatever is cancelled from outside. A cancel from Temporal's UI reaches this await
    alone: a step that it cut off in the middle (a launch, a write of the records) could not be undone. It means the
    same as a terminate, since machines must be ended either way."""
    task = asyncio.create_task(life)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            terminate(TerminateRequest(actor="operator", reason="cancelled in Temporal"))
    task.result()
    await workflow.wait_condition(workflow.all_handlers_finished)


def may_continue_as_new(recorder: Recorder, *, busy: bool) -> bool:
    """Temporal suggests it, and nothing would be lost: no step runs, all is written, no message is half handled."""
    return (
        workflow.info().is_continue_as_new_suggested()
        and not busy
        and not recorder.dirty
        and workflow.all_handlers_finished()
    )
