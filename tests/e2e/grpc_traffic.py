"""Steady gRPC calls to a service, each checked: no call may fail, no answer may be another one's."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from typing import Any, Self
from urllib.parse import urlsplit

import grpc
from google.protobuf.wrappers_pb2 import StringValue

COUNT = 20
"""Messages of one stream, 2 s of it."""
CODEC = {"request_serializer": StringValue.SerializeToString, "response_deserializer": StringValue.FromString}


class GrpcTraffic:
    """Two threads: calls one after the other, and streams one after the other, each on a channel of its own."""

    def __init__(self, url: str, token: str | None) -> None:
        self._address = urlsplit(url).netloc
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._stop = threading.Event()
        self.answers: Counter[str] = Counter()
        """By the version's name; a stream counts once."""
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._loop, args=(ask,)) for ask in (self._say, self._count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(t.is_alive() for t in self._threads)

    def _loop(self, ask: Any) -> None:
        with grpc.insecure_channel(self._address) as channel:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                try:
                    self.answers[ask(channel, number)] += 1
                except (grpc.RpcError, AssertionError) as error:
                    self.failures.append(repr(error))
                self._stop.wait(0.02)

    def _say(self, channel: grpc.Channel, number: int) -> str:
        answer = channel.unary_unary("/test.Words/Say", **CODEC)(
            StringValue(value=str(number)), metadata=self._metadata, timeout=30
        )
        version, _, rest = answer.value.partition(" ")
        assert rest == str(number), answer
        return str(version)

    def _count(self, channel: grpc.Channel, _: int) -> str:
        answers = channel.unary_stream("/test.Words/Count", **CODEC)(
            StringValue(value=str(COUNT)), metadata=self._metadata, timeout=60
        )
        words = [a.value.split(" ") for a in answers]
        assert [w[1] for w in words] == [str(n) for n in range(COUNT)], words
        assert len({w[0] for w in words}) == 1, words
        return str(words[0][0])


def code_of(url: str, token: str | None) -> str:
    """Of one call with this token."""
    try:
        with grpc.insecure_channel(urlsplit(url).netloc) as channel:
            GrpcTraffic(url, token)._say(channel, 1)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
