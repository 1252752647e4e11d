"""Every message that a handle sends has a handler of that name, kind, argument and answer, and the other way round."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import pytest
from temporalio import workflow
from temporalio.client import Client

from runtime.messages.clouds import held_by_cloud, verify_cloud
from runtime.messages.clusters import ClusterHandle, ClusterInput, LeaseHolderHandle, start_cluster
from runtime.messages.common import WorkflowHandle
from runtime.messages.jobs import JobHandle, JobInput, start_job
from runtime.messages.services import DeployRequest, ServiceHandle, ServiceInput, deploy_service
from worker import WORKFLOWS
from workflows.clouds import HeldByCloudWorkflow, VerifyCloudWorkflow
from workflows.clusters.workflow import ClusterWorkflow
from workflows.jobs.workflow import JobWorkflow
from workflows.services.workflow import ServiceWorkflow

ROOT = Path(__file__).parents[2]
HANDLES: list[tuple[type[WorkflowHandle], type]] = [
    (ClusterHandle, ClusterWorkflow),
    (JobHandle, JobWorkflow),
    (ServiceHandle, ServiceWorkflow),
    (LeaseHolderHandle, JobWorkflow),
    (LeaseHolderHandle, ServiceWorkflow),
]
STARTS_WITH = {"ServiceWorkflow": {"deploy"}}
"""Signals that start their workflow, so that no handle sends them."""


class Recorder:
    """A client whose handles note the message that they are given."""

    def __init__(self) -> None:
        self.kind = self.name = ""
        self.result_type: Any = None
        self.started: tuple[str, Any] = ("", None)
        self.more: dict[str, Any] = {}

    def get_workflow_handle(self, _: str) -> Recorder:
        return self

    def _note(self, kind: str, name: str, result_type: Any = None, **_: Any) -> None:
        self.kind, self.name, self.result_type = kind, name, result_type

    async def signal(self, name: str, _: Any, **more: Any) -> None:
        self._note("signal", name, **more)

    async def execute_update(self, name: str, _: Any, **more: Any) -> None:
        self._note("update", name, **more)

    async def query(self, name: str, **more: Any) -> None:
        self._note("query", name, **more)

    async def start_workflow(self, name: str, arg: Any, **more: Any) -> None:
        self.started, self.more = (name, arg), more

    execute_workflow = start_workflow


def definition(of: type) -> Any:
    return workflow._Definition.must_from_class(of)


def messages(handle: type[WorkflowHandle]) -> list[Callable[..., Awaitable[Any]]]:
    own = [m for n, m in inspect.getmembers(handle, inspect.isfunction) if not n.startswith("_")]
    return [m for m in own if m is not WorkflowHandle.runs]


def argument(of: type) -> Any:
    return [get_args(of)[0].model_construct()] if get_origin(of) is list else cast(Any, of).model_construct()


async def sent(method: Callable[..., Awaitable[Any]], handle: type[WorkflowHandle]) -> tuple[Recorder, list[type], Any]:
    """What it sends, the types of its messages, and of its answer."""
    hints = get_type_hints(method)
    parameters = [p for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    types = [hints[p.name] for p in parameters if p.name != "self"]
    client = Recorder()
    await method(handle(cast(Client, client), "id"), *map(argument, types))
    return client, types, hints["return"]


@pytest.mark.parametrize(("handle", "of"), HANDLES, ids=lambda of: of.__name__)
async def test_what_a_handle_sends_has_its_handler(handle: type[WorkflowHandle], of: type) -> None:
    found = definition(of)
    for method in messages(handle):
        client, types, answer = await sent(method, handle)
        handlers = {"signal": found.signals, "update": found.updates, "query": found.queries}[client.kind]
        assert client.name == method.__name__
        assert client.name in handlers, f"{of.__name__} has no {client.kind} {client.name!r}"
        handler = handlers[client.name]
        assert handler.arg_types == types, client.name
        if client.kind != "signal":
            assert answer == (handler.ret_type if handler.ret_type is not None else type(None)), client.name
            assert (client.result_type or type(None)) == answer, client.name


@pytest.mark.parametrize(("handle", "of"), HANDLES[:3], ids=lambda of: of.__name__)
async def test_every_handler_can_be_reached(handle: type[WorkflowHandle], of: type) -> None:
    found = definition(of)
    names = {m.__name__ for m in messages(handle)} | STARTS_WITH.get(of.__name__, set())
    # The SDK answers a few queries of its own.
    assert names == {n for kind in (found.signals, found.updates, found.queries) for n in kind if not n.startswith("_")}


async def test_what_is_started_is_a_workflow_of_that_input() -> None:
    client = Recorder()
    as_client = cast(Client, client)
    common = {"name": "n", "cloud": "c", "project": "p", "cluster_id": "cl_1", "job_id": "job_1", "service_id": "svc_1"}
    starts: list[tuple[type, Awaitable[Any]]] = [
        (ClusterWorkflow, start_cluster(as_client, "q", ClusterInput.model_construct(**cast(Any, common)))),
        (JobWorkflow, start_job(as_client, "q", JobInput.model_construct(**cast(Any, common)))),
        (VerifyCloudWorkflow, verify_cloud(as_client, "q", "cloud_1", "local", 1)),
        (HeldByCloudWorkflow, held_by_cloud(as_client, "q", "cloud_1", "local", 1)),
        (
            ServiceWorkflow,
            deploy_service(
                as_client, "q", ServiceInput.model_construct(**cast(Any, common)), DeployRequest.model_construct()
            ),
        ),
    ]
    for of, start in starts:
        await start
        name, arg = client.started
        assert (name, [type(arg)]) == (definition(of).name, definition(of).arg_types)
        if "result_type" in client.more:
            assert client.more["result_type"] == definition(of).ret_type
    deploy = definition(ServiceWorkflow).signals[client.more["start_signal"]]
    assert [type(a) for a in client.more["start_signal_args"]] == deploy.arg_types


def test_no_message_is_sent_by_a_bare_name() -> None:
    """Outside ``runtime/messages``. A schedule and the monitor name the workflow that they start: it must exist."""
    known = {definition(of).name for of in WORKFLOWS}
    for folder in ("api", "activities", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith("Workflow"):
                    assert node.value in known or " " in node.value or node.value.startswith("Accepted"), where
                if path.is_relative_to(ROOT / "runtime" / "messages") or not isinstance(node, ast.Attribute):
                    continue
                assert node.attr not in ("get_workflow_handle", "execute_update", "execute_workflow"), where
