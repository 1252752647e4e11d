"""Commands to the agent on a cluster's head."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandActivities, CommandRequest
    from workflows import policies


class CommandAbandoned(Exception):
    """Nobody waits for the command's answer any more: its head is lost, or what it was for."""


async def run_command(
    request: CommandRequest, *, summary: str, timeout: timedelta, abandon: Callable[[], bool]
) -> dict[str, Any]:
    """The head's answer.

    Raises:
        ActivityError: the agent could not carry it out, or gave no answer within ``timeout``.
        CommandAbandoned: ``abandon`` came true first. The agent may still carry it out.
    """
    command = workflow.start_activity_method(
        CommandActivities.run_command,
        request,
        summary=summary,
        schedule_to_close_timeout=timeout,
        **policies.COMMAND,
    )
    await workflow.wait_condition(lambda: command.done() or abandon())
    if not command.done():
        cancel_quietly(command)
        raise CommandAbandoned
    answer: dict[str, Any] = await command
    return answer


def cancel_quietly(handle: workflow.ActivityHandle[Any]) -> None:
    """Cancels what is not done. Nobody reads how it ends; without the callback asyncio would report that."""
    if not handle.done():
        handle.add_done_callback(lambda h: h.cancelled() or h.exception())
        handle.cancel()
