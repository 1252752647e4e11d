"""The files that we ship are ones that we accept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from heliostat.client import yaml_files
from heliostat.client.packaging import is_remote, pack_working_dir
from heliostat.client.sources import Source

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/job.yaml")), ids=lambda p: p.parent.name)
def test_an_example_can_be_submitted_from_its_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    job = yaml_files.job_config(yaml_files.load(path), Source(str(path)))
    assert job.working_dir is not None
    assert not is_remote(job.working_dir)
    package = pack_working_dir(job.working_dir, job.excludes)
    package.discard()
    assert package.size < 2**20


def test_there_are_three() -> None:
    assert len(list(EXAMPLES.glob("*/job.yaml"))) >= 3


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/service.yaml")), ids=lambda p: p.parent.name)
def test_an_example_can_be_deployed_from_its_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    service = yaml_files.service_config(yaml_files.load(path), Source(str(path)))
    assert service.name is not None
    assert service.working_dir is not None
    package = pack_working_dir(service.working_dir, service.excludes)
    package.discard()
    assert package.size < 2**20
    for app in service.applications:
        # Two versions of it fit on two cores side by side.
        cpus = [d["ray_actor_options"]["num_cpus"] for d in app.deployments]
        counts = [d.get("num_replicas") or d["autoscaling_config"]["max_replicas"] for d in app.deployments]
        assert sum(cpu * count for cpu, count in zip(cpus, counts, strict=True)) <= 1


def test_there_are_two_services() -> None:
    assert len(list(EXAMPLES.glob("*/service.yaml"))) >= 2


def loaded(example: str, module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of an example, as it is imported there; other examples have modules of the same name."""
    import importlib

    monkeypatch.syspath_prepend(str(EXAMPLES / example))
    monkeypatch.delitem(sys.modules, module, raising=False)
    found = importlib.import_module(module)
    monkeypatch.delitem(sys.modules, module)
    return found


def test_the_model_goes_on_from_any_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("serve_model", "model", monkeypatch)
    made = model.NGram(model.CORPUS.read_text(), order=2)
    known = set(made.words)
    for prompt in ("", "Alice was", "no such words in this book"):
        words = list(islice(made.generate(prompt, seed=1), 500))
        assert set(words) <= known
        assert words == list(islice(made.generate(prompt, seed=1), 500))
    with pytest.raises(ValueError, match="order"):
        model.NGram("a b", order=0)


def test_the_pipeline_knows_its_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    languages = loaded("serve_pipeline", "languages", monkeypatch)
    texts = {
        "en": "I think that they would rather have been somewhere else",
        "de": "Ich glaube, dass sie lieber woanders gewesen wären",
        "fr": "Je crois qu'ils auraient préféré être ailleurs avec nous",
        "es": "Creo que ellos habrían preferido estar en otro lugar",
    }
    scores = languages.Model().scores([languages.features(text) for text in texts.values()])
    assert [max(score, key=score.get) for score in scores] == list(texts)
    assert not languages.features("1 2 3 … _").any()
    assert all(abs(sum(score.values()) - 1) < 0.01 for score in scores)


def run_in(example: str, code: str) -> Any:
    """What ``code`` prints as its last line, as JSON; in a process of its own, in the example's directory."""
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=EXAMPLES / example, env=env, capture_output=True, text=True, timeout=420)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SERVED = """
import json, signal, socket, urllib.request
import ray
from ray import serve
import main

def late(*_):
    raise TimeoutError("the example does not answer")
signal.signal(signal.SIGALRM, late)
signal.alarm(300)  # before the test's own end, so that Ray is shut down

def ask(path, body=None, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        pieces = list(iter(lambda: answer.read1(65536), b""))
        return answer.headers["content-type"], len(pieces), b"".join(pieces).decode()

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=4, include_dashboard=False)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(APP)
    answers = ASKED
finally:
    serve.shutdown()
    ray.shutdown()
print(json.dumps(answers))
"""


def served(example: str, app: str, *asked: str) -> list[Any]:
    """Content type, number of pieces and text of each answer, from the example on real Ray."""
    requests = "[" + ", ".join(f"ask({args})" for args in asked) + "]"
    found: list[Any] = run_in(example, SERVED.replace("APP", app).replace("ASKED", requests))
    return found


@pytest.mark.ray
@pytest.mark.timeout(450)
@pytest.mark.long
def test_the_pipeline_answers_over_http() -> None:
    body = """'/', b'{"text": "Wie geht es dir, und wo bist du?"}', **{'Content-Type': 'application/json'}"""
    answers = served("serve_pipeline", "main.app", "'/'", body)
    assert [json.loads(answer[2])["language"] for answer in answers] == ["en", "de"]


@pytest.mark.ray
@pytest.mark.timeout(450)
@pytest.mark.long
def test_the_model_streams_over_http() -> None:
    about, version, plain, events, whole = served(
        "serve_model",
        "main.build(main.Args(version='7', pause_s=0.1))",
        "'/'",
        "'/version'",
        "'/generate?words=8&seed=1'",
        "'/generate?words=8&seed=1', Accept='text/event-stream'",
        """'/generate', b'{"words": 8, "seed": 1}', **{'Content-Type': 'application/json'}""",
    )
    assert "Alice" in about[2]
    assert json.loads(version[2])["version"] == "7"
    text = json.loads(whole[2])["text"]
    assert plain[0].startswith("text/plain")
    assert plain[2] == text + " \n"
    assert plain[1] > 3, "it came in pieces"
    assert events[0].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in events[2].splitlines() if line]
    assert data.pop() == "[DONE]"
    assert [json.loads(piece)["word"] for piece in data] == text.split()
