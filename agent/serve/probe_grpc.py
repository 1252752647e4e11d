"""A real gRPC call through the load balancer, for a probe: Serve's own method that lists the applications. It proves
the route, the gate and Serve's gRPC server. The methods of the applications are unknown to the agent.

Ray Serve needs grpc, so it is installed here; this module imports it only when needed.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

METHOD = "/ray.serve.RayServeAPIService/ListApplications"
VERSION_METADATA = "x-heliostat-version"
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, as a new client
    ("grpc.enable_http_proxy", 0),  # not the environment's proxy: the load balancer is on this network
    ("grpc.enable_retries", 0),
]


@dataclass
class Answer:
    code: str
    """gRPC's name of the status code, for example ``OK`` or ``UNAVAILABLE``."""
    number: int
    details: str
    version: str | None
    """From the gate; None: no gate of Heliostat's answered."""
    body: bytes = b""


def unavailable() -> str:
    """Why this head can't make gRPC calls; "": it can."""
    try:
        import grpc  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        return (
            f"gRPC can't be probed: Ray's Python on this head lacks the module grpc, which ray[serve] needs ({error})"
        )
    return ""


def ask(
    url: urllib.parse.SplitResult, metadata: dict[str, str], timeout_s: float, context: ssl.SSLContext | None
) -> Answer:
    """One call, over a new connection.

    Args:
        url: the endpoint's; its path has no meaning to gRPC.
        context: how its certificate is checked; None: without TLS (HTTP/2 by prior knowledge).

    Raises:
        TimeoutError, OSError: no answer in time; no TLS.
    """
    import grpc

    with _channel(url, timeout_s, context) as channel:
        method = channel.unary_unary(METHOD)
        sent = [(name.lower(), value) for name, value in metadata.items()]
        try:
            body, call = method.with_call(b"", timeout=timeout_s, metadata=sent)
        except grpc.RpcError as error:
            body, call = b"", error
        if call.code() == grpc.StatusCode.DEADLINE_EXCEEDED and _version(call) is None:
            raise TimeoutError
        return Answer(call.code().name, call.code().value[0], call.details() or "", _version(call), body)


def _version(call: Any) -> str | None:
    metadata = {str(name): value for name, value in call.trailing_metadata() or ()}
    value = metadata.get(VERSION_METADATA)
    return None if value is None else str(value)


@contextlib.contextmanager
def _channel(url: urllib.parse.SplitResult, timeout_s: float, context: ssl.SSLContext | None) -> Iterator[Any]:
    import grpc

    host, port = url.hostname or "", url.port or (80 if context is None else 443)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if context is None:
        channel = grpc.insecure_channel(target, options=OPTIONS)
    else:
        certificate, name = _certificate(host, port, timeout_s, context)
        options = [*OPTIONS, ("grpc.ssl_target_name_override", name)]
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(certificate.encode()), options=options)
    with channel:
        yield channel


def _certificate(host: str, port: int, timeout_s: float, context: ssl.SSLContext) -> tuple[str, str]:
    """The server's certificate in PEM, checked by ``context``, and one of its names. gRPC always checks certificates,
    by roots of its own, so it gets this one as its only root."""
    with (
        socket.create_connection((host, port), timeout_s) as raw,
        context.wrap_socket(raw, server_hostname=host) as tls,
    ):
        pem = ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")
    if context.check_hostname:
        return pem, host
    pinned = ssl.create_default_context(cadata=pem)
    pinned.check_hostname = False
    pinned.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    with socket.create_connection((host, port), timeout_s) as raw, pinned.wrap_socket(raw) as tls:
        read: dict[str, Any] = dict(tls.getpeercert() or {})
    names = [str(name) for kind in ("DNS", "IP Address") for k, name in read.get("subjectAltName", ()) if k == kind]
    if not names:
        raise ssl.SSLError("the server's certificate has no name")
    return pem, names[0].replace("*", "any")
