"""A small model behind HTTP, with an endpoint that streams its answer word by word.

    serve run main:build               # without Heliostat, on a machine with Ray

GET /                                  what this is
GET /version                           which version and replica answers
GET /generate?prompt=&words=&seed=     text/plain, word by word; as server-sent events with Accept: text/event-stream
POST /generate                         the same fields as JSON; the whole text at once
"""

# Serve pickles FastAPI's routes when it meets the class below: what they use stands above it, and there is no
# `from __future__ import annotations`, for types that are text get lost.
import asyncio
import json
from collections.abc import AsyncIterator
from itertools import islice

from fastapi import FastAPI, Query, Request
from fastapi.responses import StreamingResponse
from model import CORPUS, NGram
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application

api = FastAPI(title="A very small language model")


class Args(BaseModel):
    """``args`` of the application in service.yaml, or ``K=V`` on the command line."""

    order: int = 2
    version: str = "1"
    pause_s: float = 0.02
    """Between two words of a stream, as a larger model would need it."""


class Prompt(BaseModel):
    prompt: str = Field(default="", max_length=2000)
    words: int = Field(default=60, ge=1, le=2000)
    seed: int | None = None


async def _text(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    async for word in pieces:
        yield word + " "
    yield "\n"


async def _events(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    async for word in pieces:
        yield f"data: {json.dumps({'word': word})}\n\n"
    yield "data: [DONE]\n\n"


@serve.deployment
@serve.ingress(api)
class Writer:
    def __init__(self, args: Args) -> None:
        self.args = args
        self.model = NGram(CORPUS.read_text(), args.order)

    @api.get("/")
    def about(self) -> dict[str, object]:
        return {
            "model": f"{self.args.order} words back, from {len(self.model.words)} words of Alice in Wonderland",
            "try": ["/generate?prompt=Alice&words=40", "/version"],
        }

    @api.get("/version")
    def version(self) -> dict[str, str]:
        return {"version": self.args.version, "replica": serve.get_replica_context().replica_id.unique_id}

    @api.get("/generate")
    def stream(
        self,
        request: Request,
        prompt: str = Query("", max_length=2000),
        words: int = Query(60, ge=1, le=2000),
        seed: int | None = None,
    ) -> StreamingResponse:
        pieces = self._words(prompt, words, seed)
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(_events(pieces), media_type="text/event-stream")
        return StreamingResponse(_text(pieces), media_type="text/plain; charset=utf-8")

    @api.post("/generate")
    def whole(self, body: Prompt) -> dict[str, str]:
        return {"text": " ".join(islice(self.model.generate(body.prompt, body.seed), body.words))}

    async def _words(self, prompt: str, words: int, seed: int | None) -> AsyncIterator[str]:
        for word in islice(self.model.generate(prompt, seed), words):
            yield word
            await asyncio.sleep(self.args.pause_s)


def build(args: Args) -> Application:
    return Writer.bind(args)
