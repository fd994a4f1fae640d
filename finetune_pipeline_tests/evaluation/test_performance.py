"""Performance at saturation, with a real model."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune_pipeline.evaluation.performance import WAVES, Performance, measure_performance, peak_memory
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline_tests.stories import STORIES_GGUF

from .fakes import FakeEngines

MEASURED = {
    "requests_per_second": 10, "tokens_per_second": 500, "concurrency": 8, "requests": 32, "prompt_tokens": 20.4,
    "response_tokens": 50, "seconds": 3.2,
}  # fmt: skip


def test_a_model_is_measured_at_the_stated_concurrency():
    requests = [GenerateRequest(prompt=f"Once upon a time, {name}", max_tokens=8) for name in ("Tom", "Lily", "a cat")]
    found = measure_performance({"stories": ModelSpec(gguf=STORIES_GGUF, context=128)}, requests, 2, 0.5)["stories"]
    assert (found.concurrency, found.requests, found.response_tokens) == (2, 2 * WAVES, 8)
    assert found.requests_per_second == pytest.approx(found.requests / found.seconds)
    assert found.tokens_per_second == pytest.approx(8 * found.requests_per_second)
    assert 5 < found.prompt_tokens < 20
    assert found.peak_memory_bytes > STORIES_GGUF.stat().st_size


def test_every_model_gets_the_same_requests(tmp_path):
    (tmp_path / "a.gguf").write_text("{}")
    (tmp_path / "b.gguf").write_text("{}")
    engines = FakeEngines()
    specs = {name: ModelSpec(gguf=tmp_path / f"{name}.gguf") for name in "ab"}
    requests = [GenerateRequest(messages=[{"role": "user", "content": text}], max_tokens=8) for text in "xyz"]
    measure_performance(specs, requests, 2, None, engines)
    first, second = ([text for gguf, text in engines.asked if gguf == f"{name}.gguf"] for name in "ab")
    assert first == second == ["x", *"xyzxyzxy"]
    assert all((spec.parallel, spec.fixed_threads) == (2, True) for spec in engines.opened)


def test_a_model_that_refuses_an_answer_has_no_performance(tmp_path):
    (tmp_path / "a.gguf").write_text('{"constrained": {"y": null}}')
    requests = [
        GenerateRequest(messages=[{"role": "user", "content": text}], max_tokens=8, json_schema={}) for text in "xy"
    ]
    spec = ModelSpec(gguf=tmp_path / "a.gguf")
    assert measure_performance({"a": spec}, requests, 2, None, FakeEngines()) == {}


@pytest.mark.parametrize(("price", "tokens", "cost"), [(None, 500, None), (0.9, 500, 0.5), (0.9, 0, None)])
def test_the_cost_is_that_of_the_generated_tokens_at_saturation(price, tokens, cost):
    found = Performance(**{**MEASURED, "tokens_per_second": tokens, "price_per_hour": price})
    assert found.cost_per_million_tokens == (None if cost is None else pytest.approx(cost))


def test_the_conditions_are_stated():
    stated = "8 at a time, 32 requests with 20 prompt tokens on average, 3.2 s"
    assert Performance(**MEASURED).conditions == stated
    busy = Performance(**MEASURED, background_cores=1.26).conditions
    assert busy == f"{stated}, while other processes used 1.3 cores"


def test_peak_memory_is_that_of_the_process():
    code = "import sys; held = bytearray(80_000_000); del held; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        found = peak_memory(child.pid)
        child.stdin.close()
    if Path("/proc/self/status").exists():  # elsewhere only the present size is known
        assert 80_000_000 < found < 200_000_000
    assert peak_memory(child.pid) is None  # it has ended
