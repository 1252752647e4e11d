"""The places that machines come from."""

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
        """What an account must trust, and by which name, before it is registered."""
        return (yield from self._api.call("GET", path_of(CLOUDS, "trust"), Trust))

    @one
    def setup(self, request: CloudSetup) -> Flow[SetupFiles]:
        """A template of what a cloud needs in its account, to be read and applied there. Makes nothing."""
        return (yield from self._api.call("POST", path_of(CLOUDS, "setup"), SetupFiles, body=request))

    @one
    def register(self, request: AwsCloudCreate | GcpCloudCreate, *, idempotency_key: str | None = None) -> Flow[Cloud]:
        """Usable at once; ``verify`` says whether its account is as it must be."""
        return (yield from self._api.call("POST", path_of(CLOUDS), Cloud, body=request, key=idempotency_key))

    @one
    def update(
        self, ref: str, request: AwsCloudCreate | GcpCloudCreate, *, idempotency_key: str | None = None
    ) -> Flow[Cloud]:
        """Gives it another config, whole; what is launched from then on goes by it, when this returns after some
        seconds. Raises InvalidRequest for another name or provider, and Conflict for another place, network or bucket
        while anything lives there."""
        key = idempotency_key or str(uuid.uuid4())
        return (yield from self._api.call("PUT", path_of(CLOUDS, ref), Cloud, body=request, key=key))

    @one
    def verify(self, ref: str) -> Flow[Verification]:
        """Looks at every right, network rule and bucket that the cloud needs; takes up to a minute."""
        return (yield from self._api.call("POST", path_of(CLOUDS, ref, "verify"), Verification))

    @one
    def set_default(self, ref: str) -> Flow[Cloud]:
        """Where goes what names no cloud."""
        return (yield from self._api.call("POST", path_of(CLOUDS, ref, "default"), Cloud))

    @one
    def delete(self, ref: str, *, force: bool = False) -> Flow[None]:
        """Forgets it; its account is not touched. Raises Conflict while anything lives there or is left there, and for
        the default one while there are others. ``force``: the cloud itself is not asked what is left there."""
        params = {"force": force or None}
        return (yield from self._api.call("DELETE", path_of(CLOUDS, ref), type(None), params=params))
