"""The places that machines come from."""

from __future__ import annotations

from heliostat._flow import Flow, Group, M, Stream, many, one
from heliostat._transport import path_of
from heliostat.calls import lists
from heliostat.models.clouds import Cloud


class Clouds(Group[M]):
    @many
    def list(self) -> Stream[Cloud]:
        return lists.pages(self._api, path_of("clouds"), Cloud)

    @one
    def get(self, ref: str) -> Flow[Cloud]:
        return (yield from self._api.call("GET", path_of("clouds", ref), Cloud))
