"""Clouds: register, verify, update, delete."""

from __future__ import annotations

import uuid

from heliostat.client.effects import Flow, Stream
from heliostat.client.groups import Group, M, many, one
from heliostat.client.resources import lists
from heliostat.client.transport import path_of
from heliostat.models.clouds import (
    AwsCloudCreate,
    Cloud,
    CloudSetup,
    GcpCloudCreate,
    SetupFiles,
    Trust,
    Verification,
)

CLOUDS = "clouds"


class Clouds(Group[M]):
    @many
    def list(self) -> Stream[Cloud]:
        return lists.pages(self._api, path_of(CLOUDS), Cloud)

    @one
    def get(self, ref: str) -> Flow[Cloud]:
        return (yield from self._api.call("GET", path_of(CLOUDS, ref), Cloud))

    @one
    def trust(self) -> Flow[Trust]:
        """The identities that an account must trust before it is registered."""
        return (yield from self._api.call("GET", path_of(CLOUDS, "trust"), Trust))

    @one
    def setup(self, request: CloudSetup) -> Flow[SetupFiles]:
        """A template of what a cloud needs in its account, for a person to review and apply. Creates nothing."""
        return (yield from self._api.call("POST", path_of(CLOUDS, "setup"), SetupFiles, body=request))

    @one
    def register(self, request: AwsCloudCreate | GcpCloudCreate, *, idempotency_key: str | None = None) -> Flow[Cloud]:
        """Registers a cloud. It is usable at once; ``verify`` checks its account."""
        return (yield from self._api.call("POST", path_of(CLOUDS), Cloud, body=request, key=idempotency_key))

    @one
    def update(
        self, ref: str, request: AwsCloudCreate | GcpCloudCreate, *, idempotency_key: str | None = None
    ) -> Flow[Cloud]:
        """Replaces the whole config; it applies to launches from the moment that this returns, after some seconds.
        Raises InvalidRequest for another name or provider, and Conflict for another region, account, network or bucket
        while anything uses the cloud."""
        key = idempotency_key or str(uuid.uuid4())
        return (yield from self._api.call("PUT", path_of(CLOUDS, ref), Cloud, body=request, key=key))

    @one
    def verify(self, ref: str) -> Flow[Verification]:
        """Checks every permission, network rule and bucket that the cloud needs; takes up to a minute."""
        return (yield from self._api.call("POST", path_of(CLOUDS, ref, "verify"), Verification))

    @one
    def set_default(self, ref: str) -> Flow[Cloud]:
        """Makes it the cloud of requests that name none."""
        return (yield from self._api.call("POST", path_of(CLOUDS, ref, "default"), Cloud))

    @one
    def delete(self, ref: str, *, force: bool = False) -> Flow[None]:
        """Deletes a cloud; its account does not change. Raises Conflict while anything uses it or is left in it, and
        for the default cloud while there are others. ``force``: does not check the account for orphaned resources."""
        params = {"force": force or None}
        return (yield from self._api.call("DELETE", path_of(CLOUDS, ref), type(None), params=params))
