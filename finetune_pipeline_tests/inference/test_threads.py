"""How the threads wait, what else uses the cores, and that the number of threads changes no answer."""

import subprocess
import sys
import time

import llama_cpp
import numpy as np
import psutil
import pytest

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.native import Batch, NativeModel
from finetune_pipeline.inference.probe import write_tiny_gguf
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.inference.threads import SPIN_COUNT, OtherWork


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_the_work_of_others_is_counted_and_ones_own_is_not():
    work = OtherWork()
    spin(0.5)
    before = work.since_last()
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        time.sleep(0.3)
        work.since_last()
        time.sleep(1.0)
        beside = work.since_last()
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    cores = len(work._cores)
    assert 0 <= before <= cores
    assert beside > 0.8 * min(4, cores)


@pytest.mark.parametrize(("given", "expected"), [(None, str(SPIN_COUNT)), ("5", "5")])
def test_the_threads_of_a_model_sleep_soon_unless_the_environment_says_otherwise(
    monkeypatch, tmp_path, given, expected
):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    with Engine(ModelSpec(gguf=tmp_path / "tiny.gguf", context=64, parallel=1)) as engine:
        assert psutil.Process(engine.pid).environ()["GOMP_SPINCOUNT"] == expected


@pytest.mark.parametrize("changes", [[2, 2], [1, 2, 1, 3, 2, 1]])
def test_the_number_of_threads_changes_no_logit(tmp_path, changes):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    model = NativeModel(ModelSpec(gguf=tmp_path / "tiny.gguf", context=256, parallel=1, threads=3))
    prompt = model.tokenize("the same whatever else the machine does " * 3)

    def logits(counts):
        batch, rows = Batch(), []
        model.forget(0)
        tokens, position = prompt, 0
        for count in counts:
            llama_cpp.llama_set_n_threads(model._context, count, count)
            batch.clear()
            batch.add(0, position, tokens, output=True)
            position += len(tokens)
            rows.append(model.decode(batch).copy())
            tokens = [int(rows[-1].argmax())]
        return np.stack(rows)

    assert np.array_equal(logits([1] * len(changes)), logits(changes))
