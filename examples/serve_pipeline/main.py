"""Two deployments, one behind the other: ``Preprocess`` takes requests and makes features of them, ``Score`` judges
several at once and grows with the load.

    serve run main:app                 # without Heliostat, on a machine with Ray

GET /?text=…       POST / {"text": "…"}       → {"language": "en", "scores": {…}}
"""

# No `from __future__ import annotations` here: Serve pickles FastAPI's routes, and types that are text get lost.
import numpy as np
from fastapi import FastAPI, HTTPException, Query
from languages import Model, features
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.handle import DeploymentHandle

api = FastAPI(title="Which language is it?")


class Text(BaseModel):
    text: str = Field(min_length=1, max_length=100_000)


@serve.deployment(max_ongoing_requests=64)  # so that a batch can fill
class Score:
    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def __call__(self, batch: list[np.ndarray]) -> list[dict[str, float]]:
        return self.model.scores(batch)


@serve.deployment
@serve.ingress(api)
class Preprocess:
    def __init__(self, score: DeploymentHandle) -> None:
        self.score = score

    @api.get("/")
    async def get(self, text: str = Query("All human beings are born free", max_length=10_000)) -> dict[str, object]:
        return await self.judge(text)

    @api.post("/")
    async def post(self, body: Text) -> dict[str, object]:
        return await self.judge(body.text)

    async def judge(self, text: str) -> dict[str, object]:
        found = features(text)
        if not found.any():
            raise HTTPException(422, "there are no words in it")
        scores: dict[str, float] = await self.score.remote(found)
        return {"language": max(scores, key=scores.__getitem__), "scores": scores}


app = Preprocess.bind(Score.bind())
