"""The metadata services of EC2 and Compute Engine at 169.254.169.254. Who asks is known by the address it asks from.

Shapes: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html and
https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys, as far as nodes of ours ask.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.lab.host import Host
from tests.lab.network import METADATA

Answer = tuple[int, str]
_NONE: Answer = (404, "")


class Metadata:
    """``by_ip``: the host that has an address, if there is one. ``calls``: (address, path) of each question."""

    def __init__(self, by_ip: Callable[[str], Host | None], address: str = METADATA, port: int = 80) -> None:
        self.by_ip = by_ip
        self.calls: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self._http = _Server((address, port), _Handler)
        self._http.metadata = self
        threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def ec2(self, host: Host, path: str) -> Answer:
        """Below ``/latest/``."""
        me, notices = host.identity, host.notices
        region = me.zone[:-1]
        if path == "dynamic/instance-identity/document":
            known = {"instanceId": me.id, "region": region, "availabilityZone": me.zone, "accountId": me.account}
            return 200, json.dumps(known | {"privateIp": me.ip, "instanceType": me.machine_type})
        if path == "user-data":
            return 200, me.user_data.decode()
        if path == f"meta-data/iam/security-credentials/{me.role}" and me.role:
            lasting = {"Code": "Success", "Type": "AWS-HMAC", "Expiration": _iso(time.time() + 6 * 3600)}
            return 200, json.dumps(lasting | {"AccessKeyId": "ASIALABNODE", "SecretAccessKey": "x", "Token": me.id})
        if path == "meta-data/spot/instance-action" and notices.action_at is not None:
            return 200, json.dumps({"action": "terminate", "time": _iso(notices.action_at)})
        if path == "meta-data/spot/termination-time" and notices.action_at is not None:
            return 200, _iso(notices.action_at)
        if path == "meta-data/events/recommendations/rebalance" and notices.rebalance_at is not None:
            return 200, json.dumps({"noticeTime": _iso(notices.rebalance_at)})
        plain = {
            "instance-id": me.id,
            "local-ipv4": me.ip,
            "local-hostname": host.name,
            "hostname": host.name,
            "instance-type": me.machine_type,
            "instance-life-cycle": "spot" if me.spot else "on-demand",
            "placement/availability-zone": me.zone,
            "placement/region": region,
            "iam/security-credentials/": me.role,
        }
        found = plain.get(path.removeprefix("meta-data/"))
        return (200, found) if found else _NONE

    def gce(self, host: Host, path: str, query: dict[str, str]) -> Answer:
        """Below ``/computeMetadata/v1/``. ``wait_for_change`` is heard for what a notice changes."""
        me, notices = host.identity, host.notices
        if path in ("instance/preempted", "instance/maintenance-event"):
            ask = (
                (lambda: str(notices.preempted).upper()) if path.endswith("preempted") else lambda: notices.maintenance
            )
            with notices.changed:
                if query.get("wait_for_change") == "true":
                    last, limit = query.get("last_etag", _etag(ask())), float(query.get("timeout_sec", 3600))
                    notices.changed.wait_for(lambda: _etag(ask()) != last or not host.alive, limit)
                return 200, ask()
        if path == "instance/service-accounts/default/token" and me.role:
            token = {"access_token": f"node-{me.id}", "expires_in": 3599, "token_type": "Bearer"}
            return 200, json.dumps(token)
        plain = {
            "project/project-id": me.account,
            "instance/id": str(int.from_bytes(me.id.encode()[-7:], "big")),
            "instance/name": me.id,
            "instance/hostname": host.name,
            "instance/zone": f"projects/123456789/zones/{me.zone}",
            "instance/machine-type": f"projects/123456789/machineTypes/{me.machine_type}",
            "instance/network-interfaces/0/ip": me.ip,
            "instance/scheduling/preemptible": str(me.spot).upper(),
            "instance/service-accounts/default/email": me.role,
        } | {f"instance/attributes/{key}": value for key, value in me.attributes.items()}
        found = plain.get(path)
        return (200, found) if found else _NONE


def _etag(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    metadata: Metadata

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # hosts lose their power in the middle of a question


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_PUT(self) -> None:
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        host = self.server.metadata.by_ip(self.client_address[0])
        if host is None or host.identity.vendor != "aws" or self.path != "/latest/api/token":
            return self._answer(404, "")
        if ttl is None or not 1 <= int(ttl) <= 21600:
            return self._answer(400, "")
        token = secrets.token_urlsafe(24)
        self.server.metadata.tokens.add(token)
        return self._answer(200, token)

    def do_GET(self) -> None:
        metadata = self.server.metadata
        metadata.calls.append((self.client_address[0], self.path))
        host = metadata.by_ip(self.client_address[0])
        url = urllib.parse.urlsplit(self.path)
        if host is None:
            return self._answer(404, "")
        if host.identity.vendor == "aws" and url.path.startswith("/latest/"):
            # IMDSv2 alone, as our launches ask for.
            if self.headers.get("X-aws-ec2-metadata-token") not in metadata.tokens:
                return self._answer(401, "")
            return self._answer(*metadata.ec2(host, url.path.removeprefix("/latest/")))
        if host.identity.vendor == "gcp" and url.path.startswith("/computeMetadata/v1/"):
            if self.headers.get("Metadata-Flavor") != "Google":
                return self._answer(403, "Missing Metadata-Flavor:Google header.")
            query = dict(urllib.parse.parse_qsl(url.query))
            return self._answer(*metadata.gce(host, url.path.removeprefix("/computeMetadata/v1/"), query))
        return self._answer(404, "")

    def _answer(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        if self.path.startswith("/computeMetadata/"):
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("ETag", _etag(text))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
