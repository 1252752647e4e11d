"""A gRPC application: ``import_path: grpc_app:build`` with ``args.version``, how it calls itself, and
``grpc_servicer_functions: [grpc_app.add_echo]``. What a generator would have written stands here by hand."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue
from ray import serve

CODEC = {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}


def add_echo(servicer: Any, server: Any) -> None:
    methods = {
        "Say": grpc.unary_unary_rpc_method_handler(servicer.Say, **CODEC),
        "Count": grpc.unary_stream_rpc_method_handler(servicer.Count, **CODEC),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Words", methods),))
    server.add_registered_method_handlers("test.Words", methods)


@serve.deployment(ray_actor_options={"num_cpus": 0.05}, max_ongoing_requests=100, graceful_shutdown_timeout_s=30)
class Words:
    def __init__(self, version: str) -> None:
        self._version = version

    async def Say(self, request: StringValue) -> StringValue:
        return StringValue(value=f"{self._version} {request.value}")

    async def Count(self, request: StringValue) -> AsyncIterator[StringValue]:
        """``request``: how many, one each 100 ms."""
        for number in range(int(request.value)):
            yield StringValue(value=f"{self._version} {number}")
            await asyncio.sleep(0.1)


def build(args: dict[str, Any]) -> serve.Application:
    return Words.bind(args["version"])
