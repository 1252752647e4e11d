"""The load for ``examples/serve_model``: what its model writes follows from the seed, so every answer is known."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benchmarks.load_http import Answer, Progress
from benchmarks.load_kinds import Kind, Plan, Sender, WrongAnswer

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "serve_model"
ORDER = 2
"""The model's, in ``service.yaml``."""
PROMPT, WORDS = "Alice", 40


@cache
def _model() -> Any:
    """The example's own model. Its ``model.py`` is not importable by name: its folder is on nobody's path here."""
    spec = importlib.util.spec_from_file_location("heliostat_example_model", EXAMPLE / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NGram(module.CORPUS.read_text(), ORDER)


def _words(nonce: str) -> Iterator[str]:
    return islice(_model().generate(PROMPT, _seed(nonce)), WORDS)


def _seed(nonce: str) -> int:
    return int(nonce, 16) % 2**31


def _checked(sender: Sender, answer: Answer, wanted: str, found: str) -> str:
    """The version's id. Raises WrongAnswer."""
    if found != wanted:
        raise WrongAnswer(f"status {answer.status}, wrong text: {found[:80]!r}, not {wanted[:80]!r}")
    return sender.version_of(answer.headers)


def _field(answer: Answer, name: str) -> str:
    """Of a JSON body. Raises WrongAnswer."""
    try:
        if answer.status == 200:
            return str(json.loads(answer.body)[name])
    except (ValueError, TypeError, KeyError):
        pass
    raise WrongAnswer(f"status {answer.status}, no {name!r} in {answer.body[:200].decode(errors='replace')!r}")


def _called(sender: Sender, answer: Answer) -> tuple[str, str]:
    """The version's id, and how it calls itself. Raises WrongAnswer."""
    text = _field(answer, "version")
    return sender.version_of(answer.headers), text


async def version(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    return _called(sender, await sender.fresh(progress, "GET", f"/version?nonce={nonce}"))


async def kept_version(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    return _called(sender, await sender.on_kept(progress, "GET", f"/version?nonce={nonce}"))


async def streamed(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    query = urlencode({"prompt": PROMPT, "words": WORDS, "seed": _seed(nonce)})
    answer = await sender.fresh(progress, "GET", f"/generate?{query}")
    wanted = "".join(f"{word} " for word in _words(nonce)) + "\n"
    return _checked(sender, answer, wanted, answer.body.decode(errors="replace")), ""


async def whole(sender: Sender, nonce: str, progress: Progress) -> tuple[str, str]:
    body = json.dumps({"prompt": PROMPT, "words": WORDS, "seed": _seed(nonce)}).encode()
    answer = await sender.on_kept(progress, "POST", "/generate", body, (("Content-Type", "application/json"),))
    return _checked(sender, answer, " ".join(_words(nonce)), _field(answer, "text")), ""


EXAMPLE_PLAN = Plan(
    kinds=(
        Kind("fresh", 6, 15, True, version),
        Kind("kept", 6, 15, True, kept_version),
        Kind("stream", 4, 20, True, streamed),
        Kind("post", 4, 15, False, whole),
    )
)
"""20 requests a second."""
