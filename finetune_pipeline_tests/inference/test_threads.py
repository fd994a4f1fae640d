"""The number of decoding threads follows the background load and does not change the logits."""

import subprocess
import sys
import time

import llama_cpp
import numpy as np
import pytest

from finetune_pipeline.inference.native import Batch, NativeModel
from finetune_pipeline.inference.probe import write_tiny_gguf
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.inference.threads import MEASURE_SECONDS, BackgroundLoad, Threads, threads_for


@pytest.mark.parametrize(
    ("cores", "used_by_others", "most", "expected"),
    [
        (2, 0.0, 2, 2),
        (2, 0.3, 2, 2),
        (2, 1.0, 2, 1),
        (2, 1.4, 2, 1),
        (2, 2.0, 2, 1),
        (16, 2.1, 8, 8),
        (16, 12.2, 8, 4),
        (16, 16.0, 8, 1),
        (4, 0.0, 1, 1),
    ],
)
def test_every_thread_gets_its_own_core(cores, used_by_others, most, expected):
    assert threads_for(cores, used_by_others, most) == expected


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_only_the_load_of_other_processes_is_counted():
    load = BackgroundLoad()
    spin(0.5)
    before = load.since_last()
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        # The load is an average over time, so time has to pass here, and the processes have to start.
        time.sleep(0.3)
        load.since_last()
        time.sleep(1.0)
        loaded = load.since_last()
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    cores = len(load._cores)
    assert 0 <= before <= cores
    assert loaded > 0.8 * min(4, cores)


@pytest.mark.parametrize(("most", "fixed", "measures"), [(4, False, True), (4, True, False), (1, False, False)])
def test_fixed_threads_do_not_measure_the_load(most, fixed, measures, monkeypatch):
    threads = Threads(most, fixed=fixed)
    monkeypatch.setattr(threads._load, "since_last", lambda: 1000.0)
    monkeypatch.setattr(threads, "_measured", time.monotonic() - MEASURE_SECONDS)
    assert threads.update() == (1 if measures else most)
    assert threads.most == most


@pytest.mark.parametrize("changes", [[2, 2], [1, 2, 1, 3, 2, 1]])
def test_the_number_of_threads_does_not_change_the_logits(tmp_path, changes):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    model = NativeModel(ModelSpec(gguf=tmp_path / "tiny.gguf", context=256, parallel=1, threads=3, fixed_threads=True))
    prompt = model.tokenize("the same under any load " * 3)

    def logits(counts):
        batch, rows = Batch(), []
        model.clear_sequence(0)
        tokens, position = prompt, 0
        for count in counts:
            llama_cpp.llama_set_n_threads(model._context, count, count)
            batch.clear()
            batch.add(0, position, tokens, 1)
            position += len(tokens)
            rows.append(model.decode(batch).copy())
            tokens = [int(rows[-1].argmax())]
        return np.stack(rows)

    assert np.array_equal(logits([1] * len(changes)), logits(changes))
