"""The gate inside Ray Serve's proxies: checks tokens, counts requests, labels each answer with its version, and lets a
head drain.

The agent copies this package to a folder of its own on Ray's PYTHONPATH, under the name ``heliostat_serve_gate``
(``agent.gate_install``). So it imports nothing of the agent's, itself only by relative imports, and starlette and grpc
only where a proxy has loaded them already. Serve loads it by two names:

- ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=heliostat_serve_gate:middlewares`` for HTTP and websockets;
- ``heliostat_serve_gate.guard_grpc`` as an entry of ``grpc_servicer_functions`` for gRPC.

It follows the gate file, which the agent replaces by rename (``policy``). One of the file's ``hashes`` lets a request
through to the application. The token of ``probe_hash`` is the agent's own: it lets a request through as a probe, which
does not count as traffic and reaches the application without its token. With it, ``GET /-/heliostat`` answers the
statistics.
"""

from .grpc import guard_grpc
from .http import middlewares

__all__ = ["guard_grpc", "middlewares"]
