"""A control plane in the lab, with the customer's accounts registered: what an operator of AWS and GCP has."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.e2e.support import Stack
from tests.lab.aws import CREDENTIALS
from tests.lab.lab import Lab
from tests.lab.network import GATEWAY

API_PORT = 8700


class Site:
    """``stack``: drives it as everywhere else; its home is hidden from hosts, as theirs are from each other."""

    def __init__(self, lab: Lab, stack: Stack) -> None:
        self.lab, self.stack = lab, stack

    @staticmethod
    def settings(lab: Lab, **more: str) -> dict[str, str]:
        """Of the stack: reachable by hosts, its vendors those of the lab."""
        given = {"HELIOSTAT_API_HOST": GATEWAY, "HELIOSTAT_API_PORT": str(API_PORT)}
        return given | CREDENTIALS | lab.aws.environment | lab.gcp.environment | more

    def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        url = f"{self.stack.state['api_url']}{path}"
        return httpx.request(method, url, headers=self.stack.bearer, json=body, timeout=90)

    def trust(self) -> dict[str, Any]:
        """What the customer's accounts must trust."""
        return dict(self.stack.get("/v1/clouds/trust"))

    def register_aws(self, name: str, **changes: Any) -> dict[str, Any]:
        """The customer's role trusts this organization; the cloud is registered."""
        trust = self.trust()
        external_id = trust["external_id"]
        self.lab.aws.trust(external_id, trust["installation_id"])
        config = self.lab.aws.account.config.model_copy(update={"external_id": external_id, **changes})
        return self._register(name, "aws", config.model_dump(mode="json"))

    def register_gcp(self, name: str, **changes: Any) -> dict[str, Any]:
        """The pool's provider trusts this control plane's issuer; the cloud is registered."""
        trust = self.trust()
        keys = httpx.get(f"{self.stack.state['api_url']}/.well-known/jwks.json", timeout=30).json()
        organization = trust["subject"].rpartition(":")[2]
        self.lab.gcp.trust(trust["issuer"], organization, keys)
        return self._register(name, "gcp", self.lab.gcp.config | changes)

    def _register(self, name: str, provider: str, config: dict[str, Any]) -> dict[str, Any]:
        file = self.stack.config_dir / f"{name}.json"  # YAML as well
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"name": name, "provider": provider, "config": config}))
        answer = self.call("POST", "/v1/clouds", json.loads(file.read_text()))
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def verify(self, name: str) -> dict[str, Any]:
        answer = self.call("POST", f"/v1/clouds/{name}/verify")
        assert answer.is_success, answer.text
        return dict(answer.json())
